"""From a target to a plan: what a budget buys, what is near it, and what cannot be reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kwlayers.layout import MethodSettings
from kwlayers.plan import Network, Plan, PlanError
from kwlayers.planner import BudgetError, lay_out, out_of_reach, plan_network, plan_ratio
from kwlayers.sharing import Settings
from kwlayers.solver import Solution
from kwsearch import published
from kwsearch.published import Published


@dataclass(frozen=True)
class Target:
    """At most one of: b, parameters, parameters over those of the static model."""

    ratio: float | None = None
    params: int | None = None
    total_ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise PlanError(f"one target at a time, got {' and '.join(given)}")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def params_of(self, network: Network) -> int:
        """The parameters that a `params` or `total_ratio` target allows."""
        if self.params is not None:
            return self.params
        assert self.total_ratio is not None
        return math.floor(self.total_ratio * network.params)


@dataclass(frozen=True)
class Candidate:
    """One way to meet a target, and why it is shown."""

    why: str
    plan: Plan
    solution: Solution


@dataclass(frozen=True)
class Outcome:
    """The plan for a target. candidates: what the solver compared, the chosen one first.

    published: the published setting that was used, if one was.
    """

    plan: Plan
    target: Target
    settings: MethodSettings
    published: Published | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def ratio(self) -> float:
        """b as reached, which whole cells may keep from the target's."""
        return plan_ratio_of(self.plan)


def plan_ratio_of(plan: Plan) -> float:
    """b of a plan: all sizes over all units, i.e. cells over mixtures."""
    return sum(group.size for group in plan.groups) / sum(
        group.unit(plan.of(group)) for group in plan.groups
    )


def meet(
    network: Network,
    target: Target,
    settings: MethodSettings | None = None,
    model: str | None = None,
) -> Outcome:
    """The plan that meets `target`; without one that of the settings' own sizes.

    settings: None for KernelWarehouse's defaults; then a ratio that is published for `model` uses
    the published setting. Raises BudgetError (with the plans nearest to the target in its
    message) if none fits, PlanError for settings that cannot be.
    """
    if target.ratio is not None:
        entry = published.find(model, target.ratio) if model and settings is None else None
        if entry is not None:
            return Outcome(entry.plan(network), target, entry.settings, entry)
        chosen = settings or Settings()
        return Outcome(plan_ratio(network, chosen, target.ratio), target, chosen)
    chosen = settings or Settings()
    if not target:
        return Outcome(plan_network(network, chosen), target, chosen)
    layout = lay_out(network, chosen)
    allowed = target.params_of(network)
    if (enough := layout.enough(allowed)) is not None:
        return Outcome(enough, target, chosen)
    solutions = layout.solutions(allowed)
    if not solutions:
        error = out_of_reach(layout, allowed)
        near = "\n".join(f"  {line}" for line in nearest(network, chosen, allowed))
        raise BudgetError(f"{error}\n{near}", allowed, error.floor)
    candidates = tuple(
        Candidate(why, layout.plan(solution), solution) for why, solution in _trade(solutions)
    )
    return Outcome(candidates[0].plan, target, chosen, None, candidates)


def _trade(solutions: tuple[Solution, ...]) -> Iterator[tuple[str, Solution]]:
    """The most even solution, and others that beat it in something; each once."""
    shown = [solutions[0]]
    yield "closest to one ratio (chosen)", solutions[0]
    for why, best in (
        ("uses most of the budget", max(solutions, key=lambda s: (s.params, -s.spread))),
        ("fewest mixing MACs", min(solutions, key=lambda s: (s.mixing, s.spread))),
    ):
        if best not in shown:
            shown.append(best)
            yield why, best


def nearest(network: Network, settings: MethodSettings, allowed: int) -> list[str]:
    """What comes nearest to a target under the floor: one line per way to go lower."""
    own = _total(lay_out(network, settings).floor())
    lines = [f"nearest with these settings: --params {own}"]
    found = []
    for changes in settings.lower():
        try:
            floor = _total(lay_out(network, settings.changed(**changes)).floor())
        except PlanError:
            continue
        if floor < own:
            found.append((floor, " ".join(map(_flag, changes.items()))))
    for floor, flags in sorted(found)[:3]:
        reach = "reaches the target" if floor <= allowed else "still above the target"
        lines.append(f"try {flags}: floor {floor:,}, {reach}")
    if not any(floor <= allowed for floor, _ in found):
        lines.append("no such option reaches the target: fewer --classes, or a smaller model")
    return lines


def _total(plan: Plan) -> int:
    return plan.cost().deployed


def _flag(change: tuple[str, Any]) -> str:
    """The option that asks for a setting."""
    name, value = change
    if name not in ("cell_ratio", "sharing", "reduction"):
        return f"--set {name}={value}"
    shown = value if isinstance(value, str) else ",".join(f"{v:g}" for v in _several(value))
    return f"--{name.replace('_', '-')} {shown}"


def _several(value: Any) -> Sequence[float]:
    return value if isinstance(value, tuple) else (value,)
