"""ODConv: attention over kernels, their positions, input channels and output channels.

Li, Zhou & Yao, "Omni-Dimensional Dynamic Convolution", ICLR 2022, arXiv 2209.07947. For C input
channels, K kernels of k positions and A = max(int(C * reduction), 16):

    z = relu(norm(fc1(mean of x over positions)))                     (B, A), fc1 without bias
    a_c, a_f, a_s = sigmoid(heads(z) / T): (B, C), (B, C_out), (B, k)  none a_f if depthwise,
    a_w = softmax(head(z) / T): (B, K)                                 a_s if k = 1, a_w if K = 1
    W = a_s * sum_K a_w W_K;  y = a_f * conv(a_c * x, W)

    parameters  K * |W| + C*A + 2A + (A + 1) * heads,  heads = C + C_out + k + K (where there)
    MACs        conv + A * (C + heads); to mix K * |W|, and K * k if K > 1 (none if k = K = 1);
                modulation C * positions in + C_out * positions out (if there is a_f)

T falls from 30 to 1 over the warm-up. Published: K = 1 or 4, every convolution of the blocks but
shortcuts. On purpose different from the published code:

- A static layer's bias stays as it is. There layers have none.
- T is in the state dict. There a checkpoint of the warm-up is evaluated at T = 1, which it was not.
- The norm of the attention trains on a batch of one, with its running statistics. There it raises.
- MACs are those of the released code. Its README's of ResNet50 and 101 are of another bottleneck,
  with the stride on the first 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import geometry
from kwlayers.attention import norm_of, pooled
from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicConvNd, kaiming_normal_
from kwlayers.fields import (
    MAX_TEMPERATURE,
    allow,
    allow_max_temperature,
    allow_norm,
    allow_reduction,
)
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.mixed import KernelGroup, MixedLayer, convert_mixed
from kwlayers.ops import workspace_bytes
from kwlayers.ops.reference import CONV
from kwlayers.ops.remade import conv_remade
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, Site
from kwlayers.schedule import Tempered


class Heads(NamedTuple):
    """Outputs of the attention; 0 for one that is not there."""

    channel: int
    filter: int
    position: int
    kernel: int

    @classmethod
    def of(cls, kernel: Sequence[int], groups: int, num_kernels: int) -> Heads:
        """kernel: (C_out, C_in / groups, *k)."""
        channels, positions = kernel[1] * groups, math.prod(kernel[2:])
        depthwise = channels == groups == kernel[0]
        return cls(
            channels,
            0 if depthwise else kernel[0],
            positions if positions > 1 else 0,
            num_kernels if num_kernels > 1 else 0,
        )


@dataclass(frozen=True)
class ODConvGroup(KernelGroup):
    """One layer of K kernels.

    num_kernels: K. reduction, norm: of the attention. max_temperature: at the start of the warm-up.
    """

    num_kernels: int = allow("kernels, K", int, least=1)
    reduction: float = allow_reduction()
    norm: str = allow_norm()
    max_temperature: float = allow_max_temperature()

    method: ClassVar[str] = "odconv"
    kinds: ClassVar[tuple[str, ...]] = ("conv1d", "conv2d", "conv3d")

    def counted_otherwise(self, sites: Sequence[Site]) -> dict[str, int]:
        (cost,), (site,) = self.costs(sites), sites
        several = self.num_kernels if self.num_kernels > 1 else 0
        product = site.samples * several * site.weights
        return {
            **super().counted_otherwise(sites),
            "mixing, element by element, which it does not see": product - cost.mixing_macs,
        }

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        (site,) = sites
        width = geometry.hidden_width(site.in_channels, self.reduction)
        heads = Heads.of(site.kernel, site.groups, self.num_kernels)
        first = site.in_channels * width + (width if self.norm == "layer" else 0)
        mixing = self.num_kernels * (site.weights + (heads.position if heads.kernel else 0))
        if not heads.position and not heads.kernel:
            mixing = 0
        filtered = site.out_channels * site.positions if heads.filter else 0
        return (
            LayerCost(
                name=site.name,
                group=self.name,
                static_params=site.params - site.weights,
                conv_macs=site.macs,
                mixtures=1,
                kernel_params=self.num_kernels * site.weights,
                attention_params=first + 2 * width + (width + 1) * sum(heads),
                mixing_macs=site.samples * mixing,
                attention_macs=site.samples * width * (site.in_channels + sum(heads)),
                modulation_macs=site.in_channels * site.all_in_positions + filtered,
            ),
        )


@dataclass(frozen=True)
class ODConvSettings(AloneSettings):
    """ODConv with K = num_kernels in each layer, or as many as a budget allows.

    norm: "batch", "layer" or "auto": "layer" if the model has no batch norm.
    """

    num_kernels: int = allow("kernels of each layer, K", int, 1, least=1)
    reduction: float = allow_reduction()
    norm: str = allow_norm(auto=True)
    max_temperature: float = allow_max_temperature()
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "odconv"
    group_type: ClassVar[type[Group]] = ODConvGroup
    sizes: ClassVar[tuple[str, ...]] = ("num_kernels",)
    static_roles: ClassVar[tuple[str, ...]] = ("stem", "head", "patch embedding", "shortcut")

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> ODConvGroup:
        norm = network.norm(self.norm)
        layers = tuple(site.name for site in sites)
        return ODConvGroup(name, layers, own.num_kernels, own.reduction, norm, own.max_temperature)


class Attended(NamedTuple):
    """channel: (B, C)  filter: (B, C_out)  position: (B, k)  kernel: (B, K); None for no head."""

    channel: Tensor
    filter: Tensor | None
    position: Tensor | None
    kernel: Tensor | None


class ODAttention(Tempered):
    """The four attentions for an input (B, C, *S)."""

    def __init__(
        self,
        in_channels: int,
        heads: Heads,
        reduction: float,
        norm: str,
        max_temperature: float,
        **to: Any,
    ) -> None:
        super().__init__()
        width = geometry.hidden_width(in_channels, reduction)
        self.heads = heads
        self.max_temperature = max_temperature
        self.fc1 = nn.Linear(in_channels, width, bias=norm == "layer", **to)
        self.norm = norm_of(norm, width, to.get("device"), to.get("dtype"))
        self.fc2 = nn.Linear(width, sum(heads), **to)
        self._add_temperature(**to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) weights, those of each head as its own; zero biases."""
        self.temperature.zero_()
        self.norm.reset_parameters()
        for weight in (
            self.fc1.weight,
            *torch.split(self.fc2.weight, [h for h in self.heads if h]),
        ):
            kaiming_normal_(weight)
        for layer in (self.fc1, self.fc2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Attended:
        z = self.fc2(F.relu(self.norm(self.fc1(pooled(x)))))
        z = z / (1 + (self.max_temperature - 1) * self.temperature.to(z.dtype))
        channel, filtered, position, kernel = z.split(list(self.heads), dim=-1)
        return Attended(
            torch.sigmoid(channel),
            torch.sigmoid(filtered) if self.heads.filter else None,
            torch.sigmoid(position) if self.heads.position else None,
            torch.softmax(kernel, dim=-1) if self.heads.kernel else None,
        )


class _ODLayer(MixedLayer):
    """Settings beside torch.nn's: num_kernels, reduction, norm, max_temperature, backend,
    workspace_mb. backend is for 1x1 layers of several kernels: with an attention over positions
    there is one path.
    """

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        num_kernels: int = 1,
        reduction: float = 1 / 16,
        norm: str = "batch",
        max_temperature: float = MAX_TEMPERATURE,
        backend: str | None = None,
        workspace_mb: float | None = None,
        **to: Any,
    ) -> None:
        self._own_kernels(num_kernels, False, backend, workspace_mb, **to)
        self._own_bias(bias, **to)
        heads = Heads.of(self.geometry.kernel, self.geometry.groups, num_kernels)
        self.attention = ODAttention(in_channels, heads, reduction, norm, max_temperature, **to)
        self.reset_parameters()

    def convolve(self, x: Tensor) -> Tensor:
        seen: Attended = self.attention(x)
        maps = (1,) * (x.dim() - 2)
        x = x * seen.channel.to(x.dtype).view(*seen.channel.shape, *maps)
        out = self._kernels_of(x, seen)
        if seen.filter is None:
            return out
        return out * seen.filter.to(out.dtype).view(*seen.filter.shape, *maps)

    def _kernels_of(self, x: Tensor, seen: Attended) -> Tensor:
        if seen.position is None:
            if seen.kernel is not None:
                return self.mixed(x, seen.kernel)
            conv = CONV[x.dim() - 2]
            return conv(self.padded(x), self.kernels[0], None, *self.geometry[1:])
        each = [seen.position] if seen.kernel is None else [seen.position, seen.kernel]
        nbytes = workspace_bytes(x, self.workspace_mb)
        own = [self.kernels]
        return conv_remade(_kernels, self.padded(x), self.geometry, each, own, nbytes, self.backend)


def _kernels(position: Tensor, *others: Tensor) -> Tensor:
    """position: (B, k), then weights (B, K) if K > 1, and kernels (K, C_out, C_in / groups, *k)."""
    *given, kernels = others
    batch = position.shape[0]
    place = position.view(batch, 1, 1, *kernels.shape[3:]).to(kernels.dtype)
    if not given:
        return kernels * place
    mixed = given[0].to(kernels.dtype) @ kernels.flatten(1)
    return mixed.view(batch, *kernels.shape[1:]) * place


class ODConv1d(_ODLayer, DynamicConvNd):
    """`nn.Conv1d` whose kernels, positions, input and output channels are attended to."""

    rank = 1


class ODConv2d(_ODLayer, DynamicConvNd):
    """`nn.Conv2d` whose kernels, positions, input and output channels are attended to."""

    rank = 2


class ODConv3d(_ODLayer, DynamicConvNd):
    """`nn.Conv3d` whose kernels, positions, input and output channels are attended to."""

    rank = 3


_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: ODConv1d,
    nn.Conv2d: ODConv2d,
    nn.Conv3d: ODConv3d,
}


def _convert(
    plan: Plan, group: ODConvGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """A warm start computes what the static layer does: at heads of zero, every sigmoid is 1/2.

    `how.backend` decides about 1x1 layers of several kernels only.
    """
    return convert_mixed(_LAYERS, layers, how, _start, group.settings)


def _start(layer: _ODLayer, weight: Tensor) -> None:
    heads = layer.attention.heads
    halves = sum(1 for head in (heads.channel, heads.filter, heads.position) if head)
    layer.start_from(weight, 2.0**halves, alike=False)
    nn.init.zeros_(layer.attention.fc2.weight)


METHOD = Method(
    name="odconv",
    title="ODConv",
    paper="Li, Zhou & Yao, ICLR 2022, arXiv 2209.07947",
    group=ODConvGroup,
    settings=ODConvSettings,
    convert=_convert,
)
