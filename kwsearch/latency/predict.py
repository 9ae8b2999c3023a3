"""The time of a step from a table: its calls, added up, and what a whole step takes beyond them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kwsearch.latency.calls import Call
from kwsearch.latency.fitted import Fitted
from kwsearch.latency.table import Entry, Table, TableError

# Of the interval: 90 % of a normal distribution are within so many standard errors.
_ERRORS = 1.645
# Standard errors, in e-folds: elementwise calls of a kind that was not measured; between two sizes
# of a warehouse; beyond them, per e-fold. And how far whole steps vary if few were measured.
_GUESS, _BETWEEN, _BEYOND = 0.7, 0.03, 0.1
_FEW, _FEW_SPREAD = 3, 0.2


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a step: the estimate, an interval of 90 %, and where the estimate is from.

    measured: the part of it from calls that were measured as they are; lines: from others of their
    family, by the number of cells; fitted: from others of their kind; guessed: from other kinds.
    """

    ms: float
    low: float
    high: float
    measured: float
    lines: float
    fitted: float
    guessed: float


class Predictor:
    """Times of calls and steps by a table. Raises TableError where it has nothing to say."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._known: dict[str, tuple[float, float, str]] = {}
        self._fitted: dict[str, Fitted] = {}

    @cached_property
    def _families(self) -> dict[str, list[Entry]]:
        found = defaultdict(list)
        for entry in self.table.entries.values():
            if entry.cells:
                found[entry.family].append(entry)
        return found

    @cached_property
    def _kinds(self) -> dict[str, list[Entry]]:
        found = defaultdict(list)
        for entry in self.table.entries.values():
            found[entry.kind].append(entry)
        return found

    def step(self, calls: Mapping[Call, int], batch: int, training: bool) -> Latency:
        """Of a step of `batch` images that consists of `calls`."""
        total = within = 0.0
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        errors: dict[str, float] = defaultdict(float)
        for call, count in calls.items():
            ns, error, source = self.call(call)
            total += count * ns
            parts[source] += count * ns
            if source == "measured":  # noise, independent of that of other calls
                within += (count * ns * error) ** 2
            else:  # what is wrong with a fit is wrong with all that it says
                errors[call.kind] += count * ns * error
        scale, spread = self._whole(batch, training)
        error = _ERRORS * math.sqrt(within + sum(e**2 for e in errors.values())) / max(total, 1e-9)
        width = math.exp(math.hypot(error, spread))
        ms = 1e-6 * total * scale
        shares = {name: parts[name] / max(total, 1e-9) for name in PARTS}
        return Latency(ms, ms / width, ms * width, **shares)

    def sum_ns(self, calls: Mapping[Call, int]) -> float:
        """Nanoseconds of all calls, added up."""
        return sum(count * self.call(call)[0] for call, count in calls.items())

    def call(self, call: Call) -> tuple[float, float, str]:
        """Nanoseconds of one call, their standard error as a part of them, and their source."""
        if call.key not in self._known:
            self._known[call.key] = self._estimate(call)
        return self._known[call.key]

    def _estimate(self, call: Call) -> tuple[float, float, str]:
        if (entry := self.table.entries.get(call.key)) is not None:
            spread = (entry.third_ns - entry.first_ns) / 1.349 / max(entry.median_ns, 1)
            return float(entry.median_ns), spread / math.sqrt(entry.rounds), "measured"
        family = self._families.get(call.family, ())
        if call.cells and len({entry.cells for entry in family}) > 1:
            return *_between({e.cells: e.median_ns for e in family}, call.cells), "lines"
        if call.kind in self._kinds:
            return *self._fit(call.kind).ns(call.work), "fitted"
        mode = call.kind.rsplit(" ", 1)[-1]
        others = f"* {mode}"
        if len(call.work) == 4 and not call.work[0] and self._pool(mode):
            return self._fit(others).ns(call.work)[0], _GUESS, "guessed"
        raise TableError(
            f"the latency table has no {call.kind}: `kwsearch profile MODEL -o` with the same file "
            "adds what is missing"
        )

    def _pool(self, mode: str) -> list[Entry]:
        """Elementwise calls of any kind."""
        return [
            entry
            for entry in self.table.entries.values()
            if len(entry.work) == 4 and not entry.work[0] and entry.kind.endswith(mode)
        ]

    def _fit(self, kind: str) -> Fitted:
        if kind not in self._fitted:
            entries = self._pool(kind[2:]) if kind.startswith("* ") else self._kinds[kind]
            self._fitted[kind] = Fitted(
                [entry.work for entry in entries], [entry.median_ns for entry in entries]
            )
        return self._fitted[kind]

    def _whole(self, batch: int, training: bool) -> tuple[float, float]:
        """What whole steps took over the sum of their calls, and how far that varies: e-folds."""
        wholes = [w for w in self.table.wholes if w.training == training]
        same = [w for w in wholes if w.batch == batch] or wholes
        if not same:
            what, option = ("training", " --train") if training else ("inference", "")
            raise TableError(
                f"the latency table has no {what}: `kwsearch profile{option} -o` with the same "
                "file adds it"
            )
        logs = [math.log(whole.measured_ns / whole.calls_ns) for whole in same]
        middle = statistics.median(logs)
        return math.exp(middle), max(
            _FEW_SPREAD if len(logs) < _FEW else 0.0, *(abs(one - middle) for one in logs)
        )


def _between(known: Mapping[int, int], cells: int) -> tuple[float, float]:
    """Nanoseconds at a number of cells by the two nearest that are known, and the error."""
    places = sorted(known)
    after = next((i for i, place in enumerate(places) if place > cells), len(places) - 1)
    low, high = places[max(after, 1) - 1], places[max(after, 1)]
    slope = (known[high] - known[low]) / (high - low)
    least = 0.5 * min(known.values())
    outside = max(math.log(places[0] / cells), math.log(cells / places[-1]), 0.0)
    return max(known[low] + slope * (cells - low), least), _BETWEEN + _BEYOND * outside


PARTS = ("measured", "lines", "fitted", "guessed")
