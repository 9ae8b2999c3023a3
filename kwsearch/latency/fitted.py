"""Times of calls that were not measured, from those of the same kind that were.

First a line: nanoseconds are a sum of parts in proportion to each number of a call's work, and one
that every call has, none of them negative, fitted to the relative errors. Then a Gaussian process
(Rasmussen and Williams, 2006, ch. 2 and 5.4.2) over the logarithms of the work, fitted to what the
line leaves: near calls that were measured it follows them, far away it trusts the line. Its widths
are those by which each measured call is best told from all the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

# Lengths over which errors of the line go together, in e-folds of work, and noise of a measurement
# as a part of them; all pairs are tried.
_LENGTHS, _NOISES = (0.5, 1.0, 2.0, 4.0), (0.03, 0.1, 0.3, 1.0)
# Of a kind of which fewer calls were measured than tell how far off it is: e-folds.
_LEAST, _UNKNOWN = 4, 0.7
# E-folds beyond which a time may be the machine's fault: a quarter longer.
_FAR = math.log(1.25)
# Of more calls than this every second, third, … is taken: a fit takes the cube of their number.
_MOST = 1000


class Fitted:
    """Nanoseconds by work. work: a tuple of numbers for each call. ns: what they took."""

    def __init__(self, work: Sequence[Sequence[int]], ns: Sequence[int]) -> None:
        step = -(-len(ns) // _MOST)
        rows = [list(map(float, row)) for row in work[::step]]
        self._work = torch.tensor(rows, dtype=torch.float64)
        took = torch.tensor(ns[::step], dtype=torch.float64).clamp(min=1)
        self._floor = float(took.min())
        self._weights = _line(_with_one(self._work), took)
        self._points = torch.log1p(self._work)
        self._left = (took / self._line_ns(self._work)).log()
        self._sure = len(ns) >= _LEAST
        # Of every call that was taken, told by all others: how many e-folds longer it took.
        self._excess = torch.zeros(len(rows), dtype=torch.float64)
        if self._sure:
            self._fit()
        self._step = step

    def outliers(self) -> list[int]:
        """The calls, by number, that took far longer than all others tell."""
        return [self._step * i for i in far_above([*map(float, self._excess)])]

    def ns(self, work: Sequence[int]) -> tuple[float, float]:
        """The estimate, and its standard error as a part of it."""
        row = torch.tensor([list(map(float, work))], dtype=torch.float64)
        line = float(self._line_ns(row))
        if not self._sure:
            return line * math.exp(float(self._left.mean())), _UNKNOWN
        near = self._kernel(torch.log1p(row))[0]
        error = float(near @ self._alpha)
        spread = 1 + self._noise - float(near @ torch.cholesky_solve(near[:, None], self._factor))
        return line * math.exp(error), math.sqrt(max(spread, 0.0) * self._variance)

    def _line_ns(self, work: Tensor) -> Tensor:
        return (_with_one(work) @ self._weights).clamp(min=self._floor / 2)

    def _kernel(self, points: Tensor) -> Tensor:
        return torch.exp(-0.5 * (torch.cdist(points, self._points) / self._length) ** 2)

    def _fit(self) -> None:
        """Choose length and noise by the errors of leaving one out."""
        best = math.inf
        for self._length in _LENGTHS:
            kernel = self._kernel(self._points)
            for noise in _NOISES:
                inverse = torch.linalg.inv(kernel + noise * torch.eye(len(kernel)).double())
                share = inverse.diagonal()
                # Of each point, by all others: its error, and its variance over the common one.
                errors = (inverse @ self._left) / share
                variance = float((errors**2 * share).mean())
                loss = float((math.log(max(variance, 1e-12)) - share.log()).mean())
                if loss < best:
                    best, chosen = loss, (self._length, noise, max(variance, 1e-6))
                    self._excess = errors
        self._length, self._noise, self._variance = chosen
        kernel = self._kernel(self._points) + self._noise * torch.eye(len(self._left)).double()
        self._factor = torch.linalg.cholesky(kernel)
        self._alpha = torch.cholesky_solve(self._left[:, None], self._factor)[:, 0]


def far_above(excesses: Sequence[float]) -> list[int]:
    """Which of these, in e-folds, are above `_FAR`, and above three times their usual spread."""
    spread = statistics.median(abs(one) for one in excesses) / 0.6745
    return [i for i, one in enumerate(excesses) if one > max(_FAR, 3 * spread)]


def _with_one(work: Tensor) -> Tensor:
    return torch.cat((torch.ones(len(work), 1, dtype=torch.float64), work), dim=1)


def _line(work: Tensor, ns: Tensor) -> Tensor:
    """Weights of at least 0 for which work @ weights is closest to ns, by relative errors."""
    from scipy.optimize import nnls

    rows = work / ns[:, None]
    scale = rows.amax(0).clamp(min=1e-30)
    weights, _ = nnls((rows / scale).numpy(), torch.ones(len(rows), dtype=torch.float64).numpy())
    return torch.from_numpy(weights) / scale
