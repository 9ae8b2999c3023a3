"""The course of a study, whatever it searches over: begun or resumed, driven, its finalists trained
again, the result written. Nothing is lost.

The driver decides, an executor trains, the journal in the run directory remembers.
"""

from __future__ import annotations

import contextlib
import errno
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from kwlayers.plan import counted
from kwsearch import engines, finals
from kwsearch.database import StorageError, masked
from kwsearch.driver import Driver, Rules
from kwsearch.driver import Watcher as DriverWatcher
from kwsearch.events import EventLog
from kwsearch.executors import Executor, Job
from kwsearch.failures import disk_is_full
from kwsearch.jobs import FINAL, TRAINING, Jobs, checkpoint_folder
from kwsearch.proposals import GENERATION
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.resolve import versions
from kwsearch.results import Found, Result, finalists, found_of, named, rungs_of, settled, values_of
from kwsearch.run_directory import (
    BEST,
    EVENTS,
    JOURNAL,
    SearchError,
    holds_study,
    mend,
    prepare,
    sole_driver,
    write_down,
    write_trials,
)
from kwsearch.storage import Place, give_up, has_study
from kwsearch.trials import baseline

if TYPE_CHECKING:
    from kwsearch.dry_run import Forecast
    from kwsearch.labelled_data import LabelledData
    from kwsearch.sign_data import SignData


class Watcher(DriverWatcher, finals.Watcher, Protocol):
    """Who is told how it goes."""

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        """The trials that a resumed study has already."""


class Study(ABC):
    """A search in a run directory.

    watcher is told how it goes; echo takes every event as a line of JSON, too. trust: whether
    the network may be the user's own code, here and in the workers; a resumed study asks again.
    address: of the cluster that runs its trials. storage: the URL of a database, None for a journal
    in the directory; name: of the study in it, by default the directory's.

    Raises SearchError for what a user can mend: a directory with another recipe's study, one
    that another process is using, settings that exclude each other.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        *,
        resume: bool,
        watcher: Watcher,
        command: str = "",
        echo: Callable[[str], object] | None = None,
        trust: bool = False,
        address: str | None = None,
        storage: str | None = None,
        name: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.trust = trust
        self.address = address
        self.place = Place.of(directory, storage, name)
        self.search = recipe.search or Search()
        self.proxy = recipe.proxy or Proxy()
        self.directory = directory
        self.watcher = watcher
        self.command = command
        self.echo = echo
        self.values = values_of(recipe)
        self._check_recipe()
        self.rungs = rungs_of(self.search, self.proxy)
        self._resume = resume
        self._notes: list[str] = []

    # What it searches over --------------------------------------------------------------------

    @abstractmethod
    def _check_recipe(self) -> None:
        """Raise SearchError for settings that exclude each other; those below are anybody's."""
        search = self.search
        if search.pruner != "halving" and search.zero_cost is not None:
            raise SearchError("search.zero_cost is a rung: set search.pruner to halving")
        if search.deterministic and search.pruner == "median":
            raise SearchError(
                "search.deterministic decides at rungs: set search.pruner to halving or none"
            )

    @abstractmethod
    def _prepare(self) -> None:
        """Build the space, before anything is written. Raises what a user can mend."""

    @abstractmethod
    def _check_memory(self) -> None:
        """Raise SearchError if nothing of the space can be trained here."""

    @abstractmethod
    def _check_fit(self, data: LabelledData | SignData) -> None:
        """Before the first trial: what is trained takes these examples and has their classes."""

    @abstractmethod
    def _proposer(self) -> Callable[[optuna.Study], FrozenTrial]:
        """What is tried next."""

    @abstractmethod
    def _slot_bytes(self) -> int:
        """Of the training of a typical trial."""

    @abstractmethod
    def _write(self, path: Path, found: Found) -> Path | None:
        """The recipe of the best trial, if there is one."""

    @abstractmethod
    def forecast(self) -> Forecast:
        """What the search would be, without starting it and without data."""

    def _calibration(self) -> int:
        """First trials that are never stopped."""
        return self.search.calibration * len(self.values)

    def _cycles(self) -> dict[str, Any] | None:
        """Of operators, as plain data, which workers need."""
        return None

    def _job(self, trial: FrozenTrial, rung: int, attempt: int, splits: int) -> Job:
        """What brings a trial to a rung."""
        return self._jobs.of_trial(trial, rung, attempt, splits)

    def _warnings(self) -> tuple[str, ...]:
        """What still holds of the result."""
        return ()

    # Its course -------------------------------------------------------------------------------

    def run(
        self, executor: Executor | None = None, function: str = TRAINING, final: str = FINAL
    ) -> Result:
        """Train until the study has its trials or its time is up; then the finalists.

        executor: where, by default `search.workers` processes here. function, final: what trains,
        in place of those of `kwsearch.trial` (for simulations).
        """
        with contextlib.ExitStack() as stack:
            if begun := holds_study(self.directory):
                stack.enter_context(sole_driver(self.directory))
            prepare(self.directory, self.recipe, self._resume)
            self._prepare()
            self._check_memory()
            held_out, data = self._check_images() if function == TRAINING else (0, {})
            if not begun:
                stack.enter_context(sole_driver(self.directory))
            self._note_provenance(data)
            log = EventLog(self.directory / EVENTS, self.watcher, self.echo)
            self.watcher = stack.enter_context(log)
            for note in self._notes:
                self.watcher.say(note)
            own = self._provenance.get("id")
            folder = checkpoint_folder(self.directory, self.search.checkpoints, own)
            self._jobs = Jobs(
                self.recipe,
                self.rungs,
                folder,
                self.trust,
                function,
                final,
                cycles=self._cycles(),
            )
            if executor is None:
                executor = engines.executor_of(
                    self.search,
                    self.proxy,
                    self._slot_bytes,
                    self.watcher.say,
                    self.place,
                    self.address,
                )
                stack.callback(executor.close)
            if self.place.url is None and mend(self.directory / JOURNAL):
                self.watcher.say("the last line of the journal was torn and is dropped")
            storage = stack.enter_context(self.place.opened(self.watcher.say))
            self.study = study = self._open(storage)
            driver = Driver(
                study,
                executor,
                self._rules(),
                self.watcher,
                self._proposer(),
                self._job,
                lambda trial: baseline(trial) is not None,
                self._forget,
                self._jobs.begins,
            )
            left = 0
            try:
                try:
                    driver.run()
                    if driver.complete:
                        left = self._run_finals(executor, driver.rules.deadline)
                        if not left:
                            executor.finish()
                except BaseException:
                    give_up(storage)
                    with contextlib.suppress(StorageError):
                        self._result(held_out)
                    raise
                result = self._result(held_out)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise disk_is_full(error) from error
            unfinished = left > 0 or not driver.complete
            if time.monotonic() >= driver.rules.deadline and unfinished:
                self.watcher.say("time is up; --resume goes on")
            return result

    def _result(self, held_out: int) -> Result:
        """What there is until now, the best written down."""
        trials = tuple(_finished(self.study))
        found = self._found(trials)
        return Result(self.recipe, trials, held_out, found, self.rungs, self._warnings())

    def _note_provenance(self, data: dict[str, Any]) -> None:
        """Write the recipe down, with the command that started the study and its data."""
        begun = prepare(self.directory, self.recipe, self._resume)
        if begun is None:
            if self._resume:
                self._notes.append(f"{self.directory} has no trials yet: a new study")
            begun = {
                # In the name of its checkpoints' folder in a place that other studies have, too.
                "id": secrets.token_hex(4),
                "command": self.command,
                "versions": versions(),
                "seed": self.search.seed,
            }
        self._provenance = {**self.recipe.provenance, **begun, **data}
        if warnings := self._warnings():
            self._provenance["warnings"] = list(warnings)
        write_down(self.directory, self.recipe, self._provenance)

    def _check_images(self) -> tuple[int, dict[str, Any]]:
        """Before the first trial: there are images, and they fit; how many are held out, and what
        the provenance says of them.
        """
        from kwsearch import examples, proxy

        if self.recipe.proxy is None:
            self._notes.append("the recipe has no proxy section: trials train on digits by default")
        if self.search.executor == "local":
            proxy.device_of(self.proxy)
        found = examples.load(self.recipe, self.proxy, self.trust)
        self._check_fit(found)
        self._notes += found.notes
        data = f"{found.train.name} {examples.fingerprint(found)}"
        held_out = len(found.valid)
        return held_out, {"data": data, "held_out": held_out}

    def _open(self, storage: BaseStorage) -> optuna.Study:
        if not self.place.begun and self.place.url and has_study(storage, self.place.study):
            raise SearchError(
                f"{masked(self.place.url)} has a study {self.place.study} already, and "
                f"{self.directory} is not its run directory: give another --study, or its --run-dir"
            )
        self.place.mark()
        study = optuna.create_study(
            storage=storage,
            study_name=self.place.study,
            direction="maximize",
            load_if_exists=True,
            pruner=self._pruner(),
        )
        self.watcher.known(_finished(study))
        return study

    def _rules(self) -> Rules:
        search = self.search
        return Rules(
            trials=search.trials,
            rungs=self.rungs,
            eta=search.eta,
            calibration=self._calibration(),
            tau=search.rung_tau,
            generation=GENERATION if search.deterministic else 0,
            deadline=time.monotonic() + (search.timeout or math.inf),
        )

    def _pruner(self) -> optuna.pruners.BasePruner:
        if self.search.pruner == "median":
            return optuna.pruners.MedianPruner(
                n_startup_trials=4, n_warmup_steps=settled(self.proxy)
            )
        return optuna.pruners.NopPruner()

    def _run_finals(self, executor: Executor, deadline: float) -> int:
        """The verdict's trainings, once the search is over; how many are left."""
        trials = _finished(self.study)
        if not self.search.finalists:
            return 0
        found = found_of(self.values, trials, self.study.user_attrs)
        chosen = finalists(found, self.search.finalists)
        trainings = [
            finals.Training(trial.number, seed)
            for seed in range(self.search.seeds)
            for trial in chosen
        ]
        by_number = {trial.number: trial for trial in chosen}
        self.study.set_user_attr(finals.FINALISTS, sorted(by_number))

        def job(training: finals.Training, attempt: int, splits: int) -> Job:
            number = -1 - trainings.index(training)
            trial = by_number[training.number]
            return self._jobs.of_final(trial, training.seed, number, attempt, splits)

        left = sum(t.key not in self.study.user_attrs for t in trainings)
        if left:
            beside = sum(baseline(trial) is not None for trial in chosen)
            who = [counted(len(chosen) - beside, "finalist")]
            who += [counted(beside, "baseline")] if beside else []
            self.watcher.say(
                f"verdict: {' and '.join(who)}, "
                f"{counted(self.search.seeds, 'seed')} each: {counted(left, 'training')} in full"
            )
        finals.run(
            self.study,
            executor,
            trainings,
            job,
            self.watcher,
            lambda: time.monotonic() >= deadline,
        )
        known = self.study.user_attrs
        for training in trainings:
            if training.key in known:
                self._jobs.forget_final(training.number, training.seed)
        return sum(training.key not in known for training in trainings)

    def _forget(self, number: int) -> None:
        """A trial is told: it is in the table, and needs no checkpoint."""
        write_trials(self.directory, _finished(self.study))
        self._jobs.forget(number)

    def _found(self, trials: Sequence[FrozenTrial]) -> tuple[Found, ...]:
        """What each budget gave, the best of it written down."""
        found = []
        for one in found_of(self.values, trials, self.study.user_attrs):
            path = self.directory / named(self.values, one.budget, BEST)
            found.append(replace(one, best_path=self._write(path, one)))
        return tuple(found)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
