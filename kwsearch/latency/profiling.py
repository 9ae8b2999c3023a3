"""Filling a latency table: the calls of some networks' steps, and the steps as wholes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from kwsearch.wording import one_line

# So many are timed side by side; and again, as often, where the machine was slow meanwhile.
_CALLS, _WHOLES, REPEATS = 24, 4, 2


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
    failed: why some calls and steps could not run, by key.
    """

    def __init__(self, table: Table, steps: Sequence[Step], save: Callable[[], None]) -> None:
        self.table, self.save = table, save
        self.steps = {step.key: step for step in steps if not step.subject.only_mixing}
        self.calls = {call.key: call for step in steps for call in step.calls}
        self.failed: dict[str, str] = {}

    def missing(self) -> tuple[list[str], list[str]]:
        """Keys of calls and of whole steps that are not in the table, or were measured while the
        machine was slow.
        """
        good = {*self.table.entries, *(whole.key for whole in self.table.wholes)}
        good -= self.table.drifted()
        good |= self.failed.keys()
        calls = [key for key in self.calls if key not in good]
        return calls, [key for key in self.steps if key not in good]

    def run(self) -> Iterator[Progress]:
        """Measure what is missing; what the machine was slow at, a few times more; and once more
        what took far longer than the rest tells.

        What cannot run is left out. Raises TableError if that is all there was to measure.
        """
        self.table.checks = []  # were of the table as it was
        try:
            yield from self._run()
        finally:
            self._add_up()
            if self.table.entries:
                self.save()
        if not self.table.entries:
            device, dtype = (self.table.circumstances[name] for name in ("device", "dtype"))
            reason = next(iter(self.failed.values()))
            raise TableError(f"no step can run on {device} in {dtype}: {reason}")

    def _run(self) -> Iterator[Progress]:
        done = total = 0
        for _ in range(1 + REPEATS):
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
                    if self.table.entries:
                        self.save()
                    done = min(done + size, total)
                    yield Progress(done, total)
        yield from self._repeat_outliers(total)

    def _repeat_outliers(self, done: int) -> Iterator[Progress]:
        """The shorter measurement counts: others may use the machine without the anchor's notice,
        but make nothing faster.
        """
        outliers = Predictor(self.table).outliers() if self.table.entries else set()
        calls = [key for key in self.calls if key in outliers]
        wholes = [key for key in self.steps if key in outliers]
        total = done + len(calls) + len(wholes)
        blocks = [calls[i : i + _CALLS] for i in range(0, len(calls), _CALLS)]
        for measure_, keys in [
            *((self._measure_calls, block) for block in blocks),
            *((self._measure_wholes, [key]) for key in wholes),  # by itself, unlike before
        ]:
            before = self.table.measured(keys)
            measure_(keys)
            self.table.keep_shorter(before)
            self.save()
            done += len(keys)
            yield Progress(done, total)

    def _measure_calls(self, keys: Sequence[str]) -> None:
        device = str(self.table.circumstances["device"])
        times = self._timed({key: partial(Replay, self.calls[key], device) for key in keys})
        for key, one in times.items():
            found, before = Entry.of(self.calls[key], one), self.table.entries.get(key)
            if before is None or found.anchor_ns <= before.anchor_ns:
                self.table.add([found])

    def _measure_wholes(self, keys: Sequence[str]) -> None:
        predictor = Predictor(self.table)
        sums = {}
        for key in keys:
            try:
                sums[key] = predictor.sums_ns(self.steps[key].calls)
            except TableError as error:  # of a call that could not run
                self.failed[key] = str(error)
        making = {key: partial(self.steps[key].subject.whole, self.steps[key].mode) for key in sums}
        for key, one in self._timed(making).items():
            step = self.steps[key]
            mode = step.mode
            whole = Whole(step.name, mode.batch, mode.training, sums[key], *one.in_ns())
            self.table.add_wholes([whole])

    def _add_up(self) -> None:
        """The sums of calls of the whole steps, some of which were measured again since."""
        predictor = Predictor(self.table)
        known = {whole.key: whole for whole in self.table.wholes}
        for key in self.steps.keys() & known.keys():
            with suppress(TableError):  # an older table, of other calls
                sums = predictor.sums_ns(self.steps[key].calls)
                self.table.add_wholes([replace(known[key], calls_ns=sums)])

    def _timed(self, making: Mapping[str, Callable[[], Timed]]) -> dict[str, Times]:
        """By key, of those that can run: if not together, then one by one."""
        device = str(self.table.circumstances["device"])
        try:
            return dict(zip(making, measure([*making.values()], device), strict=True))
        except (RuntimeError, MemoryError) as error:  # a dtype without kernels, no memory
            reason = one_line(error)
        if len(making) == 1:
            self.failed |= dict.fromkeys(making, reason)
            return {}
        alone = [self._timed({key: make}) for key, make in making.items()]
        return {key: one for found in alone for key, one in found.items()}
