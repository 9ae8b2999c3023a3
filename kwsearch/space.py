"""The search space: shapes of warehouses and a split of the budget, always on the budget.

A sample is a choice of cell ratio, sharing, reduction and basis, and for each warehouse its
ratio relative to the common one. Projection solves for the common ratio, so that every
sample is a plan at or under the budget that cannot take one more cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import Network, Plan
from kwlayers.planner import Layout, Settings, lay_out
from kwlayers.solver import floor_params
from kwsearch.budget import Target, meet

if TYPE_CHECKING:
    import optuna

    from kwsearch.recipe import Space as SpaceSection

DIMENSIONS = ("cell_ratio", "sharing", "reduction", "basis_ratio")


@dataclass(frozen=True)
class Sample:
    """A point of the space. relative: each warehouse's ratio over the common one, by name."""

    settings: Settings
    relative: dict[str, float]


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
        self._layouts: dict[str, Layout] = {}
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

    def start(self) -> dict[str, Any]:
        """The trial of the uniform plan: the recipe's own settings, all ratios equal."""
        start: dict[str, Any] = {
            name: _label(values[0]) for name, values in self.choices.items() if len(values) > 1
        }
        if self.split > 1:
            for name in self._even(self.settings):
                start[self._ratio_name(self.settings, name)] = 1.0
        return start

    def sample(self, trial: optuna.trial.BaseTrial) -> Sample:
        """Ask `trial` for a point. A shape that cannot meet the budget becomes its neighbour."""
        chosen = {}
        for name, values in self.choices.items():
            if len(values) > 1:
                labels: dict[Any, Any] = {_label(value): value for value in values}
                chosen[name] = labels[trial.suggest_categorical(name, list(labels))]
        settings = self._reachable(dataclasses.replace(self.settings, **chosen))
        relative = self._even(settings)
        if self.split > 1:
            for name in relative:
                relative[name] = trial.suggest_float(
                    self._ratio_name(settings, name), 1 / self.split, self.split, log=True
                )
        return Sample(settings, relative)

    def neighbours(self, sample: Sample, seed: int) -> Iterator[Sample]:
        """Other points, the nearest first, for when the plan of `sample` is already known."""
        rng = random.Random(seed)
        if self.split > 1:
            for reach in (1.1, 1.3, 2.0, self.split):
                for _ in range(20):
                    moved = {
                        name: min(max(r * reach ** rng.uniform(-1, 1), 1 / self.split), self.split)
                        for name, r in sample.relative.items()
                    }
                    yield Sample(sample.settings, moved)
        shapes = [self._reachable(shape) for shape in self._by_distance(sample.settings)]
        for shape in shapes:
            yield Sample(shape, self._even(shape))
        if self.split > 1:
            for shape in shapes * 20:
                relative = {name: self.split ** rng.uniform(-1, 1) for name in self._even(shape)}
                yield Sample(shape, relative)

    def _even(self, settings: Settings) -> dict[str, float]:
        return {group.name: 1.0 for group in self._layout(settings).groups}

    def project(self, sample: Sample) -> Plan:
        """The plan of a sample: at most `allowed` parameters, and no room for one more cell."""
        if sample.settings == self.settings and set(sample.relative.values()) == {1.0}:
            return self.uniform
        layout = self._layout(sample.settings)
        relative = [sample.relative[group.name] for group in layout.groups]
        solutions = layout.solutions(self.allowed, relative)
        # Trials are compared at equal parameters: of the roundings, the one that leaves least.
        return layout.plan(max(solutions, key=lambda s: (s.params, -s.spread)))

    def _ratio_name(self, settings: Settings, warehouse: str) -> str:
        sharing = settings.sharing if isinstance(settings.sharing, str) else "groups"
        return f"relative_ratio/{sharing}/{warehouse}"

    def _layout(self, settings: Settings) -> Layout:
        """Made once: by text, since explicit groups make settings unhashable."""
        key = repr(settings)
        if key not in self._layouts:
            self._layouts[key] = lay_out(self.network, settings)
        return self._layouts[key]

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


def fingerprint(plan: Plan) -> str:
    """The same for plans that build the same network, whatever led to them."""
    groups = [{k: v for k, v in g.items() if k != "name"} for g in plan.groups_to_list()]
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


def _label(value: Any) -> str | float:
    """What the study shows for a choice."""
    if isinstance(value, Mapping):
        return "groups"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return value if isinstance(value, str) else float(value)
