"""A .npz file of arrays x_train, y_train, x_test, y_test, or x and y; never pickled objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split

_TRY = "try np.savez(path, x_train=…, y_train=…, x_test=…, y_test=…)"
_MAX_CHANNELS = 4
_KNOWN = ("x", "y", "x_train", "y_train", "x_test", "y_test")


def is_test(index: np.ndarray) -> np.ndarray:
    """The split of data that came without one: images 0, 5, 10, … are test."""
    mask: np.ndarray = index % 5 == 0
    return mask


def read(path: Path, split: Split) -> Images:
    """One split; of plain x and y every fifth image, from the first, is test."""
    arrays = _arrays(path)
    in_parts = "x_train" in arrays or "x_test" in arrays
    ending = f"_{split}" if in_parts else ""
    x, y = _array(path, arrays, f"x{ending}"), _array(path, arrays, f"y{ending}")
    _check_shapes(path, x, y)
    pixels = _as_nchw(path, _as_uint8(path, x))
    labels = {name: _as_labels(path, arrays[name]) for name in arrays if name.startswith("y")}
    y = labels[f"y{ending}"]
    if not in_parts:
        part = is_test(np.arange(len(y))) == (split == "test")
        if not part.any():
            raise DataError(f"{path}: {len(y)} image(s) leave none for {split}; {_TRY}")
        pixels, y = pixels[part], y[part]
    return Images(
        x=torch.from_numpy(pixels),
        y=torch.from_numpy(y),
        num_classes=1 + max(int(each.max(initial=0)) for each in labels.values()),
        name=path.name,
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays of the six names we know."""
    # Opened here, because np.load leaves some damaged files open.
    with path.open("rb") as file:
        try:
            opened = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever a damaged archive makes zipfile or numpy raise
            raise DataError(f"{path}: not a .npz file ({error}); {_TRY}") from None
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: one array without a name (.npy), not a .npz file; {_TRY}")
        with opened:
            arrays = {name: _member(path, opened, name) for name in _KNOWN if name in opened.files}
            if not arrays:
                raise DataError(
                    f"{path}: holds {', '.join(opened.files) or 'nothing'}; "
                    f"looked for {', '.join(_KNOWN)}; {_TRY}"
                )
            return arrays


def _member(path: Path, opened: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        array = opened[name]
    except Exception as error:  # object arrays, and damage as above
        raise DataError(f"{path}: cannot read array {name!r} ({error}); {_TRY}") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {name!r} is not an array; {_TRY}")
    return array


def _array(path: Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise DataError(f"{path}: no array {name!r} beside {', '.join(arrays)}; {_TRY}")
    return arrays[name]


def _check_shapes(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim not in (3, 4):
        raise DataError(
            f"{path}: images of shape {x.shape}; allowed (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    if y.ndim not in (1, 2) or len(y) != len(x):
        raise DataError(
            f"{path}: {len(x)} images but labels of shape {y.shape}; allowed one label per image"
        )


def _as_uint8(path: Path, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise DataError(
            f"{path}: images of dtype {x.dtype}; allowed uint8, or float in 0..1; "
            "try x.astype('uint8') if the values are 0..255"
        )
    low, high = (x.min(), x.max()) if x.size else (0, 0)
    if not (low >= 0 and high <= 1):  # false for nan too
        raise DataError(
            f"{path}: float images from {low:g} to {high:g}; allowed 0..1; "
            "try x.astype('uint8') if the values are 0..255"
        )
    scaled: np.ndarray = np.rint(x * 255.0).astype(np.uint8)
    return scaled


def _as_nchw(path: Path, x: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, C, H, W); C is the axis of at most 4."""
    if x.ndim == 3:
        return np.ascontiguousarray(x[:, None])
    first, last = x.shape[1] <= _MAX_CHANNELS, x.shape[3] <= _MAX_CHANNELS
    if first == last:
        raise DataError(
            f"{path}: cannot tell the channels in images of shape {x.shape}; allowed exactly one "
            f"of the second and the last axis with at most {_MAX_CHANNELS}; "
            "for grey images try (N, H, W)"
        )
    return np.ascontiguousarray(x if first else x.transpose(0, 3, 1, 2))


def _as_labels(path: Path, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape not in ((len(y),), (len(y), 1)):
        raise DataError(
            f"{path}: labels are {y.dtype} of shape {y.shape}; "
            "allowed whole numbers of shape (N,), the class of each image from 0"
        )
    return y.reshape(-1).astype(np.int64)
