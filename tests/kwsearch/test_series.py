"""Time series: windows by hand, .npz files of them, every contradiction one clear error."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kwsearch import data, labelled_data, proxy
from kwsearch.data import DataError, Series
from kwsearch.data.groups import held_groups
from kwsearch.data.series import fitted, windows
from kwsearch.recipe import Proxy


def npz(path: Path, **arrays: Any) -> Path:
    made: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(path, **made)
    return path


def refused(source: Path, *said: str, split: Any = "train", **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(source, split, **options)
    for words in said:
        assert words in str(caught.value)


def ramp(count: int, samples: int, sensors: int) -> np.ndarray:
    """0, 1, 2, …"""
    return np.arange(count * samples * sensors, dtype=np.float64).reshape(count, samples, sensors)


# Series


RIGHT: dict[str, Any] = {
    "x": torch.zeros(2, 1, 4, 3),
    "y": torch.tensor([0, 1]),
    "num_classes": 2,
    "name": "made",
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(2, 4, 3)}, "windows are float32 of shape (2, 4, 3); allowed float32 of"),
        ({"x": RIGHT["x"].double()}, "windows are float64 of shape (2, 1, 4, 3)"),
        (
            {"x": torch.zeros(2, 2, 4, 3)},
            "windows are float32 of shape (2, 2, 4, 3); allowed float3",
        ),
        ({"x": torch.zeros(2, 1, 0, 3)}, "windows are float32 of shape (2, 1, 0, 3)"),
        ({"y": torch.zeros(2)}, "labels are float32 of shape (2,); allowed int64 of shape (2,)"),
        ({"y": torch.tensor([0, 1, 0])}, "labels are int64 of shape (3,); allowed int64 of sha"),
        ({"y": torch.tensor([0, 2])}, "label 2 is out of range; allowed 0..1 (2 classes)"),
        ({"y": torch.tensor([0, -1])}, "label -1 is out of range"),
    ],
)
def test_series_that_contradict_themselves_are_refused(changed: dict[str, Any], said: str) -> None:
    assert len(Series(**RIGHT)) == 2
    with pytest.raises(DataError, match=f"^made: {re.escape(said)}"):
        Series(**{**RIGHT, **changed})


def test_series_cannot_be_resized() -> None:
    with pytest.raises(DataError, match="windows cannot be resized, try loading them at that size"):
        data.resize(Series(**RIGHT), (8, 3))


def test_statistics_are_each_sensor_s() -> None:
    """Sensor 0 is 1, 3, 5, 7 (deviation of a sample: the root of 20 / 3), sensor 1 never moves."""
    x = torch.tensor([[[1.0, 9], [3, 9]], [[5, 9], [7, 9]]])[:, None]
    mean, deviation = Series(x, torch.tensor([0, 0]), 1, "made").statistics()
    assert mean.tolist() == [[[[4, 9]]]]
    assert torch.allclose(deviation, torch.tensor([[[[(20 / 3) ** 0.5, 1e-3]]]]))


def test_series_are_held_out_thinned_and_told_apart_as_images_are() -> None:
    made = Series(torch.randn(8, 1, 5, 2), torch.tensor([0, 1] * 4), 2, "made")
    train, held_out = data.split_holdout(made, 0.25, seed=0)
    assert (type(train), len(train), sorted(held_out.y.tolist())) == (Series, 6, [0, 1])
    assert sorted(data.subset(made, 4, seed=0).y.tolist()) == [0, 0, 1, 1]
    assert data.fingerprint(train) != data.fingerprint(held_out)


@pytest.mark.parametrize("holdout", [0.1, 0.2])
@pytest.mark.parametrize(("count", "classes"), [(385, 6), (481, 6), (240, 8), (241, 6), (30, 2)])
def test_a_recording_is_held_out_in_runs_of_every_class(
    holdout: float, count: int, classes: int, tmp_path: Path
) -> None:
    """Windows of 2 samples by 1: one more sample than windows, with the classes in blocks."""
    y = np.arange(count + 1) * classes // (count + 1)
    path = tmp_path / "one.npz"
    np.savez(
        path,
        series_train=np.random.rand(count + 1, 3),
        y_train=y,
        series_test=np.zeros((9, 3)),
        y_test=y[:9],
    )
    made = data.load(path, "train", size=(2, 3))
    assert len(made) == count
    train, held = data.split_holdout(made, holdout, seed=1)
    assert len(held) == pytest.approx(holdout * count, rel=0.25, abs=3)
    assert set(held.y.tolist()) == set(train.y.tolist()) == set(range(classes))
    # What overlaps is together but at the ends of runs.
    where = {round(float(x[0, 0, 0]), 6): number for number, x in enumerate(made.x)}
    numbers = sorted(where[round(float(x[0, 0, 0]), 6)] for x in held.x)
    stretches = 1 + sum(b > a + 1 for a, b in itertools.pairwise(numbers))
    assert stretches <= len(held) / min(16, max(count // classes // 10 - 1, 1)) + 1


def test_groups_are_held_out_as_near_to_the_shares_as_can_be() -> None:
    draw = np.random.RandomState
    groups, classes = np.repeat([0, 1, 2, 3], [6, 1, 6, 3]), np.zeros(16, int)
    # Four of 16 are wanted: three are the nearest of those that are too many or too few.
    for seed in range(6):
        held = held_groups(groups, classes, 0.25, draw(seed), "made")
        assert 3 <= held.sum() <= 6
        assert all(
            held[groups == group].all() or not held[groups == group].any() for group in range(4)
        )
    # A class that only one group has stays to train on.
    classes = np.where(groups == 1, 1, 0)
    assert not any(held_groups(groups, classes, 0.25, draw(s), "made")[6] for s in range(6))
    with pytest.raises(DataError, match="made: all 3 examples are of one recording or person"):
        held_groups(np.zeros(3), np.zeros(3, int), 0.5, draw(0), "made")


# Windows


def test_windows_are_cut_as_by_hand() -> None:
    recording = np.arange(14.0).reshape(7, 2)
    x, y = windows(recording, np.array([1, 1, 2, 2, 2, 0, 0]), 3, 2)
    assert (x.dtype.name, y.dtype.name) == ("float32", "int64")
    assert x.tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[4, 5], [6, 7], [8, 9]],
        [[8, 9], [10, 11], [12, 13]],
    ]
    assert y.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("length", "step"), [(1, 1), (4, 1), (5, 3), (16, 8), (33, 40), (47, 1)])
def test_windows_are_those_of_a_loop(length: int, step: int) -> None:
    random = np.random.RandomState(0)
    recording, labels = random.randn(47, 3), random.randint(0, 4, 47)
    x, y = windows(recording, labels, length, step)
    starts = [start for start in range(47) if start % step == 0 and start + length <= 47]
    assert len(x) == len(y) == len(starts) == (47 - length) // step + 1
    for window, label, start in zip(x, y, starts, strict=True):
        assert (window == recording[start : start + length].astype(np.float32)).all()
        counts = Counter(labels[start : start + length].tolist())
        most = max(counts.values())
        assert label == min(each for each, count in counts.items() if count == most)


def test_of_equally_common_labels_the_smallest_is_a_window_s() -> None:
    recording = np.zeros((4, 1))
    assert windows(recording, np.array([3, 3, 1, 1]), 4, 1)[1].tolist() == [1]
    assert windows(recording, np.array([3, 3, 1, 3]), 4, 1)[1].tolist() == [3]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"length": 0}, "length 0 of windows; allowed a whole number, at least 1"),
        ({"step": 2.0}, "step 2.0 of windows; allowed a whole number"),
        ({"length": 5}, "recording has 4 samples; allowed 5 or more, one window"),
        ({"recording": np.zeros(4)}, r"recording is float64 of shape \(4,\); allowed numbers of"),
        ({"recording": np.zeros((4, 0))}, r"recording is float64 of shape \(4, 0\)"),
        ({"recording": np.full((4, 1), "a")}, "recording is <U1 of shape"),
        ({"labels": np.zeros(3, int)}, r"recording has 4 samples but labels are int64 of shape \("),
        ({"labels": np.zeros(4)}, "labels are float64 .* allowed a whole number for each sample"),
        ({"recording": np.array([[0, 0], [0, np.nan]] * 2)}, r"recording\[1, 1\] is nan; allowed"),
        ({"recording": np.array([[0], [0], [-1e39], [0]])}, r"recording\[2, 0\] is -1e\+39; allow"),
    ],
)
def test_recordings_that_cannot_be_cut_are_refused(changed: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {
        "recording": np.zeros((4, 2)),
        "labels": np.zeros(4, int),
        "length": 2,
        "step": 1,
    }
    assert len(windows(**right)[0]) == 3
    with pytest.raises(DataError, match=said):
        windows(**{**right, **changed})


def test_windows_are_padded_with_zeros_at_their_end() -> None:
    x = 1 + ramp(2, 2, 3)
    padded = fitted(x, (5, 3), "made")
    assert (padded.shape, padded.dtype) == ((2, 1, 5, 3), torch.float32)
    assert (padded[:, 0, :2].numpy() == x).all()
    assert not padded[:, 0, 2:].any()
    assert fitted(x, None, "made").shape == fitted(x, (2, 3), "made").shape == (2, 1, 2, 3)


@pytest.mark.parametrize("size", [(1, 3), (2, 4), (5, 2)])
def test_windows_that_do_not_fit_are_refused(size: tuple[int, int]) -> None:
    said = (
        f"made: windows of 2 samples of 3 sensors do not fit {size[0]}x{size[1]}; allowed "
        "2 samples or more of 3 sensors, input: [1, 2, 3] and no resolution"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        fitted(ramp(2, 2, 3), size, "made")


# npz


def test_npz_windows_in_parts_are_read(tmp_path: Path) -> None:
    x = ramp(3, 4, 2)
    path = npz(
        tmp_path / "mine.npz", series_train=x, y_train=[1, 0, 1], series_test=x[1:2], y_test=[[4]]
    )
    train, test = data.load(path), data.load(path, "test", size=(6, 2))
    assert isinstance(train, Series)
    assert (train.x.numpy() == x[:, None]).all()
    assert (test.x[:, :, :4].numpy() == x[1:2, None]).all()
    assert (train.y.tolist(), test.y.tolist(), train.name) == ([1, 0, 1], [4], "mine.npz")
    assert (train.num_classes, test.num_classes) == (5, 5)
    assert test.x.shape == (1, 1, 6, 2)


def test_npz_windows_without_parts_are_split_every_fifth(tmp_path: Path) -> None:
    path = npz(tmp_path / "mine.npz", series=ramp(11, 1, 1).astype(np.int16), y=np.arange(11))
    train, test = data.load(path), data.load(path, "test")
    assert test.x.flatten().tolist() == test.y.tolist() == [0, 5, 10]
    assert train.x.flatten().tolist() == train.y.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_a_recording_s_last_fifth_is_test(tmp_path: Path) -> None:
    """23 samples: 19 for train, 4 for test; windows of 4 start at every second sample."""
    path = npz(tmp_path / "mine.npz", series=ramp(1, 23, 1)[0], y=[0] * 19 + [1] * 4)
    train, test = data.load(path, size=(4, 1)), data.load(path, "test", size=(4, 1))
    assert train.x[:, 0, :, 0].tolist() == [[i, i + 1, i + 2, i + 3] for i in range(0, 16, 2)]
    assert test.x[:, 0, :, 0].tolist() == [[19, 20, 21, 22]]
    assert (set(train.y.tolist()), test.y.tolist(), train.num_classes) == ({0}, [1], 2)


def test_recordings_in_parts_are_cut_whole(tmp_path: Path) -> None:
    x = ramp(1, 7, 2)[0]
    path = npz(
        tmp_path / "mine.npz", series_train=x, y_train=[0] * 7, series_test=x, y_test=[1] * 7
    )
    for split in ("train", "test"):
        found = data.load(path, split, size=(3, 2))
        assert found.x[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert data.load(path, size=(1, 2)).x.shape == (7, 1, 1, 2)


X = ramp(2, 4, 3)


@pytest.mark.parametrize(
    ("arrays", "size", "said"),
    [
        ({"series": X}, None, "no array 'y' beside series; try np.savez(path"),
        ({"series_test": X, "y_test": [0, 1]}, None, "no array 'series_train' beside y_test, seri"),
        ({"series": X, "y": [0, 1], "x": [1]}, None, "holds series and x; allowed series or imag"),
        ({"series": X, "y": [0]}, None, "series is float64 of shape (2, 4, 3) with 1 labels; all"),
        ({"series": X, "y": 0}, None, "labels are int64 of shape ()"),
        ({"series": X, "y": [0.0, 1.0]}, None, "labels are float64 of shape (2,)"),
        ({"series": X, "y": [-1, -2]}, None, "label -2 is out of range; allowed 0..0"),
        ({"series": X[None], "y": [0]}, None, "series is float64 of shape (1, 2, 4, 3)"),
        ({"series": X[:, :0], "y": [0, 1]}, None, "series is float64 of shape (2, 0, 3)"),
        ({"series": X > 0, "y": [0, 1]}, None, "series is bool of shape (2, 4, 3)"),
        ({"series": X[:1], "y": [0]}, None, "1 example(s) leave none for train"),
        ({"series": X, "y": [0, 1]}, (3, 3), "mine.npz: windows of 4 samples of 3 sensors do not"),
        ({"series": X[0], "y": [0] * 4}, None, "series is one recording of 4 samples; give the"),
        ({"series": X[0], "y": [0] * 4}, None, "e.g. size=(128, 3)"),
        (
            {"series": X[0], "y": [0] * 4},
            (5, 3),
            "series, its train part, has 4 samples; allowed 5",
        ),
        (
            {"series": X[0], "y": [0] * 4},
            (2, 9),
            "windows of 2 samples of 3 sensors do not fit 2x9",
        ),
    ],
)
def test_npz_series_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], size: tuple[int, int] | None, said: str
) -> None:
    refused(npz(tmp_path / "mine.npz", **arrays), "mine.npz: ", said, size=size)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e40])
def test_npz_values_that_are_not_finite_are_refused_with_their_place(
    tmp_path: Path, value: float
) -> None:
    x = ramp(3, 4, 2)
    x[1, 2, 0] = value
    path = npz(tmp_path / "mine.npz", series=x, y=[0, 1, 0])
    refused(path, f"mine.npz: series[1, 2, 0] is {value:g}; allowed finite numbers; where one is")
    path = npz(tmp_path / "mine.npz", series=x[1], y=[0] * 4)
    refused(path, f"mine.npz: series[2, 0] is {value:g}", size=(2, 2))


def test_series_have_no_folds(tmp_path: Path) -> None:
    path = npz(tmp_path / "mine.npz", series=X, y=[0, 1])
    refused(path, "mine.npz: fold 1 of time series; only ESC-50's sound has folds", fold=1)


# Training on them


def proxy_of(source: Path, **settings: Any) -> Proxy:
    return Proxy(data=str(source), epochs=2, batch_size=8, threads=1, **settings)


def rising_and_falling(path: Path, samples: int = 16, sensors: int = 3) -> Path:
    """Forty windows around 5, rising in class 0, falling in class 1; the last sensor is still."""
    y = np.arange(40) // 20
    slope = np.linspace(-1, 1, samples)[:, None] * (1 - 2 * y)[:, None, None]
    x = 5 + slope + 0.3 * np.random.RandomState(0).randn(40, samples, sensors)
    x[..., -1] = 7
    return npz(path, series=x, y=y)


def test_a_proxy_trains_on_windows_of_zero_mean_and_unit_deviation(tmp_path: Path) -> None:
    path = rising_and_falling(tmp_path / "mine.npz")
    series = labelled_data.load(proxy_of(path), (1, 16, 3))
    assert (len(series.train) + len(series.valid), series.mean.shape) == (32, (1, 1, 1, 3))
    batch = series.batch(series.train.x)
    assert batch.shape == (len(series.train), 1, 16, 3)
    assert batch.mean(dim=(0, 1, 2)).abs().max() < 1e-3
    assert torch.allclose(batch[..., :2].std(dim=(0, 1, 2)), torch.ones(2), atol=1e-4)
    assert not batch[..., 2].any()  # it never moves
    assert len(labelled_data.load_test(proxy_of(path), series).valid) == 8

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))

    settings = proxy_of(path, augment="none", lr=0.1)
    accuracies: list[float] = []
    proxy.train(make, None, series, settings, 0, lambda _, value: accuracies.append(value))
    assert len(accuracies) == 2
    assert accuracies[-1] == 1


def test_shifting_moves_windows_in_time_only() -> None:
    x = torch.zeros(1, 1, 16, 8)
    x[..., 8, 3] = 1
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        ((*_, sample, sensor),) = (
            labelled_data.augment(x, "shift", generator, Series).nonzero().tolist()
        )
        seen.add((sample, sensor))
    assert seen == {(sample, 3) for sample in (6, 7, 8, 9, 10)}
    assert Series.reach((7, 9)) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 16}, "proxy.resolution 16: of images; .* is time series, whose samples"),
        ({"resolution": 32}, "do not fit 32x32; allowed .* no resolution, which is of images"),
        ({"augment": "flip"}, "proxy.augment flip: it would turn the order of sensors around in"),
        ({"fold": 1}, "fold 1 of time series"),
    ],
)
def test_settings_of_images_are_refused_for_series(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    sensors = 16 if settings.get("resolution") == 16 else 3
    path = rising_and_falling(tmp_path / "mine.npz", sensors=sensors)
    with pytest.raises(DataError, match=message):
        labelled_data.load(proxy_of(path, **settings), (1, 16, sensors))


def test_a_teacher_s_logits_stay_with_their_windows(tmp_path: Path) -> None:
    path = rising_and_falling(tmp_path / "mine.npz")
    logits = np.arange(64.0).reshape(32, 2)
    file = npz(tmp_path / "teacher.npz", names=np.arange(32), logits=logits)
    series = labelled_data.load(proxy_of(path, teacher=str(file)), (1, 16, 3))
    whole = data.load(path)
    assert series.train.teacher is not None
    for window, row in zip(series.train.x, series.train.teacher, strict=True):
        assert torch.equal(whole.x[int(row[0]) // 2], window)
