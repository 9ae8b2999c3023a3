"""The largest of M linear pieces per channel, and gates: without keeping what autograd would.

    y = max_m (slope_m x + offset_m) * gate_1 * gate_2 …

Autograd keeps every piece and every product. Here x and the coefficients are kept, and backward
makes the pieces again, some samples at a time. Where pieces are equal, the first has the gradient;
in the definition, each a half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from kwlayers.ops.device import stands
from kwlayers.ops.watched import watched

# Of pieces at a time: they stay in a core's cache where samples are small enough.
_CHUNK_BYTES = 2**20


def dy_relu(x: Tensor, slopes: Tensor, offsets: Tensor, gates: Sequence[Tensor] = ()) -> Tensor:
    """x: (B, C, *S)  slopes, offsets: (B, C, M)  gates: of as many axes as x, each of its size or
    1, the first two (B, C)  out: (B, C, *S).

    Has first derivatives; torch.func, compilers and tracing get `dy_relu_ref`, which has any.
    Raises ValueError for shapes that do not fit.
    """
    if torch.compiler.is_compiling():
        return dy_relu_ref(x, slopes, offsets, gates)
    tensors = (x, slopes, offsets, *gates)
    if has_torch_function(tensors):  # one function, like torch's own
        found: Tensor = handle_torch_function(dy_relu, tensors, x, slopes, offsets, gates)
        return found
    _check(x, slopes, offsets, gates)
    # Without data, where only multiply-adds count, operators that the counter knows.
    if (x.is_meta and not stands()) or watched():
        return dy_relu_ref(x, slopes, offsets, gates)
    out: Tensor = _DyReLU.apply(x, slopes, offsets, *gates)  # type: ignore[no-untyped-call]
    return out


def dy_relu_ref(x: Tensor, slopes: Tensor, offsets: Tensor, gates: Sequence[Tensor] = ()) -> Tensor:
    """As `dy_relu`: the definition."""
    y = _piece(x, slopes, offsets, 0)
    for m in range(1, slopes.shape[-1]):
        y = torch.maximum(y, _piece(x, slopes, offsets, m))
    for gate in gates:
        y = y * gate
    return y


def _piece(x: Tensor, slopes: Tensor, offsets: Tensor, m: int) -> Tensor:
    maps = (1,) * (x.dim() - 2)
    slope, offset = (c[..., m].reshape(*c.shape[:2], *maps) for c in (slopes, offsets))
    return torch.addcmul(offset, x, slope)


def _check(x: Tensor, slopes: Tensor, offsets: Tensor, gates: Sequence[Tensor]) -> None:
    if slopes.dim() != 3 or slopes.shape != offsets.shape or slopes.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"slopes {tuple(slopes.shape)} and offsets {tuple(offsets.shape)}: both (B, C, pieces) "
            f"for an input {tuple(x.shape)}"
        )
    for gate in gates:
        fits = gate.dim() == x.dim() and gate.shape[:2] == x.shape[:2]
        sizes = zip(gate.shape[2:], x.shape[2:], strict=False)
        if not fits or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(
                f"a gate {tuple(gate.shape)} for an input {tuple(x.shape)}: its sizes, or 1 after "
                "the channels"
            )


class _DyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor, offsets: Tensor, *gates: Tensor) -> Tensor:
        ctx.save_for_backward(x, slopes, offsets, *gates)
        out = torch.empty_like(x)
        for part in _parts(x):
            y = out[part]
            y.copy_(_piece(x[part], slopes[part], offsets[part], 0))
            for m in range(1, slopes.shape[-1]):
                torch.maximum(y, _piece(x[part], slopes[part], offsets[part], m), out=y)
            for gate in gates:
                y.mul_(gate[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, slopes, offsets, *gates = ctx.saved_tensors
        found = [torch.empty_like(tensor) for tensor in (x, slopes, offsets, *gates)]
        for part in _parts(x):
            own = (tensor[part] for tensor in (x, slopes, offsets, *gates))
            for whole, one in zip(found, _gradients(grad[part], *own), strict=True):
                whole[part] = one
        return tuple(found)


def _gradients(
    grad: Tensor, x: Tensor, slopes: Tensor, offsets: Tensor, *gates: Tensor
) -> Iterator[Tensor]:
    """Of x, slopes, offsets and each gate, for some samples."""
    best = _piece(x, slopes, offsets, 0)
    which = torch.zeros_like(best, dtype=torch.uint8)
    for m in range(1, slopes.shape[-1]):
        other = _piece(x, slopes, offsets, m)
        which.masked_fill_(other > best, m)
        torch.maximum(best, other, out=best)
    of_gates = []
    for number, gate in enumerate(gates):
        product = grad * best
        for other in (*gates[:number], *gates[number + 1 :]):
            product.mul_(other)
        of_gates.append(product.sum_to_size(gate.shape))
    for gate in gates:
        grad = grad * gate
    of_x = torch.zeros_like(x)
    of_slopes, of_offsets = torch.empty_like(slopes), torch.empty_like(offsets)
    axes, maps = tuple(range(2, x.dim())), (1,) * (x.dim() - 2)
    for m in range(slopes.shape[-1]):
        own = grad * (which == m)
        of_x.addcmul_(own, slopes[..., m].reshape(*slopes.shape[:2], *maps))
        of_offsets[..., m] = own.sum(axes)
        of_slopes[..., m] = own.mul_(x).sum(axes)
    yield from (of_x, of_slopes, of_offsets, *of_gates)


def _parts(x: Tensor) -> Iterator[slice]:
    """Some samples at a time, at least one."""
    nbytes = x[:1].numel() * x.element_size()
    count = max(_CHUNK_BYTES // max(nbytes, 1), 1)
    for first in range(0, x.shape[0], count):
        yield slice(first, first + count)
