"""Architectures as text: one operator by operator, or what there is within limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kwsearch import architectures
from kwsearch.micronas.peak_memory import live_bytes
from kwsearch.micronas.space import Architecture, operators
from kwsearch.terminal import new_table
from kwsearch.trials import FLASH, LATENCY, PEAK

if TYPE_CHECKING:
    from rich.table import Table

    from kwsearch.micronas.feasible import Feasible


def parts(feasible: Feasible, architecture: Architecture | None) -> list[str | Table]:
    """Lines and tables."""
    space = feasible.space
    size = f"{space.steps}x{space.sensors}"
    head = f"micronas, windows of {size}, {space.classes} classes"
    if architecture is not None:
        return [head, _operators(feasible, architecture), *_kept(feasible, architecture)]
    lines: list[str | Table] = [
        f"{head}: {space.architectures:.3g} architectures, {len(space.decisions)} decisions",
        _named(feasible),
    ]
    broken = feasible.largest().broken
    return [*lines, *(f"no architecture keeps the limits: {why}" for why in broken)]


def to_json(feasible: Feasible, architecture: Architecture | None) -> dict[str, Any]:
    """The same as plain data."""
    if architecture is not None:
        return {
            **architectures.facts(feasible, architecture),
            "operators": [
                dict(zip(_NAMES, row, strict=True)) for row in _rows(feasible, architecture)
            ],
            "broken": list(feasible.broken(architecture)),
        }
    return {
        "architectures": feasible.space.architectures,
        "decisions": {one.name: list(one.options) for one in feasible.space.decisions},
        **{name: architectures.facts(feasible, one) for name, one in _corners(feasible).items()},
        "broken": list(feasible.largest().broken),
    }


_NAMES = ("operator", "output", "params", "macs", "live_bytes", "ms")


def _rows(
    feasible: Feasible, architecture: Architecture
) -> list[tuple[str, str, int, int, int, float | None]]:
    network = operators(feasible.space, architecture)
    live = live_bytes(network, **feasible.how)
    rows = []
    for one, held in zip(network, live, strict=True):
        took = None if feasible.table is None else feasible.table.latency([one]).milliseconds
        output = "x".join(map(str, one.key.output))
        rows.append((one.name, output, one.key.params, one.key.macs, held, took))
    return rows


def _operators(feasible: Feasible, architecture: Architecture) -> Table:
    timed = feasible.table is not None
    table = new_table(
        ("operator", "output"),
        ("parameters", "MACs", "bytes alive", *(["ms"] if timed else [])),
    )
    for name, output, params, macs, held, took in _rows(feasible, architecture):
        shown = [] if took is None else [f"{took:.4g}"]
        table.add_row(name, output, f"{params:,}", f"{macs:,}", f"{held:,}", *shown)
    costs = architectures.facts(feasible, architecture)
    total = [f"{costs[LATENCY]:.4g}"] if timed else []
    table.add_row(
        "total, of bytes the peak", "", f"{costs['params']:,}", f"{costs['macs']:,}",
        f"{costs[PEAK]:,}", *total,
    )  # fmt: skip
    return table


def _kept(feasible: Feasible, architecture: Architecture) -> list[str]:
    """Flash, limits, and what of the latency is fitted."""
    lines = [f"flash: {feasible.flash(architecture):,} bytes of weights in int8, biases in int32"]
    if feasible.table is not None:
        fitted = feasible.table.latency(operators(feasible.space, architecture)).fitted
        if fitted:
            lines.append(f"not measured, so fitted: {', '.join(fitted)}")
    limits = feasible.limits
    if broken := feasible.broken(architecture):
        return [*lines, *(f"NOT within the limits: {one}" for one in broken)]
    if limits != type(limits)():
        lines.append("within the limits")
    return lines


def _corners(feasible: Feasible) -> dict[str, Architecture]:
    """smallest: as published, of first options."""
    space = feasible.space
    return {
        "smallest": space.minimum(),
        "largest": space.maximum(),
        "largest_within_limits": feasible.largest().architecture,
    }


def _named(feasible: Feasible) -> Table:
    titles = {"smallest": "smallest options", "largest": "largest options"}
    timed = feasible.table is not None
    table = new_table(
        ("architecture",),
        ("parameters", "MACs", "memory, bytes", "flash, bytes", *(["ms"] if timed else [])),
    )
    for name, one in _corners(feasible).items():
        costs = architectures.facts(feasible, one)
        table.add_row(
            titles.get(name, "largest within the limits"),
            f"{costs['params']:,}",
            f"{costs['macs']:,}",
            f"{costs[PEAK]:,}",
            f"{costs[FLASH]:,}",
            *([f"{costs[LATENCY]:.4g}"] if timed else []),
        )
    return table
