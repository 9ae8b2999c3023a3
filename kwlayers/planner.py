"""From a model and a budget to a plan: grouping, cell sizes, cells per warehouse.

Deciding needs no torch (`plan_network`); `plan_model` traces the model first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kwlayers import geometry
from kwlayers.cost import group_params
from kwlayers.plan import Group, Network, Plan, PlanError, Site, match_layers
from kwlayers.solver import Solution, Variable, solve
from kwlayers.stages import INFERRED, place, plain_name

if TYPE_CHECKING:
    from torch import nn

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
        if self.ratio is not None:
            _check_ratio(self.ratio)
        if self.cell_ratio is not None:
            _check_cell_ratio(self.cell_ratio)


@dataclass(frozen=True)
class Settings:
    """How a network is cut into warehouses, whatever their size. Fields as in `plan_model`."""

    cell_ratio: tuple[float, float] = (1.0, 1.0)
    sharing: Sharing = "stage"
    reduction: float = 1 / 16
    basis_ratio: float = 1.0
    spatial_partition: bool = True
    norm: str = "auto"

    def __post_init__(self) -> None:
        _check_cell_ratio(self.cell_ratio)
        for name in ("reduction", "basis_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise PlanError(f"{name} {getattr(self, name)}: it must be in (0, 1]")
        if self.norm not in ("auto", "batch", "layer"):
            raise PlanError(f"norm {self.norm!r}: allowed are 'auto', 'batch' and 'layer'")
        if isinstance(self.sharing, str) and self.sharing not in SHARING:
            raise PlanError(
                f"sharing {self.sharing!r}: allowed are {', '.join(map(repr, SHARING))}, "
                "or groups of glob patterns over module names"
            )


def _check_ratio(ratio: float) -> None:
    if not isinstance(ratio, (int, float)) or not (0 < ratio <= MAX_RATIO):
        raise PlanError(f"ratio {ratio!r}: it must be a number above 0, at most {MAX_RATIO:,}")


def _check_cell_ratio(ratios: Sequence[float]) -> None:
    pair = isinstance(ratios, Sequence) and len(ratios) == 2
    if not pair or not all(0 < ratio <= 1 for ratio in ratios):
        raise PlanError(f"cell_ratio {ratios}: two numbers (out, in) in (0, 1]")


class BudgetError(PlanError):
    """No plan fits the target. `floor` is the fewest parameters under the settings."""

    def __init__(self, message: str, target: int, floor: Plan) -> None:
        super().__init__(message)
        self.target = target
        self.floor = floor


def plan_model(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    ratio: float | None = None,
    params: int | None = None,
    cell_ratio: tuple[float, float] = (1.0, 1.0),
    sharing: Sharing = "stage",
    reduction: float = 1 / 16,
    basis_ratio: float = 1.0,
    spatial_partition: bool = True,
    norm: str = "auto",
) -> Plan:
    """Plan the warehouses of `model` for a budget. The model is left as it is.

    model: any module, on any device (`meta` is enough). input_size: (C, H, W) of one image.
    ratio: the convolutional budget b = n / m of every warehouse; or
    params: parameters of the whole network, which the plan stays at or under.
    cell_ratio: (out, in) share of the layers' common channels that a cell spans.
    sharing: "stage" (one warehouse per stage and kind of layer), "position" (per stage and
        position in the block), "layer", or groups of glob patterns over module names: a list
        of lists, or a mapping from name to list or `Share`.
    reduction: width of the attention over input channels. basis_ratio: width of the
        nonlocal basis over the other layers' cells; 1 for none.
    spatial_partition: cells are 1x1; otherwise they span the kernel.
    norm: "batch", "layer" or "auto": "layer" if the model has no batch norm.

    Raises PlanError for settings that cannot be, BudgetError if `params` is out of reach.
    """
    from kwlayers.sites import trace

    settings = Settings(cell_ratio, sharing, reduction, basis_ratio, spatial_partition, norm)
    return plan_network(trace(model, input_size), settings, ratio=ratio, params=params)


def plan_network(
    network: Network,
    settings: Settings,
    *,
    ratio: float | None = None,
    params: int | None = None,
) -> Plan:
    """`plan_model` for a network that has been traced."""
    if (ratio is None) == (params is None):
        raise PlanError("give exactly one budget: ratio=0.5 or params=12_000_000")
    if ratio is not None:
        return plan_ratio(network, settings, ratio)
    if not isinstance(params, int) or isinstance(params, bool):
        raise PlanError(f"params {params!r}: a whole number such as 12_000_000")
    layout = lay_out(network, settings)
    candidates = layout.solutions(params)
    if not candidates:
        raise out_of_reach(layout, params)
    return layout.plan(candidates[0])


def plan_ratio(network: Network, settings: Settings, ratio: float) -> Plan:
    """Every warehouse at n = max(int(ratio * sum of m), 1), or at its own `Share.ratio`."""
    _check_ratio(ratio)
    layout = lay_out(network, settings)
    groups = []
    for group, own in zip(layout.groups, layout.own_ratios, strict=True):
        b = own if own is not None else ratio
        n = geometry.cells_for_ratio(sum(network.mixtures(group)), b)
        groups.append(replace(group, num_cells=n, ratio=b))
    return Plan(network, tuple(groups), layout.notes)


@dataclass(frozen=True)
class Layout:
    """Warehouses with their layers and cells, before their number of cells is decided."""

    network: Network
    groups: tuple[Group, ...]
    own_ratios: tuple[float | None, ...]
    notes: tuple[str, ...]

    @property
    def static_params(self) -> int:
        """Parameters outside the warehouses and their attention."""
        replaced = (math.prod(self.network[n].kernel) for g in self.groups for n in g.layers)
        return self.network.params - sum(replaced)

    def variables(self, relative: Sequence[float] | None = None) -> list[Variable]:
        """What the solver sizes. relative: ratios over the common one (default equal)."""
        chosen = relative if relative is not None else [r or 1.0 for r in self.own_ratios]
        return [self._variable(group, w) for group, w in zip(self.groups, chosen, strict=True)]

    def solutions(
        self, params: int, relative: Sequence[float] | None = None
    ) -> tuple[Solution, ...]:
        """Cells for at most `params` parameters in all, the most even first; empty if none fit."""
        if params > MAX_RATIO * self.network.params:
            raise PlanError(
                f"params {params:,}: over {MAX_RATIO:,} times the static model's "
                f"{self.network.params:,}"
            )
        return solve(self.variables(relative), params - self.static_params)

    def _variable(self, group: Group, relative: float) -> Variable:
        sites = [self.network[name] for name in group.layers]

        def params(cells: int) -> int:
            return group_params(sites, replace(group, num_cells=cells))

        if group.basis_ratio >= 1:  # linear in n: two points say it all
            base, step = params(1), params(2) - params(1)

            def params(cells: int) -> int:
                return base + (cells - 1) * step

        mixing = sum(site.samples * math.prod(site.kernel) for site in sites)
        return Variable(sum(self.network.mixtures(group)), params, mixing, relative)

    def plan(self, solution: Solution) -> Plan:
        """The plan of a solution."""
        return self.sized(solution.num_cells)

    def sized(self, num_cells: Sequence[int]) -> Plan:
        """The plan with these cells per warehouse."""
        groups = (
            replace(group, num_cells=n) for group, n in zip(self.groups, num_cells, strict=True)
        )
        return Plan(self.network, tuple(groups), self.notes)

    def floor(self) -> Plan:
        """The smallest plan: one cell per warehouse."""
        return self.sized([1] * len(self.groups))


def out_of_reach(layout: Layout, target: int) -> BudgetError:
    """The error for a target under the floor, which it explains."""
    floor = layout.floor()
    parts = floor.cost().params
    layers = sum(len(group.layers) for group in layout.groups)
    static = [row for row in floor.cost_by_layer() if row.group is None]
    largest = sorted(static, key=lambda row: -row.static_params)[:3]
    named = [f"{row.name} {row.static_params:,}" for row in largest]
    rest = parts.unchanged - sum(row.static_params for row in largest)
    unchanged = " + ".join([*named, f"norms and others {rest:,}"])
    return BudgetError(
        f"params {target:,}: below the floor of {parts.total:,} (unchanged {parts.unchanged:,} "
        f"[{unchanged}] + attention of {layers} layers {parts.attention:,} + one cell in each of "
        f"{len(layout.groups)} warehouses {parts.warehouses:,})",
        target,
        floor,
    )


def lay_out(
    network: Network,
    settings: Settings,
    *,
    keep_static: Sequence[str] = (),
    stage_sharing: Mapping[int, str] | None = None,
) -> Layout:
    """Group the layers and cut the cells. Raises PlanError if nothing can be converted.

    keep_static: glob patterns of layers that are left out of their warehouses.
    stage_sharing: the rule of each stage (see `stage_of`), where it is not `settings.sharing`.
    """
    notes = _static_notes(network)
    kept = frozenset(match_layers(network, keep_static, "keep_static"))
    if isinstance(settings.sharing, str):
        shares = _automatic(network, settings, kept, stage_sharing or {})
    else:
        shares = _explicit(network, settings.sharing, kept)
    if not shares:
        raise _nothing_to_convert(network, notes)
    norm = settings.norm
    if norm == "auto":
        norm = "batch" if network.batch_norm else "layer"
    groups = []
    for name, share in shares.items():
        sites = [network[layer] for layer in share.layers]
        if len({site.kind for site in sites}) > 1:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise PlanError(f"group {name!r}: layers of one kind share a warehouse, got {kinds}")
        ratio = settings.cell_ratio if share.cell_ratio is None else share.cell_ratio
        partition = settings.spatial_partition
        if share.spatial_partition is not None:
            partition = share.spatial_partition
        try:
            cell, rounded = geometry.cell_shape([s.kernel for s in sites], ratio, partition)
        except ValueError as error:
            raise PlanError(f"group {name!r}: {error}") from None
        notes.extend(f"{name}: {note}" for note in rounded)
        groups.append(
            Group(
                name=name,
                cell=cell,
                num_cells=1,
                layers=tuple(share.layers),
                reduction=settings.reduction if share.reduction is None else share.reduction,
                basis_ratio=(
                    settings.basis_ratio if share.basis_ratio is None else share.basis_ratio
                ),
                norm=norm,
            )
        )
    ratios = tuple(share.ratio for share in shares.values())
    return Layout(network, tuple(groups), ratios, tuple(notes))


def _nothing_to_convert(network: Network, notes: Sequence[str]) -> PlanError:
    labels = place(network.sites).labels
    by_default = [
        f"{site.name} stays static: {labels[site.name].static} "
        "(groups of glob patterns convert it all the same)"
        for site in network.sites
        if not site.fixed and labels[site.name].static
    ]
    why = "; ".join([*notes, *by_default]) or "the network has none"
    return PlanError(f"no layer can be converted: {why}")


def _static_notes(network: Network) -> list[str]:
    """Which layers cannot be converted, and why: a line per reason."""
    names: dict[str, list[str]] = {}
    for site in network.sites:
        if site.fixed:
            names.setdefault(site.fixed, []).append(site.name)
    return [
        f"{listed[0]} stays static: {reason}"
        if len(listed) == 1
        else f"{listed[0]} and {len(listed) - 1} more stay static: {reason}"
        for reason, listed in names.items()
    ]


def stage_of(network: Network) -> dict[str, int]:
    """The stage of each layer that can share a warehouse."""
    labels = {site.name: place(network.sites).labels[site.name] for site in network.sites}
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
    """Shares by stage, position or layer, in the order of their first layers."""
    placed = place(network.sites)
    members: dict[str, list[str]] = {}
    for site in network.sites:
        label = placed.labels[site.name]
        if site.fixed or label.static or site.name in kept:
            continue
        rule = settings.sharing if label.alone else stage_sharing.get(label.stage, settings.sharing)
        if rule == "layer":
            name = _distinct(plain_name(site.name), members)
        else:
            position = str(label.position) if rule == "position" else ""
            name = label.alone or f"stage{label.stage}_{label.kind}{position}"
        members.setdefault(name, []).append(site.name)
    shares = {}
    for name, layers in members.items():
        parts = [[network[layer] for layer in layers]]
        if placed.family == INFERRED:
            parts = _akin(parts[0], settings)
        for number, sites in enumerate(parts):
            part = name if number == 0 else _distinct(f"{name}_{number + 1}", members)
            shares.update(_split(part, sites, settings))
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
        patterns = [share.layers] if isinstance(share.layers, str) else share.layers
        layers = match_layers(network, patterns, f"group {name!r}")
        if not layers:
            raise PlanError(f"group {name!r}: it has no layers")
        for layer in layers:
            if layer in owner:
                raise PlanError(f"{layer} matches group {owner[layer]!r} and group {name!r}")
            owner[layer] = name
        left = tuple(layer for layer in layers if layer not in kept)
        if left:
            shares[name] = replace(share, layers=left)
    first = {site.name: index for index, site in enumerate(network.sites)}
    return dict(sorted(shares.items(), key=lambda item: first[item[1].layers[0]]))


def _distinct(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name
