"""DCD: a static kernel, its output channels scaled, and L latent channels fused dynamically.

Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021, arXiv 2103.08756.
For C input channels pooled to m cells each, and hs(t) = relu6(t + 3) / 3, without biases:

    u = F (cells of x);  y = u * hs(S u)                        (B, s)
    Phi = G y, lambda = hs(D y)                                 (B, L, L), (B, C_out)
    z = norm(Q x), Q: 1x1, with the convolution's stride        (B, L, *S')
    out = lambda * conv(x, w) + P (norm(Phi z) + z)

    parameters  |w| + L * (C + C_out) + 4L, and F, S, G, D: m*C*s + s^2 + s*L^2 + s*C_out
    MACs        (|w| + L * (C + C_out) + L^2) * positions out, and as many as F, S, G, D have;
                modulation C_out * positions out

Published, with s = max(m*C, L^2) // fc_squeeze, at least 4, and all sizes rounded down:

    basic       L = sqrt(4C), m = 4: ResNets of two convolutions a block
    bottleneck  L = sqrt(C), m = 1: ResNets of three
    mobilenet   L = min(m*C, C_out) / r, at least 4; m = 4 and r = 8 where C < C_out, else 1 and 2;
                r doubles until L^2 <= 2*m*C
    classifier  L = s = 32, m = 1: the head of each

in the convolutions of the blocks (of MobileNetV2: both 1x1 of each block that expands); stem,
shortcuts, depthwise layers and the last convolution stay static. No temperature.

Phi is not bounded: a block's output grows with the square of its input unless norms hold it. With
the statistics that norms start with, a deep network overflows in evaluation (resnet20 gives NaN);
after a few tens of batches in training it does not.

The published code differs:
- fc_squeeze is 8 by default. Its own command for MobileNetV2 1.0 has 16, for 1,732,060 parameters
  less; so it is 16 here.
- Its ResNets end in a fixed 7x7 pool, for 224 pixels only. A converted model keeps its own.
- A bottleneck's s has no least value there, and would be 0 below 16 channels.
- lambda scales the head's bias, too. Here, as in the other methods, a static bias stays as it is.
- The head's norms cannot train on a batch of one. Here they then take their running statistics.
- MobileNetV2's linear layers start at N(0, 0.01^2). Here they start as the ResNets' do.
- Q reads every stride-th position from the first. Where the padding is not half the kernel, that is
  not what the convolution reads, nor as many; here Q reads what the kernel's centre does.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.attention import norm_of, pooled, pooled_parts
from kwlayers.cost import LayerCost
from kwlayers.dynamic import (
    DynamicConvNd,
    DynamicLayer,
    DynamicLinear,
    convert_layers,
    kaiming_normal_,
)
from kwlayers.families import Label, Recognised
from kwlayers.fields import allow
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.ops.reference import CONV
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, Site
from kwlayers.stages import place

VARIANTS = ("basic", "bottleneck", "mobilenet")
CELLS = (1, 4)

_CLASSIFIER = "classifier"
_GROUP_VARIANTS = (*VARIANTS, _CLASSIFIER)
_CLASSIFIER_SIZE = 32
_LEAST = 4
_GROUPED = "dcd takes no grouped convolution: its latent channels mix what groups keep apart"


def squeeze_of(latent: int, cells: int, in_channels: int, fc_squeeze: int = 16) -> int:
    """s as published, but of classifiers."""
    return max(max(cells * in_channels, latent**2) // fc_squeeze, _LEAST)


def latent_of(variant: str, in_channels: int, out_channels: int) -> tuple[int, int]:
    """(L, m) as published."""
    if variant == _CLASSIFIER:
        return _CLASSIFIER_SIZE, 1
    if variant == "basic":
        return math.isqrt(4 * in_channels), 4
    if variant == "bottleneck":
        return math.isqrt(in_channels), 1
    cells, divisor = (4, 8) if in_channels < out_channels else (1, 2)
    narrow = min(cells * in_channels, out_channels)
    while (narrow // divisor) ** 2 > 2 * cells * in_channels:
        divisor *= 2
    return max(narrow // divisor, _LEAST), cells


@dataclass(frozen=True)
class DCDGroup(Group):
    """One layer of L latent channels, which the budget decides.

    latent: L. squeeze: s. cells: m, 1 or 4 (2x2 of a map, 4 of a sequence, 2x2 of a volume at all
    depths). variant: by which `unit` is the published L.
    """

    latent: int = allow("latent channels, L", int, least=1)
    squeeze: int = allow("hidden width of the attention, s", int, least=1)
    cells: int = allow("means that a channel is pooled to, m: 1 or 4", int, 1, least=1, most=4)
    variant: str = allow("whose published L a budget scales", str, "bottleneck", *_GROUP_VARIANTS)

    method: ClassVar[str] = "dcd"
    size_name: ClassVar[str] = "latent"
    ratio_words: ClassVar[tuple[str, str]] = ("L over the published, all layers", "L / published")
    alone: ClassVar[bool] = True
    no_ratio: ClassVar[str] = "it adds to the static kernels"

    @classmethod
    def refuses(cls, site: Site) -> str:
        return super().refuses(site) or (_GROUPED if site.groups > 1 else "")

    def unit(self, sites: Sequence[Site]) -> int:
        """The published L."""
        (site,) = sites
        return latent_of(self.variant, site.in_channels, site.out_channels)[0]

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        (site,) = sites
        _check_cells(self.cells, site.kind == "linear")

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        (site,) = sites
        channels, outputs = site.in_channels, site.out_channels
        latent, squeeze = self.latent, self.squeeze
        kernels = site.weights + latent * (channels + outputs)
        attention = squeeze * (self.cells * channels + squeeze + latent**2 + outputs)
        return (
            LayerCost(
                name=site.name,
                group=self.name,
                static_params=site.params - site.weights,
                conv_macs=(kernels + latent**2) * site.positions,
                kernel_params=kernels + 4 * latent,
                attention_params=attention,
                attention_macs=site.samples * attention,
                modulation_macs=outputs * site.positions,
            ),
        )

    @staticmethod
    def smallest(groups: int) -> str:
        return "static kernels and one latent channel a layer"

    def describe(self) -> str:
        return f"L = {self.latent}"


@dataclass(frozen=True)
class DCDSettings(AloneSettings):
    """DCD with the published L in each layer, or as many latent channels as a budget allows.

    variant: of L and m (see above); "auto": by the network, "bottleneck" for what was not
    published. fc_squeeze: s is the larger of m*C and L^2 over it. classifier: whether a linear head
    becomes dynamic. Other linear layers stay static unless a rule says dynamic, and then have the
    sizes of a bottleneck's 1x1.
    """

    variant: str = allow(
        "whose published sizes; auto: the network's", str, "auto", "auto", *VARIANTS
    )
    fc_squeeze: int = allow("attention width s: max(m * C, L^2) over this", int, 16, least=1)
    classifier: bool = allow("whether a linear head becomes dynamic", bool, True)
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "dcd"
    group_type: ClassVar[type[Group]] = DCDGroup
    static_roles: ClassVar[tuple[str, ...]] = (
        "stem", "patch embedding", "shortcut", "last convolution",
    )  # fmt: skip
    own: ClassVar[tuple[str, ...]] = ("ratio",)

    def declines(self, site: Site, label: Label) -> str:
        if label.role == "head":
            return "" if self.classifier and site.kind == "linear" else "the head stays static"
        if site.kind == "linear":
            return "by dcd linear layers but the head stay static"
        return "by dcd convolutions outside the blocks stay static" if label.alone else ""

    def lower(self) -> Iterator[dict[str, Any]]:
        yield {"fc_squeeze": 2 * self.fc_squeeze}
        yield {"fc_squeeze": 4 * self.fc_squeeze}
        if self.classifier:
            yield {"classifier": False}

    def _by_default(self, network: Network) -> dict[str, str]:
        reasons = super()._by_default(network)
        placed = place(network.sites)
        if placed.variant == "mobilenet":
            # Of the first block, which does not expand.
            first = next(name for name, label in placed.labels.items() if label.kind == "pwconv")
            reasons[first] = reasons[first] or "the first block stays static"
        return reasons

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> DCDGroup:
        (site,) = sites
        variant = self._variant(site, place(network.sites))
        latent, cells = latent_of(variant, site.in_channels, site.out_channels)
        squeeze = _CLASSIFIER_SIZE
        if variant != _CLASSIFIER:
            squeeze = squeeze_of(latent, cells, site.in_channels, self.fc_squeeze)
        return DCDGroup(name, (site.name,), latent, squeeze, cells, variant)

    def _variant(self, site: Site, placed: Recognised) -> str:
        if site.kind == "linear":
            return _CLASSIFIER if placed.labels[site.name].role == "head" else "bottleneck"
        return placed.variant or "bottleneck" if self.variant == "auto" else self.variant


class DCDAttention(nn.Module):
    """Phi (B, L, L) and lambda (B, C_out) for an input (B, C, *S)."""

    def __init__(
        self, in_channels: int, out_channels: int, latent: int, squeeze: int, cells: int, **to: Any
    ) -> None:
        super().__init__()
        self.latent = latent
        self.cells = cells
        self.fc = nn.Linear(cells * in_channels, squeeze, bias=False, **to)
        self.gate = nn.Linear(squeeze, squeeze, bias=False, **to)
        self.phi = nn.Linear(squeeze, latent**2, bias=False, **to)
        self.scale = nn.Linear(squeeze, out_channels, bias=False, **to)

    def reset_parameters(self) -> None:
        """As torch.nn's linear layers."""
        for layer in (self.fc, self.gate, self.phi, self.scale):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.fc(_cells_of(x, self.cells))
        y = u * _hard_sigmoid(self.gate(u))
        return self.phi(y).unflatten(-1, (self.latent, self.latent)), _hard_sigmoid(self.scale(y))


def _hard_sigmoid(t: Tensor) -> Tensor:
    """From 0 to 2; 1 at 0."""
    return F.relu6(t + 3) / 3


def _cells_of(x: Tensor, cells: int) -> Tensor:
    """(B, C, *S) -> (B, C * cells): means over parts of the positions."""
    if cells == 1:
        return pooled(x)
    if x.dim() == 3:
        return pooled_parts(x, 4)
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, 2).flatten(1)
    return F.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1)


def _check_cells(cells: int, linear: bool) -> None:
    if linear and cells != 1:
        raise ValueError(f"cells {cells}: a linear layer pools to 1")
    if cells not in CELLS:
        raise ValueError(f"cells {cells}: allowed are {' and '.join(map(str, CELLS))}")


class _DCDLayer(DynamicLayer):
    """Settings beside torch.nn's: latent and squeeze (by default a bottleneck's), and cells."""

    weight: nn.Parameter
    q: Any
    p: Any
    norm1: Any
    norm2: Any

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        latent: int | None = None,
        squeeze: int | None = None,
        cells: int = 1,
        **to: Any,
    ) -> None:
        if self.geometry.groups > 1:
            raise ValueError(f"groups {self.geometry.groups}: {_GROUPED}")
        linear = isinstance(self, DynamicLinear)
        outputs, inputs = self.geometry.kernel[:2]
        if latent is None:
            latent, _ = latent_of("bottleneck", inputs, outputs)
        if squeeze is None:
            squeeze = squeeze_of(latent, cells, inputs)
        for name, size in {"latent": latent, "squeeze": squeeze}.items():
            if size < 1:
                raise ValueError(f"{name} {size}: at least 1")
        _check_cells(cells, linear)
        shape = (outputs, inputs) if linear else self.geometry.kernel
        self.weight = nn.Parameter(torch.empty(shape, **to))
        self._own_bias(bias, **to)
        self.attention = DCDAttention(inputs, outputs, latent, squeeze, cells, **to)
        self._own_latent(inputs, outputs, latent, **to)
        self.reset_parameters()

    @abstractmethod
    def _own_latent(self, inputs: int, outputs: int, latent: int, **to: Any) -> None:
        """Make Q, P and the norms of the latent channels."""

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) kernels, Q and P of convolutions; torch.nn's linear layers."""
        self._reset_bias()
        self.attention.reset_parameters()
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Compute what the static layer does: zeros in D make lambda 1, in P drop the rest."""
        self.weight.copy_(weight)
        self.weight.requires_grad_(weight.requires_grad)
        self.attention.scale.weight.zero_()
        self.p.weight.zero_()


_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _DCDConvNd(_DCDLayer, DynamicConvNd):
    def _own_latent(self, inputs: int, outputs: int, latent: int, **to: Any) -> None:
        conv = _CONVS[self.rank]
        self.q = conv(inputs, latent, 1, self.stride, bias=False, **to)
        self.p = conv(latent, outputs, 1, bias=False, **to)
        self.norm1 = _NORMS[self.rank](latent, **to)
        self.norm2 = nn.BatchNorm1d(latent, **to)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for kernel in (self.weight, self.q.weight, self.p.weight):
            kaiming_normal_(kernel)

    def convolve(self, x: Tensor) -> Tensor:
        phi, scale = self.attention(x)
        x = self.padded(x)
        out = CONV[self.rank](x, self.weight, None, *self.geometry[1:])
        z = self.norm1(self.q(self._centred(x, out.shape[2:])))
        flat = z.flatten(2)
        fused = self.norm2(phi @ flat) + flat
        scaled = out * scale.view(*scale.shape, *(1,) * self.rank)
        found: Tensor = scaled + self.p(fused.view(z.shape))
        return found

    def _centred(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Where the centre of the kernel is for outputs of `sizes`, of which Q takes each stride.

        That of an even kernel is the first of its two middle taps. x: (B, C, *S), already `padded`.
        Outside it there are zeros.
        """
        kernel, stride, padding, dilation, _ = self.geometry
        pads: list[int] = []
        for axis, size in enumerate(sizes):
            length, step = x.shape[2 + axis], stride[axis]
            first = dilation[axis] * ((kernel[2 + axis] - 1) // 2) - padding[axis]
            end = first + (size - 1) * step + 1
            fits = first == 0 and (length - 1) // step + 1 == size
            # F.pad counts axes from the last.
            pads = ([0, 0] if fits else [-first, end - length]) + pads
        return F.pad(x, pads) if any(pads) else x


class DCDConv1d(_DCDConvNd):
    """`nn.Conv1d` with scaled output channels and dynamically fused latent ones."""

    rank = 1


class DCDConv2d(_DCDConvNd):
    """`nn.Conv2d` with scaled output channels and dynamically fused latent ones."""

    rank = 2


class DCDConv3d(_DCDConvNd):
    """`nn.Conv3d` with scaled output channels and dynamically fused latent ones."""

    rank = 3


class DCDLinear(_DCDLayer, DynamicLinear):
    """`nn.Linear` with scaled outputs and dynamically fused latent features."""

    def _own_latent(self, inputs: int, outputs: int, latent: int, **to: Any) -> None:
        self.q = nn.Linear(inputs, latent, bias=False, **to)
        self.p = nn.Linear(latent, outputs, bias=False, **to)
        self.norm1, self.norm2 = (
            norm_of("batch", latent, to.get("device"), to.get("dtype")) for _ in range(2)
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.weight, self.q.weight, self.p.weight):
            nn.init.kaiming_uniform_(weight, math.sqrt(5))

    def convolve(self, x: Tensor) -> Tensor:
        phi, scale = self.attention(x)
        tokens = x.transpose(1, 2)
        z = _by_token(self.norm1, self.q(tokens))
        fused = _by_token(self.norm2, z @ phi.transpose(1, 2)) + z
        found: Tensor = F.linear(tokens, self.weight) * scale[:, None] + self.p(fused)
        return found.transpose(1, 2)


def _by_token(norm: nn.Module, z: Tensor) -> Tensor:
    """z: (B, tokens, L)  out: the same, over all tokens of all samples."""
    normed: Tensor = norm(z.flatten(0, 1))
    return normed.view(z.shape)


_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: DCDConv1d,
    nn.Conv2d: DCDConv2d,
    nn.Conv3d: DCDConv3d,
    nn.Linear: DCDLinear,
}


def _convert(plan: Plan, group: DCDGroup, layers: Mapping[str, Any], how: Conversion) -> Converted:
    """No kernel is made for a sample: `backend` and `workspace_mb` have nothing to decide."""
    settings = {"latent": group.latent, "squeeze": group.squeeze, "cells": group.cells}
    return convert_layers(_LAYERS, layers, how, _DCDLayer.start_from, **settings)


METHOD = Method(
    name="dcd",
    title="DCD",
    paper="Li et al., ICLR 2021, arXiv 2103.08756",
    group=DCDGroup,
    settings=DCDSettings,
    convert=_convert,
)
