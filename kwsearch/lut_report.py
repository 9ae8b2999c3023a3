"""Latency tables as text: circumstances, what was measured, how good the predictions are."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kwsearch.latency import operators
from kwsearch.latency.checking import summary
from kwsearch.latency.table import MUST_AGREE, Check, Entry, Table
from kwsearch.terminal import new_table

if TYPE_CHECKING:
    from rich.table import Table as Text


def parts(table: Table) -> list[str | Text]:
    """The circumstances, calls by kind, whole steps, checks."""
    kept = table.circumstances
    found: list[str | Text] = [f"{name}: {kept[name]}" for name in MUST_AGREE if kept.get(name)]
    if "clock_mhz" in kept:
        found.append(f"clock: {kept['clock_mhz']:g} MHz")
    found.append(_kinds(table))
    if fits := operators.summary(table):
        return [*found, *fits]
    if table.wholes:
        found.append(_wholes(table))
    slow = len(table.drifted())
    if slow:
        found.append(f"{slow} measured while the machine was more than a tenth slower than usual")
    if table.checks:
        found.append(sentence(table.checks))
    else:
        found.append("not checked: `kwsearch lut check` measures whole models against it")
    return found


def _kinds(table: Table) -> Text:
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in table.entries.values():
        kinds[entry.kind].append(entry)
    text = new_table(("call",), ("measured", "fastest, us", "slowest, us", "quartiles apart"))
    for kind in sorted(kinds):
        entries = kinds[kind]
        spread = statistics.median((e.third_ns - e.first_ns) / e.median_ns for e in entries)
        times = [entry.median_ns / 1e3 for entry in entries]
        text.add_row(
            kind, f"{len(entries):,}", f"{min(times):,.1f}", f"{max(times):,.1f}", f"{spread:.1%}"
        )
    return text


def _wholes(table: Table) -> Text:
    modes: dict[tuple[bool, int], list[float]] = defaultdict(list)
    for whole in table.wholes:
        modes[whole.training, whole.batch].append(whole.measured_ns / sum(whole.calls_ns))
    text = new_table(("whole steps",), ("measured", "over their calls", "least", "most"))
    for (training, batch), ratios in sorted(modes.items()):
        text.add_row(
            f"{'training' if training else 'inference'}, batch {batch}",
            str(len(ratios)),
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
        )
    return text


def checks_table(checks: Sequence[Check]) -> Text:
    """A line per whole step."""
    text = new_table(("model", "step"), ("batch", "measured, ms", "predicted, ms", "90 %", "error"))
    for one in checks:
        text.add_row(
            one.name,
            "training" if one.training else "inference",
            str(one.batch),
            f"{one.measured_ms:.3g}",
            f"{one.predicted_ms:.3g}",
            f"{one.low_ms:.3g} to {one.high_ms:.3g}",
            f"{one.error:+.1%}",
        )
    return text


def sentence(checks: Sequence[Check]) -> str:
    """How good predictions are, in one line."""
    found = summary(checks)
    line = (
        f"checked on {len(checks)} whole steps: median error {found['median']:.1%}, worst "
        f"{found['worst']:.1%}; {found['within']:.0%} within their 90 % intervals"
    )
    return f"{line}; Kendall's tau {found['tau']:.2f}" if "tau" in found else line


def checks_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Every check, and the summary."""
    return {**summary(checks), "checks": [{**vars(one), "error": one.error} for one in checks]}


def to_json(table: Table) -> dict[str, Any]:
    """All of a table."""
    return {
        "circumstances": table.circumstances,
        "entries": [vars(entry) for entry in table.entries.values()],
        "wholes": [vars(whole) for whole in table.wholes],
        **(checks_json(table.checks) if table.checks else {"checks": []}),
    }
