"""From a model and a budget to a plan: the groups of a method, and their sizes.

Deciding needs no torch (`plan_network`); `plan_model` traces the model first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kwlayers.layout import Layout, MethodSettings
from kwlayers.plan import Network, Plan, PlanError, counted, match_layers, short
from kwlayers.rules import Rule, check_ratio
from kwlayers.sharing import Settings, Sharing

if TYPE_CHECKING:
    from torch import nn


class BudgetError(PlanError):
    """No plan fits the target. `floor` is the fewest parameters under the settings."""

    def __init__(self, message: str, target: int, floor: Plan) -> None:
        super().__init__(message)
        self.target = target
        self.floor = floor


def plan_model(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    ratio: float | None = None,
    params: int | None = None,
    cell_ratio: tuple[float, float] = (1.0, 1.0),
    sharing: Sharing = "stage",
    reduction: float = 1 / 16,
    basis_ratio: float = 1.0,
    spatial_partition: bool = True,
    norm: str = "auto",
    rules: Sequence[Rule] | Rule = (),
    method: MethodSettings | str | None = None,
) -> Plan:
    """Plan the warehouses of `model` for a budget. The model is left as it is.

    model: any module, on any device (`meta` is enough). input_size: (C, H, W) of one image.
    ratio: the convolutional budget b = n / m of every warehouse; or
    params: parameters of the whole network, which the plan stays at or under.
    cell_ratio: (out, in) share of the layers' common channels that a cell spans.
    sharing: "stage" (one warehouse per stage and kind of layer), "position" (per stage and
        position in the block), "layer", or groups of glob patterns over module names: a list
        of lists, or a mapping from name to list or `Share`. Stages are the official ones for the
        papers' backbones, otherwise inferred (`kwlayers.stages`). Some layers stay static unless
        a group or a rule names them: the first, the last, and in networks other than those
        backbones what attention would outweigh, save depthwise layers.
    reduction: width of the attention over input channels. basis_ratio: width of the
        nonlocal basis over the other layers' cells; 1 for none.
    spatial_partition: cells are 1x1; otherwise they span the kernel.
    norm: "batch", "layer" or "auto": "layer" if the model has no batch norm.
    rules: exceptions from the sharing (`Rule`), one or several, one after the other: layers that
        stay static, that share a warehouse of their own, or whose warehouses have other settings.
    method: another than KernelWarehouse: its name for its published settings, or these (such as
        `kwlayers.methods.find("odconv").settings(num_kernels=4)`), instead of all of the above but
        ratio and params. Without a budget layers have the settings' own number of kernels.

    Raises PlanError for settings that cannot be, BudgetError if `params` is out of reach.
    """
    from kwlayers import methods
    from kwlayers.sites import trace

    own = Settings(
        cell_ratio,
        sharing,
        reduction,
        basis_ratio,
        spatial_partition,
        norm,
        rules,  # type: ignore[arg-type]  # it makes a tuple of them
    )
    settings = methods.find(method).settings() if isinstance(method, str) else method
    if settings is not None and own != Settings():
        raise PlanError("method has its settings itself: give them there, not beside it")
    return plan_network(trace(model, input_size), settings or own, ratio=ratio, params=params)


def plan_network(
    network: Network,
    settings: MethodSettings,
    *,
    ratio: float | None = None,
    params: int | None = None,
) -> Plan:
    """`plan_model` for a network that has been traced, by any method's settings.

    Without a budget at the settings' own sizes, where they have some.
    """
    if ratio is None and params is None and settings.sized:
        return lay_out(network, settings).as_laid_out()
    if (ratio is None) == (params is None):
        raise PlanError("give exactly one budget: ratio=0.5 or params=12_000_000")
    if ratio is not None:
        return plan_ratio(network, settings, ratio)
    if not isinstance(params, int) or isinstance(params, bool):
        raise PlanError(f"params {short(params)}: a whole number such as 12_000_000")
    layout = lay_out(network, settings)
    if (enough := layout.enough(params)) is not None:
        return enough
    candidates = layout.solutions(params)
    if not candidates:
        raise out_of_reach(layout, params)
    return layout.plan(candidates[0])


def plan_ratio(network: Network, settings: MethodSettings, ratio: float) -> Plan:
    """Every group at `ratio` of its `unit`, rounded down to at least 1, or at a `Share.ratio`."""
    check_ratio(ratio)
    layout = lay_out(network, settings)
    groups, asked, units = [], 0.0, 0
    for group, own in zip(layout.groups, layout.own_ratios, strict=True):
        b = ratio if own is None or group.no_ratio else own
        unit = group.unit(layout.of(group))
        groups.append(group.at_ratio(b, unit))
        asked, units = asked + b * unit, units + unit
    sizes = sum(group.size for group in groups)
    notes = list(layout.notes)
    if f"{sizes / units:.4g}" != f"{asked / units:.4g}":
        notes.append(settings.rounded(sizes, units, asked / units))
    return Plan(network, tuple(groups), tuple(notes))


def out_of_reach(layout: Layout, target: int) -> BudgetError:
    """The error for a target under the floor, which it explains."""
    floor = layout.floor()
    cost = floor.cost()
    parts, spared = cost.params, cost.params.total - cost.deployed
    layers = sum(len(group.layers) for group in layout.groups)
    static = [row for row in floor.cost_by_layer() if row.group is None]
    largest = sorted(static, key=lambda row: -row.static_params)[:3]
    named = [f"{row.name} {row.static_params:,}" for row in largest]
    rest = parts.unchanged - sum(row.static_params for row in largest)
    unchanged = " + ".join([*named, f"norms and others {rest:,}"])
    return BudgetError(
        f"params {target:,}: below the floor of {cost.deployed:,} (unchanged {parts.unchanged:,} "
        f"[{unchanged}] + attention of {counted(layers, 'layer')} {parts.attention:,} + "
        f"{layout.groups[0].smallest(len(layout.groups))} {parts.kernels - spared:,})",
        target,
        floor,
    )


def lay_out(
    network: Network,
    settings: MethodSettings,
    *,
    keep_static: Sequence[str] = (),
    stage_sharing: Mapping[int, str] | None = None,
) -> Layout:
    """The groups of a network, not yet sized. Raises PlanError if nothing can be converted.

    keep_static: glob patterns of layers that are left out. stage_sharing: the rule of each stage
    (see `stage_of`), where it is not the settings'.
    """
    kept = frozenset(match_layers(network, keep_static, "keep_static"))
    return settings.lay_out(network, kept, stage_sharing)
