"""For other runtimes: plain operators, and a batch that may be unknown, in one matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.published import assemble
from kwlayers.ops.reference import CONV


def kw_conv_portable(x: Tensor, attention: Tensor, cells: Tensor, geometry: ConvGeometry) -> Tensor:
    """x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S')."""
    return convolve(x, assemble(attention, cells, geometry.kernel), geometry)


def convolve(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """x: (B, C, *S)  kernels: (B, C_out, C_in / groups, *k)  out: (B, C_out, *S').

    The published form convolves in B times as many groups; where groups are a fixed number, as
    in ONNX, that fixes the batch. Here every patch of x is laid out: memory for as many copies
    of x as the kernel has positions.
    """
    kernel, stride, padding, dilation, groups = geometry
    batch, channels, *size = x.shape
    out = geometry.out_size(tuple(size))
    if not geometry.pointwise or max(stride) > 1:
        # A convolution that copies: its channel t is x, moved by position t of the kernel.
        taps = math.prod(kernel[2:])
        one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *kernel[2:])
        x = x.reshape(batch * channels, 1, *size)
        x = CONV[len(size)](x, one_hot, None, stride, padding, dilation)
    patches = x.reshape(batch, groups, math.prod(kernel[1:]), math.prod(out))
    product = kernels.reshape(batch, groups, -1, math.prod(kernel[1:])) @ patches
    return product.reshape(batch, kernel[0], *out)
