"""PAD-Net: a part of the weights is mixed of K kernels for each sample, the others are static.

He et al., "PAD-Net: An Efficient Framework for Dynamic Networks", ACL 2023, arXiv 2211.05528. To
K kernels W_k and an attention alpha, those of a base (DY-Conv or ODConv), every layer adds a static
kernel V, a mask m that is 1 where the kernel is dynamic, and a number phi:

    l_d = 2 * sigmoid(phi), l_s = 2 - l_d                     phi starts at 0, both at 1
    W = m * l_d * sum_k alpha_k W_k + (1 - m) * l_s * V       for each sample

Which weights are dynamic is decided once, for all layers together: at first all are, then before
training `kwlayers.partition_` leaves as many as the plan says, `dynamic`. After training
`kwlayers.deploy_` drops what m hides. With n dynamic weights in a layer (sum of m):

    parameters  stored (K + 1) * |W| + 1;  deployed K * n + (|W| - n) + 1;
                and the base's attention (and K * C_out biases by dyconv)
    MACs        conv, attention, mixing K * |W|: as the base's

In a batch of more than K samples, and where compiled, V is mixed as one kernel more: (K + 1) * |W|
MACs a sample. Products with m and l, up to (K + 1) * |W| of them, are not counted.

T falls from 30 to 1 over the warm-up, as the base's. Published: K = 4 and 30 % dynamic in ResNet-50
by DY-Conv, every convolution of the blocks and their shortcuts. On purpose different from the
published code:

- Both parts are scaled. There neither is by default, and one without the other fails.
- Exactly `dynamic` weights stay dynamic. There ties at the threshold turn static, however many.
- The partition reaches every layer. There no weight is paired with its mask, and it cannot run.
- By ODConv the attention over positions, channels and filters weighs both parts, so that a static
  part is ODConv's with K = 1. There it has factors of its own, which are learned and the same for
  all samples (more parameters), and every layer with k > 1 or K > 1 fails.
- The mask is a buffer of its layer only. There later layers get those of all before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import methods
from kwlayers.cost import LayerCost
from kwlayers.dynamic import kaiming_normal_
from kwlayers.fields import allow, allow_max_temperature, allow_norm, allow_reduction
from kwlayers.methods import Conversion, Converted, Method, dyconv, odconv
from kwlayers.mixed import KernelGroup, MixedLayer, convert_mixed
from kwlayers.ops import kw_conv, workspace_bytes
from kwlayers.ops.remade import conv_remade
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, PlanError, Site
from kwlayers.rules import Share
from kwlayers.schedule import WAREHOUSES

BASES = ("dyconv", "odconv")
# What more than all weights would take: no budget has it.
_OUT_OF_REACH = 2**62


@dataclass(frozen=True)
class PADNetGroup(Group):
    """All dynamic layers, of which `dynamic` weights are mixed of num_kernels kernels.

    base: the method that mixes them. reduction, norm, max_temperature: of its attention.
    """

    dynamic: int = allow("weights that are dynamic, of all layers together", int, least=1)
    base: str = allow("the method that mixes kernels", str, "dyconv", *BASES)
    num_kernels: int = allow("kernels, K", int, 4, least=2)
    reduction: float = allow_reduction()
    norm: str = allow_norm(", by odconv")
    max_temperature: float = allow_max_temperature()

    method: ClassVar[str] = "pad_net"
    size_name: ClassVar[str] = "dynamic"
    ratio_words: ClassVar[tuple[str, str]] = ("part of the weights that is dynamic", "dynamic part")
    most_ratio: ClassVar[float] = 1.0

    def unit(self, sites: Sequence[Site]) -> int:
        """All weights: the ratio is the part that is dynamic."""
        return sum(site.weights for site in sites)

    def at_ratio(self, ratio: float, unit: int) -> PADNetGroup:
        if ratio > self.most_ratio:
            raise PlanError(
                f"ratio {ratio:g}: by pad_net it is the part of the weights that is dynamic, at "
                "most 1; more kernels are num_kernels"
            )
        return super().at_ratio(ratio, unit)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            if reason := methods.find(self.base).group.refuses(site):
                raise ValueError(f"{site.name}: {reason}")
        if self.dynamic > self.unit(sites):
            raise ValueError(
                f"dynamic {self.dynamic:,}: the layers have {self.unit(sites):,} weights"
            )

    def of_base(self, layer: str) -> KernelGroup:
        """A layer as the base has it."""
        kind: Any = methods.find(self.base).group
        own = {field.name for field in fields(kind)} - {"name", "layers"}
        made: KernelGroup = kind(self.name, (layer,), **{name: getattr(self, name) for name in own})
        return made

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        """As the base's, and a static kernel and its scale."""
        found = []
        for site in sites:
            (cost,) = self.of_base(site.name).costs([site])
            found.append(replace(cost, kernel_params=cost.kernel_params + site.weights + 1))
        return tuple(found)

    def deployed_params(self, sites: Sequence[Site]) -> int:
        return self.params_by_size(sites)(self.dynamic)

    def params_by_size(self, sites: Sequence[Site]) -> Callable[[int], int]:
        weights, kernels = self.unit(sites), self.num_kernels
        static = self.params(sites) - kernels * weights

        def count(size: int) -> int:
            return static + (kernels - 1) * size + (_OUT_OF_REACH if size > weights else 0)

        return count

    def counted_otherwise(self, sites: Sequence[Site]) -> dict[str, int]:
        weights = sum(site.samples * site.weights for site in sites)
        apart = self.of_base(sites[0].name).counted_otherwise(sites[:1])
        found = dict.fromkeys(apart, 0)
        for site in sites:
            for why, more in self.of_base(site.name).counted_otherwise([site]).items():
                found[why] += more
        found["static kernels, mixed with the others while it is trained"] = weights
        return found

    @staticmethod
    def smallest(groups: int) -> str:
        return "static kernels and one dynamic weight"

    def describe(self) -> str:
        return f"{self.dynamic:,} dynamic of K = {self.num_kernels}"


@dataclass(frozen=True)
class PADNetSettings(AloneSettings):
    """PAD-Net with a part of all weights dynamic, or as many as a budget allows.

    base: "dyconv" or "odconv", whose layers become dynamic. num_kernels: K of each. norm, by
    odconv: "batch", "layer" or "auto": "layer" if the model has no batch norm. A rule's ratio is
    for all layers.
    """

    base: str = allow("the method that mixes kernels", str, "dyconv", *BASES)
    num_kernels: int = allow("kernels of each layer, K", int, 4, least=2)
    dynamic_fraction: float = allow(
        "part of all weights that is dynamic", float, 0.3, above=0, most=1
    )
    reduction: float = allow_reduction()
    norm: str = allow_norm(", by odconv", auto=True)
    max_temperature: float = allow_max_temperature()
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "pad_net"
    group_type: ClassVar[type[Group]] = PADNetGroup
    sizes: ClassVar[tuple[str, ...]] = ("dynamic_fraction",)
    own: ClassVar[tuple[str, ...]] = ("ratio",)

    @property
    def _placed(self) -> AloneSettings:
        """The base's settings, which say what becomes dynamic."""
        found = methods.find(self.base).settings()
        assert isinstance(found, AloneSettings)
        return found

    def refuses(self, site: Site) -> str:
        return self._placed.refuses(site)

    def _by_default(self, network: Network) -> dict[str, str]:
        return self._placed._by_default(network)

    def gathered(self, network: Network, layers: Mapping[str, Share]) -> list[list[str]]:
        if len({share.ratio for share in layers.values()}) > 1:
            raise PlanError(
                "one threshold for all layers needs one ratio: give the rule all layers"
            )
        return [list(layers)]

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> PADNetGroup:
        norm = network.norm(self.norm)
        made = PADNetGroup(
            self.method,
            tuple(site.name for site in sites),
            1,
            self.base,
            self.num_kernels,
            self.reduction,
            norm,
            self.max_temperature,
        )
        return made.at_ratio(self.dynamic_fraction, made.unit(sites))

    def rounded(self, sizes: int, units: int, asked: float) -> str:
        return f"{sizes / units:.4g} of the weights dynamic, not {asked:.4g}: a number of them is"


class PADLayer(MixedLayer):
    """`kernels` as the base's, and `static` (1, C_out, C_in / groups, *k), its scale, the mask.

    Settings beside torch.nn's: the base's; num_kernels is at least 2, by default 4. backend: by
    odconv of 1x1 layers only. mask: like
    `static`, true where the kernel is dynamic; None once packed. order: of a packed layer.
    """

    mask: Tensor | None
    order: Tensor | None

    def _build(self, in_channels: int, bias: bool, *, num_kernels: int = 4, **own: Any) -> None:
        super()._build(in_channels, bias, num_kernels=num_kernels, **own)  # type: ignore[safe-super]

    def _own_kernels(
        self,
        num_kernels: int,
        bias: bool,
        backend: str | None,
        workspace_mb: float | None,
        **kwargs: Any,
    ) -> None:
        if num_kernels < 2:
            raise ValueError(f"num_kernels {num_kernels}: at least 2, or nothing is dynamic")
        super()._own_kernels(num_kernels, bias, backend, workspace_mb, **kwargs)
        shape = (1, *self.geometry.kernel)
        self.static = nn.Parameter(torch.empty(shape, **kwargs))
        self.scale = nn.Parameter(torch.zeros((), **kwargs))
        mask = torch.ones(shape, dtype=torch.bool, device=kwargs.get("device"))
        self.register_buffer("mask", mask)
        self.register_buffer("order", None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the base's; the static kernel like the others, even scales, all dynamic."""
        super().reset_parameters()
        kaiming_normal_(self.static[0])
        self.scale.zero_()
        if self.mask is not None:
            self.mask.fill_(True)

    @torch.no_grad()
    def start_from(self, weight: Tensor, scale: float, alike: bool) -> None:
        """As the base's kernels, and `static` what their mean is: whatever the mask, the same."""
        super().start_from(weight, scale, alike)
        self.static.copy_(scale * weight.detach().reshape(self.static.shape))
        self.static.requires_grad_(weight.requires_grad)

    @torch.no_grad()
    def pack_(self) -> None:
        """Keep what the mask shows: `kernels` (K, n) and `static` (1, |W| - n), in order.

        `order` is like a kernel, and says where each weight is in a row of the two. The parameters
        are new ones.
        """
        assert self.mask is not None
        shown = self.mask.flatten()
        order = torch.empty(shown.shape, dtype=torch.int32, device=shown.device)
        places = torch.arange(len(shown), dtype=torch.int32, device=shown.device)
        dynamic = int(shown.sum())
        order[shown], order[~shown] = places[:dynamic], places[dynamic:]
        for name, part in (("kernels", shown), ("static", ~shown)):
            whole = getattr(self, name)
            packed = nn.Parameter(whole.flatten(1)[:, part], whole.requires_grad)
            setattr(self, name, packed)
        self.order = order.view(self.geometry.kernel)
        self.mask = None

    def mixed(self, x: Tensor, alpha: Tensor, position: Tensor | None = None) -> Tensor:
        """x: (B, C, *S)  alpha: (B, K)  position: (B, k)  out: (B, C_out, *S'), with the biases."""
        x, nbytes = self.padded(x), workspace_bytes(x, self.workspace_mb)
        l_d = 2 * torch.sigmoid(self.scale)
        weights = torch.cat((l_d * alpha, (2 - l_d).expand(alpha.shape[0], 1)), dim=1)
        each = [weights] if position is None else [position, weights]
        # The kernels of so few take less than the cells do. A graph is for any number of samples.
        chosen = self.backend is not None or torch.compiler.is_compiling()
        if not chosen and x.shape[0] <= self.num_kernels:
            place = self.order if self.mask is None else self.mask
            assert place is not None
            shared = [self.kernels, self.static, place]
            out = conv_remade(_kernels, x, self.geometry, each, shared, nbytes)
        elif position is None:
            cells, given = self.cells(), weights[:, None]
            out = kw_conv(x, given, cells, self.geometry, self.backend, self.workspace_mb)
        else:
            own = [self.cells()]
            out = conv_remade(odconv._kernels, x, self.geometry, each, own, nbytes, self.backend)
        return self._with_biases(out, alpha)

    def cells(self) -> Tensor:
        """(K + 1, C_out, C_in / groups, *k): the kernels where they are dynamic, and the static one
        elsewhere.
        """
        if self.order is None:
            assert self.mask is not None
            shown = self.mask.to(self.kernels.dtype)
            return torch.cat((self.kernels * shown, self.static * (1 - shown)))
        dynamic, static = self.kernels.shape[1], self.static.shape[1]
        rows = (F.pad(self.kernels, (0, static)), F.pad(self.static, (dynamic, 0)))
        return _in_order(torch.cat(rows), self.order)


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    """rows: (R, |W|)  order: (C_out, C_in / groups, *k)  out: (R, C_out, C_in / groups, *k)."""
    return rows.index_select(1, order.flatten()).view(-1, *order.shape)


def _kernels(*parts: Tensor) -> Tensor:
    """The positions (B, k) if there are any, weights (B, K + 1), and of a layer the kernels, the
    static one and the mask, or its order  out: (B, C_out, C_in / groups, *k)
    """
    *given, weights, kernels, static, place = parts
    weights = weights.to(kernels.dtype)
    mixed = (weights[:, :-1] @ kernels.flatten(1)).to(kernels.dtype)  # if under autocast
    fixed = weights[:, -1:] * static.flatten(1)
    if place.dtype == torch.int32:
        found = _in_order(torch.cat((mixed, fixed), dim=1), place)
    else:
        shown = place.to(kernels.dtype).flatten(1)
        found = torch.lerp(fixed, mixed, shown).view(-1, *place.shape[1:])
    if not given:
        return found
    (position,) = given
    return found * position.view(position.shape[0], 1, 1, *found.shape[3:]).to(found.dtype)


class _PADODLayer(PADLayer):
    def _kernels_of(self, x: Tensor, seen: odconv.Attended) -> Tensor:
        assert seen.kernel is not None
        return self.mixed(x, seen.kernel, seen.position)


class PADConv1d(PADLayer, dyconv.DYConv1d):
    """`nn.Conv1d`, at some weights mixed of K kernels by softmax attention."""


class PADConv2d(PADLayer, dyconv.DYConv2d):
    """`nn.Conv2d`, at some weights mixed of K kernels by softmax attention."""


class PADConv3d(PADLayer, dyconv.DYConv3d):
    """`nn.Conv3d`, at some weights mixed of K kernels by softmax attention."""


class PADLinear(PADLayer, dyconv.DYLinear):
    """`nn.Linear`, at some weights mixed of K by softmax attention."""


class PADODConv1d(_PADODLayer, odconv.ODConv1d):
    """ODConv1d, at some weights mixed of K kernels."""


class PADODConv2d(_PADODLayer, odconv.ODConv2d):
    """ODConv2d, at some weights mixed of K kernels."""


class PADODConv3d(_PADODLayer, odconv.ODConv3d):
    """ODConv3d, at some weights mixed of K kernels."""


_LAYERS: dict[str, dict[type[nn.Module], Any]] = {
    "dyconv": {
        nn.Conv1d: PADConv1d,
        nn.Conv2d: PADConv2d,
        nn.Conv3d: PADConv3d,
        nn.Linear: PADLinear,
    },
    "odconv": {nn.Conv1d: PADODConv1d, nn.Conv2d: PADODConv2d, nn.Conv3d: PADODConv3d},
}
_STARTS: dict[str, Any] = {"dyconv": dyconv._start, "odconv": odconv._start}


class Partition(nn.Module):
    """dynamic: how many weights of a group `partition_` leaves dynamic."""

    def __init__(self, dynamic: int) -> None:
        super().__init__()
        self.dynamic = dynamic

    def extra_repr(self) -> str:
        return f"dynamic={self.dynamic}"


def _convert(
    plan: Plan, group: PADNetGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """A warm start computes what the static layer does, before the partition and after it."""
    settings = group.of_base(group.layers[0]).settings
    made = convert_mixed(_LAYERS[group.base], layers, how, _STARTS[group.base], settings)
    return replace(made, shared=Partition(group.dynamic))


def _prepare(model: nn.Module, batches: Iterable[Any], loss: Callable[..., Any]) -> object:
    """The partition by sensitivity; after a warm start, which gives snip nothing to tell weights
    apart by, by magnitude.
    """
    from kwlayers.methods.pad_net_partition import partition_

    warm = getattr(getattr(model, WAREHOUSES, None), "warm_start", None) is not None
    return partition_(model, batches, loss, scores="magnitude" if warm else "snip")


METHOD = Method(
    name="pad_net",
    title="PAD-Net",
    paper="He et al., ACL 2023, arXiv 2211.05528",
    group=PADNetGroup,
    settings=PADNetSettings,
    convert=_convert,
    prepare=_prepare,
)
