"""CondConv: E expert kernels, weighted by a sigmoid router.

Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS
2019, arXiv 1904.04971. For a router that sees C channels and E kernels:

    r = sigmoid(fc(mean of its input over positions))       (B, E), each in (0, 1)
    W = sum_e r_e W_e                                        biases alike

    parameters  E * |W| (+ E * C_out), and E * (C + 1) for each router
    MACs        conv + E * |W| to mix, and E * C for each router

Published: E = 4 and 8, one router for each block, which sees the block's input, in the last three
stages of EfficientNet-B0, without squeeze-and-excitation. Other networks' layers are known from the
code in PyTorch that PAD-Net brings (arXiv 2211.05528): every convolution of the blocks, which is
the default here, with E = 8. Here E is called K (`num_kernels`), as in the other methods. On
purpose different from that code:

- Each kernel starts as a layer's own. There all are drawn as one tensor, sqrt(C_out) too small.
- Kernels are mixed, never features, which takes E times the MACs for the same result.
- A dynamic classifier keeps its bias, mixed as the others. There it has none.
- With sharing "layer" every router sees its own layer's input. There those of MobileNetV2's
  projections see the block's.
- A block's router sees the mean of tokens (B, ..., C) where the block's first layer is linear. A
  layer has a router of its own where the block's input does not have the first layer's channels (a
  part of them is convolved, a list is given), or where it has more kernels than there are images
  (windows, several calls).
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
from kwlayers.dynamic import DynamicConvNd, DynamicLinear
from kwlayers.fields import allow
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.mixed import KernelGroup, MixedLayer, convert_mixed, mixed_cost
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, PlanError, Site
from kwlayers.rules import Share

SHARING = ("block", "layer")


@dataclass(frozen=True)
class CondConvGroup(KernelGroup):
    """Layers of K kernels and one router.

    num_kernels: K. router_channels: of what the router sees: the input of the module called
    `block`, or if that is empty of the only layer. dropout: of kernels, in training.
    """

    num_kernels: int = allow("kernels of each layer, K", int, least=1)
    router_channels: int = allow("channels of what the router sees", int, least=1)
    block: str = allow("the module whose input the router sees; empty for the layer", str, "")
    dropout: float = allow("part of the kernels that training drops", float, 0.0, least=0, most=1)

    method: ClassVar[str] = "condconv"
    alone: ClassVar[bool] = False

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        if not self.block and len(sites) > 1:
            raise ValueError(f"{len(sites)} layers share a router, but no block says what it sees")
        for site in sites if self.block else ():
            if not site.name.startswith(f"{self.block}."):
                raise ValueError(f"{site.name} is not in the block {self.block!r}")
        if not self.block and self.router_channels != sites[0].in_channels:
            raise ValueError(
                f"router_channels {self.router_channels}: the layer has {sites[0].in_channels}"
            )

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        """The first layer has the router."""
        kernels, channels = self.num_kernels, self.router_channels
        router = (kernels * (channels + 1), kernels * channels)
        first, *others = (
            mixed_cost(self.name, site, kernels, router if number == 0 else (0, 0))
            for number, site in enumerate(sites)
        )
        return (first, *others)


@dataclass(frozen=True)
class CondConvSettings(AloneSettings):
    """CondConv with num_kernels experts in each layer, or as many as a budget allows.

    sharing: a router for each "block", which sees the block's input, or for each "layer".
    """

    num_kernels: int = allow("kernels of each layer, K", int, 8, least=1)
    sharing: str = allow("what has a router: a block or a layer", str, "block", *SHARING)
    dropout: float = allow("part of the kernels that training drops", float, 0.0, least=0, most=1)
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "condconv"
    group_type: ClassVar[type[Group]] = CondConvGroup
    sizes: ClassVar[tuple[str, ...]] = ("num_kernels",)
    static_roles: ClassVar[tuple[str, ...]] = (
        "stem", "head", "patch embedding", "shortcut", "last convolution",
    )  # fmt: skip
    own: ClassVar[tuple[str, ...]] = ("ratio",)

    def gathered(self, network: Network, layers: Mapping[str, Share]) -> list[list[str]]:
        if self.sharing == "layer":
            return super().gathered(network, layers)
        found: dict[str, list[str]] = {}
        for name in layers:
            found.setdefault(_routed_by(network, network[name]) or name, []).append(name)
        for names in found.values():
            ratios = {layers[name].ratio for name in names}
            if len(ratios) > 1:
                raise PlanError(
                    f"{', '.join(names)}: one router for all of a block needs one ratio for all; "
                    "give the rule all of its layers, or sharing='layer'"
                )
        return list(found.values())

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> CondConvGroup:
        block = _routed_by(network, sites[0]) if self.sharing == "block" else ""
        channels = (_first_of(network, block) if block else sites[0]).in_channels
        layers = tuple(site.name for site in sites)
        return CondConvGroup(name, layers, own.num_kernels, channels, block, own.dropout)


def _first_of(network: Network, block: str) -> Site:
    """The layer of a block that is called first."""
    called = [s for s in network.sites if s.name.startswith(f"{block}.") and s.positions]
    return min(called, key=lambda site: site.order)


def _routed_by(network: Network, site: Site) -> str:
    """The block whose router a layer can have; empty for one of its own."""
    size = next((block.input_size for block in network.blocks if block.name == site.block), ())
    if len(size) < 2 or site.samples != 1 or site.constant:
        return ""
    first = _first_of(network, site.block)
    seen = size[-1] if first.kind == "linear" else size[0]
    return site.block if seen == first.in_channels else ""


class Router(nn.Module):
    """r (B, K) for an input (B, C, *S). Of a block: `routing`, while the block runs.

    tokens: whether the block's input is (B, ..., C).
    """

    def __init__(
        self,
        in_channels: int,
        num_kernels: int,
        dropout: float = 0.0,
        tokens: bool = False,
        **to: Any,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.fc = nn.Linear(in_channels, num_kernels, **to)
        self.dropout = dropout
        self.routing: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.sigmoid(self.fc(pooled(x))), self.dropout, self.training)

    def saw(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block's forward: its input."""
        x = next(iter((*args, *kwargs.values())), None)
        channels, axis = self.fc.in_features, -1 if self.tokens else 1
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[axis] != channels:
            given = f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            shape = f"(B, …, {channels})" if self.tokens else f"(B, {channels}, …)"
            raise ValueError(
                f"a block was called with {given}; its router sees {channels} channels of a tensor "
                f"{shape}: plan with sharing='layer'"
            )
        self.routing = self(DynamicLinear.tokens(x) if self.tokens else x)

    def forget(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """After the block's forward, or its failure: nothing is kept alive, or copied with the
        model.
        """
        self.routing = None

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


class _CondLayer(MixedLayer):
    """Settings beside torch.nn's: num_kernels, dropout, backend, workspace_mb; or `router`, of a
    block, instead of its own, which somebody else registers and lets see the input.
    """

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        num_kernels: int = 8,
        dropout: float = 0.0,
        router: Router | None = None,
        backend: str | None = None,
        workspace_mb: float | None = None,
        **to: Any,
    ) -> None:
        self._own_kernels(num_kernels, bias, backend, workspace_mb, **to)
        self.router = Router(in_channels, num_kernels, dropout, **to) if router is None else None
        self.borrowed = () if router is None else (router,)
        self.reset_parameters()

    def convolve(self, x: Tensor) -> Tensor:
        if self.router is not None:
            return self.mixed(x, self.router(x))
        (router,) = self.borrowed
        assert isinstance(router, Router)
        if router.routing is None:
            raise RuntimeError(
                "the router belongs to the block: call the block, not its layers; to run it "
                "again in backward, checkpoint(block, x), not block.forward"
            )
        return self.mixed(x, router.routing)

    def alone_(self, batch: int) -> None:
        for router in self.borrowed:
            assert isinstance(router, Router)
            found = torch.rand(batch, self.num_kernels, device=self.kernels.device)
            router.routing = nn.Parameter(found.to(self.kernels.dtype))


class CondConv1d(_CondLayer, DynamicConvNd):
    """`nn.Conv1d` of K kernels, weighted by a router."""

    rank = 1


class CondConv2d(_CondLayer, DynamicConvNd):
    """`nn.Conv2d` of K kernels, weighted by a router."""

    rank = 2


class CondConv3d(_CondLayer, DynamicConvNd):
    """`nn.Conv3d` of K kernels, weighted by a router."""

    rank = 3


class CondLinear(_CondLayer, DynamicLinear):
    """`nn.Linear` of K weights, weighted by a router."""


_LAYERS = {
    nn.Conv1d: CondConv1d,
    nn.Conv2d: CondConv2d,
    nn.Conv3d: CondConv3d,
    nn.Linear: CondLinear,
}


def _convert(
    plan: Plan, group: CondConvGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """A warm start computes what the static layers do: at routers of zero, all r are 1/2."""
    settings = {"num_kernels": group.num_kernels}
    if not group.block:
        return convert_mixed(_LAYERS, layers, how, _start, {**settings, "dropout": group.dropout})
    weight = next(iter(layers.values())).weight
    router = Router(
        group.router_channels,
        group.num_kernels,
        group.dropout,
        _first_of(plan.extended, group.block).kind == "linear",
        device=weight.device,
        dtype=weight.dtype,
    )
    found = convert_mixed(_LAYERS, layers, how, _start, {**settings, "router": router})
    if how.warm_start:
        _silence(router)
    router.train(next(iter(layers.values())).training)
    hooks = {group.block: (router.saw, router.forget)}
    return Converted(found.swaps, router, found.errors, hooks)


def _start(layer: _CondLayer, weight: Tensor) -> None:
    layer.start_from(weight, 2 / layer.num_kernels, alike=False)
    if layer.router is not None:
        _silence(layer.router)


def _silence(router: Router) -> None:
    nn.init.zeros_(router.fc.weight)
    nn.init.zeros_(router.fc.bias)


METHOD = Method(
    name="condconv",
    title="CondConv",
    paper="Yang et al., NeurIPS 2019, arXiv 1904.04971",
    group=CondConvGroup,
    settings=CondConvSettings,
    convert=_convert,
)
