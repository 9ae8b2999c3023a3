"""Between settings and a plan: groups whose size is still to be decided. No torch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from kwlayers.plan import Group, Network, Plan, PlanError, Site
from kwlayers.rules import MAX_RATIO, Rule
from kwlayers.solver import Solution, Variable, solve


class MethodSettings(ABC):
    """How a method makes a network dynamic, whatever the budget: a frozen dataclass of each.

    rules: exceptions, one after the other. sharing: which layers share, by a word or otherwise.
    """

    rules: tuple[Rule, ...]
    sharing: Any

    method: ClassVar[str]
    # Whether groups have sizes without a budget: the published ones.
    sized: ClassVar[bool] = True
    # The settings that say these sizes, which a budget decides instead.
    sizes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def lay_out(
        self,
        network: Network,
        keep_static: frozenset[str] = frozenset(),
        stage_sharing: Mapping[int, str] | None = None,
    ) -> Layout:
        """The groups of a network. Raises PlanError if nothing can be converted.

        keep_static: layers that are left out. stage_sharing: the sharing rule of each stage (see
        `stage_of`), where it is not the settings'.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """The settings besides the rules."""
        return tuple(f.name for f in fields(self) if f.name != "rules")  # type: ignore[arg-type]

    def changed(self: SettingsT, **settings: Any) -> SettingsT:
        """These with others in their place."""
        found: SettingsT = replace(self, **settings)  # type: ignore[type-var]
        return found

    def suits(self, network: Network) -> bool:
        """Whether the network is of the kind that the method is for, whatever the budget."""
        return True

    def lower(self) -> Iterator[dict[str, Any]]:
        """Changes of settings that may lower the smallest plan."""
        return iter(())

    @abstractmethod
    def rounded(self, sizes: int, units: int, asked: float) -> str:
        """A note that sizes are whole: all of them over all units, instead of the ratio asked."""

    @abstractmethod
    def why_static(self, network: Network) -> dict[str, str]:
        """Why a layer is static where no group has it, by name; empty if nothing says so."""


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


@dataclass(frozen=True)
class Layout:
    """Groups with their layers and settings. Where a size is not decided, it is the smallest.

    network: as traced; groups may add blocks to it.
    """

    network: Network
    groups: tuple[Group, ...]
    own_ratios: tuple[float | None, ...]
    notes: tuple[str, ...]

    @property
    def static_params(self) -> int:
        """Parameters outside the groups."""
        replaced = (group.replaced(self._extended.of(group)) for group in self.groups)
        return self._extended.params - sum(replaced)

    @functools.cached_property
    def _extended(self) -> Network:
        return self.network.extended([name for group in self.groups for name in group.added])

    def of(self, group: Group) -> tuple[Site, ...]:
        """The sites of a group's layers."""
        return self._extended.of(group)

    def variables(self, relative: Sequence[float] | None = None) -> list[Variable]:
        """What the solver sizes. relative: ratios over the common one (default equal)."""
        chosen = relative if relative is not None else [r or 1.0 for r in self.own_ratios]
        return [self._variable(group, w) for group, w in zip(self.groups, chosen, strict=True)]

    def solutions(
        self, params: int, relative: Sequence[float] | None = None
    ) -> tuple[Solution, ...]:
        """Sizes for at most `params` parameters in all, the most even first; empty if none fit."""
        if params > MAX_RATIO * self.network.params:
            raise PlanError(
                f"params {params:,}: over {MAX_RATIO:,} times the static model's "
                f"{self.network.params:,}"
            )
        return solve(self.variables(relative), params - self.static_params)

    def _variable(self, group: Group, relative: float) -> Variable:
        sites = self._extended.of(group)
        one, two = (
            sum(cost.mixing_macs for cost in group.resized(size).costs(sites)) for size in (1, 2)
        )
        return Variable(group.unit(sites), group.params_by_size(sites), two - one, relative)

    def plan(self, solution: Solution) -> Plan:
        """The plan of a solution."""
        return self.sized(solution.sizes)

    def enough(self, params: int) -> Plan | None:
        """The plan as laid out, where it has at most `params` parameters and more would be idle."""
        if any(group.grows for group in self.groups):
            return None
        plan = self.as_laid_out()
        deployed = plan.cost().deployed
        if deployed > params:
            return None
        note = (
            f"{deployed:,} of {params:,} parameters are used: {self.groups[0].method} needs no more"
        )
        return replace(plan, notes=(*plan.notes, note)) if deployed < params else plan

    def as_laid_out(self) -> Plan:
        """The plan with the sizes that groups have."""
        return Plan(self.network, self.groups, self.notes)

    def sized(self, sizes: Sequence[int]) -> Plan:
        """The plan with groups of these sizes."""
        groups = (group.resized(n) for group, n in zip(self.groups, sizes, strict=True))
        return Plan(self.network, tuple(groups), self.notes)

    def floor(self) -> Plan:
        """The smallest plan."""
        return self.sized([1] * len(self.groups))
