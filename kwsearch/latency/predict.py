"""The time of a step from a table: its calls, added up, and what a whole step takes beyond them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kwsearch.latency.calls import Call
from kwsearch.latency.fitted import Fitted, far_above
from kwsearch.latency.table import Entry, Table, TableError, Whole

# Of the interval: 90 % of a normal distribution are within so many standard errors.
_ERRORS = 1.645
# Standard errors, in e-folds: elementwise calls of a kind that was not measured; between two sizes
# of a warehouse; beyond them, per e-fold. And how far whole steps vary if few were measured.
_GUESS, _BETWEEN, _BEYOND = 0.7, 0.03, 0.1
_FEW, _FEW_SPREAD = 3, 0.2


_MORE = ", --methods the layers of other methods"

# Where an estimate is from; and calls that whole steps take as much more or less of.
PARTS = ("measured", "lines", "fitted", "guessed")
# Other dynamic layers count as mixing.
GROUPS = ("products", "other functions and modules", "attention", "mixing")


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
    """Times of calls and steps by a table, of the machine as fast as its anchor usually was there.

    Raises TableError where it has nothing to say.
    """

    def __init__(self, table: Table) -> None:
        self.table = table.steadied()
        self._known: dict[str, tuple[float, float, str]] = {}
        self._fitted: dict[str, Fitted] = {}
        self._wholes: dict[tuple[int, bool], _Whole] = {}

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
        whole = self._whole(batch, training)
        total = within = 0.0
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        errors: dict[str, float] = defaultdict(float)
        for call, count in calls.items():
            ns, error, source = self.call(call)
            ns *= count * whole.factors[_group(call)]
            total += ns
            parts[source] += ns
            if source == "measured":  # noise, independent of that of other calls
                within += (ns * error) ** 2
            else:  # what is wrong with a fit is wrong with all that it says
                errors[call.kind] += ns * error
        error = math.sqrt(within + sum(e**2 for e in errors.values())) / max(total, 1e-9)
        width = math.exp(math.hypot(_ERRORS * error, whole.spread))
        ms = 1e-6 * total
        shares = {name: parts[name] / max(total, 1e-9) for name in PARTS}
        return Latency(ms, ms / width, ms * width, **shares)

    def sums_ns(self, calls: Mapping[Call, int]) -> tuple[int, ...]:
        """Nanoseconds of all calls, added up by `GROUPS`."""
        sums = [0.0] * len(GROUPS)
        for call, count in calls.items():
            sums[_group(call)] += count * self.call(call)[0]
        return tuple(map(round, sums))

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
            f"adds what is missing{_MORE if call.kind.startswith('layer ') else ''}"
        )

    def outliers(self) -> set[str]:
        """Keys of calls and whole steps that took far longer than the others tell."""
        found = set()
        for kind, entries in self._kinds.items():
            found |= {entries[i].key for i in self._fit(kind).outliers()}
        modes: dict[tuple[int, bool], list[Whole]] = defaultdict(list)
        for whole in self.table.wholes:
            modes[whole.batch, whole.training].append(whole)
        for wholes in modes.values():
            if len(wholes) >= _FEW:
                told = [*_left_out(wholes)]
                excesses = [math.log(whole.measured_ns / ns) for whole, ns in told]
                found |= {told[i][0].key for i in far_above(excesses)}
        return found

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

    def _whole(self, batch: int, training: bool) -> _Whole:
        """Of the steps of as many images, if there are any, else of all."""
        mode = batch, training
        if mode not in self._wholes:
            wholes = [w for w in self.table.wholes if w.training == training]
            same = [w for w in wholes if w.batch == batch] or wholes
            if not same:
                what, option = ("training", " --train") if training else ("inference", "")
                raise TableError(
                    f"the latency table has no {what}: `kwsearch profile{option} -o` with the same "
                    "file adds it"
                )
            self._wholes[mode] = _Whole.of(same)
        return self._wholes[mode]


def _group(call: Call) -> int:
    """The place in `GROUPS`."""
    kind = call.kind.split()[0]
    if kind in ("attention", "mixing", "buffer", "layer"):
        return 2 if kind == "attention" else 3
    return 0 if len(call.work) == 4 and call.work[0] else 1


@dataclass(frozen=True)
class _Whole:
    """What whole steps take beyond their calls. factors: of the sums by `GROUPS`. spread: half of
    the interval of 90 %, in e-folds.
    """

    factors: tuple[float, ...]
    spread: float

    @classmethod
    def of(cls, wholes: Sequence[Whole]) -> _Whole:
        """The factors that tell the measured steps best. The spread by leaving out each network
        with all of its plans; each step, where there are few networks.
        """
        from scipy.stats import t

        found = _factors(wholes)
        if len(wholes) < _FEW:
            return cls(found, _FEW_SPREAD)
        logs = [math.log(ns / one.measured_ns) for one, ns in _left_out(wholes)]
        error = math.sqrt(sum(log**2 for log in logs) / len(logs))
        return cls(found, error * float(t.ppf(0.95, len(set(_together(wholes))) - 1)))


def _together(wholes: Sequence[Whole]) -> list[str]:
    """The network of each, which is left out as one; each step, where there are few networks."""
    found = [one.network for one in wholes]
    return found if len(set(found)) >= _FEW else [one.key for one in wholes]


def _left_out(wholes: Sequence[Whole]) -> Iterator[tuple[Whole, float]]:
    """Each, and the nanoseconds that the steps of other networks tell."""
    pairs = [*zip(wholes, _together(wholes), strict=True)]
    for left_out in dict.fromkeys(name for _, name in pairs):
        others = _factors([one for one, name in pairs if name != left_out])
        for one, name in pairs:
            if name == left_out:
                yield one, max(_told(one, others), 1.0)


def _told(whole: Whole, factors: Sequence[float]) -> float:
    return sum(f * ns for f, ns in zip(factors, whole.calls_ns, strict=True))


def _factors(wholes: Sequence[Whole]) -> tuple[float, ...]:
    """By least squares of relative errors, each near the one that all groups would have in common:
    that counts as much as one step.
    """
    from scipy.optimize import nnls

    common = statistics.median(one.measured_ns / sum(one.calls_ns) for one in wholes)
    rows = [[ns / one.measured_ns for ns in one.calls_ns] for one in wholes]
    rows += [[float(i == j) / common for j in range(len(GROUPS))] for i in range(len(GROUPS))]
    found, _ = nnls(rows, [1.0] * len(rows))
    return tuple(map(float, found))


def _between(known: Mapping[int, int], cells: int) -> tuple[float, float]:
    """Nanoseconds at a number of cells by the two nearest that are known, and the error."""
    places = sorted(known)
    after = next((i for i, place in enumerate(places) if place > cells), len(places) - 1)
    low, high = places[max(after, 1) - 1], places[max(after, 1)]
    slope = (known[high] - known[low]) / (high - low)
    least = 0.5 * min(known.values())
    outside = max(math.log(places[0] / cells), math.log(cells / places[-1]), 0.0)
    return max(known[low] + slope * (cells - low), least), _BETWEEN + _BEYOND * outside
