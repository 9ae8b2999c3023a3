"""Probabilities of all decisions of a space: one architecture, or a mixture of them.

The search relaxes each decision to a softmax of its logits with Gumbel noise (Jang et al., arXiv
1611.01144), never rounded. Supernet, latency and memory read the same probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kwsearch.micronas.space import KERNELS, Architecture, Space, SpaceError

# By the name of a decision: (its options,), adding up to 1.
Mixture = Mapping[str, Tensor]

_RESIDUAL = ".residual"


def one_hot(space: Space, architecture: Architecture) -> dict[str, Tensor]:
    """All of it on one architecture."""
    chosen = space.options(architecture)
    found = {}
    for one in space.decisions:
        found[one.name] = torch.zeros(len(one.options), dtype=torch.float64)
        found[one.name][one.options.index(chosen[one.name])] = 1
    return found


def equal(space: Space) -> dict[str, Tensor]:
    """All options of a decision alike."""
    counts = {one.name: len(one.options) for one in space.decisions}
    return {name: torch.full((n,), 1 / n, dtype=torch.float64) for name, n in counts.items()}


def softmax(logits: Mixture) -> dict[str, Tensor]:
    """Without noise, at temperature 1."""
    return {name: torch.softmax(one, -1) for name, one in logits.items()}


def gumbel_softmax(logits: Mixture, temperature: float) -> dict[str, Tensor]:
    """With noise of torch's random state; fusion cells have an output (`with_output`)."""
    drawn = {name: F.gumbel_softmax(one, temperature, dim=-1) for name, one in logits.items()}
    return with_output(drawn)


def with_output(mixture: Mixture) -> dict[str, Tensor]:
    """The same, but that a fusion cell has the residual where it has no branch.

    The residual's r becomes r + (1 - r) (1 - p1) (1 - p2) (1 - p3), p_k of the branches. Drawn by
    themselves, as published, all of them may be off: such a cell costs nothing, gives nothing and
    is no architecture, and limits would drive the search there.
    """
    found = dict(mixture)
    for name in mixture:
        if name.endswith(_RESIDUAL):
            cell = name.removesuffix(_RESIDUAL)
            bare = torch.stack([mixture[f"{cell}.branch{k}"][0] for k in KERNELS]).prod()
            off = mixture[name][0] * (1 - bare)
            found[name] = torch.stack([off, 1 - off])
    return found


def as_double(space: Space, mixture: Mixture) -> dict[str, Tensor]:
    """In float64, for costs. Raises SpaceError for one that is none of the space."""
    for one in space.decisions:
        shape = tuple(mixture[one.name].shape) if one.name in mixture else None
        if shape != (len(one.options),):
            had = "missing" if shape is None else f"of shape {shape}"
            raise SpaceError(f"{one.name}: {had}: must be of shape ({len(one.options)},)")
    return {one.name: mixture[one.name].double() for one in space.decisions}


def of_cell(mixture: Mixture, cell: str) -> dict[str, Tensor]:
    """That of one cell, by names without the cell's."""
    start = f"{cell}."
    return {name[len(start) :]: one for name, one in mixture.items() if name.startswith(start)}
