"""Spaces and architectures that several tests are about."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch

from kwsearch.micronas.space import (
    KERNELS,
    Architecture,
    FusionCell,
    FusionPlace,
    Key,
    Space,
    TimeCell,
    TimePlace,
)

UCI_HAR = Space(128, 9, 6)
SKODA_R = Space(64, 30, 10)
# One time cell, one reducing and one plain fusion cell, two widths each.
TINY = Space(6, 3, 2, (2, 4), (4, 8), plain_cells=1)


def alike(
    space: Space,
    kernel: int,
    channels: int,
    bottleneck: int,
    width: int,
    branches: tuple[int, ...],
    residual: bool,
    keep: bool = True,
) -> Architecture:
    """The same choices in every cell."""
    time = sum(isinstance(place, TimePlace) for place in space.cells)
    fusion = [place for place in space.cells if isinstance(place, FusionPlace)]
    return Architecture(
        (TimeCell(kernel, channels),) * time,
        tuple(
            FusionCell(bottleneck, width, branches, residual, keep or place.reducing)
            for place in fusion
        ),
    )


def published(space: Space) -> dict[str, Architecture]:
    """The architectures of the table of measurements, section 3.5."""
    found = {
        "min": alike(space, 3, 4, 8, 8, (3,), False, keep=False),
        "middle": alike(space, 5, 8, 32, 32, (5,), True),
        "max": alike(space, 7, 16, 64, 64, KERNELS, True),
    }
    if space == UCI_HAR:
        found["wide"] = alike(space, 3, 16, 16, 24, (3, 5), False)
    return found


def every(
    space: Space, mixture: Mapping[str, torch.Tensor]
) -> Iterator[tuple[float, dict[str, int]]]:
    """Chance and options of all that have a chance."""
    ways = [
        [(float(p), option) for p, option in zip(mixture[one.name], one.options, strict=True) if p]
        for one in space.decisions
    ]
    for way in itertools.product(*ways):
        chance = 1.0
        for p, _ in way:
            chance *= p
        names = (one.name for one in space.decisions)
        yield chance, dict(zip(names, (option for _, option in way), strict=True))


def some_cycles(keys: frozenset[Key]) -> dict[Key, int]:
    """A table without any regularity."""
    return {key: 1000 + 7919 * i % 5000 for i, key in enumerate(sorted(keys))}


def random_mixture(space: Space, seed: int) -> dict[str, torch.Tensor]:
    """Probabilities of no regularity, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        one.name: torch.softmax(
            torch.randn(len(one.options), generator=generator, dtype=torch.float64), 0
        )
        for one in space.decisions
    }
