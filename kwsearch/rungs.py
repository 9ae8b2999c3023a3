"""Rungs: how far every trial is trained before it must be among the better ones.

Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): a trial that reaches a rung
pauses there; it goes on as soon as it is in the top 1/eta of those that have reached it, be it
that others come later. Trials are never compared at different rungs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Rung(NamedTuple):
    """A stop. epochs: of the phase. step: the same, counted over all phases.

    subset, resolution: of the images, None for the proxy's own.
    """

    epochs: int
    step: int
    subset: int | None = None
    resolution: int | None = None

    @property
    def fidelity(self) -> tuple[int | None, int | None]:
        """What training goes on under; a change of it starts training anew."""
        return self.subset, self.resolution


class Phase(NamedTuple):
    """Rungs of one fidelity: one training with one schedule. first: steps before it."""

    first: int
    epochs: int
    subset: int | None
    resolution: int | None


def geometric(epochs: int, eta: int, least: int) -> list[int]:
    """The epochs of the rungs: `epochs` and its parts by powers of eta, none under `least`."""
    found = [epochs]
    while found[0] // eta >= max(least, 1):
        found.insert(0, found[0] // eta)
    return found


def as_rungs(stops: Sequence[tuple[int, int | None, int | None]]) -> tuple[Rung, ...]:
    """(epochs, subset, resolution) of each stop, in the order of training."""
    rungs: list[Rung] = []
    first = 0
    for epochs, subset, resolution in stops:
        if rungs and rungs[-1].fidelity != (subset, resolution):
            first = rungs[-1].step
        rungs.append(Rung(epochs, first + epochs, subset, resolution))
    return tuple(rungs)


def phase_of(rungs: Sequence[Rung], index: int) -> Phase:
    """The phase that a rung is in: from where its fidelity begins to where it ends."""
    mine = rungs[index]
    start = mine.step - mine.epochs
    last = [rung for rung in rungs if rung.step - rung.epochs == start][-1]
    return Phase(start, last.epochs, mine.subset, mine.resolution)


def promotable(values: Mapping[int, float], promoted: frozenset[int], eta: int) -> list[int]:
    """Trials that may go on from a rung, the best first.

    values: by trial, of all that reached the rung. promoted: those that went on already.
    Ties go to the earlier trial.
    """
    order = sorted(values, key=lambda number: (-values[number], number))
    best = order[: len(order) // eta]
    return [number for number in best if number not in promoted]


def trusted(rungs: Sequence[Rung], taus: Mapping[int, float | None], least: float) -> list[bool]:
    """Whether each rung but the last may stop trials: its rank correlation is known and enough.

    taus: Kendall's tau between accuracies at a rung (by its step) and at the last.
    """
    found = [taus.get(rung.step) for rung in rungs[:-1]]
    return [tau is not None and tau >= least for tau in found]


def check(stops: Sequence[tuple[int, int | None, int | None]], epochs: int) -> str | None:
    """What is wrong with the stops of a recipe whose full trial has `epochs`; None if nothing."""
    *_, last = stops
    if last != (epochs, None, None):
        return f"the last rung must be the full trial: {epochs} epochs on all of the proxy's images"
    for before, after in itertools.pairwise(stops):
        if before[1:] == after[1:] and before[0] >= after[0]:
            return f"epochs must grow from rung to rung: {before[0]} before {after[0]}"
    return None
