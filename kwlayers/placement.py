"""Methods whose layers stand alone: which of them become dynamic, by default and by rules.

No torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from kwlayers.families import Label, Recognised
from kwlayers.fields import check_fields
from kwlayers.layout import Layout, MethodSettings
from kwlayers.plan import Group, Network, PlanError, Site, match_layers, plain_name
from kwlayers.rules import (
    NothingToConvert,
    Rule,
    Share,
    by_reason,
    checked_rules,
    distinct,
    static_others,
)
from kwlayers.stages import INFERRED, place


class AloneSettings(MethodSettings):
    """Settings of a method whose layers have kernels of their own.

    group_type: of its groups. static_roles: of layers that stay static by default, as published
    (see `families.Label`). own: the settings that a rule may change.
    """

    group_type: ClassVar[type[Group]]
    static_roles: ClassVar[tuple[str, ...]] = ("stem", "head", "patch embedding")
    own: ClassVar[tuple[str, ...]] = ("ratio", "reduction")
    sharing = "layer"

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except ValueError as error:
            raise PlanError(str(error)) from None
        object.__setattr__(self, "rules", checked_rules(self.rules))
        for number, rule in enumerate(self.rules):
            where = f"rule {number + 1} ({', '.join(rule.patterns)})"
            if rule.share is not None:
                raise PlanError(
                    f"{where}: by {self.method} layers share nothing; dynamic=True makes those "
                    "dynamic that would stay static"
                )
            if others := sorted(set(rule.own) - set(self.own)):
                raise PlanError(
                    f"{where}: {', '.join(others)}: of another method; by {self.method} there is "
                    f"{', '.join(self.own) or 'nothing to set'}"
                )

    @abstractmethod
    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> Group:
        """A group at its published size. own: the settings of its layers, as these are."""

    def refuses(self, site: Site) -> str:
        """Why the method cannot take a layer, whatever a rule says; empty if it can."""
        return site.fixed or self.group_type.refuses(site)

    def declines(self, site: Site, label: Label) -> str:
        """Why the method leaves a layer static by default, beside its role; empty if not."""
        return ""

    def own_ratio(self, share: Share) -> float | None:
        """What a rule says of the layers' size relative to that of others; None for nothing."""
        return share.ratio

    def gathered(self, network: Network, layers: Mapping[str, Share]) -> list[list[str]]:
        """The layers of each group. layers: the dynamic ones, in module order."""
        return [[name] for name in layers]

    def lay_out(
        self,
        network: Network,
        keep_static: frozenset[str] = frozenset(),
        stage_sharing: Mapping[int, str] | None = None,
    ) -> Layout:
        if stage_sharing:
            raise PlanError(f"sharing by stage: by {self.method} layers share nothing")
        layers = {
            name: share for name, share in self._shares(network).items() if name not in keep_static
        }
        if not layers:
            raise self._nothing(network)
        groups: list[Group] = []
        ratios = []
        for names in self.gathered(network, layers):
            share = layers[names[0]]
            sites = [network[name] for name in names]
            own = {k: v for k, v in share.own.items() if k != "ratio"}
            taken = {group.name: group for group in groups}
            name = distinct(plain_name(names[0] if len(names) == 1 else sites[0].block), taken)
            groups.append(self.group(network, name, sites, self.changed(**own)))
            ratios.append(self.own_ratio(share))
        notes = by_reason({site.name: self.refuses(site) for site in network.sites})
        return Layout(network, tuple(groups), tuple(ratios), tuple(notes))

    def lower(self) -> Iterator[dict[str, Any]]:
        reduction = getattr(self, "reduction", 0.0)
        if reduction > 1 / 64:
            yield {"reduction": reduction / 2}

    def rounded(self, sizes: int, units: int, asked: float) -> str:
        return (
            f"{sizes / units:.4g} kernels a layer, not {asked:.4g}: they are whole, and "
            "every layer has one"
        )

    def why_static(self, network: Network) -> dict[str, str]:
        reasons = self._by_default(network)
        for site in network.sites:
            for rule in self.rules:
                if rule.static and any(fnmatchcase(site.name, one) for one in rule.patterns):
                    reasons[site.name] = f"a rule keeps it static ({', '.join(rule.patterns)})"
            reasons[site.name] = self.refuses(site) or reasons[site.name]
        return reasons

    def _by_default(self, network: Network) -> dict[str, str]:
        """Why a layer stays static if no rule is about it; empty if it becomes dynamic."""
        placed = place(network.sites)
        return {site.name: self._default(site, placed) for site in network.sites}

    def _default(self, site: Site, placed: Recognised) -> str:
        label = placed.labels[site.name]
        if reason := self.refuses(site):
            return reason
        if label.role in self.static_roles:
            return f"the {label.role} stays static"
        if placed.family == INFERRED and label.static and not label.role:
            return label.static
        return self.declines(site, label)

    def _shares(self, network: Network) -> dict[str, Share]:
        """The dynamic layers in module order, each with settings of its own."""
        reasons = self._by_default(network)
        found = {name: Share((name,)) for name, reason in reasons.items() if not reason}
        for number, rule in enumerate(self.rules):
            where = f"rule {number + 1} ({', '.join(rule.patterns)})"
            matched = match_layers(network, rule.patterns, where)
            found = self._with_rule(network, found, rule, matched, where)
        return {site.name: found[site.name] for site in network.sites if site.name in found}

    def _with_rule(
        self,
        network: Network,
        found: Mapping[str, Share],
        rule: Rule,
        matched: Sequence[str],
        where: str,
    ) -> dict[str, Share]:
        if rule.static:
            return {name: share for name, share in found.items() if name not in matched}
        changed = dict(found)
        if rule.dynamic:
            for name in matched:
                if reason := self.refuses(network[name]):
                    raise PlanError(f"{where}: {name} cannot be converted: {reason}")
                changed.setdefault(name, Share((name,)))
        touched = [name for name in matched if name in changed]
        if not touched:
            raise PlanError(f"{where}: the layers are static; dynamic=True makes them dynamic")
        return changed | {name: replace(changed[name], **rule.own) for name in touched}

    def _nothing(self, network: Network) -> NothingToConvert:
        reasons = {
            name: reason or "keep_static has it"
            for name, reason in self.why_static(network).items()
        }
        why = "; ".join([*by_reason(reasons), *static_others(network)]) or "the network has none"
        return NothingToConvert(f"no layer can be converted: {why}")
