"""The published form: one matrix product mixes all kernels, one grouped convolution uses them."""

from __future__ import annotations

from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.reference import CONV


def kw_conv_published(
    x: Tensor, attention: Tensor, cells: Tensor, geometry: ConvGeometry
) -> Tensor:
    """x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S')."""
    batch = x.shape[0]
    conv = CONV[x.dim() - 2]
    kernels = assemble(attention, cells, geometry.kernel)
    if batch == 0:
        # Zeros that keep attention and cells in the graph: their gradients are zeros, not None.
        kernels = kernels.sum(0)
        groups = geometry.groups
    else:
        kernels = kernels.flatten(0, 1)
        groups = geometry.groups * batch
        x = x.reshape(1, -1, *x.shape[2:])
    out = conv(x, kernels, None, geometry.stride, geometry.padding, geometry.dilation, groups)
    return out.reshape(batch, geometry.kernel[0], *out.shape[2:])


def assemble(attention: Tensor, cells: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, C_in / groups, *K)."""
    cell = cells.shape[1:]
    mixed = attention.flatten(0, 1) @ cells.flatten(1)
    out_blocks, in_blocks, *spatial_blocks = (
        size // part for size, part in zip(kernel, cell, strict=True)
    )
    # (B, spatial…, out, in, c_out, c_in, k…) -> (B, out, c_out, in, c_in, spatial, k, …)
    blocks = len(spatial_blocks)
    mixed = mixed.reshape(attention.shape[0], *spatial_blocks, out_blocks, in_blocks, *cell)
    out_axis, in_axis, cell_axis = 1 + blocks, 2 + blocks, 3 + blocks
    spatial = [(1 + d, cell_axis + 2 + d) for d in range(blocks)]
    order = (0, out_axis, cell_axis, in_axis, cell_axis + 1, *(a for pair in spatial for a in pair))
    return mixed.permute(order).reshape(attention.shape[0], *kernel)
