"""FDConv: one kernel, learned as its spectrum, whose frequencies are weighted for each sample.

Chen et al., "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv
2503.18783. A kernel of k1 x k2 positions is the matrix M[o * k1 + i, c * k2 + j] = W[o, c, i, j]
(k1 = 1 in one dimension). D (rho, C_out * k1, C_in * k2 // 2 + 1) is learned, rfft2(M) / m for
m = min(C, C_out) // 2. Sorted by radius, its bins are cut into K equal groups, the lowest
frequencies first. For an input with C channels, P positions, k = k1 * k2, A = max(C // 16, 16):

    g = mean of x over positions
    z = p * relu(norm(fc1(g)))^2 + q                        (B, A), fc1 without bias, learned p, q
    a_c, a_f, a_s = 2 * sigmoid(heads(z)): (B, C), (B, C_out), (B, k)     no a_s if k = 1
    a_w = 2 * sigmoid(head(z)) / rho: (B, rho * K)                        none if rho * K = 1
    a_l = 2 * sigmoid(conv1d of s taps over the channels of layer norm(g)): (B, C_out, C, k)
    W = a_s * a_c * a_f * a_l * irfft2(sum_rho m * a_w * D)
    y = conv(x', W),  x' = low_8 + sum_t 2 * sigmoid(conv3(x))_t * (low_t/2 - low_t), t = 2, 4, 8

low_1 = x, and low_t is what x has below 1/2t cycles a position along every axis; frequencies of
exactly 1/8 and 1/16 are below, 1/4 is not, as float32 has it in the published code. x' = x without
`bands`; there is no a_l without `local`, and no a_c, a_f and a_s with `only_kernel`.

    parameters  2 * rho * C_out * k1 * (C * k2 // 2 + 1)
                C*A + 2A + 2 + (A + 1) * heads,  heads = C + C_out + k + rho * K (where there)
                a_l: C_out * k * s + 2C;  bands: 3 * (9C + 1)
    MACs        conv; A * (C + heads); a_l: |W| * s;  bands: 27 * C * P
                modulation, products on the kernel: 2 * rho * bins by a_w, and |W| for each of
                a_s (and a_c with it), a_f, a_l; on maps: 3 * C * P by bands, and where |W| is at
                least (C + C_out) * P, a_c and a_f are there, C * P + C_out * P', not on the kernel

Transforms are no MACs and are counted nowhere: about 2.5 * |W| * log2 |W| operations a sample for
the kernel, 10 * C * P * log2 P for the bands. In one dimension bands have 3 taps, not 9.

Published: K = 64, square kernels of 1 and 3 in the blocks, strided ones too, with over 16 channels
in and out; no shortcuts. A static layer's bias stays as it is. On purpose different from the
published code:

- The head of a_f starts near zero, as the others do. There a slip leaves it Kaiming-normal, and the
  layer is none that starts as the plain convolution.
- a_w is divided by rho, D multiplied by m, always. There param_ratio 2 doubles the kernel at the
  start. Copies of D start apart, around one kernel; equal ones would be told apart by noise only.
- The sort is stable and exact, of integers, and a buffer of the state dict. There the device and
  the version decide which group a bin falls into, among those of one radius.
- Masks of the bands are made at the map's size. There they are resized from 64 x 64 positions.
- D starts as a Kaiming-normal kernel's (fan out), like the layers of torchvision's models, which
  FDConv takes the place of. There it is that of torch.nn's default weight, 2.4 times smaller
  where C = C_out.
- C * k2 may be odd, and where K does not divide the bins, the largest divisor below is taken. There
  either fails.
- a_c and a_f stay on the kernel where nothing else would make it the sample's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import geometry
from kwlayers.attention import norm_of, pooled
from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicConvNd, convert_layers, kaiming_normal_
from kwlayers.families import Label
from kwlayers.fields import allow, allow_norm, allow_reduction
from kwlayers.layout import Layout
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.ops import check_settings, workspace_bytes
from kwlayers.ops.remade import conv_remade
from kwlayers.placement import AloneSettings
from kwlayers.plan import Group, Network, Plan, PlanError, Site
from kwlayers.rules import Share

REDUCTION = 1 / 16
OCTAVES = (2, 4, 8)
_NEAR_ZERO = 1e-6
# What makes a kernel is about as large as three times what `conv_remade` expects.
_STEPS = 3


class Bins(NamedTuple):
    """The half of a kernel's spectrum that is stored. rows, columns: of the kernel as a matrix."""

    rows: int
    columns: int

    @classmethod
    def of(cls, kernel: Sequence[int]) -> Bins:
        """kernel: (C_out, C_in, *k)."""
        high, wide = (1, *kernel[2:])[-2:]
        return cls(kernel[0] * high, kernel[1] * wide)

    @property
    def half(self) -> int:
        return self.columns // 2 + 1

    @property
    def total(self) -> int:
        return self.rows * self.half


class Heads(NamedTuple):
    """Outputs of the attention; 0 for one that is not there."""

    channel: int
    filter: int
    position: int
    kernel: int

    @classmethod
    def of(cls, kernel: Sequence[int], num_kernels: int, only_kernel: bool) -> Heads:
        """kernel: (C_out, C_in, *k). num_kernels: K * rho."""
        positions = math.prod(kernel[2:])
        weighted = num_kernels if num_kernels > 1 else 0
        if only_kernel:
            return cls(0, 0, 0, weighted)
        return cls(kernel[1], kernel[0], positions if positions > 1 else 0, weighted)

    def on_maps(self, kernel: Sequence[int], positions: int, local: bool) -> bool:
        """Whether channels and filters are weighted on feature maps, which are smaller."""
        own = bool(self.position or self.kernel or local)
        small = math.prod(kernel) >= (kernel[0] + kernel[1]) * positions
        return bool(self.channel) and own and small


def local_taps(channels: int) -> int:
    """s."""
    return round(math.log2(channels) / 2 + 0.5) // 2 * 2 + 1


@dataclass(frozen=True)
class FDConvGroup(Group):
    """One layer. width: A, of the attention. num_kernels: K. param_ratio: rho."""

    width: int = allow("hidden width of the attention, A", int, least=1)
    num_kernels: int = allow("groups of frequencies, K", int, least=1)
    param_ratio: int = allow("spectra of the layer, summed", int, 1, least=1)
    local: bool = allow("whether each weight has a factor of its own", bool, True)
    bands: bool = allow("whether the input's frequency bands are weighted", bool, True)
    only_kernel: bool = allow("whether the attention is over kernels only", bool, False)
    norm: str = allow_norm()

    method: ClassVar[str] = "fdconv"
    size_name: ClassVar[str] = "width"
    ratio_words: ClassVar[tuple[str, str]] = ("A over the published, all layers", "A / published")
    kinds: ClassVar[tuple[str, ...]] = ("conv1d", "conv2d")
    alone: ClassVar[bool] = True
    no_ratio: ClassVar[str] = (
        "since its kernels take as many parameters as the static ones, and a budget decides the "
        "width of the attention"
    )

    @classmethod
    def refuses(cls, site: Site) -> str:
        grouped = "fdconv takes no grouped convolutions" if site.groups > 1 else ""
        return super().refuses(site) or grouped

    def unit(self, sites: Sequence[Site]) -> int:
        """The published width."""
        (site,) = sites
        return geometry.hidden_width(site.in_channels, REDUCTION)

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        (site,) = sites
        _check(site.kernel, self.num_kernels, self.param_ratio, self.only_kernel)

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        (site,) = sites
        channels, outputs, width = site.in_channels, site.out_channels, self.width
        bins, positions = Bins.of(site.kernel).total, math.prod(site.kernel_size)
        heads = Heads.of(site.kernel, self.num_kernels * self.param_ratio, self.only_kernel)
        attention = channels * width + (width if self.norm == "layer" else 0)
        attention += 2 * width + 2 + (width + 1) * sum(heads)
        macs = width * (channels + sum(heads))
        conv, on_kernel, on_maps = site.macs, 0, 0
        if heads.kernel:
            on_kernel += 2 * self.param_ratio * bins
        if heads.on_maps(site.kernel, site.in_positions, self.local):
            on_kernel += site.weights if heads.position else 0
            on_maps += channels * site.all_in_positions + outputs * site.positions
        elif heads.channel:
            on_kernel += 2 * site.weights
        if self.local:
            taps = local_taps(channels)
            attention += outputs * positions * taps + 2 * channels
            macs += site.weights * taps
            on_kernel += site.weights
        if self.bands:
            taps = len(OCTAVES) * 3 ** len(site.kernel_size) * channels
            attention += taps + len(OCTAVES)
            conv += taps * site.all_in_positions
            on_maps += len(OCTAVES) * channels * site.all_in_positions
        return (
            LayerCost(
                name=site.name,
                group=self.name,
                static_params=site.params - site.weights,
                conv_macs=conv,
                mixtures=1,
                kernel_params=2 * self.param_ratio * bins,
                attention_params=attention,
                attention_macs=site.samples * macs,
                modulation_macs=site.samples * on_kernel + on_maps,
            ),
        )

    @staticmethod
    def smallest(groups: int) -> str:
        return "one spectrum a layer"

    def describe(self) -> str:
        return f"A = {self.width}, K = {self.num_kernels}"


def _check(kernel: Sequence[int], num_kernels: int, param_ratio: int, only_kernel: bool) -> None:
    """Raise ValueError for groups of frequencies that cannot be. kernel: (C_out, C_in, *k)."""
    bins = Bins.of(kernel).total
    if num_kernels < 1 or bins % num_kernels:
        best = geometry.largest_divisor(bins, max(num_kernels, 1))
        raise ValueError(
            f"num_kernels {num_kernels}: it must divide the {bins:,} frequencies of the kernel, as "
            f"{best} does"
        )
    if only_kernel and num_kernels * param_ratio == 1:
        raise ValueError(
            "only_kernel with num_kernels 1 and param_ratio 1: no head of the attention is left, "
            "local or not"
        )


@dataclass(frozen=True)
class FDConvSettings(AloneSettings):
    """FDConv with published widths, or as wide attentions as a budget allows.

    num_kernels: of each layer, or the largest divisor of its frequencies below. bands: where a
    kernel is 3 x 3. norm: "batch", "layer" or "auto": "layer" if the model has no batch norm.
    min_channels: in and out, of layers that become dynamic by default.
    """

    num_kernels: int = allow("groups of frequencies, K", int, 64, least=1)
    reduction: float = allow_reduction(REDUCTION)
    param_ratio: int = allow("spectra of each layer, summed", int, 1, least=1)
    local: bool = allow("whether each weight has a factor of its own", bool, True)
    bands: bool = allow("whether frequency bands of 3x3 layers' inputs are weighted", bool, True)
    only_kernel: bool = allow("whether the attention is over kernels only", bool, False)
    norm: str = allow_norm(auto=True)
    min_channels: int = allow("channels that a layer has, in and out", int, 17, least=1)
    rules: tuple[Any, ...] = ()

    method: ClassVar[str] = "fdconv"
    group_type: ClassVar[type[Group]] = FDConvGroup
    sizes: ClassVar[tuple[str, ...]] = ("reduction",)
    static_roles: ClassVar[tuple[str, ...]] = ("stem", "head", "patch embedding", "shortcut")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_kernel and self.num_kernels * self.param_ratio == 1:
            raise PlanError(
                "only_kernel with num_kernels 1 and param_ratio 1: no head of the attention is "
                "left, local or not; more kernels, or only_kernel=False"
            )

    def lower(self) -> Iterator[dict[str, Any]]:
        if self.local:
            yield {"local": False}
        if not self.only_kernel:
            yield {"only_kernel": True}

    def refuses(self, site: Site) -> str:
        if reason := super().refuses(site):
            return reason
        if self.only_kernel and self.param_ratio == 1 and self._num_kernels(site) == 1:
            return "its frequencies form one group only, and only_kernel asks for no other head"
        return ""

    def declines(self, site: Site, label: Label) -> str:
        if set(site.kernel_size) not in ({1}, {3}):
            return "its kernel is not of size 1 or 3"
        if min(site.in_channels, site.out_channels) < self.min_channels:
            return f"it has fewer than {self.min_channels} channels in or out"
        return ""

    def own_ratio(self, share: Share) -> float | None:
        if share.ratio is None and share.reduction is not None:
            return share.reduction / self.reduction
        return super().own_ratio(share)

    def group(self, network: Network, name: str, sites: Sequence[Site], own: Any) -> FDConvGroup:
        (site,) = sites
        norm = network.norm(self.norm)
        return FDConvGroup(
            name,
            (site.name,),
            geometry.hidden_width(site.in_channels, own.reduction),
            self._num_kernels(site),
            self.param_ratio,
            self.local,
            self.bands and set(site.kernel_size) == {3},
            self.only_kernel,
            norm,
        )

    def lay_out(
        self,
        network: Network,
        keep_static: frozenset[str] = frozenset(),
        stage_sharing: Mapping[int, str] | None = None,
    ) -> Layout:
        layout = super().lay_out(network, keep_static, stage_sharing)
        groups = [group for group in layout.groups if isinstance(group, FDConvGroup)]
        chosen = {group.layers[0]: group.num_kernels for group in groups}
        fewer = [f"{name} ({k})" for name, k in chosen.items() if k != self.num_kernels]
        if not fewer:
            return layout
        note = f"num_kernels {self.num_kernels} does not divide the frequencies of "
        return replace(layout, notes=(*layout.notes, note + ", ".join(fewer)))

    def _num_kernels(self, site: Site) -> int:
        return geometry.largest_divisor(Bins.of(site.kernel).total, self.num_kernels)


class Attended(NamedTuple):
    """channel: (B, C)  filter: (B, C_out)  position: (B, k)  kernel: (B, rho * K), all of mean 1.

    normed: (B, C), what the local attention sees. None for what is not there.
    """

    channel: Tensor | None
    filter: Tensor | None
    position: Tensor | None
    kernel: Tensor | None
    normed: Tensor | None


class FDAttention(nn.Module):
    """The attentions for an input (B, C, *S). `local` is convolved where kernels are made."""

    def __init__(
        self, kernel: Sequence[int], heads: Heads, width: int, local: bool, norm: str, **to: Any
    ) -> None:
        super().__init__()
        outputs, channels = kernel[:2]
        self.heads = heads
        self.fc1 = nn.Linear(channels, width, bias=norm == "layer", **to)
        self.norm = norm_of(norm, width, to.get("device"), to.get("dtype"))
        self.scale = nn.Parameter(torch.empty((), **to))
        self.shift = nn.Parameter(torch.empty((), **to))
        self.fc2 = nn.Linear(width, sum(heads), **to)
        self.local_norm: nn.LayerNorm | None = None
        self.local: nn.Conv1d | None = None
        if local:
            taps = local_taps(channels)
            outputs *= math.prod(kernel[2:])
            self.local_norm = nn.LayerNorm(channels, **to)
            self.local = nn.Conv1d(1, outputs, taps, padding=taps // 2, bias=False, **to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) weights before the heads; these and the local one near zero."""
        self.norm.reset_parameters()
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)
        kaiming_normal_(self.fc1.weight)
        if self.fc1.bias is not None:
            nn.init.zeros_(self.fc1.bias)
        nn.init.normal_(self.fc2.weight, 0, _NEAR_ZERO)
        nn.init.zeros_(self.fc2.bias)
        if self.local is not None and self.local_norm is not None:
            self.local_norm.reset_parameters()
            nn.init.constant_(self.local.weight, _NEAR_ZERO)

    def neutral_(self) -> None:
        """Every factor at 1."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        if self.local is not None:
            nn.init.zeros_(self.local.weight)

    def forward(self, x: Tensor) -> Attended:
        mean = pooled(x)
        hidden = F.relu(self.norm(self.fc1(mean))).square()
        seen = 2 * torch.sigmoid(self.fc2(self.scale * hidden + self.shift))
        channel, filtered, position, kernel = torch.split(seen, list(self.heads), -1)
        return Attended(
            channel if self.heads.channel else None,
            filtered if self.heads.filter else None,
            position if self.heads.position else None,
            kernel if self.heads.kernel else None,
            None if self.local_norm is None else self.local_norm(mean),
        )


class FrequencyBands(nn.Module):
    """Weight octaves of frequencies of a map (B, C, *S), each by a map that all channels share."""

    def __init__(self, channels: int, rank: int, **to: Any) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
        self.conv = conv(channels, len(OCTAVES), 3, padding=1, **to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Factors of about 1."""
        nn.init.normal_(self.conv.weight, 0, _NEAR_ZERO)
        self._even()

    def neutral_(self) -> None:
        """Every factor at 1."""
        nn.init.zeros_(self.conv.weight)
        self._even()

    def _even(self) -> None:
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S)  out: (B, C, *S)."""
        factors = 2 * torch.sigmoid(self.conv(x))
        if x.shape[0] == 0:  # no transform takes it
            return x + 0 * factors.sum()
        size, axes = x.shape[2:], tuple(range(2, x.dim()))
        rest = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfftn(rest, dim=axes)
        out = torch.zeros_like(rest)
        for octave, factor in zip(OCTAVES, factors.unbind(1), strict=True):
            below = spectrum.masked_fill(~low_pass(size, octave, x.device), 0)
            low = torch.fft.irfftn(below, s=size, dim=axes)
            out = out + (rest - low) * factor[:, None]
            rest = low
        return (out + rest).to(x.dtype)


def low_pass(size: Sequence[int], octave: int, device: torch.device | None = None) -> Tensor:
    """Which bins of rfftn, over maps of `size`, are below 1 / (2 * octave) cycles a position."""
    kept = torch.ones((), dtype=torch.bool, device=device)
    for axis, length in enumerate(size):
        stored = length // 2 + 1 if axis == len(size) - 1 else length
        index = torch.arange(stored, device=device)
        cycles = torch.minimum(index, length - index)
        kept = kept[..., None] & (2 * octave * cycles < length + (octave > 2))
    return kept


def frequency_order(bins: Bins, device: torch.device | str | None = None) -> Tensor:
    """The stored bins by radius, in exact integers; those of one radius as they are stored."""
    index = torch.arange(bins.rows, device=device)
    high = torch.minimum(index, bins.rows - index) * bins.columns
    wide = torch.arange(bins.half, device=device) * bins.rows
    return (high.square()[:, None] + wide.square()).flatten().argsort(stable=True)


class _FDLayer(DynamicConvNd):
    """Settings beside torch.nn's: width (None for the published one), num_kernels, param_ratio,
    local, bands (None for where the kernel is 3 x 3), only_kernel, norm, workspace_mb.

    spectrum: D, in real and imaginary parts. order: the bins by radius.
    """

    order: Tensor

    def _build(  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        width: int | None = None,
        num_kernels: int = 64,
        param_ratio: int = 1,
        local: bool = True,
        bands: bool | None = None,
        only_kernel: bool = False,
        norm: str = "batch",
        workspace_mb: float | None = None,
        **to: Any,
    ) -> None:
        check_settings(None, workspace_mb)
        kernel = self.geometry.kernel
        if self.geometry.groups > 1:
            raise ValueError(f"groups {self.geometry.groups}: fdconv takes no grouped convolutions")
        for name, value in {"width": width, "param_ratio": param_ratio}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: at least 1")
        _check(kernel, num_kernels, param_ratio, only_kernel)
        self.num_kernels = num_kernels
        self.workspace_mb = workspace_mb
        self.bins = bins = Bins.of(kernel)
        self._own_bias(bias, **to)
        self.spectrum = nn.Parameter(torch.empty(param_ratio, bins.rows, bins.half, 2, **to))
        order = torch.empty(bins.total, dtype=torch.int32, device=to.get("device"))
        self.register_buffer("order", order)
        self.reset_parameters()
        heads = Heads.of(kernel, num_kernels * param_ratio, only_kernel)
        width = geometry.hidden_width(in_channels, REDUCTION) if width is None else width
        self.attention = FDAttention(kernel, heads, width, local, norm, **to)
        self.bands: FrequencyBands | None = None
        if bands or (bands is None and set(kernel[2:]) == {3}):
            self.bands = FrequencyBands(in_channels, self.rank, **to)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The spectrum of a Kaiming-normal (fan out) kernel."""
        self._reset_bias()
        self.order.copy_(frequency_order(self.bins, self.order.device))
        self.start_from(self._drawn(1)[0])

    def _drawn(self, count: int) -> Tensor:
        kernel = self.geometry.kernel
        to: Any = {"device": self.spectrum.device, "dtype": _wide(self.spectrum)}
        drawn = torch.empty(count, *kernel, **to)
        for one in drawn:
            kaiming_normal_(one)
        return drawn

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Copies of the spectrum around that of `weight` (C_out, C_in, *k), whose mean is that."""
        copies = self.spectrum.shape[0]
        kernels = weight.detach().to(_wide(self.spectrum))[None]
        if copies > 1:
            drawn = self._drawn(copies)
            kernels = kernels + drawn - drawn.mean(0)
        outputs, channels, *_ = self.geometry.kernel
        matrices = kernels.reshape(copies, outputs, channels, -1, self.geometry.kernel[-1])
        matrices = matrices.transpose(2, 3).reshape(copies, self.bins.rows, self.bins.columns)
        found = torch.view_as_real(torch.fft.rfft2(matrices)) / self._scale
        self.spectrum.copy_(found)

    @property
    def _scale(self) -> int:
        """m."""
        return max(min(self.geometry.kernel[:2]) // 2, 1)

    def neutral_(self) -> None:
        """Every factor at 1: the layer computes the plain convolution with its kernel."""
        self.attention.neutral_()
        if self.bands is not None:
            self.bands.neutral_()

    def convolve(self, x: Tensor) -> Tensor:
        seen: Attended = self.attention(x)
        kernel, local = self.geometry.kernel, self.attention.local
        on_maps = self.attention.heads.on_maps(kernel, x.shape[2:].numel(), local is not None)
        if self.bands is not None:
            x = self.bands(x)
        given = {name: part for name, part in seen._asdict().items() if part is not None}
        filtered = given.pop("filter") if on_maps else None
        if on_maps:
            x = x * _over_maps(given.pop("channel"), x)
        shared = [self.spectrum, self.order, *([] if local is None else [local.weight])]
        make = functools.partial(_kernels, kernel, self._scale, tuple(given))
        nbytes = workspace_bytes(x, self.workspace_mb) // _STEPS
        out = conv_remade(make, self.padded(x), self.geometry, [*given.values()], shared, nbytes)
        return out if filtered is None else out * _over_maps(filtered, out)


def _over_maps(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype).view(*factor.shape, *(1,) * (x.dim() - 2))


def _wide(tensor: Tensor) -> torch.dtype:
    """What a transform is computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _kernels(
    kernel: tuple[int, ...],
    scale: int,
    names: tuple[str, ...],
    *parts: Tensor,
) -> Tensor:
    """The kernels (B, *kernel). parts: of `Attended` by their names; D, order, local weight."""
    spectrum, order, *local = parts[len(names) :]
    each = (part.to(_wide(spectrum)) for part in parts[: len(names)])
    given = dict(zip(names, each, strict=True))
    batch = parts[0].shape[0]
    if batch == 0:  # no transform takes it
        nothing = torch.stack([0 * part.sum() for part in (spectrum, *given.values(), *local)])
        return nothing.sum().expand(0, *kernel)
    outputs, channels, *_, wide = kernel
    bins, copies = Bins.of(kernel), spectrum.shape[0]
    # Factors are twice a sigmoid; that of the local one is taken here, where it costs nothing.
    constant = (2 if local else 1) * scale / copies
    stored = spectrum.to(_wide(spectrum)).reshape(copies, bins.total, 2)
    if "kernel" in given:
        weights = (constant * given["kernel"]).view(batch, copies, -1, 1)
        by_radius = weights.expand(-1, -1, -1, bins.total // weights.shape[2]).flatten(2)
        places = order.long().expand(by_radius.shape)
        stored = stored * torch.empty_like(by_radius).scatter(2, places, by_radius)[..., None]
    else:
        stored = (constant * stored)[None]
    summed = stored[:, 0] if copies == 1 else stored.sum(1)
    spectra = torch.view_as_complex(summed.contiguous()).view(-1, bins.rows, bins.half)
    matrices = torch.fft.irfft2(spectra, s=(bins.rows, bins.columns))
    made: Tensor = matrices.view(-1, outputs, bins.rows // outputs, channels, wide).transpose(2, 3)
    inner = [
        given[name].view(batch, 1, *shape)
        for name, shape in (("position", (1, *made.shape[3:])), ("channel", (channels, 1, 1)))
        if name in given
    ]
    if inner:
        made = made * math.prod(inner[1:], start=inner[0])
    if "filter" in given:
        made = made * given["filter"].view(batch, outputs, 1, 1, 1)
    if local:
        (weight,) = (part.to(made.dtype) for part in local)
        logits = F.conv1d(given["normed"][:, None], weight, padding=weight.shape[-1] // 2)
        logits = logits.view(batch, outputs, *made.shape[3:], channels).movedim(-1, 2)
        made = made * logits.sigmoid()
    return made.reshape(batch, *kernel)


class FDConv1d(_FDLayer):
    """`nn.Conv1d` whose kernel's frequencies are attended to."""

    rank = 1


class FDConv2d(_FDLayer):
    """`nn.Conv2d` whose kernel's frequencies are attended to."""

    rank = 2


_LAYERS: dict[type[nn.Module], Any] = {nn.Conv1d: FDConv1d, nn.Conv2d: FDConv2d}


def _convert(
    plan: Plan, group: FDConvGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    """A warm start computes what the static layer does: every factor is 1.

    One path computes all layers: there is no `backend` to choose.
    """
    settings = {"workspace_mb": how.workspace_mb, **group.settings}
    return convert_layers(_LAYERS, layers, how, _start, **settings)


def _start(layer: _FDLayer, weight: Tensor) -> None:
    layer.start_from(weight)
    layer.neutral_()
    layer.spectrum.requires_grad_(weight.requires_grad)


METHOD = Method(
    name="fdconv",
    title="FDConv",
    paper="Chen et al., CVPR 2025, arXiv 2503.18783",
    group=FDConvGroup,
    settings=FDConvSettings,
    convert=_convert,
)
