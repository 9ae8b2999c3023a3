"""Log-mels of clips on disk, made once on this machine and kept: reading sound takes long."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

CACHE = Path("~/.cache/kwsearch/mels")


def kept(paths: Iterable[Path], settings: object, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives for these files and settings, from disk where it is there already.

    Files are known by place, size and time of change. Where nothing can be written, it is made.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    file = Path(os.path.expanduser(CACHE)) / f"{digest.hexdigest()[:24]}.pt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    except OSError:
        return make()
    try:
        found = _loaded(file)
        return _saved(make(), file) if found is None else found
    finally:
        lock.release()


def _loaded(file: Path) -> Tensor | None:
    try:
        found: Tensor = torch.load(file, weights_only=True)
    except Exception:  # it is not there, or whatever a damaged file makes torch raise
        return None
    return found


def _saved(made: Tensor, file: Path) -> Tensor:
    """The same; on disk whole or not at all."""
    part = file.with_name(f".{secrets.token_hex(8)}.tmp")
    with contextlib.suppress(OSError):
        torch.save(made, part)
        os.replace(part, file)
    part.unlink(missing_ok=True)
    return made
