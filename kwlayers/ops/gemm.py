"""Per-sample kernels as batched matrix products with the positions that each output sees."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.kernels import Convolution
from kwlayers.ops.path import format_of


class Gemm(Convolution):
    """out (b, o, P) = kernels (b, o, K) source (b, K, P), for P output positions.

    The source of a 1x1 kernel is x; of a larger one, what im2col makes of it, K = (*k, C_in).
    """

    @classmethod
    def refuses(cls, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        return None if geometry.groups == 1 else f"it needs groups 1, not {geometry.groups}"

    def format(self, x: Tensor) -> torch.memory_format:
        return format_of(x) if self.geometry.pointwise else super().format(x)

    def source_shape(self) -> tuple[int, ...] | None:
        geometry = self.geometry
        if geometry.pointwise:
            strided = math.prod(geometry.stride) > 1
            return (geometry.kernel[1], *self.out_size) if strided else None
        return (*self.out_size, *geometry.kernel[2:], geometry.kernel[1])

    def source(self, x: Tensor) -> Tensor:
        shape = self.source_shape()
        if shape is None:
            return x
        if self.geometry.pointwise:
            return self.workspace.take(x.shape[0], *shape).copy_(x[self._strided()])
        result = self.workspace.take(x.shape[0], *shape)
        padded = _padded(x.movedim(1, -1), self.geometry.padding)
        for tap in self._taps():
            result[self._place(tap)] = padded[self._seen(tap)]
        return result

    def forward(self, source: Tensor, kernels: Tensor, out: Tensor) -> None:
        _product_into(_as_matrix(out), kernels.flatten(2), self._matrix(source))

    def source_grad(
        self, source: Tensor, kernels: Tensor, grad: Tensor, out: Tensor, add: bool
    ) -> None:
        target = self._matrix(out)
        _product_into(target, kernels.flatten(2).transpose(1, 2), grad.flatten(2), add)

    def kernel_grad(self, source: Tensor, grad: Tensor, out: Tensor) -> None:
        _product_into(_as_matrix(out), grad.flatten(2), self._matrix(source).transpose(1, 2))

    def x_grad(self, source_grad: Tensor, out: Tensor) -> None:
        if self.geometry.pointwise:
            out.zero_()[self._strided()] = source_grad
            return
        padding = self.geometry.padding
        if any(padding):
            sizes = [length + 2 * pad for length, pad in zip(self.size, padding, strict=True)]
            total = out.new_zeros(out.shape[0], *sizes, out.shape[1])
        else:
            total = out.zero_().movedim(1, -1)
        for tap in self._taps():
            total[self._seen(tap)] += source_grad[self._place(tap)]
        if any(padding):
            inside = [slice(pad, pad + n) for n, pad in zip(self.size, padding, strict=True)]
            index = (slice(None), *inside)
            out.copy_(total[index].movedim(-1, 1))

    def _matrix(self, source: Tensor) -> Tensor:
        """The source as (b, K, P), which needs no copy."""
        if self.geometry.pointwise:
            return _as_matrix(source)
        rank = len(self.size)
        return source.flatten(1 + rank).flatten(1, rank).transpose(1, 2)

    def _strided(self) -> tuple[slice, ...]:
        """The positions of x that a 1x1 kernel sees."""
        return (slice(None), slice(None), *(slice(None, None, s) for s in self.geometry.stride))

    def _taps(self) -> itertools.product[tuple[int, ...]]:
        return itertools.product(*map(range, self.geometry.kernel[2:]))

    def _seen(self, tap: tuple[int, ...]) -> tuple[slice, ...]:
        """In (b, *S, C), padded: what one tap sees from all output positions."""
        geometry = self.geometry
        positions = (
            slice(index * dilation, index * dilation + (length - 1) * stride + 1, stride)
            for index, dilation, stride, length in zip(
                tap, geometry.dilation, geometry.stride, self.out_size, strict=True
            )
        )
        return slice(None), *positions

    def _place(self, tap: tuple[int, ...]) -> tuple[slice | int, ...]:
        """In the source (b, *S', *k, C): that tap."""
        return *(slice(None) for _ in range(1 + len(self.size))), *tap


def _product_into(out: Tensor, left: Tensor, right: Tensor, add: bool = False) -> None:
    """Write left @ right (b, i, j), or add it."""
    if out.stride(1) < out.stride(2):
        # By rows: torch's products of 16-bit numbers are 1000 times as slow by columns.
        out, left, right = out.transpose(1, 2), right.transpose(1, 2), left.transpose(1, 2)
    if add:
        out.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=out)


def _as_matrix(x: Tensor) -> Tensor:
    """(b, C, *S) as (b, C, P), without a copy in either memory format."""
    return x.view(*x.shape[:2], -1)


def _padded(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Zeros around (b, *S, C)."""
    if not any(padding):
        return x
    sides = [side for pad in reversed(padding) for side in (pad, pad)]
    return torch.nn.functional.pad(x, [0, 0, *sides])
