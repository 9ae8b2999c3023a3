"""Which device a tensor stands for: steps without data are counted as if they ran on another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

Turn = TypeVar("Turn")

_meant: str | None = None


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Within it every tensor counts as one on `device` ("cpu" or "cuda"): paths and workspace are
    those of that device, and Triton kernels are not launched. For all threads.
    """
    global _meant
    before, _meant = _meant, device
    try:
        yield
    finally:
        _meant = before


def stands() -> bool:
    """Whether tensors stand for others, without data."""
    return _meant is not None


def turns(sequence: Sequence[Turn]) -> Sequence[Turn]:
    """The turns of a loop that allocates the same in each: without data the ends will do."""
    return [sequence[0], sequence[-1]] if stands() and len(sequence) > 2 else sequence


def device_type(x: Tensor) -> str:
    """cpu, cuda, …: where x is, or is meant to be."""
    return x.device.type if _meant is None else _meant
