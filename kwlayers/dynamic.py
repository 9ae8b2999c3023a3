"""What the dynamic layers of all methods have in common: torch.nn's arguments, inputs and names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.methods import Conversion, Converted
from kwlayers.ops import ConvGeometry

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class DynamicLayer(nn.Module):
    """A convolution or linear layer whose kernel depends on its input.

    geometry: of the convolution that it computes; a linear layer's is 1x1 over its tokens.
    undecayed: parameters of its own that weight decay spares, as it does biases.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    geometry: ConvGeometry
    bias: nn.Parameter | None
    # Modules that it computes with and somebody else registers: in a tuple, as an attribute of its
    # own would register them again.
    borrowed: tuple[nn.Module, ...] = ()

    @abstractmethod
    def _build(self, in_channels: int, bias: bool, **settings: Any) -> None:
        """Make everything else; the sizes are known. settings: the method's, device and dtype."""

    @abstractmethod
    def convolve(self, x: Tensor) -> Tensor:
        """x: (B, C, *S), not yet padded  out: (B, C_out, *S'), without the bias of `_own_bias`."""

    @abstractmethod
    def padded(self, x: Tensor) -> Tensor:
        """x with the padding that `geometry` leaves to others."""

    def _own_bias(self, bias: bool, device: Any = None, dtype: Any = None) -> None:
        """A bias like torch.nn's, which `forward` adds. It starts at zero."""
        if bias:
            zeros = torch.zeros(self.geometry.kernel[0], device=device, dtype=dtype)
            self.bias = nn.Parameter(zeros)
        else:
            self.register_parameter("bias", None)

    def _reset_bias(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def alone_(self, batch: int) -> None:
        """Have what others give it while a network of it runs, for `batch` samples: so it runs by
        itself, to be timed.
        """

    def take_bias(self, bias: nn.Parameter) -> None:
        """Have the static layer's bias parameter."""
        self.bias = bias


class DynamicConvNd(DynamicLayer):
    """A convolution of any rank, with torch.nn's arguments, and settings of its method."""

    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **settings: Any,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups {groups} must divide in_channels {in_channels} "
                f"and out_channels {out_channels}"
            )
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode {padding_mode!r}: allowed are {_PADDING_MODES}")
        sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        spread = {name: self._spread(name, size) for name, size in sizes.items()}
        if not isinstance(padding, str):
            padding = self._spread("padding", padding)
        sides = _sides(padding, **spread)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = spread["kernel_size"]
        self.stride = spread["stride"]
        self.padding = padding
        self.dilation = spread["dilation"]
        self.groups = groups
        self.padding_mode = padding_mode
        even = all(left == right for left, right in sides)
        in_op = padding_mode == "zeros" and even
        inner = tuple(left for left, _ in sides) if in_op else (0,) * self.rank
        # What the convolution cannot pad itself; F.pad counts axes from the last.
        self._pad = [] if in_op else [side for pair in reversed(sides) for side in pair]
        kernel = (out_channels, in_channels // groups, *self.kernel_size)
        self.geometry = ConvGeometry(kernel, self.stride, inner, self.dilation, groups)
        self._build(in_channels, bias, **settings)

    @classmethod
    def _spread(cls, name: str, size: int | tuple[int, ...]) -> tuple[int, ...]:
        sizes = (size,) * cls.rank if isinstance(size, int) else tuple(size)
        if len(sizes) != cls.rank or min(sizes) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} {size}: one size, or {cls.rank} of them")
        return sizes

    def padded(self, x: Tensor) -> Tensor:
        if not self._pad:
            return x
        return F.pad(
            x, self._pad, "constant" if self.padding_mode == "zeros" else self.padding_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) or (C, *S)  out: (B, C_out, *S') or (C_out, *S')."""
        axes = x.dim() - self.rank
        if axes not in (1, 2) or x.shape[axes - 1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (B, {self.in_channels}, …) with "
                f"{self.rank + 2} axes, or {self.rank + 1} without batch"
            )
        if axes == 1:
            return self.forward(x[None])[0]
        out = self.convolve(x)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype).view(-1, *(1,) * self.rank)
        return out

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        defaults = {
            "padding": (0,) * self.rank,
            "dilation": (1,) * self.rank,
            "groups": 1,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text


def _sides(
    padding: str | tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Padding before and after, per axis."""
    if padding == "valid":
        return [(0, 0)] * len(kernel_size)
    if padding == "same":
        if max(stride) > 1:
            raise ValueError("padding 'same' needs stride 1")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise ValueError(f"padding {padding!r}: a size, 'same' or 'valid'")
    return [(p, p) for p in padding]


class DynamicLinear(DynamicLayer):
    """A linear layer: one kernel per entry of the first axis."""

    rank = 0

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **settings: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.geometry = ConvGeometry((out_features, in_features, 1), (1,), (0,), (1,), 1)
        self._build(in_features, bias, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, …, C) or (C,)  out: (B, …, C_out) or (C_out,)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected {self.in_features} on the last axis"
            )
        if x.dim() == 1:
            return self.forward(x[None])[0]
        out = self.convolve(self.tokens(x))
        out = out.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def padded(self, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        """x: (B, …, C)  out: (B, C, tokens), as attention and `kw_conv` take them."""
        return (x.flatten(1, -2) if x.dim() > 2 else x[:, None]).transpose(1, 2)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


def kaiming_normal_(weight: Tensor) -> None:
    """N(0, 2 / (C_out * k)) for a weight (C_out, C_in / groups, *k): fan out, whatever the groups.

    torch's own initialisation of grouped layers, as torchvision's models have it, is the same.
    """
    # On meta there is nothing to fill, and the first normal_ there costs seconds of imports.
    if not weight.is_meta:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def convert_layers(
    kinds: Mapping[type[nn.Module], Any],
    layers: Mapping[str, nn.Module],
    how: Conversion,
    start: Callable[[Any, Tensor], None],
    **settings: Any,
) -> Converted:
    """Layers of `kinds` (by torch.nn's) for static ones. start: of a layer from a static weight."""
    swaps: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        made = like_static(kinds, layer, **settings)
        if how.warm_start:
            assert isinstance(layer.weight, Tensor)
            start(made, layer.weight)
        swaps[layer] = made
    return Converted(swaps, errors=dict.fromkeys(layers, 0.0) if how.warm_start else {})


def like_static(kinds: Mapping[type[nn.Module], Any], layer: nn.Module, **settings: Any) -> Any:
    """The dynamic layer for a static one, which lends it its bias parameter.

    kinds: the class for each of torch.nn's. The result has the layer's device, dtype and mode.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    names = (
        ("in_features", "out_features")
        if isinstance(layer, nn.Linear)
        else (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
            "padding_mode",
        )
    )  # fmt: skip
    made = kinds[type(layer)](
        **{name: getattr(layer, name) for name in names},
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **settings,
    )
    if layer.bias is not None:
        made.take_bias(layer.bias)
    return made.train(layer.training)
