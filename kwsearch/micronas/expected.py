"""What a mixture of architectures is expected to cost: cycles, or whatever an operator has.

It is the published expectation. For a convolution with probabilities w of its output widths and v
of its input widths it is w' Lat v; for the cells see `_time` and `_fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kwsearch.micronas.choices import Choices
from kwsearch.micronas.cycles import Cycles, CycleTable
from kwsearch.micronas.mixture import Mixture, as_double, of_cell
from kwsearch.micronas.space import KERNELS, FusionCell, Key, Space, TimeCell, TimePlace, head


class Expected:
    """What a mixture costs, differentiable, by what each operator does. of one architecture: the
    sum over its operators.
    """

    def __init__(self, space: Space, cost: Callable[[Key], float]) -> None:
        self.space = space
        self._cells = [_matrices(Choices(place), cost) for place in space.cells]
        ends = [head(space, width, "input") for width in space.cells[-1].channels]
        costs = [sum(cost(one.key) for one in network) for network in ends]
        self._head = torch.tensor(costs, dtype=torch.float64)

    def __call__(self, mixture: Mixture) -> Tensor:
        """mixture: of every decision of the space. out: () in float64"""
        mixture = as_double(self.space, mixture)
        total = torch.zeros((), dtype=torch.float64)
        before = torch.ones(1, dtype=torch.float64)
        for place, matrices in zip(self.space.cells, self._cells, strict=True):
            own = of_cell(mixture, place.name)
            if isinstance(place, TimePlace):
                total = total + _time(matrices, own, before)
                before = own["channels"]
                continue
            skip, keep = own.get("keep", before.new_tensor([0.0, 1.0]))
            total = total + keep * _fusion(matrices, own, before)
            kept = keep * own["channels"]
            before = kept if place.reducing else skip * before + kept
        return total + before @ self._head


class ExpectedCycles(Expected):
    """Cycles of a mixture by a table. fitted: operators that were not measured.

    Raises CycleError where the table lacks an operator of the space that cannot be fitted.
    """

    def __init__(self, space: Space, table: CycleTable) -> None:
        self.table = table
        asked: dict[Key, Cycles] = {}

        def cost(key: Key) -> float:
            asked[key] = table.cycles(key)
            return asked[key].number

        super().__init__(space, cost)
        self.operators = frozenset(asked)
        self.fitted = frozenset(key for key, cycles in asked.items() if cycles.fitted)

    def milliseconds(self, mixture: Mixture) -> Tensor:
        """At the device's clock. out: ()"""
        return self(mixture) / (1000 * self.table.clock_mhz)


def needed(space: Space) -> frozenset[Key]:
    """Every operator that some architecture of a space has: what is to be measured."""
    found: set[Key] = set()

    def cost(key: Key) -> float:
        found.add(key)
        return 0.0

    for place in space.cells:
        _matrices(Choices(place), cost)
    for width in space.cells[-1].channels:
        found |= {one.key for one in head(space, width, "input")}
    return frozenset(found)


def _matrices(choices: Choices, cost: Callable[[Key], float]) -> dict[str, Tensor]:
    """Of every operator that a cell may have, by its name in the cell: (I, O) or (B, O) cycles."""
    place, least = choices.place, choices.place.channels[0]
    found = {}
    if isinstance(place, TimePlace):
        for kernel in KERNELS:
            (conv,) = place.operators(TimeCell(kernel, least), 1, "input")
            found[f"conv{kernel}"] = choices.matrix(conv, cost)
        return found
    for one in place.operators(FusionCell(least, least, KERNELS, True), 1, "input"):
        found[one.name.removeprefix(f"{place.name}.")] = choices.matrix(one, cost)
    return found


def _time(matrices: Mapping[str, Tensor], own: Mixture, before: Tensor) -> Tensor:
    """Each kernel's convolution in its share."""
    convs = [before @ matrices[f"conv{kernel}"] @ own["channels"] for kernel in KERNELS]
    return own["kernel"] @ torch.stack(convs)


def _fusion(matrices: Mapping[str, Tensor], own: Mixture, before: Tensor) -> Tensor:
    """With chances p1, p2, p3 of the branches, none of them q, r of the residual, A of an addition:

    branches = sum_k p_k l_k + A (p2 p1 + p3 max(p1, p2))
    cell = (bottleneck + branches) (1 - q) + r residual + A r (1 - q)

    As published: for independent branches p1 + p2 - p1 p2 would stand for the maximum, and only the
    bottleneck would have the factor 1 - q. It is exact where branch 3 or 5 is certainly on, and for
    every architecture.
    """
    narrow, written = own["bottleneck"], own["channels"]
    p1, p2, p3 = p = [own[f"branch{kernel}"][1] for kernel in KERNELS]
    r = own["residual"][1]
    some = 1 - (1 - p1) * (1 - p2) * (1 - p3)
    add = written @ matrices["add1"].diagonal()
    bottleneck = before @ matrices["bottleneck"] @ narrow
    convs = [narrow @ matrices[f"branch{kernel}"] @ written for kernel in KERNELS]
    branches = torch.stack(p) @ torch.stack(convs) + add * (p2 * p1 + p3 * torch.maximum(p1, p2))
    residual = before @ matrices["residual"] @ written
    cell: Tensor = (bottleneck + branches) * some + r * residual + add * r * some
    return cell
