"""The plan: which layers become dynamic, and how. A frozen value; no torch.

`Network` is what tracing a model finds, `Plan` is a network plus the decision what to do
with it. A plan can be compared, counted (`Plan.cost`), written (`to_dict`) and applied
(`kwlayers.convert_`).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from kwlayers import geometry
from kwlayers.cost import Cost, LayerCost, layer_costs, total_cost
from kwlayers.fields import check_fields

KINDS = ("conv1d", "conv2d", "conv3d", "linear")


class PlanError(ValueError):
    """A plan that cannot be: says what is wrong, what is allowed and what to try."""


@dataclass(frozen=True)
class Site:
    """One convolution or linear layer of a network, with its work per image.

    positions: output positions, summed over the calls of one forward.
    samples: kernels needed, i.e. the entries along the batch axis of its inputs; 1 for a
        layer that is called once on an ordinary batch.
    fixed: why the layer cannot be converted; empty if it can.
    in_positions, out_positions: of its first call, per image. order: of that call.
    block: the repeated block that holds it. beside: the first layer to read the same tensor.
    constant: whether its input is the same for every image.
    context: the numbers of the context that its block makes (`kwlayers.context`); 0 without one.
    followed: whether a module with weights that is no site (an LSTM, …) runs after it.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    positions: int = 1
    samples: int = 1
    fixed: str = ""
    in_positions: int = 0
    out_positions: int = 0
    order: int = 0
    block: str = ""
    beside: str = ""
    constant: bool = False
    context: int = 0
    followed: bool = False

    @property
    def kernel(self) -> geometry.Shape:
        """(C_out, C_in / groups, *k)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weights(self) -> int:
        """Parameters of the kernel."""
        return math.prod(self.kernel)

    @property
    def params(self) -> int:
        """Parameters of the kernel and the bias."""
        return self.weights + (self.out_channels if self.bias else 0)

    @property
    def all_in_positions(self) -> int:
        """Input positions, summed over the calls of one forward, as `positions` is."""
        return self.in_positions * (
            self.positions // self.out_positions if self.out_positions else 1
        )

    @property
    def macs(self) -> int:
        """Of the static layer, on one image."""
        return self.positions * self.weights


@dataclass(frozen=True)
class Other:
    """A module with weights of its own that is no site (ConvTranspose2d, Embedding, LSTM, …).

    kind: its class. params: of its own. No norms, whose parameters are one per channel.
    """

    name: str
    kind: str
    params: int


@dataclass(frozen=True)
class Block:
    """A repeated block: residual, inverted, of a transformer.

    params, macs: of all in it, on one image. even: whether its output has its input's shape, so
    that another like it may follow. input_size: of what it is given for one image; empty where that
    is no tensor, or not the same in every call.
    """

    name: str
    params: int
    macs: int
    even: bool
    input_size: tuple[int, ...] = ()


@dataclass(frozen=True)
class Network:
    """What tracing finds: sites in module order, and totals of the static model.

    params: all parameters, a shared tensor once. macs: multiply-adds of one forward on one
    image of `input_size` = (C, ...), in convolutions and matrix products. others: what has
    weights and stays static whatever the plan. blocks: those that hold sites.
    """

    sites: tuple[Site, ...]
    params: int
    macs: int
    input_size: tuple[int, ...]
    batch_norm: bool = True
    others: tuple[Other, ...] = ()
    blocks: tuple[Block, ...] = ()

    def norm(self, asked: str) -> str:
        """The norm of an attention: as asked, or by "auto" of the kind that the network has."""
        if asked != "auto":
            return asked
        return "batch" if self.batch_norm else "layer"

    def extended(self, added: Sequence[str]) -> Network:
        """With blocks that follow the last of a run, each like the one before: `layer3.2` after
        `layer3.1`. Raises PlanError where none can.
        """
        return functools.reduce(Network._with_block, added, self)

    def _with_block(self, name: str) -> Network:
        before = template_of(name)
        block = next((block for block in self.blocks if block.name == before), None)
        if any(other.name == name for other in self.blocks):
            raise PlanError(f"block {name!r} cannot be added: it is there already")
        if block is None:
            raise PlanError(f"block {name!r} cannot be added: there is no {before!r} to follow")
        if not block.even:
            raise PlanError(f"block {name!r} cannot be added: {before} changes its input's shape")
        own = [site for site in self.sites if site.name.startswith(f"{before}.")]
        late = max(site.order for site in own)
        sites = []
        for site in self.sites:
            moved = len(own) if site.order > late else 0
            sites.append(dataclasses.replace(site, order=site.order + moved))
            if site is own[-1]:
                sites += [_followed(one, before, name, len(own)) for one in own]
        blocks = [*self.blocks, dataclasses.replace(block, name=name)]
        return dataclasses.replace(
            self,
            sites=tuple(sites),
            blocks=tuple(blocks),
            params=self.params + block.params,
            macs=self.macs + block.macs,
        )

    @functools.cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def __getitem__(self, name: str) -> Site:
        if name not in self._by_name:
            raise PlanError(unknown_layer(name, self))
        return self._by_name[name]

    def of(self, group: Group) -> tuple[Site, ...]:
        """The sites of a group's layers."""
        return tuple(self[name] for name in group.layers)


@dataclass(frozen=True)
class Group(ABC):
    """Layers that become dynamic together, by one method: what they share, with every integer.

    Each method has its own (see `kwlayers.methods`). name: letters, digits, underscores.
    layers: module names in module order. Where a method takes `sites`, they are those of the
    layers, in that order. method: the name of the class's method. size_name: the field of `size`.
    kinds: of layers that it takes. alone: whether every layer has a group of its own. no_ratio: why
    there is no ratio as a budget, if there is none. ratio_words: what the size over its `unit` is
    called, and in short. most_ratio: its largest worth. whole: whether it is a whole number.
    """

    name: str
    layers: tuple[str, ...]

    method: ClassVar[str]
    size_name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = KINDS
    alone: ClassVar[bool] = False
    no_ratio: ClassVar[str] = ""
    ratio_words: ClassVar[tuple[str, str]]
    most_ratio: ClassVar[float] = math.inf
    whole: ClassVar[bool] = False
    # Whether more than the published size is worth having, where the budget allows it.
    grows: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """What a budget decides, at least 1: cells, kernels. Parameters grow strictly with it."""
        found: int = getattr(self, self.size_name)
        return found

    def resized(self: GroupT, size: int) -> GroupT:
        """The same of another size."""
        changed: dict[str, Any] = {self.size_name: size}
        return dataclasses.replace(self, **changed)

    @property
    def settings(self) -> dict[str, Any]:
        """All but name and layers: what most methods make their layers with."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in ("name", "layers")}

    @abstractmethod
    def unit(self, sites: Sequence[Site]) -> int:
        """The size at ratio 1, where the kernels take as many parameters as the static ones."""

    def at_ratio(self: GroupT, ratio: float, unit: int) -> GroupT:
        """The same at a ratio of its `unit`, truncated in double precision."""
        if self.no_ratio:
            raise PlanError(
                f"ratio {ratio:g}: {self.method} has no ratio, {self.no_ratio}; give params or "
                "total_ratio"
            )
        return self.resized(max(int(unit * ratio), 1))

    @classmethod
    def refuses(cls, site: Site) -> str:
        """Why a layer cannot be in such a group, whatever its settings; empty if it can."""
        return "" if site.kind in cls.kinds else f"{cls.method} takes no {site.kind} layers"

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ValueError, without the group's name, for what cannot be, fields aside."""
        if self.alone and len(sites) > 1:
            raise ValueError(f"{len(sites)} layers: by {self.method} each has a group of its own")
        for site in sites:
            if reason := self.refuses(site):
                raise ValueError(f"{site.name}: {reason}")

    @abstractmethod
    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        """What each layer costs."""

    def shared_params(self) -> int:
        """Parameters of kernels that are no layer's alone."""
        return 0

    def deployed_params(self, sites: Sequence[Site]) -> int:
        """`params`, less what is only there for training: what a budget is about."""
        return self.params(sites)

    def params_by_size(self, sites: Sequence[Site]) -> Callable[[int], int]:
        """`deployed_params` of the group at any size."""
        return lambda size: self.resized(size).deployed_params(sites)

    @property
    def added(self) -> tuple[str, ...]:
        """Blocks that the group adds to the network (`Network.extended`)."""
        return ()

    @staticmethod
    @abstractmethod
    def smallest(groups: int) -> str:
        """What kernels are made of in so many groups of the smallest size: `one cell in ...`."""

    @abstractmethod
    def describe(self) -> str:
        """Size and settings, for a line of a table: `104 of 128x128`."""

    def counted_otherwise(self, sites: Sequence[Site]) -> dict[str, int]:
        """Why counters of operators find other MACs in the built layers, and how many more."""
        modulation = sum(cost.modulation_macs for cost in self.costs(sites))
        return {"products with attention, which it does not see": -modulation}

    def params(self, sites: Sequence[Site]) -> int:
        """Parameters in place of the layers' own weights (and of biases that it takes over)."""
        own = sum(cost.kernel_params + cost.attention_params for cost in self.costs(sites))
        return self.shared_params() + own

    def replaced(self, sites: Sequence[Site]) -> int:
        """Parameters of the static layers that it takes the place of."""
        costs = zip(sites, self.costs(sites), strict=True)
        return sum(site.params - cost.static_params for site, cost in costs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe stores it."""
        return {"method": self.method, **_plain(self)}


GroupT = TypeVar("GroupT", bound=Group)


@dataclass(frozen=True)
class Plan:
    """A network and what becomes dynamic. Layers in no group stay as they are.

    notes: what planning had to round or leave out (not part of the plan's identity).
    """

    network: Network
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def warehouses(self) -> tuple[Any, ...]:
        """The groups whose method is KernelWarehouse, in the order of their first layers."""
        return tuple(group for group in self.groups if group.method == "kernel_warehouse")

    @functools.cached_property
    def extended(self) -> Network:
        """The network with the blocks that groups add."""
        return self.network.extended([name for group in self.groups for name in group.added])

    def of(self, group: Group) -> tuple[Site, ...]:
        """The sites of a group's layers."""
        return self.extended.of(group)

    def cost(self) -> Cost:
        """Exact parameters and MACs (of one image), by part."""
        return total_cost(self)

    def cost_by_layer(self) -> tuple[LayerCost, ...]:
        """The same, layer by layer, in module order. What a group's layers share is no one's."""
        return layer_costs(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        return {"network": _plain(self.network), "groups": self.groups_to_list()}

    def groups_to_list(self) -> list[dict[str, Any]]:
        """The groups as plain data: what a recipe stores."""
        return [group.to_dict() for group in self.groups]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_dict`. Raises PlanError for what is not one."""
        if not isinstance(data, Mapping):
            raise PlanError(f"plan: expected a mapping, got {type(data).__name__}")
        network = _from_plain(Network, data.get("network", {}), "network")
        parts = {
            name: tuple(
                _from_plain(part, one, f"network.{name}")
                for one in _listed(getattr(network, name), f"network.{name}")
            )
            for name, part in (("sites", Site), ("others", Other), ("blocks", Block))
        }
        return cls.from_groups(dataclasses.replace(network, **parts), data.get("groups", ()))

    @classmethod
    def from_groups(cls, network: Network, groups: Iterable[Mapping[str, Any]]) -> Plan:
        """Put groups, as in a recipe, on a traced network.

        `layers` may be glob patterns over module names (`layer1.*.conv2`).
        """
        built = []
        found = [group_from(data) for data in _listed(groups, "groups")]
        extended = network.extended([name for group in found for name in group.added])
        for group in found:
            patterns = _listed(group.layers, f"group {group.name!r}: layers")
            layers = match_layers(extended, patterns, f"group {group.name!r}")
            built.append(dataclasses.replace(group, layers=layers))
        return cls(network, tuple(built))


def match_layers(network: Network, patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The names that match any of the glob `patterns`, in module order.

    Raises PlanError for a pattern that matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = [s.name for s in network.sites if fnmatch.fnmatchcase(s.name, pattern)]
        if not hits:
            raise PlanError(f"{where}: {unknown_layer(pattern, network)}")
        matched.update(hits)
    return tuple(site.name for site in network.sites if site.name in matched)


def shown(name: str) -> str:
    """A module's name in a message; the root has none."""
    return name or "the model itself"


def template_of(name: str) -> str:
    """The block that an added one follows and is like: `layer3.1` for `layer3.2`."""
    parent, _, index = name.rpartition(".")
    if not (parent and index.isdigit() and int(index) > 0):
        raise PlanError(
            f"block {name!r} cannot be added: expected a name that ends in a number, e.g. layer3.2"
        )
    return f"{parent}.{int(index) - 1}"


def _followed(site: Site, before: str, name: str, later: int) -> Site:
    """The site of an added block that is like one of the block before."""

    def renamed(old: str) -> str:
        return f"{name}{old[len(before) :]}" if old.startswith(f"{before}.") else old

    return dataclasses.replace(
        site,
        name=renamed(site.name),
        block=name if site.block == before else renamed(site.block),
        beside=renamed(site.beside),
        order=site.order + later,
    )


def plain_name(name: str) -> str:
    """A module's name as one of a group: letters, digits and underscores."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    return plain if plain.strip("_") else "layer"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def short(value: object) -> str:
    """Whatever was given, in one short line."""
    return " ".join(reprlib.repr(value).split())


def unknown_layer(pattern: str, network: Network) -> str:
    """The message for a name or pattern that no layer matches."""
    names = [site.name for site in network.sites]
    said = f"no convolution or linear layer is named {pattern!r}"
    if not names:
        return f"{said}: the network has none"
    close = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {names[0]!r} to {names[-1]!r}"
    return f"{said}; {hint}"


def _check(plan: Plan) -> None:
    order = {site.name: index for index, site in enumerate(plan.extended.sites)}
    owner: dict[str, str] = {}
    for group in plan.groups:
        where = f"group {group.name!r}"
        name = group.name
        if not (isinstance(name, str) and name.isascii() and name.replace("_", "").isalnum()):
            raise PlanError(f"{where}: a name is made of letters, digits and underscores")
        if group.name in owner.values():
            raise PlanError(f"{where}: the name is taken; every group needs its own")
        if not isinstance(group.size, int) or isinstance(group.size, bool) or group.size < 1:
            said = f"{group.size_name} is {group.size!r}"
            raise PlanError(f"{where}: {said}; an integer >= 1 is needed")
        if not group.layers:
            raise PlanError(f"{where}: it has no layers")
        sites = plan.of(group)
        if [order[s.name] for s in sites] != sorted({order[s.name] for s in sites}):
            raise PlanError(f"{where}: layers must be listed once each, in module order")
        for site in sites:
            if site.fixed:
                raise PlanError(f"{where}: {shown(site.name)} cannot be converted: {site.fixed}")
            if site.name in owner:
                raise PlanError(f"{where}: {site.name} is already in group {owner[site.name]!r}")
            owner[site.name] = group.name
        try:
            check_fields(group)
            group.check(sites)
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from None


def group_from(data: Any) -> Group:
    """The group of plain data, of the method that it names. Raises PlanError for what is none."""
    from kwlayers.methods import find

    if isinstance(data, Group):
        return data
    if not isinstance(data, Mapping):
        raise PlanError(f"groups: expected a mapping, got {type(data).__name__}")
    rest = dict(data)
    group: Group = _from_plain(find(rest.pop("method", "kernel_warehouse")).group, rest, "groups")
    return group


def _plain(value: Any) -> Any:
    """Dataclasses to dicts and tuples to lists, so that JSON and YAML give the same back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _listed(value: Any, where: str) -> Any:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise PlanError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _from_plain(cls: type[Any], data: Any, where: str) -> Any:
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: expected a mapping, got {type(data).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(data) - set(names)):
        raise PlanError(f"{where}: unknown keys {unknown}; allowed are {names}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except TypeError as error:
        raise PlanError(f"{where}: {error}") from None
