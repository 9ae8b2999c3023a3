"""Convolution with per-sample kernels mixed from a warehouse: one function, several paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from kwlayers.ops.device import device_type, stands
from kwlayers.ops.dispatch import Choice, choose
from kwlayers.ops.geometry import Blocks, ConvGeometry
from kwlayers.ops.lean import kw_conv_lean
from kwlayers.ops.library import choose_for, kw_conv_op
from kwlayers.ops.paths import PATHS, paths_of
from kwlayers.ops.portable import kw_conv_portable
from kwlayers.ops.published import kw_conv_published
from kwlayers.ops.reference import kw_conv_ref
from kwlayers.ops.watched import watched
from kwlayers.ops.workspace import MEBIBYTE

__all__ = [
    "BACKENDS",
    "Choice",
    "ConvGeometry",
    "check_settings",
    "choose",
    "kw_conv",
    "workspace_bytes",
]

# (x, attention, cells, geometry, workspace in bytes)
Backend = Callable[[Tensor, Tensor, Tensor, ConvGeometry, int], Tensor]
WORKSPACE_MB = {"cpu": 16, "cuda": 256}
# Made of torch's own operators, which every compiler knows.
_PLAIN = ("reference", "published", "portable")


def kw_conv(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    backend: str | None = None,
    workspace_mb: float | None = None,
) -> Tensor:
    """Mix one kernel per sample and convolve with it.

    x: (B, C, *S)  attention: (B, m, n)  cells: (n, c_out, c_in, *k)  out: (B, C_out, *S').
    backend: a key of `BACKENDS`, or None for the fastest (`choose`). workspace_mb: MiB for the
    kernels that are mixed at a time, kept between calls; by default 16, on a GPU 256. Under
    autocast the three are cast as for torch's own convolutions. The fast paths have first
    derivatives only, "published", "portable" and "reference" any. Raises ValueError for sizes
    that do not fit, for a backend that does not exist or cannot do the layer, and for cells that
    are a shard (a DTensor) where x is a plain tensor.
    """
    check_settings(backend, workspace_mb)
    _check(x, attention, cells, geometry)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, attention = x.to(dtype), attention.to(dtype)
        with torch.autocast(device, enabled=False):
            return _run(x, attention, cells, geometry, backend, workspace_mb)
    if not x.dtype == attention.dtype == cells.dtype:
        raise ValueError(
            f"x {x.dtype}, attention {attention.dtype}, cells {cells.dtype}: one dtype for all, or "
            "autocast"
        )
    return _run(x, attention, cells, geometry, backend, workspace_mb)


def _run(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    backend: str | None,
    workspace_mb: float | None,
) -> Tensor:
    nbytes = workspace_bytes(x, workspace_mb)
    if x.shape[0] == 0 or (backend is None and watched()):
        backend = "reference" if backend == "reference" else "published"
    compiled = torch.compiler.is_compiling() or (is_fake(x) and not stands())
    if compiled and backend not in _PLAIN:
        return kw_conv_op(x, attention, cells.to(x.dtype), geometry, backend, nbytes)
    if backend is None:
        choice = choose_for(x, cells, geometry)
        if choice.forward != choice.backward:
            paths = paths_of(choice, geometry, tuple(cells.shape[1:]))
            return kw_conv_lean(x, attention, cells, geometry, paths, nbytes)
        backend = choice.forward
    return BACKENDS[backend](x, attention, cells, geometry, nbytes)


def workspace_bytes(x: Tensor, workspace_mb: float | None) -> int:
    """For kernels at a time: as asked, else as x's device has it by default."""
    mebibytes = WORKSPACE_MB.get(device_type(x), 16) if workspace_mb is None else workspace_mb
    return int(mebibytes * MEBIBYTE)


def check_settings(backend: str | None, workspace_mb: float | None) -> None:
    """Raise ValueError for a backend that does not exist, or no workspace."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    if workspace_mb is not None and not workspace_mb > 0:
        raise ValueError(f"workspace_mb {workspace_mb}: it must be above 0")


def _check(x: Tensor, attention: Tensor, cells: Tensor, geometry: ConvGeometry) -> None:
    if hasattr(cells, "placements") and not hasattr(x, "placements"):
        raise ValueError(
            "the cells are a DTensor and x is not: the warehouse was sharded by itself, and "
            "nothing gathers it; give fully_shard the model that holds the warehouses, or a list "
            "of a warehouse and all modules that use it"
        )
    cell = tuple(cells.shape[1:])
    if torch.compiler.is_compiling():
        mixtures = Blocks.of(geometry.kernel, cell).mixtures
    else:
        mixtures = _mixtures(geometry.kernel, cell)
    expected = (x.shape[0], mixtures, cells.shape[0])
    if tuple(attention.shape) != expected:
        raise ValueError(
            f"attention of shape {tuple(attention.shape)}: expected {expected} for {x.shape[0]} "
            f"samples, {mixtures} mixtures in a kernel of {geometry.kernel} and {cells.shape[0]} "
            "cells"
        )


@functools.lru_cache(maxsize=4096)
def _mixtures(kernel: tuple[int, ...], cell: tuple[int, ...]) -> int:
    return Blocks.of(kernel, cell).mixtures


def _plain(
    function: Callable[[Tensor, Tensor, Tensor, ConvGeometry], Tensor],
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    nbytes: int,
) -> Tensor:
    return function(x, attention, cells.to(x.dtype), geometry)


def _fast(
    name: str,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: ConvGeometry,
    nbytes: int,
) -> Tensor:
    paths = paths_of(Choice(name, name), geometry, tuple(cells.shape[1:]))
    return kw_conv_lean(x, attention, cells, geometry, paths, nbytes)


BACKENDS: dict[str, Backend] = {
    "reference": partial(_plain, kw_conv_ref),
    "published": partial(_plain, kw_conv_published),
    **{name: partial(_fast, name) for name in PATHS},
    "portable": partial(_plain, kw_conv_portable),
}
