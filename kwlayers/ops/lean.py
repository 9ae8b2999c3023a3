"""Autograd around the fast paths: saves x and attention only, sums gradients of cells once.

Autograd would give every layer a gradient as large as its whole warehouse, and add them. Here
all layers of a warehouse add into one buffer: instead of the cells, their part of the graph is
a scalar token, whose backward runs after the last layer's and hands the buffer out.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.path import Needs, Path, wide
from kwlayers.ops.workspace import Workspace


class _Sum:
    """Gradients of one tensor of cells, added up over the layers of each running backward."""

    def __init__(self, cells: Tensor) -> None:
        self.shape, self.dtype, self.device = cells.shape, cells.dtype, cells.device
        self.cast: dict[torch.dtype, Tensor] = {}
        self.spent = False
        # By backward pass: one that failed, or that did not ask for cells, leaves its own behind.
        self._buffers: dict[int, Tensor] = {}

    def buffer(self) -> Tensor:
        """Where the running backward adds up."""
        task = torch._C._current_graph_task_id()
        if task not in self._buffers:
            self._buffers[task] = torch.zeros(
                self.shape, dtype=wide(self.dtype), device=self.device
            )
        return self._buffers[task]

    def take(self) -> Tensor | None:
        """The sum of the running backward, once."""
        self.spent = True
        self.cast.clear()
        found = self._buffers.pop(torch._C._current_graph_task_id(), None)
        return None if found is None else found.to(self.dtype)


class _Token(torch.autograd.Function):
    """A scalar that stands for the cells in the graph."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, total: _Sum) -> Tensor:
        ctx.total = total
        return cells.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.total.take(), None


# A token lives as long as a graph that uses it: the layers of one forward pass share it.
_tokens: Any = WeakTensorKeyDictionary()


def _token(cells: Tensor) -> Tensor:
    reference = _tokens.get(cells)
    token: Tensor | None = reference() if reference is not None else None
    if token is None or token.total.spent:  # type: ignore[attr-defined]
        total = _Sum(cells)
        token = _Token.apply(cells, total)  # type: ignore[no-untyped-call]
        token.total = total  # type: ignore[union-attr]
        _tokens[cells] = weakref.ref(token)
    assert token is not None
    return token


class _Lean(torch.autograd.Function):
    """One path's convolution; `cells` without graph, `token` with."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        token: Tensor | None,
        cells: Tensor,
        geometry: ConvGeometry,
        paths: tuple[Path, Path],
        nbytes: int,
    ) -> Tensor:
        ctx.save_for_backward(x, attention, cells)
        ctx.set_materialize_grads(False)
        ctx.token, ctx.geometry, ctx.paths, ctx.nbytes = token, geometry, paths, nbytes
        return paths[0].forward(geometry, x, attention, cells, Workspace(x, nbytes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if grad is None:
            return None, None, *nothing
        x, attention, cells = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:3])
        total = ctx.token.total.buffer() if needs.cells else None
        x_grad, attention_grad = ctx.paths[1].backward(
            ctx.geometry, grad, x, attention, cells, Workspace(x, ctx.nbytes), needs, total
        )
        return x_grad, attention_grad, *nothing


def kw_conv_lean(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    paths: tuple[Path, Path],
    nbytes: int,
) -> Tensor:
    """x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S').

    paths: of the forward and of the backward. nbytes: workspace. First derivatives only.
    """
    if not torch.is_grad_enabled():
        workspace = Workspace(x, nbytes)
        return paths[0].forward(geometry, x, attention, cells.to(x.dtype), workspace)
    token = _token(cells) if cells.requires_grad else None
    return _Lean.apply(  # type: ignore[no-any-return,no-untyped-call]
        x, attention, token, _cast(cells, token, x.dtype), geometry, paths, nbytes
    )


def _cast(cells: Tensor, token: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The cells without graph, in that dtype; once for all layers that share a token."""
    found = cells.detach()
    if cells.dtype == dtype:
        return found
    if token is None:
        return found.to(dtype)
    cast: dict[torch.dtype, Tensor] = token.total.cast  # type: ignore[attr-defined]
    if dtype not in cast:
        cast[dtype] = found.to(dtype)
    return cast[dtype]
