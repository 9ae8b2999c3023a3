"""The definition: every mixture by itself, every sample by itself. Slow on purpose.

    w_i = sum_j alpha_ij e_j        (arXiv 2406.07879, equation 1)

The m mixtures of a kernel are numbered by (spatial, out, in), the last fastest.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def kw_conv_ref(x: Tensor, attention: Tensor, cells: Tensor, geometry: ConvGeometry) -> Tensor:
    """x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S')."""
    conv = CONV[x.dim() - 2]
    kernels = [assemble_ref(alpha, cells, geometry.kernel) for alpha in attention]
    if not kernels:
        nothing = (attention.sum() + cells.sum()) * 0  # in the graph, for gradients of zero
        return conv(x, nothing.expand(geometry.kernel), None, *geometry[1:])
    outputs = []
    for sample, kernel in zip(x, kernels, strict=True):
        outputs.append(conv(sample[None], kernel, None, *geometry[1:]))
    return torch.cat(outputs)


def assemble_ref(alpha: Tensor, cells: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """One kernel. alpha: (m, n)  cells: (n, c_out, c_in, *k)  out: (C_out, C_in / groups, *K)."""
    counts = [size // part for size, part in zip(kernel, cells.shape[1:], strict=True)]
    out_blocks, in_blocks, *spatial_blocks = counts
    blocks = itertools.product(*map(range, spatial_blocks), range(out_blocks), range(in_blocks))
    result = alpha.new_zeros(kernel)
    for row, (*spatial, out_block, in_block) in zip(alpha, blocks, strict=True):
        mixture = sum((a * cell for a, cell in zip(row, cells, strict=True)), cells[0] * 0)
        place = tuple(
            slice(index * part, (index + 1) * part)
            for index, part in zip((out_block, in_block, *spatial), cells.shape[1:], strict=True)
        )
        result = result.index_put(_indices(place), mixture)
    return result


def _indices(place: tuple[slice, ...]) -> tuple[Tensor, ...]:
    axes = [torch.arange(s.start, s.stop) for s in place]
    return torch.meshgrid(*axes, indexing="ij")
