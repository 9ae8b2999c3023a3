"""The archives' .ts files: by hand, as aeon reads them, every kind of damage with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kwsearch import data
from kwsearch.data import DataError, Series

HEADER = """\
# Made by hand: @data is not yet here.
@problemName Two
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength {equal}
@classLabel true Walk rest run
@data
"""
TRAIN = "1,2,3:-4,5e-1,6:rest\n7,8,9:10,11,12:Walk\n"
TEST = "0,0,1 : 0,1,0 : run\n"


def made(
    folder: Path, train: str | None = None, test: str | None = None, name: str = "Two"
) -> Path:
    folder.mkdir(exist_ok=True)
    header = HEADER.format(equal="true")
    (folder / f"{name}_TRAIN.ts").write_text(header + TRAIN if train is None else train)
    (folder / f"{name}_TEST.ts").write_text(header + TEST if test is None else test)
    return folder


def refused(source: Path, *said: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(source, **options)
    for words in said:
        assert words in str(caught.value)


def test_both_parts_are_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine")
    train, test = data.load(folder), data.load(folder / "Two_TRAIN.ts", "test")
    assert isinstance(train, Series)
    assert train.x.tolist() == [
        [[[1, -4], [2, 0.5], [3, 6]]],
        [[[7, 10], [8, 11], [9, 12]]],
    ]
    assert test.x.tolist() == [[[[0, 0], [0, 1], [1, 0]]]]
    assert (train.y.tolist(), test.y.tolist()) == ([1, 0], [2])
    assert (train.num_classes, train.classes, train.name) == (3, ("Walk", "rest", "run"), "Two")


def test_shorter_cases_are_padded_to_the_longest_of_both_files(tmp_path: Path) -> None:
    header = HEADER.format(equal="false")
    folder = made(
        tmp_path / "mine", header + "1,2:3,4:run\n5:6:run\n", header + "7,7,7,7:8,8,8,8:rest"
    )
    train = data.load(folder)
    assert train.x[:, 0].tolist() == [
        [[1, 3], [2, 4], [0, 0], [0, 0]],
        [[5, 6], [0, 0], [0, 0], [0, 0]],
    ]
    assert data.load(folder, size=(5, 2)).x.shape == (2, 1, 5, 2)
    refused(folder, "Two: windows of 4 samples of 2 sensors do not fit 3x2", size=(3, 2))
    refused(folder, "allowed 4 samples or more of 2 sensors, input: [1, 4, 2]", size=(4, 9))


def test_headers_may_be_short_and_oddly_spelled(tmp_path: Path) -> None:
    train = (
        "\ufeff%1\n\n@PROBLEMNAME x\n@classlabel\tTrue  a 2\n@unknown 5\n@Data\r\n1,2:2\n#2\n3:a\n"
    )
    folder = made(tmp_path / "mine", train, "@classLabel true 2 a\n@data\n4:a\n")
    found = data.load(folder)
    assert (found.x[:, 0, :, 0].tolist(), found.y.tolist()) == ([[1, 2], [3, 0]], [1, 0])
    # The training file's order of classes holds in both.
    assert data.load(folder, "test").y.tolist() == [0]


def test_a_comment_of_other_bytes_does_no_harm(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine")
    path = folder / "Two_TRAIN.ts"
    path.write_bytes(b"# Universit\xe9\n" + path.read_bytes())
    assert len(data.load(folder)) == 2


def test_a_folder_of_several_is_read_by_its_name_or_the_file_s(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine")
    made(folder, HEADER.format(equal="true") + TRAIN + TRAIN, name="Two_eq")
    refused(folder, "Two_TRAIN.ts, Two_eq_TRAIN.ts; allowed one file of training data; try the pa")
    assert len(data.load(folder / "Two_eq_TRAIN.ts")) == 4
    made(folder, HEADER.format(equal="true") + TRAIN * 3, name="mine")
    assert len(data.load(folder)) == 6


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "mine")
    refused(folder / "Two_TEST.ts", "Two_TEST.ts: not a file of training data; allowed NAME_TRAIN")
    (folder / "Two_TEST.ts").unlink()
    refused(folder, "Two_TEST.ts: missing; looked for NAME_TRAIN.ts and NAME_TEST.ts")
    made(folder)
    (folder / "Two_TRAIN.ts").unlink()
    refused(folder, "mine: no NAME_TRAIN.ts; allowed one file of training data")
    (folder / "Two_TEST.ts").unlink()
    refused(folder, "NAME_TRAIN.ts and NAME_TEST.ts (UCR and UEA archives)")


EQUAL, UNEQUAL = HEADER.format(equal="true"), HEADER.format(equal="false")
SHORT = "@classLabel true a b\n@data\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": no @data; allowed a header, @data and a line for each case"),
        (EQUAL, ": no case after @data; allowed a header"),
        ("1,2:a\n", ":1: '1,2:a'; allowed tags and comments, before @data"),
        ("@timeStamps true\n" + SHORT, ":1: @timeStamps true; allowed false, samples at equal"),
        ("@timeStamps yes\n" + SHORT, ":1: @timestamps yes; allowed true or false"),
        ("#\n@equalLength\n" + SHORT, ":2: @equallength without a value; allowed true or false"),
        ("@targetLabel true\n@data\n", ": cases without classes; allowed @classLabel true and"),
        ("@classLabel false\n@data\n", ":1: cases without classes"),
        ("@classLabel true\n@data\n", ":1: names of classes are missing; allowed"),
        ("@classLabel true a b a\n@data\n", ":1: names of classes are a, b, a; allowed"),
        ("@dimensions two\n" + SHORT, ":1: @dimensions two; allowed a whole number from 1"),
        ("@dimension 0\n" + SHORT, ":1: @dimension 0; allowed a whole number from 1"),
        ("@seriesLength\n" + SHORT, ":1: @serieslength without a value; allowed a whole number"),
        (EQUAL + "1,2:3,4:fly\n", ":10: class 'fly'; allowed Walk, rest, run, which @classLabel"),
        (EQUAL + "1,2:3,4:walk\n", ":10: class 'walk'; allowed Walk"),
        (EQUAL + "1,2:3,4\n", ":10: class '3,4'; allowed Walk"),
        (EQUAL + "1,2:run\n", ":10: 1 sensors; allowed 2, a colon after each, and a class"),
        ("@univariate true\n" + SHORT + "1:1:a\n", ":4: 2 sensors; allowed 1, a colon"),
        (SHORT + "1:1:a\n\n1:a\n", ":5: 1 sensors; allowed 2"),
        (SHORT + "a\n", ":3: 0 sensors; allowed 1"),
        (UNEQUAL + "1,2:3:run\n", ":10: sensor 2 has 1 samples; allowed 2, as sensor 1 has"),
        (EQUAL + TRAIN + "1:1:run\n", ":12: sensor 1 has 1 samples; allowed 3, as every case"),
        (
            "@seriesLength 3\n@equalLength true\n" + SHORT + "1,2:a\n",
            ":5: sensor 1 has 2 samples; allowed 3",
        ),
        (EQUAL + "1,?:3,4:run\n", ":10, sensor 1: value 2 is '?'; allowed finite numbers; where"),
        (EQUAL + "1,2:3,NaN:run\n", ":10, sensor 2: value 2 is 'NaN'; allowed finite numbers"),
        (EQUAL + "1,2:3, :run\n", ":10, sensor 2: value 2 is ''; allowed finite numbers"),
        (EQUAL + "1,2:3,-1e39:run\n", ":10, sensor 2: value 2 is '-1e39'; allowed finite num"),
    ],
)
def test_damage_is_refused_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    folder = made(tmp_path / "mine", content)
    refused(folder, f"{folder / 'Two_TRAIN.ts'}{said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("@classLabel true a\n@data\n1:2:a\n", ":3: class 'a'; allowed Walk, rest, run"),
        (UNEQUAL.replace("2", "3") + "1:2:3:run\n", ":10: 3 sensors; allowed 2"),
    ],
)
def test_test_files_of_other_data_are_refused(tmp_path: Path, content: str, said: str) -> None:
    folder = made(tmp_path / "mine", test=content)
    refused(folder, f"{folder / 'Two_TEST.ts'}{said}")


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("BasicMotions", None, ((40, 1, 100, 6), (40, 1, 100, 6))),
        ("JapaneseVowels", None, ((270, 1, 29, 12), (370, 1, 29, 12))),
        ("JapaneseVowels", (32, 12), ((270, 1, 32, 12), (370, 1, 32, 12))),
        ("GunPoint", None, ((50, 1, 150, 1), (150, 1, 150, 1))),
        ("PickupGestureWiimoteZ", None, ((50, 1, 361, 1), (50, 1, 361, 1))),
    ],
)
def test_archives_are_read_as_aeon_reads_them(
    name: str, size: tuple[int, int] | None, shapes: tuple[tuple[int, ...], ...]
) -> None:
    aeon = pytest.importorskip("aeon.datasets", reason="aeon is not installed")
    folder = Path(aeon.__file__).parent / "data" / name
    for split, shape in zip(("train", "test"), shapes, strict=True):
        ours = data.load(folder, split, size=size)  # type: ignore[arg-type]
        cases, labels = aeon.load_from_ts_file(str(folder / f"{name}_{split.upper()}.ts"))
        assert ours.x.shape == shape
        for window, label, case, theirs in zip(ours.x, ours.y, cases, labels, strict=True):
            length = case.shape[1]
            assert (window[0, :length].numpy() == case.T.astype(np.float32)).all()
            assert not window[0, length:].any()
            # Theirs is in small letters.
            assert ours.classes[label].lower() == theirs
