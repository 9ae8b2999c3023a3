"""CIFAR-10 and CIFAR-100, the binary and the pickled distribution.

A record is 1 label byte (CIFAR-100: coarse, then fine) and 3072 of pixels: red, green and blue
planes of 32x32. Format: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split
from kwsearch.data.unpickle import read_pickle

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """One distribution: its files, and where a record keeps its label."""

    title: str
    num_classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    binary: bool

    @property
    def label_bytes(self) -> int:
        return 1 if self.num_classes == 10 else 2

    @property
    def labels_key(self) -> str:
        return "labels" if self.num_classes == 10 else "fine_labels"

    @property
    def names_key(self) -> str:
        return "label_names" if self.num_classes == 10 else "fine_label_names"

    def files(self, split: Split) -> tuple[str, ...]:
        return self.train if split == "train" else self.test


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout(
        "CIFAR-10, binary",
        10,
        train=tuple(f"{batch}.bin" for batch in _BATCHES),
        test=("test_batch.bin",),
        meta="batches.meta.txt",
        binary=True,
    ),
    Layout("CIFAR-10, pickled", 10, _BATCHES, ("test_batch",), "batches.meta", binary=False),
    Layout(
        "CIFAR-100, binary", 100, ("train.bin",), ("test.bin",), "fine_label_names.txt", binary=True
    ),
    Layout("CIFAR-100, pickled", 100, ("train",), ("test",), "meta", binary=False),
)
LOOKED_FOR = "data_batch_1[.bin] … test_batch[.bin] (CIFAR-10), {train,test}[.bin] (CIFAR-100)"


def holds(folder: Path, num_classes: int) -> bool:
    """Whether CIFAR-`num_classes` is there."""
    layout = find(folder)
    return layout is not None and layout.num_classes == num_classes


def find(folder: Path) -> Layout | None:
    """The distribution that any file in `folder` belongs to."""
    for layout in LAYOUTS:
        if any((folder / name).is_file() for name in layout.train + layout.test):
            return layout
    return None


def read(folder: Path, split: Split, layout: Layout) -> Images:
    names = layout.files(split)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} ({layout.title}): {', '.join(missing)} missing; looked for "
            f"{', '.join(names)}; try unpacking the archive again"
        )
    read_batch = _read_binary if layout.binary else _read_pickled
    batches = [read_batch(folder / name, layout) for name in names]
    return Images(
        x=torch.from_numpy(np.concatenate([x for x, _ in batches]).reshape(-1, 3, 32, 32)),
        y=torch.from_numpy(np.concatenate([y for _, y in batches])),
        num_classes=layout.num_classes,
        name=folder.resolve().name,
        classes=_class_names(folder / layout.meta, layout),
    )


def _read_binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """x: (N, 3072) uint8  y: (N,) int64"""
    content = path.read_bytes()
    record = layout.label_bytes + _PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{path} ({layout.title}): {len(content):,} bytes; allowed a whole number of records "
            f"of {record:,}, at least one; try unpacking the archive again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    y = records[:, layout.label_bytes - 1].astype(np.int64)
    _check_labels(path, y, layout)
    return records[:, layout.label_bytes :], y


def _read_pickled(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """x: (N, 3072) uint8  y: (N,) int64"""
    batch = read_pickle(path)
    x, labels = batch.get("data"), batch.get(layout.labels_key)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != _PIXELS or not len(x):
        found = f"of shape {x.shape}" if isinstance(x, np.ndarray) else _kind(x)
        raise DataError(
            f"{path} ({layout.title}): 'data' is {found}; allowed a uint8 array (N, {_PIXELS})"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(
            f"{path} ({layout.title}): {layout.labels_key!r} is {_kind(labels)}; "
            "allowed a list of whole numbers"
        )
    if len(labels) != len(x):
        raise DataError(
            f"{path} ({layout.title}): {len(x)} images but {len(labels)} labels; "
            "allowed one label per image; try unpacking the archive again"
        )
    _check_labels(path, labels, layout)
    return x, np.array(labels, np.int64)


def _check_labels(path: Path, labels: np.ndarray | list[int], layout: Layout) -> None:
    for label in (min(labels), max(labels)):
        if not 0 <= label < layout.num_classes:
            raise DataError(
                f"{path} ({layout.title}): label {label} is out of range; "
                f"allowed 0..{layout.num_classes - 1}; try unpacking the archive again"
            )


def _class_names(path: Path, layout: Layout) -> tuple[str, ...]:
    """The names that come with the images; () where that file was not kept."""
    if not path.is_file():
        return ()
    if layout.binary:
        return tuple(path.read_text("utf-8", "replace").split())
    names = read_pickle(path).get(layout.names_key)
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{path}: {layout.names_key!r} is {_kind(names)}; allowed a list of names")
    return tuple(
        name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names
    )


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
