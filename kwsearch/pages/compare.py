"""What a budget buys by each method: the comparison as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kwlayers.plan import Network, Plan
from kwsearch.compare import Entry, reasons, to_json
from kwsearch.diff import value_text
from kwsearch.pages import parts
from kwsearch.pages.figure import Bars, count_axis
from kwsearch.pages.page import render
from kwsearch.units import short_count


def page(
    entries: Sequence[Entry],
    network: Network,
    model: str,
    asked: str,
    allowed: int | None,
    command: str,
    versions: Mapping[str, str],
    static_memory: int | None = None,
    static_ms: float | None = None,
) -> str:
    """asked: the target, in words. allowed: parameters under it, where it says so. static_memory:
    bytes of a training step of the static network, if they are asked for. static_ms: of its forward
    pass, likewise.
    """
    reached = [entry for entry in entries if entry.plan is not None]
    columns = {
        "params": parts.there([parts.params_of(plan) for plan in _plans(reached)]),
        "macs": parts.there([parts.macs_of(plan) for plan in _plans(reached)]),
    }
    size = "x".join(map(str, network.input_size))
    return render(
        "compare.html",
        {
            "refresh": None,
            "title": f"{model} at {size}",
            "asked": asked,
            "figures": figures(entries, network, allowed),
            "columns": columns,
            "static": {"params": network.params, "macs": network.macs},
            "static_memory": static_memory,
            "static_ms": static_ms,
            "rows": _rows(reached),
            "unreachable": {e.method.title: e.reason for e in entries if e.plan is None},
            "notes": reasons(reached),
            "command": command,
            "versions": versions,
        },
    )


def _plans(entries: Sequence[Entry]) -> list[Plan]:
    return [entry.plan for entry in entries if entry.plan is not None]


def _rows(reached: Sequence[Entry]) -> list[dict[str, Any]]:
    """What the table and the list of settings show of each method."""
    said = to_json(reached)["methods"]
    return [
        {
            **one,
            "params": parts.params_of(plan),
            "macs": parts.macs_of(plan),
            "total_macs": one["macs"]["total"],
            "settings": {name: value_text(value) for name, value in one["settings"].items()},
        }
        for one, plan in zip(said, _plans(reached), strict=True)
    ]


def figures(entries: Sequence[Entry], network: Network, allowed: int | None) -> list[Bars]:
    """Parameters and MACs of each method, after the static network's."""
    methods = [(entry.method.title, entry.plan) for entry in entries if entry.plan is not None]
    params = [("static network", {"unchanged": network.params})]
    macs = [("static network", {"unchanged": network.macs})]
    params += [(title, parts.params_of(plan)) for title, plan in methods]
    macs += [(title, parts.macs_of(plan)) for title, plan in methods]
    return [_bars("params", "parameters", params, allowed), _bars("macs", "MACs", macs, None)]


def _bars(
    name: str, unit: str, rows: Sequence[tuple[str, Mapping[str, int]]], allowed: int | None
) -> Bars:
    totals = [(title, sum(found.values())) for title, found in rows]
    bars = Bars(
        name,
        f"{unit[0].upper()}{unit[1:]} by part",
        "; ".join(f"{title} {total:,}" for title, total in totals) + ".",
        count_axis(
            "MACs of one input" if unit == "MACs" else unit,
            [0, allowed or 0, *(total for _, total in totals)],
            zero=True,
        ),
        [(title, parts.numbered(found)) for title, found in rows],
        lambda total: short_count(round(total)),
    )
    for part in parts.NUMBERS:
        if any(found.get(part) for _, found in rows):
            bars.explain("", parts.WORDS[part], parts.NUMBERS[part])
    if allowed is not None:
        bars.line(allowed, "second")
        bars.explain("second", f"the target, at most {allowed:,}")
    return bars
