"""Architectures as text: one operator by operator, or what there is within limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwsearch import architectures
from kwsearch.micronas.mixture import one_hot
from kwsearch.micronas.peak_memory import live_bytes, published_peak
from kwsearch.micronas.space import Architecture, operators
from kwsearch.step_report import DoesNotFit
from kwsearch.terminal import new_table
from kwsearch.trials import FLASH, LATENCY, PEAK, WAREHOUSE

if TYPE_CHECKING:
    from rich.table import Table

    from kwsearch.micronas.cycles import Latency
    from kwsearch.micronas.feasible import Feasible


@dataclass(frozen=True)
class Row:
    """An operator. ms: None without a table."""

    operator: str
    output: str
    params: int
    macs: int
    live_bytes: int
    ms: float | None


@dataclass(frozen=True)
class Counted:
    """An architecture and what it costs, with b of KernelWarehouse or plain.

    latency: None without a table. surrogate: bytes of memory by the published code's formula, for
    comparison; None with warehouses.
    """

    feasible: Feasible
    costs: Mapping[str, Any]
    rows: tuple[Row, ...]
    latency: Latency | None
    surrogate: int | None

    @property
    def broken(self) -> tuple[str, ...]:
        """Which limits it does not keep."""
        return architectures.broken(self.feasible, self.costs)


def count(feasible: Feasible, architecture: Architecture, warehouse: float | None) -> Counted:
    """Raises PlanError where there is no plan at that b."""
    table = feasible.table
    network = operators(feasible.space, architecture)
    timed = network
    if warehouse is not None:
        mixed = architectures.warehoused(feasible, architecture, warehouse)
        network, timed = mixed.operators, mixed.timed
    rows = []
    live = live_bytes(network, **feasible.how)
    for one, asked, held in zip(network, timed, live, strict=True):
        took = None if table is None else table.latency([asked]).milliseconds
        output = "x".join(map(str, one.key.output))
        params = one.key.params if warehouse is None else mixed.own_params(one)
        rows.append(Row(one.name, output, params, one.key.macs, held, took))
    costs = architectures.facts(feasible, architecture, warehouse)
    shared = costs["params"] - sum(row.params for row in rows)
    if warehouse is not None:
        rows.append(Row("cells and norms", "", shared, 0, 0, None))
    whole = None if table is None else table.latency(timed)
    surrogate = None
    if warehouse is None:
        surrogate = round(
            float(published_peak(feasible.space, one_hot(feasible.space, architecture)))
        )
    return Counted(feasible, costs, tuple(rows), whole, surrogate)


def parts(feasible: Feasible, counted: Counted | None) -> list[str | Table]:
    """Lines and tables."""
    space = feasible.space
    size = f"{space.steps}x{space.sensors}"
    head = f"micronas, windows of {size}, {space.classes} classes"
    if counted is not None:
        warehouse = counted.costs.get(WAREHOUSE)
        head += "" if warehouse is None else f", KernelWarehouse at b = {warehouse:g}"
        return [head, _operators(counted), *_kept(counted)]
    return [
        f"{head}: {space.architectures:.3g} architectures, {len(space.decisions)} decisions",
        _named(feasible),
    ]


def check(feasible: Feasible, counted: Counted | None) -> None:
    """Raise DoesNotFit for an architecture over the limits, or limits that none keeps."""
    if counted is None:
        if broken := feasible.largest.broken:
            raise DoesNotFit(f"no architecture keeps the limits: {'; '.join(broken)}")
    elif counted.broken:
        raise DoesNotFit(f"not within the limits: {'; '.join(counted.broken)}")


def to_json(feasible: Feasible, counted: Counted | None) -> dict[str, Any]:
    """The same as plain data."""
    if counted is not None:
        return {
            **counted.costs,
            "fitted": [] if counted.latency is None else list(counted.latency.fitted),
            "fitted_ms": 0.0 if counted.latency is None else counted.latency.fitted_ms,
            "surrogate_bytes": counted.surrogate,
            "operators": [vars(row) for row in counted.rows],
            "broken": list(counted.broken),
        }
    return {
        "architectures": feasible.space.architectures,
        "decisions": {one.name: list(one.options) for one in feasible.space.decisions},
        **{name: architectures.facts(feasible, one) for name, one in _corners(feasible).items()},
        "broken": list(feasible.largest.broken),
    }


def _operators(counted: Counted) -> Table:
    timed = counted.feasible.table is not None
    table = new_table(
        ("operator", "output"),
        ("parameters", "MACs", "bytes alive", *(["ms"] if timed else [])),
    )
    for row in counted.rows:
        shown = [] if not timed else ["" if row.ms is None else f"{row.ms:.4g}"]
        table.add_row(
            row.operator, row.output, f"{row.params:,}", f"{row.macs:,}",
            f"{row.live_bytes:,}" if row.live_bytes else "", *shown,
        )  # fmt: skip
    costs = counted.costs
    total = [f"{costs[LATENCY]:.4g}"] if timed else []
    table.add_row(
        "total, of bytes the peak", "", f"{costs['params']:,}", f"{costs['macs']:,}",
        f"{costs[PEAK]:,}", *total,
    )  # fmt: skip
    return table


def _kept(counted: Counted) -> list[str]:
    """Flash, limits, memory as published, and what of the latency is fitted."""
    lines = [f"flash: {counted.costs[FLASH]:,} bytes of weights in int8, biases in int32"]
    if counted.surrogate is not None:
        lines.append(
            f"memory by the published code's formula: {counted.surrogate:,} bytes, for comparison"
        )
    table, took = counted.feasible.table, counted.latency
    if table is not None and took is not None and took.fitted:
        lines.append(
            f"not measured, so fitted, {took.fitted_ms:.4g} ms with a mean error of "
            f"{table.fit_error:.1%}: {', '.join(took.fitted)}"
        )
    limits = counted.feasible.limits
    if limits != type(limits)() and not counted.broken:
        lines.append("within the limits")
    return lines


def _corners(feasible: Feasible) -> dict[str, Architecture]:
    """smallest: as published, of first options. Where nothing keeps the limits there is no
    largest within them.
    """
    space = feasible.space
    found = {"smallest": space.minimum(), "largest": space.maximum()}
    within, broken = feasible.largest
    return found if broken else {**found, "largest_within_limits": within}


def _named(feasible: Feasible) -> Table:
    titles = {"smallest": "minimum, as published", "largest": "maximum, as published"}
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
