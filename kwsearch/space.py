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
import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import Layout, MethodSettings
from kwlayers.methods import find
from kwlayers.plan import Group, Network, Plan, PlanError
from kwlayers.planner import BudgetError, lay_out
from kwlayers.sharing import Sharing, stage_of
from kwlayers.solver import Variable
from kwsearch.budget import Target, meet

if TYPE_CHECKING:
    import optuna

    from kwsearch.latency.predict import Latency
    from kwsearch.recipe import Space as SpaceSection

METHOD, OWN = "method", "kernel_warehouse"
_STEPS = 8  # from a sample to its shape's anchor
_TILTS = 8  # how many splits for the fewest MACs are tried for a shape
_PASSES = 32  # exchanges of cells
_DRAWS = 1000  # random neighbours, over all shapes


@dataclass(frozen=True)
class Shape:
    """How the network is cut into warehouses, or by another method made dynamic.

    keep_static: glob patterns of layers left out. stage_sharing: (stage, sharing rule) of
    each stage; empty if `settings.sharing` holds for all.
    """

    settings: MethodSettings
    keep_static: tuple[str, ...] = ()
    stage_sharing: tuple[tuple[int, str], ...] = ()


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
        self.max_macs = section.limits.macs
        self.latency, self.max_ms = latency, section.limits.latency_ms
        self._untold = ""  # why the table says nothing about some plan
        self._layouts: dict[str, Layout] = {}
        self._outlooks: dict[str, _Outlook] = {}
        self._sizes: dict[Group, _Warehouse] = {}
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
        self.choices = _choices(own, section)
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
                counts.append(len(self._layout(_changed(start, changes)).groups))
        return min(counts), max(counts)

    def _starts(self) -> list[Shape]:
        """The start by each method."""
        return [_changed(self._start, {METHOD: m}) for m in self.choices.get(METHOD, [])] or [
            self._start
        ]

    def _values(self, shape: Shape, name: str) -> Sequence[Any]:
        """What a dimension may be in a shape, whose method may not have it: then what it is."""
        return self.choices[name] if _applies(shape, name) else (_value(shape, name),)

    def valid_share(self, samples: int, seed: int) -> float:
        """The share of random samples whose plans are on the budget and under the limits."""
        rng = random.Random(seed)
        valid = sum(self._is_valid(self.project(self.random(rng))) for _ in range(samples))
        return valid / samples

    def start(self) -> dict[str, Any]:
        """The trial of the uniform plan: the recipe's own settings, all ratios equal."""
        start: dict[str, Any] = {
            name: _label(_value(self._start, name))
            for name, values in self.choices.items()
            if len(values) > 1 and _applies(self._start, name)
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
            if len(values) > 1 and _applies(shape, name):
                shape = _changed(shape, {name: choose(name, values)})
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
        if shape.settings.method != OWN:
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
        cells = _spread(warehouses, relative, spend)
        total = sum(w.params(n) for w, n in zip(warehouses, cells, strict=True))
        if layout.static_params + total < self.least:
            cells = _exchange(warehouses, relative, cells, spend, spend - self.allowed + self.least)
        return layout.sized(cells)

    def _warehouses(self, layout: Layout) -> list[_Warehouse]:
        """Shapes have many warehouses in common, so their sizes are remembered."""
        if any(group not in self._sizes for group in layout.groups):
            for group, variable in zip(layout.groups, layout.variables(), strict=True):
                self._sizes.setdefault(group, _Warehouse(variable))
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

    def _candidates(self, warehouses: Sequence[_Warehouse]) -> Iterator[list[float]]:
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
            return BudgetError(
                f"no plan of {self.least:,} to {self.allowed:,} parameters: the cells are too "
                f"coarse, and the closest has {self.least - missed:,}; try smaller cell ratios or "
                "a larger search.space.tolerance",
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
            name: [value for value in values if value != _value(shape, name)]
            for name, values in self.choices.items()
            if len(values) > 1 and _applies(shape, name)
        }
        for count in range(len(others) + 1 if most is None else most + 1):
            for names in itertools.combinations(others, count):
                for values in itertools.product(*(others[name] for name in names)):
                    yield _changed(shape, dict(zip(names, values, strict=True)))


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


class _Warehouse:
    """A warehouse to size, whose parameters by number of cells are remembered."""

    def __init__(self, variable: Variable) -> None:
        self.mixtures = variable.mixtures
        self.mixing = variable.mixing
        self._count = variable.params
        self._known: dict[int, int] = {}

    def params(self, cells: int) -> int:
        if cells not in self._known:
            self._known[cells] = self._count(cells)
        return self._known[cells]

    def step(self, cells: int) -> int:
        """What one cell more costs."""
        return self.params(cells + 1) - self.params(cells)


def _spread(warehouses: Sequence[_Warehouse], relative: Sequence[float], spend: int) -> list[int]:
    """Cells for at most `spend` parameters: in proportion, and then where the ratio is lowest.

    One cell in each warehouse must fit.
    """
    weights = [r * w.mixtures for r, w in zip(relative, warehouses, strict=True)]

    def shares(ratio: float) -> list[int]:
        return [max(int(ratio * weight), 1) for weight in weights]

    def fit(cells: Sequence[int]) -> bool:
        return sum(w.params(n) for w, n in zip(warehouses, cells, strict=True)) <= spend

    low, high = 0.0, 1.0
    while fit(shares(high)):
        low, high = high, 2 * high
    below, above = shares(low), shares(high)
    while any(b - a > 1 for a, b in zip(below, above, strict=True)):
        middle = (low + high) / 2
        cells = shares(middle)
        if fit(cells):
            low, below = middle, cells
        else:
            high, above = middle, cells
    _fill(warehouses, weights, below, spend)
    return below


def _fill(
    warehouses: Sequence[_Warehouse], weights: Sequence[float], cells: list[int], spend: int
) -> int:
    """Add cells to `cells`, each where the ratio is lowest, until none fits; their parameters."""
    total = sum(w.params(n) for w, n in zip(warehouses, cells, strict=True))
    queue = [
        ((n + 1) / weight, i) for i, (n, weight) in enumerate(zip(cells, weights, strict=True))
    ]
    heapq.heapify(queue)
    while queue:
        i = queue[0][1]
        step = warehouses[i].step(cells[i])
        if total + step > spend:  # and never will, since the rest only shrinks
            heapq.heappop(queue)
            continue
        total += step
        cells[i] += 1
        heapq.heapreplace(queue, ((cells[i] + 1) / weights[i], i))
    return total


def _exchange(
    warehouses: Sequence[_Warehouse],
    relative: Sequence[float],
    cells: Sequence[int],
    spend: int,
    least: int,
) -> list[int]:
    """Give cells of one warehouse for one of another while that leaves less of `spend`.

    Stops at `least` parameters, or where no exchange helps.
    """
    weights = [r * w.mixtures for r, w in zip(relative, warehouses, strict=True)]
    best = list(cells)
    total = sum(w.params(n) for w, n in zip(warehouses, best, strict=True))
    for _ in range(_PASSES):
        if total >= least:
            break
        found = total
        for up, down in itertools.permutations(range(len(best)), 2):
            moved = list(best)
            moved[up] += 1
            left = spend - total - warehouses[up].step(best[up])
            while left < 0 and moved[down] > 1:
                moved[down] -= 1
                left += warehouses[down].step(moved[down])
            if left < 0:
                continue
            filled = _fill(warehouses, weights, moved, spend)
            if filled > found:
                found, better = filled, moved
        if found == total:
            break
        best, total = better, found
    return best


def _choices(own: Shape, section: SpaceSection) -> dict[str, list[Any]]:
    """What each dimension may be: `own`'s value first, then the section's others."""
    listed: dict[str, Sequence[Any]] = {
        METHOD: section.method,
        "cell_ratio": section.cell_ratio,
    }
    if own.stage_sharing:
        listed.update({f"sharing/stage{stage}": section.sharing for stage, _ in own.stage_sharing})
    else:
        listed["sharing"] = section.sharing
    for name in ("reduction", "basis_ratio", "spatial_partition", "keep_static"):
        listed[name] = getattr(section, name)
    for method in (own.settings.method, *section.method):
        settings = own.settings if method == own.settings.method else find(method).settings()
        for key, wanted in section.methods.get(method, {}).items():
            _check_values(settings, method, key, wanted)
            listed[f"{method}/{key}"] = wanted
    if strangers := sorted(set(section.methods) - {own.settings.method, *section.method}):
        raise PlanError(f"search.space.methods.{strangers[0]}: list it in search.space.method, too")
    starts = [_changed(own, {METHOD: name}) for name in (own.settings.method, *section.method)]
    for name, values in list(listed.items()):
        if not any(_applies(start, name) for start in starts):
            if values:
                raise PlanError(f"search.space.{name}: {own.settings.method} has no {name}")
            del listed[name]
    found: dict[str, list[Any]] = {}
    for name, values in listed.items():
        first = _value(next(start for start in starts if _applies(start, name)), name)
        found[name] = [first, *(value for value in values if value != first)]
    return found


def _value(shape: Shape, name: str) -> Any:
    """What a shape has in a dimension; None where its method has none."""
    if name == METHOD:
        return shape.settings.method
    if name.startswith("sharing/stage"):
        return dict(shape.stage_sharing)[int(name.removeprefix("sharing/stage"))]
    if name == "keep_static":
        return shape.keep_static
    method, _, key = name.rpartition("/")
    if method and method != shape.settings.method:
        return None
    return getattr(shape.settings, key, None)


def _applies(shape: Shape, name: str) -> bool:
    """Whether a dimension says anything about a shape, by its method."""
    if name in (METHOD, "keep_static"):
        return True
    if name.startswith("sharing/stage"):
        return bool(shape.stage_sharing)
    method, _, key = name.rpartition("/")
    return key in shape.settings.names and method in ("", shape.settings.method)


def _check_values(settings: MethodSettings, method: str, key: str, values: Sequence[Any]) -> None:
    """Raise PlanError for values that a setting cannot have."""
    if key not in settings.names:
        raise PlanError(
            f"search.space.methods.{method}: there is no {key}; its settings are "
            f"{', '.join(settings.names)}"
        )
    if key == find(method).group.size_name:
        raise PlanError(
            f"search.space.methods.{method}: {key} is what the budget decides; search.space.split "
            "varies it between layers"
        )
    for value in values:
        try:
            settings.changed(**{key: value})
        except PlanError as error:
            raise PlanError(f"search.space.methods.{method}: {error}") from None


def _changed(shape: Shape, values: Mapping[str, Any]) -> Shape:
    """`shape` with other values in some dimensions. By another method settings are its own, as
    published, besides what the values say.
    """
    if (method := values.get(METHOD, shape.settings.method)) != shape.settings.method:
        shape = Shape(find(method).settings(), shape.keep_static)
    by_stage = {
        int(name.removeprefix("sharing/stage")): rule
        for name, rule in values.items()
        if name.startswith("sharing/stage")
    }
    own = {name.removeprefix(f"{method}/"): value for name, value in values.items()}
    fields = [name for name in shape.settings.names if name in own]
    return Shape(
        shape.settings.changed(**{name: own[name] for name in fields}),
        values.get("keep_static", shape.keep_static),
        tuple((stage, by_stage.get(stage, rule)) for stage, rule in shape.stage_sharing),
    )


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
