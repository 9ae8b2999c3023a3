"""The driver: the one process that asks, submits, decides and tells.

Executors only run jobs; everything that is known is in the study, so that a driver which is
killed at any moment is followed by another that goes on. An unfinished trial that has no job is
queued again under its own number, from its last checkpoint.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from kwsearch.executors import (
    Cancelled,
    Event,
    Executor,
    Failed,
    Finished,
    Job,
    Lost,
    Reported,
    Started,
)
from kwsearch.failures import LOSSES, NO_SPACE, Errors, disk_is_full, weight_of
from kwsearch.interrupts import Interrupts, counted
from kwsearch.rungs import Rung, promotable, trusted
from kwsearch.trials import (
    DOUBLE,
    EXHAUSTED,
    LEASE,
    REASON,
    SECONDS,
    SPLITS,
    budget_of,
    by_budget,
    is_static,
    rung_pairs,
)
from kwsearch.verdict import pooled_tau


class SpaceExhausted(ValueError):
    """No plan is left that has not been trained."""


class Watcher(Protocol):
    """Who is told how it goes. Steps are epochs, counted over all phases.

    The value at step 0 is a score of the untrained network, at all others an accuracy.
    """

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None:
        """A trial starts to train, or goes on, up to step `until`."""

    def epoch(self, number: int, step: int, accuracy: float) -> None:
        """A trial has trained another epoch."""

    def pause(self, number: int, step: int, accuracy: float) -> None:
        """A trial has reached a rung and waits there."""

    def done(self, trial: FrozenTrial) -> None:
        """A trial is finished."""

    def say(self, message: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Rules:
    """What the driver decides by.

    trials: of the study. eta: 1/eta of the trials at a rung go on. calibration: so many trials
    are never stopped, to measure how well a rung ranks. tau: a rung stops trials if Kendall's tau
    to the full length is at least that. generation: deterministic studies ask so many at a time
    and decide when all of them have arrived; 0 decides as trials come.
    """

    trials: int
    rungs: tuple[Rung, ...]
    eta: int = 3
    calibration: int = 6
    tau: float = 0.3
    generation: int = 0
    deadline: float = math.inf


@dataclass
class _Run:
    """An unfinished trial. rung: index of the rung that it is at, or on its way to."""

    number: int
    trial_id: int
    budget: float | None
    rung: int = 0
    paused: bool = False
    attempt: int = 0
    splits: int = 1
    losses: float = 0
    seconds: float = 0.0
    submitted: float = 0.0
    values: dict[int, float] = field(default_factory=dict)


class Driver:
    """Runs the trials of a study.

    propose: fills in a new trial's facts (user attributes), or raises SpaceExhausted. job: of a
    trial, up to a rung's epochs, for an attempt, in so many micro-batches; its answer is the
    value at that rung, or a mapping with that as "value" and further attributes of the trial.
    keeps: whether a trial is never stopped (baselines). forget: clear up after a finished trial.
    begins: the index of the rung that a trial trains for first.

    Trials compete with those of their own budget only.
    """

    def __init__(
        self,
        study: optuna.Study,
        executor: Executor,
        rules: Rules,
        watcher: Watcher,
        propose: Callable[[optuna.Study], FrozenTrial],
        job: Callable[[FrozenTrial, int, int, int], Job],
        keeps: Callable[[FrozenTrial], bool],
        forget: Callable[[int], None],
        begins: Callable[[FrozenTrial], int] = lambda trial: 0,
    ) -> None:
        self.study = study
        self.executor = executor
        self.rules = rules
        self.watcher = watcher
        self.propose = propose
        self.job = job
        self.keeps = keeps
        self.forget = forget
        self.begins = begins
        self._storage = study._storage
        self._open: dict[int, _Run] = {}  # unfinished trials
        self._queue: list[int] = []  # of them, those that wait for a slot
        self._busy: set[int] = set()  # and those that have a job
        self._stops: dict[int, str] = {}  # jobs cancelled to prune, with the reason
        self._errors = Errors("trials in a row")
        self._interrupts = Interrupts()
        self._exhausted = False
        self._taus: tuple[int, dict[int, float | None]] | None = None  # of so many complete trials

    def run(self) -> None:
        """Until the study has its trials, its time is up, or Ctrl-C has let jobs finish.

        Raises StudyFailed, and KeyboardInterrupt at a second Ctrl-C; either way the study can be
        resumed.
        """
        self._take_over()
        message = "stopping: trials that run come to their next rung; Ctrl-C again stops now"
        with counted(self.watcher.say, message) as self._interrupts:
            while True:
                self._fill()
                if not self._busy:
                    break
                for event in self.executor.wait(1.0):
                    self._handle(event)
                self._interrupts.check()
        if self._interrupts.count:
            raise KeyboardInterrupt

    @property
    def over(self) -> bool:
        """Whether no new trial may start."""
        return self._interrupts.count > 0 or time.monotonic() >= self.rules.deadline

    @property
    def complete(self) -> bool:
        """Whether the study has all its trials, or all that there can be."""
        return not self._open and (self._exhausted or self._begun() >= self.rules.trials)

    # Starting -------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Queue what an earlier driver left unfinished."""
        for frozen in self._trials(TrialState.RUNNING):
            if LEASE not in frozen.user_attrs:
                continue  # it was asked for and never begun: `propose` takes it up
            lease = frozen.user_attrs[LEASE]
            run = _Run(frozen.number, frozen._trial_id, budget_of(frozen))
            run.attempt, run.seconds = lease["attempt"], lease["seconds"]
            run.splits = frozen.user_attrs.get(SPLITS, 1)
            run.values = dict(frozen.intermediate_values)
            reached = -1 if frozen.last_step is None else frozen.last_step
            stops = [rung.step for rung in self.rules.rungs]
            run.rung = next((i for i, stop in enumerate(stops) if reached <= stop), len(stops) - 1)
            run.rung = max(run.rung, self.begins(frozen))
            self._open[run.number] = run
            if reached == stops[run.rung]:
                # Finished but not told, or paused: what it was at that rung is decided again.
                self._arrived(run)
            else:
                self.watcher.say(
                    f"trial {run.number} was interrupted after epoch {max(reached, 0)}: it goes on"
                )
                self._queue.append(run.number)

    def _fill(self) -> None:
        """Give every free slot a job."""
        if self.rules.generation:
            self._decide_generation()
        while len(self._busy) < self.executor.capacity and not self._interrupts.count:
            run = self._next()
            if run is None:
                break
            self._submit(run)
        if not self._busy and not self._queue and not self.over:
            self._end_paused()

    def _next(self) -> _Run | None:
        for place, number in enumerate(self._queue):
            if self._open[number].attempt or not self.over:
                return self._open[self._queue.pop(place)]
        if self.rules.generation:
            return None
        promoted = self._promotable()
        if promoted is not None:
            promoted.rung += 1
            promoted.paused = False
            return promoted
        return None if self.over else self._new()

    def _new(self) -> _Run | None:
        if self._exhausted or self._begun() >= self.rules.trials:
            return None
        try:
            frozen = self.propose(self.study)
        except SpaceExhausted as error:
            self._exhausted = True
            self.study.set_user_attr(EXHAUSTED, str(error))
            self.watcher.say(f"no more trials: {error}")
            return None
        run = _Run(frozen.number, frozen._trial_id, budget_of(frozen), self.begins(frozen))
        self._open[frozen.number] = run
        return run

    def _begun(self) -> int:
        """Trials that are finished or have a job behind them."""
        trials = self._trials()
        begun = (t for t in trials if t.state.is_finished() or LEASE in t.user_attrs)
        return sum(DOUBLE not in t.user_attrs for t in begun)

    def _submit(self, run: _Run) -> None:
        run.attempt += 1
        run.submitted = time.monotonic()
        lease = {
            "attempt": run.attempt,
            "by": f"{platform.node()}:{os.getpid()}",
            "at": datetime.datetime.now().isoformat(timespec="seconds"),
            "seconds": round(run.seconds, 3),
        }
        self._note(run, LEASE, lease)
        frozen = self._frozen(run)
        self.executor.submit(self.job(frozen, run.rung, run.attempt, run.splits))
        self._busy.add(run.number)
        self.watcher.start(frozen, run.attempt, self.rules.rungs[run.rung].step)

    # Deciding -------------------------------------------------------------------------------

    def _promotable(self) -> _Run | None:
        """The paused trial that goes on next: from the highest rung, the best first."""
        may_stop = self._may_stop()
        for index in reversed(range(len(self.rules.rungs) - 1)):
            paused = {n for n, run in self._open.items() if run.paused and run.rung == index}
            if not paused:
                continue
            free = [n for n in paused if not may_stop[index]]
            if free:
                return self._open[min(free)]
            for values in self._values_at(self.rules.rungs[index].step).values():
                for number in promotable(values, frozenset(values) - paused, self.rules.eta):
                    return self._open[number]
        return None

    def _decide_generation(self) -> None:
        """Once all trials of a generation have arrived: promote, end, or ask for the next."""
        if self._interrupts.count:
            return
        if any(run.attempt == 0 for run in self._open.values()):
            self._ask_generation()  # the rest of one that an earlier driver was asking for
        if self._busy or self._queue:
            return
        paused = sorted(n for n, run in self._open.items() if run.paused)
        if paused:
            index, budget = min((self._open[n].rung, str(self._open[n].budget)) for n in paused)
            here = {
                n: self._open[n].values[self.rules.rungs[index].step]
                for n in paused
                if (self._open[n].rung, str(self._open[n].budget)) == (index, budget)
            }
            best, of = self._decision(index, here)
            for number in here:
                run = self._open[number]
                if number in best:
                    run.rung += 1
                    run.paused = False
                    self._queue.append(number)
                else:
                    self._end(run, f"not among the best {len(best)} of {of}")
            return
        self._ask_generation()

    def _decision(self, index: int, here: Mapping[int, float]) -> tuple[list[int], int]:
        """Who of a generation goes on from a rung, and of how many.

        Written down before it is carried out: a driver that is killed in between is followed by
        one that would see fewer of them, and know more of how the rung ranks.
        """
        budget = self._open[min(here)].budget
        generation = min(here) // self.rules.generation
        key = f"decided/{self.rules.rungs[index].step}/{budget}/{generation}"
        known = self.study.user_attrs.get(key)
        if known is None:
            count = len(here) if not self._may_stop()[index] else len(here) // self.rules.eta
            best = promotable(here, frozenset(), 1)[: max(count, 1)]
            known = {"on": best, "of": len(here)}
            self.study.set_user_attr(key, known)
        return known["on"], known["of"]

    def _ask_generation(self) -> None:
        """Ask before any of them is trained: what is proposed depends on earlier ones only."""
        size = self.rules.generation
        begun = self._begun() % size
        # All of it or nothing: a part would be told to whoever asks for the rest.
        if (self._open or self.over) and not begun:
            return
        for _ in range(size - begun):
            run = self._new()
            if run is None:
                break
            # So that it counts as begun while the rest of its generation is asked for.
            self._note(run, LEASE, {"attempt": 0, "seconds": 0.0})
            self._queue.append(run.number)

    def _may_stop(self) -> list[bool]:
        """Per rung but the last: whether it ranks well enough to stop trials."""
        return trusted(self.rules.rungs, self.taus(), self.rules.tau)

    def taus(self) -> dict[int, float | None]:
        """Kendall's tau to the full length by rung's step, over the complete trials."""
        last = self.rules.rungs[-1].step
        complete = self._trials(TrialState.COMPLETE)
        if self._taus is not None and self._taus[0] == len(complete):
            return self._taus[1]
        budgets = by_budget(complete).values()
        found = {}
        for rung in self.rules.rungs[:-1]:
            groups = [rung_pairs(trials, rung.step, last) for trials in budgets]
            known = sum(map(len, groups)) >= self._least
            found[rung.step] = pooled_tau(groups) if known else None
        self._taus = len(complete), found
        return found

    @property
    def _least(self) -> int:
        return max(self.rules.calibration, 3)

    def _arrived(self, run: _Run) -> None:
        """A trial has the accuracy of its rung."""
        value = run.values[self.rules.rungs[run.rung].step]
        if not math.isfinite(value):
            self._tell(run, TrialState.PRUNED, f"the score is {value}")
        elif run.rung == len(self.rules.rungs) - 1:
            self._tell(run, TrialState.COMPLETE, value=value)
            self._errors.clear()
        elif self.keeps(self._frozen(run)) or run.number < self.rules.calibration:
            run.rung += 1
            self._queue.insert(0, run.number)
        else:
            run.paused = True
            self.watcher.pause(run.number, self.rules.rungs[run.rung].step, value)

    def _end_paused(self) -> None:
        """Nothing runs and nothing can: what is paused has lost."""
        if self._begun() < self.rules.trials and not self._exhausted:
            return
        for run in sorted(self._open.values(), key=lambda r: r.number):
            if run.paused:
                count = len(self._values_at(self.rules.rungs[run.rung].step)[run.budget])
                self._end(run, f"not among the best {count // self.rules.eta} of {count}")

    def _end(self, run: _Run, why: str) -> None:
        step = self.rules.rungs[run.rung].step
        when = f"after epoch {step}" if step else "before training"
        self._tell(run, TrialState.PRUNED, f"stopped {when}: {why}")

    # What happens -----------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        run = self._open.get(event.trial)
        if run is None or event.attempt != run.attempt:
            return  # of a job that was given up
        if isinstance(event, Started):
            run.submitted = time.monotonic()  # what it waited for a worker does not count
            return
        if isinstance(event, Reported):
            self._reported(run, event.step, event.value)
            return
        self._busy.discard(run.number)
        run.seconds += time.monotonic() - run.submitted
        if isinstance(event, Finished):
            value, facts = event.value, {}
            if isinstance(value, Mapping):
                facts = dict(value)
                value = facts.pop("value")
            for key, fact in facts.items():
                self._note(run, key, fact)
            self._record(run, self.rules.rungs[run.rung].step, value)
            self._arrived(run)
        elif isinstance(event, Failed):
            self._failed(run, event)
        elif isinstance(event, Lost):
            self._lost(run, event)
        elif isinstance(event, Cancelled):
            reason = self._stops.pop(run.number, None)
            if reason is None:
                self._queue.append(run.number)
            else:
                self._tell(run, TrialState.PRUNED, reason)

    def _reported(self, run: _Run, step: int, value: float) -> None:
        run.losses = 0
        self._record(run, step, value)
        self.watcher.epoch(run.number, step, value)
        last = step == self.rules.rungs[-1].step
        frozen = self._frozen(run)
        if last or self.keeps(frozen) or run.number in self._stops:
            return
        if self.study.pruner.prune(_OneBudget(self.study, run.budget), frozen):
            self._stops[run.number] = f"pruned after epoch {step}"
            self.executor.cancel(run.number)

    def _record(self, run: _Run, step: int, value: float) -> None:
        if step not in run.values:
            run.values[step] = value
            self._storage.set_trial_intermediate_value(run.trial_id, step, value)

    def _failed(self, run: _Run, event: Failed) -> None:
        if NO_SPACE in event.message:
            raise disk_is_full(event.message)
        if event.kind == "memory" and run.splits == 1:
            run.splits = 2
            self._note(run, SPLITS, 2)
            self.watcher.say(f"trial {run.number}: out of memory; again in half batches")
            self._queue.insert(0, run.number)
            return
        if event.kind == "diverged":  # a plan that diverges says nothing of the others
            self._tell(run, TrialState.PRUNED, event.message)
            return
        self._tell(run, TrialState.FAIL, event.message)
        self._errors.add(event.message, stops=event.kind == "error")

    def _lost(self, run: _Run, event: Lost) -> None:
        if (reason := self._stops.pop(run.number, None)) is not None:
            self._tell(run, TrialState.PRUNED, reason)
            return
        run.losses += weight_of(event)
        if run.losses >= LOSSES:
            reason = f"its process ended again and again within one epoch: {event.message}"
            self._tell(run, TrialState.FAIL, reason)
            return
        how = "died" if event.suspect else "was taken away"
        self.watcher.say(f"trial {run.number}: its process {how} ({event.message}); it goes on")
        self._queue.insert(0, run.number)

    # The study --------------------------------------------------------------------------------

    def _tell(
        self, run: _Run, state: TrialState, reason: str = "", value: float | None = None
    ) -> None:
        if reason:
            self._note(run, REASON, reason)
        self._note(run, SECONDS, round(run.seconds, 3))
        self._open.pop(run.number)
        told = self.study.tell(run.number, value, state)
        self.forget(run.number)
        self.watcher.done(told)

    def _note(self, run: _Run, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(run.trial_id, key, value)

    def _frozen(self, run: _Run) -> FrozenTrial:
        return self._storage.get_trial(run.trial_id)

    def _trials(self, *states: TrialState) -> Sequence[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _values_at(self, step: int) -> dict[float | None, dict[int, float]]:
        """By budget and trial, of all plans that reached a rung; the static network is none."""
        return {
            budget: {
                trial.number: trial.intermediate_values[step]
                for trial in trials
                if step in trial.intermediate_values and not is_static(trial)
            }
            for budget, trials in by_budget(self._trials()).items()
        }


class _OneBudget(optuna.Study):
    """A study of which only the plans of one budget are seen: a pruner compares those."""

    def __init__(self, study: optuna.Study, budget: float | None) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self.budget = budget

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        found = super()._get_trials(*args, **kwargs)
        return [t for t in found if budget_of(t) == self.budget and not is_static(t)]
