"""What is tried next of architectures: one within the limits that has not been trained, the largest
first; or a supernet that chooses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from kwlayers.plan import PlanError
from kwsearch import architectures
from kwsearch.driver import SpaceExhausted
from kwsearch.micronas.cycles import CycleError
from kwsearch.micronas.feasible import Feasible
from kwsearch.micronas.space import Architecture, Decision
from kwsearch.proposals import (
    asked_for,
    copy_of,
    entered,
    sampler_of,
    sampler_seed,
    without_doubles,
)
from kwsearch.recipe import Search
from kwsearch.trials import (
    AGAIN,
    ARCHITECTURE,
    FINGERPRINT,
    KIND,
    LARGEST,
    SUPERNET,
    WAREHOUSE,
)

# Random architectures that are looked at for one within the limits, or one that is new.
_DRAWS = 1000
# Where fewer of so many draws are within the limits, those nearest to so many others are tried.
_FEW, _TRIES = 10, 100
# From an option to the next one, when the nearest architecture within the limits is looked for.
_STEP = 0.05
_NONE = "none"  # of warehouses


class ArchitectureProposer:
    """Fills in the trials of a study: what each trains, as its attributes. All keep the limits.

    ratios: b of KernelWarehouse, to be tried on architectures that keep the limits with it.
    """

    def __init__(self, search: Search, feasible: Feasible, ratios: Sequence[float] = ()) -> None:
        self.search, self.feasible = search, feasible
        # Whether random architectures within the limits are: by the seed, however often it resumes.
        rng = Random(search.seed)
        drawn = (feasible.space.random(rng) for _ in range(_DRAWS))
        self._rare = sum(not feasible.broken(one) for one in drawn) < _FEW
        self._ratios = {_NONE: None, **{f"{ratio:g}": ratio for ratio in ratios}}

    def __call__(self, study: optuna.Study) -> FrozenTrial:
        """Raises SpaceExhausted if no architecture is found that is not trained."""
        known = without_doubles(study)
        left = asked_for(known)
        return entered(study, self._made(known)) if left is None else left

    def _made(self, known: Sequence[FrozenTrial]) -> FrozenTrial:
        if not known:
            return self._trial(self._costs(self.feasible.largest.architecture), {KIND: LARGEST})
        if self.search.strategy == "differentiable":
            number = sum(SUPERNET in trial.user_attrs for trial in known)
            facts = {SUPERNET: number, FINGERPRINT: f"supernet {number}"}
            return optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=facts)
        seed = sampler_seed(self.search, len(known))
        costs, attributes = self._wanted(known, seed)
        prints = [trial.user_attrs.get(FINGERPRINT) for trial in known]
        mark = costs[FINGERPRINT]
        if mark in prints and self.search.repeat:
            return self._trial(costs, {AGAIN: prints.count(mark)}, attributes)
        if mark in prints:
            costs = self._other(prints, Random(seed))
        return self._trial(costs, {}, attributes)

    def _wanted(
        self, known: Sequence[FrozenTrial], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the sampler asks for, or the nearest within the limits; and what it notes."""
        if self.search.sampler == "random" or len(known) < self.search.startup:
            return self._drawn(Random(seed)), {}
        study = copy_of(
            [trial for trial in known if trial.params],
            sampler_of(self.search, seed, len(known)),
        )
        trial = study.ask()
        chosen = {one.name: _suggested(trial, one) for one in self.feasible.space.decisions}
        ratio = None
        if len(self._ratios) > 1:
            ratio = self._ratios[str(trial.suggest_categorical(WAREHOUSE, list(self._ratios)))]
        attributes = dict(study.get_trials(deepcopy=False)[-1].system_attrs)
        return self._costs(nearest(self.feasible, chosen), ratio), attributes

    def _costs(self, architecture: Architecture, ratio: float | None = None) -> dict[str, Any]:
        """Its facts, with warehouses if it keeps the limits with them."""
        if ratio is not None:
            # Too few cells, or nobody knows how long making the kernels takes.
            with suppress(PlanError, CycleError):
                found = architectures.facts(self.feasible, architecture, ratio)
                if not architectures.broken(self.feasible, found):
                    return found
        return architectures.facts(self.feasible, architecture)

    def _drawn(self, rng: Random) -> dict[str, Any]:
        """One at random within the limits; where such are rare, the nearest to one at random."""
        space = self.feasible.space
        ratio = rng.choice([*self._ratios.values()])
        found = space.random(rng)
        for _ in range(0 if self._rare else _DRAWS):
            if not self.feasible.broken(found):
                return self._costs(found, ratio)
            found = space.random(rng)
        return self._costs(nearest(self.feasible, space.options(found)), ratio)

    def _other(self, prints: Sequence[str | None], rng: Random) -> dict[str, Any]:
        for number in range(_DRAWS):
            if self._rare and number >= _TRIES:
                break
            found = self._drawn(rng)
            if found[FINGERPRINT] not in prints:
                return found
        raise SpaceExhausted(
            f"{len(prints)} architectures are trained and no other was found: widen micronas or "
            "search.space.limits, or ask for fewer trials"
        )

    def _trial(
        self,
        costs: dict[str, Any],
        facts: dict[str, Any],
        attributes: dict[str, Any] | None = None,
    ) -> FrozenTrial:
        space = self.feasible.space
        params: dict[str, Any] = space.options(Architecture.from_dict(costs[ARCHITECTURE]))
        kinds: dict[str, BaseDistribution] = {
            one.name: distribution_of(one) for one in space.decisions
        }
        if len(self._ratios) > 1:
            ratio = costs.get(WAREHOUSE)
            params[WAREHOUSE] = next(name for name, b in self._ratios.items() if b == ratio)
            kinds[WAREHOUSE] = CategoricalDistribution(list(self._ratios))
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=kinds,
            user_attrs={**costs, **facts},
            system_attrs=attributes or {},
        )


def nearest(feasible: Feasible, chosen: dict[str, int]) -> Architecture:
    """The architecture within the limits with the fewest steps from these options to its own."""
    mixture = {}
    for one in feasible.space.decisions:
        steps = torch.arange(len(one.options), dtype=torch.float64)
        steps = (steps - one.options.index(chosen[one.name])).abs()
        mixture[one.name] = torch.softmax(steps * torch.tensor(_STEP).double().log(), 0)
    return feasible.best(mixture).architecture


def _suggested(trial: optuna.trial.Trial, one: Decision) -> int:
    spaced = distribution_of(one)
    if isinstance(spaced, IntDistribution):
        return trial.suggest_int(one.name, spaced.low, spaced.high, step=spaced.step)
    return int(trial.suggest_categorical(one.name, spaced.choices))  # type: ignore[arg-type]


def distribution_of(one: Decision) -> IntDistribution | CategoricalDistribution:
    """Widths that are evenly spaced have an order that a sampler can use."""
    gaps = {b - a for a, b in pairwise(one.options)}
    if len(one.options) > 2 and len(gaps) == 1:
        return IntDistribution(one.options[0], one.options[-1], step=gaps.pop())
    return CategoricalDistribution(one.options)
