"""The study: ask, train, tell. One journal file in a run directory; nothing is lost.

Trial 0 is the uniform plan. A trial that a killed run left behind is trained again under its
own number, so that none is lost and none doubled.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from kwlayers.plan import Network, Plan
from kwsearch.recipe import Proxy, Recipe, RecipePlan, Search, write_recipe
from kwsearch.resolve import check_replannable, network_of, settings_of, target_of, versions
from kwsearch.run_directory import (
    BEST,
    JOURNAL,
    SearchError,
    mend,
    prepare,
    sole_driver,
    write_down,
)
from kwsearch.space import Sample, Space, fingerprint

if TYPE_CHECKING:
    from kwsearch.proxy import ProxyData

STUDY = "kwsearch"
_SAME_ERROR = 3


class StudyFailed(SearchError):
    """A search that has started and cannot go on."""


class SpaceExhausted(ValueError):
    """No plan is left that has not been trained."""


class Watcher(Protocol):
    """Who is told how it goes."""

    def start(self, number: int, finished: int, plan: Plan) -> None:
        """A trial starts to train."""

    def epoch(self, number: int, epoch: int, accuracy: float) -> None:
        """A trial has trained another epoch."""

    def done(self, trial: FrozenTrial) -> None:
        """A trial is finished."""

    def say(self, message: str) -> None:
        """Something that the user should know."""

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        """The trials that a resumed study has already."""


@dataclass(frozen=True)
class Result:
    """A study's finished trials, in the order of their numbers."""

    recipe: Recipe
    trials: tuple[FrozenTrial, ...]
    held_out: int
    best_path: Path | None

    @property
    def best(self) -> FrozenTrial | None:
        """The completed trial with the highest accuracy; the earliest if several have it."""
        return best_of(self.trials)


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """See `Result.best`."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda t: (t.values[0], -t.number), default=None)


Objective = Callable[[Plan, Callable[[int, float], None]], float]


class Study:
    """A search in a run directory.

    Raises SearchError for what a user can mend: a directory with another recipe's study, one
    that another process is using, a recipe without a budget.
    """

    def __init__(
        self, recipe: Recipe, directory: Path, *, resume: bool, watcher: Watcher, command: str = ""
    ) -> None:
        self.recipe = recipe
        self.search = recipe.search or Search()
        self.proxy = recipe.proxy or Proxy()
        self.directory = directory
        self.watcher = watcher
        self.command = command
        if not target_of(recipe):
            raise SearchError("the recipe has no budget to search under: add budget: {ratio: 0.5}")
        check_replannable(recipe)
        self._resume = resume
        self._errors: list[str] = []

    def run(self, objective: Objective | None = None) -> Result:
        """Train until the study has its trials or its time is up.

        objective: scores a plan instead of the proxy training (for tests and simulations).
        """
        with sole_driver(self.directory):
            self._note_provenance()
            network = network_of(self.recipe)
            settings, target = settings_of(self.recipe), target_of(self.recipe)
            self.space = Space(network, settings, target, self.search.space)
            held_out = 0
            if objective is None:
                images = self._images()
                held_out = len(images.valid.y)
                objective = self._proxy_objective(images)
            study = self._open()
            try:
                self._train_all(study, objective)
            finally:
                trials = tuple(_finished(study))
                best = self._write_best(network, trials)
            return Result(self.recipe, trials, held_out, best)

    def _note_provenance(self) -> None:
        """Write the recipe down, with the command that started the study."""
        begun = prepare(self.directory, self.recipe, self._resume)
        if begun is None:
            if self._resume:
                self.watcher.say(f"nothing to resume in {self.directory}: a new study")
            begun = {"command": self.command, "versions": versions(), "seed": self.search.seed}
        self._provenance = {**self.recipe.provenance, **begun}
        write_down(self.directory, self.recipe, self._provenance)

    def _train_all(self, study: optuna.Study, objective: Objective) -> None:
        deadline = time.monotonic() + (self.search.timeout or float("inf"))
        for trial in self._to_run(study):
            try:
                self._train(study, trial, objective)
            except SpaceExhausted as error:
                # The trial stays unfinished: it is no result, and a wider space can use it.
                self.watcher.say(f"stopped early: {error}")
                return
            if time.monotonic() >= deadline and len(_finished(study)) < self.search.trials:
                self.watcher.say("time is up; --resume goes on")
                return

    def _images(self) -> ProxyData:
        import torch

        from kwsearch import proxy
        from kwsearch.data import fingerprint as fingerprint_images
        from kwsearch.resolve import input_of

        if self.proxy.threads is not None:
            torch.set_num_threads(self.proxy.threads)
        if self.recipe.proxy is None:
            self.watcher.say("the recipe has no proxy section: trials train on digits by default")
        proxy.device_of(self.proxy)
        size = input_of(self.recipe)
        images = proxy.load(self.proxy, size)
        self._check_fit(images)
        self._provenance["data"] = f"{images.train.name} {fingerprint_images(images.train)}"
        return images

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

    def _proxy_objective(self, images: ProxyData) -> Objective:
        from kwsearch.proxy import train
        from kwsearch.resolve import create_model

        def objective(plan: Plan, report: Callable[[int, float], None]) -> float:
            return train(
                lambda: create_model(self.recipe),
                plan,
                images,
                self.proxy,
                self.search.seed,
                report,
            )

        return objective

    def _open(self) -> optuna.Study:
        journal = self.directory / JOURNAL
        if mend(journal):
            self.watcher.say("the last line of the journal was torn and is dropped")
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=_pruner(self.search.pruner, self.proxy),
        )
        self.watcher.known(_finished(study))
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(self.space.start())
        return study

    def _to_run(self, study: optuna.Study) -> Iterator[Trial]:
        """Trials that a killed run left, then new ones, until the study has enough."""
        left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        while (count := len(_finished(study))) < self.search.trials:
            if left:
                frozen = left.pop(0)
                self.watcher.say(f"trial {frozen.number} was interrupted: trained again")
                self._seed_sampler(study, frozen.number)
                yield Trial(study, frozen._trial_id)
            else:
                self._seed_sampler(study, count)
                yield study.ask()

    def _seed_sampler(self, study: optuna.Study, number: int) -> None:
        """By trial, so that a resumed study draws what an uninterrupted one would."""
        study.sampler = _sampler(self.search.sampler, self.search.seed * 1_000_003 + number)

    def _train(self, study: optuna.Study, trial: Trial, objective: Objective) -> None:
        plan = self._new_plan(study, trial)
        cost = plan.cost()
        left_over = study.get_trials(deepcopy=False)[trial.number]
        if "params" not in left_over.constraints:
            trial.set_constraint("params", float(cost.params.total - self.space.allowed))
        facts = {
            "fingerprint": fingerprint(plan),
            "groups": plan.groups_to_list(),
            "params": cost.params.total,
            "macs": cost.macs.total,
        }
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        self.watcher.start(trial.number, len(_finished(study)), plan)
        started = time.monotonic()
        # An interrupted trial has reported its first epochs already.
        seen = left_over.intermediate_values.keys()

        def report(epoch: int, accuracy: float) -> None:
            self.watcher.epoch(trial.number, epoch, accuracy)
            if epoch in seen:
                return
            trial.report(accuracy, epoch)
            # The uniform plan is what the others are compared with: it always finishes.
            if trial.number > 0 and trial.should_prune():
                raise optuna.TrialPruned

        try:
            value = objective(plan, report)
            if not math.isfinite(value):
                raise ArithmeticError(f"the score is {value}")
        except optuna.TrialPruned:
            epochs = study.get_trials(deepcopy=False)[trial.number].last_step
            trial.set_user_attr("reason", f"pruned after epoch {epochs}")
            told = study.tell(trial, state=TrialState.PRUNED)
        except Exception as error:  # whatever it is, the study goes on and says what it was
            told = self._failed(study, trial, error)
        else:
            trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
            told = study.tell(trial, value)
            self._errors.clear()
        self.watcher.done(told)

    def _failed(self, study: optuna.Study, trial: Trial, error: Exception) -> FrozenTrial:
        """Record why; the same error three times in a row is not the plans' fault."""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        trial.set_user_attr("reason", reason)
        told = study.tell(trial, state=TrialState.FAIL)
        if isinstance(error, ArithmeticError):  # a plan that diverges says nothing of the others
            return told
        self._errors.append(reason)
        if self._errors[-_SAME_ERROR:] == [reason] * _SAME_ERROR:
            self.watcher.done(told)
            raise StudyFailed(f"{_SAME_ERROR} trials in a row failed with the same error: {reason}")
        return told

    def _new_plan(self, study: optuna.Study, trial: Trial) -> Plan:
        """The trial's plan on the budget; a neighbour if it has been trained already."""
        sample: Sample = self.space.sample(trial)
        plan = self.space.project(sample)
        known = {t.user_attrs.get("fingerprint") for t in _finished(study)}
        seed = self.search.seed * 1_000_003 + trial.number
        others = (self.space.project(s) for s in self.space.neighbours(sample, seed))
        for candidate in itertools.chain((plan,), others):
            if fingerprint(candidate) not in known:
                return candidate
        raise SpaceExhausted(
            f"{len(known)} plans are trained and no other was found: widen search.space (split, "
            "cell_ratio, sharing, …) or ask for fewer trials"
        )

    def _write_best(self, network: Network, trials: Sequence[FrozenTrial]) -> Path | None:
        """best.yaml: this recipe with the best trial's plan and where it comes from."""
        best = best_of(trials)
        if best is None:
            return None
        plan = Plan.from_groups(network, best.user_attrs["groups"])
        recipe = best_recipe(self.recipe, plan, best, trials, self._provenance)
        path = self.directory / BEST
        uniform = trials[0].values[0] if trials[0].values else None
        header = [
            f"The best of {len(trials)} trials: {best.values[0]:.2%} on held-out images"
            + (f" (uniform plan {uniform:.2%})." if uniform is not None else "."),
            f"{best.user_attrs['params']:,} parameters, {best.user_attrs['macs']:,} MACs.",
            f"    kwsearch budget {path}",
        ]
        write_recipe(recipe, path, header)
        return path


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
                "uniform_score": trials[0].values[0] if trials[0].values else None,
                "params": best.user_attrs["params"],
                "macs": best.user_attrs["macs"],
            },
        }
    )


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def _pruner(name: str, proxy: Proxy) -> optuna.pruners.BasePruner:
    # While the temperature falls, accuracy falls with it and ranks nothing.
    settled = min(proxy.temperature_epochs + 1, proxy.epochs)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=settled)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=settled, max_resource=proxy.epochs)
    return optuna.pruners.NopPruner()
