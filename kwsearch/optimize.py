"""The search for a plan: every trial is one on the budget, trained by the recipe's proxy.

The first trials of a budget are its baselines, which always finish: the uniform plan and a static
network within the budget, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from kwsearch import dry_run, networks
from kwsearch.data import Videos
from kwsearch.driver import SpaceExhausted
from kwsearch.dry_run import PlanForecast
from kwsearch.failures import StudyFailed
from kwsearch.latency.plans import PlanLatency
from kwsearch.latency.table import TableError
from kwsearch.proposals import Budget, Proposer
from kwsearch.resolve import (
    check_replannable,
    create_model,
    input_of,
    located,
    network_of,
    outputs_of,
    settings_of,
    targets_of,
)
from kwsearch.results import Found, Result, under, write_best
from kwsearch.run_directory import JOURNAL, SearchError
from kwsearch.sign_data import NEEDS
from kwsearch.space import Space, fingerprint
from kwsearch.static_twin import NoTwin, Twin, static_twin
from kwsearch.study import Study
from kwsearch.train_step import train_bytes

if TYPE_CHECKING:
    from kwlayers.plan import Network, Plan
    from kwsearch.labelled_data import LabelledData
    from kwsearch.sign_data import SignData

__all__ = ["JOURNAL", "PlanStudy", "Result", "SearchError", "SpaceExhausted", "StudyFailed"]


class PlanStudy(Study):
    """A search for a plan. Raises SearchError for a recipe without a budget, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted: dict[str, int] = {}

    def _check_recipe(self) -> None:
        self.targets = targets_of(self.recipe)
        if not self.targets:
            raise SearchError("the recipe has no budget to search under: add budget: {ratio: 0.5}")
        check_replannable(self.recipe)
        super()._check_recipe()
        search = self.search
        for name in ("peak_memory", "flash"):
            if getattr(search.space.limits, name) is not None:
                raise SearchError(
                    f"search.space.limits.{name}: of the architectures of micronas; plans have "
                    "macs, train_memory and latency_ms"
                )
        if search.strategy != "sampler":
            raise SearchError(
                f"search.strategy {search.strategy}: trains a supernet, which micronas has: leave "
                "it out"
            )
        if search.sampler == "nsgaii" and len(self.targets) > 1:
            raise SearchError(
                "search.sampler nsgaii breeds one population, search.budgets needs one for each: "
                "use tpe, gp or random"
            )
        if self.proxy.starts_static and search.space.temperature_epochs:
            raise SearchError(
                f"search.space.temperature_epochs: with proxy.init {self.proxy.init} the "
                "temperature is 0: leave one of them out"
            )
        longest = max(search.space.temperature_epochs, default=0)
        if longest > self.proxy.epochs:
            raise SearchError(
                f"search.space.temperature_epochs: {longest} is more than proxy.epochs, "
                f"{self.proxy.epochs}"
            )

    def _proposer(self) -> Callable[[optuna.Study], FrozenTrial]:
        return Proposer(self.search, self.budgets, self.watcher.say, self._fits)

    def _slot_bytes(self) -> int:
        return self._train_bytes(self.budgets[-1].space.uniform)

    def _write(self, path: Path, found: Found) -> Path | None:
        recipe = under(self.recipe, found.budget)
        return write_best(path, recipe, self.network, found, self._provenance, self.trust)

    def _trace(self) -> Network:
        """The network, which must be one that trains on images. Raises PlanError."""
        network = network_of(self.recipe, self.trust)
        size = network.input_size
        if len(size) != 3 and not (len(size) == 4 and self._reads_signs()):
            raise SearchError(
                f"{self.recipe.model.name} takes inputs of {'x'.join(map(str, size))}: a search "
                "trains on images, sound and sensors, CxHxW, or on videos with sentences by a "
                "network for sign language, as sign_resnet18"
            )
        if len(size) == 4 and self.search.zero_cost is not None:
            raise SearchError(
                "search.zero_cost: scores of untrained networks are of classified images, not of "
                "videos with sentences"
            )
        outputs_of(self.recipe, size, self.trust)
        return network

    def _reads_signs(self) -> bool:
        choice = self.recipe.model
        model = networks.planning_model(
            choice.name, self.recipe.input, choice.num_classes, self.trust
        )
        return all(hasattr(model, name) for name in NEEDS)

    def _prepare(self) -> None:
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

    def forecast(self) -> PlanForecast:
        """What the search would be, without starting it and without data."""
        self._prepare()
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

    def _check_fit(self, data: LabelledData | SignData) -> None:
        size = tuple(self.network.input_size)
        if not isinstance(data.train, Videos):
            size = (data.channels, *data.train.x.shape[-2:])
        outputs = outputs_of(self.recipe, size, self.trust)
        if outputs < data.train.num_classes:
            raise SearchError(
                f"{data.train.name} has {data.train.num_classes} classes, the model "
                f"{outputs}: set model.num_classes={data.train.num_classes}"
            )
