"""The fast paths as operators that torch.compile and fake tensors know: `torch.ops.kwlayers`.

Without the sums over layers that `lean.py` adds: a compiled graph adds gradients itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kwlayers.ops.device import device_type
from kwlayers.ops.dispatch import Choice, choose
from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.path import Needs, Path, format_of, wide
from kwlayers.ops.paths import paths_of
from kwlayers.ops.workspace import Workspace


def kw_conv_op(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    backend: str | None,
    nbytes: int,
) -> Tensor:
    """As `kwlayers.ops.kw_conv`, for the fast paths."""
    static = (list(numbers) for numbers in geometry[:4])
    found: Tensor = _forward(x, attention, cells, *static, geometry.groups, backend or "", nbytes)
    return found


@torch.library.custom_op("kwlayers::conv", mutates_args=())
def _forward(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    nbytes: int,
) -> Tensor:
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    path, _ = _paths(x, cells, geometry, backend)
    return path.forward(geometry, x, attention, cells, Workspace(x, nbytes))


@_forward.register_fake
def _(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    nbytes: int,
) -> Tensor:
    size = _geometry(kernel, stride, padding, dilation, groups).out_size(tuple(x.shape[2:]))
    out = x.new_empty(x.shape[0], kernel[0], *size)
    return out.contiguous(memory_format=format_of(x))


@torch.library.custom_op("kwlayers::conv_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    nbytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, attention and cells; empty where they are not needed."""
    geometry = _geometry(kernel, stride, padding, dilation, groups)
    _, path = _paths(x, cells, geometry, backend)
    asked = Needs(*needs)
    total = None
    if asked.cells:
        total = torch.zeros(cells.shape, dtype=wide(cells.dtype), device=cells.device)
    x_grad, attention_grad = path.backward(
        geometry, grad, x, attention, cells, Workspace(x, nbytes), asked, total
    )
    return (
        x.new_empty(0) if x_grad is None else x_grad,
        x.new_empty(0) if attention_grad is None else attention_grad.contiguous(),
        x.new_empty(0) if total is None else total.to(cells.dtype),
    )


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    nbytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    asked = Needs(*needs)
    return (
        torch.empty_like(x, memory_format=format_of(x)) if asked.x else x.new_empty(0),
        attention.new_empty(attention.shape) if asked.attention else x.new_empty(0),
        cells.new_empty(cells.shape) if asked.cells else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, attention, cells, *static = inputs
    ctx.save_for_backward(x, attention, cells)
    ctx.static = static


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = _backward(grad, *ctx.saved_tensors, *ctx.static, needs)
    grads = (one if needed else None for one, needed in zip(found, needs, strict=True))
    return *grads, *(None for _ in ctx.static)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _geometry(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    return ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)


def _paths(x: Tensor, cells: Tensor, geometry: ConvGeometry, backend: str) -> tuple[Path, Path]:
    cell = tuple(cells.shape[1:])
    if backend:
        return paths_of(Choice(backend, backend), geometry, cell)
    return paths_of(choose_for(x, cells, geometry), geometry, cell)


def choose_for(x: Tensor, cells: Tensor, geometry: ConvGeometry) -> Choice:
    """`choose` for these tensors."""
    return choose(
        device_type(x),
        x.dtype,
        x.shape[0],
        tuple(x.shape[2:]),
        geometry,
        tuple(cells.shape[1:]),
        cells.shape[0],
    )
