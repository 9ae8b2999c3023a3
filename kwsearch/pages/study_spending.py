"""Where a budget goes: the parameters and MACs of the best plan by stage and part, against the
uniform plan's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwlayers.plan import Network, Plan
from kwsearch.pages import parts
from kwsearch.pages.axes import Axis, count_axis
from kwsearch.pages.figure import Bars
from kwsearch.report import ONLY_TRAINED, Row, only_trained, stage_rows
from kwsearch.trials import UNIFORM
from kwsearch.units import short_count

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.results import Found

_BARS = 12  # places with bars of their own
_PARAMS = ("kernels", "attention", "unchanged")
_MACS = ("conv", "mixing", "attention", "modulation", "unchanged")


@dataclass(frozen=True)
class Line:
    """A place in the table: each plan's parts and their sum, and the plans' difference."""

    name: str
    plans: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]

    @property
    def difference(self) -> int | None:
        """The first plan's sum less the second's; None for one plan."""
        return self.plans[0][-1] - self.plans[1][-1] if len(self.plans) > 1 else None


@dataclass(frozen=True)
class Part:
    """Parameters or MACs. columns: the parts, then their sum. lines: the last is the total."""

    unit: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    bars: Bars


@dataclass(frozen=True)
class Spending:
    """Of one budget. names: of the plans, the best first."""

    budget: float | None
    names: tuple[str, ...]
    parts: tuple[Part, ...]


def spending(found: Found, network: Network, place: int = 0) -> Spending | None:
    """Of the best plan and the uniform one; None without a plan. place: of the budget, for ids."""
    best = found.best
    if best is None or "groups" not in best.user_attrs:
        return None
    trials = {f"best, trial {best.number}": best}
    uniform = found.baseline(UNIFORM)
    if uniform is not None and uniform.number == best.number:
        trials = {f"best and uniform, trial {best.number}": best}
    elif uniform is not None and "groups" in uniform.user_attrs:
        trials[f"uniform, trial {uniform.number}"] = uniform
    plans = [_plan(trial, network) for trial in trials.values()]
    rows = [stage_rows(plan) for plan in plans]
    return Spending(
        found.budget,
        tuple(trials),
        (
            _part("params", "parameters", _PARAMS, _params(rows), plans, tuple(trials), place),
            _part("macs", "MACs", _MACS, _macs(rows), plans, tuple(trials), place),
        ),
    )


def _plan(trial: FrozenTrial, network: Network) -> Plan:
    return Plan.from_groups(network, trial.user_attrs["groups"])


Sizes = dict[str, tuple[tuple[int, ...], str]]


def _params(rows: Sequence[Mapping[str, tuple[Row, str]]]) -> list[Sizes]:
    return [{k: (row.param_parts[:-1], words) for k, (row, words) in one.items()} for one in rows]


def _macs(rows: Sequence[Mapping[str, tuple[Row, str]]]) -> list[Sizes]:
    return [
        {k: (tuple(row.macs[part] for part in _MACS), words) for k, (row, words) in one.items()}
        for one in rows
    ]


def _part(
    name: str,
    unit: str,
    every: tuple[str, ...],
    sizes: Sequence[Sizes],
    plans: Sequence[Plan],
    names: tuple[str, ...],
    place: int,
) -> Part:
    """The table and the bars of one unit; parts that nothing has are left out."""
    kept = [i for i in range(len(every)) if any(s[i] for one in sizes for s, _ in one.values())]
    columns = tuple(every[i] for i in kept)
    places = list(dict.fromkeys(where for one in sizes for where in one))
    rest = list(sizes[0])[-1]
    places.sort(key=lambda where: (where == rest, _by_numbers(where)))
    lines = []
    for where in places:
        own = [one.get(where, ((0,) * len(every), "")) for one in sizes]
        shown = tuple((*(s[i] for i in kept), sum(s)) for s, _ in own)
        lines.append(Line(where, shown, tuple(words for _, words in own)))
    if name == "params":
        lines += _only_trained(plans, len(columns))
    total = tuple(
        tuple(sum(line.plans[i][column] for line in lines) for column in range(len(columns) + 1))
        for i in range(len(plans))
    )
    lines.append(Line("total", total, ("",) * len(plans)))
    bars = _bars(f"spent-{name}-{place}", unit, columns, lines, names)
    warehouses = all(plan.warehouses for plan in plans)
    for column in columns:
        bars.explain("", parts.words(column, warehouses), parts.NUMBERS[column])
    return Part(unit, columns, tuple(lines), bars)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """To sort stage 2 before stage 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _only_trained(plans: Sequence[Plan], columns: int) -> list[Line]:
    """What is gone after training, as a negative line: budgets are about what is left."""
    spared = [only_trained(plan) for plan in plans]
    if not any(spared):
        return []
    numbers = tuple((-less, *(0,) * (columns - 1), -less) for less in spared)
    return [Line(ONLY_TRAINED, numbers, ("",) * len(plans))]


def _bars(
    name: str,
    unit: str,
    columns: tuple[str, ...],
    lines: Sequence[Line],
    names: tuple[str, ...],
) -> Bars:
    """A bar for each place and plan; small places of many are one."""
    *places, total = [line for line in lines if min(map(min, line.plans)) >= 0]
    if len(places) > _BARS:
        order = sorted(places, key=lambda line: -max(sums[-1] for sums in line.plans))
        large = {line.name for line in order[: _BARS - 1]}
        places = [*(p for p in places if p.name in large), _added(places, large)]
    shown = [plan.partition(",")[0] for plan in names]
    rows = [
        (
            line.name if len(shown) == 1 else f"{line.name}, {plan}",
            parts.numbered(dict(zip(columns, line.plans[i], strict=False))),
        )
        for line in places
        for i, plan in enumerate(shown)
    ]
    words = "; ".join(
        f"{plan}, has "
        + ", ".join(f"{size:,} {column}" for column, size in zip(columns, sizes, strict=False))
        for plan, sizes in zip(names, total.plans, strict=True)
    )
    if any(line.name == ONLY_TRAINED for line in lines):
        words += "; bars are of places while they are trained"
    x = count_axis(unit, [sum(sizes) for _, sizes in rows], zero=True)
    return Bars(
        name,
        f"{unit[0].upper()}{unit[1:]} by place and part",
        f"{words[0].upper()}{words[1:]}.",
        Axis(x.title, 0.0, x.high, x.ticks),
        rows,
        lambda size: short_count(round(size)),
    )


def _added(places: Sequence[Line], without: set[str]) -> Line:
    """The sum of those whose names are not among `without`."""
    rest = [line for line in places if line.name not in without]
    plans = tuple(
        tuple(map(sum, zip(*(line.plans[i] for line in rest), strict=True)))
        for i in range(len(rest[0].plans))
    )
    return Line(f"{len(rest)} smaller places", plans, rest[0].words)
