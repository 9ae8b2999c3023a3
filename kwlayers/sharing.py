"""Which layers share a warehouse: by rule, by groups of patterns, with exceptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from kwlayers import geometry
from kwlayers.cost import attention_cost
from kwlayers.families import Recognised
from kwlayers.plan import Network, PlanError, Site, match_layers, short, shown
from kwlayers.stages import INFERRED, kind_of, place, plain_name

_MUCH_ATTENTION = 1 / 4
MAX_RATIO = 1000  # beyond it a ratio is a slip of the pen

Patterns = Sequence[str]
Sharing = str | Sequence[Patterns] | Mapping[str, "Patterns | Share"]
SHARING = ("stage", "position", "layer")


@dataclass(frozen=True)
class Share:
    """An explicit sharing group: glob patterns, and settings of its own where not None."""

    layers: Patterns
    ratio: float | None = None
    cell_ratio: tuple[float, float] | None = None
    reduction: float | None = None
    basis_ratio: float | None = None
    spatial_partition: bool | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(pattern, str) for pattern in _listed(self.layers, "layers")):
            raise PlanError(f"layers {short(self.layers)}: a glob pattern, or a list of them")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.cell_ratio is not None:
            _check_cell_ratio(self.cell_ratio)
        for name in ("reduction", "basis_ratio"):
            if getattr(self, name) is not None:
                _check_fraction(name, getattr(self, name))

    @property
    def patterns(self) -> Patterns:
        """`layers` as a list, even if one pattern was given."""
        return [self.layers] if isinstance(self.layers, str) else self.layers

    @property
    def own(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(Share)}
        return {k: v for k, v in given.items() if k != "layers" and v is not None}


@dataclass(frozen=True)
class Rule(Share):
    """An exception from the sharing, for the layers that glob patterns match.

    They stay static; or they share a warehouse called `share`, also if they would stay static by
    default; or, without it, their warehouses get settings of their own.
    """

    static: bool = False
    share: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.share, (str, type(None))):
            raise PlanError(f"share {short(self.share)}: the name of a warehouse")
        if self.static == (self.share is not None or bool(self.own)):
            raise PlanError(
                f"rule for {', '.join(self.patterns)}: either static, or a share or settings "
                "(ratio, cell_ratio, reduction, basis_ratio, spatial_partition)"
            )


@dataclass(frozen=True)
class Settings:
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

    def __post_init__(self) -> None:
        _check_cell_ratio(self.cell_ratio)
        for name in ("reduction", "basis_ratio"):
            _check_fraction(name, getattr(self, name))
        rules = (self.rules,) if isinstance(self.rules, Rule) else _listed(self.rules, "rules")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PlanError(
                    f"rules: expected kwlayers.Rule('layer1.*', static=True) and the like, "
                    f"got {short(rule)}"
                )
        object.__setattr__(self, "rules", tuple(rules))
        if self.norm not in ("auto", "batch", "layer"):
            raise PlanError(f"norm {self.norm!r}: allowed are 'auto', 'batch' and 'layer'")
        word = isinstance(self.sharing, str) or not isinstance(self.sharing, Iterable)
        if word and self.sharing not in SHARING:
            raise PlanError(
                f"sharing {self.sharing!r}: allowed are {', '.join(map(repr, SHARING))}, "
                "or groups of glob patterns over module names"
            )


def check_ratio(ratio: float) -> None:
    if not _is_number(ratio) or not (0 < ratio <= MAX_RATIO):
        raise PlanError(f"ratio {short(ratio)}: it must be a number above 0, at most {MAX_RATIO:,}")


def _check_fraction(name: str, value: float) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise PlanError(f"{name} {short(value)}: it must be in (0, 1]")


def _check_cell_ratio(ratios: Sequence[float]) -> None:
    pair = isinstance(ratios, Sequence) and len(ratios) == 2
    if not pair or not all(_is_number(ratio) and 0 < ratio <= 1 for ratio in ratios):
        raise PlanError(f"cell_ratio {short(ratios)}: two numbers (out, in) in (0, 1]")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _listed(value: Any, where: str) -> Any:
    if not isinstance(value, Iterable):
        raise PlanError(f"{where} {short(value)}: expected a list")
    return value


class NothingToConvert(PlanError):
    """Every layer stays static."""


def nothing_to_convert(network: Network, settings: Settings) -> NothingToConvert:
    """The error that says why, of every layer."""
    found = why_static(network, settings)
    reasons = {name: reason or "keep_static has it" for name, reason in found.items()}
    lines = [*_by_reason(reasons), *static_others(network)]
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


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """A line per reason, with the first layer that it holds for. Empty reasons aside."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            names.setdefault(reason, []).append(shown(name))
    return [
        f"{listed[0]} stays static: {reason}"
        if len(listed) == 1
        else f"{listed[0]} and {len(listed) - 1} more stay static: {reason}"
        for reason, listed in names.items()
    ]


def static_others(network: Network) -> list[str]:
    """The modules with weights that are no layers: a line per class."""
    names: dict[str, list[str]] = {}
    for other in network.others:
        names.setdefault(other.kind, []).append(shown(other.name))
    return [
        f"{listed[0]}: its own weights stay static ({kind})"
        if len(listed) == 1
        else f"{listed[0]} and {len(listed) - 1} more: their own weights stay static ({kind})"
        for kind, listed in names.items()
    ]


def sharing_notes(network: Network, shares: Mapping[str, Share], settings: Settings) -> list[str]:
    """Layers that cannot be converted, and depthwise ones that hardly pay: a line per reason."""
    notes = _by_reason({site.name: site.fixed for site in network.sites})
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
        shares = _with_rule(shares, rule, [n for n in matched if n not in kept], where)
    order = {site.name: index for index, site in enumerate(network.sites)}
    for name, share in shares.items():
        shares[name] = replace(share, layers=tuple(sorted(share.layers, key=order.__getitem__)))
    return dict(sorted(shares.items(), key=lambda item: order[item[1].layers[0]]))


def _with_rule(
    shares: Mapping[str, Share], rule: Rule, matched: Sequence[str], where: str
) -> dict[str, Share]:
    if not rule.static and rule.share is None:
        touched = [name for name, share in shares.items() if set(share.layers) & set(matched)]
        if not touched:
            raise PlanError(f"{where}: the layers are in no warehouse; a share puts them into one")
        for name in touched:
            left = [layer for layer in shares[name].layers if layer not in matched]
            if left:
                raise PlanError(
                    f"{where}: its settings are for a part of warehouse {name!r}, without "
                    f"{left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}: cover all of "
                    "its layers, or give the matched ones a share of their own"
                )
        return {n: replace(s, **rule.own) if n in touched else s for n, s in shares.items()}
    changed = {}
    for name, share in shares.items():
        left = [layer for layer in share.layers if layer not in matched]
        if left:
            changed[name] = replace(share, layers=tuple(left))
    if rule.share is not None and matched:
        before = changed.get(rule.share, Share(()))
        changed[rule.share] = replace(before, layers=(*before.layers, *matched), **rule.own)
    return changed


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
            name = _distinct(plain_name(site.name), members)
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
                own = part if number == 0 else _distinct(f"{part}_{number + 1}", members)
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


def _distinct(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name
