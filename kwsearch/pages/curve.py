"""Plans over a range of budgets: what the plot of a budget is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kwlayers.layout import Layout, MethodSettings
from kwlayers.methods import find
from kwlayers.plan import Group, Network, Plan, PlanError
from kwlayers.planner import lay_out
from kwsearch import published
from kwsearch.budget import plan_ratio_of
from kwsearch.pages.parts import macs_of, params_of

POINTS = 30
_LARGEST = 4.0
_MOST_KERNELS = 8
_SMALLEST = 1e-3  # of a part of all weights, which has no floor worth showing


@dataclass(frozen=True)
class Point:
    """One plan. at: its place on the axis. name, short: of a plan that has a name."""

    at: float
    plan: Plan
    name: str = ""
    short: str = ""

    @classmethod
    def of(cls, plan: Plan, name: str = "", short: str = "") -> Point:
        return cls(plan_ratio_of(plan), plan, name, short)

    @functools.cached_property
    def params(self) -> dict[str, int]:
        """By part, as deployed."""
        return params_of(self.plan)

    @functools.cached_property
    def macs(self) -> dict[str, int]:
        """Of one image, by part."""
        return macs_of(self.plan)


@dataclass(frozen=True)
class Scale:
    """What the axis says: a sentence and a column's head. whole: of whole numbers, evenly; else
    by logarithm. largest: where it ends.
    """

    title: str
    head: str
    largest: float
    whole: bool = False


@dataclass(frozen=True)
class Curve:
    """Plans in the order of their sizes, the first the smallest that there is or is worth showing.

    floor: the smallest there is. published: what has been published of the model. chosen: what was
    asked for.
    """

    network: Network
    scale: Scale
    points: tuple[Point, ...]
    floor: Plan
    published: tuple[Point, ...] = ()
    chosen: Point | None = None

    @property
    def marks(self) -> tuple[Point, ...]:
        """The points that have a name."""
        return (*self.published, *((self.chosen,) if self.chosen else ()))

    @functools.cached_property
    def all(self) -> tuple[Point, ...]:
        """Points and marks, by size; each plan once."""
        named = [mark.plan for mark in self.marks]
        others = (point for point in self.points if point.plan not in named)
        return tuple(sorted((*others, *self.marks), key=lambda point: point.at))


def curve_of(
    network: Network,
    settings: MethodSettings,
    model: str,
    chosen: Point | None = None,
    plan: Plan | None = None,
) -> Curve:
    """Plans by `settings`, or like `plan`: of its groups, all of them larger or smaller.

    model: whose published settings are marked.
    """
    layout = lay_out(network, settings) if plan is None else _of_plan(plan)
    scale = _scale(layout)
    marks = _published(network, settings, model)
    known = [chosen, *marks] if chosen else marks
    largest = max([scale.largest, *(_ceiling(point.at) for point in known)])
    scale = replace(scale, largest=largest)
    points: dict[tuple[int, ...], Point] = {}
    floor = layout.floor()
    make = _maker(layout)
    start = plan_ratio_of(floor)
    first = [floor] if start >= _SMALLEST else []
    for found in [*first, *(make(at) for at in _places(scale, max(start, _SMALLEST)))]:
        points.setdefault(tuple(group.size for group in found.groups), Point.of(found))
    if chosen is not None:
        marks = [mark for mark in marks if mark.plan != chosen.plan]
    ordered = tuple(sorted(points.values(), key=lambda point: point.at))
    return Curve(network, scale, ordered, floor, tuple(marks), chosen)


def _of_plan(plan: Plan) -> Layout:
    """Its groups, with the ratios that they have."""
    ratios = tuple(
        getattr(group, "ratio", None) or _own_ratio(plan, group) for group in plan.groups
    )
    return Layout(plan.network, plan.groups, ratios, plan.notes)


def _own_ratio(plan: Plan, group: Group) -> float:
    return group.size / group.unit(plan.of(group))


def _scale(layout: Layout) -> Scale:
    """What the method's groups call it."""
    group = layout.groups[0]
    if len({one.method for one in layout.groups}) > 1:
        return Scale("sizes of groups over those at ratio 1", "size", _LARGEST)
    if group.whole:
        return Scale(*group.ratio_words, _MOST_KERNELS, whole=True)
    return Scale(*group.ratio_words, min(_LARGEST, group.most_ratio))


def _ceiling(at: float) -> float:
    """An end for the axis beyond a mark."""
    return at if at <= 1 else 2.0 ** math.ceil(math.log2(at) - 1e-9)


def _places(scale: Scale, start: float) -> list[float]:
    """Where points are asked for: whole numbers, or evenly by logarithm, with every power of 2."""
    if scale.whole:
        return [float(k) for k in range(1, round(scale.largest) + 1)]
    octaves = math.log2(scale.largest / start)
    each = max(round(POINTS / max(octaves, 1.0)), 1)
    steps = range(math.floor(octaves * each) + 1)
    return [scale.largest * 2 ** (-i / each) for i in reversed(steps)]


def _maker(layout: Layout) -> Callable[[float], Plan]:
    """The plan at a place on the axis. Ratios of groups are kept relative to each other."""
    units = [group.unit(layout.of(group)) for group in layout.groups]
    if all(group.whole for group in layout.groups):
        return lambda at: layout.sized([round(at)] * len(units))
    own = [ratio or 1.0 for ratio in layout.own_ratios]
    common = sum(map(math.prod, zip(own, units, strict=True))) / sum(units)

    def make(at: float) -> Plan:
        ratios = [at * one / common for one in own]
        return Plan(
            layout.network,
            tuple(
                _at_ratio(group, ratio, unit)
                for group, ratio, unit in zip(layout.groups, ratios, units, strict=True)
            ),
        )

    return make


def _at_ratio(group: Group, ratio: float, unit: int) -> Group:
    """The group at a ratio of its unit, also where that is no budget of the method's."""
    if group.method == "kernel_warehouse":
        return group.at_ratio(ratio, unit)
    return group.resized(max(int(unit * ratio + 1e-9), 1))


def _published(network: Network, settings: MethodSettings, model: str) -> list[Point]:
    """The papers' settings of the model by KernelWarehouse, else what the method published."""
    if not settings.sized:
        return [
            Point.of(entry.plan(network), entry.name, f"{published.fraction(entry.ratio)}x")
            for entry in published.of_model(model)
        ]
    method = find(settings.method)
    try:
        plan = lay_out(network, method.settings()).as_laid_out()
    except PlanError:  # rules of the recipe may make dynamic what by default is not
        return []
    return [Point.of(plan, f"{method.title} as published", "as published")]
