"""How far the numbers of a study can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b and its p value over `count` pairs; None where nothing can be said."""

    tau: float | None
    p: float | None
    count: int


def kendall(pairs: Sequence[tuple[float, float]]) -> Correlation:
    """How alike two accuracies rank trials. Under 3 pairs, or all alike: None."""
    from scipy.stats import kendalltau

    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(pairs) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return Correlation(None, None, len(pairs))
    found = kendalltau(first, second)
    return Correlation(float(found.statistic), float(found.pvalue), len(pairs))
