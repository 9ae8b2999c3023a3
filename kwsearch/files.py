"""Files that are never half written, and things that one process at a time may do."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write all of `text` or nothing. Follows a link. Raises OSError."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone(lock: Path, otherwise: Exception) -> Iterator[None]:
    """Hold a lock, a file that stays, or raise `otherwise` where another process holds it."""
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise otherwise from None
    try:
        yield
    finally:
        held.release()
