"""What is tried next: a plan on the budget that has not been trained, or a baseline."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from kwlayers.plan import Plan
from kwsearch.driver import SpaceExhausted
from kwsearch.latency.table import TableError
from kwsearch.recipe import Search
from kwsearch.space import Space, fingerprint
from kwsearch.static_twin import Twin
from kwsearch.trials import (
    AGAIN,
    BUDGET,
    DOUBLE,
    FINGERPRINT,
    KIND,
    LATENCY,
    LEASE,
    REASON,
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
# Coordinates of an even start; parameters beyond them use them again.
_DIMENSIONS = 64


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
        known = without_doubles(study)
        if (left := asked_for(known)) is not None:
            return left
        while (budget := self._next_budget(known)) is not None:
            try:
                made = self._fill(budget, known)
            except SpaceExhausted as error:
                if len(self.budgets) == 1:
                    raise
                self._exhausted.add(budget.value)
                self.say(f"budget {budget.value:.12g}: {error}")
            else:
                return entered(study, made)
        raise SpaceExhausted("all plans of every budget are trained")

    def _next_budget(self, known: Sequence[FrozenTrial]) -> Budget | None:
        counts = dict.fromkeys((budget.value for budget in self.budgets), 0)
        for trial in known:
            if (value := budget_of(trial)) in counts:
                counts[value] += 1
        open_ = [budget for budget in self.budgets if budget.value not in self._exhausted]
        return min(open_, key=lambda budget: counts[budget.value], default=None)

    def _fill(self, budget: Budget, known: Sequence[FrozenTrial]) -> FrozenTrial:
        """The next trial, with what it trains: asked of a copy of the study that has the plans of
        one budget only. Static networks have no choices, and other budgets other accuracies.
        """
        seed = sampler_seed(self.search, len(known))
        own = [trial for trial in known if budget_of(trial) == budget.value]
        study = copy_of(
            [trial for trial in own if not is_static(trial)],
            sampler_of(self.search, seed, len(own)),
        )
        given = self._given(budget, own, known)
        if given is not None:
            study.enqueue_trial(given)
        trial = study.ask()
        if len(own) == 1 and budget.twin is not None:
            facts = _static_facts(budget.twin)
        else:
            facts = self._plan_facts(budget.space, trial, own, seed)
            if not own:
                facts[KIND] = UNIFORM
        trial.set_constraint("params", float(facts["params"] - budget.space.allowed))
        for key, fact in {**facts, BUDGET: budget.value}.items():
            trial.set_user_attr(key, fact)
        return study.get_trials(deepcopy=False)[-1]

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
            "params": cost.deployed,
            "macs": cost.macs.total,
        }
        if space.latency is not None:
            with suppress(TableError):  # it says nothing about this plan, and there is no limit
                facts[LATENCY] = space.latency(plan).ms
        if name in plans:
            facts[AGAIN] = plans.count(name)
        if candidate.temperature_epochs is not None:
            facts[TEMPERATURE] = candidate.temperature_epochs
        return facts


def sampler_seed(search: Search, trials: int) -> int:
    """By trial, so that a resumed study draws what an uninterrupted one would."""
    return (search.seed * 1_000_003 + trials) % 2**32


def sampler_of(search: Search, seed: int, place: int) -> BaseSampler:
    """The sampler of the trial at `place` among those of its budget."""
    samplers = optuna.samplers
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if place < search.startup:
        return _Even(search.seed, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
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


class _Even(BaseSampler):
    """The point at `place` of a scrambled Sobol sequence, a coordinate per parameter asked for.

    Evenly spread over the choices, which are asked for first, whatever has been tried and whoever
    asks.
    """

    def __init__(self, seed: int, place: int) -> None:
        from scipy.stats import qmc

        sequence = qmc.Sobol(_DIMENSIONS, scramble=True, seed=seed)
        if place:
            sequence.fast_forward(place)
        self._point = itertools.cycle(sequence.random(1)[0].tolist())

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        share: float = next(self._point)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[int(share * len(param_distribution.choices))]
        assert isinstance(param_distribution, FloatDistribution)
        low, high = math.log(param_distribution.low), math.log(param_distribution.high)
        return math.exp(low + share * (high - low))


def copy_of(trials: Sequence[FrozenTrial], sampler: BaseSampler) -> optuna.Study:
    """A study in memory that has these trials: all that a sampler looks at, if it looks."""
    if isinstance(sampler, (optuna.samplers.RandomSampler, _Even)):
        trials = ()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(
        [
            optuna.trial.create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions=trial.distributions,
                intermediate_values=trial.intermediate_values,
                system_attrs=trial.system_attrs,
            )
            for trial in trials
        ]
    )
    return study


def asked_for(known: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """A trial that an earlier driver asked for, and that never began."""
    left = (t for t in known if t.state == TrialState.RUNNING and LEASE not in t.user_attrs)
    return next(left, None)


def entered(study: optuna.Study, made: FrozenTrial) -> FrozenTrial:
    """A new trial of a study: at once, so that a kill leaves all of it or nothing."""
    count = len(study.get_trials(deepcopy=False))
    study._storage.create_new_trial(study._study_id, template_trial=made)
    return study.get_trials(deepcopy=False)[count]


def without_doubles(study: optuna.Study) -> list[FrozenTrial]:
    """Its trials. A database that made one, and went away before it said so, made another: told."""
    found, seen = [], set()
    for trial in study.get_trials(deepcopy=False):
        facts = trial.user_attrs
        one = facts.get(FINGERPRINT), budget_of(trial), facts.get(AGAIN, 0)
        if DOUBLE in facts:
            continue
        if (
            one[0] is not None
            and one in seen
            and trial.state == TrialState.RUNNING
            and LEASE not in facts
        ):
            for key in (DOUBLE, REASON):
                study._storage.set_trial_user_attr(trial._trial_id, key, "made twice")
            study.tell(trial.number, state=TrialState.FAIL)
            continue
        seen.add(one)
        found.append(trial)
    return found


def _static_facts(twin: Twin) -> dict[str, Any]:
    facts = {
        KIND: STATIC,
        FINGERPRINT: f"static {twin.width:g}",
        "width": twin.width,
        "params": twin.params,
        "macs": twin.macs,
    }
    return facts if twin.latency_ms is None else {**facts, LATENCY: twin.latency_ms}


def seed_of(study_seed: int, plan: str, again: int = 0) -> int:
    """The seed of a trial's training, by what it trains and how often that was trained before."""
    text = f"{study_seed} {plan}" + (f" again {again}" if again else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
