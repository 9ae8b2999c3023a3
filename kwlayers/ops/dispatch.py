"""Which path is fastest: a pure function of device, dtype and shape.

The constants are fitted to measurements, which README.md beside this file sums up.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import NamedTuple

import torch

from kwlayers.ops.geometry import FEW_POSITIONS, Blocks, ConvGeometry
from kwlayers.ops.triton_conv import DTYPES as TRITON_DTYPES


class Choice(NamedTuple):
    """Names of paths; "published" stands for both, as torch's autograd differentiates it."""

    forward: str
    backward: str

    def __str__(self) -> str:
        """`gemm`, or `loop/gemm` where forward and backward differ."""
        return self.forward if self.forward == self.backward else "/".join(self)


PUBLISHED = Choice("published", "published")

# Below this, glibc serves a tensor from memory that was touched before: the published form
# pays no page faults, and what it keeps for backward is small.
_REUSED = 32 * 2**20
# Kernels of a whole batch that are always worth keeping.
_KEPT = 8 * 2**20
# Where x and the result outweigh the kernels by far, cuDNN's grouped convolution is kept.
_MANY_POSITIONS = 1024
# Samples whose maps fill a core's cache are convolved one by one.
_LARGE_MAPS = 3 * 2**19
# Writing and reading a mixed number takes as long as this many multiply-adds.
_MIXED_COST = 20


@functools.lru_cache(maxsize=4096)
def choose(
    device: str,
    dtype: torch.dtype,
    batch: int,
    size: tuple[int, ...],
    geometry: ConvGeometry,
    cell: tuple[int, ...],
    num_cells: int,
) -> Choice:
    """device: "cpu" or "cuda". size: of the input, without batch and channels.

    cell: (c_out, c_in, *k).
    """
    if device not in ("cpu", "cuda") or batch == 0:
        return PUBLISHED
    blocks = Blocks.of(geometry.kernel, cell)
    positions = math.prod(geometry.out_size(size))
    itemsize = dtype.itemsize
    kernels = batch * math.prod(geometry.kernel) * itemsize
    in_maps = geometry.kernel[1] * geometry.groups * math.prod(size) * itemsize
    maps = in_maps + geometry.kernel[0] * positions * itemsize
    if geometry.groups == 1:
        tiny = _tiny_maps(blocks, positions, num_cells)
        if tiny is not None:
            return Choice(tiny, tiny)
    if device == "cuda":
        return _on_gpu(dtype, geometry, blocks, positions)
    product = geometry.groups == 1 and (geometry.pointwise or positions < FEW_POSITIONS)
    by_sample = "gemm" if product else "loop"
    if kernels <= min(batch * maps, _REUSED) or kernels <= _KEPT:
        # A single sample is one plain convolution in the published form, too.
        large = batch > 1 and maps >= _LARGE_MAPS
        return Choice(by_sample, by_sample) if large else PUBLISHED
    if geometry.groups > 1:
        return Choice("grouped", "grouped")
    return Choice(by_sample, by_sample)


def _on_gpu(dtype: torch.dtype, geometry: ConvGeometry, blocks: Blocks, positions: int) -> Choice:
    # From the arithmetic of memory traffic, not from measurements: README.md beside this file.
    if geometry.groups > 1:
        return Choice("grouped", "grouped")
    if geometry.pointwise:
        return Choice("gemm", "gemm")
    fits = dtype in TRITON_DTYPES and math.prod(blocks.cell[2:]) == 1 and triton_available()
    if fits and positions < _MANY_POSITIONS:
        return Choice("triton", "triton")
    return Choice("grouped", "grouped")


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed; CUDA builds of torch bring it."""
    return importlib.util.find_spec("triton") is not None


def _tiny_maps(blocks: Blocks, positions: int, num_cells: int) -> str | None:
    """The cheaper way without kernels, where it beats mixing them; costs per sample."""
    spatial = math.prod(blocks.spatial)
    outputs, inputs = blocks.cell[0], blocks.row
    rows = num_cells * positions
    costs = {
        "kernels": blocks.mixtures * outputs * inputs * (num_cells + positions + _MIXED_COST),
        "mix_inputs": rows * blocks.out * inputs * (outputs + _MIXED_COST),
        "mix_outputs": rows * spatial * blocks.inn * outputs * (inputs + _MIXED_COST),
    }
    best = min(costs, key=costs.__getitem__)
    return None if best == "kernels" else best
