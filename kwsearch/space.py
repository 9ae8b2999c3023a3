"""The search space: shapes of warehouses and a split of the budget, always on the budget.

A sample is a choice of cell ratio, sharing, reduction and basis, and one weight per warehouse:
its ratio relative to the common one. Projection solves for the common ratio, so that every
sample is a plan at or under the budget that cannot take one more cell.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import Network, Plan
from kwlayers.planner import Layout, Settings, lay_out
from kwlayers.solver import floor_params, solve
from kwsearch.budget import Target, meet

if TYPE_CHECKING:
    import optuna

    from kwsearch.recipe import Space as SpaceSection

DIMENSIONS = ("cell_ratio", "sharing", "reduction", "basis_ratio")


@dataclass(frozen=True)
class Sample:
    """A point of the space. weights: by warehouse name, 1 for the common ratio."""

    settings: Settings
    weights: dict[str, float]


class Space:
    """What may vary around `settings`, and the parameters that every plan may use.

    Raises kwlayers.BudgetError if `settings` itself cannot meet the target.
    """

    def __init__(
        self, network: Network, settings: Settings, target: Target, section: SpaceSection
    ) -> None:
        self.network = network
        self.settings = settings
        self.split = section.split
        self.uniform: Plan = meet(network, target, settings).plan
        # A ratio is met by its uniform plan; others may spend as many parameters.
        self.allowed = (
            self.uniform.cost().params.total
            if target.ratio is not None
            else target.params_of(network)
        )
        self.choices: dict[str, list[Any]] = {}
        for name in DIMENSIONS:
            own = getattr(settings, name)
            others = [value for value in getattr(section, name) if value != own]
            self.choices[name] = [own, *others]

    @property
    def combinations(self) -> int:
        """How many shapes there are, before the split."""
        total = 1
        for values in self.choices.values():
            total *= len(values)
        return total

    def start(self) -> dict[str, Any]:
        """The parameters of the uniform plan: the recipe's own settings, all weights 1."""
        start: dict[str, Any] = {
            name: _label(values[0]) for name, values in self.choices.items() if len(values) > 1
        }
        if self.split > 1:
            for group in self._layout(self.settings).groups:
                start[self._weight_name(self.settings, group.name)] = 1.0
        return start

    def sample(self, trial: optuna.trial.BaseTrial) -> Sample:
        """Ask `trial` for a point. A shape that cannot meet the budget becomes its neighbour."""
        chosen = {}
        for name, values in self.choices.items():
            labels: dict[Any, Any] = {_label(value): value for value in values}
            chosen[name] = (
                labels[trial.suggest_categorical(name, list(labels))]
                if len(values) > 1
                else values[0]
            )
        settings = self._reachable(dataclasses.replace(self.settings, **chosen))
        weights = {group.name: 1.0 for group in self._layout(settings).groups}
        if self.split > 1:
            for name in weights:
                weights[name] = trial.suggest_float(
                    self._weight_name(settings, name), 1 / self.split, self.split, log=True
                )
        return Sample(settings, weights)

    def nudge(self, sample: Sample, seed: int) -> Sample:
        """A neighbour of `sample`, for when its plan is already known."""
        rng = random.Random(seed)
        settings = sample.settings
        if self.split == 1:
            settings = self._reachable(
                dataclasses.replace(
                    settings, **{name: rng.choice(self.choices[name]) for name in DIMENSIONS}
                )
            )
            return Sample(settings, {g.name: 1.0 for g in self._layout(settings).groups})
        weights = {
            name: min(max(weight * rng.uniform(0.8, 1.25), 1 / self.split), self.split)
            for name, weight in sample.weights.items()
        }
        return Sample(settings, weights)

    def project(self, sample: Sample) -> Plan:
        """The plan of a sample: at most `allowed` parameters, and no room for one more cell."""
        if sample.settings == self.settings and set(sample.weights.values()) == {1.0}:
            return self.uniform
        layout = self._layout(sample.settings)
        weights = [sample.weights[group.name] for group in layout.groups]
        solutions = solve(layout.variables(weights), self.allowed - layout.static_params)
        # Trials are compared at equal parameters: of the roundings, the one that leaves least.
        return layout.plan(max(solutions, key=lambda s: (s.params, -s.spread)))

    def _weight_name(self, settings: Settings, warehouse: str) -> str:
        sharing = settings.sharing if isinstance(settings.sharing, str) else "groups"
        return f"weight/{sharing}/{warehouse}"

    def _layout(self, settings: Settings) -> Layout:
        return self._known[settings]

    @functools.cached_property
    def _known(self) -> _Layouts:
        return _Layouts(self.network)

    def _reachable(self, settings: Settings) -> Settings:
        """`settings` if one cell per warehouse fits the budget, else the nearest that do."""
        for other in self._by_distance(settings):
            layout = self._layout(other)
            if floor_params(layout.variables()) + layout.static_params <= self.allowed:
                return other
        return self.settings

    def _by_distance(self, settings: Settings) -> list[Settings]:
        """All combinations, by how many choices differ from `settings`."""
        combinations = [
            dict(zip(DIMENSIONS, values, strict=True))
            for values in itertools.product(*(self.choices[name] for name in DIMENSIONS))
        ]
        combinations.sort(
            key=lambda c: sum(c[name] != getattr(settings, name) for name in DIMENSIONS)
        )
        return [dataclasses.replace(settings, **combination) for combination in combinations]


class _Layouts:
    """Layouts by settings, made once."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.made: dict[str, Layout] = {}

    def __getitem__(self, settings: Settings) -> Layout:
        key = repr(settings)
        if key not in self.made:
            self.made[key] = lay_out(self.network, settings)
        return self.made[key]


def fingerprint(plan: Plan) -> str:
    """The same for plans that build the same network, whatever led to them."""
    groups = [{k: v for k, v in g.items() if k != "name"} for g in plan.groups_to_list()]
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


def _label(value: Any) -> str | float:
    """What the study shows for a choice."""
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return value if isinstance(value, str) else float(value)
