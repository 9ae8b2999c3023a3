"""Whole sizes of groups for a parameter budget. No torch.

In the words of KernelWarehouse: given warehouses whose parameters grow strictly with their number
of cells n, find n such that the total is at or under the target, no single warehouse can take one
more cell, and every n / M (M mixtures) is as close as possible to one common ratio. Where each
warehouse has a relative ratio, to the common one times that. Other methods have other sizes (K
kernels) over their units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_PAIRS = 8  # how many warehouses on either side an exchange step looks at
_PASSES = 12


@dataclass(frozen=True)
class Variable:
    """One warehouse to size.

    mixtures: M. params: parameters of cells and attention at n cells, strictly increasing.
    mixing: mixing MACs that one cell adds. relative: its ratio over the common one.
    """

    mixtures: int
    params: Callable[[int], int]
    mixing: int = 0
    relative: float = 1.0


@dataclass(frozen=True)
class Solution:
    """Cells per warehouse. `params` and `mixing` are sums over the warehouses.

    ratio: the common ratio it was rounded from. spread: root mean square distance of the
    warehouses' ratios (over their relative ones) from it, 0 if all are equal.
    """

    sizes: tuple[int, ...]
    params: int
    mixing: int
    ratio: float
    spread: float


def floor_params(variables: Sequence[Variable]) -> int:
    """The fewest parameters: one cell per warehouse."""
    return sum(variable.params(1) for variable in variables)


def solve(variables: Sequence[Variable], target: int) -> tuple[Solution, ...]:
    """Plans of at most `target` parameters, the most even first; empty if there is none.

    Every solution is maximal: no warehouse can take one more cell.
    """
    if not variables or floor_params(variables) > target:
        return ()
    return _Search(variables, target).run()


class _Search:
    """A start at the common ratio, then exchanges of cells between pairs of warehouses."""

    def __init__(self, variables: Sequence[Variable], target: int) -> None:
        self.variables = variables
        self.target = target
        self.seen: dict[tuple[int, ...], Solution] = {}
        self._memo: list[dict[int, int]] = [{} for _ in variables]
        self.ratio = self._common_ratio()

    def run(self) -> tuple[Solution, ...]:
        start = [int(self._share(i, self.ratio)) for i in range(len(self.variables))]
        best = self._fill(start)
        for _ in range(_PASSES):
            better = min(
                (self._exchange(best, up, down) for up, down in self._pairs(best)),
                key=self._rank,
                default=best,
            )
            if self._rank(better) >= self._rank(best):
                break
            best = better
        return tuple(sorted(self.seen.values(), key=self._rank))

    @staticmethod
    def _rank(solution: Solution) -> tuple[float, int, tuple[int, ...]]:
        return (round(solution.spread, 12), -solution.params, solution.sizes)

    def _params(self, index: int, cells: int) -> int:
        memo = self._memo[index]
        if cells not in memo:
            memo[cells] = self.variables[index].params(cells)
        return memo[cells]

    def _step(self, index: int, cells: int) -> int:
        return self._params(index, cells + 1) - self._params(index, cells)

    def _share(self, index: int, ratio: float) -> float:
        variable = self.variables[index]
        return max(ratio * variable.relative * variable.mixtures, 1.0)

    def _params_between(self, index: int, share: float) -> float:
        """Parameters at a share that need not be whole, linear between whole cells."""
        whole = int(share)
        return self._params(index, whole) + (share - whole) * self._step(index, whole)

    def _common_ratio(self) -> float:
        """The ratio that would meet the target exactly if cells could be divided."""

        def fits(ratio: float) -> bool:
            shares = (self._share(i, ratio) for i in range(len(self.variables)))
            return sum(self._params_between(i, s) for i, s in enumerate(shares)) <= self.target

        low, high = 0.0, 1.0
        while fits(high):
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _off(self, index: int, cells: int) -> float:
        """How far the warehouse's ratio is from the common one."""
        variable = self.variables[index]
        return (cells - self._share(index, self.ratio)) / (variable.mixtures * variable.relative)

    def _fill(self, cells: list[int]) -> Solution:
        """Add cells, each where it hurts evenness least, until none fits."""
        cells = list(cells)
        total = sum(self._params(i, n) for i, n in enumerate(cells))
        open_ = list(range(len(cells)))
        while True:
            left = self.target - total
            open_ = [i for i in open_ if self._step(i, cells[i]) <= left]
            if not open_:
                break
            i = min(open_, key=lambda i: (self._off(i, cells[i] + 1), i))
            total += self._step(i, cells[i])
            cells[i] += 1
        return self._keep(cells, total)

    def _keep(self, cells: list[int], total: int) -> Solution:
        key = tuple(cells)
        if key not in self.seen:
            square = sum(self._off(i, n) ** 2 for i, n in enumerate(cells)) / len(cells)
            mixing = sum(v.mixing * n for v, n in zip(self.variables, cells, strict=True))
            self.seen[key] = Solution(key, total, mixing, self.ratio, square**0.5)
        return self.seen[key]

    def _pairs(self, solution: Solution) -> list[tuple[int, int]]:
        """Warehouses most below the common ratio, with those most above it."""
        order = sorted(range(len(solution.sizes)), key=lambda i: self._off(i, solution.sizes[i]))
        below, above = order[:_PAIRS], order[-_PAIRS:]
        return [(up, down) for up in below for down in above if up != down]

    def _exchange(self, solution: Solution, up: int, down: int) -> Solution:
        """One cell more in `up`, as many fewer as needed in `down`, and fill what is left."""
        cells = list(solution.sizes)
        total = solution.params + self._step(up, cells[up])
        cells[up] += 1
        while total > self.target and cells[down] > 1:
            total -= self._step(down, cells[down] - 1)
            cells[down] -= 1
        return solution if total > self.target else self._fill(cells)
