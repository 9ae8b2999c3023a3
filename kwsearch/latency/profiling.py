"""Filling a latency table: the calls of some networks' steps, and the steps as wholes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from kwlayers.plan import PlanError
from kwsearch.latency.calls import Call
from kwsearch.latency.measure import Timed, Times, measure
from kwsearch.latency.predict import Predictor
from kwsearch.latency.replay import Replay
from kwsearch.latency.subjects import Mode, Subject
from kwsearch.latency.table import Entry, Table, TableError, Whole

# So many are timed side by side; and again, as often, where the machine was slow meanwhile.
_CALLS, _WHOLES, _REPEATS = 24, 4, 2


@dataclass(frozen=True)
class Progress:
    """done of total: calls and whole steps to measure; more where some are measured again."""

    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """A step of a subject, and what it consists of."""

    subject: Subject
    mode: Mode
    calls: Counter[Call]

    @property
    def name(self) -> str:
        """In a table: of the network, its plan and its images."""
        return f"{self.subject.name} at {'x'.join(map(str, self.subject.input_size))}"

    @property
    def key(self) -> str:
        """As `Whole.key`."""
        return f"{self.name} {self.mode.batch} {self.mode.training}"


def steps_of(
    subjects: Iterable[Subject],
    modes: Sequence[Mode],
    note: Callable[[Subject, Mode, str], None],
) -> Iterator[Step]:
    """The steps that can run. note: called with the reason where one cannot."""
    for subject in subjects:
        for mode in modes:
            try:
                yield Step(subject, mode, subject.calls(mode))
            except PlanError as error:
                note(subject, mode, str(error))


class Profile:
    """What a table lacks for some steps, measured block by block.

    save: called after every block, so that what was measured outlives an interruption.
    """

    def __init__(self, table: Table, steps: Sequence[Step], save: Callable[[], None]) -> None:
        self.table, self.save = table, save
        self.steps = {step.key: step for step in steps}
        self.calls = {call.key: call for step in steps for call in step.calls}

    def missing(self) -> tuple[list[str], list[str]]:
        """Keys of calls and of whole steps that are not in the table, or were measured while the
        machine was slow.
        """
        good = {*self.table.entries, *(whole.key for whole in self.table.wholes)}
        good -= self.table.drifted()
        calls = [key for key in self.calls if key not in good]
        return calls, [key for key in self.steps if key not in good]

    def run(self) -> Iterator[Progress]:
        """Measure what is missing; what the machine was slow at, a few times more."""
        self.table.checks = []  # were of the table as it was
        try:
            yield from self._run()
        finally:
            self._add_up()
            self.save()

    def _run(self) -> Iterator[Progress]:
        done = total = 0
        for _ in range(1 + _REPEATS):
            calls, wholes = self.missing()
            total += len(calls) + len(wholes)
            # In no order: so no kind of call is measured at one time only.
            random.Random(len(calls)).shuffle(calls)
            for measure_, keys, size in (
                (self._measure_calls, calls, _CALLS),
                (self._measure_wholes, wholes, _WHOLES),
            ):
                for start in range(0, len(keys), size):
                    measure_(keys[start : start + size])
                    self.save()
                    done = min(done + size, total)
                    yield Progress(done, total)

    def _measure_calls(self, keys: Sequence[str]) -> None:
        calls = [self.calls[key] for key in keys]
        device = str(self.table.circumstances["device"])
        times = self._timed([partial(Replay, call, device) for call in calls])
        entries = self.table.entries
        for call, one in zip(calls, times, strict=True):
            found, before = Entry.of(call, one), entries.get(call.key)
            if before is None or found.anchor_ns <= before.anchor_ns:
                self.table.add([found])

    def _measure_wholes(self, keys: Sequence[str]) -> None:
        steps = [self.steps[key] for key in keys]
        times = self._timed([partial(s.subject.whole, s.mode) for s in steps])
        predictor = Predictor(self.table)
        self.table.add_wholes(
            Whole(
                step.name,
                step.mode.batch,
                step.mode.training,
                predictor.sums_ns(step.calls),
                *one.in_ns(),
            )
            for step, one in zip(steps, times, strict=True)
        )

    def _add_up(self) -> None:
        """The sums of calls of the whole steps, some of which were measured again since."""
        predictor = Predictor(self.table)
        known = {whole.key: whole for whole in self.table.wholes}
        for key in self.steps.keys() & known.keys():
            with suppress(TableError):  # an older table, of other calls
                sums = predictor.sums_ns(self.steps[key].calls)
                self.table.add_wholes([replace(known[key], calls_ns=sums)])

    def _timed(self, making: Sequence[Callable[[], Timed]]) -> list[Times]:
        device, dtype = (str(self.table.circumstances[name]) for name in ("device", "dtype"))
        try:
            return measure(making, device)
        except (RuntimeError, MemoryError) as error:  # a dtype without kernels, no memory
            reason = " ".join(str(error).split())[:200]
            raise TableError(f"a step cannot run on {device} in {dtype}: {reason}") from error
