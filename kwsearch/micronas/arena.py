"""Where the tensors of a network stand in one arena of bytes.

Each takes a whole number of 16 bytes from an offset, from the operator that writes it to the last
that reads it; two that are there at once do not overlap. No arena is smaller than what is there at
once. TensorFlow Lite Micro's greedy planner places the largest first, each at the lowest free
offset, and may need much more; `packed` looks for an order of placing that needs less, and mostly
comes to the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

ALIGNMENT = 16
# Orders that are looked at after the usual ones.
_TRIES = 2000


@dataclass(frozen=True)
class Life:
    """Of a tensor: its bytes, and the first and the last operator that it is there for."""

    nbytes: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """What it takes in an arena."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Life) -> bool:
        """Whether both are there at once."""
        return self.first <= other.last and other.first <= self.last


def live(lives: Sequence[Life]) -> int:
    """The largest sum of bytes that are there at once."""
    return _most(lives, [one.nbytes for one in lives])


def greedy(lives: Sequence[Life]) -> list[int]:
    """Offsets as TensorFlow Lite Micro's planner has them."""
    return _first_fit(lives, _largest_first(lives))


def packed(lives: Sequence[Life]) -> list[int]:
    """Offsets of the smallest arena that is found, always the same; at most the greedy one's."""
    least = _most(lives, [one.size for one in lives])
    orders = [_largest_first(lives)] + [
        sorted(range(len(lives)), key=key)
        for key in (
            lambda i: -lives[i].size * (lives[i].last - lives[i].first + 1),
            lambda i: (lives[i].first - lives[i].last, -lives[i].size),
            lambda i: (lives[i].first, -lives[i].size),
            lambda i: (-lives[i].last, -lives[i].size),
        )
    ]
    order = min(orders, key=lambda one: _height(lives, _first_fit(lives, one)))
    best = _first_fit(lives, order)
    rng = Random(0)
    for _ in range(_TRIES if len(lives) > 1 else 0):
        if _height(lives, best) == least:
            break
        # What stands highest goes before something else.
        top = max(order, key=lambda i: best[i] + lives[i].size)
        other = [i for i in order if i != top]
        other.insert(rng.randrange(len(order)), top)
        if rng.random() < 0.5:
            a, b = rng.sample(range(len(other)), 2)
            other[a], other[b] = other[b], other[a]
        found = _first_fit(lives, other)
        if _height(lives, found) <= _height(lives, best):
            order, best = other, found
    return best


def extent(lives: Sequence[Life], offsets: Sequence[int]) -> int:
    """Bytes of the arena. Raises ValueError for tensors that overlap while both are there."""
    ends = [offset + one.size for one, offset in zip(lives, offsets, strict=True)]
    for i, one in enumerate(lives):
        for j in range(i):
            if one.meets(lives[j]) and offsets[i] < ends[j] and offsets[j] < ends[i]:
                raise ValueError(f"tensors {j} and {i} overlap at {max(offsets[i], offsets[j])}")
    return max(ends, default=0)


def _height(lives: Sequence[Life], offsets: Sequence[int]) -> int:
    """`extent` of offsets that are known to be apart."""
    return max((offset + one.size for one, offset in zip(lives, offsets, strict=True)), default=0)


def _largest_first(lives: Sequence[Life]) -> list[int]:
    return sorted(range(len(lives)), key=lambda i: -lives[i].nbytes)


def _first_fit(lives: Sequence[Life], order: Sequence[int]) -> list[int]:
    """Each in turn at the lowest free offset."""
    offsets = [0] * len(lives)
    done: list[int] = []
    for i in order:
        begin = 0
        for j in sorted(done, key=lambda j: offsets[j]):
            if not lives[i].meets(lives[j]):
                continue
            if begin + lives[i].size <= offsets[j]:
                break
            begin = max(begin, offsets[j] + lives[j].size)
        offsets[i] = begin
        done.append(i)
    return offsets


def _most(lives: Sequence[Life], sizes: Sequence[int]) -> int:
    alive = (
        sum(s for one, s in zip(lives, sizes, strict=True) if one.first <= i <= one.last)
        for i in {one.first for one in lives}  # it only grows where a tensor is written
    )
    return max(alive, default=0)
