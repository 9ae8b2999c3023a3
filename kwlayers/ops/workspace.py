"""The reused memory that kernels are mixed into: fresh memory costs more than the mixing."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from kwlayers.ops.device import device_type

MEBIBYTE = 2**20


class Workspace:
    """Scratch tensors out of one buffer per thread and dtype, which is kept between calls.

    nbytes: what a path may use at a time. On a GPU every request goes to torch's caching
    allocator, which reuses memory itself and knows about streams and graphs.
    """

    _kept = threading.local()

    def __init__(self, like: Tensor, nbytes: int) -> None:
        self.like = like
        self.nbytes = nbytes
        self._used = 0
        self._buffer: Tensor | None = None
        if device_type(like) == "cpu":
            kept = self._kept.__dict__.setdefault("buffers", {})
            buffers: dict[torch.dtype, Tensor] = kept.setdefault(like.device, {})
            buffer = buffers.get(like.dtype)
            if buffer is None or buffer.nbytes < nbytes:
                with torch.inference_mode(False):
                    buffer = torch.empty(
                        nbytes // like.element_size(), dtype=like.dtype, device=like.device
                    )
                buffers[like.dtype] = buffer
            self._buffer = buffer

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor, valid until the `mark` before it is released."""
        size = math.prod(shape)
        if self._buffer is None or self._used + size > self._buffer.numel():
            return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)
        found = self._buffer[self._used : self._used + size].view(shape)
        # Whole cache lines of the widest vectors.
        self._used += -(-size // 64) * 64
        return found

    def mark(self) -> int:
        """Where the next tensor will begin: `release` it to give back all after it."""
        return self._used

    def release(self, mark: int) -> None:
        """Give back every tensor taken since `mark`."""
        self._used = mark

    @classmethod
    def kept(cls) -> list[Tensor]:
        """This thread's buffers."""
        by_device = cls._kept.__dict__.get("buffers", {})
        return [buffer for buffers in by_device.values() for buffer in buffers.values()]

    @classmethod
    def clear(cls) -> None:
        """Give this thread's buffers back to the system."""
        cls._kept.__dict__.pop("buffers", None)
