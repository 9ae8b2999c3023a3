"""A training run's state in a file: written all or nothing, read without running its code."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from kwsearch.files import is_here


class CheckpointError(ValueError):
    """The file is a checkpoint of something else."""


def save(path: Path, key: str, state: dict[str, Any]) -> None:
    """Replace `path` by `state` under `key`, which says whose state it is. Raises OSError.

    path: as `kwsearch.files.path_of` makes it.
    """
    buffer = io.BytesIO()  # torch.save to the file itself turns a full disk into a RuntimeError
    torch.save({"key": key, **state}, buffer)
    if not is_here(path):  # an object is there as a whole or not at all
        path.write_bytes(buffer.getvalue())
        return
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path, key: str) -> dict[str, Any] | None:
    """The state that `save` wrote under `key`, its tensors on the CPU.

    None if there is no such file, or one that torch cannot make sense of: what a broken disk has
    left is worth nothing, so the run starts afresh and overwrites it. Raises CheckpointError if
    the file is readable and not of `key`, and OSError if it may not be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # of many kinds: it depends on where the file was torn
        return None
    if not isinstance(state, dict) or state.get("key") != key:
        raise CheckpointError(
            f"{path} is not a checkpoint of this network, plan, seed and proxy: delete it, or "
            "name another file"
        )
    return state
