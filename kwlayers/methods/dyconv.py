"""DY-Conv: K kernels mixed by a softmax attention.

Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020, arXiv 1912.03458.
For an input with C channels, K kernels and h = max(1, int(C * reduction)):

    alpha = softmax(fc2(relu(fc1(mean of x over positions))) / T)       (B, K), fc1 without bias
    W = sum_k alpha_k W_k                                               biases alike

    parameters  K * |W| (+ K * C_out) + C*h + h*K + K
    MACs        conv + K * |W| to mix + h * (C + K)

T falls from 30 to 1 over the warm-up: near-even mixtures train all kernels. Published: K = 4, every
convolution of the blocks and their shortcuts. On purpose different from PAD-Net's code of it:

- The warm-up ends at T = 1. There its last step is 1 + 29 / steps, and T stays so for ever.
- The head stays linear. There it is a 1x1 convolution with the same parameters.
- Nothing of a forward is kept in the layer, and any memory format is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.attention import pooled
from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicConvNd, DynamicLinear, kaiming_normal_
from kwlayers.fields import MAX_TEMPERATURE, allow, allow_max_temperature, allow_reduction
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.mixed import KernelGroup, MixedLayer, convert_mixed, mixed_cost
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, Site
from kwlayers.schedule import Tempered


def hidden_width(in_channels: int, reduction: float) -> int:
    """h."""
    return max(int(in_channels * reduction), 1)


@dataclass(frozen=True)
class DYConvGroup(KernelGroup):
    """One layer of K kernels.

    num_kernels: K. reduction: width of the attention over the channels. max_temperature: of the
    softmax at the start of the warm-up.
    """

    num_kernels: int = allow("kernels, K", int, least=1)
    reduction: float = allow_reduction()
    max_temperature: float = allow_max_temperature()

    method: ClassVar[str] = "dyconv"

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        (site,) = sites
        channels, kernels = site.in_channels, self.num_kernels
        weights = hidden_width(channels, self.reduction) * (channels + kernels)
        return (mixed_cost(self.name, site, kernels, (weights + kernels, weights)),)


@dataclass(frozen=True)
class DYConvSettings(AloneSettings):
    """DY-Conv with K = num_kernels in each layer, or as many as a budget allows."""

    num_kernels: int = allow("kernels of each layer, K", int, 4, least=1)
    reduction: float = allow_reduction()
    max_temperature: float = allow_max_temperature()
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "dyconv"
    group_type: ClassVar[type[Group]] = DYConvGroup
    sizes: ClassVar[tuple[str, ...]] = ("num_kernels",)

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> DYConvGroup:
        layers = tuple(site.name for site in sites)
        return DYConvGroup(name, layers, own.num_kernels, own.reduction, own.max_temperature)


class DYAttention(Tempered):
    """alpha (B, K) for an input (B, C, *S): a softmax, nearly even at temperature 1."""

    def __init__(
        self,
        in_channels: int,
        num_kernels: int,
        reduction: float,
        max_temperature: float,
        **to: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_width(in_channels, reduction)
        self.max_temperature = max_temperature
        self.fc1 = nn.Linear(in_channels, hidden, bias=False, **to)
        self.fc2 = nn.Linear(hidden, num_kernels, **to)
        self._add_temperature(**to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) weights, zero biases."""
        self.temperature.zero_()
        for layer in (self.fc1, self.fc2):
            kaiming_normal_(layer.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc2(F.relu(self.fc1(pooled(x))))
        scale = 1 + (self.max_temperature - 1) * self.temperature.to(logits.dtype)
        return torch.softmax(logits / scale, dim=-1)


class _DYLayer(MixedLayer):
    """Settings beside torch.nn's: num_kernels, reduction, max_temperature, backend and
    workspace_mb.
    """

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        num_kernels: int = 4,
        reduction: float = 1 / 16,
        max_temperature: float = MAX_TEMPERATURE,
        backend: str | None = None,
        workspace_mb: float | None = None,
        **to: Any,
    ) -> None:
        self._own_kernels(num_kernels, bias, backend, workspace_mb, **to)
        self.attention = DYAttention(in_channels, num_kernels, reduction, max_temperature, **to)
        self.reset_parameters()

    def convolve(self, x: Tensor) -> Tensor:
        return self.mixed(x, self.attention(x))


class DYConv1d(_DYLayer, DynamicConvNd):
    """`nn.Conv1d` of K kernels, mixed by softmax attention."""

    rank = 1


class DYConv2d(_DYLayer, DynamicConvNd):
    """`nn.Conv2d` of K kernels, mixed by softmax attention."""

    rank = 2


class DYConv3d(_DYLayer, DynamicConvNd):
    """`nn.Conv3d` of K kernels, mixed by softmax attention."""

    rank = 3


class DYLinear(_DYLayer, DynamicLinear):
    """`nn.Linear` of K weights, mixed by softmax attention."""


_LAYERS = {nn.Conv1d: DYConv1d, nn.Conv2d: DYConv2d, nn.Conv3d: DYConv3d, nn.Linear: DYLinear}


def _convert(
    plan: Plan, group: DYConvGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """A warm start computes what the static layer does: each kernel is the static one."""
    return convert_mixed(_LAYERS, layers, how, _start, group.settings)


def _start(layer: _DYLayer, weight: Tensor) -> None:
    layer.start_from(weight, 1.0, alike=True)


METHOD = Method(
    name="dyconv",
    title="DY-Conv",
    paper="Chen et al., CVPR 2020, arXiv 1912.03458",
    group=DYConvGroup,
    settings=DYConvSettings,
    convert=_convert,
)
