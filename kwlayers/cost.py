"""Exact parameters and MACs of a plan, by part. No torch.

One multiply-add is one MAC. Per image, for a layer with m mixtures of the n cells of its
warehouse, kernel W, input channels C and attention width h:

    mixing      m * n * prod(cell) = n * |W|, whatever the resolution
    attention   C*h + h*(n+1)*m, or with a nonlocal basis of width q
                C*h + h*(n_local+q+1)*m + m*q*n_nonlocal
    conv        as the static layer

(arXiv 2406.07879, sections 3.1-3.3; norms, activations and additions are not counted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwlayers import geometry

if TYPE_CHECKING:
    from kwlayers.plan import Group, Plan, Site


def _must_add_up(parts: ParamParts | MacParts, total: int) -> None:
    values = {k: v for k, v in vars(parts).items() if k != "total"}
    assert sum(values.values()) == total, f"{values} do not add up to {total}"
    assert min(values.values()) >= 0, f"negative part in {values}"


@dataclass(frozen=True)
class ParamParts:
    """Parameters: cells, attention branches, and everything that stays as it was."""

    total: int
    warehouses: int
    attention: int
    unchanged: int

    def __post_init__(self) -> None:
        _must_add_up(self, self.total)


@dataclass(frozen=True)
class MacParts:
    """MACs of one image: converted layers (conv, mixing, attention) and the others."""

    total: int
    conv: int
    mixing: int
    attention: int
    unchanged: int

    def __post_init__(self) -> None:
        _must_add_up(self, self.total)


@dataclass(frozen=True)
class Cost:
    """What a network costs under a plan."""

    params: ParamParts
    macs: MacParts


@dataclass(frozen=True)
class LayerCost:
    """One layer's share. `group` is None for a static layer, whose mixtures are 0.

    attention_params, mixing_macs, attention_macs: 0 for a static layer.
    static_params: what the layer keeps (its bias; the weight too if it is static).
    conv_macs: as of the static layer.
    """

    name: str
    group: str | None
    mixtures: int
    attention_params: int
    static_params: int
    conv_macs: int
    mixing_macs: int
    attention_macs: int


@dataclass(frozen=True)
class Attention:
    """Parameters and MACs (of one sample) of one layer's attention branch."""

    params: int
    macs: int


def attention_cost(
    in_channels: int,
    mixtures: int,
    num_cells: int,
    total_mixtures: int,
    *,
    ratio: float | None,
    reduction: float,
    basis_ratio: float,
    norm: str,
) -> Attention:
    """The attention branch of a layer with `mixtures` of the warehouse's `total_mixtures`."""
    hidden = geometry.hidden_width(in_channels, reduction)
    shared = in_channels * hidden + 2 * hidden + (hidden if norm == "layer" else 0)
    bias = (num_cells + 1) * mixtures
    if basis_ratio >= 1:
        outputs = hidden * (num_cells + 1) * mixtures
        return Attention(shared + outputs + bias, in_channels * hidden + outputs)
    split = geometry.basis(mixtures, num_cells, total_mixtures, ratio, basis_ratio)
    outputs = hidden * (split.local + split.width + 1) * mixtures
    expand = split.width * split.nonlocal_cells
    return Attention(
        shared + outputs + expand + bias,
        in_channels * hidden + outputs + mixtures * expand,
    )


def site_attention(site: Site, group: Group, total_mixtures: int) -> Attention:
    """`attention_cost` of one layer of a plan."""
    return attention_cost(
        site.in_channels,
        geometry.num_mixtures(site.kernel, group.cell),
        group.num_cells,
        total_mixtures,
        ratio=group.ratio,
        reduction=group.reduction,
        basis_ratio=group.basis_ratio,
        norm=group.norm,
    )


def warehouse_params(group: Group) -> int:
    """Parameters of the cells themselves."""
    return group.num_cells * math.prod(group.cell)


def layer_costs(plan: Plan) -> tuple[LayerCost, ...]:
    """One entry per convolution and linear layer, in module order."""
    group_of = {name: group for group in plan.groups for name in group.layers}
    totals = {group.name: sum(plan.mixtures(group)) for group in plan.groups}
    return tuple(_layer_cost(site, group_of.get(site.name), totals) for site in plan.network.sites)


def _layer_cost(site: Site, group: Group | None, totals: dict[str, int]) -> LayerCost:
    weight = math.prod(site.kernel)
    bias = site.out_channels if site.bias else 0
    conv = site.positions * weight
    if group is None:
        return LayerCost(site.name, None, 0, 0, weight + bias, conv, 0, 0)
    attention = site_attention(site, group, totals[group.name])
    return LayerCost(
        name=site.name,
        group=group.name,
        mixtures=geometry.num_mixtures(site.kernel, group.cell),
        attention_params=attention.params,
        static_params=bias,
        conv_macs=conv,
        mixing_macs=site.samples * group.num_cells * weight,
        attention_macs=site.samples * attention.macs,
    )


def total_cost(plan: Plan) -> Cost:
    """The sum over layers and warehouses, and what the plan leaves alone."""
    layers = [layer for layer in layer_costs(plan) if layer.group is not None]
    replaced = sum(math.prod(plan.network[layer.name].kernel) for layer in layers)
    warehouses = sum(warehouse_params(group) for group in plan.groups)
    attention = sum(layer.attention_params for layer in layers)
    unchanged = plan.network.params - replaced
    conv = sum(layer.conv_macs for layer in layers)
    mixing = sum(layer.mixing_macs for layer in layers)
    attention_macs = sum(layer.attention_macs for layer in layers)
    return Cost(
        ParamParts(
            total=plan.network.params + sum(added_params(plan).values()),
            warehouses=warehouses,
            attention=attention,
            unchanged=unchanged,
        ),
        MacParts(
            total=plan.network.macs + mixing + attention_macs,
            conv=conv,
            mixing=mixing,
            attention=attention_macs,
            unchanged=plan.network.macs - conv,
        ),
    )


def added_params(plan: Plan) -> dict[str, int]:
    """Parameters that each warehouse adds to (or takes from) the static network, by group."""
    return {
        group.name: group_params([plan.network[name] for name in group.layers], group)
        - sum(math.prod(plan.network[name].kernel) for name in group.layers)
        for group in plan.groups
    }


def group_params(sites: list[Site], group: Group) -> int:
    """Cells and attention branches of one warehouse that serves `sites`."""
    total = sum(geometry.num_mixtures(site.kernel, group.cell) for site in sites)
    branches = sum(site_attention(site, group, total).params for site in sites)
    return warehouse_params(group) + branches
