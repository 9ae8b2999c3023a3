"""The study: what is proposed, how it is trained, and what came of it. Nothing is lost.

Trial 0 is the uniform plan, trial 1 a static network of as many parameters: the baselines, which
always finish. The driver decides, an executor trains, the journal in the run
directory remembers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from kwlayers.plan import Network, Plan
from kwsearch import dry_run, finals, verdict, zoo
from kwsearch.driver import Driver, Rules, SpaceExhausted, StudyFailed
from kwsearch.driver import Watcher as DriverWatcher
from kwsearch.dry_run import Forecast
from kwsearch.events import EventLog
from kwsearch.executors import Executor, Job
from kwsearch.executors.local import LocalExecutor
from kwsearch.finals import Finals
from kwsearch.recipe import Proxy, Recipe, RecipePlan, Search, write_recipe
from kwsearch.resolve import (
    check_replannable,
    input_of,
    network_of,
    settings_of,
    target_of,
    versions,
)
from kwsearch.run_directory import (
    BEST,
    CHECKPOINTS,
    EVENTS,
    JOURNAL,
    SearchError,
    mend,
    prepare,
    sole_driver,
    write_down,
    write_trials,
)
from kwsearch.rungs import Rung, as_rungs, geometric, phase_of
from kwsearch.rungs import check as check_rungs
from kwsearch.space import Sample, Space, fingerprint
from kwsearch.static_twin import NoTwin, Twin, static_twin
from kwsearch.trial import Trained
from kwsearch.trials import KIND, LEASE, STATIC, TEMPERATURE, TWIN, UNIFORM, baseline, is_static

if TYPE_CHECKING:
    from kwsearch.proxy import ProxyData

__all__ = ["STUDY", "Result", "SearchError", "SpaceExhausted", "Study", "StudyFailed", "best_of"]

STUDY = "kwsearch"
GENERATION = 8
TRAINING, FINAL = "kwsearch.trial:train_trial", "kwsearch.trial:train_final"


class Watcher(DriverWatcher, Protocol):
    """Who is told how it goes."""

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        """The trials that a resumed study has already."""


@dataclass(frozen=True)
class Result:
    """A study's finished trials, in the order of their numbers."""

    recipe: Recipe
    trials: tuple[FrozenTrial, ...]
    held_out: int
    best_path: Path | None
    finals: Finals | None = None
    rungs: tuple[Rung, ...] = ()

    @property
    def best(self) -> FrozenTrial | None:
        """The finalist whose plan is best, else the best plan of the search."""
        return best_of(self.trials, self.finals)

    def trial(self, number: int) -> FrozenTrial | None:
        """A finished trial by its number."""
        return next((trial for trial in self.trials if trial.number == number), None)


def best_of(trials: Sequence[FrozenTrial], found: Finals | None = None) -> FrozenTrial | None:
    """The plan with the highest mean over the finalists' seeds; without finalists the complete
    plan with the highest accuracy, the earliest if several have it.
    """
    if found is not None and found.best is not None:
        return next(trial for trial in trials if trial.number == found.best)
    complete = [t for t in trials if t.state == TrialState.COMPLETE and not is_static(t)]
    return max(complete, key=lambda t: (t.values[0], -t.number), default=None)


class Study:
    """A search in a run directory.

    watcher is told how it goes; echo takes every event as a line of JSON, too.

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
    ) -> None:
        self.recipe = recipe
        self.search = recipe.search or Search()
        self.proxy = recipe.proxy or Proxy()
        self.directory = directory
        self.watcher = watcher
        self.command = command
        self.echo = echo
        if not target_of(recipe):
            raise SearchError("the recipe has no budget to search under: add budget: {ratio: 0.5}")
        check_replannable(recipe)
        if self.search.deterministic and self.search.pruner == "median":
            raise SearchError(
                "search.deterministic decides at rungs: set search.pruner to halving or none"
            )
        longest = max(self.search.space.temperature_epochs, default=0)
        if longest > self.proxy.epochs:
            raise SearchError(
                f"search.space.temperature_epochs: {longest} is more than proxy.epochs, "
                f"{self.proxy.epochs}"
            )
        self.rungs = _rungs(self.search, self.proxy)
        self._resume = resume

    def run(
        self, executor: Executor | None = None, function: str = TRAINING, final: str = FINAL
    ) -> Result:
        """Train until the study has its trials or its time is up; then the finalists.

        executor: where, by default `search.workers` processes here. function, final: what trains,
        in place of those of `kwsearch.trial` (for simulations).
        """
        with sole_driver(self.directory), contextlib.ExitStack() as stack:
            self._note_provenance()
            log = EventLog(self.directory / EVENTS, self.watcher, self.echo)
            self.watcher = stack.enter_context(log)
            self._plan_space()
            self.twin = self._twin()
            held_out = 0
            if function == TRAINING:
                held_out = self._check_images()
            self.study = study = self._open()
            if executor is None:
                executor = LocalExecutor(self.search.workers, self.proxy.threads)
                stack.callback(executor.close)
            self._function, self._final = function, final
            driver = Driver(
                study,
                executor,
                self._rules(),
                self.watcher,
                self._propose,
                self._job,
                keeps,
                self._forget,
            )
            try:
                driver.run()
                if driver.complete:
                    self._run_finals(executor, driver.rules.deadline)
            finally:
                trials = tuple(_finished(study))
                found = finals.results(study.user_attrs, trials)
                best = self._write_best(self.network, trials, found)
            if time.monotonic() >= driver.rules.deadline and len(trials) < self.search.trials:
                self.watcher.say("time is up; --resume goes on")
            return Result(self.recipe, trials, held_out, best, found, self.rungs)

    def _plan_space(self) -> None:
        self.network = network_of(self.recipe)
        settings, target = settings_of(self.recipe), target_of(self.recipe)
        self.space = Space(self.network, settings, target, self.search.space)

    def forecast(self) -> Forecast:
        """What the search would be, without starting it and without data."""
        self._plan_space()
        search, proxy, uniform = self.search, self.proxy, self.space.uniform
        step_s, train_bytes = dry_run.measure_step(self.recipe, uniform, proxy)
        trainings = (search.finalists + 2) * search.seeds if search.finalists else 0
        images = dry_run.images_of(proxy)
        least = most = None
        if images is not None:
            steps = -(-images // proxy.batch_size)
            least, most = dry_run.seconds_of(
                step_s, steps, search.trials, search.calibration, self.rungs, trainings
            )
        checkpoint = dry_run.checkpoint_bytes(uniform, proxy)
        unfinished = search.trials if len(self.rungs) > 1 else search.workers
        return Forecast(
            combinations=self.space.size(),
            warehouses=self.space.warehouses(),
            params_allowed=self.space.allowed,
            valid_share=self.space.valid_share(dry_run.SAMPLES, search.seed),
            trials=search.trials,
            rungs=tuple(rung.step for rung in self.rungs),
            trainings=trainings,
            step_s=step_s,
            train_bytes=train_bytes,
            train_images=images,
            least_seconds=least,
            most_seconds=most,
            checkpoint_bytes=checkpoint,
            disk_bytes=checkpoint * max(unfinished, search.workers),
        )

    def _twin(self) -> Twin | None:
        size = input_of(self.recipe)
        name = self.recipe.model.name
        classes = self.recipe.model.num_classes or zoo.get(name).num_classes
        try:
            return static_twin(name, self.space.allowed, size, classes)
        except NoTwin as reason:
            self.watcher.say(f"no static network to compare with: {reason}")
            return None

    def _note_provenance(self) -> None:
        """Write the recipe down, with the command that started the study."""
        begun = prepare(self.directory, self.recipe, self._resume)
        if begun is None:
            if self._resume:
                self.watcher.say(f"nothing to resume in {self.directory}: a new study")
            begun = {"command": self.command, "versions": versions(), "seed": self.search.seed}
        self._provenance = {**self.recipe.provenance, **begun}
        write_down(self.directory, self.recipe, self._provenance)

    def _check_images(self) -> int:
        """Before the first trial: there are images, and they fit; how many are held out."""
        from kwsearch import proxy
        from kwsearch.data import fingerprint as fingerprint_images

        if self.recipe.proxy is None:
            self.watcher.say("the recipe has no proxy section: trials train on digits by default")
        proxy.device_of(self.proxy)
        images = proxy.load(self.proxy, input_of(self.recipe))
        self._check_fit(images)
        self._provenance["data"] = f"{images.train.name} {fingerprint_images(images.train)}"
        return len(images.valid.y)

    def _check_fit(self, images: ProxyData) -> None:
        """Before the first trial: the model takes these images and has their classes."""
        import torch

        from kwlayers.sites import trace
        from kwsearch.resolve import create_model

        size = (images.channels, *images.train.x.shape[-2:])
        with torch.device("meta"), torch.no_grad():
            model = create_model(self.recipe).eval()
            trace(model, size)
            outputs = model(torch.empty(1, *size)).shape[-1]
        if outputs < images.train.num_classes:
            raise SearchError(
                f"{images.train.name} has {images.train.num_classes} classes, the model "
                f"{outputs}: set model={{name: {self.recipe.model.name}, "
                f"num_classes: {images.train.num_classes}}}"
            )

    def _open(self) -> optuna.Study:
        journal = self.directory / JOURNAL
        if mend(journal):
            self.watcher.say("the last line of the journal was torn and is dropped")
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=self._pruner(),
        )
        self.watcher.known(_finished(study))
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(self.space.start())
        return study

    def _rules(self) -> Rules:
        search = self.search
        return Rules(
            trials=search.trials,
            rungs=self.rungs,
            eta=search.eta,
            calibration=search.calibration,
            tau=search.rung_tau,
            generation=GENERATION if search.deterministic else 0,
            deadline=time.monotonic() + (search.timeout or math.inf),
        )

    @property
    def _settled(self) -> int:
        """While the temperature falls, accuracy falls with it and ranks nothing."""
        return min(self.proxy.temperature_epochs + 1, self.proxy.epochs)

    def _pruner(self) -> optuna.pruners.BasePruner:
        if self.search.pruner == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=self._settled)
        return optuna.pruners.NopPruner()

    def _propose(self, study: optuna.Study) -> FrozenTrial:
        """Ask for a plan on the budget that has not been trained; a neighbour if it has."""
        known = study.get_trials(deepcopy=False)
        # One that was asked for and never begun comes first, under its number.
        left = [t for t in known if t.state == TrialState.RUNNING and LEASE not in t.user_attrs]
        number = left[0].number if left else sum(t.state != TrialState.WAITING for t in known)
        # By trial, so that a resumed study draws what an uninterrupted one would.
        seed = self.search.seed * 1_000_003 + number
        study.sampler = _sampler(self.search, seed, number)
        trial = Trial(study, left[0]._trial_id) if left else study.ask()
        if number == TWIN and self.twin is not None:
            facts = self._static_facts(self.twin)
        else:
            facts = self._plan_facts(trial, known, seed)
        if "params" not in study.get_trials(deepcopy=False)[trial.number].constraints:
            trial.set_constraint("params", float(facts["params"] - self.space.allowed))
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        return study.get_trials(deepcopy=False)[trial.number]

    def _static_facts(self, twin: Twin) -> dict[str, Any]:
        return {
            KIND: STATIC,
            "fingerprint": f"static {twin.width:g}",
            "width": twin.width,
            "params": twin.params,
            "macs": twin.macs,
        }

    def _plan_facts(self, trial: Trial, known: Sequence[FrozenTrial], seed: int) -> dict[str, Any]:
        sample: Sample = self.space.sample(trial)
        plans = {
            t.user_attrs.get("fingerprint")
            for t in known
            if t.number != trial.number and not is_static(t)
        }
        others = self.space.neighbours(sample, seed)
        for candidate in itertools.chain((sample,), others):
            plan = self.space.project(candidate)
            name = fingerprint(plan)
            if candidate.temperature_epochs is not None:
                name += f" temperature {candidate.temperature_epochs}"
            if name not in plans:
                break
        else:
            raise SpaceExhausted(
                f"{len(plans)} plans are trained and no other was found: widen search.space "
                "(split, cell_ratio, sharing, …) or ask for fewer trials"
            )
        cost = plan.cost()
        facts = {
            "fingerprint": name,
            "groups": plan.groups_to_list(),
            "params": cost.params.total,
            "macs": cost.macs.total,
        }
        if candidate.temperature_epochs is not None:
            facts[TEMPERATURE] = candidate.temperature_epochs
        return facts

    def _job(self, trial: FrozenTrial, rung: int, attempt: int, splits: int) -> Job:
        phase = phase_of(self.rungs, rung)
        changes: dict[str, Any] = {"epochs": phase.epochs}
        if phase.subset is not None:
            changes["subset"] = phase.subset
        if phase.resolution is not None:
            changes["resolution"] = phase.resolution
        proxy = self._proxy_of(trial).model_copy(update=changes)
        seed = seed_of(self.search.seed, trial.user_attrs["fingerprint"])
        checkpoint = self._checkpoint(f"{trial.number}-{phase.first}")
        arguments = {
            "trained": self._trained(trial, proxy, seed, checkpoint, splits),
            "first": phase.first,
            "until": self.rungs[rung].epochs,
        }
        return Job(trial.number, attempt, self._function, arguments, self.proxy.threads)

    def _proxy_of(self, trial: FrozenTrial) -> Proxy:
        epochs = trial.user_attrs.get(TEMPERATURE)
        if epochs is None:
            return self.proxy
        return self.proxy.model_copy(update={"temperature_epochs": epochs})

    def _trained(
        self, trial: FrozenTrial, proxy: Proxy, seed: int, checkpoint: Path, splits: int
    ) -> Trained:
        return Trained(
            self.recipe.model_copy(update={"plan": None}).model_dump_json(),
            proxy.model_dump_json(),
            trial.user_attrs.get("groups"),
            trial.user_attrs.get("width"),
            seed,
            str(checkpoint),
            splits,
        )

    def _run_finals(self, executor: Executor, deadline: float) -> None:
        """The verdict's trainings, once the search is over."""
        trials = _finished(self.study)
        if not self.search.finalists:
            return
        chosen = finals.chosen(trials, self.search.finalists)
        if all(baseline(trial) for trial in chosen):
            return
        trainings = [
            finals.Training(trial.number, seed)
            for seed in range(self.search.seeds)
            for trial in chosen
        ]
        by_number = {trial.number: trial for trial in chosen}

        def job(training: finals.Training, attempt: int, splits: int) -> Job:
            trial = by_number[training.number]
            # The same for all candidates, which are compared seed by seed.
            seed = seed_of(self.search.seed, f"final {training.seed}")
            checkpoint = self._checkpoint(f"final-{training.number}-{training.seed}")
            trained = self._trained(trial, self._proxy_of(trial), seed, checkpoint, splits)
            number = -1 - trainings.index(training)
            return Job(number, attempt, self._final, {"trained": trained}, self.proxy.threads)

        left = sum(t.key not in self.study.user_attrs for t in trainings)
        if left:
            self.watcher.say(
                f"verdict: {len(chosen)} finalists, {self.search.seeds} seeds each: "
                f"{left} trainings in full"
            )
        finals.run(
            self.study,
            executor,
            trainings,
            job,
            self.watcher.say,
            lambda: time.monotonic() >= deadline,
        )
        for path in (self.directory / CHECKPOINTS).glob("final-*.pt"):
            path.unlink(missing_ok=True)

    def _checkpoint(self, name: str) -> Path:
        folder = self.directory / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.pt"

    def _forget(self, number: int) -> None:
        """A trial is told: it is in the table, and needs no checkpoint."""
        write_trials(self.directory, _finished(self.study))
        for path in (self.directory / CHECKPOINTS).glob(f"{number}-*.pt"):
            path.unlink(missing_ok=True)

    def _write_best(
        self, network: Network, trials: Sequence[FrozenTrial], found: Finals | None
    ) -> Path | None:
        """best.yaml: this recipe with the best plan, where it comes from and what it is worth."""
        best = best_of(trials, found)
        if best is None:
            return None
        plan = Plan.from_groups(network, best.user_attrs["groups"])
        provenance = dict(self._provenance)
        uniform = _score(trials, UNIFORM)
        said = [
            f"Trial {best.number} of {len(trials)}: {best.values[0]:.2%} on held-out images"
            + (f" (uniform plan {uniform:.2%})." if uniform is not None else ".")
        ]
        if found is not None and found.verdict is not None:
            provenance["verdict"] = verdict.sentence(found.verdict)
            said.append(f"On {found.split} images, {self.search.seeds} seeds each:")
            said += [f"    {part}" for part in provenance["verdict"].split("; ")]
        recipe = best_recipe(self.recipe, plan, best, trials, provenance)
        path = self.directory / BEST
        header = [
            *said,
            f"{best.user_attrs['params']:,} parameters, {best.user_attrs['macs']:,} MACs.",
            f"    kwsearch budget {path}",
        ]
        write_recipe(recipe, path, header)
        return path


def recipe_of_trial(recipe: Recipe, trial: FrozenTrial) -> Recipe:
    """The recipe with a trial's plan. Raises SearchError for a trial that has none."""
    if "groups" not in trial.user_attrs:
        raise SearchError(f"trial {trial.number} has no plan: {baseline(trial) or 'not begun'}")
    groups = trial.user_attrs["groups"]
    return recipe.model_copy(update={"plan": RecipePlan.model_validate({"groups": groups})})


def best_recipe(
    recipe: Recipe,
    plan: Plan,
    best: FrozenTrial,
    trials: Sequence[FrozenTrial],
    provenance: Mapping[str, Any],
) -> Recipe:
    """`recipe` with `plan` filled in, and its provenance."""
    return recipe.model_copy(
        update={
            "plan": RecipePlan.model_validate({"groups": plan.groups_to_list()}),
            "provenance": {
                **provenance,
                "trial": best.number,
                "trials": len(trials),
                "score": best.values[0],
                "uniform_score": _score(trials, UNIFORM),
                "params": best.user_attrs["params"],
                "macs": best.user_attrs["macs"],
            },
        }
    )


def _score(trials: Sequence[FrozenTrial], number: int) -> float | None:
    found = next((t for t in trials if t.number == number), None)
    return found.values[0] if found is not None and found.values else None


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]


def keeps(number: int) -> bool:
    """Whether a trial always finishes: the baselines, which the others are compared with."""
    return number in (UNIFORM, TWIN)


def seed_of(study_seed: int, plan: str) -> int:
    """The seed of a trial's training, by what it trains."""
    digest = hashlib.sha256(f"{study_seed} {plan}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _rungs(search: Search, proxy: Proxy) -> tuple[Rung, ...]:
    """Raises SearchError for rungs that do not end in the full trial."""
    if search.pruner != "halving":
        return as_rungs([(proxy.epochs, None, None)])
    if not search.rungs:
        least = min(proxy.temperature_epochs + 1, proxy.epochs)
        epochs = geometric(proxy.epochs, search.eta, least)
        return as_rungs([(count, None, None) for count in epochs])
    stops = [(stop.epochs, stop.subset, stop.resolution) for stop in search.rungs]
    problem = check_rungs(stops, proxy.epochs)
    if problem is not None:
        raise SearchError(f"search.rungs: {problem}")
    return as_rungs(stops)


def _sampler(search: Search, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial."""
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if number < search.startup:
            # One sequence for the study: its own seed, and a place that the study counts.
            return samplers.QMCSampler(
                seed=search.seed,
                scramble=True,
                independent_sampler=samplers.RandomSampler(seed=seed),
                warn_asynchronous_seeding=False,
                warn_independent_sampling=False,
            )
        if search.sampler == "gp":
            return samplers.GPSampler(
                seed=seed, n_startup_trials=0, warn_independent_sampling=False
            )
        if search.sampler == "nsgaii":
            return samplers.NSGAIISampler(seed=seed, population_size=GENERATION)
        return samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=0,
        )
