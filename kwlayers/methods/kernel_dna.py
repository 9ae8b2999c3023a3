"""KernelDNA: layers of a stage use one kernel, which each adapts, and gates what it sees.

Huang, Zhang & Ren, "KernelDNA: Dynamic Kernel Sharing via Decoupled Naive Adapters", 2025, arXiv
2503.23379. A parent stays the static layer that it is. Its children have its kernel W, of k
positions; for C input channels, C_out output channels and a gate of width r:

    g = sigmoid(fc2(relu(norm(fc1(mean of x over positions)))))       (B, C), fc1 without bias
    y = conv(g * x, W * (1 + position) * (1 + filter))                no position if k = 1

    parameters  W once; a child has 2*C*r + 2r + C (gate) + C_out + k (if k > 1)
    MACs        conv + 2*C*r; modulation C * positions in

`position` (1, 1, *k) and `filter` (C_out, 1, ...) do not depend on x: a child has one kernel for
all images, and a batch, however large, needs |W| products for it. These are no image's MACs and
are not counted.

Published, with r = C / 4, and C / 24 for the 1x1 layers of MobileNetV2 that project (here: for all
1x1 layers with fewer outputs than inputs):

    ResNet18     layer3 and layer4, with a third block each: 0.conv2 and 1.conv1 are children of
                 1.conv2, and 2.conv1 is one of 2.conv2
    ResNet50     layer3 and layer4; the 3x3 of the blocks after the first in pairs, child and
                 parent. The one that is left in layer3 gets a seventh block as its parent
    MobileNetV2  stages of three blocks or more; both 1x1 layers of the blocks after the first are
                 children of the last block's

Other basic ResNets, and unknown networks in all their stages, have the layers of the blocks after
the first in pairs, and one that is left stays static. Strided blocks, shortcuts, and depthwise and
grouped layers stay as they are everywhere.

The published code differs:
- It draws all kernels anew, by three rules for its three models. Here static layers, parents among
  them, keep what they have. Gates start as in ResNet18 (Kaiming-normal, fan out), but fc2's bias
  at zero, as in MobileNetV2.
- A gate's batch norm cannot train on a batch of one. Here it then takes its running statistics.
- Added blocks start by torch.nn's defaults, as the published ResNet50's do; ResNet18's there are
  Kaiming-normal (fan out), and a model that draws its own layers otherwise does not draw these.
- MobileNetV2 loses its dropout there. A converted model keeps its own.

A warm start keeps the parents' weights. Children cannot keep theirs: `WarmStart.errors` says how
far theirs are from their parents'. Their gates start as published, at about 1/2, which the batch
norm behind them has to learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.attention import norm_of, pooled
from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicConvNd, kaiming_normal_, like_static
from kwlayers.families import Label
from kwlayers.fields import allow
from kwlayers.layout import Layout
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.ops.reference import CONV
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, PlanError, Site, counted, match_layers, plain_name
from kwlayers.rules import by_reason, checked_rules
from kwlayers.stages import place

REDUCTION, PROJECT_REDUCTION = 1 / 4, 1 / 24

# Of the backbones whose published last stages alone share.
_LAST_STAGES, _RESNET_STAGES = 2, 4


def width_of(in_channels: int, reduction: float = REDUCTION) -> int:
    """r, the hidden width of a gate."""
    return max(int(in_channels * reduction), 1)


def _projects(site: Site) -> bool:
    return math.prod(site.kernel_size) == 1 and site.in_channels > site.out_channels


@dataclass(frozen=True)
class KernelDNAGroup(Group):
    """Layers that use the kernel of one of them, which stays as it is.

    width: r, which the budget decides. Some layers may be in `blocks` that the group adds.
    """

    parent: str = allow("the layer whose kernel all use", str)
    width: int = allow("hidden width of the children's gates, r", int, least=1)
    blocks: str = allow("blocks that are added to the network, with commas between", str, "")

    method: ClassVar[str] = "kernel_dna"
    size_name: ClassVar[str] = "width"
    ratio_words: ClassVar[tuple[str, str]] = ("r over the published, all layers", "r / published")
    most_ratio: ClassVar[float] = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("conv1d", "conv2d", "conv3d")
    no_ratio: ClassVar[str] = "its layers use other layers' kernels"
    grows: ClassVar[bool] = False

    def unit(self, sites: Sequence[Site]) -> int:
        """The published r."""
        site = sites[0]
        return width_of(site.in_channels, PROJECT_REDUCTION if _projects(site) else REDUCTION)

    @property
    def added(self) -> tuple[str, ...]:
        if not isinstance(self.blocks, str):
            return ()  # which is said when fields are checked
        return tuple(name.strip() for name in self.blocks.split(",") if name.strip())

    def check(self, sites: Sequence[Site]) -> None:
        parent = next((site for site in sites if site.name == self.parent), None)
        if parent is None:
            raise ValueError(f"parent {self.parent!r}: expected one of {', '.join(self.layers)}")
        if len(sites) == 1:
            raise ValueError(f"{self.parent} has no children: no other layer uses its kernel")
        super().check(sites)
        for site in sites:
            if _like(site) != _like(parent):
                raise ValueError(
                    f"{site.name} cannot use the kernel of {parent.name}: {_described(site)}, not "
                    f"{_described(parent)}"
                )

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        return tuple(
            self._of_parent(site) if site.name == self.parent else self._of_child(site)
            for site in sites
        )

    def _of_parent(self, site: Site) -> LayerCost:
        bias = site.params - site.weights
        return LayerCost(site.name, self.name, bias, site.macs, kernel_params=site.weights)

    def _of_child(self, site: Site) -> LayerCost:
        channels, positions = site.in_channels, math.prod(site.kernel_size)
        gate = 2 * channels * self.width + 2 * self.width + channels
        adapters = site.out_channels + (positions if positions > 1 else 0)
        return LayerCost(
            name=site.name,
            group=self.name,
            static_params=site.params - site.weights,
            conv_macs=site.macs,
            attention_params=gate + adapters,
            attention_macs=site.samples * 2 * channels * self.width,
            modulation_macs=channels * site.all_in_positions,
        )

    @staticmethod
    def smallest(groups: int) -> str:
        return "gates of width 1 and one kernel a group"

    def describe(self) -> str:
        return f"r = {self.width}"


def _like(site: Site) -> tuple[object, ...]:
    """What layers of one kernel have in common."""
    return site.kind, site.kernel, site.groups


def _described(site: Site) -> str:
    shape = "x".join(map(str, site.kernel))
    return f"{site.kind} {shape}" + (f" in {site.groups} groups" if site.groups > 1 else "")


# Layers of one kernel: the children, and last the parent.
Family = tuple[str, ...]


@dataclass(frozen=True)
class KernelDNASettings(AloneSettings):
    """KernelDNA where it was published, with the published r or less for a budget.

    project_reduction: of 1x1 layers with fewer outputs than inputs. deepen: whether stages get the
    blocks that the published ones have. A rule keeps layers static or sets their reduction; without
    its parent, or its last child, a group is none.
    """

    reduction: float = allow(
        "gate width as a part of the channels", float, REDUCTION, above=0, most=1
    )
    project_reduction: float = allow(
        "the same, of 1x1 layers that narrow", float, PROJECT_REDUCTION, above=0, most=1
    )
    deepen: bool = allow("whether blocks are added where published models have more", bool, True)
    stages: int = allow(
        "how many stages share kernels, from the last; 0: 2 of a ResNet, all of others",
        int,
        0,
        least=0,
    )
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "kernel_dna"
    group_type: ClassVar[type[Group]] = KernelDNAGroup
    sizes: ClassVar[tuple[str, ...]] = ("reduction", "project_reduction")
    static_roles: ClassVar[tuple[str, ...]] = (
        "stem", "head", "patch embedding", "shortcut", "last convolution",
    )  # fmt: skip
    own: ClassVar[tuple[str, ...]] = ("reduction",)

    def __post_init__(self) -> None:
        for number, rule in enumerate(checked_rules(self.rules)):
            if rule.dynamic or rule.share is not None:
                raise PlanError(
                    f"rule {number + 1} ({', '.join(rule.patterns)}): by kernel_dna layers share "
                    "nothing but what its models do; stages and deepen say where, a rule keeps "
                    "layers static or sets their reduction"
                )
        super().__post_init__()

    def declines(self, site: Site, label: Label) -> str:
        return "depthwise and grouped layers stay static" if site.groups > 1 else ""

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> KernelDNAGroup:
        """sites: the parent's is the last; those in blocks that `network` lacks are added."""
        parent = sites[-1]
        width = width_of(
            parent.in_channels, own.project_reduction if _projects(parent) else own.reduction
        )
        layers = tuple(site.name for site in sites)
        return KernelDNAGroup(
            name, layers, parent.name, width, ",".join(_missing(network, [layers]))
        )

    def lay_out(
        self,
        network: Network,
        keep_static: frozenset[str] = frozenset(),
        stage_sharing: Mapping[int, str] | None = None,
    ) -> Layout:
        if stage_sharing:
            raise PlanError("sharing by stage: by kernel_dna layers share what its models do")
        families = self._families(network)
        wide = network.extended(_missing(network, families))
        families, reductions = self._ruled(wide, families)
        families = _without(families, keep_static)
        if not families:
            raise self._nothing(network)
        groups = []
        for family in families:
            own = reductions.get(family[-1])
            settings = self if own is None else self.changed(reduction=own, project_reduction=own)
            sites = [wide[name] for name in family]
            groups.append(self.group(network, plain_name(family[-1]), sites, settings))
        notes = by_reason({site.name: self.refuses(site) for site in network.sites})
        if added := [name for group in groups for name in group.added]:
            notes.append(
                f"{counted(len(added), 'block')} added, as published: {', '.join(added)}; "
                "deepen=False adds none"
            )
        # A budget keeps what the reductions say of one width to another.
        relative = tuple(group.size / group.unit(wide.of(group)) for group in groups)
        return Layout(network, tuple(groups), relative, tuple(notes))

    def lower(self) -> Iterator[dict[str, Any]]:
        if self.deepen:
            yield {"deepen": False}
        yield {"stages": self.stages + 1 if self.stages else _RESNET_STAGES}

    def why_static(self, network: Network) -> dict[str, str]:
        reasons = super().why_static(network)
        static = frozenset(name for name, reason in reasons.items() if reason)
        left = {name for family in _without(self._families(network), static) for name in family}
        alone = "no layer is left to share its kernel with"
        return {n: reason or ("" if n in left else alone) for n, reason in reasons.items()}

    def _by_default(self, network: Network) -> dict[str, str]:
        stages = self._stages(network)
        able = {name for stage in stages for family in stage for name in family}
        shared = {name for family in self._chosen(network, stages) for name in family}
        found = super()._by_default(network)
        for name, reason in found.items():
            if not reason and name not in able:
                found[name] = "no other layer of its stage is to have its kernel"
            elif not reason and name not in shared:
                last = counted(self._last(network), "stage")
                found[name] = f"only the last {last} of those that can share kernels"
        return found

    def _ruled(
        self, network: Network, families: Sequence[Family]
    ) -> tuple[list[Family], dict[str, float | None]]:
        """What rules leave of families, and the reductions that they set, by parent."""
        left, own = list(families), {}
        for number, rule in enumerate(self.rules):
            where = f"rule {number + 1} ({', '.join(rule.patterns)})"
            matched = frozenset(match_layers(network, rule.patterns, where))
            if rule.static:
                left = _without(left, matched)
                continue
            touched = [family for family in left if matched & set(family)]
            if not touched:
                raise PlanError(f"{where}: the layers are static; by kernel_dna no rule changes it")
            for *children, parent in touched:
                if others := [child for child in children if child not in matched]:
                    raise PlanError(
                        f"{where}: gates of the children of {parent} have one width; give the rule "
                        f"all of them, {', '.join(others)} too"
                    )
                own[parent] = rule.reduction
        return left, own

    def _families(self, network: Network) -> list[Family]:
        """Who shares, rules aside; some of it in blocks to be added."""
        return self._chosen(network, self._stages(network))

    def _chosen(self, network: Network, stages: Sequence[list[Family]]) -> list[Family]:
        return [family for stage in stages[-self._last(network) :] for family in stage]

    def _last(self, network: Network) -> int:
        """How many of the stages that can share do; 0 for all."""
        is_resnet = place(network.sites).variant in ("basic", "bottleneck")
        return self.stages or (_LAST_STAGES if is_resnet else 0)

    def _stages(self, network: Network) -> list[list[Family]]:
        """The families of each stage that can share."""
        model = place(network.sites).variant
        known = {block.name for block in network.blocks}
        roles: dict[str, list[str]] = {}
        for site in network.sites:
            roles.setdefault(site.block, []).append(site.name[len(site.block) + 1 :])
        stages = []
        for run in _runs(network):
            extra = _following(run[-1]) if self.deepen else ""
            stages.append(_sharing(model, run, "" if extra in known else extra, roles))
        wide = network.extended(_missing(network, [f for stage in stages for f in stage]))
        reasons = super()._by_default(wide)
        static = frozenset(name for name, reason in reasons.items() if reason)
        alike = [[_alike(wide, family) for family in stage] for stage in stages]
        return [left for stage in alike if (left := _without(stage, static))]


def _runs(network: Network) -> list[list[str]]:
    """The blocks of each stage: one after the other in one container, whose shape they keep."""
    runs: list[list[str]] = []
    before = None
    for block in network.blocks:
        container = block.name.rpartition(".")[0]
        if not runs or container != before or not block.even:
            runs.append([])
        runs[-1].append(block.name)
        before = container
    return runs


def _following(block: str) -> str:
    """The name of a block that is added behind: `layer3.2` for `layer3.1`; empty if none can be."""
    container, _, index = block.rpartition(".")
    return f"{container}.{int(index) + 1}" if container and index.isdigit() else ""


def _sharing(
    model: str, run: Sequence[str], extra: str, roles: Mapping[str, Sequence[str]]
) -> list[Family]:
    """The families of a stage's blocks. extra: a block that may be added; empty if none may.

    model: whose published sharing it has, a `Recognised.variant`. roles: the layers of each block,
    by their names in it.
    """
    first, *after = run
    if model == "basic" and len(run) == 2:
        last = run[1]
        own: list[Family] = [(f"{first}.conv2", f"{last}.conv1", f"{last}.conv2")]
        return [*own, (f"{extra}.conv1", f"{extra}.conv2")] if extra else own
    if model == "bottleneck" and len(after) % 2 and extra:
        after.append(extra)
    together = (
        [after] if model == "mobilenet" else [after[i : i + 2] for i in range(0, len(after), 2)]
    )
    return [
        tuple(f"{block}.{role}" for block in blocks if role in roles.get(block, (role,)))
        for blocks in together
        if len(blocks) > 1
        for role in (("conv2",) if model == "bottleneck" else roles[blocks[-1]])
    ]


def _alike(network: Network, family: Family) -> Family:
    """The layers of a family that can use the parent's kernel."""
    parent = _like(network[family[-1]])
    return tuple(name for name in family if _like(network[name]) == parent)


def _without(families: Sequence[Family], static: frozenset[str]) -> list[Family]:
    """Families without these layers, as long as there is a parent and a child."""
    found = []
    for family in families:
        left = tuple(name for name in family if name not in static)
        if len(left) > 1 and left[-1] == family[-1]:
            found.append(left)
    return found


def _missing(network: Network, families: Sequence[Family]) -> list[str]:
    """The blocks that families are in and the network lacks."""
    known = {site.name for site in network.sites}
    names = [name for family in families for name in family if name not in known]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


class Gate(nn.Module):
    """g (B, C), each in (0, 1), for an input (B, C, *S)."""

    def __init__(self, in_channels: int, width: int, **to: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, width, bias=False, **to)
        self.norm = norm_of("batch", width, to.get("device"), to.get("dtype"))
        self.fc2 = nn.Linear(width, in_channels, **to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) weights, a bias of zeros, the norm at one and zero."""
        for layer in (self.fc1, self.fc2):
            kaiming_normal_(layer.weight)
        nn.init.zeros_(self.fc2.bias)
        self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.norm(self.fc1(pooled(x))))))


_Static = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _DNAConvNd(DynamicConvNd):
    """Settings beside torch.nn's: the parent, a static layer with a kernel of the same shape, which
    somebody else registers; and the gate's width, C / 4 by default.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("filter", "position")
    position: nn.Parameter | None

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        parent: _Static | None = None,
        width: int | None = None,
        **to: Any,
    ) -> None:
        kernel = self.geometry.kernel
        if parent is None:
            raise ValueError(f"parent: a layer is needed that has a kernel of shape {kernel}")
        found = tuple(parent.weight.shape)
        if (found, parent.groups) != (kernel, self.groups):
            raise ValueError(
                f"parent: its kernel is {found} in {counted(parent.groups, 'group')}; expected "
                f"{kernel} in {counted(self.groups, 'group')}"
            )
        if width is None:
            width = width_of(in_channels)
        if width < 1:
            raise ValueError(f"width {width}: at least 1")
        self.borrowed = (parent,)
        self.gate = Gate(in_channels, width, **to)
        ones = (1,) * self.rank
        self.filter = nn.Parameter(torch.zeros(kernel[0], 1, *ones, **to))
        position = torch.zeros(1, 1, *kernel[2:], **to) if math.prod(kernel[2:]) > 1 else None
        self.position = None if position is None else nn.Parameter(position)
        self._own_bias(bias, **to)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The parent's kernel as it is, which is not reset; the gate as made."""
        self.gate.reset_parameters()
        for adapter in (self.filter, self.position, self.bias):
            if adapter is not None:
                adapter.zero_()

    @property
    def parent(self) -> _Static:
        """The layer whose kernel this one uses."""
        (found,) = self.borrowed
        assert isinstance(found, _Static)
        return found

    def kernel(self) -> Tensor:
        """out: (C_out, C_in / groups, *k)."""
        scale = 1 + self.filter
        if self.position is not None:
            scale = scale * (1 + self.position)
        return self.parent.weight * scale

    def convolve(self, x: Tensor) -> Tensor:
        seen: Tensor = self.gate(x)
        x = x * seen.to(x.dtype).view(*seen.shape, *(1,) * self.rank)
        return CONV[self.rank](self.padded(x), self.kernel(), None, *self.geometry[1:])


class KernelDNAConv1d(_DNAConvNd):
    """`nn.Conv1d` that gates its input and adapts another layer's kernel."""

    rank = 1


class KernelDNAConv2d(_DNAConvNd):
    """`nn.Conv2d` that gates its input and adapts another layer's kernel."""

    rank = 2


class KernelDNAConv3d(_DNAConvNd):
    """`nn.Conv3d` that gates its input and adapts another layer's kernel."""

    rank = 3


_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: KernelDNAConv1d,
    nn.Conv2d: KernelDNAConv2d,
    nn.Conv3d: KernelDNAConv3d,
}


def _convert(
    plan: Plan, group: KernelDNAGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """No kernel is made for a sample: `backend` and `workspace_mb` have nothing to decide."""
    parent = layers[group.parent]
    swaps: dict[nn.Module, nn.Module] = {}
    errors = {}
    for name, layer in layers.items():
        if layer is not parent:
            swaps[layer] = like_static(_LAYERS, layer, parent=parent, width=group.width)
        if how.warm_start:
            errors[name] = _distance(layer.weight, parent.weight)
    return Converted(swaps, errors=errors)


@torch.no_grad()
def _distance(static: Tensor, kept: Tensor) -> float:
    """|W - W'| / |W|, as `WarmStart` has it."""
    return float((static - kept).norm()) / (float(static.norm()) or 1.0)


METHOD = Method(
    name="kernel_dna",
    title="KernelDNA",
    paper="Huang, Zhang & Ren, 2025, arXiv 2503.23379",
    group=KernelDNAGroup,
    settings=KernelDNASettings,
    convert=_convert,
)
