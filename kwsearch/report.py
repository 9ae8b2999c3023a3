"""Plans as text: the summary, the tables by stage and by layer, the solver's trade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kwlayers.cost import LayerCost
from kwlayers.plan import Plan
from kwlayers.stages import place
from kwsearch.terminal import new_table

if TYPE_CHECKING:
    from rich.table import Table

    from kwsearch.budget import Candidate
    from kwsearch.recount import Recount


@dataclass(frozen=True)
class Row:
    """One line of a table; numbers add up over lines."""

    kernels: int = 0
    attention: int = 0
    unchanged: int = 0
    conv: int = 0
    mixing: int = 0
    attention_macs: int = 0
    unchanged_macs: int = 0
    modulation: int = 0

    def __add__(self, other: Row) -> Row:
        return Row(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def param_parts(self) -> tuple[int, int, int, int]:
        """Kernels, attention, unchanged, and their sum."""
        parts = (self.kernels, self.attention, self.unchanged)
        return (*parts, sum(parts))

    @property
    def macs(self) -> dict[str, int]:
        """By part, and their sum."""
        parts = {
            "conv": self.conv,
            "mixing": self.mixing,
            "attention": self.attention_macs,
            "modulation": self.modulation,
            "unchanged": self.unchanged_macs,
        }
        return parts | {"total": sum(parts.values())}


def params_by_part(plan: Plan) -> dict[str, int]:
    """The plan's parameters in all and by part; kernels are made of warehouses if all are."""
    params = plan.cost().params
    kernels = "warehouses" if len(plan.warehouses) == len(plan.groups) else "kernels"
    return {
        "total": params.total,
        kernels: params.kernels,
        "attention": params.attention,
        "unchanged": params.unchanged,
    }


def macs_by_part(plan: Plan) -> dict[str, int]:
    """The plan's MACs in all and by part; modulation if there is any."""
    return {k: v for k, v in vars(plan.cost().macs).items() if v or k != "modulation"}


def stage_rows(plan: Plan) -> dict[str, tuple[Row, str]]:
    """Costs by stage, with the stage's warehouses in words; the last row is all the rest."""
    stage_of = _stages(plan)
    rows: dict[str, Row] = {}
    words: dict[str, list[str]] = {}
    for group in plan.groups:
        stage = stage_of[group.name]
        rows[stage] = rows.get(stage, Row()) + Row(kernels=group.shared_params())
        words.setdefault(stage, []).append(group.describe())
    for layer in plan.cost_by_layer():
        if layer.group is not None:
            stage = stage_of[layer.group]
            rows[stage] += layer_row(layer)
    named = {stage: (row, _joined(words[stage])) for stage, row in rows.items()}
    return {**named, "static layers, norms": (_rest(plan, list(rows.values())), "")}


def _stages(plan: Plan) -> dict[str, str]:
    """The row of each group: the stage of all its layers, else its own name."""
    stage_of = stages_of(plan)
    rows = {}
    for group in plan.groups:
        stages = {stage_of[name] for name in group.layers}
        one = stages.pop() if len(stages) == 1 else None
        rows[group.name] = group.name if one is None else f"stage {one}"
    return rows


def stages_of(plan: Plan) -> dict[str, int | None]:
    """The stage of each layer by its name; None for those outside the stages."""
    dynamic = {name for group in plan.groups for name in group.layers}
    return {
        name: None if label.static or label.alone or name not in dynamic else label.stage
        for name, label in place(plan.extended.sites).labels.items()
    }


def _rest(plan: Plan, rows: Sequence[Row]) -> Row:
    """What no row has: static layers, norms, and matrix products outside layers."""
    cost = plan.cost()
    shown = sum(rows, Row())
    return Row(
        unchanged=cost.params.total - shown.param_parts[-1],
        unchanged_macs=cost.macs.total - shown.macs["total"],
    )


def _joined(words: list[str]) -> str:
    if len(words) > 1 and len(set(words)) == 1:
        return f"{len(words)} x {words[0]}"
    return ", ".join(words) if len(words) <= 4 else f"{len(words)} groups"


def stage_tables(plan: Plan, scale: int = 1, ms: Mapping[str, float] | None = None) -> list[Table]:
    """Parameters and MACs by stage. scale: 2 to show FLOPs instead of MACs. ms: of a forward pass,
    by layer, to be shown, too.
    """
    of = ("n of cell", "cells") if plan.warehouses else ("dynamic", "kernels")
    params = new_table(("parameters", of[0]), (of[1], "attention", "unchanged", "total"))
    macs, work = _macs_table(plan, scale, ms)
    rows = stage_rows(plan)
    stage_of = _stages(plan)
    layers = {name: [stage_of[g.name]] for g in plan.groups for name in g.layers}
    times = _added_up(ms, layers, "static layers, norms")
    total = sum((row for row, _ in rows.values()), Row())
    for table in (params, macs):
        for name, (row, cells) in {**rows, "total": (total, "")}.items():
            if name == "total":
                table.add_section()
            if table is params:
                table.add_row(name, cells, *_commas(row.param_parts))
            else:
                table.add_row(name, *_commas(work(row), scale), *times(name))
    return [params, macs]


def _macs_table(
    plan: Plan, scale: int, ms: Mapping[str, float] | None
) -> tuple[Table, Callable[[Row], list[int]]]:
    """The table, and what it shows of a row before the milliseconds."""
    none = () if plan.cost().macs.modulation else ("modulation",)
    columns = [part for part in Row().macs if part not in none]
    table = new_table((_unit(scale),), [*columns, *(["ms"] if ms is not None else [])])
    return table, lambda row: [row.macs[part] for part in columns]


def _added_up(
    ms: Mapping[str, float] | None, rows: Mapping[str, list[str]], rest: str
) -> Callable[[str], list[str]]:
    """The cells that show the milliseconds of a row; none without `ms`. rows: by layer."""
    if ms is None:
        return lambda name: []
    times: dict[str, float] = {"total": sum(ms.values())}
    for layer, took in ms.items():
        for row in rows.get(layer, [rest]):
            times[row] = times.get(row, 0.0) + took
    return lambda name: [f"{times.get(name, 0.0):,.3f}"]


def layer_tables(plan: Plan, scale: int = 1, ms: Mapping[str, float] | None = None) -> list[Table]:
    """Parameters and MACs by layer, then the warehouses and the rest. ms: as in `stage_tables`."""
    group_word, kernels = ("warehouse", "cells") if plan.warehouses else ("group", "kernels")
    params = new_table(
        ("parameters", "kernel", group_word),
        ("m", "n", kernels, "attention", "unchanged"),
        spare=("kernel", "m", "n"),
    )
    macs, work = _macs_table(plan, scale, ms)
    times = _added_up(ms, {site.name: [site.name] for site in plan.extended.sites}, "others")
    groups = {group.name: group for group in plan.groups}
    rows = []
    for site, layer in zip(plan.extended.sites, plan.cost_by_layer(), strict=True):
        row = layer_row(layer)
        rows.append(row)
        shape = "x".join(map(str, site.kernel))
        group = groups.get(layer.group or "")
        where = (group.name, str(layer.mixtures), str(group.size)) if group else None
        name, m, n = where or ("static", "", "")
        params.add_row(site.name, shape, name, m, n, *_commas(row.param_parts[:-1]))
        macs.add_row(site.name, *_commas(work(row), scale), *times(site.name))
    params.add_section()
    for group in plan.groups:
        if not group.shared_params():
            continue
        row = Row(kernels=group.shared_params())
        rows.append(row)
        params.add_row(
            group.name, group.describe(), "", "", str(group.size), *_commas(row.param_parts[:-1])
        )
    rest = _rest(plan, rows)
    total = sum(rows, rest)
    params.add_row("norms and others", "", "", "", "", *_commas(rest.param_parts[:-1]))
    macs.add_row("others", *_commas(work(rest), scale), *times("others"))
    for table, cells in (
        (params, ["", "", "", "", *_commas(total.param_parts[:-1])]),
        (macs, [*_commas(work(total), scale), *times("total")]),
    ):
        table.add_section()
        table.add_row("total", *cells)
    return [params, macs]


def layer_row(layer: LayerCost) -> Row:
    """A layer's own numbers: a static layer's work is unchanged."""
    static = layer.group is None
    return Row(
        kernels=layer.kernel_params,
        attention=layer.attention_params,
        unchanged=layer.static_params,
        conv=0 if static else layer.conv_macs,
        mixing=layer.mixing_macs,
        attention_macs=layer.attention_macs,
        unchanged_macs=layer.conv_macs if static else 0,
        modulation=layer.modulation_macs,
    )


def _unit(scale: int) -> str:
    return "MACs" if scale == 1 else "FLOPs"


def _commas(numbers: Sequence[int], scale: int = 1) -> list[str]:
    return [f"{number * scale:,}" for number in numbers]


def summary_lines(plan: Plan, scale: int = 1) -> list[str]:
    """Parameters and MACs in two sentences that add up."""
    static = plan.network
    lines = []
    for unit, parts, of, by in (
        ("parameters", params_by_part(plan), static.params, 1),
        (_unit(scale), macs_by_part(plan), static.macs, scale),
    ):
        total = parts["total"]
        sums = " + ".join(f"{k} {v * by:,}" for k, v in parts.items() if k != "total")
        lines.append(f"{unit}: {total * by:,}, {total / of:.2f} x static ({of * by:,})")
        lines.append(f"    = {sums}")
        if unit == "parameters" and (less := only_trained(plan)):
            left = total - less
            told = f"{left:,} are left after training, {left / of:.2f} x static"
            lines.append(f"    {told}: budgets are of these")
    return lines


# A line that takes them off what stages have.
ONLY_TRAINED = "less what is only there for training"


def only_trained(plan: Plan) -> int:
    """Parameters that are only there for training."""
    cost = plan.cost()
    return cost.params.total - cost.deployed


def params_text(plan: Plan) -> str:
    """What budgets are about, and what training has if that is more."""
    cost = plan.cost()
    more = f" ({cost.params.total:,} while it is trained)" if only_trained(plan) else ""
    return f"{cost.deployed:,} parameters{more}"


def trade_table(candidates: Sequence[Candidate]) -> Table:
    """What the solver compared: parameters against mixing MACs."""
    sizes = "cells n" if candidates[0].plan.warehouses else "sizes"
    table = new_table(
        ("candidate",), ("parameters", "MACs", "mixing MACs", "spread of b"), (sizes,)
    )
    for candidate in candidates:
        cost = candidate.plan.cost()
        cells = [str(group.size) for group in candidate.plan.groups]
        shown = " ".join(cells) if len(cells) <= 8 else f"{' '.join(cells[:6])} … {cells[-1]}"
        table.add_row(
            candidate.why,
            f"{cost.deployed:,}",
            f"{cost.macs.total:,}",
            f"{cost.macs.mixing:,}",
            f"{candidate.solution.spread:.4f}",
            shown,
        )
    return table


def published_table(
    rows: Sequence[tuple[str, Plan, str]], static: tuple[int, int], ms: Sequence[float] = ()
) -> Table:
    """One line per setting: (name, plan, accuracy in words), after the static network. ms: of
    forward passes, the static network's first; none to leave them out.
    """
    columns = ["parameters", "x static", "MACs", "x static", *(["ms"] if ms else [])]
    told = any(accuracy for *_, accuracy in rows)
    table = new_table(("setting",), (*columns, *(["ImageNet top-1"] if told else [])))
    params, macs = static
    times = [[f"{one:.3g}"] for one in ms] or [[] for _ in range(len(rows) + 1)]
    table.add_row("static", f"{params:,}", "1.00", f"{macs:,}", "1.00", *times[0])
    for (name, plan, accuracy), took in zip(rows, times[1:], strict=True):
        cost = plan.cost()
        table.add_row(
            name,
            f"{cost.deployed:,}",
            f"{cost.deployed / params:.2f}",
            f"{cost.macs.total:,}",
            f"{cost.macs.total / macs:.2f}",
            *took,
            *([accuracy] if told else []),
        )
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers for `--json`."""
    return {
        "static": {"params": plan.network.params, "macs": plan.network.macs},
        "params": params_by_part(plan),
        "deployed": plan.cost().deployed,
        "macs": macs_by_part(plan),
        "warehouses": [
            {
                "name": group.name,
                "cell": list(group.cell),
                "num_cells": group.num_cells,
                "layers": list(group.layers),
            }
            for group in plan.warehouses
        ],
    }


def recount_lines(checks: Sequence[Recount]) -> list[str]:
    """Each recount against ours, and every reason for a difference."""
    lines = []
    for check in checks:
        difference = check.counted - check.ours
        verdict = "equal" if not difference else f"{difference:+,}"
        lines.append(f"check: {check.counter} {check.counted:,}, ours {check.ours:,}: {verdict}")
        lines += [f"    {amount:+,} {why}" for why, amount in check.reasons]
        if not check.explained:
            unknown = difference - sum(amount for _, amount in check.reasons)
            lines.append(f"    {unknown:+,} UNEXPLAINED")
    return lines
