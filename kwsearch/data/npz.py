"""A .npz file of arrays x_train, y_train, x_test, y_test, or x and y; never pickled objects.

x are images. Time series are called series instead: windows (N, samples, sensors) with a label
each, or one recording (samples, sensors) with a label for each sample, from which windows are cut
that overlap by half. A series without parts has every fifth window as test, as images have, and a
recording its last fifth, so that no window is in both. Windows of a recording are held out in runs
of 16, of which only the ends overlap with others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split
from kwsearch.data.series import Series, finite, fitted, windows

_TRY = (
    "try np.savez(path, x_train=…, y_train=…, x_test=…, y_test=…), "
    "of time series with series_train=… and series_test=…"
)
_MAX_CHANNELS = 4
# Windows of a recording that are held out together: so many, or this part of its smallest class.
_RUN, _PART = 16, 10
_IMAGES = ("x", "y", "x_train", "y_train", "x_test", "y_test")
_SERIES = ("series", "series_train", "series_test")


def is_test(index: np.ndarray) -> np.ndarray:
    """The split of data that came without one: images 0, 5, 10, … are test."""
    mask: np.ndarray = index % 5 == 0
    return mask


def read(path: Path, split: Split, size: tuple[int, int] | None = None) -> Images:
    """One split; of plain x and y every fifth image, from the first, is test.

    size: (samples, sensors) of series, which windows are padded to or cut from a recording at.
    """
    arrays = _arrays(path)
    series = [name for name in _SERIES if name in arrays]
    if not series:
        return _images(path, arrays, split)
    beside = [name for name in arrays if name.startswith("x")]
    if beside:
        raise DataError(
            f"{path}: holds {', '.join(series)} and {', '.join(beside)}; allowed series or images, "
            "in a file each"
        )
    return _series(path, arrays, split, size)


def _images(path: Path, arrays: dict[str, np.ndarray], split: Split) -> Images:
    in_parts = "x_train" in arrays or "x_test" in arrays
    ending = f"_{split}" if in_parts else ""
    x, y = _array(path, arrays, f"x{ending}"), _array(path, arrays, f"y{ending}")
    _check_shapes(path, x, y)
    pixels = _as_nchw(path, _as_uint8(path, x))
    labels = _all_labels(path, arrays)
    y = labels[f"y{ending}"]
    if not in_parts:
        part = _part(path, len(y), split)
        pixels, y = pixels[part], y[part]
    return Images(
        x=torch.from_numpy(pixels),
        y=torch.from_numpy(y),
        num_classes=_num_classes(labels),
        name=path.name,
    )


def _series(
    path: Path, arrays: dict[str, np.ndarray], split: Split, size: tuple[int, int] | None
) -> Series:
    in_parts = "series_train" in arrays or "series_test" in arrays
    ending = f"_{split}" if in_parts else ""
    where = f"{path}: series{ending}"
    x = _array(path, arrays, f"series{ending}")
    _array(path, arrays, f"y{ending}")
    labels = _all_labels(path, arrays)
    y = labels[f"y{ending}"]
    if x.ndim not in (2, 3) or 0 in x.shape or x.dtype.kind not in "fiu" or len(x) != len(y):
        raise DataError(
            f"{where} is {x.dtype} of shape {x.shape} with {len(y)} labels; allowed numbers of "
            "shape (N, samples, sensors), or (samples, sensors) of one recording, and as many "
            "labels as the first"
        )
    x, groups = finite(where, x), None
    if x.ndim == 2:
        if size is None:
            raise DataError(
                f"{where} is one recording of {len(x):,} samples; give the samples of a window "
                f"and the sensors, e.g. size=(128, {x.shape[1]})"
            )
        if not in_parts:
            border = len(x) - len(x) // 5
            kept = slice(border, None) if split == "test" else slice(border)
            x, y, where = x[kept], y[kept], f"{where}, its {split} part,"
        x, y = windows(x, y, size[0], max(size[0] // 2, 1), where)
        groups = torch.from_numpy(_runs(y))
    elif not in_parts:
        part = _part(path, len(y), split)
        x, y = x[part], y[part]
    return Series(
        x=fitted(x, size, path.name),
        y=torch.from_numpy(y),
        num_classes=_num_classes(labels),
        name=path.name,
        groups=groups,
    )


def _runs(y: np.ndarray) -> np.ndarray:
    """The run that each window of a recording is in, (N,): all are as long, the last is longer."""
    length = min(_RUN, max(int(np.unique(y, return_counts=True)[1].min()) // _PART, 1))
    runs: np.ndarray = np.minimum(np.arange(len(y)) // length, max(len(y) // length - 1, 0))
    return runs


def _part(path: Path, count: int, split: Split) -> np.ndarray:
    """Which of so many examples are of the split, of which the file says nothing."""
    part: np.ndarray = is_test(np.arange(count)) == (split == "test")
    if not part.any():
        raise DataError(f"{path}: {count} example(s) leave none for {split}; {_TRY}")
    return part


def _num_classes(labels: dict[str, np.ndarray]) -> int:
    return 1 + max(int(each.max(initial=0)) for each in labels.values())


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays of the names we know."""
    known = (*_IMAGES, *_SERIES)
    # Opened here, because np.load leaves some damaged files open.
    with path.open("rb") as file:
        try:
            opened = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever a damaged archive makes zipfile or numpy raise
            raise DataError(f"{path}: not a .npz file ({error}); {_TRY}") from None
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: one array without a name (.npy), not a .npz file; {_TRY}")
        with opened:
            arrays = {name: _member(path, opened, name) for name in known if name in opened.files}
            if not arrays:
                raise DataError(
                    f"{path}: holds {', '.join(opened.files) or 'nothing'}; "
                    f"looked for {', '.join(known)}; {_TRY}"
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
            "try x.astype('uint8') if the values are 0..255; time series are named series, not x"
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


def _all_labels(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: _as_labels(path, arrays[name]) for name in arrays if name.startswith("y")}


def _as_labels(path: Path, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape not in ((y.size,), (y.size, 1)):
        raise DataError(
            f"{path}: labels are {y.dtype} of shape {y.shape}; "
            "allowed whole numbers of shape (N,), the class of each example from 0"
        )
    return y.reshape(-1).astype(np.int64)
