"""Examples of one recording, person or broadcast, which are held out together."""

from __future__ import annotations

import numpy as np

from kwsearch.data.errors import DataError


def held_groups(
    groups: np.ndarray,
    classes: np.ndarray,
    fraction: float,
    random: np.random.RandomState,
    name: str,
) -> np.ndarray:
    """Whole groups, in an order drawn at random, each of which brings every class nearer to its
    share; at least one, and not all.

    groups: of each example   classes: of each example, from 0   name: of the data, for errors
    out: whether an example is held out
    """
    known, of_group = np.unique(groups, return_inverse=True)
    if len(known) < 2:
        raise DataError(
            f"{name}: all {len(groups)} examples are of one recording or person, of which "
            "none can be held out; give more"
        )
    counts = np.zeros((len(known), classes.max() + 1))
    np.add.at(counts, (of_group, classes), 1)
    taken: list[int] = []
    left = fraction * counts.sum(0)
    order = random.permutation(len(known))
    for group in order:
        if ((left - counts[group]) ** 2).sum() < (left**2).sum() and len(taken) < len(known) - 1:
            taken.append(group)
            left = left - counts[group]
    if not taken:  # all are larger than what is wanted
        taken = [min(order, key=lambda group: counts[group].sum())]
    return np.isin(of_group, taken)
