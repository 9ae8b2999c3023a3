"""What differs between two recipes, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kwsearch.diff import Difference, value_text
from kwsearch.diff_report import what_differs
from kwsearch.pages import parts
from kwsearch.pages.figure import Bars, count_axis
from kwsearch.pages.page import render
from kwsearch.units import short_count


def page(found: Difference, command: str, versions: Mapping[str, str]) -> str:
    """versions: of packages, by their names."""
    return render(
        "diff.html",
        {
            "refresh": None,
            "found": found,
            "figures": figures(found),
            "totals": [("parameters", found.params), ("MACs", found.macs)],
            "settings": [
                (change.path, *(None if v is None else value_text(v) for v in (change.a, change.b)))
                for change in found.settings
            ],
            "groups": [(group, what_differs(group)) for group in found.groups],
            "layers": [
                (side, layers)
                for side, layers in (("A", found.dynamic_a), ("B", found.dynamic_b))
                if layers
            ],
            "command": command,
            "versions": versions,
        },
    )


def figures(found: Difference) -> list[Bars]:
    """Parameters and MACs of both, by part."""
    networks = [side.plan.network for side in (found.a, found.b)]
    plans = (found.a.plan, found.b.plan)
    params, macs = ([of(plan) for plan in plans] for of in (parts.params_of, parts.macs_of))
    return [
        _bars("params", "parameters", params, [network.params for network in networks]),
        _bars("macs", "MACs", macs, [network.macs for network in networks]),
    ]


def _bars(name: str, unit: str, found: Sequence[Mapping[str, int]], static: Sequence[int]) -> Bars:
    """Below each network as it is, if they differ; else below the one that both have."""
    named = [("static network", static[0])]
    if static[0] != static[1]:
        named = [("static network of A", static[0]), ("static network of B", static[1])]
    rows = [(title, {"unchanged": count}) for title, count in named]
    rows += [(side, dict(one)) for side, one in zip("AB", found, strict=True)]
    totals = [(title, sum(one.values())) for title, one in rows]
    bars = Bars(
        name,
        f"{unit[0].upper()}{unit[1:]} by part",
        "; ".join(f"{title} {total:,}" for title, total in totals) + ".",
        count_axis(
            "MACs of one input" if unit == "MACs" else unit, [t for _, t in totals], zero=True
        ),
        [(title, parts.numbered(one)) for title, one in rows],
        lambda total: short_count(round(total)),
    )
    for part in parts.NUMBERS:
        if any(one.get(part) for _, one in rows):
            bars.explain("", parts.WORDS[part], parts.NUMBERS[part])
    return bars
