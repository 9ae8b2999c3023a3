"""UCI-HAR's folder, made by hand; every kind of damage one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kwsearch import data
from kwsearch.data import DataError, Series, loading, uci_har

ORDER = (
    *("body_acc_x", "body_acc_y", "body_acc_z"),
    *("body_gyro_x", "body_gyro_y", "body_gyro_z"),
    *("total_acc_x", "total_acc_y", "total_acc_z"),
)
ACTIVITIES = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")


def value(split: str, window: int, sample: int, sensor: int) -> float:
    """Unlike any other."""
    return (window * 128 + sample) / 64 - sensor - (20 if split == "test" else 0)


def made(root: Path, train: list[int] | None = None, test: list[int] | None = None) -> Path:
    """The classes of the windows of each part, from 1."""
    root.mkdir(parents=True)
    lines = [f"{i} {name}" for i, name in enumerate(ACTIVITIES, 1)]
    (root / "activity_labels.txt").write_text("\n".join(lines) + "\n")
    for split, labels in (("train", train or [5, 1, 6]), ("test", test or [2, 2])):
        signals = root / split / "Inertial Signals"
        signals.mkdir(parents=True)
        (root / split / f"y_{split}.txt").write_text("".join(f"{label}\n" for label in labels))
        for sensor, name in enumerate(ORDER):
            rows = [
                # As published: two spaces and an exponent, or one before a minus.
                "".join(f"{value(split, i, t, sensor):16.7e}" for t in range(128))
                for i in range(len(labels))
            ]
            (signals / f"{name}_{split}.txt").write_text("\n".join(rows) + "\n")
    return root


def refused(source: str | Path, *said: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(source, **options)
    for words in said:
        assert words in str(caught.value)


def test_windows_of_a_person_are_held_out_together(tmp_path: Path) -> None:
    root = made(tmp_path / "har", train=[1, 2] * 10)
    whose = ["7"] * 6 + ["3"] * 4 + ["5"] * 10
    (root / "train" / "subject_train.txt").write_text("\n".join(whose))
    train, held = data.split_holdout(data.load(root), 0.2, seed=0)
    assert held.groups is not None
    assert train.groups is not None
    people = set(held.groups.tolist())
    assert len(people) == 1
    assert people.isdisjoint(train.groups.tolist())
    assert len(held) + len(train) == 20
    for text, said in (
        ("1\n2\n", "2 lines for 20 windows"),
        ("x\n" * 20, "the number of a person"),
    ):
        (root / "train" / "subject_train.txt").write_text(text)
        refused(root, said)


def test_both_parts_are_read(tmp_path: Path) -> None:
    root = made(tmp_path / "har")
    train, test = data.load(root), data.load(root, "test")
    assert isinstance(train, Series)
    assert (train.x.shape, test.x.shape) == ((3, 1, 128, 9), (2, 1, 128, 9))
    assert (train.y.tolist(), test.y.tolist()) == ([4, 0, 5], [1, 1])
    assert (train.num_classes, train.classes, train.name) == (6, ACTIVITIES, "har")
    for split, part in (("train", train), ("test", test)):
        x = [
            [[value(split, i, t, s) for s in range(9)] for t in range(128)]
            for i in range(len(part))
        ]
        # Multiples of 1/64: exact in the files' eight digits and in a float32.
        assert (part.x[:, 0].numpy() == np.array(x)).all()
    assert uci_har.SENSORS == ORDER


def test_the_folder_of_the_archive_is_found_in_another(tmp_path: Path) -> None:
    made(tmp_path / "unpacked" / "UCI HAR Dataset")
    assert data.load(tmp_path / "unpacked").x.shape == (3, 1, 128, 9)


def test_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SYSTEM", tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KWSEARCH_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refused("uci_har", "uci_har: not found on this machine", "Inertial Signals", "dataset/240")
    made(tmp_path / "uci-har")
    assert data.load("uci_har").name == "uci_har"
    made(tmp_path / "UCI HAR Dataset", train=[3])
    found = data.load("uci_har")
    assert (found.y.tolist(), found.num_classes, found.classes) == ([2], 6, ACTIVITIES)


def test_windows_are_padded_or_refused(tmp_path: Path) -> None:
    root = made(tmp_path / "har")
    padded = data.load(root, size=(130, 9)).x
    assert torch.equal(padded[:, :, :128], data.load(root).x)
    assert not padded[:, :, 128:].any()
    for size in ((64, 9), (128, 6)):
        refused(root, "allowed 128 samples or more of 9 sensors, input: [1, 128, 9]", size=size)


@pytest.mark.parametrize(
    "file",
    ["activity_labels.txt", "train/y_train.txt", "train/Inertial Signals/body_gyro_y_train.txt"],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    root = made(tmp_path / "har")
    (root / file).unlink()
    refused(root, f"{root / file}: missing; looked for {{train,test}}/Inertial", "unpacking")


ROW = " ".join(["0"] * 128)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("activity_labels.txt", "", ":1: ''; allowed the number of a class, here 1, and"),
        ("activity_labels.txt", "1 A\n3 B\n", ":2: '3 B'; allowed the number of a class, here 2"),
        ("activity_labels.txt", "1 A B\n", ":1: '1 A B'; allowed"),
        ("activity_labels.txt", "1 A\n2 B\n", "y_train.txt:1: class '5'; allowed 1 to 2, the"),
        ("train/y_train.txt", "1\n0\n1\n", ":2: class '0'; allowed 1 to 6, the lines of activity"),
        ("train/y_train.txt", "1\n\n1\n", ":2: class ''; allowed"),
        ("train/y_train.txt", "1\n2\n", "_x_train.txt has 3 windows but"),
        ("{}", "", ":1: 0 numbers; allowed 128, a window; try unpacking"),
        ("{}", f"{ROW}\n{ROW} 0\n{ROW}\n", ":2: 129 numbers; allowed 128"),
        ("{}", f"{ROW}\n{ROW}\n", "total_acc_z_train.txt has 2 windows but"),
        ("{}", f"{ROW}\n{ROW[:-1]}nan\n", ":2: value 128 is 'nan'; allowed finite numbers"),
        ("{}", f"{ROW}\n\n{ROW}\nx{ROW[1:]}\n", ":2: 0 numbers; allowed 128"),
        ("{}", f"x{ROW[1:]}\n", ":1: value 1 is 'x'; allowed finite numbers; where one is miss"),
        ("{}", f"{ROW[:-1]}1e39\n", ":1: value 128 is '1e39'; allowed finite"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(
    tmp_path: Path, file: str, content: str, said: str
) -> None:
    root = made(tmp_path / "har")
    path = root / file.format("train/Inertial Signals/total_acc_z_train.txt")
    path.write_text(content)
    refused(root, said)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    root = made(tmp_path / "har")
    (root / "train" / "y_train.txt").write_bytes(b"\xff\xfe1")
    refused(root, "y_train.txt:1: class")


def test_a_folder_of_nothing_says_that_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "har").mkdir()
    refused(tmp_path / "har", "{train,test}/Inertial Signals/*.txt and activity_labels.txt")
