"""Timing many things on one machine that is not always as fast: interleaved, against an anchor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kwsearch.terminal import talk_to_stderr
from kwsearch.timing import clock_of, quartiles, turns

ROUNDS = 7
# Rounds that take longer than this many seconds are enough sooner.
_LONG, _FEW = 2.0, 4
# Quartiles further apart than this part of the median are measured in more rounds.
_SPREAD, MORE = 0.15, 14
_ANCHORS = 5
_PRODUCTS, _COPIES, _CALLS = 12, 2, 400


class Timed(Protocol):
    """What can be timed."""

    def seconds(self) -> float:
        """Of one round."""


@dataclass(frozen=True)
class Times:
    """Quartiles of seconds, each as if the anchor had taken its median; and that median."""

    first: float
    median: float
    third: float
    rounds: int
    anchor: float

    def in_ns(self) -> tuple[int, int, int, int, int]:
        """First quartile, median, third quartile, rounds, anchor."""
        first, median, third = (round(1e9 * s) for s in (self.first, self.median, self.third))
        return first, median, third, self.rounds, round(1e9 * self.anchor)


@dataclass
class Anchor:
    """A fixed piece of work, by which it shows how fast the machine is: products, which compute,
    copies, which wait for memory that others may be using, too, and calls that do next to nothing,
    of which small layers are made. Each takes about a third of it.

    The best of a few in a row: how fast it is should not depend on what was in the caches.
    """

    device: str = "cpu"
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clock = clock_of(self.device)
        self._a = torch.ones(192, 192, device=self.device)
        self._x = torch.ones(2**22, device=self.device)
        self._copy = torch.empty_like(self._x)
        self._small = torch.ones(8, device=self.device)

    def run(self) -> float:
        """Once more. Returns its seconds."""
        took = []
        for _ in range(_ANCHORS):
            begun = self._clock()
            for _ in range(_PRODUCTS):
                self._a @ self._a
            for _ in range(_COPIES):
                self._copy.copy_(self._x)
            for _ in range(_CALLS):
                self._small.add_(0.0)
            took.append(self._clock() - begun)
        self.times.append(min(took))
        return self.times[-1]


def measure(making: Sequence[Callable[[], Timed]], device: str = "cpu") -> list[Times]:
    """Time what these make, side by side: each once in every round, after one that warms up.

    Seconds are divided by what the anchor took just before: so a machine that slows down changes
    both, and not what is found.
    """
    with talk_to_stderr():
        return _measured(making, device)


def _measured(making: Sequence[Callable[[], Timed]], device: str) -> list[Times]:
    anchor = Anchor(device)
    timed = [make() for make in making]
    for one in timed:
        one.seconds()
    names = list(map(str, range(len(timed))))
    found: list[list[float]] = [[] for _ in timed]
    chosen = set(names)
    begun = time.perf_counter()
    for round_ in range(ROUNDS + MORE):
        if round_ >= _FEW and time.perf_counter() - begun > _LONG * round_:
            break
        if round_ >= ROUNDS:
            chosen = {name for name in chosen if _scattered(found[int(name)])}
            if not chosen:
                break
        pace = anchor.run()
        for name in turns(names, round_):
            if name in chosen:
                found[int(name)].append(timed[int(name)].seconds() / pace)
    usual = quartiles(anchor.times)[1]
    return [_times(paces, usual) for paces in found]


def _times(paces: Sequence[float], usual: float) -> Times:
    first, median, third = (usual * pace for pace in quartiles(paces))
    return Times(first, median, third, len(paces), usual)


def _scattered(paces: Sequence[float]) -> bool:
    first, median, third = quartiles(paces)
    return third - first > _SPREAD * median
