"""Exact parameters and MACs of a plan, by part. No torch.

One multiply-add is one MAC. What a method's layers cost is in its own file (`Group.costs`), with
the formulas; here they are added up with what stays as it was. Norms, activations and additions
are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kwlayers.plan import Plan, Site


def _must_add_up(parts: ParamParts | MacParts, total: int) -> None:
    values = {k: v for k, v in vars(parts).items() if k != "total"}
    assert sum(values.values()) == total, f"{values} do not add up to {total}"
    assert min(values.values()) >= 0, f"negative part in {values}"


@dataclass(frozen=True)
class ParamParts:
    """Parameters: what kernels are made of, attention branches, and all that stays as it was."""

    total: int
    kernels: int
    attention: int
    unchanged: int

    def __post_init__(self) -> None:
        _must_add_up(self, self.total)

    @property
    def warehouses(self) -> int:
        """`kernels`, by KernelWarehouse's name."""
        return self.kernels


@dataclass(frozen=True)
class MacParts:
    """MACs of one image: converted layers (conv, mixing, attention) and the others.

    modulation: products of feature maps with attention, where a method has them.
    """

    total: int
    conv: int
    mixing: int
    attention: int
    unchanged: int
    modulation: int = 0

    def __post_init__(self) -> None:
        _must_add_up(self, self.total)


@dataclass(frozen=True)
class Cost:
    """What a network costs under a plan.

    deployed: parameters in all, without what is only there for training; what budgets are about.
    """

    params: ParamParts
    macs: MacParts
    deployed: int

    @property
    def deployed_params(self) -> ParamParts:
        """By part; it is kernels that are only there for training."""
        params, spared = self.params, self.params.total - self.deployed
        return ParamParts(
            self.deployed, params.kernels - spared, params.attention, params.unchanged
        )


@dataclass(frozen=True)
class LayerCost:
    """One layer's share. `group` is None for a static layer, all of which is unchanged.

    mixtures: m, 0 where nothing is mixed. kernel_params: of kernels that are its own.
    static_params: what the layer keeps (its bias; the weight too if it is static). conv_macs: of
    convolutions and products with its feature maps.
    """

    name: str
    group: str | None
    static_params: int
    conv_macs: int
    mixtures: int = 0
    kernel_params: int = 0
    attention_params: int = 0
    mixing_macs: int = 0
    attention_macs: int = 0
    modulation_macs: int = 0


def layer_costs(plan: Plan) -> tuple[LayerCost, ...]:
    """One entry per convolution and linear layer, in module order."""
    found = {cost.name: cost for group in plan.groups for cost in group.costs(plan.of(group))}
    return tuple(found.get(site.name) or static_cost(site) for site in plan.extended.sites)


def static_cost(site: Site) -> LayerCost:
    """Of a layer that stays as it is."""
    return LayerCost(site.name, None, site.params, site.macs)


def total_cost(plan: Plan) -> Cost:
    """The sum over layers and groups, and what the plan leaves alone."""
    layers = [layer for layer in layer_costs(plan) if layer.group is not None]
    network = plan.extended
    sites = [network[layer.name] for layer in layers]
    own = sum(layer.kernel_params for layer in layers)
    kernels = own + sum(group.shared_params() for group in plan.groups)
    attention = sum(layer.attention_params for layer in layers)
    replaced = sum(site.params for site in sites) - sum(layer.static_params for layer in layers)
    conv = sum(layer.conv_macs for layer in layers)
    mixing = sum(layer.mixing_macs for layer in layers)
    attention_macs = sum(layer.attention_macs for layer in layers)
    modulation = sum(layer.modulation_macs for layer in layers)
    macs = network.macs - sum(site.macs for site in sites)
    spared = sum(g.params(plan.of(g)) - g.deployed_params(plan.of(g)) for g in plan.groups)
    total = network.params + sum(added_params(plan).values())
    return Cost(
        ParamParts(
            total=total,
            kernels=kernels,
            attention=attention,
            unchanged=network.params - replaced,
        ),
        MacParts(
            total=macs + conv + mixing + attention_macs + modulation,
            conv=conv,
            mixing=mixing,
            attention=attention_macs,
            unchanged=macs,
            modulation=modulation,
        ),
        total - spared,
    )


def added_params(plan: Plan) -> dict[str, int]:
    """Parameters that each group adds to (or takes from) the static network, by name."""
    return {
        group.name: group.params(sites) - group.replaced(sites)
        for group, sites in ((group, plan.of(group)) for group in plan.groups)
    }
