"""The most probable architecture that keeps limits on latency, memory and flash, or why there is
none.

An architecture's score is the sum of the logarithms of its options' probabilities: without limits
the best takes every decision's most probable option (of fusion cells among those that have an
output). As cells depend on each other by the width between them only, the best is found exactly.
Choices whose peak is above the limit on memory are left out. Cell by cell, each width keeps the
ways to it that are not both slower and less probable than another, some dozens; among those that
are left at the end is the best under any limit on latency, and the quickest of all.

The same holds for a limit on flash alone. Under both, ways are told apart by bands of flash, too:
in a band the best of each latency stays, so that what is found keeps all limits, but another one
might be a little more probable. Whether any keeps them is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kwsearch.micronas.choices import Choices
from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.mixture import Mixture, as_double
from kwsearch.micronas.peak_memory import peak_bytes, peaks
from kwsearch.micronas.space import Architecture, Space, head, operators

# Under limits on latency and flash: bands of flash up to its limit.
_BANDS = 8


@dataclass(frozen=True)
class Limits:
    """What an architecture may take: None is no limit. Raises ValueError.

    bytes: of activations at their peak. flash: bytes of weights and biases.
    """

    milliseconds: float | None = None
    bytes: int | None = None
    flash: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"limit of {name} {value}: must be a positive number, or None")

    def broken(self, milliseconds: float | None, nbytes: int, flash: int) -> tuple[str, ...]:
        """Which limits what takes that much does not keep, by how much. milliseconds: None where
        nobody knows.
        """
        found, most = [], self.milliseconds
        if most is not None and milliseconds is not None and milliseconds > most:
            found.append(f"latency {milliseconds:.3f} ms: above the limit of {most:g} ms")
        for name, has, limit in (("memory", nbytes, self.bytes), ("flash", flash, self.flash)):
            if limit is not None and has > limit:
                found.append(f"{name} {has:,} bytes: above the limit of {limit:,} bytes")
        return tuple(found)


class Found(NamedTuple):
    """broken: why the architecture does not keep the limits, in a sentence; empty if it does.

    It is then that of the least memory, the quickest under the limit on memory, or that of the
    least flash under both.
    """

    architecture: Architecture
    broken: tuple[str, ...]


class _Worth(NamedTuple):
    """What is to be as much as can be, of one cell: of its choices (I, L), of leaving it out.
    favourite: the choice that stands for those of a cell that is left out.
    """

    choices: Tensor
    skip: float
    favourite: int


class _Resource(NamedTuple):
    """What architectures use of a limit: each cell's choices (I, L), and the head by its width.

    kept: which of some uses are within the limit.
    """

    cells: Sequence[Tensor]
    ends: Sequence[float]
    kept: Callable[[Tensor], Tensor]


class _Ways(NamedTuple):
    """To one width: (n,) scores, and what they use of two resources; (n, 3) what each came from.

    That is the width before, the number of the way to it, and of the choice, -1 to leave out.
    Without bands of the second resource, scores and uses of the first are ascending.
    """

    scores: Tensor
    first: Tensor
    second: Tensor
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
        unused = [torch.zeros(one.shape, dtype=torch.float64) for one in self._peaks]
        self._nothing = _Resource(unused, [0.0] * len(ends), torch.isfinite)
        self._cycles = self._flash = None
        if (most := limits.milliseconds) is not None and table is not None:
            self._cycles = _Resource(
                [one.costs(lambda key: table.cycles(key).number) for one in self._choices],
                [table.latency(end).cycles for end in ends],
                lambda cycles: cycles / (1000 * table.clock_mhz) <= most,
            )
        if (largest := limits.flash) is not None:
            self._flash = _Resource(
                [one.costs(lambda key: float(key.flash)) for one in self._choices],
                [float(sum(one.key.flash for one in end)) for end in ends],
                lambda flash: flash <= largest,
            )

    def milliseconds(self, architecture: Architecture) -> float | None:
        """None without a table."""
        if self.table is None:
            return None
        return self.table.latency(operators(self.space, architecture)).milliseconds

    def bytes(self, architecture: Architecture) -> int:
        """The peak."""
        return peak_bytes(operators(self.space, architecture), **self.how)

    def flash(self, architecture: Architecture) -> int:
        """Bytes of the weights and biases."""
        return sum(one.key.flash for one in operators(self.space, architecture))

    def broken(self, architecture: Architecture) -> tuple[str, ...]:
        """Which limits it does not keep, by how much."""
        took = self.milliseconds(architecture)
        return self.limits.broken(took, self.bytes(architecture), self.flash(architecture))

    def preferred(self, mixture: Mixture) -> Architecture:
        """The most probable, limits or not."""
        return self._walk(self._chances(mixture), self._nothing, math.inf).at(-1)

    def best(self, mixture: Mixture) -> Found:
        """The most probable within the limits."""
        return self._most(self._chances(mixture))

    @cached_property
    def largest(self) -> Found:
        """The one of most MACs within the limits, but for those of its head."""
        return self._most(
            [
                _Worth(one.costs(lambda key: float(key.macs)), 0.0, len(one) - 1)
                for one in self._choices
            ]
        )

    def _most(self, worth: Sequence[_Worth]) -> Found:
        limit = math.inf if self.limits.bytes is None else self.limits.bytes
        asked = [one for one in (self._cycles, self._flash) if one is not None]
        first = asked[0] if asked else self._nothing
        walk = self._walk(worth, first, limit)
        if not len(walk.ends.scores):
            return self._too_large(worth)
        kept = first.kept(walk.ends.first).nonzero()[:, 0]
        if not len(kept):
            too_much = self._too_slow if first is self._cycles else self._too_heavy
            return too_much(walk.at(0))
        found = walk.at(int(kept[-1]))
        if len(asked) < 2 or not self.broken(found):
            return Found(found, ())
        return self._under_both(worth, limit)

    def _under_both(self, worth: Sequence[_Worth], limit: float) -> Found:
        """Latency and flash, where the best under the first is none under the second."""
        assert self._cycles is not None
        assert self._flash is not None
        flash = [
            _Worth(-used, 0.0, one.favourite)
            for used, one in zip(self._flash.cells, worth, strict=True)
        ]
        walk = self._walk(flash, self._cycles, limit, ends=self._flash.ends)
        lightest = walk.at(int(self._cycles.kept(walk.ends.first).nonzero()[-1, 0]))
        if self.broken(lightest):
            return self._too_heavy(lightest)
        walk = self._walk(worth, self._cycles, limit, self._flash)
        kept = (self._cycles.kept(walk.ends.first) & self._flash.kept(walk.ends.second)).nonzero()
        if not len(kept):
            return Found(lightest, ())
        return Found(walk.at(int(kept[walk.ends.scores[kept[:, 0]].argmax(), 0])), ())

    def _too_heavy(self, lightest: Architecture) -> Found:
        text = f"flash limit {self.limits.flash:,} bytes: below {self.flash(lightest):,} bytes, "
        text += "the least that any architecture takes"
        others = []
        if self.limits.milliseconds is not None:
            others.append(f"at most {self.limits.milliseconds:g} ms")
        if self.limits.bytes is not None:
            others.append(f"at most {self.limits.bytes:,} bytes of memory")
        text += f" with {' and '.join(others)}" if others else ""
        return Found(lightest, (f"{text}; allow more, or a space with fewer channels",))

    def _too_slow(self, quickest: Architecture) -> Found:
        text = f"latency limit {self.limits.milliseconds:g} ms: below "
        text += f"{self.milliseconds(quickest):.3f} ms, the least that any architecture takes"
        if self.limits.bytes is not None:
            text += f" with at most {self.limits.bytes:,} bytes"
        return Found(quickest, (f"{text}; allow more, or a space with fewer channels",))

    def _too_large(self, worth: Sequence[_Worth]) -> Found:
        least = self._least_bytes()
        text = (
            f"memory limit {self.limits.bytes:,} bytes: below {least:,} bytes, the least that any "
            "architecture needs; allow more, or a space with fewer channels"
        )
        return Found(self._walk(worth, self._nothing, least).at(-1), (text,))

    def _least_bytes(self) -> int:
        """The least peak of all architectures: by width, through one cell after another."""
        least = torch.zeros(1, dtype=torch.int64)
        for choices, held in zip(self._choices, self._peaks, strict=True):
            through = torch.maximum(least[:, None], held).amin(0)
            widths = range(len(choices.place.channels))
            after = torch.stack([through[choices.out == width].min() for width in widths])
            least = torch.minimum(after, least) if choices.skippable else after
        return int(torch.maximum(least, torch.tensor(self._end_peaks)).min())

    def _chances(self, mixture: Mixture) -> list[_Worth]:
        """Logarithms of probabilities."""
        scores = {
            name: one.clamp(min=1e-300).log()
            for name, one in as_double(self.space, mixture).items()
        }
        found = []
        for choices in self._choices:
            own = choices.sums(scores)
            favourite, skip, best = int(own.argmax()), 0.0, float(own.max())
            if choices.skippable:
                left_out, kept = scores[f"{choices.place.name}.keep"].tolist()
                skip, own = best + left_out, own + kept
            found.append(_Worth(own.expand(len(choices.place.in_channels), -1), skip, favourite))
        return found

    def _walk(
        self,
        worth: Sequence[_Worth],
        first: _Resource,
        limit: float,
        second: _Resource | None = None,
        ends: Sequence[float] | None = None,
    ) -> _Walk:
        """Through all cells. limit: of a cell's peak. ends: what the head's widths take off the
        score.
        """
        band = None if second is None else (self.limits.flash or 0) / _BANDS
        more = second or self._nothing
        nothing = torch.zeros(1, dtype=torch.float64)
        ways = [[_Ways(nothing, nothing, nothing, torch.zeros(1, 3).long())]]
        for i, choices in enumerate(self._choices):
            cell = _Cell(choices, worth[i], first.cells[i], more.cells[i], self._peaks[i])
            widths = range(len(choices.place.channels))
            ways.append([_onward(cell, ways[-1], width, limit, more, band) for width in widths])
        rows = []
        for width, end in enumerate(ways[-1]):
            if self._end_peaks[width] <= limit:
                n = len(end.scores)
                scores = end.scores if ends is None else end.scores - ends[width]
                used = end.first + first.ends[width], end.second + more.ends[width]
                rows.append(_Ways(scores, *used, _back(n, width, torch.arange(n), 0)))
        empty = _Ways(nothing[:0], nothing[:0], nothing[:0], torch.zeros(0, 3).long())
        last = _best(rows, band) if rows else empty
        return _Walk(self.space, self._choices, worth, ways, last)


class _Cell(NamedTuple):
    """uses (I, L) of two resources, peaks (I, L)."""

    choices: Choices
    worth: _Worth
    first: Tensor
    second: Tensor
    peaks: Tensor


class _Walk(NamedTuple):
    """The ways to every width after every cell, and to the end."""

    space: Space
    choices: Sequence[Choices]
    worth: Sequence[_Worth]
    ways: Sequence[Sequence[_Ways]]
    ends: _Ways

    def at(self, end: int) -> Architecture:
        """That of one of the ends."""
        width, way, _ = self.ends.back[end].tolist()
        chosen: dict[str, int] = {}
        cells = zip(self.choices, self.worth, strict=True)
        for (cell, worth), reached in zip(reversed([*cells]), reversed(self.ways), strict=False):
            width, way, number = reached[width].back[way].tolist()
            if number >= 0:
                chosen |= cell.chosen(number)
            else:  # what is left out chooses what is most probable
                chosen |= cell.chosen(worth.favourite)
                chosen[f"{cell.place.name}.keep"] = 0
        return self.space.architecture(chosen)


def _onward(
    cell: _Cell,
    before: Sequence[_Ways],
    width: int,
    limit: float,
    second: _Resource,
    band: float | None,
) -> _Ways:
    """The ways through a cell to a width."""
    numbers = (cell.choices.out == width).nonzero()[:, 0]
    rows = []
    for i, ways in enumerate(before):
        mine = numbers[cell.peaks[i, numbers] <= limit]
        used = cell.first[i, mine], cell.second[i, mine]
        back = _back(len(mine), i, 0, mine)
        own = _best([_Ways(cell.worth.choices[i, mine], *used, back)], band)
        n, m = len(ways.scores), len(own.scores)
        scores, first, more = (
            (a[:, None] + b).flatten() for a, b in zip(ways[:3], own[:3], strict=True)
        )
        way = torch.arange(n).repeat_interleave(m)
        rows.append(_Ways(scores, first, more, _back(n * m, i, way, own.back[:, 2].repeat(n))))
        if cell.choices.skippable and i == width:
            back = _back(n, i, torch.arange(n), -1)
            rows.append(_Ways(ways.scores + cell.worth.skip, ways.first, ways.second, back))
    if band is not None:
        rows = [_Ways(*(column[second.kept(row.second)] for column in row)) for row in rows]
    return _best(rows, band)


def _best(rows: Sequence[_Ways], band: float | None) -> _Ways:
    """Those that no other is at least as good and as sparing of the first resource as, by that; in
    each band of the second.
    """
    scores, first, second, back = (torch.cat(column) for column in zip(*rows, strict=True))
    order = torch.argsort(-scores, stable=True)
    order = order[torch.argsort(first[order], stable=True)]
    bands = torch.zeros(len(order)) if band is None else (second[order] // band)
    kept = []
    for one in torch.unique(bands):
        mine = order[bands == one]
        better = torch.ones(len(mine), dtype=torch.bool)
        better[1:] = scores[mine][1:] > torch.cummax(scores[mine], 0).values[:-1]
        kept.append(mine[better])
    some = torch.cat(kept) if kept else order
    return _Ways(scores[some], first[some], second[some], back[some])


def _back(n: int, *columns: int | Tensor) -> Tensor:
    """(n, 3) of what is given for each column."""
    return torch.stack([torch.as_tensor(one).expand(n) for one in columns], 1)
