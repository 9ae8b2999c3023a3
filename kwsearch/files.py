"""Files that are never half written, here or in object storage, and things that one process at a
time may do.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


class NoSuchPlace(ValueError):
    """Object storage that cannot be reached; the user can mend it."""


def path_of(text: str) -> Path:
    """A path, or of a URL such as s3://bucket/folder what is used like one (`upath.UPath`).

    Raises NoSuchPlace for a URL that nothing here can read.
    """
    if not is_url(text):
        return Path(text)
    try:
        from upath import UPath

        found = UPath(text)
        assert found.fs is not None  # made by the library of its protocol
    except (ImportError, ValueError) as error:
        advice = 'pip install "kwsearch[remote]", and the library of its protocol, such as s3fs'
        raise NoSuchPlace(f"{text}: {error}; {advice}") from None
    return found  # type: ignore[no-any-return]


def is_url(text: str) -> bool:
    """Whether it is one, and no path."""
    return "://" in text


def is_here(path: Path) -> bool:
    """Whether it is a path of this machine, on which files can be renamed and locked."""
    return type(path).__module__.partition(".")[0] == "pathlib"


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
