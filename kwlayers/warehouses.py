"""What layers share in KernelWarehouse, with exact parameters and MACs. No torch.

Per image, for a layer with m mixtures of the n cells of its warehouse, kernel W, input channels C
and attention width h:

    mixing      m * n * prod(cell) = n * |W|, whatever the resolution
    attention   C*h + h*(n+1)*m, or with a nonlocal basis of width q
                C*h + h*(n_local+q+1)*m + m*q*n_nonlocal
    conv        as the static layer

(arXiv 2406.07879, sections 3.1-3.3.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kwlayers import geometry
from kwlayers.cost import LayerCost
from kwlayers.fields import NORMS
from kwlayers.plan import Group, Site


@dataclass(frozen=True)
class WarehouseGroup(Group):
    """The layers of one warehouse.

    cell: (c_out, c_in, *k). num_cells: n. layers: module names in module order.
    ratio: the convolutional budget b where one was given, None where n was solved for.
    reduction, basis_ratio, norm: the attention branch of its layers.
    """

    cell: geometry.Shape
    num_cells: int
    ratio: float | None = None
    reduction: float = 1 / 16
    basis_ratio: float = 1.0
    norm: str = "batch"

    method: ClassVar[str] = "kernel_warehouse"
    size_name: ClassVar[str] = "num_cells"
    ratio_words: ClassVar[tuple[str, str]] = (
        "convolutional budget b = n / m (cells over mixtures)", "b",
    )  # fmt: skip

    def at_ratio(self, ratio: float, unit: int) -> WarehouseGroup:
        return replace(self, num_cells=geometry.cells_for_ratio(unit, ratio), ratio=ratio)

    def unit(self, sites: Sequence[Site]) -> int:
        """All mixtures: the ratio is b = n / m."""
        return sum(self.mixtures(sites))

    def mixtures(self, sites: Sequence[Site]) -> tuple[int, ...]:
        """m of each layer."""
        return tuple(geometry.num_mixtures(site.kernel, self.cell) for site in sites)

    def check(self, sites: Sequence[Site]) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r}; allowed are {', '.join(NORMS)}")
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"ratio {self.ratio}; it must be above 0")
        for setting in ("reduction", "basis_ratio"):
            value = getattr(self, setting)
            if not 0 < value <= 1:
                raise ValueError(f"{setting} {value}; it must be in (0, 1]")
        if len({site.kind for site in sites}) > 1:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise ValueError(f"layers of one kind share a warehouse, got {kinds}")
        for site in sites:
            try:
                geometry.num_mixtures(site.kernel, self.cell)
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from None

    def costs(self, sites: Sequence[Site]) -> tuple[LayerCost, ...]:
        mixtures = self.mixtures(sites)
        total = sum(mixtures)
        return tuple(self._cost(site, m, total) for site, m in zip(sites, mixtures, strict=True))

    def _cost(self, site: Site, mixtures: int, total: int) -> LayerCost:
        attention = attention_cost(
            site.in_channels,
            mixtures,
            self.num_cells,
            total,
            ratio=self.ratio,
            reduction=self.reduction,
            basis_ratio=self.basis_ratio,
            norm=self.norm,
        )
        return LayerCost(
            name=site.name,
            group=self.name,
            static_params=site.params - site.weights,
            conv_macs=site.macs,
            mixtures=mixtures,
            attention_params=attention.params,
            mixing_macs=site.samples * self.num_cells * site.weights,
            attention_macs=site.samples * attention.macs,
        )

    def shared_params(self) -> int:
        """Of the cells."""
        return self.num_cells * math.prod(self.cell)

    def params_by_size(self, sites: Sequence[Site]) -> Callable[[int], int]:
        """Linear in n without a basis: two points say it all."""
        count = super().params_by_size(sites)
        if self.basis_ratio < 1:
            return count
        base, step = count(1), count(2) - count(1)
        return lambda size: base + (size - 1) * step

    @staticmethod
    def smallest(groups: int) -> str:
        return f"one cell in {'the warehouse' if groups == 1 else f'each of {groups} warehouses'}"

    def describe(self) -> str:
        """`104 of 128x128`; cells that span kernels show their size."""
        cell = self.cell[:2] if set(self.cell[2:]) == {1} else self.cell
        return f"{self.num_cells} of {'x'.join(map(str, cell))}"


@dataclass(frozen=True)
class Attention:
    """Parameters and MACs (of one sample) of one layer's attention branch."""

    params: int
    macs: int


def attention_cost(
    in_channels: int,
    mixtures: int,
    num_cells: int,
    total_mixtures: int,
    *,
    ratio: float | None,
    reduction: float,
    basis_ratio: float,
    norm: str,
) -> Attention:
    """The attention branch of a layer with `mixtures` of the warehouse's `total_mixtures`."""
    hidden = geometry.hidden_width(in_channels, reduction)
    shared = in_channels * hidden + 2 * hidden + (hidden if norm == "layer" else 0)
    bias = (num_cells + 1) * mixtures
    if basis_ratio >= 1:
        outputs = hidden * (num_cells + 1) * mixtures
        return Attention(shared + outputs + bias, in_channels * hidden + outputs)
    split = geometry.basis(mixtures, num_cells, total_mixtures, ratio, basis_ratio)
    outputs = hidden * (split.local + split.width + 1) * mixtures
    expand = split.width * split.nonlocal_cells
    return Attention(
        shared + outputs + expand + bias,
        in_channels * hidden + outputs + mixtures * expand,
    )
