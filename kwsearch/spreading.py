"""A budget spread over warehouses: whole cells in given proportions, and nothing left that one more
would fit.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from kwlayers.solver import Variable

_PASSES = 32  # exchanges of cells


class Warehouse:
    """A warehouse to size, whose parameters by number of cells are remembered."""

    def __init__(self, variable: Variable) -> None:
        self.mixtures = variable.mixtures
        self.mixing = variable.mixing
        self._count = variable.params
        self._known: dict[int, int] = {}

    def params(self, cells: int) -> int:
        if cells not in self._known:
            self._known[cells] = self._count(cells)
        return self._known[cells]

    def step(self, cells: int) -> int:
        """What one cell more costs."""
        return self.params(cells + 1) - self.params(cells)


def spread(warehouses: Sequence[Warehouse], relative: Sequence[float], spend: int) -> list[int]:
    """Cells for at most `spend` parameters: in proportion, and then where the ratio is lowest.

    One cell in each warehouse must fit.
    """
    weights = [r * w.mixtures for r, w in zip(relative, warehouses, strict=True)]

    def shares(ratio: float) -> list[int]:
        return [max(int(ratio * weight), 1) for weight in weights]

    def fit(cells: Sequence[int]) -> bool:
        return sum(w.params(n) for w, n in zip(warehouses, cells, strict=True)) <= spend

    low, high = 0.0, 1.0
    while fit(shares(high)):
        low, high = high, 2 * high
    below, above = shares(low), shares(high)
    while any(b - a > 1 for a, b in zip(below, above, strict=True)):
        middle = (low + high) / 2
        cells = shares(middle)
        if fit(cells):
            low, below = middle, cells
        else:
            high, above = middle, cells
    _fill(warehouses, weights, below, spend)
    return below


def _fill(
    warehouses: Sequence[Warehouse], weights: Sequence[float], cells: list[int], spend: int
) -> int:
    """Add cells to `cells`, each where the ratio is lowest, until none fits; their parameters."""
    total = sum(w.params(n) for w, n in zip(warehouses, cells, strict=True))
    queue = [
        ((n + 1) / weight, i) for i, (n, weight) in enumerate(zip(cells, weights, strict=True))
    ]
    heapq.heapify(queue)
    while queue:
        i = queue[0][1]
        step = warehouses[i].step(cells[i])
        if total + step > spend:  # and never will, since the rest only shrinks
            heapq.heappop(queue)
            continue
        total += step
        cells[i] += 1
        heapq.heapreplace(queue, ((cells[i] + 1) / weights[i], i))
    return total


def exchange(
    warehouses: Sequence[Warehouse],
    relative: Sequence[float],
    cells: Sequence[int],
    spend: int,
    least: int,
) -> list[int]:
    """Give cells of one warehouse for one of another while that leaves less of `spend`.

    Stops at `least` parameters, or where no exchange helps.
    """
    weights = [r * w.mixtures for r, w in zip(relative, warehouses, strict=True)]
    best = list(cells)
    total = sum(w.params(n) for w, n in zip(warehouses, best, strict=True))
    for _ in range(_PASSES):
        if total >= least:
            break
        found = total
        for up, down in itertools.permutations(range(len(best)), 2):
            moved = list(best)
            moved[up] += 1
            left = spend - total - warehouses[up].step(best[up])
            while left < 0 and moved[down] > 1:
                moved[down] -= 1
                left += warehouses[down].step(moved[down])
            if left < 0:
                continue
            filled = _fill(warehouses, weights, moved, spend)
            if filled > found:
                found, better = filled, moved
        if found == total:
            break
        best, total = better, found
    return best
