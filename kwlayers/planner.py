"""From a model and a budget to a plan: grouping, cell sizes, cells per warehouse.

Deciding needs no torch (`plan_network`); `plan_model` traces the model first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kwlayers import geometry
from kwlayers.cost import group_params
from kwlayers.plan import Group, Network, Plan, PlanError, counted, match_layers, short
from kwlayers.sharing import (
    MAX_RATIO,
    Rule,
    Settings,
    Sharing,
    check_ratio,
    nothing_to_convert,
    shares_of,
    sharing_notes,
)
from kwlayers.solver import Solution, Variable, solve

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

    Raises PlanError for settings that cannot be, BudgetError if `params` is out of reach.
    """
    from kwlayers.sites import trace

    settings = Settings(
        cell_ratio,
        sharing,
        reduction,
        basis_ratio,
        spatial_partition,
        norm,
        rules,  # type: ignore[arg-type]  # it makes a tuple of them
    )
    return plan_network(trace(model, input_size), settings, ratio=ratio, params=params)


def plan_network(
    network: Network,
    settings: Settings,
    *,
    ratio: float | None = None,
    params: int | None = None,
) -> Plan:
    """`plan_model` for a network that has been traced."""
    if (ratio is None) == (params is None):
        raise PlanError("give exactly one budget: ratio=0.5 or params=12_000_000")
    if ratio is not None:
        return plan_ratio(network, settings, ratio)
    if not isinstance(params, int) or isinstance(params, bool):
        raise PlanError(f"params {short(params)}: a whole number such as 12_000_000")
    layout = lay_out(network, settings)
    candidates = layout.solutions(params)
    if not candidates:
        raise out_of_reach(layout, params)
    return layout.plan(candidates[0])


def plan_ratio(network: Network, settings: Settings, ratio: float) -> Plan:
    """Every warehouse at n = max(int(ratio * sum of m), 1), or at its own `Share.ratio`."""
    check_ratio(ratio)
    layout = lay_out(network, settings)
    groups, asked, mixtures = [], 0.0, 0
    for group, own in zip(layout.groups, layout.own_ratios, strict=True):
        b = own if own is not None else ratio
        m = sum(network.mixtures(group))
        groups.append(replace(group, num_cells=geometry.cells_for_ratio(m, b), ratio=b))
        asked, mixtures = asked + b * m, mixtures + m
    cells = sum(group.num_cells for group in groups)
    notes = list(layout.notes)
    if f"{cells / mixtures:.4g}" != f"{asked / mixtures:.4g}":
        notes.append(
            f"b = {cells / mixtures:.4g}, not {asked / mixtures:.4g}, as cells are whole and every "
            f"warehouse has one: {counted(cells, 'cell')} over {counted(mixtures, 'mixture')}"
        )
    return Plan(network, tuple(groups), tuple(notes))


@dataclass(frozen=True)
class Layout:
    """Warehouses with their layers and cells, before their number of cells is decided."""

    network: Network
    groups: tuple[Group, ...]
    own_ratios: tuple[float | None, ...]
    notes: tuple[str, ...]

    @property
    def static_params(self) -> int:
        """Parameters outside the warehouses and their attention."""
        replaced = (math.prod(self.network[n].kernel) for g in self.groups for n in g.layers)
        return self.network.params - sum(replaced)

    def variables(self, relative: Sequence[float] | None = None) -> list[Variable]:
        """What the solver sizes. relative: ratios over the common one (default equal)."""
        chosen = relative if relative is not None else [r or 1.0 for r in self.own_ratios]
        return [self._variable(group, w) for group, w in zip(self.groups, chosen, strict=True)]

    def solutions(
        self, params: int, relative: Sequence[float] | None = None
    ) -> tuple[Solution, ...]:
        """Cells for at most `params` parameters in all, the most even first; empty if none fit."""
        if params > MAX_RATIO * self.network.params:
            raise PlanError(
                f"params {params:,}: over {MAX_RATIO:,} times the static model's "
                f"{self.network.params:,}"
            )
        return solve(self.variables(relative), params - self.static_params)

    def _variable(self, group: Group, relative: float) -> Variable:
        sites = [self.network[name] for name in group.layers]

        def params(cells: int) -> int:
            return group_params(sites, replace(group, num_cells=cells))

        if group.basis_ratio >= 1:  # linear in n: two points say it all
            base, step = params(1), params(2) - params(1)

            def params(cells: int) -> int:
                return base + (cells - 1) * step

        mixing = sum(site.samples * math.prod(site.kernel) for site in sites)
        return Variable(sum(self.network.mixtures(group)), params, mixing, relative)

    def plan(self, solution: Solution) -> Plan:
        """The plan of a solution."""
        return self.sized(solution.num_cells)

    def sized(self, num_cells: Sequence[int]) -> Plan:
        """The plan with these cells per warehouse."""
        groups = (
            replace(group, num_cells=n) for group, n in zip(self.groups, num_cells, strict=True)
        )
        return Plan(self.network, tuple(groups), self.notes)

    def floor(self) -> Plan:
        """The smallest plan: one cell per warehouse."""
        return self.sized([1] * len(self.groups))


def out_of_reach(layout: Layout, target: int) -> BudgetError:
    """The error for a target under the floor, which it explains."""
    floor = layout.floor()
    parts = floor.cost().params
    layers = sum(len(group.layers) for group in layout.groups)
    static = [row for row in floor.cost_by_layer() if row.group is None]
    largest = sorted(static, key=lambda row: -row.static_params)[:3]
    named = [f"{row.name} {row.static_params:,}" for row in largest]
    rest = parts.unchanged - sum(row.static_params for row in largest)
    count = len(layout.groups)
    where = "the warehouse" if count == 1 else f"each of {count} warehouses"
    unchanged = " + ".join([*named, f"norms and others {rest:,}"])
    return BudgetError(
        f"params {target:,}: below the floor of {parts.total:,} (unchanged {parts.unchanged:,} "
        f"[{unchanged}] + attention of {counted(layers, 'layer')} {parts.attention:,} + one cell "
        f"in {where} {parts.warehouses:,})",
        target,
        floor,
    )


def lay_out(
    network: Network,
    settings: Settings,
    *,
    keep_static: Sequence[str] = (),
    stage_sharing: Mapping[int, str] | None = None,
) -> Layout:
    """Group the layers and cut the cells. Raises PlanError if nothing can be converted.

    keep_static: glob patterns of layers that are left out of their warehouses.
    stage_sharing: the rule of each stage (see `stage_of`), where it is not `settings.sharing`.
    """
    kept = frozenset(match_layers(network, keep_static, "keep_static"))
    shares = shares_of(network, settings, kept, stage_sharing)
    if not shares:
        raise nothing_to_convert(network, settings)
    notes = sharing_notes(network, shares, settings)
    norm = settings.norm
    if norm == "auto":
        norm = "batch" if network.batch_norm else "layer"
    groups = []
    for name, share in shares.items():
        sites = [network[layer] for layer in share.layers]
        if len({site.kind for site in sites}) > 1:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise PlanError(f"group {name!r}: layers of one kind share a warehouse, got {kinds}")
        ratio = settings.cell_ratio if share.cell_ratio is None else share.cell_ratio
        partition = settings.spatial_partition
        if share.spatial_partition is not None:
            partition = share.spatial_partition
        try:
            cell, rounded = geometry.cell_shape([s.kernel for s in sites], ratio, partition)
        except ValueError as error:
            raise PlanError(f"group {name!r}: {error}") from None
        notes.extend(f"{name}: {note}" for note in rounded)
        groups.append(
            Group(
                name=name,
                cell=cell,
                num_cells=1,
                layers=tuple(share.layers),
                reduction=settings.reduction if share.reduction is None else share.reduction,
                basis_ratio=(
                    settings.basis_ratio if share.basis_ratio is None else share.basis_ratio
                ),
                norm=norm,
            )
        )
    ratios = tuple(share.ratio for share in shares.values())
    return Layout(network, tuple(groups), ratios, tuple(notes))
