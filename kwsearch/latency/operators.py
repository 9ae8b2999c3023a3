"""Latency tables of micronas' operators: imported of a microcontroller, or measured here.

They are tables as any other, with an entry for each operator at each pair of widths. Those of a
microcontroller have the device `mcu` and its clock; as counts are deterministic, their quartiles
are equal, and nanoseconds are exact enough to have the cycles back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kwlayers.plan import counted
from kwsearch.latency import circumstances
from kwsearch.latency.measure import measure
from kwsearch.latency.plans import HERE
from kwsearch.latency.profiling import REPEATS
from kwsearch.latency.table import Entry, Table, TableError
from kwsearch.micronas.cycles import CycleTable, kind_of
from kwsearch.micronas.space import Key, Operator
from kwsearch.micronas.supernet import Network, run
from kwsearch.timing import clock_of

MCU = "mcu"
_PREFIX = "operator "
# Of what was measured here a cycle is a nanosecond.
_GHZ = 1000.0
# Timed side by side; and how often each runs at a time.
_BESIDE, _RUNS = 24, 20


def load(path: Path, *, force: bool = False) -> CycleTable:
    """The operators of a table. Raises TableError for a table of networks, or of another machine
    than this one, if it is none of a microcontroller and not forced.
    """
    table = Table.load(path)
    if not any(_operators(table)):
        raise TableError(
            f"{path}: has calls of networks, none of micronas' operators: `kwsearch lut import` "
            "writes a microcontroller's, `kwsearch profile` with a recipe of micronas this one's"
        )
    kept = table.circumstances
    if kept.get("device") != MCU:
        found = table.differences(circumstances.here(kept["device"], kept["dtype"]), HERE)
        if found and not force:
            raise TableError(
                f"{path} is not of this machine: {'; '.join(found)}; measure it here, or take it "
                "as it is (search.space.limits.lut_force: true)"
            )
        table = table.steadied()
    clock = float(kept.get("clock_mhz", _GHZ))
    entries = dict(_operators(table))
    cycles = {key: round(entry.median_ns * clock / 1000) for key, entry in entries.items()}
    return CycleTable(str(kept.get("cpu")), clock, cycles)


def table_of(cycles: CycleTable) -> Table:
    """A microcontroller's table. Raises TableError for one without any entry."""
    if not cycles.entries:
        raise TableError(f"{cycles.device}: no record of an operator that ran")
    kept: dict[str, Any] = {
        "cpu": cycles.device,
        "gpu": None,
        "device": MCU,
        "threads": 1,
        "dtype": "int8",
        "clock_mhz": cycles.clock_mhz,
    }
    table = Table(kept)
    for key, count in cycles.entries.items():
        ns = round(count * 1000 / cycles.clock_mhz)
        table.add([_entry(key, (ns, ns, ns, 1, 1))])
    return table


def missing(table: Table, keys: Sequence[Key]) -> list[Key]:
    """Those that a table does not have, or that were measured while the machine was slow."""
    slow = table.drifted()
    known = {key for key, entry in _operators(table) if entry.key not in slow}
    return sorted(key for key in keys if key not in known)


def profile(table: Table, keys: Sequence[Key]) -> Iterator[tuple[int, int]]:
    """Measure operators on the table's device and add them, a few times more those at which the
    machine was slow; yields how many are done of how many.
    """
    device = table.circumstances["device"]
    left, done, total = list(keys), 0, len(keys)
    for _ in range(1 + REPEATS):
        for start in range(0, len(left), _BESIDE):
            part = left[start : start + _BESIDE]
            found = measure([partial(_Runs, key, device) for key in part], device)
            table.add(_entry(key, times.in_ns()) for key, times in zip(part, found, strict=True))
            done += len(part)
            yield done, total
        left = missing(table, keys)
        total += len(left)


def summary(table: Table) -> list[str]:
    """How good the fits are that stand in for what was not measured; none without operators."""
    entries = {key: entry.median_ns for key, entry in _operators(table)}
    if not entries:
        return []
    lines = []
    for kind, fit in sorted(CycleTable("", _GHZ, entries).fits.items()):
        lines.append(
            f"fit of {kind}: {counted(fit.entries, 'operator')}, mean error {fit.error:.1%} "
            "(cross-validated)"
        )
    return lines or ["too few entries to fit any gap: only what was measured has a latency"]


class _Runs:
    """An operator on random numbers, several times in a row: one alone is too short to time."""

    def __init__(self, key: Key, device: str) -> None:
        self._inputs = [torch.randn(_channels_first(shape), device=device) for shape in key.inputs]
        self._one = Operator("timed", ("input",) * len(key.inputs), key, relu=True)
        self._convs = Network((self._one,)).to(device).convs
        self._clock = clock_of(device)

    @torch.no_grad()
    def seconds(self) -> float:
        """Of one run."""
        self._run()
        begun = self._clock()
        for _ in range(_RUNS):
            self._run()
        return (self._clock() - begun) / _RUNS

    def _run(self) -> Tensor:
        out = run(self._one, self._inputs, self._convs)
        return torch.softmax(out, 1) if self._one.key.kind == "softmax" else out


def _operators(table: Table) -> Iterator[tuple[Key, Entry]]:
    for entry in table.entries.values():
        if entry.kind.startswith(_PREFIX):
            try:
                yield Key.parse(entry.family), entry
            except ValueError as error:
                raise TableError(f"a latency table with an entry that is none: {error}") from None


def _entry(key: Key, times: tuple[int, int, int, int, int]) -> Entry:
    return Entry(f"{_PREFIX}{kind_of(key)}", str(key), 0, (key.macs,), *times)


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W, C) or (C,) with a batch of one."""
    return (1, shape[-1], *shape[:-1])
