"""Layers that read like torch.nn's, plus one argument: the warehouse that they mix from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import geometry
from kwlayers.attention import Attention
from kwlayers.ops import ConvGeometry, check_settings, kw_conv
from kwlayers.warehouse import Warehouse

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class LayerSettings(TypedDict, total=False):
    """What every layer takes beside its warehouse.

    reduction (1/16), basis_ratio (1), norm ("batch" or "layer"): its attention. assignment: its
    cells at temperature 1, by default the next ones of the warehouse. ratio: b where one was given.
    backend, workspace_mb: as `kwlayers.ops.kw_conv` takes them. device, dtype: torch.nn's.
    """

    reduction: float
    basis_ratio: float
    norm: str
    assignment: geometry.Assignment | None
    ratio: float | None
    backend: str | None
    workspace_mb: float | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class _KWLayer(nn.Module):
    """What convolutions and linear layers share: attention, bias, a borrowed warehouse.

    Keyword arguments as in `LayerSettings`.
    """

    def __init__(
        self,
        in_channels: int,
        kernel: tuple[int, ...],
        bias: bool,
        warehouse: Warehouse,
        *,
        reduction: float = 1 / 16,
        basis_ratio: float = 1.0,
        norm: str = "batch",
        assignment: geometry.Assignment | None = None,
        ratio: float | None = None,
        backend: str | None = None,
        workspace_mb: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_settings(backend, workspace_mb)
        mixtures = geometry.num_mixtures(kernel, warehouse.cell)
        cells = warehouse.next_cells(mixtures) if assignment is None else assignment
        # In a tuple, so that the module does not register it: it has one home, the model's root.
        self._warehouse = (warehouse,)
        self.attention = Attention(
            in_channels,
            mixtures,
            warehouse.num_cells,
            cells,
            total_mixtures=warehouse.num_mixtures,
            ratio=ratio,
            reduction=reduction,
            basis_ratio=basis_ratio,
            norm=norm,
            device=device,
            dtype=dtype,
        )
        if bias:
            zeros = torch.zeros(kernel[0], device=device, dtype=dtype)
            self.bias: nn.Parameter | None = nn.Parameter(zeros)
        else:
            self.register_parameter("bias", None)
        self.backend = backend
        self.workspace_mb = workspace_mb
        # Last, so that a layer which is refused takes nothing.
        if assignment is None:
            warehouse.hand_out(mixtures)
        warehouse.reset_parameters(cells.start, cells.length)

    def reset_parameters(self) -> None:
        """A bias of zeros: after `to_empty`. The attention and the warehouse have their own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def warehouse(self) -> Warehouse:
        """Where the cells are. Not a submodule of the layer."""
        return self._warehouse[0]


class _KWConvNd(_KWLayer):
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
        *,
        warehouse: Warehouse,
        **settings: Unpack[LayerSettings],
    ) -> None:
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
        kernel = (out_channels, in_channels // groups, *spread["kernel_size"])
        super().__init__(in_channels, kernel, bias, warehouse, **settings)
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
        self.geometry = ConvGeometry(kernel, self.stride, inner, self.dilation, groups)

    @classmethod
    def _spread(cls, name: str, size: int | tuple[int, ...]) -> tuple[int, ...]:
        sizes = (size,) * cls.rank if isinstance(size, int) else tuple(size)
        if len(sizes) != cls.rank or min(sizes) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} {size}: one size, or {cls.rank} of them")
        return sizes

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
        alpha = self.attention(x)
        if self._pad:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._pad, mode)
        out = kw_conv(
            x, alpha, self.warehouse.cells, self.geometry, self.backend, self.workspace_mb
        )
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


class KWConv1d(_KWConvNd):
    """`nn.Conv1d` with kernels mixed from `warehouse`, whose cells are (c_out, c_in, k)."""

    rank = 1


class KWConv2d(_KWConvNd):
    """`nn.Conv2d` with kernels mixed from `warehouse`, whose cells are (c_out, c_in, kh, kw).

    Further keyword arguments: `LayerSettings`.
    """

    rank = 2


class KWConv3d(_KWConvNd):
    """`nn.Conv3d` with kernels mixed from `warehouse`; cells (c_out, c_in, kd, kh, kw)."""

    rank = 3


class KWLinear(_KWLayer):
    """`nn.Linear` with weights mixed from `warehouse`, whose cells are (c_out, c_in, 1).

    One weight per entry of the first axis; the attention sees the mean over the others.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        warehouse: Warehouse,
        **settings: Unpack[LayerSettings],
    ) -> None:
        kernel = (out_features, in_features, 1)
        super().__init__(in_features, kernel, bias, warehouse, **settings)
        self.in_features = in_features
        self.out_features = out_features
        self.geometry = ConvGeometry(kernel, (1,), (0,), (1,), 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, …, C) or (C,)  out: (B, …, C_out) or (C_out,)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected {self.in_features} on the last axis"
            )
        if x.dim() == 1:
            return self.forward(x[None])[0]
        tokens = self.tokens(x)
        alpha = self.attention(tokens)
        out = kw_conv(
            tokens, alpha, self.warehouse.cells, self.geometry, self.backend, self.workspace_mb
        )
        out = out.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        """x: (B, …, C)  out: (B, C, tokens), as attention and `kw_conv` take them."""
        return (x.flatten(1, -2) if x.dim() > 2 else x[:, None]).transpose(1, 2)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


def like(layer: nn.Module, warehouse: Warehouse, **settings: Any) -> _KWLayer:
    """The KernelWarehouse layer for a static one, which lends it its bias parameter."""
    made: _KWLayer
    weight = layer.weight
    assert isinstance(weight, Tensor)
    settings |= {"device": weight.device, "dtype": weight.dtype, "warehouse": warehouse}
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = KWLinear(layer.in_features, layer.out_features, has_bias, **settings)
    else:
        kinds = {nn.Conv1d: KWConv1d, nn.Conv2d: KWConv2d, nn.Conv3d: KWConv3d}
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        made = kinds[type(layer)](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            has_bias,
            layer.padding_mode,
            **settings,
        )
    if has_bias:
        made.bias = layer.bias  # type: ignore[assignment]
    return made.train(layer.training)
