"""What a fast path is: a forward that keeps nothing, and a backward that computes it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.workspace import Workspace


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    attention: bool
    cells: bool


class Path(ABC):
    """x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S').

    No autograd in here. B is at least 1. Results have the memory format of x.
    """

    def refuses(self, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        """Why this path cannot do it; None where it can."""
        return None

    @abstractmethod
    def forward(
        self,
        geometry: ConvGeometry,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        """The convolution."""

    @abstractmethod
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
        """The gradients of x and attention; that of cells is added to `cells_grad`."""


def format_of(x: Tensor) -> torch.memory_format:
    """channels_last where x (B, C, *S) is, contiguous otherwise."""
    for rank, found in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == rank and not x.is_contiguous() and x.is_contiguous(memory_format=found):
            return found
    return torch.contiguous_format


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where sums of numbers of that dtype are added up."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
