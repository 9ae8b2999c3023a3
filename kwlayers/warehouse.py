"""The shared parameter: n kernel cells that several layers mix their kernels from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kwlayers import geometry


class Warehouse(nn.Module):
    """`cells` (n, c_out, c_in, *k), shared by the layers that are given this warehouse.

    num_cells: n. cell: (c_out, c_in, *k). num_mixtures: M, the mixtures of all its layers
    together (default n, i.e. ratio 1); cells are handed out evenly over them, in the order in
    which layers are made. Register the warehouse once in your model, beside its layers:
    they hold a reference that does not register it again.
    """

    def __init__(
        self,
        num_cells: int,
        cell: tuple[int, ...],
        num_mixtures: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_cells < 1 or len(cell) < 3 or min(cell) < 1:
            raise ValueError(
                f"num_cells {num_cells}, cell {tuple(cell)}: at least one cell of positive sizes "
                "(c_out, c_in, *k)"
            )
        self.num_cells = num_cells
        self.cell = tuple(cell)
        self.num_mixtures = num_cells if num_mixtures is None else num_mixtures
        if self.num_mixtures < 1:
            raise ValueError(f"num_mixtures {num_mixtures}: at least 1")
        self.cells = nn.Parameter(torch.empty(num_cells, *self.cell, device=device, dtype=dtype))
        self._handed_out = 0
        self.reset_parameters()

    def reset_parameters(self, start: int = 0, length: int | None = None) -> None:
        """Kaiming-normal (fan out) cells `start` to `start + length`, as one kernel."""
        run = self.cells.detach()[start : self.num_cells if length is None else start + length]
        if run.numel():
            fan_out = run.shape[0] * self.cell[0] * math.prod(self.cell[2:])
            run.normal_(0, math.sqrt(2 / fan_out))

    def next_cells(self, mixtures: int) -> geometry.Assignment:
        """The cells of the next `mixtures` mixtures; past `num_mixtures` they come round again."""
        return geometry.even_assignment(
            self.num_cells, self.num_mixtures, self._handed_out, mixtures
        )

    def hand_out(self, mixtures: int) -> geometry.Assignment:
        """`next_cells`, which are then taken."""
        assignment = self.next_cells(mixtures)
        self._handed_out += mixtures
        return assignment

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Warehouse:
        # As matrices: `model.to(memory_format=torch.channels_last)` raises for the 5 axes of
        # `cells`, whose layout means nothing to it.
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.flatten(1)).view(t.shape), recurse
        )
        return self

    def extra_repr(self) -> str:
        return f"num_cells={self.num_cells}, cell={self.cell}, num_mixtures={self.num_mixtures}"
