"""The search space: shapes of warehouses and a split of the budget, always on the budget.

A sample is a shape (the method, and how the network is cut into warehouses or what else its groups
are) and for each warehouse its ratio relative to the common one. Projection solves for the common
ratio, so that every sample is a plan that spends the budget, less at most the tolerance, and keeps
the limits. (A method whose groups do not grow spends what it needs.)

That is by construction: a shape counts only with an anchor, a split for which its plan does
all this; a sample whose own plan does not is moved towards the anchor until it does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import Layout, MethodSettings
from kwlayers.plan import Group, Network, Plan, PlanError
from kwlayers.planner import BudgetError, lay_out
from kwlayers.sharing import Sharing, stage_of
from kwsearch.budget import Target, meet
from kwsearch.shapes import METHOD, Shape, applies, changed, choices_around, value_of
from kwsearch.spreading import Warehouse, exchange, spread

if TYPE_CHECKING:
    import optuna

    from kwsearch.latency.predict import Latency
    from kwsearch.recipe import Space as SpaceSection

_OWN = "kernel_warehouse"
_STEPS = 8  # from a sample to its shape's anchor
_TILTS = 8  # how many splits for the fewest MACs are tried for a shape
_DRAWS = 1000  # random neighbours, over all shapes


@dataclass(frozen=True)
class Sample:
    """A point of the space. relative: each warehouse's ratio over the common one, by name.

    temperature_epochs: epochs over which the temperature falls to 0; None is the proxy's.
    """

    shape: Shape
    relative: dict[str, float]
    temperature_epochs: int | None = None


class Space:
    """What may vary around `settings`, and the parameters that every plan may use.

    uniform: the plan of `settings` with all ratios equal, or of the nearest shape that meets
    the target and the limits. allowed: parameters that every plan has at most. least: and at
    least. latency: of a plan; its interval's upper end keeps the limit of it. Raises
    kwlayers.BudgetError if no shape does, PlanError for settings that cannot be.
    """

    def __init__(
        self,
        network: Network,
        settings: MethodSettings,
        target: Target,
        section: SpaceSection,
        latency: Callable[[Plan], Latency] | None = None,
    ) -> None:
        self.network = network
        self.split = section.split
        self._common = target.ratio or 1.0
        self.max_macs = section.limits.macs
        self.latency, self.max_ms = latency, section.limits.latency_ms
        self._untold = ""  # why the table says nothing about some plan
        self._layouts: dict[str, Layout] = {}
        self._outlooks: dict[str, _Outlook] = {}
        self._sizes: dict[Group, Warehouse] = {}
        self._floors: dict[str, _Floor] = {}
        self._stages: dict[str, int] = {}
        own = Shape(settings)
        if section.sharing_by_stage:
            if not isinstance(settings.sharing, str):
                raise PlanError(
                    "search.space.sharing_by_stage: the method's sharing is explicit groups; "
                    "allowed with stage, position or layer"
                )
            if not set(section.sharing) - {settings.sharing}:
                raise PlanError(
                    "search.space.sharing_by_stage: there is nothing to choose from; list rules "
                    f"besides {settings.sharing!r} in search.space.sharing"
                )
            rule = settings.sharing
            self._stages = stage_of(network)
            found = sorted(set(self._stages.values()))
            own = Shape(settings, stage_sharing=tuple((stage, rule) for stage in found))
        self.choices = choices_around(own, section)
        self.temperatures = (None, *section.temperature_epochs)
        for shape in self._by_distance(own, 1):  # what no choice can be is said before the search
            self._layout(shape)

        below: BudgetError | None = None
        uniform: Plan | None = None
        try:
            uniform = meet(network, target, settings).plan
        except BudgetError as error:
            below = error
        if uniform is not None and target.ratio is not None:
            # A ratio is met by its uniform plan; others may spend as many parameters.
            self.allowed = uniform.cost().deployed
        else:
            self.allowed = target.params_of(network)
        self.least = math.ceil(self.allowed * (1 - section.tolerance))
        self._start = self._approach(own)
        if self._anchor(self._start) is None:
            raise self._out_of_reach(self._start, below)
        if uniform is None or self._start != own or not self._is_valid(uniform):
            layout, anchor = self._layout(self._start), self._anchor(self._start)
            assert anchor is not None
            uniform = self._plan(layout, anchor)
        self.uniform: Plan = uniform

    def size(self) -> int:
        """Combinations of choices. The split over the warehouses, which is continuous, aside."""
        rest = [name for name in self.choices if name != METHOD]
        shapes = sum(
            math.prod(len(self._values(start, name)) for name in rest) for start in self._starts()
        )
        return shapes * len(self.temperatures)

    def warehouses(self) -> tuple[int, int]:
        """The fewest and the most warehouses of a shape: the dimensions of the split."""
        counts = []
        for start in self._starts():
            cutting = {
                name: self._values(start, name)
                for name in self.choices
                if name in ("spatial_partition", "keep_static")
            }
            sharing = [name for name in self.choices if name.startswith("sharing")]
            rules = self._values(start, sharing[0]) if sharing else (None,)
            for values in itertools.product(*cutting.values(), rules):
                changes = dict(zip(cutting, values, strict=False))
                changes.update(dict.fromkeys(sharing, values[-1]))
                counts.append(len(self._layout(changed(start, changes)).groups))
        return min(counts), max(counts)

    def _starts(self) -> list[Shape]:
        """The start by each method."""
        return [changed(self._start, {METHOD: m}) for m in self.choices.get(METHOD, [])] or [
            self._start
        ]

    def _values(self, shape: Shape, name: str) -> Sequence[Any]:
        """What a dimension may be in a shape, whose method may not have it: then what it is."""
        return self.choices[name] if applies(shape, name) else (value_of(shape, name),)

    def valid_share(self, samples: int, seed: int) -> float:
        """The share of random samples whose plans are on the budget and under the limits."""
        rng = random.Random(seed)
        valid = sum(self._is_valid(self.project(self.random(rng))) for _ in range(samples))
        return valid / samples

    def start(self) -> dict[str, Any]:
        """The trial of the uniform plan: the recipe's own settings, all ratios equal."""
        start: dict[str, Any] = {
            name: _label(value_of(self._start, name))
            for name, values in self.choices.items()
            if len(values) > 1 and applies(self._start, name)
        }
        if len(self.temperatures) > 1:
            start["temperature_epochs"] = _label(None)
        if self.split > 1:
            for name in self._even(self._start):
                start[self._ratio_name(self._start, name)] = 1.0
        return start

    def sample(self, trial: optuna.trial.BaseTrial) -> Sample:
        """Ask `trial` for a point. A shape that cannot meet the budget becomes its neighbour."""

        def choose(name: str, values: Sequence[Any]) -> Any:
            labels: dict[Any, Any] = {_label(value): value for value in values}
            return labels[trial.suggest_categorical(name, list(labels))]

        def ratio(name: str) -> float:
            return trial.suggest_float(name, 1 / self.split, self.split, log=True)

        return self._draw(choose, ratio)

    def random(self, rng: random.Random) -> Sample:
        """A point drawn as a random sampler draws it."""
        return self._draw(
            lambda name, values: rng.choice(values),
            lambda name: self.split ** rng.uniform(-1, 1),
        )

    def neighbours(self, sample: Sample, seed: int) -> Iterator[Sample]:
        """Other points, the nearest first, for when the plan of `sample` is already known."""
        rng = random.Random(seed)
        temperature = sample.temperature_epochs
        if self.split > 1:
            for reach in (1.1, 1.3, 2.0, self.split):
                for _ in range(20):
                    moved = {
                        name: min(max(r * reach ** rng.uniform(-1, 1), 1 / self.split), self.split)
                        for name, r in sample.relative.items()
                    }
                    yield Sample(sample.shape, moved, temperature)
        shapes = []
        for shape in self._by_distance(sample.shape):
            if self._anchor(shape) is not None:
                shapes.append(shape)
                yield Sample(shape, self._even(shape), temperature)
        for shape, other in itertools.product(shapes, self.temperatures):
            if other != temperature:
                yield Sample(shape, self._even(shape), other)
        if self.split > 1:
            for shape in itertools.islice(itertools.cycle(shapes), max(_DRAWS, len(shapes))):
                relative = {name: self.split ** rng.uniform(-1, 1) for name in self._even(shape)}
                yield Sample(shape, relative, temperature)

    def extremes(self) -> Iterator[Plan]:
        """Plans that between them have every choice of each dimension, and under each both ends of
        the split for every warehouse.
        """
        for shape in self._by_distance(self._start, 1):
            if self._anchor(shape) is None:
                continue
            even = self._even(shape)
            yield self.project(Sample(shape, even))
            if self.split > 1:
                for first in (0, 1):
                    ends = {name: self.split ** (-1) ** (i + first) for i, name in enumerate(even)}
                    yield self.project(Sample(shape, ends))

    def project(self, sample: Sample) -> Plan:
        """The plan of a sample: on the budget, and no room for one more cell."""
        if sample.shape == self._start and set(sample.relative.values()) == {1.0}:
            return self.uniform
        layout, anchor = self._layout(sample.shape), self._anchor(sample.shape)
        assert anchor is not None, f"{sample.shape} cannot meet the budget"
        own = [sample.relative[group.name] for group in layout.groups]
        for step in range(_STEPS):
            part = step / _STEPS
            plan = self._plan(
                layout, [r ** (1 - part) * a**part for r, a in zip(own, anchor, strict=True)]
            )
            if self._is_valid(plan):
                return plan
        return self._plan(layout, anchor)

    def _draw(
        self, choose: Callable[[str, Sequence[Any]], Any], ratio: Callable[[str], float]
    ) -> Sample:
        shape = self._start
        for name, values in self.choices.items():  # the method first
            if len(values) > 1 and applies(shape, name):
                shape = changed(shape, {name: choose(name, values)})
        temperature = None
        if len(self.temperatures) > 1:
            temperature = choose("temperature_epochs", self.temperatures)
        shape = self._reachable(shape)
        relative = self._even(shape)
        if self.split > 1:
            relative = {name: ratio(self._ratio_name(shape, name)) for name in relative}
        return Sample(shape, relative, temperature)

    def _even(self, shape: Shape) -> dict[str, float]:
        return {group.name: 1.0 for group in self._layout(shape).groups}

    def _ratio_name(self, shape: Shape, warehouse: str) -> str:
        sharing = shape.settings.sharing if isinstance(shape.settings.sharing, str) else "groups"
        if shape.stage_sharing:
            sharing = "by_stage"
        if shape.settings.method != _OWN:
            sharing = shape.settings.method
        return f"relative_ratio/{sharing}/{warehouse}"

    def _layout(self, shape: Shape) -> Layout:
        """Made once: by text, since explicit groups make settings unhashable."""
        key = repr(shape)
        if key not in self._layouts:
            self._layouts[key] = lay_out(
                self.network,
                shape.settings,
                keep_static=shape.keep_static,
                stage_sharing=dict(shape.stage_sharing),
            )
        return self._layouts[key]

    def _plan(self, layout: Layout, relative: Sequence[float]) -> Plan:
        """The plan of a split, which may still miss the band or a limit."""
        if (enough := layout.enough(self.allowed)) is not None:
            return enough
        spend = self.allowed - layout.static_params
        warehouses = self._warehouses(layout)
        own = [ratio or self._common for ratio in layout.own_ratios]
        relative = [r * o / self._common for r, o in zip(relative, own, strict=True)]
        cells = spread(warehouses, relative, spend)
        total = sum(w.params(n) for w, n in zip(warehouses, cells, strict=True))
        if layout.static_params + total < self.least:
            cells = exchange(warehouses, relative, cells, spend, spend - self.allowed + self.least)
        return layout.sized(cells)

    def _warehouses(self, layout: Layout) -> list[Warehouse]:
        """Shapes have many warehouses in common, so their sizes are remembered."""
        if any(group not in self._sizes for group in layout.groups):
            for group, variable in zip(layout.groups, layout.variables(), strict=True):
                self._sizes.setdefault(group, Warehouse(variable))
        return [self._sizes[group] for group in layout.groups]

    def _is_valid(self, plan: Plan) -> bool:
        """In the band and under the limits, all of them exact."""
        cost = plan.cost()
        # More would be idle where groups do not grow.
        least = self.least if all(group.grows for group in plan.groups) else 0
        if not least <= cost.deployed <= self.allowed:
            return False
        if self.max_macs is not None and cost.macs.total > self.max_macs:
            return False
        return self.max_ms is None or self._ms(plan) <= self.max_ms

    def _ms(self, plan: Plan) -> float:
        """The most that the latency may be; 0 where nobody asks, inf where nobody knows."""
        if self.max_ms is None:
            return 0.0
        assert self.latency is not None, "a limit of latency without a table"
        try:
            return self.latency(plan).high
        except PlanError as error:
            self._untold = str(error)
            return math.inf

    def _anchor(self, shape: Shape) -> list[float] | None:
        """Relative ratios for which the shape's plan is valid, None if none are found."""
        return self._outlook(shape).anchor

    def _outlook(self, shape: Shape) -> _Outlook:
        key = repr(shape)
        if key not in self._outlooks:
            self._outlooks[key] = self._look(shape)
        return self._outlooks[key]

    def _look(self, shape: Shape) -> _Outlook:
        excess = self._floor(shape) - self.allowed
        if excess > 0:
            return _Outlook(None, (excess, 0, 0.0))
        layout, misses = self._layout(shape), []
        for relative in self._candidates(self._warehouses(layout)):
            plan = self._plan(layout, relative)
            if self._is_valid(plan):
                return _Outlook(relative)
            cost = plan.cost()
            missed = max(self.least - cost.deployed, 0)
            over = 0 if self.max_macs is None else max(cost.macs.total - self.max_macs, 0)
            misses.append((missed, over, self._ms(plan)))
        return _Outlook(None, min(misses))

    def _floor(self, shape: Shape) -> int:
        """Parameters with one cell per warehouse, added up by stage: shapes are many."""
        if not shape.stage_sharing:
            floor = self._floor_of(shape, shape.settings.sharing)
            return floor.rest + sum(floor.stages.values())
        floors = {stage: self._floor_of(shape, rule) for stage, rule in shape.stage_sharing}
        stages = sum(floor.stages.get(stage, 0) for stage, floor in floors.items())
        return stages + next(iter(floors.values())).rest

    def _floor_of(self, shape: Shape, sharing: Sharing) -> _Floor:
        """The floor of `shape` where all stages share in one way."""
        settings = shape.settings
        if sharing != settings.sharing:
            settings = settings.changed(sharing=sharing)
        key = f"{settings} {shape.keep_static}"
        if key not in self._floors:
            self._floors[key] = self._count_floor(Shape(settings, shape.keep_static))
        return self._floors[key]

    def _count_floor(self, shape: Shape) -> _Floor:
        layout = self._layout(shape)
        floor = _Floor(layout.static_params, {})
        for group, warehouse in zip(layout.groups, self._warehouses(layout), strict=True):
            stage = self._stages.get(group.layers[0])
            if stage is None:
                floor.rest += warehouse.params(1)
            else:
                floor.stages[stage] = floor.stages.get(stage, 0) + warehouse.params(1)
        return floor

    def _candidates(self, warehouses: Sequence[Warehouse]) -> Iterator[list[float]]:
        """Equal ratios; then as much as the split allows where a parameter costs few MACs.

        MACs are least where all ratios are at one end, on either side of one price.
        """
        yield [1.0] * len(warehouses)
        if (self.max_macs is None and self.max_ms is None) or self.split == 1:
            return
        prices = [w.mixing / w.step(1) for w in warehouses]
        order = sorted(prices)
        for price in dict.fromkeys(order[len(order) * i // _TILTS] for i in range(_TILTS)):
            yield [self.split if own <= price else 1 / self.split for own in prices]

    def _approach(self, shape: Shape) -> Shape:
        """`shape` if it has an anchor, else the nearest that has, or where no change helps.

        Where no single change is enough, the one that comes closest is made first.
        """
        while self._anchor(shape) is None:
            near = list(self._by_distance(shape, 1))
            able = next((other for other in near if self._anchor(other) is not None), None)
            best = able or min(near, key=lambda other: self._outlook(other).miss)
            if best == shape:
                break
            shape = best
        return shape

    def _reachable(self, shape: Shape) -> Shape:
        found = self._approach(shape)
        return found if self._anchor(found) is not None else self._start

    def _out_of_reach(self, shape: Shape, below: BudgetError | None) -> BudgetError:
        """The error for a target that `shape`, which comes closest, misses."""
        layout = self._layout(shape)
        missed, over, ms = self._outlook(shape).miss
        if self._floor(shape) > self.allowed:
            assert below is not None
            message = f"{below}\nthe lowest floor found in search.space is {self._floor(shape):,}"
            return BudgetError(message, self.allowed, layout.floor())
        if missed:
            ours = shape.settings.method == _OWN
            why = "the cells are too coarse, and" if ours else f"by {shape.settings.method}"
            smaller = "smaller cell ratios" if ours else "that budget"
            return BudgetError(
                f"no plan of {self.least:,} to {self.allowed:,} parameters: {why} the closest has "
                f"{self.least - missed:,}; try {smaller} or a larger search.space.tolerance",
                self.allowed,
                layout.floor(),
            )
        if self.max_macs is None or not over:
            fastest = f"the fastest may take {ms:.3g} ms" if ms < math.inf else self._untold
            return BudgetError(
                f"search.space.limits.latency_ms {self.max_ms:g}: at {self.least:,} to "
                f"{self.allowed:,} parameters none is found that surely keeps it; {fastest}",
                self.allowed,
                layout.floor(),
            )
        return BudgetError(
            f"search.space.limits.macs {self.max_macs:,}: the fewest found at {self.least:,} to "
            f"{self.allowed:,} parameters are {self.max_macs + over:,}",
            self.allowed,
            layout.floor(),
        )

    def _by_distance(self, shape: Shape, most: int | None = None) -> Iterator[Shape]:
        """All shapes (with at most so many choices changed), the fewest changes first."""
        others = {
            name: [value for value in values if value != value_of(shape, name)]
            for name, values in self.choices.items()
            if len(values) > 1 and applies(shape, name)
        }
        for count in range(len(others) + 1 if most is None else most + 1):
            for names in itertools.combinations(others, count):
                for values in itertools.product(*(others[name] for name in names)):
                    yield changed(shape, dict(zip(names, values, strict=True)))


@dataclass
class _Floor:
    """Parameters of the smallest plan: those of each stage's warehouses, and all others."""

    rest: int
    stages: dict[int, int]


@dataclass(frozen=True)
class _Outlook:
    """What a shape can do: a split with a valid plan, or by how much none is.

    miss: parameters outside the band, then MACs over the limit, then milliseconds; of the split
    that comes closest.
    """

    anchor: list[float] | None
    miss: tuple[int, int, float] = (0, 0, 0.0)


def fingerprint(plan: Plan) -> str:
    """The same for plans that build the same network, whatever led to them."""
    groups = [{k: v for k, v in g.items() if k != "name"} for g in plan.groups_to_list()]
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


def _label(value: Any) -> str | float:
    """What the study shows for a choice."""
    if value is None:
        return "proxy"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "groups"
    if isinstance(value, tuple):
        return ",".join(p if isinstance(p, str) else f"{p:g}" for p in value) or "none"
    return value if isinstance(value, str) else float(value)
