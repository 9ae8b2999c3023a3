"""Tiny maps: no kernel is mixed at all; inputs, or outputs of whole cells, are mixed instead.

With X (b, P, s, i, r) the inputs that each of P output positions sees, by spatial block s, input
block i and place r in a cell, and cells E (n, c_out, r):

    mix_inputs:   U_j = sum_si A_sgij X_si,  y_g = sum_j U_j E_j^T          g: output block
    mix_outputs:  V_sij = X_si E_j^T,        y_g = sum_sij A_sgij V_sij
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kwlayers.ops.gemm import Gemm
from kwlayers.ops.geometry import Blocks, ConvGeometry
from kwlayers.ops.path import Needs, Path, add_product_, format_of
from kwlayers.ops.workspace import Workspace


class _Seen:
    """X of some samples and back, and the attention in the order that the products need."""

    def __init__(
        self, geometry: ConvGeometry, x: Tensor, cells: Tensor, workspace: Workspace
    ) -> None:
        size = tuple(x.shape[2:])
        self.workspace = workspace
        self.blocks = blocks = Blocks.of(geometry.kernel, tuple(cells.shape[1:]))
        self.gemm = Gemm(geometry, size, True, workspace)
        self.positions = math.prod(self.gemm.out_size)
        self.spatial = math.prod(blocks.spatial)
        rank = len(size)
        # (b, P, s1, k1, …, i, c_in) -> (b, P, s1, …, i, c_in, k1, …)
        blocks_at = [2 + 2 * d for d in range(rank)]
        inside_at = [3 + 2 * d for d in range(rank)]
        self.order = [0, 1, *blocks_at, 2 + 2 * rank, 3 + 2 * rank, *inside_at]
        self.cut = [n for pair in zip(blocks.spatial, blocks.cell[2:], strict=True) for n in pair]

    def inputs(self, x: Tensor) -> Tensor:
        """x: (b, C, *S)  out: (b, P, s, i, r)."""
        source = self.gemm.source(x)
        if self.gemm.geometry.pointwise:
            source = source.movedim(1, -1)
        blocks = self.blocks
        split = source.reshape(
            x.shape[0], self.positions, *self.cut, blocks.inn, blocks.cell[1]
        ).permute(self.order)
        return split.reshape(x.shape[0], self.positions, self.spatial, blocks.inn, blocks.row)

    def x_grad(self, grad: Tensor, out: Tensor) -> None:
        """Write out (b, C, *S), the gradient of x, from that of X."""
        blocks = self.blocks
        split = grad.reshape(
            out.shape[0], self.positions, *blocks.spatial, blocks.inn, *blocks.cell[1:]
        )
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        source = split.permute(back)
        gemm = self.gemm
        source = source.reshape(out.shape[0], *gemm.out_size, *gemm.geometry.kernel[2:], -1)
        if gemm.geometry.pointwise:
            gemm.x_grad(source.view(out.shape[0], *gemm.out_size, -1).movedim(-1, 1), out)
        else:
            gemm.x_grad(source, out)

    def attention(self, attention: Tensor) -> Tensor:
        """attention: (b, m, n)  out: (b, s, g, i, n)."""
        blocks = self.blocks
        return attention.reshape(-1, self.spatial, blocks.out, blocks.inn, attention.shape[2])

    def outputs(self, y: Tensor) -> Tensor:
        """y: (b, C_out, *S')  out: (b, P, g, c_out)."""
        y = y.flatten(2).transpose(1, 2)
        return y.reshape(-1, self.positions, self.blocks.out, self.blocks.cell[0])

    def result(self, y: Tensor) -> Tensor:
        """y: (b, P, g, c_out)  out: (b, C_out, *S')."""
        return y.flatten(2).transpose(1, 2).reshape(y.shape[0], -1, *self.gemm.out_size)


def mix_inputs_forward(seen: _Seen, x: Tensor, attention: Tensor, cells: Tensor) -> Tensor:
    mixed = _mixed_inputs(seen, seen.inputs(x), attention)
    weights = cells.flatten(2).transpose(1, 2)  # (n, r, c_out)
    rows = mixed.shape[1]
    out = torch.addbmm(
        mixed.new_zeros(rows, weights.shape[2]), mixed, weights, beta=0
    )  # (b P g, c_out)
    return seen.result(out.view(x.shape[0], seen.positions, seen.blocks.out, -1))


def _mixed_inputs(seen: _Seen, inputs: Tensor, attention: Tensor) -> Tensor:
    """U: (n, b P g, r)."""
    batch, positions, _, _, row = inputs.shape
    alpha = seen.attention(attention).permute(0, 4, 2, 1, 3)  # (b, n, g, s, i)
    n, blocks = alpha.shape[1:3]
    flat = inputs.permute(0, 2, 3, 1, 4).reshape(batch, -1, positions * row)  # (b, si, P r)
    mixed = torch.bmm(alpha.reshape(batch, n * blocks, -1), flat)
    mixed = mixed.view(batch, n, blocks, positions, row).permute(1, 0, 3, 2, 4)
    return mixed.reshape(n, -1, row)


def mix_inputs_backward(
    seen: _Seen,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    needs: Needs,
    cells_grad: Tensor | None,
    x_grad: Tensor | None,
) -> Tensor | None:
    """Writes x_grad, adds to cells_grad, returns the gradient of attention (b, m, n)."""
    inputs = seen.inputs(x)
    batch, positions, _, _, row = inputs.shape
    n, blocks = cells.shape[0], seen.blocks
    rows = seen.outputs(grad).reshape(-1, blocks.cell[0])  # (b P g, c_out)
    if cells_grad is not None:
        mixed = _mixed_inputs(seen, inputs, attention)
        total = cells_grad.flatten(2)
        found = rows.t().expand(n, -1, -1)
        if total.dtype == mixed.dtype:
            total.baddbmm_(found, mixed)
        else:
            total.add_(found @ mixed)
    if not (needs.x or needs.attention):
        return None
    spread = torch.bmm(rows.expand(n, -1, -1), cells.flatten(2))  # (n, b P g, r)
    spread = spread.view(n, batch, positions, blocks.out, row).permute(1, 0, 3, 2, 4)
    spread = spread.reshape(batch, n * blocks.out, positions * row)
    flat = inputs.permute(0, 2, 3, 1, 4).reshape(batch, -1, positions * row)
    if x_grad is not None:
        alpha = seen.attention(attention).permute(0, 4, 2, 1, 3).reshape(batch, n * blocks.out, -1)
        back = torch.bmm(alpha.transpose(1, 2), spread)
        back = back.view(batch, seen.spatial, blocks.inn, positions, row).permute(0, 3, 1, 2, 4)
        seen.x_grad(back, x_grad)
    if not needs.attention:
        return None
    alpha_grad = torch.bmm(spread, flat.transpose(1, 2))  # (b, n g, s i)
    alpha_grad = alpha_grad.view(batch, n, blocks.out, seen.spatial, blocks.inn)
    return alpha_grad.permute(0, 3, 2, 4, 1).reshape(attention.shape)


def mix_outputs_forward(seen: _Seen, x: Tensor, attention: Tensor, cells: Tensor) -> Tensor:
    inputs = seen.inputs(x)
    whole = _cell_outputs(seen, inputs, cells)
    out = torch.bmm(_spread_attention(seen, attention), whole)
    return seen.result(out.view(x.shape[0], seen.positions, seen.blocks.out, -1))


def _cell_outputs(seen: _Seen, inputs: Tensor, cells: Tensor) -> Tensor:
    """V: (b P, s i n, c_out)."""
    batch, positions, _, _, row = inputs.shape
    found = inputs.reshape(-1, row) @ cells.flatten(2).flatten(0, 1).t()  # (b P s i, n c_out)
    return found.view(batch * positions, -1, seen.blocks.cell[0])


def _spread_attention(seen: _Seen, attention: Tensor) -> Tensor:
    """(b P, g, s i n): the same for every position."""
    alpha = seen.attention(attention).transpose(1, 2)  # (b, g, s, i, n)
    alpha = alpha.reshape(alpha.shape[0], 1, seen.blocks.out, -1)
    return alpha.expand(-1, seen.positions, -1, -1).flatten(0, 1)


def mix_outputs_backward(
    seen: _Seen,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    needs: Needs,
    cells_grad: Tensor | None,
    x_grad: Tensor | None,
) -> Tensor | None:
    """Writes x_grad, adds to cells_grad, returns the gradient of attention (b, m, n)."""
    inputs = seen.inputs(x)
    batch, positions, _, _, row = inputs.shape
    blocks = seen.blocks
    outputs = seen.outputs(grad).reshape(batch * positions, blocks.out, blocks.cell[0])
    alpha_grad = None
    if needs.attention:
        whole = _cell_outputs(seen, inputs, cells)
        found = torch.bmm(outputs, whole.transpose(1, 2))  # (b P, g, s i n)
        found = found.view(batch, positions, blocks.out, seen.spatial, blocks.inn, -1).sum(1)
        alpha_grad = found.transpose(1, 2).reshape(attention.shape)
    if x_grad is None and cells_grad is None:
        return alpha_grad
    spread = torch.bmm(_spread_attention(seen, attention).transpose(1, 2), outputs)
    spread = spread.view(-1, cells.shape[0] * blocks.cell[0])  # (b P s i, n c_out)
    matrix = cells.flatten(2).flatten(0, 1)
    if x_grad is not None:
        back = (spread @ matrix).view(inputs.shape)
        seen.x_grad(back, x_grad)
    if cells_grad is not None:
        add_product_(cells_grad.flatten(2).flatten(0, 1), spread.t(), inputs.reshape(-1, row))
    return alpha_grad


class InputsPath(Path):
    """Mixes inputs, or outputs of whole cells, some samples at a time."""

    def __init__(self, first: bool) -> None:
        self.first = first

    def refuses(self, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        return Gemm.refuses(geometry, cell)

    def forward(
        self,
        geometry: ConvGeometry,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        seen = _Seen(geometry, x, cells, workspace)
        run = mix_inputs_forward if self.first else mix_outputs_forward
        parts = []
        for samples in self._blocks(seen, x, cells):
            start = workspace.mark()
            parts.append(run(seen, x[samples], attention[samples], cells))
            workspace.release(start)
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.contiguous(memory_format=format_of(x))

    def backward(
        self,
        geometry: ConvGeometry,
        grad: Tensor,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        workspace: Workspace,
        needs: Needs,
        cells_grad: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        seen = _Seen(geometry, x, cells, workspace)
        run = mix_inputs_backward if self.first else mix_outputs_backward
        x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.x else None
        parts = []
        for samples in self._blocks(seen, x, cells):
            start = workspace.mark()
            part = None if x_grad is None else x_grad[samples]
            parts.append(
                run(
                    seen,
                    grad[samples],
                    x[samples],
                    attention[samples],
                    cells,
                    needs,
                    cells_grad,
                    part,
                )
            )
            workspace.release(start)
        found = [part for part in parts if part is not None]
        if x_grad is not None:
            x_grad = x_grad.contiguous(memory_format=format_of(x))
        return x_grad, torch.cat(found) if found else None

    def _blocks(self, seen: _Seen, x: Tensor, cells: Tensor) -> list[slice]:
        """Samples whose mixed inputs, or outputs of all cells, fit half the workspace."""
        blocks = seen.blocks
        per_sample = seen.positions * cells.shape[0]
        per_sample *= (
            blocks.out * blocks.row if self.first else seen.spatial * blocks.inn * blocks.cell[0]
        )
        capacity = seen.workspace.nbytes // x.element_size() // 2
        step = max(1, capacity // per_sample)
        return [slice(start, start + step) for start in range(0, x.shape[0], step)]
