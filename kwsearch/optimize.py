"""The study: what is proposed, how it is trained, and what came of it. Nothing is lost.

The first trials of a budget are its baselines, which always finish: the uniform plan and a static
network within the budget, if there is one. The driver decides, an executor trains, the journal in
the run directory remembers.
"""

from __future__ import annotations

import contextlib
import errno
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from kwlayers.plan import counted
from kwsearch import dry_run, engines, finals, networks
from kwsearch.database import StorageError, masked
from kwsearch.driver import Driver, Rules, SpaceExhausted
from kwsearch.driver import Watcher as DriverWatcher
from kwsearch.dry_run import Forecast
from kwsearch.events import EventLog
from kwsearch.executors import Executor, Job
from kwsearch.failures import StudyFailed, disk_is_full
from kwsearch.jobs import FINAL, TRAINING, Jobs, checkpoint_folder
from kwsearch.latency.plans import PlanLatency
from kwsearch.latency.table import TableError
from kwsearch.proposals import GENERATION, Budget, Proposer
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.resolve import (
    check_replannable,
    create_model,
    input_of,
    located,
    network_of,
    outputs_of,
    settings_of,
    targets_of,
    versions,
)
from kwsearch.results import (
    Found,
    Result,
    finalists,
    found_of,
    named,
    rungs_of,
    settled,
    under,
    write_best,
)
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
from kwsearch.space import Space, fingerprint
from kwsearch.static_twin import NoTwin, Twin, static_twin
from kwsearch.storage import Place, give_up, has_study
from kwsearch.train_step import train_bytes
from kwsearch.trials import baseline

if TYPE_CHECKING:
    from kwlayers.plan import Network, Plan
    from kwsearch.proxy import ProxyData

__all__ = ["Result", "SearchError", "SpaceExhausted", "Study", "StudyFailed"]


class Watcher(DriverWatcher, finals.Watcher, Protocol):
    """Who is told how it goes."""

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        """The trials that a resumed study has already."""


class Study:
    """A search in a run directory.

    watcher is told how it goes; echo takes every event as a line of JSON, too. trust: whether
    the network may be the user's own code, here and in the workers; a resumed study asks again.
    address: of the cluster that runs its trials. storage: the URL of a database, None for a journal
    in the directory; name: of the study in it, by default the directory's.

    Raises SearchError for what a user can mend: a directory with another recipe's study, one
    that another process is using, a recipe without a budget.
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
        self.targets = targets_of(recipe)
        if not self.targets:
            raise SearchError("the recipe has no budget to search under: add budget: {ratio: 0.5}")
        check_replannable(recipe)
        self._check_choices()
        self.rungs = rungs_of(self.search, self.proxy)
        self._resume = resume
        self._notes: list[str] = []
        self._counted: dict[str, int] = {}

    def _check_choices(self) -> None:
        """Raise SearchError for settings that exclude each other."""
        search = self.search
        if search.pruner != "halving" and search.zero_cost is not None:
            raise SearchError("search.zero_cost is a rung: set search.pruner to halving")
        if search.sampler == "nsgaii" and len(self.targets) > 1:
            raise SearchError(
                "search.sampler nsgaii breeds one population, search.budgets needs one for each: "
                "use tpe, gp or random"
            )
        if self.search.deterministic and self.search.pruner == "median":
            raise SearchError(
                "search.deterministic decides at rungs: set search.pruner to halving or none"
            )
        if self.proxy.starts_static and self.search.space.temperature_epochs:
            raise SearchError(
                f"search.space.temperature_epochs: with proxy.init {self.proxy.init} the "
                "temperature is 0: leave one of them out"
            )
        longest = max(self.search.space.temperature_epochs, default=0)
        if longest > self.proxy.epochs:
            raise SearchError(
                f"search.space.temperature_epochs: {longest} is more than proxy.epochs, "
                f"{self.proxy.epochs}"
            )

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
            self._plan_spaces()
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
            self._jobs = Jobs(self.recipe, self.rungs, folder, self.trust, function, final)
            if executor is None:
                uniform = self.budgets[-1].space.uniform
                executor = engines.executor_of(
                    self.search,
                    self.proxy,
                    lambda: self._train_bytes(uniform),
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
                Proposer(self.search, self.budgets, self.watcher.say, self._fits),
                self._jobs.of_trial,
                lambda trial: baseline(trial) is not None,
                self._forget,
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
        """What there is until now, the best plans written down."""
        trials = tuple(_finished(self.study))
        found = self._found(trials)
        return Result(self.recipe, trials, held_out, found, self.rungs, self._warnings())

    def _trace(self) -> Network:
        """The network, which must be one that trains on images. Raises PlanError."""
        network = network_of(self.recipe, self.trust)
        size = network.input_size
        if len(size) != 3:
            raise SearchError(
                f"{self.recipe.model.name} takes inputs of {'x'.join(map(str, size))}: a search "
                "trains on images, CxHxW"
            )
        outputs_of(self.recipe, size, self.trust)
        return network

    def _plan_spaces(self) -> None:
        self.network = self._trace()
        self.latency = self._latency()
        self.budgets = [
            Budget(value, space, self._twin(space)) for value, space in self._spaces().items()
        ]

    def _spaces(self) -> dict[float, Space]:
        settings, section = settings_of(self.recipe), self.search.space
        where = ("search", "budgets") if self.search.budgets else ("budget",)
        with located(self.recipe, budget=where):
            return {
                value: Space(self.network, settings, target, section, self.latency)
                for value, target in self.targets.items()
            }

    def forecast(self) -> Forecast:
        """What the search would be, without starting it and without data."""
        self._plan_spaces()
        spaces = [budget.space for budget in self.budgets]
        uniform = spaces[-1].uniform
        latency = None if self.latency is None else self.latency(uniform)
        nbytes, trainings = self._train_bytes(uniform), self._most_finals()
        return dry_run.forecast(
            self.recipe, spaces, self.rungs, nbytes, latency, trainings, self.trust
        )

    def _most_finals(self) -> int:
        """Trainings of the verdict, if every trial finishes and no two are of one plan."""
        count, search = 0, self.search
        for place, budget in enumerate(self.budgets):
            trials = len(range(place, search.trials, len(self.budgets)))
            baselines = 1 if budget.twin is None else 2
            if searched := min(search.finalists, max(trials - baselines, 0)):
                count += (searched + baselines) * search.seeds
        return count

    def _twin(self, space: Space) -> Twin | None:
        name = self.recipe.model.name
        source = networks.source(name, self.trust)
        classes = self.recipe.model.num_classes or source.num_classes
        try:
            twin = static_twin(name, space.allowed, input_of(self.recipe), classes, self.trust)
        except NoTwin as reason:
            self._notes.append(f"no static network to compare with: {reason}")
            return None
        if not source.scalable:
            self._notes.append(
                f"the static network to compare with is {name} as it is: {twin.params:,} "
                f"parameters, where plans may have {space.allowed:,}"
            )
        if self.latency is not None:
            try:
                twin = replace(twin, latency_ms=self.latency.of_model(twin.create).ms)
            except TableError as reason:
                self._notes.append(f"no latency of the static network to compare with: {reason}")
        return twin

    def _latency(self) -> PlanLatency | None:
        """Of plans, by the recipe's table. Raises latency.table.TableError."""
        limits = self.search.space.limits
        if limits.lut is None:
            return None
        with located(self.recipe, "search", "space", "limits", "lut"):
            found = PlanLatency(
                Path(limits.lut),
                partial(create_model, self.recipe, None, self.trust),
                tuple(self.network.input_size),
                limits.latency_batch,
                force=limits.lut_force,
            )
        self._notes += [f"warning: {found.warning}"] if found.warning else []
        return found

    def _warnings(self) -> tuple[str, ...]:
        """What still holds of the result."""
        warning = None if self.latency is None else self.latency.warning
        return () if warning is None else (warning,)

    def _train_bytes(self, plan: Plan) -> int:
        """Of one training step, counted once for each plan."""
        name = fingerprint(plan)
        if name not in self._counted:
            self._counted[name] = train_bytes(self.recipe, plan, self.proxy, self.trust)
        return self._counted[name]

    def _fits(self, plan: Plan) -> bool:
        """Whether a plan trains within search.space.limits.train_memory."""
        most = self.search.space.limits.train_memory
        return most is None or self._train_bytes(plan) <= most

    def _check_memory(self) -> None:
        """Raise SearchError if not even the uniform plans fit the memory."""
        for budget in self.budgets:
            if not self._fits(budget.space.uniform):
                raise SearchError(
                    f"search.space.limits.train_memory: the uniform plan of budget "
                    f"{budget.value:.12g} takes {self._train_bytes(budget.space.uniform):,} bytes "
                    f"at batch {self.proxy.batch_size}: lower proxy.batch_size or proxy.resolution"
                )

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
        from kwsearch import proxy
        from kwsearch.data import fingerprint as fingerprint_images

        if self.recipe.proxy is None:
            self._notes.append("the recipe has no proxy section: trials train on digits by default")
        if self.search.executor == "local":
            proxy.device_of(self.proxy)
        images = proxy.load(self.proxy, input_of(self.recipe))
        self._check_fit(images)
        data = f"{images.train.name} {fingerprint_images(images.train)}"
        held_out = len(images.valid.y)
        return held_out, {"data": data, "held_out": held_out}

    def _check_fit(self, images: ProxyData) -> None:
        """Before the first trial: the model takes these images and has their classes."""
        size = (images.channels, *images.train.x.shape[-2:])
        outputs = outputs_of(self.recipe, size, self.trust)
        if outputs < images.train.num_classes:
            raise SearchError(
                f"{images.train.name} has {images.train.num_classes} classes, the model "
                f"{outputs}: set model.num_classes={images.train.num_classes}"
            )

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
            calibration=search.calibration * len(self.budgets),
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
        found = found_of([*self.targets], trials, self.study.user_attrs)
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
            self.watcher.say(
                f"verdict: {counted(len(chosen), 'finalist')}, "
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
        """What each budget gave, its best plan written down."""
        found = []
        for one in found_of([*self.targets], trials, self.study.user_attrs):
            path = self.directory / named([*self.targets], one.budget, BEST)
            recipe = under(self.recipe, one.budget)
            written = write_best(path, recipe, self.network, one, self._provenance, self.trust)
            found.append(replace(one, best_path=written))
        return tuple(found)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
