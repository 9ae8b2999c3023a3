"""Images in object storage: brought to this machine once."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from kwsearch.data.errors import DataError
from kwsearch.files import NoSuchPlace, path_of
from kwsearch.wording import one_line

CACHE = Path("~/.cache/kwsearch/remote")


def fetched(url: str) -> Path:
    """A copy of the file or folder at `url`, made where there is none of what it holds now.

    Raises DataError.
    """
    try:
        there: Any = path_of(url)
        sizes = _sizes(there)
        if not sizes:
            raise DataError(f"{url}: no such file or folder")
        known = hashlib.sha256(f"{url} {sorted(sizes.items())}".encode()).hexdigest()[:24]
        folder = Path(os.path.expanduser(CACHE)) / known
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                part = folder.with_name(f".{secrets.token_hex(8)}.tmp")
                part.mkdir()
                try:
                    there.fs.get(there.path, str(part / there.name), recursive=True)
                    os.replace(part, folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except NoSuchPlace as error:
        raise DataError(str(error)) from None
    except DataError:
        raise
    except Exception as error:  # of many libraries
        raise DataError(f"{url}: cannot be read: {one_line(error)}") from None
    return folder / str(there.name)


def _sizes(there: Any) -> dict[str, Any]:
    """Of all files at a place: what tells whether they have changed."""
    found = there.fs.find(there.path, detail=True)
    told = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
    return {
        name: [str(info[key]) for key in told if info.get(key) is not None]
        for name, info in found.items()
    }
