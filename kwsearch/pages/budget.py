"""What a budget buys: parameters and MACs by part over the budget, as plots and as a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kwsearch import published
from kwsearch.pages import parts
from kwsearch.pages.curve import Curve, Point
from kwsearch.pages.figure import Axis, Figure, axis, count_axis, stacked
from kwsearch.pages.page import render
from kwsearch.units import short_count

_MOST_TICKS = 8


def svg(curve: Curve, model: str, asked: str, origin: str) -> str:
    """Both plots in one file. asked: what was, in words. origin: command and versions."""
    plots = figures(curve, linked=False)
    return str(stacked("budget", headline(curve, model), asked, origin, plots)) + "\n"


def page(curve: Curve, model: str, asked: str, command: str, versions: Mapping[str, str]) -> str:
    """The same with a table of the points. versions: of packages, by their names."""
    macs = [part for part in curve.points[0].macs if any(p.macs[part] for p in curve.all)]
    return render(
        "budget.html",
        {
            "refresh": None,
            "title": headline(curve, model),
            "asked": asked,
            "facts": facts(curve),
            "figures": figures(curve),
            "head": curve.scale.head,
            "columns": {"params": list(curve.points[0].params), "macs": macs},
            "static": {"params": curve.network.params, "macs": curve.network.macs},
            "points": [_row(i, point, curve) for i, point in enumerate(curve.all)],
            "command": command,
            "versions": versions,
        },
    )


def headline(curve: Curve, model: str) -> str:
    """The network and its input."""
    return f"{model} at {'x'.join(map(str, curve.network.input_size))}"


def facts(curve: Curve) -> dict[str, str]:
    """What is worth knowing besides the plots, by name."""
    network = curve.network
    found = {
        "static network": f"{network.params:,} parameters, {network.macs:,} MACs",
        "smallest there is": f"{curve.floor.cost().deployed:,} parameters",
    }
    if curve.chosen is not None:
        params, macs = (sum(of.values()) for of in (curve.chosen.params, curve.chosen.macs))
        found[curve.chosen.name] = (
            f"{params:,} parameters ({params / network.params:.2f} x static), {macs:,} MACs "
            f"({macs / network.macs:.2f} x static), {curve.scale.head} = {curve.chosen.at:.4g}"
        )
        trained = curve.chosen.plan.cost().params.total
        if trained != params:
            found["while it is trained"] = f"{trained:,} parameters"
    return found


def _row(number: int, point: Point, curve: Curve) -> dict[str, Any]:
    kind = "chosen" if point is curve.chosen else "published" if point.name else ""
    return {
        "id": f"point-{number}",
        "kind": kind,
        "name": point.name,
        "at": point.at,
        "shown": f"{point.at:.4g}",
        "params": point.params,
        "macs": point.macs,
        "total_params": sum(point.params.values()),
        "total_macs": sum(point.macs.values()),
    }


def figures(curve: Curve, linked: bool = True) -> list[Figure]:
    """Parameters, and MACs. linked: whether marks lead to their rows of the table."""
    network = curve.network
    return [
        _figure(curve, "parameters", lambda point: point.params, network.params, linked),
        _figure(curve, "MACs", lambda point: point.macs, network.macs, linked),
    ]


def _figure(
    curve: Curve, unit: str, parts_of: Callable[[Point], dict[str, int]], static: int, linked: bool
) -> Figure:
    """One of them. parts_of: a point's numbers. static: the static network's."""

    def total(point: Point) -> int:
        return sum(parts_of(point).values())

    highest = max([static, *map(total, curve.all)])
    figure = Figure(
        unit.lower(),
        f"{unit[0].upper()}{unit[1:]} by part over {curve.scale.head}",
        _description(curve, unit, total, static),
        _place_axis(curve),
        count_axis("MACs of one input" if unit == "MACs" else unit, [0, highest], zero=True),
    )
    _draw_areas(figure, curve, parts_of)
    for i, point in enumerate(curve.all):
        if point.name:
            kind = "best" if point is curve.chosen else "published"
            said = f"{point.name}: {total(point):,} {unit}, {curve.scale.head} = {point.at:.4g}"
            link = {"href": f"#point-{i}"} if linked else {"text": said}
            figure.mark(point.at, total(point), kind, **link)
    if curve.published:
        others = ", whose cells may be others" if curve.points[0].plan.warehouses else ""
        figure.explain("published", f"published settings{others}")
    if curve.chosen is not None:
        figure.rule(x=curve.chosen.at, text=curve.chosen.short)
        figure.explain("best", curve.chosen.name)
    figure.rule(y=static, text=f"static network {short_count(static)}")
    for point in curve.published:
        figure.note(point.at, total(point), point.short)
    return figure


def _draw_areas(figure: Figure, curve: Curve, parts_of: Callable[[Point], dict[str, int]]) -> None:
    """A part on the other, from what stays the same up to what grows; the legend from the top."""
    below = [0] * len(curve.points)
    warehouses = bool(curve.points[0].plan.warehouses)
    shown = []
    for part in stack(list(map(parts_of, curve.points))):
        above = [
            sum(pair)
            for pair in zip(below, (parts_of(point)[part] for point in curve.points), strict=True)
        ]
        low, high = (
            [(point.at, float(y)) for point, y in zip(curve.points, ys, strict=True)]
            for ys in (below, above)
        )
        figure.area(low, high, parts.NUMBERS[part])
        shown.append(part)
        below = above
    for part in reversed(shown):
        figure.explain("", parts.words(part, warehouses), parts.NUMBERS[part])


def stack(found: Sequence[Mapping[str, int]]) -> list[str]:
    """The parts that are there, the one that changes least first."""
    return sorted(
        parts.there(found),
        key=lambda part: max(one[part] for one in found) - min(one[part] for one in found),
    )


def _place_axis(curve: Curve) -> Axis:
    """Of the points' places: ticks at powers of two, or at whole numbers."""
    scale = curve.scale
    places = [point.at for point in curve.all]
    if scale.whole:
        whole = range(1, round(scale.largest) + 1)
        step = -(-len(whole) // _MOST_TICKS)
        return axis(scale.title, places, ticks=list(whole)[step - 1 :: step])
    exponents = range(-20, 20)
    inside = [2.0**e for e in exponents if min(places) * 0.95 <= 2.0**e <= max(places) * 1.05]
    step = -(-len(inside) // _MOST_TICKS) or 1
    ticks = inside[::-1][::step]
    if len(ticks) < 3:
        return axis(scale.title, places, log=True)
    return axis(scale.title, places, published.fraction, log=True, ticks=ticks)


def _description(curve: Curve, unit: str, total: Callable[[Point], int], static: int) -> str:
    """What the plot shows, for those who do not see it."""
    head = curve.scale.head
    first, last = curve.points[0], curve.points[-1]
    said = [
        f"{total(first):,} {unit} at {head} = {first.at:.4g}, "
        f"{total(last):,} at {head} = {last.at:.4g}",
        f"the static network has {static:,}",
    ]
    said += [f"{p.name} at {head} = {p.at:.4g} has {total(p):,}" for p in curve.marks]
    return "; ".join(said) + "."
