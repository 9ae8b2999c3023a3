"""Convolution with kernels of each sample that are made anew for the backward, not kept.

Kernels are as large as all samples' together; what they are made of is small. Autograd would keep
them for the gradient of the input. Here they are made for some samples at a time, in the forward
and again in the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kwlayers.ops import portable
from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.watched import watched

Make = Callable[..., Tensor]
# Beside the kernels themselves: their gradient, and one of what makes them.
_COPIES = 3


def conv_remade(
    make: Make,
    x: Tensor,
    geometry: ConvGeometry,
    each: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    nbytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve each sample with its kernel, make(*each, *shared): (B, C_out, C_in / groups, *k).

    x: (B, C, *S)  each: (B, …), of single samples  shared: of all  out: (B, C_out, *S'). nbytes:
    for kernels at a time; None for those of all samples. backend: "portable", in other runtimes'
    operators; any other is as None. Under autocast x and the kernels, not
    what makes them, are cast as for torch's own convolutions. First derivatives only, except where
    the forward is compiled or traced: then autograd keeps what it needs.
    """
    if backend == "portable":
        return portable.convolve(x, make(*each, *shared), geometry)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _run(make, x, geometry, each, shared, nbytes)
    return _run(make, x, geometry, each, shared, nbytes)


def _run(
    make: Make,
    x: Tensor,
    geometry: ConvGeometry,
    each: Sequence[Tensor],
    shared: Sequence[Tensor],
    nbytes: int | None,
) -> Tensor:
    if torch.compiler.is_compiling() or x.shape[0] == 0 or watched():
        return _convolve(x, make(*each, *shared), geometry)
    step = _samples(x, geometry, nbytes)
    if not torch.is_grad_enabled():
        return _forward(make, x, geometry, each, shared, step)
    found: Tensor = _Remade.apply(  # type: ignore[no-untyped-call]
        make, geometry, step, len(each), x, *each, *shared
    )
    return found


def _samples(x: Tensor, geometry: ConvGeometry, nbytes: int | None) -> int:
    """Samples whose kernels are made at a time."""
    if nbytes is None:
        return x.shape[0]
    kernel = x.element_size()
    for size in geometry.kernel:
        kernel *= size
    return max(nbytes // (_COPIES * kernel), 1)


def _slices(batch: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, batch, step))


def _forward(
    make: Make,
    x: Tensor,
    geometry: ConvGeometry,
    each: Sequence[Tensor],
    shared: Sequence[Tensor],
    step: int,
) -> Tensor:
    parts = [
        _convolve(x[some], make(*(part[some] for part in each), *shared), geometry)
        for some in _slices(x.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _convolve(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    batch = x.shape[0]
    if batch == 0:
        size = geometry.out_size(tuple(x.shape[2:]))
        return x.new_zeros(0, geometry.kernel[0], *size) + 0 * (x.sum() + kernels.sum())
    out = torch.convolution(  # type: ignore[call-arg]  # which counts what is unpacked as one
        *_joined(x, kernels.to(x.dtype)), None, *_arguments(geometry), geometry.groups * batch
    )
    return out.reshape(batch, -1, *out.shape[2:])


def _joined(x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """All samples as groups of one."""
    return x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1)


def _arguments(geometry: ConvGeometry) -> tuple[Any, ...]:
    """Of torch's convolution, between the bias and the groups."""
    rank = len(geometry.stride)
    return geometry.stride, geometry.padding, geometry.dilation, False, (0,) * rank


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make: Make,
        geometry: ConvGeometry,
        step: int,
        count: int,
        x: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.make, ctx.geometry, ctx.step, ctx.count = make, geometry, step, count
        return _forward(make, x, geometry, parts[:count], parts[count:], step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[4:]
        x_grads: list[Tensor] = []
        found: list[Tensor | None] = [
            torch.zeros_like(part) if needed else None
            for part, needed in zip(parts, needs, strict=True)
        ]
        for some in _slices(x.shape[0], ctx.step):
            mine = [part[some] if i < ctx.count else part for i, part in enumerate(parts)]
            x_grad, grads = _grads(ctx, x[some], mine, grad[some], needs_x, needs)
            if x_grad is not None:
                x_grads.append(x_grad)
            for i, one in grads.items():
                total = found[i]
                assert total is not None
                (total[some] if i < ctx.count else total).add_(one)
        return None, None, None, None, torch.cat(x_grads) if needs_x else None, *found


def _grads(
    ctx: Any,
    x: Tensor,
    parts: Sequence[Tensor],
    grad: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Of x, and of the parts that need one, by index."""
    # Also where the whole backward runs under autocast: as the forward made them.
    kind = x.device.type
    cast = contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
    with torch.enable_grad(), cast:
        leaves = [p.detach().requires_grad_(n) for p, n in zip(parts, needs, strict=True)]
        kernels = ctx.make(*leaves)
    wide, joined = _joined(x, kernels.detach().to(x.dtype))
    x_grad, kernel_grad, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]),
        wide,
        joined,
        None,
        *_arguments(ctx.geometry),
        ctx.geometry.groups * x.shape[0],
        (needs_x, any(needs), False),
    )
    asked = [i for i, needed in enumerate(needs) if needed]
    grads: dict[int, Tensor] = {}
    if asked:
        kernel_grad = kernel_grad.view_as(kernels).to(kernels.dtype)
        made = torch.autograd.grad(kernels, [leaves[i] for i in asked], kernel_grad)
        grads = dict(zip(asked, made, strict=True))
    return x_grad.view_as(x) if needs_x else None, grads
