"""Which layers share a warehouse: by rule, by groups of patterns, with exceptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from kwlayers import geometry
from kwlayers.families import Recognised
from kwlayers.layout import Layout, MethodSettings
from kwlayers.plan import Network, PlanError, Site, counted, match_layers, plain_name
from kwlayers.rules import (
    NothingToConvert,
    Patterns,
    Rule,
    Share,
    by_reason,
    check_cell_ratio,
    check_fraction,
    checked_rules,
    distinct,
    static_others,
    with_rule,
)
from kwlayers.stages import INFERRED, kind_of, place
from kwlayers.warehouses import WarehouseGroup, attention_cost

_MUCH_ATTENTION = 1 / 4

Sharing = str | Sequence[Patterns] | Mapping[str, "Patterns | Share"]
SHARING = ("stage", "position", "layer")


@dataclass(frozen=True)
class Settings(MethodSettings):
    """How a network is cut into warehouses, whatever their size. Fields as in `plan_model`.

    rules: one, too, or any sequence of them.
    """

    cell_ratio: tuple[float, float] = (1.0, 1.0)
    sharing: Sharing = "stage"
    reduction: float = 1 / 16
    basis_ratio: float = 1.0
    spatial_partition: bool = True
    norm: str = "auto"
    rules: tuple[Rule, ...] = ()

    method: ClassVar[str] = "kernel_warehouse"
    sized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_cell_ratio(self.cell_ratio)
        for name in ("reduction", "basis_ratio"):
            check_fraction(name, getattr(self, name))
        object.__setattr__(self, "rules", checked_rules(self.rules))
        if self.norm not in ("auto", "batch", "layer"):
            raise PlanError(f"norm {self.norm!r}: allowed are 'auto', 'batch' and 'layer'")
        word = isinstance(self.sharing, str) or not isinstance(self.sharing, Iterable)
        if word and self.sharing not in SHARING:
            raise PlanError(
                f"sharing {self.sharing!r}: allowed are {', '.join(map(repr, SHARING))}, "
                "or groups of glob patterns over module names"
            )

    def lay_out(
        self,
        network: Network,
        keep_static: frozenset[str] = frozenset(),
        stage_sharing: Mapping[int, str] | None = None,
    ) -> Layout:
        shares = shares_of(network, self, keep_static, stage_sharing)
        if not shares:
            raise nothing_to_convert(network, self)
        notes = sharing_notes(network, shares, self)
        groups = []
        for name, share in shares.items():
            group, rounded = self._group(network, name, share)
            groups.append(group)
            notes.extend(f"{name}: {note}" for note in rounded)
        ratios = tuple(share.ratio for share in shares.values())
        return Layout(network, tuple(groups), ratios, tuple(notes))

    def _group(
        self, network: Network, name: str, share: Share
    ) -> tuple[WarehouseGroup, tuple[str, ...]]:
        """A warehouse of one cell, and what its cell's sizes were rounded to."""
        sites = [network[layer] for layer in share.layers]
        if len({site.kind for site in sites}) > 1:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise PlanError(f"group {name!r}: layers of one kind share a warehouse, got {kinds}")
        own = {
            key: getattr(self, key) if getattr(share, key) is None else getattr(share, key)
            for key in ("cell_ratio", "spatial_partition", "reduction", "basis_ratio")
        }
        kernels = [site.kernel for site in sites]
        try:
            cell, rounded = geometry.cell_shape(
                kernels, own.pop("cell_ratio"), own.pop("spatial_partition")
            )
        except ValueError as error:
            raise PlanError(f"group {name!r}: {error}") from None
        norm = network.norm(self.norm)
        layers = tuple(share.layers)
        return WarehouseGroup(name, layers, cell, num_cells=1, norm=norm, **own), rounded

    def lower(self) -> Iterator[dict[str, Any]]:
        out, inside = self.cell_ratio
        fine = self.sharing in ("position", "layer")
        for divisor in (2, 4, 8):
            cells = {"cell_ratio": (out / divisor, inside / divisor)}
            yield cells
            if fine:
                yield {**cells, "sharing": "stage"}
        if fine:
            yield {"sharing": "stage"}
        if self.reduction > 1 / 64:
            yield {"reduction": self.reduction / 2}

    def rounded(self, sizes: int, units: int, asked: float) -> str:
        return (
            f"b = {sizes / units:.4g}, not {asked:.4g}, as cells are whole and every warehouse has "
            f"one: {counted(sizes, 'cell')} over {counted(units, 'mixture')}"
        )

    def why_static(self, network: Network) -> dict[str, str]:
        return why_static(network, self)


def nothing_to_convert(network: Network, settings: Settings) -> NothingToConvert:
    """The error that says why, of every layer."""
    found = why_static(network, settings)
    reasons = {name: reason or "keep_static has it" for name, reason in found.items()}
    lines = [*by_reason(reasons), *static_others(network)]
    why = "; ".join(lines) or "the network has none"
    hint = " (a rule with a share converts what is static by default)"
    free = not settings.rules and any(not site.fixed for site in network.sites)
    return NothingToConvert(f"no layer can be converted: {why}{hint if free else ''}")


def why_static(network: Network, settings: Settings) -> dict[str, str]:
    """Why a layer is static where no warehouse has it, by name; empty if nothing says so."""
    placed = place(network.sites)
    reasons = {}
    for site in network.sites:
        reason = placed.labels[site.name].static
        if not reason and _outweighed(site, placed, settings):
            reason = "even with a single cell, its attention would outweigh its kernel"
        if not isinstance(settings.sharing, str):
            reason = "no sharing group has it"
        for rule in settings.rules:
            if rule.static and any(fnmatchcase(site.name, one) for one in rule.patterns):
                reason = f"a rule keeps it static ({', '.join(rule.patterns)})"
        reasons[site.name] = site.fixed or reason
    return reasons


def _outweighed(site: Site, placed: Recognised, settings: Settings) -> bool:
    """Whether no budget could make up for the layer's attention, however its kernel is cut.

    Not asked of the papers' backbones, nor of depthwise layers, which those convert, too.
    """
    if placed.family != INFERRED or kind_of(site) == "dwconv":
        return False
    return _least_attention(site, settings) > math.prod(site.kernel)


def _least_attention(site: Site, settings: Settings) -> int:
    """Parameters of the attention to one mixture of one cell."""
    return attention_cost(
        site.in_channels,
        1,
        1,
        1,
        ratio=None,
        reduction=settings.reduction,
        basis_ratio=1.0,
        norm="batch",
    ).params


def sharing_notes(network: Network, shares: Mapping[str, Share], settings: Settings) -> list[str]:
    """Layers that cannot be converted, and depthwise ones that hardly pay: a line per reason."""
    notes = by_reason({site.name: site.fixed for site in network.sites})
    if not isinstance(settings.sharing, str) or place(network.sites).family != INFERRED:
        return notes
    dynamic = {layer for share in shares.values() for layer in share.layers}
    heavy = [
        site.name
        for site in network.sites
        if site.name in dynamic
        and kind_of(site) == "dwconv"
        and _least_attention(site, settings) > math.prod(site.kernel)
    ]
    if heavy:
        more = f" and {len(heavy) - 1} more" if heavy[1:] else ""
        notes.append(
            f"{heavy[0]}{more}: depthwise layers are dynamic, as in the published MobileNetV2 and "
            "ConvNeXt, though attention outweighs such kernels (a rule can keep them static)"
        )
    return notes


def shares_of(
    network: Network,
    settings: Settings,
    kept: frozenset[str] = frozenset(),
    stage_sharing: Mapping[int, str] | None = None,
) -> dict[str, Share]:
    """The layers of every warehouse, by its name, in the order of their first layers.

    kept: layers that are left out. stage_sharing: as in `lay_out`. Empty if nothing is left.
    """
    if isinstance(settings.sharing, str):
        shares = _automatic(network, settings, kept, stage_sharing or {})
    else:
        shares = _explicit(network, settings.sharing, kept)
    for number, rule in enumerate(settings.rules):
        where = f"rule {number + 1} ({', '.join(rule.patterns)})"
        matched = match_layers(network, rule.patterns, where)
        shares = with_rule(shares, rule, [n for n in matched if n not in kept], where)
    order = {site.name: index for index, site in enumerate(network.sites)}
    for name, share in shares.items():
        shares[name] = replace(share, layers=tuple(sorted(share.layers, key=order.__getitem__)))
    return dict(sorted(shares.items(), key=lambda item: order[item[1].layers[0]]))


def stage_of(network: Network) -> dict[str, int]:
    """The stage of each layer that can share a warehouse."""
    labels = place(network.sites).labels
    return {
        site.name: label.stage
        for site in network.sites
        if not (site.fixed or (label := labels[site.name]).static or label.alone)
    }


def _automatic(
    network: Network,
    settings: Settings,
    kept: frozenset[str],
    stage_sharing: Mapping[int, str],
) -> dict[str, Share]:
    """Shares by stage, position or layer."""
    placed = place(network.sites)
    members: dict[str, list[str]] = {}
    for site in network.sites:
        label = placed.labels[site.name]
        if site.fixed or label.static or site.name in kept:
            continue
        if _outweighed(site, placed, settings):
            continue
        rule = settings.sharing if label.alone else stage_sharing.get(label.stage, settings.sharing)
        if rule == "layer":
            name = distinct(plain_name(site.name), members)
        else:
            position = str(label.position) if rule == "position" else ""
            name = label.alone or f"stage{label.stage}_{label.kind}{position}"
        members.setdefault(name, []).append(site.name)
    shares: dict[str, Share] = {}
    for name, layers in members.items():
        for part, share in _split(name, [network[layer] for layer in layers], settings).items():
            apart = [[network[layer] for layer in share.layers]]
            if placed.family == INFERRED:
                apart = _akin(apart[0], settings)
            for number, sites in enumerate(apart):
                own = part if number == 0 else distinct(f"{part}_{number + 1}", members)
                shares[own] = Share(tuple(site.name for site in sites))
    return shares


def _akin(sites: list[Site], settings: Settings) -> list[list[Site]]:
    """Set apart layers whose attention would outweigh what it mixes: cells that are crumbs.

    A layer joins others while their attention at ratio 1 is at most _MUCH_ATTENTION of their
    kernels (all of them if the kernels have one shape), or less than it is apart.
    """
    parts: list[list[Site]] = []
    for site in sites:
        for part in parts:
            both = [*part, site]
            joined = _attention_at_1(both, settings)
            kernels = sum(math.prod(other.kernel) for other in both)
            one_shape = len({other.kernel[:2] for other in both}) == 1
            apart = _attention_at_1(part, settings) + _attention_at_1([site], settings)
            if joined <= max(kernels * (1 if one_shape else _MUCH_ATTENTION), apart):
                part.append(site)
                break
        else:
            parts.append([site])
    return parts


def _attention_at_1(sites: Sequence[Site], settings: Settings) -> int:
    """Weights of the attention's last layers, h (n + 1) m, if these layers shared at ratio 1."""
    cell, _ = geometry.cell_shape([site.kernel for site in sites], settings.cell_ratio, True)
    mixtures = [geometry.num_mixtures(site.kernel, cell) for site in sites]
    hidden = (geometry.hidden_width(site.in_channels, settings.reduction) for site in sites)
    return (sum(mixtures) + 1) * sum(h * m for h, m in zip(hidden, mixtures, strict=True))


def _split(name: str, sites: list[Site], settings: Settings) -> dict[str, Share]:
    """Set apart what cannot share: kinds of layer, and kernel sizes of undivided cells."""
    parts: dict[str, list[str]] = {}
    kinds = {site.kind for site in sites}
    sizes = {site.kernel_size for site in sites}
    for site in sites:
        part = name if len(kinds) == 1 else f"{name}_{site.kind}"
        if not settings.spatial_partition and len(sizes) > 1:
            part += "_" + "x".join(map(str, site.kernel_size))
        parts.setdefault(part, []).append(site.name)
    return {part: Share(tuple(layers)) for part, layers in parts.items()}


def named_groups(
    sharing: Sequence[Patterns] | Mapping[str, Patterns | Share],
) -> Mapping[str, Patterns | Share]:
    """Explicit groups by name; a list's are group0, group1, …"""
    if isinstance(sharing, Mapping):
        return sharing
    return {f"group{index}": patterns for index, patterns in enumerate(sharing)}


def _explicit(
    network: Network,
    sharing: Sequence[Patterns] | Mapping[str, Patterns | Share],
    kept: frozenset[str],
) -> dict[str, Share]:
    """The given shares less the layers in `kept`; one that loses all of them is gone."""
    named = named_groups(sharing)
    shares: dict[str, Share] = {}
    owner: dict[str, str] = {}
    for name, given in named.items():
        share = given if isinstance(given, Share) else Share(given)
        layers = match_layers(network, share.patterns, f"group {name!r}")
        if not layers:
            raise PlanError(f"group {name!r}: it has no layers")
        for layer in layers:
            if layer in owner:
                raise PlanError(f"{layer} matches group {owner[layer]!r} and group {name!r}")
            owner[layer] = name
        left = tuple(layer for layer in layers if layer not in kept)
        if left:
            shares[name] = replace(share, layers=left)
    return shares
