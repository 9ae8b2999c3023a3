"""Start a converted network from trained static weights.

The kernels of a warehouse's layers are cut into their M mixtures, the rows of P (M, d). Cells
E (n, d) and an attention A (M, n) that does not depend on the input are to give A E = P:

    n >= M    exactly: E holds P, and A is the assignment of the cells
    n < M     as closely as n cells can: E = c V^T and A = P V / c, for the first n right singular
              vectors V of P with every layer scaled to the same mean square. The sum over layers
              of m times the squared relative error is then the least there is (Eckart & Young,
              Psychometrika 1, 1936), and no layer is given up for being small. c keeps the rows of
              A at 1 or below in L1 norm, as those of attention are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers import geometry
from kwlayers.attention import Attention
from kwlayers.ops.published import assemble
from kwlayers.plan import PlanError, short
from kwlayers.warehouse import Warehouse

Mode = Literal[True, "cells"]

# A row of attention starts at sum_j |z_ij| = 5 times the largest cell's norm, which divides what
# training makes of it. Measured on resnet20 at b = 1/2 with SGD: with a third of that the attention
# moves too fast and costs 2 points of accuracy, four times as much gains nothing.
_SLOWNESS = 5.0
# What attention adds to that sum.
_EPSILON = 1e-3


@dataclass(frozen=True)
class WarmStart:
    """What a warm start kept of the static weights.

    errors: {layer: |W - W'| / |W|}, in Frobenius norm, of the static kernel W and the kernel W'
    that the layer starts with. temperature: where it does so, and was left.
    """

    errors: Mapping[str, float]
    temperature: float


def check(mode: object, weights: Mapping[str, Tensor]) -> None:
    """Raise PlanError for a warm start that cannot be."""
    if not (mode is True or mode is False or mode == "cells"):
        raise PlanError(f"warm_start {short(mode)}: allowed are False, True and 'cells'")
    for name, weight in weights.items() if mode else ():
        if weight.is_meta:
            raise PlanError(
                f"{name} is on the meta device and has no weights to start from: load them first, "
                "or leave warm_start out"
            )
        if not weight.isfinite().all():
            raise PlanError(f"{name}: its weights are not all finite, nothing can start from them")


@torch.no_grad()
def start_(
    mode: Mode, warehouse: Warehouse, layers: Mapping[str, tuple[Attention, Tensor]]
) -> dict[str, float]:
    """Write static weights into their warehouse and its layers' attentions.

    layers: by name the attention and the weight (C_out, C_in / groups, *K) or (C_out, C_in) of
    all layers of the warehouse, in the plan's order. Returns `WarmStart.errors` of these layers.
    """
    attentions, weights = zip(*layers.values(), strict=True)
    parts = [_cut(weight, warehouse.cell) for weight in weights]
    pieces, sizes, n = torch.cat(parts), [len(part) for part in parts], warehouse.num_cells
    if mode is True and n < len(pieces):
        mixing, cells = _low_rank(parts, n)
        used, kept = torch.arange(len(cells)), mixing[:, : len(cells)] @ cells
        for attention in attentions:
            attention.assignment.fill_(n)
    else:
        if n < len(pieces):
            for attention, part in zip(attentions, parts, strict=True):
                _assign_largest_(attention, part)
        owner = torch.cat([attention.assignment.cpu() for attention in attentions])
        has_cell = owner < n
        used, cells = owner[has_cell], pieces[has_cell]
        mixing, kept = F.one_hot(owner, n + 1)[:, :n].to(pieces), pieces * has_cell[:, None]
    if mode is True:
        norm = max(_SLOWNESS * float(cells.norm(dim=1).max()), 1.0)
        cells = cells * (1 + _EPSILON / norm)
        for attention, part in zip(attentions, torch.split(mixing, sizes), strict=True):
            _hold_(attention, part, norm)
    else:
        for attention in attentions:
            attention.temperature.fill_(1)
    target = warehouse.cells.requires_grad_(any(weight.requires_grad for weight in weights))
    target[used.to(target.device)] = cells.view(-1, *warehouse.cell).to(target)
    return {
        name: float((part - found).norm()) / (float(part.norm()) or 1.0)
        for name, part, found in zip(layers, parts, torch.split(kept, sizes), strict=True)
    }


def _cut(weight: Tensor, cell: geometry.Shape) -> Tensor:
    """out: (m, d), the mixtures of a kernel in their order, float32 or float64 on the CPU."""
    kernel = (*weight.shape, *(1,) * (len(cell) - weight.dim()))
    m, d = geometry.num_mixtures(kernel, cell), math.prod(cell)
    # A kernel assembled of the numbers i * d + j says where entry j of mixture i goes.
    first, within = (torch.arange(count, dtype=torch.float64) for count in (m, d))
    mixing = torch.stack((first * d, torch.ones_like(first)), dim=1)
    numbers = torch.stack((torch.ones_like(within), within)).view(2, *cell)
    places = assemble(mixing[None], numbers, kernel).flatten().long()
    pieces = torch.empty(m * d, dtype=torch.promote_types(weight.dtype, torch.float32))
    pieces[places] = weight.detach().flatten().to(pieces)
    return pieces.view(m, d)


def _low_rank(parts: Sequence[Tensor], num_cells: int) -> tuple[Tensor, Tensor]:
    """parts: (m, d) of each layer  out: A (M, n), E (r, d) for the first r = min(n, d) cells."""
    alike = torch.cat([part * (len(part) ** 0.5 / (float(part.norm()) or 1.0)) for part in parts])
    basis = torch.linalg.svd(alike, full_matrices=False).Vh[:num_cells]
    mixing = torch.cat(list(parts)) @ basis.T
    scale = float(mixing.abs().sum(dim=1).max()) or 1.0
    return F.pad(mixing / scale, (0, num_cells - len(basis))), basis * scale


def _assign_largest_(attention: Attention, pieces: Tensor) -> None:
    """The cells that a layer was dealt go to its largest pieces (m, d), the zero cell to others."""
    assignment = attention.assignment.cpu()
    dealt = assignment[assignment < attention.num_cells]
    largest = pieces.norm(dim=1).topk(len(dealt)).indices.sort().values
    assignment = torch.full_like(assignment, attention.num_cells)
    assignment[largest] = dealt
    attention.assignment.copy_(assignment)


def _hold_(attention: Attention, mixing: Tensor, norm: float) -> None:
    """Let the attention's own output be `mixing` (m, n), until it is trained.

    fc2's weight is zero; its gradient is not, as fc1's is from the second step on.
    """
    rest = (1 - mixing.abs().sum(dim=1, keepdim=True)).clamp(min=0)  # the zero cell's
    bias = attention.fc2.bias if attention.basis is None else attention.bias
    bias.copy_(norm * torch.cat((mixing, rest), dim=1).flatten())
    attention.fc2.weight.zero_()
