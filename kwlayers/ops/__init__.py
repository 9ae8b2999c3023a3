"""Convolution with per-sample kernels mixed from a warehouse: one function, several paths."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.published import kw_conv_published
from kwlayers.ops.reference import kw_conv_ref

__all__ = ["BACKENDS", "ConvGeometry", "kw_conv", "path"]

Path = Callable[[Tensor, Tensor, Tensor, ConvGeometry], Tensor]

BACKENDS: dict[str, Path] = {"reference": kw_conv_ref, "published": kw_conv_published}


def kw_conv(
    x: Tensor, attention: Tensor, cells: Tensor, geometry: ConvGeometry, backend: str | None = None
) -> Tensor:
    """Mix one kernel per sample and convolve with it.

    x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S').
    backend: a key of `BACKENDS`, or None for the best known.
    """
    return path(backend)(x, attention, cells, geometry)


def path(backend: str | None) -> Path:
    """The function of a backend. Raises ValueError for one that does not exist."""
    if backend is None:
        backend = "published"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    return BACKENDS[backend]
