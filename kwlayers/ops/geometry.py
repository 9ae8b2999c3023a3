"""The static numbers of one convolution: what every path takes beside its tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

# Up to so many output positions a kernel is read about as often as it is written: im2col beats a
# library's convolution, and smaller blocks of kernels stay in nearer caches.
FEW_POSITIONS = 100


class ConvGeometry(NamedTuple):
    """kernel: (C_out, C_in / groups, *k). padding: zeros on both sides of each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether every output position depends on one input position only."""
        return math.prod(self.kernel[2:]) == 1 and not any(self.padding)

    def out_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions for an input of `size`, both without batch and channels."""
        found = tuple(
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, dilation in zip(
                size, self.kernel[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        if min(found) < 1:
            raise ValueError(
                f"input of {size} positions: too small for a kernel of {self.kernel[2:]} with "
                f"dilation {self.dilation} and padding {self.padding}"
            )
        return found


class Blocks(NamedTuple):
    """How cells tile a kernel: `out` x `inn` x `spatial` cells of shape `cell`.

    Mixtures are numbered by (spatial, out, in), the last fastest.
    """

    spatial: tuple[int, ...]
    out: int
    inn: int
    cell: tuple[int, ...]

    @classmethod
    def of(cls, kernel: tuple[int, ...], cell: tuple[int, ...]) -> Blocks:
        """The tiling of a kernel (C_out, C_in / groups, *K) by cells (c_out, c_in, *k)."""
        if len(kernel) != len(cell) or any(k % c for k, c in zip(kernel, cell, strict=True)):
            raise ValueError(f"cells of {cell} do not tile a kernel of {kernel}")
        out, inn, *spatial = (k // c for k, c in zip(kernel, cell, strict=True))
        return cls(tuple(spatial), out, inn, tuple(cell))

    @property
    def mixtures(self) -> int:
        """m."""
        return math.prod(self.spatial) * self.out * self.inn

    @property
    def row(self) -> int:
        """Weights of a cell that belong to one of its output channels."""
        return math.prod(self.cell[1:])
