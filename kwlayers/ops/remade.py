"""Convolution with kernels of each sample that are made anew for the backward, not kept.

Kernels are as large as all samples' together; what they are made of is small. Autograd would keep
them for the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kwlayers.ops.geometry import ConvGeometry

Make = Callable[..., Tensor]


def conv_remade(make: Make, x: Tensor, geometry: ConvGeometry, *parts: Tensor) -> Tensor:
    """Convolve each sample with its kernel, make(*parts): (B, C_out, C_in / groups, *k).

    x: (B, C, *S)  out: (B, C_out, *S'). parts: all that depends on the model or the input. Under
    autocast x and the kernels, not the parts, are cast as for torch's own convolutions. First
    derivatives only, except where the forward is compiled or traced: then autograd keeps what it
    needs.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _run(make, x, geometry, *parts)
    return _run(make, x, geometry, *parts)


def _run(make: Make, x: Tensor, geometry: ConvGeometry, *parts: Tensor) -> Tensor:
    plain = (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if plain:
        return _convolve(x, make(*parts), geometry)
    return _Remade.apply(make, geometry, x, *parts)  # type: ignore[no-any-return,no-untyped-call]


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
    def forward(ctx: Any, make: Make, geometry: ConvGeometry, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.make, ctx.geometry = make, geometry
        return _convolve(x, make(*parts), geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[2:]
        if x.shape[0] == 0:
            none = [torch.zeros_like(p) if n else None for p, n in zip(parts, needs, strict=True)]
            return None, None, torch.zeros_like(x), *none
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_(n) for p, n in zip(parts, needs, strict=True)]
            kernels = ctx.make(*leaves)
        groups = ctx.geometry.groups * x.shape[0]
        wide, joined = _joined(x, kernels.detach().to(x.dtype))
        x_grad, kernel_grad, _ = torch.ops.aten.convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            wide,
            joined,
            None,
            *_arguments(ctx.geometry),
            groups,
            (needs_x, any(needs), False),
        )
        asked = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        found: Iterator[Tensor] = iter(())
        if asked:
            kernel_grad = kernel_grad.view_as(kernels).to(kernels.dtype)
            found = iter(torch.autograd.grad(kernels, asked, kernel_grad))
        own = [next(found) if needed else None for needed in needs]
        return None, None, x_grad.view_as(x) if needs_x else None, *own
