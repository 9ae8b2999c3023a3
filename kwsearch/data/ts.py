"""NAME_TRAIN.ts and NAME_TEST.ts, the text files of the UCR and UEA archives of time series.

Tags come first, such as `@classLabel true walking resting`, then `@data`, then a line for each
case: the samples of a sensor between commas, sensors and at last the class between colons. Lines
from # or % are comments. Cases may differ in length and are padded with zeros at their end, to the
longest of both files. Unlike other readers, names of classes keep their case, and missing values
are refused. Format: https://www.timeseriesclassification.com.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError
from kwsearch.data.images import Split
from kwsearch.data.series import Series, fitted, numbers

LOOKED_FOR = "NAME_TRAIN.ts and NAME_TEST.ts (UCR and UEA archives)"
_TRAIN, _TEST = "_TRAIN.ts", "_TEST.ts"


def holds(folder: Path) -> bool:
    """Whether there is a file of either part."""
    return bool(_named(folder, _TRAIN) or _named(folder, _TEST))


def read(path: Path, split: Split, size: tuple[int, int] | None = None) -> Series:
    """One split. path: of the folder, or of NAME_TRAIN.ts.

    A folder of several NAMEs is read if one is its own. size: (samples, sensors) to pad to.
    """
    train_file = _train_file(path)
    stem = train_file.name.removesuffix(_TRAIN)
    test_file = train_file.with_name(stem + _TEST)
    for file in (train_file, test_file):
        if not file.is_file():
            raise DataError(f"{file}: missing; looked for {LOOKED_FOR}, side by side")
    train = _read(train_file)
    test = _read(test_file, train.header)
    chosen = train if split == "train" else test
    longest = max(len(case) for case in (*train.cases, *test.cases))
    x = np.zeros((len(chosen.cases), longest, train.cases[0].shape[1]), np.float32)
    for row, case in zip(x, chosen.cases, strict=True):
        row[: len(case)] = case
    return Series(
        x=fitted(x, size, stem),
        y=torch.tensor(chosen.labels),
        num_classes=len(train.header.classes),
        name=stem,
        classes=train.header.classes,
    )


@dataclass(frozen=True)
class _Header:
    """classes: in their order   sensors, samples: of a case, None where the header does not say

    equal: whether all cases have as many samples.
    """

    classes: tuple[str, ...]
    sensors: int | None
    samples: int | None
    equal: bool


@dataclass(frozen=True)
class _File:
    """cases: (T, S) float32 each, at least one   labels: theirs, from 0"""

    header: _Header
    cases: list[np.ndarray]
    labels: list[int]


@dataclass(frozen=True)
class _Tag:
    where: str
    values: list[str]


def _train_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.name.endswith(_TRAIN):
            raise DataError(f"{path}: not a file of training data; allowed NAME{_TRAIN}")
        return path
    found = _named(path, _TRAIN)
    own = path / f"{path.resolve().name}{_TRAIN}"
    if own in found:
        return own
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        raise DataError(
            f"{path}: {names or f'no NAME{_TRAIN}'}; allowed one file of training data; "
            f"try the path of NAME{_TRAIN}"
        )
    return found[0]


def _named(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{ending}") if path.is_file())


def _read(path: Path, train: _Header | None = None) -> _File:
    """train: of the other part, whose classes and sensors these are."""
    tags: dict[str, _Tag] = {}
    header: _Header | None = None
    cases: list[np.ndarray] = []
    labels: list[int] = []
    lines = path.read_text("utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}:{number}"
        if not line or line.startswith(("#", "%")):
            continue
        if header is not None:
            *fields, label = line.split(":")
            if label.strip() not in header.classes:
                raise DataError(
                    f"{where}: class {label.strip()[:40]!r}; allowed {', '.join(header.classes)}, "
                    "which @classLabel names"
                )
            cases.append(_case(where, fields, header))
            labels.append(header.classes.index(label.strip()))
            header = _completed(header, cases[0])
        elif line.lower() == "@data":
            header = _header(path, tags)
            if train is not None:
                header = replace(header, classes=train.classes, sensors=train.sensors)
        elif line.startswith("@"):
            name, *values = line.split()
            tags[name.lower()] = _Tag(where, values)
        else:
            raise DataError(f"{where}: {line[:40]!r}; allowed tags and comments, before @data")
    if header is None or not cases:
        what = "no @data" if header is None else "no case after @data"
        raise DataError(f"{path}: {what}; allowed a header, @data and a line for each case")
    return _File(header, cases, labels)


def _header(path: Path, tags: dict[str, _Tag]) -> _Header:
    """Raises DataError for data that we do not read."""
    if _is_true(tags, "@timestamps"):
        raise DataError(
            f"{tags['@timestamps'].where}: @timeStamps true; allowed false, samples at equal "
            "steps; try resampling them"
        )
    if not _is_true(tags, "@classlabel"):
        where = tags["@classlabel"].where if "@classlabel" in tags else path
        raise DataError(
            f"{where}: cases without classes; allowed @classLabel true and the classes' names"
        )
    classes = tuple(tags["@classlabel"].values[1:])
    if not classes or len(set(classes)) != len(classes):
        raise DataError(
            f"{tags['@classlabel'].where}: names of classes are {', '.join(classes) or 'missing'}; "
            "allowed @classLabel true and each name once"
        )
    dimensions = "@dimensions" if "@dimensions" in tags else "@dimension"
    return _Header(
        classes=classes,
        sensors=1 if _is_true(tags, "@univariate") else _count(tags, dimensions),
        samples=_count(tags, "@serieslength"),
        equal=_is_true(tags, "@equallength"),
    )


def _completed(header: _Header, first: np.ndarray) -> _Header:
    """With what the first case says, (T, S), where the header says nothing."""
    samples, sensors = first.shape
    return replace(header, sensors=header.sensors or sensors, samples=header.samples or samples)


def _case(where: str, fields: list[str], header: _Header) -> np.ndarray:
    """fields: the samples of each sensor   out: (T, S)"""
    sensors = header.sensors or max(len(fields), 1)
    if len(fields) != sensors:
        raise DataError(
            f"{where}: {len(fields)} sensors; allowed {sensors}, a colon after each, and a class"
        )
    signals = [numbers(f"{where}, sensor {i}", f.split(",")) for i, f in enumerate(fields, 1)]
    samples = (header.equal and header.samples) or len(signals[0])
    for i, signal in enumerate(signals, 1):
        if len(signal) != samples:
            raise DataError(
                f"{where}: sensor {i} has {len(signal)} samples; allowed {samples}, as "
                f"{'every case' if header.equal else 'sensor 1'} has"
            )
    return np.stack(signals, axis=1)


def _is_true(tags: dict[str, _Tag], name: str) -> bool:
    """Whether the tag says so; not if there is none."""
    if name not in tags:
        return False
    tag = tags[name]
    word = tag.values[0].lower() if tag.values else ""
    if word not in ("true", "false"):
        raise DataError(f"{tag.where}: {name} {word or 'without a value'}; allowed true or false")
    return word == "true"


def _count(tags: dict[str, _Tag], name: str) -> int | None:
    """What the tag says; None if there is none."""
    if name not in tags:
        return None
    tag = tags[name]
    said = " ".join(tag.values)
    if not said.isdecimal() or int(said) < 1:
        raise DataError(
            f"{tag.where}: {name} {said or 'without a value'}; allowed a whole number from 1"
        )
    return int(said)
