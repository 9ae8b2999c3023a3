"""What two recipes and their plans have in common, and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.methods import find
from kwlayers.plan import Group, Plan, counted
from kwsearch.report import ONLY_TRAINED, only_trained, stage_rows

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe

REST = "static layers, norms"


@dataclass(frozen=True)
class Side:
    """One of the two. name: of its file. plan: the recipe's, or by its budget."""

    name: str
    recipe: Recipe
    plan: Plan

    @property
    def title(self) -> str:
        """The network, its input and what is dynamic."""
        size = "x".join(map(str, self.plan.network.input_size))
        methods = dict.fromkeys(find(group.method).title for group in self.plan.groups)
        noun = "warehouse" if len(self.plan.warehouses) == len(self.plan.groups) else "group"
        dynamic = sum(len(group.layers) for group in self.plan.groups)
        return (
            f"{self.recipe.model.name} at {size}, {' and '.join(methods)}: "
            f"{counted(dynamic, 'dynamic layer')} in {counted(len(self.plan.groups), noun)}"
        )


@dataclass(frozen=True)
class Change:
    """A setting by its path; None where it is not there."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Count:
    """Parameters or MACs of both."""

    name: str
    a: int
    b: int

    @property
    def difference(self) -> int:
        return self.b - self.a

    @property
    def ratio(self) -> float | None:
        """B over A; None where A has nothing."""
        return self.b / self.a if self.a else None


@dataclass(frozen=True)
class Stage:
    """A line of the table by stage. a, b: its groups, in words."""

    name: str
    a: str
    b: str
    params: Count
    macs: Count


@dataclass(frozen=True)
class GroupChange:
    """A group that is not the same. a, b: what it is, empty where it is not there.

    fields: of its settings, those that differ. only_a, only_b: layers that one of the two has in
    it, of those that both networks have.
    """

    name: str
    a: str
    b: str
    fields: tuple[Change, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What differs. params, macs: all parts as deployed, the total last, equal or not. stages: the
    same, parameters as they are trained; a last line takes off those that are only trained.

    dynamic_a, dynamic_b: layers that are dynamic in one only, of those that both networks have.
    common: how many both have.
    """

    a: Side
    b: Side
    settings: tuple[Change, ...]
    params: tuple[Count, ...]
    macs: tuple[Count, ...]
    stages: tuple[Stage, ...]
    groups: tuple[GroupChange, ...]
    dynamic_a: tuple[str, ...]
    dynamic_b: tuple[str, ...]
    common: int

    @property
    def same_plan(self) -> bool:
        """Whether both are the same network with the same groups."""
        return self.a.plan == self.b.plan

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.same_plan:
            return "the plans differ"
        also = "" if self.settings else ", and the same settings"
        return f"the same plan{also}: {self.params[-1].a:,} parameters, {self.macs[-1].a:,} MACs"

    @property
    def note(self) -> str:
        """What is compared of different networks; empty of one."""
        own, other = (len(side.plan.extended.sites) for side in (self.a, self.b))
        if own == other == self.common:
            return ""
        return (
            f"The networks have different layers ({own:,} and {other:,}), which are compared where "
            f"their names are the same: {self.common:,}."
        )


def diff(a: Side, b: Side) -> Difference:
    """All that differs between A and B."""
    names = [{site.name for site in side.plan.extended.sites} for side in (a, b)]
    common = names[0] & names[1]
    dynamic = [[n for g in side.plan.groups for n in g.layers if n in common] for side in (a, b)]
    return Difference(
        a,
        b,
        _settings(a, b),
        _counts(vars(a.plan.cost().deployed_params), vars(b.plan.cost().deployed_params)),
        _counts(vars(a.plan.cost().macs), vars(b.plan.cost().macs)),
        tuple(_stages(a.plan, b.plan)),
        tuple(_groups(a.plan, b.plan, common)),
        tuple(name for name in dynamic[0] if name not in set(dynamic[1])),
        tuple(name for name in dynamic[1] if name not in set(dynamic[0])),
        len(common),
    )


# Settings ---------------------------------------------------------------------------------------


def _settings(a: Side, b: Side) -> tuple[Change, ...]:
    """By path, in the order of the schema; defaults count as written, whole sections do not."""
    known, given = ([_sections(side, every) for side in (a, b)] for every in (True, False))
    found = []
    for section in dict.fromkeys([*known[0], *known[1]]):
        both = all(section in one for one in known)
        left, right = (dict(_flat(one.get(section), section)) for one in (known if both else given))
        for path in dict.fromkeys([*left, *right]):
            if left.get(path) != right.get(path):
                found.append(Change(path, left.get(path), right.get(path)))
    return tuple(found)


def _sections(side: Side, every: bool) -> dict[str, Any]:
    """Of the recipe, as plain data, without its plan and where it comes from. every: also values
    that are as by default.
    """
    recipe = side.recipe
    data = recipe.model_dump(mode="json") if every else recipe.to_dict()
    data["input"] = list(side.plan.network.input_size)
    left_out = ("plan", "provenance")
    return {k: v for k, v in data.items() if v is not None and k not in left_out}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Values by their dotted paths; lists of plain values are one."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}")
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}.{i}")
    else:
        yield path, value


def value_text(value: Any) -> str:
    """A value as a recipe writes it: true, 0.5, [0.5, 1], stage."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return str(value)


# Counts, stages, groups -------------------------------------------------------------------------


def _counts(a: Mapping[str, int], b: Mapping[str, int]) -> tuple[Count, ...]:
    """Parts that one of them has, then the total."""
    last = ("unchanged", "total")
    parts = [part for part in a if part not in last and (a[part] or b[part])]
    return tuple(Count(part, a[part], b[part]) for part in [*parts, *last])


def _stages(a: Plan, b: Plan) -> Iterator[Stage]:
    left, right = stage_rows(a), stage_rows(b)
    names = [name for name in dict.fromkeys([*left, *right]) if name != REST]
    for name in [*names, REST]:
        rows = [rows.get(name) for rows in (left, right)]
        params = [row[0].param_parts[-1] if row else 0 for row in rows]
        macs = [row[0].macs["total"] if row else 0 for row in rows]
        own, other = (row[1] if row else "" for row in rows)
        yield Stage(name, own, other, Count("parameters", *params), Count("MACs", *macs))
    spared = [-only_trained(plan) for plan in (a, b)]
    if any(spared):
        yield Stage(ONLY_TRAINED, "", "", Count("parameters", *spared), Count("MACs", 0, 0))


def _groups(a: Plan, b: Plan, common: set[str]) -> Iterator[GroupChange]:
    """Those that differ, by their names."""
    left, right = ({group.name: group for group in plan.groups} for plan in (a, b))
    for name in dict.fromkeys([*left, *right]):
        own, other = left.get(name), right.get(name)
        if own is None or other is None:
            yield GroupChange(name, _words(own), _words(other))
            continue
        fields = tuple(_fields(own, other))
        only_a, only_b = (
            tuple(layer for layer in one.layers if layer in common and layer not in two.layers)
            for one, two in ((own, other), (other, own))
        )
        if fields or only_a or only_b or len(own.layers) != len(other.layers):
            yield GroupChange(name, _words(own), _words(other), fields, only_a, only_b)


def _words(group: Group | None) -> str:
    return "" if group is None else f"{group.describe()}, {counted(len(group.layers), 'layer')}"


def _fields(a: Group, b: Group) -> Iterator[Change]:
    left, right = (
        {k: v for k, v in group.to_dict().items() if k not in ("name", "layers")}
        for group in (a, b)
    )
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            yield Change(name, left.get(name), right.get(name))
