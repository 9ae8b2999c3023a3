"""What is tried next: a plan on the budget that has not been trained, or a baseline."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from kwlayers.plan import Plan
from kwsearch.driver import SpaceExhausted
from kwsearch.recipe import Search
from kwsearch.space import Space, fingerprint
from kwsearch.static_twin import Twin
from kwsearch.trials import (
    AGAIN,
    BUDGET,
    FINGERPRINT,
    KIND,
    LEASE,
    STATIC,
    TEMPERATURE,
    UNIFORM,
    best_of,
    budget_of,
    is_static,
)

# Trials that a deterministic study asks for at a time.
GENERATION = 8
# In a sweep, every third trial of a budget starts from the best of a neighbour.
_LEARN = 3


@dataclass(frozen=True)
class Budget:
    """A budget to search under. value: as the recipe gives it. twin: None if there is none."""

    value: float
    space: Space
    twin: Twin | None


class Proposer:
    """Fills in the trials of a study: what each trains, as its attributes.

    Trials go to the budget that has the fewest. The first of each is the uniform plan, the second
    the static twin. `say` is told of a budget that has no more plans. fits: whether a plan can be
    trained here; one that cannot gives way to a neighbour.
    """

    def __init__(
        self,
        search: Search,
        budgets: Sequence[Budget],
        say: Callable[[str], object],
        fits: Callable[[Plan], bool] = lambda plan: True,
    ) -> None:
        self.search = search
        self.budgets = budgets
        self.say = say
        self.fits = fits
        self._exhausted: set[float] = set()

    def __call__(self, study: optuna.Study) -> FrozenTrial:
        """Raises SpaceExhausted if no budget has a plan that is not trained."""
        while True:
            known = study.get_trials(deepcopy=False)
            # One that was asked for and never begun comes first, under its number.
            left = [t for t in known if t.state == TrialState.RUNNING and LEASE not in t.user_attrs]
            number = left[0].number if left else _count(known)
            budget = self._next_budget([t for t in known if t.number != number])
            if budget is None:
                raise SpaceExhausted("all plans of every budget are trained")
            try:
                return self._fill(study, budget, known, left[0] if left else None, number)
            except SpaceExhausted as error:
                if len(self.budgets) == 1:
                    raise
                self._exhausted.add(budget.value)
                self.say(f"budget {budget.value:g}: {error}")

    def _next_budget(self, known: Sequence[FrozenTrial]) -> Budget | None:
        counts = dict.fromkeys((budget.value for budget in self.budgets), 0)
        for trial in known:
            if (value := budget_of(trial)) in counts:
                counts[value] += 1
        open_ = [budget for budget in self.budgets if budget.value not in self._exhausted]
        return min(open_, key=lambda budget: counts[budget.value], default=None)

    def _fill(
        self,
        study: optuna.Study,
        budget: Budget,
        known: Sequence[FrozenTrial],
        left: FrozenTrial | None,
        number: int,
    ) -> FrozenTrial:
        """Ask for trial `number`, or take up the one that is left, and note what it trains."""
        # By trial, so that a resumed study draws what an uninterrupted one would.
        seed = self.search.seed * 1_000_003 + number
        own = [t for t in known if budget_of(t) == budget.value and t.number != number]
        study.sampler = self._sampler(budget.value, seed, len(own))
        if left is None and not any(t.state == TrialState.WAITING for t in known):
            given = self._given(budget, own, known)
            if given is not None:
                study.enqueue_trial(given)
        trial = Trial(study, left._trial_id) if left else study.ask()
        assert trial.number == number
        if len(own) == 1 and budget.twin is not None:
            facts = _static_facts(budget.twin)
        else:
            facts = self._plan_facts(budget.space, trial, own, seed)
            if not own:
                facts[KIND] = UNIFORM
        if "params" not in study.get_trials(deepcopy=False)[number].constraints:
            trial.set_constraint("params", float(facts["params"] - budget.space.allowed))
        for key, fact in {**facts, BUDGET: budget.value}.items():
            trial.set_user_attr(key, fact)
        return study.get_trials(deepcopy=False)[number]

    def _given(
        self, budget: Budget, own: Sequence[FrozenTrial], known: Sequence[FrozenTrial]
    ) -> dict[str, Any] | None:
        """The parameters to try, where the sampler has no say."""
        if not own:
            return budget.space.start()
        if len(own) % _LEARN != 2:
            return None
        # Ratios are relative and shapes are choices: a point means the same under any budget.
        place = self.budgets.index(budget)
        beside = [self.budgets[i] for i in (place - 1, place + 1) if 0 <= i < len(self.budgets)]
        best = [best_of(t for t in known if budget_of(t) == other.value) for other in beside]
        tried = [trial.params for trial in own]
        return next((t.params for t in best if t is not None and t.params not in tried), None)

    def _plan_facts(
        self, space: Space, trial: Trial, own: Sequence[FrozenTrial], seed: int
    ) -> dict[str, Any]:
        sample = space.sample(trial)
        plans = [t.user_attrs.get(FINGERPRINT) for t in own if not is_static(t)]
        others = space.neighbours(sample, seed)
        for candidate in itertools.chain((sample,), others):
            plan = space.project(candidate)
            name = fingerprint(plan)
            if candidate.temperature_epochs is not None:
                name += f" temperature {candidate.temperature_epochs}"
            if (name not in plans or self.search.repeat) and self.fits(plan):
                break
        else:
            raise SpaceExhausted(
                f"{len(plans)} plans are trained and no other was found: widen search.space "
                "(split, cell_ratio, sharing, …) or ask for fewer trials"
            )
        cost = plan.cost()
        facts = {
            FINGERPRINT: name,
            "groups": plan.groups_to_list(),
            "params": cost.params.total,
            "macs": cost.macs.total,
        }
        if name in plans:
            facts[AGAIN] = plans.count(name)
        if candidate.temperature_epochs is not None:
            facts[TEMPERATURE] = candidate.temperature_epochs
        return facts

    def _sampler(self, budget: float, seed: int, place: int) -> BaseSampler:
        """The sampler of the trial at `place` among those of a budget."""
        search, samplers = self.search, optuna.samplers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if search.sampler == "random":
                return samplers.RandomSampler(seed=seed)
            if place < search.startup:
                # One sequence for the study: its own seed, and a place that the study counts.
                return samplers.QMCSampler(
                    seed=search.seed,
                    scramble=True,
                    independent_sampler=samplers.RandomSampler(seed=seed),
                    warn_asynchronous_seeding=False,
                    warn_independent_sampling=False,
                )
            sampler: BaseSampler
            if search.sampler == "gp":
                sampler = samplers.GPSampler(
                    seed=seed, n_startup_trials=0, warn_independent_sampling=False
                )
            elif search.sampler == "nsgaii":
                sampler = samplers.NSGAIISampler(seed=seed, population_size=GENERATION)
            else:
                sampler = samplers.TPESampler(
                    seed=seed,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                    n_startup_trials=0,
                )
        return _Within(budget, sampler) if len(self.budgets) > 1 else sampler


class _Within(BaseSampler):
    """A sampler to which the study's trials are those of one budget."""

    def __init__(self, budget: float, sampler: BaseSampler) -> None:
        self.budget = budget
        self.sampler = sampler

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.sampler.infer_relative_search_space(_OneBudget(study, self.budget), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        view = _OneBudget(study, self.budget)
        return self.sampler.sample_relative(view, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        view = _OneBudget(study, self.budget)
        return self.sampler.sample_independent(view, trial, param_name, param_distribution)


class _OneBudget(optuna.Study):
    """A study of which only the trials of one budget are seen."""

    def __init__(self, study: optuna.Study, budget: float) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self.budget = budget

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [t for t in super()._get_trials(*args, **kwargs) if budget_of(t) == self.budget]


def _count(known: Sequence[FrozenTrial]) -> int:
    """The number of the next trial."""
    return sum(trial.state != TrialState.WAITING for trial in known)


def _static_facts(twin: Twin) -> dict[str, Any]:
    return {
        KIND: STATIC,
        FINGERPRINT: f"static {twin.width:g}",
        "width": twin.width,
        "params": twin.params,
        "macs": twin.macs,
    }


def seed_of(study_seed: int, plan: str, again: int = 0) -> int:
    """The seed of a trial's training, by what it trains and how often that was trained before."""
    text = f"{study_seed} {plan}" + (f" again {again}" if again else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
