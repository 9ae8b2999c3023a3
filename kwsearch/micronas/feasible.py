"""The most probable architecture that keeps limits on latency and memory, or why there is none.

An architecture's score is the sum of the logarithms of its options' probabilities: without limits
the best takes every decision's most probable option (of fusion cells among those that have an
output). As cells depend on each other by the width between them only, the best is found exactly.
Choices whose peak is above the limit on memory are left out. Cell by cell, each width keeps the
ways to it that are not both slower and less probable than another, some dozens; among those that
are left at the end is the best under any limit on latency, and the quickest of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kwsearch.micronas.choices import Choices
from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.mixture import Mixture, as_double
from kwsearch.micronas.peak_memory import peak_bytes, peaks
from kwsearch.micronas.space import Architecture, Space, head, operators


@dataclass(frozen=True)
class Limits:
    """What an architecture may take: None is no limit. Raises ValueError."""

    milliseconds: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"limit of {name} {value}: must be a positive number, or None")


class Found(NamedTuple):
    """broken: why the architecture does not keep the limits, in a sentence; empty if it does.

    It is then that of the least memory, or the quickest under the limit on memory.
    """

    architecture: Architecture
    broken: tuple[str, ...]


class _Cell(NamedTuple):
    """Scores (L,), that of leaving it out or None, cycles and peaks (I, L)."""

    choices: Choices
    scores: Tensor
    skip: float | None
    cycles: Tensor
    peaks: Tensor


class _Ways(NamedTuple):
    """To one width: (n,) scores and cycles, ascending; (n, 3) what each came from.

    That is the width before, the number of the way to it, and of the choice, -1 to leave out.
    """

    scores: Tensor
    cycles: Tensor
    back: Tensor


class Feasible:
    """Architectures of a space within limits. table: needed for a limit of milliseconds.

    in_place_add, conv_scratch: as in `peak_memory`.
    """

    def __init__(
        self,
        space: Space,
        limits: Limits,
        table: CycleTable | None = None,
        *,
        in_place_add: bool = False,
        conv_scratch: bool = False,
    ) -> None:
        if limits.milliseconds is not None and table is None:
            raise ValueError(
                f"a limit of {limits.milliseconds:g} ms without a table of cycles: nothing tells "
                "how long an operator takes; give a table, or no limit of milliseconds"
            )
        self.space, self.limits, self.table = space, limits, table
        self.how = {"in_place_add": in_place_add, "conv_scratch": conv_scratch}
        self._choices = [Choices(place) for place in space.cells]
        self._peaks = [peaks(one, **self.how) for one in self._choices]
        ends = [head(space, width, "input") for width in space.cells[-1].channels]
        self._end_peaks = [peak_bytes(end, **self.how) for end in ends]
        self._cycles = [torch.zeros(one.shape, dtype=torch.float64) for one in self._peaks]
        self._end_cycles = [0.0] * len(ends)
        if limits.milliseconds is not None and table is not None:
            self._cycles = [
                one.costs(lambda key: table.cycles(key).number) for one in self._choices
            ]
            self._end_cycles = [table.latency(end).cycles for end in ends]

    def milliseconds(self, architecture: Architecture) -> float | None:
        """None without a table."""
        if self.table is None:
            return None
        return self.table.latency(operators(self.space, architecture)).milliseconds

    def bytes(self, architecture: Architecture) -> int:
        """The peak."""
        return peak_bytes(operators(self.space, architecture), **self.how)

    def broken(self, architecture: Architecture) -> tuple[str, ...]:
        """Which limits it does not keep, by how much."""
        found, limits = [], self.limits
        took = self.milliseconds(architecture)
        if limits.milliseconds is not None and took is not None and took > limits.milliseconds:
            found.append(f"latency {took:.3f} ms: above the limit of {limits.milliseconds:g} ms")
        if limits.bytes is not None and (held := self.bytes(architecture)) > limits.bytes:
            found.append(f"memory {held:,} bytes: above the limit of {limits.bytes:,} bytes")
        return tuple(found)

    def preferred(self, mixture: Mixture) -> Architecture:
        """The most probable, limits or not."""
        architecture, _ = self._ends(self._cells(mixture, timed=False), math.inf)[-1]
        return architecture

    def best(self, mixture: Mixture) -> Found:
        """The most probable within the limits."""
        limit = math.inf if self.limits.bytes is None else self.limits.bytes
        ends = self._ends(self._cells(mixture), limit)
        if not ends:
            return self._too_large(self._cells(mixture, timed=False))
        if self.table is None or self.limits.milliseconds is None:
            return Found(ends[-1][0], ())
        quick = [
            architecture
            for architecture, cycles in ends
            if self.table.milliseconds(cycles) <= self.limits.milliseconds
        ]
        return Found(quick[-1], ()) if quick else self._too_slow(ends[0][0])

    def _too_slow(self, quickest: Architecture) -> Found:
        text = f"latency limit {self.limits.milliseconds:g} ms: below "
        text += f"{self.milliseconds(quickest):.3f} ms, the least that any architecture takes"
        if self.limits.bytes is not None:
            text += f" with at most {self.limits.bytes:,} bytes"
        return Found(quickest, (f"{text}; allow more, or a space with fewer channels",))

    def _too_large(self, cells: Sequence[_Cell]) -> Found:
        least = self._least_bytes()
        text = (
            f"memory limit {self.limits.bytes:,} bytes: below {least:,} bytes, the least that any "
            "architecture needs; allow more, or a space with fewer channels"
        )
        return Found(self._ends(cells, least)[-1][0], (text,))

    def _least_bytes(self) -> int:
        """The least peak of all architectures: by width, through one cell after another."""
        least = torch.zeros(1, dtype=torch.int64)
        for choices, held in zip(self._choices, self._peaks, strict=True):
            through = torch.maximum(least[:, None], held).amin(0)
            widths = range(len(choices.place.channels))
            after = torch.stack([through[choices.out == width].min() for width in widths])
            least = torch.minimum(after, least) if choices.skippable else after
        return int(torch.maximum(least, torch.tensor(self._end_peaks)).min())

    def _cells(self, mixture: Mixture, *, timed: bool = True) -> list[_Cell]:
        """timed: with their cycles, else all with none."""
        scores = {
            name: one.clamp(min=1e-300).log()
            for name, one in as_double(self.space, mixture).items()
        }
        found = []
        for choices, cycles, held in zip(self._choices, self._cycles, self._peaks, strict=True):
            own, skip = choices.sums(scores), None
            if choices.skippable:
                left_out, kept = scores[f"{choices.place.name}.keep"].tolist()
                skip = float(own.max()) + left_out
                own = own + kept
            found.append(_Cell(choices, own, skip, cycles if timed else 0 * cycles, held))
        return found

    def _ends(self, cells: Sequence[_Cell], limit: float) -> list[tuple[Architecture, float]]:
        """Architectures with their cycles, both these and scores ascending; none above `limit`."""
        start = _Ways(torch.zeros(1).double(), torch.zeros(1).double(), torch.zeros(1, 3).long())
        ways = [[start]]
        for cell in cells:
            widths = range(len(cell.choices.place.channels))
            ways.append([_onward(cell, ways[-1], width, limit) for width in widths])
        rows = []
        for width, end in enumerate(ways[-1]):
            if self._end_peaks[width] <= limit:
                cycles = end.cycles + self._end_cycles[width]
                back = _back(len(end.scores), width, torch.arange(len(end.scores)), 0)
                rows.append(_Ways(end.scores, cycles, back))
        if not rows:
            return []
        last = _best(rows)
        found = zip(last.back.tolist(), last.cycles.tolist(), strict=True)
        return [
            (self._walked(cells, ways, width, way), cycles) for (width, way, _), cycles in found
        ]

    def _walked(
        self, cells: Sequence[_Cell], ways: Sequence[Sequence[_Ways]], width: int, way: int
    ) -> Architecture:
        chosen: dict[str, int] = {}
        for cell, reached in zip(reversed(cells), reversed(ways), strict=False):
            width, way, number = reached[width].back[way].tolist()
            if number >= 0:
                chosen |= cell.choices.chosen(number)
            else:  # what is left out chooses what is most probable
                chosen |= cell.choices.chosen(int(cell.scores.argmax()))
                chosen[f"{cell.choices.place.name}.keep"] = 0
        return self.space.architecture(chosen)


def _onward(cell: _Cell, before: Sequence[_Ways], width: int, limit: float) -> _Ways:
    """The ways through a cell to a width."""
    numbers = (cell.choices.out == width).nonzero()[:, 0]
    rows = []
    for i, ways in enumerate(before):
        mine = numbers[cell.peaks[i, numbers] <= limit]
        own = _best([_Ways(cell.scores[mine], cell.cycles[i, mine], _back(len(mine), i, 0, mine))])
        n, m = len(ways.scores), len(own.scores)
        scores = (ways.scores[:, None] + own.scores).flatten()
        cycles = (ways.cycles[:, None] + own.cycles).flatten()
        way = torch.arange(n).repeat_interleave(m)
        rows.append(_Ways(scores, cycles, _back(n * m, i, way, own.back[:, 2].repeat(n))))
        if cell.skip is not None and i == width:
            back = _back(n, i, torch.arange(n), -1)
            rows.append(_Ways(ways.scores + cell.skip, ways.cycles, back))
    return _best(rows)


def _best(rows: Sequence[_Ways]) -> _Ways:
    """Those that no other is at least as quick and as probable as, by cycles."""
    scores, cycles, back = (torch.cat(column) for column in zip(*rows, strict=True))
    order = torch.argsort(-scores, stable=True)
    order = order[torch.argsort(cycles[order], stable=True)]
    before = torch.cummax(scores[order], 0).values[:-1]
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = scores[order][1:] > before
    kept = order[better]
    return _Ways(scores[kept], cycles[kept], back[kept])


def _back(n: int, *columns: int | Tensor) -> Tensor:
    """(n, 3) of what is given for each column."""
    return torch.stack([torch.as_tensor(one).expand(n) for one in columns], 1)
