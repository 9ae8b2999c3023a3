"""UCI-HAR's folder: a phone at the waist, in windows of 128 samples at 50 Hz, as text.

A window's 9 sensors are, in this order, the acceleration without gravity (body_acc, g), the
angular velocity (body_gyro, rad/s) and the acceleration (total_acc, g), each along x, y and z. A
file holds one of them, a line for each window; y_train.txt has the windows' classes, from 1, and
subject_train.txt, if it is there, who did them: windows overlap by half, so that some of the same
person in two parts would be known again. Format: README.txt of
https://archive.ics.uci.edu/dataset/240.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Split
from kwsearch.data.series import Series, fitted, numbers

SENSORS = tuple(
    f"{signal}_{axis}" for signal in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"
)
SAMPLES = 128
LOOKED_FOR = "{train,test}/Inertial Signals/*.txt and activity_labels.txt (UCI-HAR)"
_CHILD = "UCI HAR Dataset"  # what the archive unpacks to
_SIGNALS = "Inertial Signals"


def holds(root: Path) -> bool:
    """Whether there is a folder of signals, here or in the folder that the archive has."""
    return any(
        (place / split / _SIGNALS).is_dir()
        for place in (root, root / _CHILD)
        for split in ("train", "test")
    )


def read(root: Path, split: Split, size: tuple[int, int] | None = None) -> Series:
    """One split. size: (samples, sensors), 128 or more and 9; windows are padded with zeros."""
    inner = root / _CHILD
    place = inner if holds(inner) else root
    classes = _classes(place / "activity_labels.txt")
    label_file = place / split / f"y_{split}.txt"
    labels = _labels(label_file, len(classes))
    signals = []
    for sensor in SENSORS:
        path = place / split / _SIGNALS / f"{sensor}_{split}.txt"
        signals.append(_signal(path))
        if len(signals[-1]) != len(labels):
            raise DataError(
                f"{path} has {len(signals[-1])} windows but {label_file} has {len(labels)} labels; "
                "allowed one label per window; try unpacking the archive again"
            )
    name = root.resolve().name
    people = place / split / f"subject_{split}.txt"
    return Series(
        x=fitted(np.stack(signals, axis=2), size, name),
        y=torch.tensor(labels),
        num_classes=len(classes),
        name=name,
        classes=classes,
        groups=_people(people, len(labels)) if people.is_file() else None,
    )


def _people(path: Path, count: int) -> torch.Tensor:
    """Whose window it is, for each."""
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip().isdecimal():
            raise DataError(f"{path}:{number}: {line.strip()!r}; allowed the number of a person")
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines)} lines for {count} windows; allowed one of each")
    return torch.tensor([int(line) for line in lines])


def _classes(path: Path) -> tuple[str, ...]:
    names = []
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if len(words) != 2 or words[0] != str(number):
            raise DataError(
                f"{path}:{number}: {line!r}; allowed the number of a class, here {number}, and "
                "its name"
            )
        names.append(words[1])
    return tuple(names)


def _labels(path: Path, num_classes: int) -> list[int]:
    """From 0."""
    allowed = {str(i + 1): i for i in range(num_classes)}
    labels = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip() not in allowed:
            raise DataError(
                f"{path}:{number}: class {line.strip()!r}; allowed 1 to {num_classes}, the lines "
                "of activity_labels.txt"
            )
        labels.append(allowed[line.strip()])
    return labels


def _signal(path: Path) -> np.ndarray:
    """out: (N, 128) float32"""
    rows = []
    for number, line in enumerate(_lines(path), 1):
        tokens = line.split()
        if len(tokens) != SAMPLES:
            raise DataError(
                f"{path}:{number}: {len(tokens)} numbers; allowed {SAMPLES}, a window; "
                "try unpacking the archive again"
            )
        rows.append(numbers(f"{path}:{number}", tokens))
    return np.stack(rows)


def _lines(path: Path) -> list[str]:
    """At least one."""
    if not path.is_file():
        raise DataError(
            f"{path}: missing; looked for {LOOKED_FOR}; try unpacking the archive again"
        )
    return path.read_text("utf-8", errors="replace").rstrip().split("\n")
