"""Exceptions from what a method does by default, and why layers stay static. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kwlayers.plan import Network, PlanError, plain_name, short, shown

MAX_RATIO = 1000  # beyond it a ratio is a slip of the pen

Patterns = Sequence[str]


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
        if not all(isinstance(pattern, str) for pattern in listed(self.layers, "layers")):
            raise PlanError(f"layers {short(self.layers)}: a glob pattern, or a list of them")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.cell_ratio is not None:
            check_cell_ratio(self.cell_ratio)
        for name in ("reduction", "basis_ratio"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))

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
    """An exception from what a method does by default, for the layers that glob patterns match.

    They stay static; or they share a warehouse called `share`, also if they would stay static by
    default; or each becomes dynamic by itself, even so; or they (their warehouses) get settings of
    their own.
    """

    static: bool = False
    share: str | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.share, (str, type(None))):
            raise PlanError(f"share {short(self.share)}: the name of a warehouse")
        if self.dynamic and self.share is not None:
            raise PlanError(
                f"rule for {', '.join(self.patterns)}: either dynamic, each layer by itself, or a "
                "share, all of them together"
            )
        if self.static == (self.dynamic or self.share is not None or bool(self.own)):
            raise PlanError(
                f"rule for {', '.join(self.patterns)}: either static, or dynamic, or a share or "
                "settings (ratio, cell_ratio, reduction, basis_ratio, spatial_partition)"
            )


def check_ratio(ratio: float) -> None:
    if not is_number(ratio) or not (0 < ratio <= MAX_RATIO):
        raise PlanError(f"ratio {short(ratio)}: it must be a number above 0, at most {MAX_RATIO:,}")


def check_fraction(name: str, value: float) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise PlanError(f"{name} {short(value)}: it must be in (0, 1]")


def check_cell_ratio(ratios: Sequence[float]) -> None:
    pair = isinstance(ratios, Sequence) and len(ratios) == 2
    if not pair or not all(is_number(ratio) and 0 < ratio <= 1 for ratio in ratios):
        raise PlanError(f"cell_ratio {short(ratios)}: two numbers (out, in) in (0, 1]")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def listed(value: Any, where: str) -> Any:
    if not isinstance(value, Iterable):
        raise PlanError(f"{where} {short(value)}: expected a list")
    return value


def checked_rules(rules: Any) -> tuple[Rule, ...]:
    """Rules as a tuple: one alone, or any sequence of them. Raises PlanError for others."""
    found = (rules,) if isinstance(rules, Rule) else tuple(listed(rules, "rules"))
    for rule in found:
        if not isinstance(rule, Rule):
            raise PlanError(
                f"rules: expected kwlayers.Rule('layer1.*', static=True) and the like, "
                f"got {short(rule)}"
            )
    return found


class NothingToConvert(PlanError):
    """Every layer stays static."""


def by_reason(reasons: Mapping[str, str]) -> list[str]:
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


def without(shares: Mapping[str, Share], layers: Sequence[str]) -> dict[str, Share]:
    """Shares without these layers, and those that are left."""
    changed = {}
    for name, share in shares.items():
        left = [layer for layer in share.layers if layer not in layers]
        if left:
            changed[name] = replace(share, layers=tuple(left))
    return changed


def with_rule(
    shares: Mapping[str, Share], rule: Rule, matched: Sequence[str], where: str
) -> dict[str, Share]:
    if rule.dynamic:
        alone = without(shares, matched)
        for name in matched:
            alone[distinct(plain_name(name), alone)] = Share((name,), **rule.own)
        return alone
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
    changed = without(shares, matched)
    if rule.share is not None and matched:
        before = changed.get(rule.share, Share(()))
        changed[rule.share] = replace(before, layers=(*before.layers, *matched), **rule.own)
    return changed


def distinct(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name
