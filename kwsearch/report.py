"""Plans as text: the summary, the tables by stage and by layer, the solver's trade."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kwlayers.cost import LayerCost, warehouse_params
from kwlayers.families import recognise
from kwlayers.plan import Group, Plan
from kwsearch import verdict
from kwsearch.trials import REASON, TWIN, UNIFORM, baseline, is_static, rung_pairs

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.console import Console
    from rich.table import Table

    from kwsearch.budget import Candidate
    from kwsearch.optimize import Result
    from kwsearch.recount import Recount

WIDTH = 120  # of a table that no terminal bounds


def console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for a table in a file."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


@dataclass(frozen=True)
class Row:
    """One line of a table; numbers add up over lines."""

    warehouses: int = 0
    attention: int = 0
    unchanged: int = 0
    conv: int = 0
    mixing: int = 0
    attention_macs: int = 0
    unchanged_macs: int = 0

    def __add__(self, other: Row) -> Row:
        return Row(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def param_parts(self) -> tuple[int, int, int, int]:
        """Warehouses, attention, unchanged, and their sum."""
        parts = (self.warehouses, self.attention, self.unchanged)
        return (*parts, sum(parts))

    @property
    def mac_parts(self) -> tuple[int, int, int, int, int]:
        """Conv, mixing, attention, unchanged, and their sum."""
        parts = (self.conv, self.mixing, self.attention_macs, self.unchanged_macs)
        return (*parts, sum(parts))


def stage_rows(plan: Plan) -> dict[str, tuple[Row, str]]:
    """Costs by stage, with the stage's warehouses in words; the last row is all the rest."""
    stage_of = _stages(plan)
    rows: dict[str, Row] = {}
    words: dict[str, list[str]] = {}
    for group in plan.groups:
        stage = stage_of[group.name]
        rows[stage] = rows.get(stage, Row()) + Row(warehouses=warehouse_params(group))
        words.setdefault(stage, []).append(_cells(group))
    for layer in plan.cost_by_layer():
        if layer.group is not None:
            stage = stage_of[layer.group]
            rows[stage] += layer_row(layer)
    named = {stage: (row, _joined(words[stage])) for stage, row in rows.items()}
    return {**named, "static layers, norms": (_rest(plan, list(rows.values())), "")}


def _stages(plan: Plan) -> dict[str, str]:
    """The stage of each group by its first layer; the group itself where stages are unknown."""
    known = recognise(plan.network.sites)
    stages = {}
    for group in plan.groups:
        label = known.labels[group.layers[0]] if known else None
        if label is None:
            stages[group.name] = group.name
        elif label.static:
            stages[group.name] = group.layers[0]
        else:
            stages[group.name] = label.alone or f"stage {label.stage}"
    return stages


def _rest(plan: Plan, rows: Sequence[Row]) -> Row:
    """What no row has: static layers, norms, and matrix products outside layers."""
    cost = plan.cost()
    shown = sum(rows, Row())
    return Row(
        unchanged=cost.params.total - shown.param_parts[-1],
        unchanged_macs=cost.macs.total - shown.mac_parts[-1],
    )


def _cells(group: Group) -> str:
    return f"{group.num_cells} of {'x'.join(map(str, _squeezed(group.cell)))}"


def _squeezed(cell: tuple[int, ...]) -> tuple[int, ...]:
    """(64, 64) for 64x64x1x1; spatial cells keep their size."""
    return cell[:2] if set(cell[2:]) == {1} else cell


def _joined(words: list[str]) -> str:
    return ", ".join(words) if len(words) <= 4 else f"{len(words)} warehouses"


def stage_tables(plan: Plan, scale: int = 1) -> list[Table]:
    """Parameters and MACs by stage. scale: 2 to show FLOPs instead of MACs."""
    params = _table(("parameters", "n of cell"), ("cells", "attention", "unchanged", "total"))
    macs = _table((_unit(scale),), ("conv", "mixing", "attention", "unchanged", "total"))
    rows = stage_rows(plan)
    total = sum((row for row, _ in rows.values()), Row())
    for table in (params, macs):
        for name, (row, cells) in {**rows, "total": (total, "")}.items():
            if name == "total":
                table.add_section()
            if table is params:
                table.add_row(name, cells, *_commas(row.param_parts))
            else:
                table.add_row(name, *_commas(row.mac_parts, scale))
    return [params, macs]


def layer_tables(plan: Plan, scale: int = 1) -> list[Table]:
    """Parameters and MACs by layer, then the warehouses and the rest."""
    params = _table(
        ("parameters", "kernel", "warehouse"), ("m", "n", "cells", "attention", "unchanged")
    )
    macs = _table((_unit(scale),), ("conv", "mixing", "attention", "unchanged", "total"))
    groups = {group.name: group for group in plan.groups}
    rows = []
    for site, layer in zip(plan.network.sites, plan.cost_by_layer(), strict=True):
        row = layer_row(layer)
        rows.append(row)
        shape = "x".join(map(str, site.kernel))
        group = groups.get(layer.group or "")
        where = (group.name, str(layer.mixtures), str(group.num_cells)) if group else None
        name, m, n = where or ("static", "", "")
        params.add_row(site.name, shape, name, m, n, *_commas(row.param_parts[:-1]))
        macs.add_row(site.name, *_commas(row.mac_parts, scale))
    params.add_section()
    for group in plan.groups:
        row = Row(warehouses=warehouse_params(group))
        rows.append(row)
        cell = "x".join(map(str, group.cell))
        params.add_row(
            group.name, cell, "", "", str(group.num_cells), *_commas(row.param_parts[:-1])
        )
    rest = _rest(plan, rows)
    total = sum(rows, rest)
    params.add_row("norms and others", "", "", "", "", *_commas(rest.param_parts[:-1]))
    macs.add_row("others", *_commas(rest.mac_parts, scale))
    for table, cells in (
        (params, ["", "", "", "", *_commas(total.param_parts[:-1])]),
        (macs, _commas(total.mac_parts, scale)),
    ):
        table.add_section()
        table.add_row("total", *cells)
    return [params, macs]


def layer_row(layer: LayerCost) -> Row:
    """A layer's own numbers: a static layer's work is unchanged."""
    static = layer.group is None
    return Row(
        attention=layer.attention_params,
        unchanged=layer.static_params,
        conv=0 if static else layer.conv_macs,
        mixing=layer.mixing_macs,
        attention_macs=layer.attention_macs,
        unchanged_macs=layer.conv_macs if static else 0,
    )


def _unit(scale: int) -> str:
    return "MACs" if scale == 1 else "FLOPs"


def _commas(numbers: Sequence[int], scale: int = 1) -> list[str]:
    return [f"{number * scale:,}" for number in numbers]


def _table(words: Sequence[str], *numbers: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in words:
        table.add_column(name, overflow="fold")
    for group in numbers:
        for name in group:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def summary_lines(plan: Plan, scale: int = 1) -> list[str]:
    """Parameters and MACs in two sentences that add up."""
    cost, static = plan.cost(), plan.network
    lines = []
    for unit, parts, of, by in (
        ("parameters", vars(cost.params), static.params, 1),
        (_unit(scale), vars(cost.macs), static.macs, scale),
    ):
        total = parts["total"]
        sums = " + ".join(f"{k} {v * by:,}" for k, v in parts.items() if k != "total")
        lines.append(f"{unit}: {total * by:,}, {total / of:.2f} x static ({of * by:,})")
        lines.append(f"    = {sums}")
    return lines


def trade_table(candidates: Sequence[Candidate]) -> Table:
    """What the solver compared: parameters against mixing MACs."""
    table = _table(
        ("candidate",), ("parameters", "MACs", "mixing MACs", "spread of b"), ("cells n",)
    )
    for candidate in candidates:
        cost = candidate.plan.cost()
        cells = [str(group.num_cells) for group in candidate.plan.groups]
        shown = " ".join(cells) if len(cells) <= 8 else f"{' '.join(cells[:6])} … {cells[-1]}"
        table.add_row(
            candidate.why,
            f"{cost.params.total:,}",
            f"{cost.macs.total:,}",
            f"{cost.macs.mixing:,}",
            f"{candidate.solution.spread:.4f}",
            shown,
        )
    return table


def published_table(rows: Sequence[tuple[str, Plan, str]], static: tuple[int, int]) -> Table:
    """One line per setting: (name, plan, accuracy in words), after the static network."""
    table = _table(("setting",), ("parameters", "x static", "MACs", "x static", "ImageNet top-1"))
    params, macs = static
    table.add_row("static", f"{params:,}", "1.00", f"{macs:,}", "1.00", "")
    for name, plan, accuracy in rows:
        cost = plan.cost()
        table.add_row(
            name,
            f"{cost.params.total:,}",
            f"{cost.params.total / params:.2f}",
            f"{cost.macs.total:,}",
            f"{cost.macs.total / macs:.2f}",
            accuracy,
        )
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers for `--json`."""
    cost = plan.cost()
    return {
        "static": {"params": plan.network.params, "macs": plan.network.macs},
        "params": vars(cost.params),
        "macs": vars(cost.macs),
        "warehouses": [
            {
                "name": group.name,
                "cell": list(group.cell),
                "num_cells": group.num_cells,
                "layers": list(group.layers),
            }
            for group in plan.groups
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


def trials_table(trials: Sequence[FrozenTrial]) -> Table:
    """One line per trial, the best first."""
    table = _table(
        ("trial", "result"),
        ("held-out accuracy", "parameters", "MACs", "seconds"),
        ("n of warehouses",),
    )
    for trial in sorted(trials, key=_by_result):
        attrs = trial.user_attrs
        cells = [str(group["num_cells"]) for group in attrs.get("groups", ())]
        shown = " ".join(cells) if len(cells) <= 8 else f"{' '.join(cells[:6])} … {cells[-1]}"
        table.add_row(
            str(trial.number) if (name := baseline(trial)) is None else f"{trial.number} ({name})",
            _result(trial),
            f"{trial.values[0]:.2%}" if trial.values else "",
            f"{attrs['params']:,}" if "params" in attrs else "",
            f"{attrs['macs']:,}" if "macs" in attrs else "",
            f"{attrs['seconds']:.0f}" if "seconds" in attrs else "",
            shown,
        )
    return table


def _by_result(trial: FrozenTrial) -> tuple[bool, float, int]:
    """Finished trials first, by accuracy; then those that stopped early."""
    score = trial.values[0] if trial.values else 0.0
    return (trial.state.name != "COMPLETE", -score, trial.number)


def verdict_lines(result: Result) -> list[str]:
    """The best trial against the uniform plan, and how much of it may be chance."""
    best = result.best
    if best is None:
        return ["no trial finished: nothing to choose"]
    score, images = best.values[0], result.held_out
    lines = [f"best: trial {best.number}, {score:.2%} on {images} held-out images"]
    if result.finals is not None and result.finals.verdict is not None:
        first, *others = verdict.sentence(result.finals.verdict).split("; ")
        lines.append(f"verdict on {result.finals.split} images: {first}")
        lines += [f"    {other}" for other in others]
    else:
        lines += _single_seed_lines(result, best)
    lines += rung_lines(result)
    if result.best_path is not None:
        lines.append(f"wrote {result.best_path}")
    return lines


def _single_seed_lines(result: Result, best: FrozenTrial) -> list[str]:
    lines = []
    score, images = best.values[0], result.held_out
    if best.number == UNIFORM:
        lines.append("    the uniform plan: no other plan did better")
    for number, name in ((UNIFORM, "uniform plan"), (TWIN, "static network of as many parameters")):
        other = result.trial(number)
        if other is None or not other.values or number == best.number:
            continue
        if number == TWIN and not is_static(other):
            continue
        gap = score - other.values[0]
        error = ((score * (1 - score) + other.values[0] * (1 - other.values[0])) / images) ** 0.5
        reach = "within" if abs(gap) < 2 * error else "beyond"
        lines.append(
            f"    {gap * 100:+.2f} points against the {name}; {reach} two standard errors "
            f"({2 * error * 100:.2f} points) of so few images and one seed"
        )
    if len(result.trials) > 2:
        lines.append(f"    the best of {len(result.trials)} trials is in part the luckiest")
    return lines


def rung_lines(result: Result) -> list[str]:
    """How well each rung ranked the trials that were trained in full."""
    lines = []
    last = result.rungs[-1].step if result.rungs else 0
    pairs = {r.step: rung_pairs(result.trials, r.step, last) for r in result.rungs[:-1]}
    for step, found in verdict.trust({k: v for k, v in pairs.items() if v}).items():
        lines.append(verdict.trust_sentence(f"{step} epochs", found))
    return lines


def result_json(result: Result) -> dict[str, Any]:
    """A finished study for `--json`."""
    best = result.best
    return {
        "best": best.number if best else None,
        "best_recipe": str(result.best_path) if result.best_path else None,
        "held_out": result.held_out,
        "verdict": _verdict_json(result),
        "trials": [trial_json(trial) for trial in result.trials],
    }


def _verdict_json(result: Result) -> dict[str, Any] | None:
    finals = result.finals
    if finals is None or finals.verdict is None:
        return None
    return {
        "sentence": verdict.sentence(finals.verdict),
        "winner": finals.verdict.winner,
        "images": finals.split,
        "accuracies": finals.accuracies,
    }


def trial_json(trial: FrozenTrial) -> dict[str, Any]:
    """A trial for `--json`."""
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "score": trial.values[0] if trial.values else None,
        "epochs": trial.intermediate_values,
        "choices": trial.params,
        **trial.user_attrs,
    }


def trial_lines(trial: FrozenTrial) -> list[str]:
    """What one trial is, how it went and what was chosen for it."""
    attrs = trial.user_attrs
    name = baseline(trial)
    lines = [f"trial {trial.number}{f' ({name})' if name else ''}: {_result(trial)}"]
    if trial.values:
        lines[0] += f", {trial.values[0]:.2%}"
    if "params" in attrs:
        lines.append(f"{attrs['params']:,} parameters, {attrs['macs']:,} MACs")
    if "seconds" in attrs:
        lines.append(f"{attrs['seconds']:,.1f} s, attempt {attrs['lease']['attempt']}")
    if trial.intermediate_values:
        values = (f"{step}: {value:.2%}" for step, value in trial.intermediate_values.items())
        lines.append(f"accuracy by epoch  {'  '.join(values)}")
    for key, value in trial.params.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"    {key} = {shown}")
    for group in attrs.get("groups", ()):
        cell = "x".join(map(str, group["cell"]))
        layers = len(group["layers"])
        lines.append(
            f"    {group['name']}: n = {group['num_cells']} cells of {cell}, {layers} layers"
        )
    return lines


def _result(trial: FrozenTrial) -> str:
    found: str = trial.user_attrs.get(REASON, trial.state.name.lower())
    return found


def plain(text: str) -> str:
    """Text without rich's markup brackets being read as markup."""
    return re.sub(r"\[", r"\\[", text)
