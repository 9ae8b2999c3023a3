"""Kernel cells, mixtures and assignments: the integer arithmetic of KernelWarehouse.

Li & Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution" (ICML 2024,
arXiv 2406.07879), sections 3.2-3.4. Plain integers; no torch.

A kernel is written as its shape `(C_out, C_in / groups, *k)`, a cell as `(c_out, c_in, *k)`.
A linear layer is a 1x1 convolution over its tokens: `(C_out, C_in, 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

MIN_HIDDEN = 16
MIN_BASIS = 16


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (both >= 1)."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def cell_shape(
    kernels: Sequence[Shape], cell_ratio: tuple[float, float], spatial_partition: bool
) -> tuple[Shape, tuple[str, ...]]:
    """The cell that all `kernels` are cut into, and a note for each size that was rounded.

    The cell spans `cell_ratio` (out, in) of the greatest common divisors of the kernels'
    channels. Sizes that do not divide them are rounded down to a divisor.
    Without `spatial_partition` a cell spans the whole kernel, which must be the same for all.
    """
    channels, notes = [], []
    for axis, ratio in zip((0, 1), cell_ratio, strict=True):
        common = math.gcd(*(kernel[axis] for kernel in kernels))
        wanted = max(int(common * ratio), 1)
        size = largest_divisor(common, wanted)
        if size != wanted:
            side = ("output", "input")[axis]
            notes.append(
                f"cell ratio {ratio:g} of {common} {side} channels is {wanted}, "
                f"which does not divide {common}: rounded down to {size}"
            )
        channels.append(size)
    sizes = {kernel[2:] for kernel in kernels}
    if spatial_partition:
        spatial: Shape = (1,) * (len(kernels[0]) - 2)
    elif len(sizes) == 1:
        spatial = sizes.pop()
    else:
        listed = ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ValueError(
            f"without spatial partition all kernels of a warehouse have one size, got {listed}"
        )
    return (*channels, *spatial), tuple(notes)


def num_mixtures(kernel: Shape, cell: Shape) -> int:
    """m, the number of cells that one kernel is made of. Every cell size must divide."""
    if len(kernel) != len(cell) or any(
        part < 1 or size % part for size, part in zip(kernel, cell, strict=True)
    ):
        raise ValueError(f"cells of shape {cell} do not tile a kernel of shape {kernel}")
    return math.prod(size // part for size, part in zip(kernel, cell, strict=True))


def cells_for_ratio(total_mixtures: int, ratio: float) -> int:
    """n of a warehouse at the convolutional budget `ratio`, truncated in double precision."""
    return max(int(total_mixtures * ratio), 1)


def hidden_width(in_channels: int, reduction: float) -> int:
    """h, the hidden width of the attention branch."""
    return max(int(in_channels * reduction), MIN_HIDDEN)


@dataclass(frozen=True)
class Basis:
    """How the columns of one layer's attention split when `basis_ratio` < 1.

    local: own cells, each with a column of its own.
    width: basis columns that stand for the other layers' cells.
    nonlocal_cells: the other layers' cells, spanned by the basis.
    """

    local: int
    width: int
    nonlocal_cells: int


def basis(
    mixtures: int, num_cells: int, total_mixtures: int, ratio: float | None, basis_ratio: float
) -> Basis:
    """The nonlocal basis of a layer with `mixtures` of the warehouse's `total_mixtures`.

    The layer's own share is `int(ratio * mixtures)` where a ratio was given, and
    `mixtures * num_cells // total_mixtures` where the number of cells was solved.
    """
    if ratio is None:
        local = mixtures * num_cells // total_mixtures
    else:
        local = min(int(ratio * mixtures), num_cells)
    others = num_cells - local
    return Basis(local, max(int(others * basis_ratio), MIN_BASIS), others)


@dataclass(frozen=True)
class Assignment:
    """The cell each mixture of one layer equals at temperature 1.

    cells: one index per mixture; `num_cells` itself means the zero cell.
    start, length: the run of cells that the layer initialises and calls its own.
    """

    cells: tuple[int, ...]
    start: int
    length: int


def assign(
    num_cells: int, mixtures: Sequence[int], ratio: float | None = None
) -> tuple[Assignment, ...]:
    """Hand the cells of a warehouse out to its layers, given as their m in module order.

    The published rule stands wherever it hands out exactly `num_cells`. Otherwise, over all
    M mixtures, mixture g starts on cell `floor(g * n / M)`, or on the zero cell if mixture
    g - 1 already started there.
    """
    dealt = published_assignment(num_cells, mixtures, ratio)
    return dealt if dealt is not None else _even_assignment(num_cells, mixtures)


def published_assignment(
    num_cells: int, mixtures: Sequence[int], ratio: float | None
) -> tuple[Assignment, ...] | None:
    """As the official code hands cells out; None where that does not hand out all of them."""
    total = sum(mixtures)
    if ratio is None:
        cells_each, shared_by = num_cells // total, total // num_cells
    else:
        cells_each, shared_by = int(ratio), int(1.0 / ratio)
    layers, start = [], 0
    for m in mixtures:
        if cells_each >= 1:
            cells = tuple(range(start, start + m * cells_each, cells_each))
            length = m * cells_each
        else:
            length, chosen = 0, []
            for i in range(m):
                takes = i % shared_by == (i // shared_by) % shared_by
                chosen.append(start + length if takes else num_cells)
                length += takes
            cells = tuple(chosen)
        layers.append(Assignment(cells, start, length))
        start += length
        if start > num_cells:
            return None
    return tuple(layers) if start == num_cells else None


def _even_assignment(num_cells: int, mixtures: Sequence[int]) -> tuple[Assignment, ...]:
    total = sum(mixtures)
    layers, first = [], 0
    for m in mixtures:
        layers.append(even_assignment(num_cells, total, first, m))
        first += m
    return tuple(layers)


def even_assignment(num_cells: int, total: int, first: int, count: int) -> Assignment:
    """Spread `num_cells` evenly over `total` mixtures; those of `first` to `first + count`.

    Past `total` the cells come round again.
    """

    def starts_on(g: int) -> int:
        cell = g * num_cells // total
        taken = g > 0 and (g - 1) * num_cells // total == cell
        return num_cells if taken else cell % num_cells

    cells = tuple(starts_on(g) for g in range(first, first + count))
    # A run ends where the next layer's begins. With n >= M that is the next layer's first
    # cell, otherwise the first cell that no mixture before it has reached.
    start, end = (
        g * num_cells // total if num_cells >= total else (g - 1) * num_cells // total + 1
        for g in (first, first + count)
    )
    start, length = start % num_cells, end - start
    return Assignment(cells, start, min(length, num_cells - start))
