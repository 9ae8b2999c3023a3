"""IDX files, the format of MNIST: big-endian header, then unsigned bytes; plain or gzipped.

The header is 0, 0, 8 (unsigned byte), the number of dimensions, then each as a 32-bit integer.
Format: the end of http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split

_PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}
_GZIP_MAGIC = b"\x1f\x8b"
LOOKED_FOR = "{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] (MNIST's IDX files)"


def holds(folder: Path) -> bool:
    """Whether any of the four files is there."""
    return any(
        path.is_file()
        for split in _PREFIX
        for path in _image_files(folder, split) + _label_files(folder, split)
    )


def read(folder: Path, split: Split) -> Images:
    """One split. The classes are as many as the labels of both splits need."""
    image_file = _present(_image_files(folder, split))
    label_file = _present(_label_files(folder, split))
    x, y = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(x) != len(y):
        raise DataError(
            f"{image_file} has {len(x)} images but {label_file} has {len(y)} labels; "
            "allowed one label per image; try another copy of both"
        )
    labels = [y]
    for other in _PREFIX:
        if other != split:
            labels += [read_idx(path, 1) for path in _label_files(folder, other) if path.is_file()]
    return Images(
        x=torch.from_numpy(x[:, None]),
        y=torch.from_numpy(y.astype(np.int64)),
        num_classes=1 + max(int(each.max(initial=0)) for each in labels),
        name=folder.resolve().name,
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The file's array of `ndim` dimensions, uint8."""
    content = path.read_bytes()
    # By content: a browser may have unpacked the file and left its name.
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: the gzip data is damaged ({error}); try another copy of the file"
            ) from None
    magic, header = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if content[:4] != magic:
        raise DataError(
            f"{path}: not an IDX file of {ndim} {'dimension' if ndim == 1 else 'dimensions'}: "
            f"starts with {content[:4].hex(' ') or 'nothing'}; "
            f"allowed {magic.hex(' ')} (unsigned bytes); try another copy of the file"
        )
    if len(content) < header:
        raise DataError(
            f"{path}: {len(content)} bytes, but the header alone is {header}; "
            "try another copy of the file"
        )
    shape = struct.unpack(f">{ndim}I", content[4:header])
    size = math.prod(shape)
    if len(content) != header + size:
        raise DataError(
            f"{path}: {len(content):,} bytes, but its header ({'x'.join(map(str, shape))}) "
            f"needs {header + size:,}; try another copy of the file"
        )
    array: np.ndarray = np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
    return array


def _image_files(folder: Path, split: Split) -> list[Path]:
    return _spellings(folder, f"{_PREFIX[split]}-images", "idx3-ubyte")


def _label_files(folder: Path, split: Split) -> list[Path]:
    return _spellings(folder, f"{_PREFIX[split]}-labels", "idx1-ubyte")


def _spellings(folder: Path, stem: str, ending: str) -> list[Path]:
    return [folder / f"{stem}{dot}{ending}{gz}" for dot in "-." for gz in ("", ".gz")]


def _present(paths: list[Path]) -> Path:
    for path in paths:
        if path.is_file():
            return path
    raise DataError(
        f"{paths[0].parent}: a file is missing; looked for "
        f"{', '.join(path.name for path in paths)}; try another copy of the data set"
    )
