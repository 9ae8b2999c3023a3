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
    """Whole groups, in an order drawn at random, each of which brings the classes nearer to their
    shares; at least one, and not all. What only they have of a class stays to train on.

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
    held = np.zeros_like(counts[0])
    wanted, every = fraction * counts.sum(0), counts.sum(0)
    taken: list[int] = []

    def away(group: int) -> float:
        """What is still wanted after it."""
        return float(((wanted - held - counts[group]) ** 2).sum())

    order = random.permutation(len(known)).tolist()
    for group in order:
        leaves = ((every > held + counts[group]) | (every == 0)).all()
        if leaves and len(taken) < len(known) - 1 and away(group) < ((wanted - held) ** 2).sum():
            taken.append(group)
            held = held + counts[group]
    return np.isin(of_group, taken or [min(order, key=away)])  # all are larger than what is wanted
