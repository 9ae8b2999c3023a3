"""DyMN's dynamic convolution: K kernels mixed by a softmax of the block's context.

Schmid et al., "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models",
IEEE/ACM TASLP 32, 2024, arXiv 2310.15648. For a context h of H numbers (`kwlayers.context`) and K
kernels:

    alpha = softmax(fc(h) / T)                  (B, K)
    W = sum_k alpha_k W_k

    parameters  K * |W| + H*K + K
    MACs        conv + K * |W| to mix + H*K

T falls from 30 to 1 over the warm-up. Published: K = 4, every convolution of the blocks, 30 epochs
of 200. On purpose different from the published code:

- The temperature is a buffer. There it is not saved: a network that is loaded by hand runs at 30.
- It falls with every step, not once an epoch.
- A bias is mixed like the kernels. There it crashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicConvNd
from kwlayers.fields import MAX_TEMPERATURE, allow, allow_max_temperature
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.mixed import KernelGroup, MixedLayer, convert_mixed, mixed_cost
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, Site
from kwlayers.schedule import Tempered


@dataclass(frozen=True)
class DyMNGroup(KernelGroup):
    """One layer of K kernels, in a block that has a context.

    num_kernels: K. max_temperature: of the softmax at the start of the warm-up.
    """

    num_kernels: int = allow("kernels, K", int, least=1)
    max_temperature: float = allow_max_temperature()

    method: ClassVar[str] = "dymn"
    kinds: ClassVar[tuple[str, ...]] = ("conv2d",)

    @classmethod
    def refuses(cls, site: Site) -> str:
        missing = "" if site.context else f"{cls.method} needs a block with a context (DyMN's)"
        return super().refuses(site) or missing

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        (site,) = sites
        weights = site.context * self.num_kernels
        attention = (weights + self.num_kernels, weights)
        return (mixed_cost(self.name, site, self.num_kernels, attention),)


@dataclass(frozen=True)
class DyMNSettings(AloneSettings):
    """DyMN's convolution with K = num_kernels in each layer, or as many as a budget allows."""

    num_kernels: int = allow("kernels of each layer, K", int, 4, least=1)
    max_temperature: float = allow_max_temperature()
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "dymn"
    group_type: ClassVar[type[Group]] = DyMNGroup
    sizes: ClassVar[tuple[str, ...]] = ("num_kernels",)
    own: ClassVar[tuple[str, ...]] = ("ratio",)

    def suits(self, network: Network) -> bool:
        return any(site.context for site in network.sites)

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> DyMNGroup:
        layers = tuple(site.name for site in sites)
        return DyMNGroup(name, layers, own.num_kernels, own.max_temperature)


class ContextAttention(Tempered):
    """alpha (B, K) of a context (B, H): a softmax, nearly even at temperature 1."""

    def __init__(
        self, context_size: int, num_kernels: int, max_temperature: float, **to: Any
    ) -> None:
        super().__init__()
        self.max_temperature = max_temperature
        self.fc = nn.Linear(context_size, num_kernels, **to)
        self._add_temperature(**to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.01) weights, as published for every linear layer; zero biases."""
        self.temperature.zero_()
        if not self.fc.weight.is_meta:
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def forward(self, context: Tensor) -> Tensor:
        logits = self.fc(context)
        scale = 1 + (self.max_temperature - 1) * self.temperature.to(logits.dtype)
        return torch.softmax(logits / scale, dim=-1)


class ContextConv2d(MixedLayer, DynamicConvNd):
    """`nn.Conv2d` of K kernels, mixed by the context that a `ContextBlock` gives it.

    Settings beside torch.nn's: context_size, num_kernels, max_temperature, backend, workspace_mb.
    """

    rank = 2
    takes_context: ClassVar[bool] = True

    # A context of its own, where no block gives one.
    own_context: tuple[Tensor, ...] = ()

    def _build(  # type: ignore[override] # context_size has no default
        self,
        in_channels: int,
        bias: bool,
        *,
        context_size: int,
        num_kernels: int = 4,
        max_temperature: float = MAX_TEMPERATURE,
        backend: str | None = None,
        workspace_mb: float | None = None,
        **to: Any,
    ) -> None:
        self._own_kernels(num_kernels, bias, backend, workspace_mb, **to)
        self.attention = ContextAttention(context_size, num_kernels, max_temperature, **to)
        self.reset_parameters()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W)  context: (B, context_size)  out: (B, C_out, H', W')."""
        if context is None and self.own_context:
            (context,) = self.own_context
        wanted = (x.shape[0], self.attention.fc.in_features)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (B, {self.in_channels}, H, W)"
            )
        if context is None or tuple(context.shape) != wanted:
            given = "no context" if context is None else f"a context {tuple(context.shape)}"
            raise ValueError(
                f"{given} for an input {tuple(x.shape)}: expected {wanted}, which the block of "
                "the layer gives it (kwlayers.context.ContextBlock)"
            )
        return self.mixed(x, self.attention(context))

    def convolve(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def alone_(self, batch: int) -> None:
        fc = self.attention.fc
        found = torch.rand(batch, fc.in_features, device=fc.weight.device).to(fc.weight.dtype)
        self.own_context = (found.requires_grad_(),)


def _convert(plan: Plan, group: DyMNGroup, layers: Mapping[str, Any], how: Conversion) -> Converted:
    """A warm start computes what the static layer does: each kernel is the static one."""
    (site,) = plan.of(group)
    settings = {**group.settings, "context_size": site.context}
    return convert_mixed({nn.Conv2d: ContextConv2d}, layers, how, _start, settings)


def _start(layer: ContextConv2d, weight: Tensor) -> None:
    layer.start_from(weight, 1.0, alike=True)


METHOD = Method(
    name="dymn",
    title="DyMN",
    paper="Schmid et al., TASLP 2024, arXiv 2310.15648",
    group=DyMNGroup,
    settings=DyMNSettings,
    convert=_convert,
)
