"""The static numbers of one convolution: what every path takes beside its tensors."""

from __future__ import annotations

from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """kernel: (C_out, C_in / groups, *k). padding: zeros on both sides of each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
