"""Stored logits of a teacher: found by name; and the loss that learns from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kwsearch.data import DataError
from kwsearch.data.images import Images
from kwsearch.data.teacher import read_logits, taught
from kwsearch.distillation import offline_distillation

NAMES = ("b.wav", "a.wav")


def teacher(folder: Path, **changed: Any) -> Path:
    """Three rows, whose logits are 10 times their number."""
    arrays = {
        "names": np.array(["a.wav", "b.wav", "c.wav"]),
        "logits": np.array([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]),
    }
    np.savez(folder / "teacher.npz", **{**arrays, **changed})
    return folder / "teacher.npz"


# --- the file --------------------------------------------------------------------------------


def test_rows_are_those_of_the_names(tmp_path: Path) -> None:
    got = read_logits(teacher(tmp_path), NAMES, 2)
    assert got.dtype == torch.float32
    assert got.tolist() == [[10, 11], [0, 1]]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_rows_may_have_indices(tmp_path: Path, dtype: Any) -> None:
    path = teacher(tmp_path, names=np.array([1, 2, 0], dtype))
    assert read_logits(path, NAMES, 2).tolist() == [[20, 21], [0, 1]]


def test_places_in_a_training_set_are_refused_where_examples_have_names(tmp_path: Path) -> None:
    """Another fold has other examples at the same places."""
    path = teacher(tmp_path, names=np.array([1, 2, 0]))
    images = Images(torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, 1, 0]), 2, "some")
    found = taught(images, path).teacher
    assert found is not None
    assert found.tolist() == [[20, 21], [0, 1], [10, 11]]
    with pytest.raises(DataError, match=r"names are numbers.* such as a\.wav"):
        taught(replace(images, names=("a.wav", "b.wav", "c.wav")), path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_may_be_of_any_float(tmp_path: Path, dtype: Any) -> None:
    path = teacher(tmp_path, logits=np.array([[0.5, -3], [1, 2], [3, 4]], dtype))
    assert read_logits(path, ["a.wav"], 2).tolist() == [[0.5, -3]]


def test_rows_of_other_examples_do_not_count(tmp_path: Path) -> None:
    path = teacher(tmp_path, logits=np.array([[1.0], [2.0], [math.nan]]))
    assert read_logits(path, NAMES, 1).tolist() == [[2], [1]]


@pytest.mark.parametrize(
    ("changed", "names", "classes", "said"),
    [
        ({}, NAMES, 3, "logits of 2 classes; allowed 3, as the training set has"),
        ({}, ("a.wav", "x", "y"), 2, "no logits of 2 of 3 training examples: x, y; its names are"),
        ({}, [*"1234567"], 2, "7 of 7 training examples: 1, 2, 3, 4, 5, … (7 in all); its names"),
        ({"names": np.array([0, 1, 3])}, "abc", 2, "no logits of 1 of 3 training examples: 2;"),
        ({"names": np.array(["a.wav"] * 3)}, NAMES, 2, "a.wav more than once in names"),
        ({"names": np.array([1, 1, 0])}, NAMES, 2, "1 more than once in names"),
        ({"logits": np.array([[1, math.nan]] * 3)}, NAMES, 2, "logits of b.wav, a.wav are not fin"),
        ({"logits": np.array([[1, 1e39]] * 3)}, NAMES, 2, "are not finite; allowed finite numbers"),
        ({"logits": np.zeros((2, 2))}, NAMES, 2, "float64 of shape (2, 2); allowed floats of"),
        ({"logits": np.zeros(3)}, NAMES, 2, "shape (3,); allowed floats of shape (N, classes)"),
        ({"logits": np.zeros((3, 2), int)}, NAMES, 2, "logits are int64"),
        ({"names": np.zeros(3)}, NAMES, 2, "names are float64 of shape (3,); allowed file names"),
        ({"names": np.zeros((3, 1), int)}, NAMES, 2, "names are int64 of shape (3, 1)"),
        ({"names": np.array([None] * 3)}, NAMES, 2, "not a .npz file of names and logits (Object"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, Any], names: Any, classes: int, said: str
) -> None:
    path = teacher(tmp_path, **changed)
    with pytest.raises(DataError) as caught:
        read_logits(path, names, classes)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.npz"
    with pytest.raises(DataError, match=r"teacher.npz: cannot be read \(No such file"):
        read_logits(path, NAMES, 2)
    whole = teacher(tmp_path).read_bytes()
    np.save(tmp_path / "one.npy", np.zeros((3, 2)))
    only_logits = tmp_path / "logits.npz"
    np.savez(only_logits, logits=np.zeros((3, 2)))
    for content in (
        b"",
        b"<html>",
        whole[:-30],
        (tmp_path / "one.npy").read_bytes(),
        only_logits.read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a .npz file of names and logits .*try np.savez"):
            read_logits(path, NAMES, 2)


# --- the loss --------------------------------------------------------------------------------


def bce(p: float, q: float) -> float:
    """Of the probability p where q is meant."""
    return -q * math.log(p) - (1 - q) * math.log(1 - p)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_several_labels_each_by_hand() -> None:
    logits, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    stored = torch.tensor([[-1.0, 3.0]])
    labels = (bce(0.5, 1) + bce(sigmoid(2), 0)) / 2
    soft = (bce(0.5, sigmoid(-1)) + bce(sigmoid(2), sigmoid(3))) / 2
    got = offline_distillation(logits, targets, stored)
    assert got.item() == pytest.approx(0.1 * labels + 0.9 * soft, rel=1e-6)
    assert offline_distillation(logits, targets, stored, 0).item() == pytest.approx(labels)
    assert offline_distillation(logits, targets, stored, 1).item() == pytest.approx(soft)


def test_one_label_each_by_hand() -> None:
    """Softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) (1/2, 1/2)."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    stored = torch.tensor([[math.log(4), 0.0], [0.0, math.log(9)]])  # (4/5, 1/5), (1/10, 9/10)
    labels = (math.log(4) + math.log(2)) / 2
    soft = (0.8 * math.log(4) + 0.2 * math.log(4 / 3) + math.log(2)) / 2
    got = offline_distillation(logits, torch.tensor([0, 1]), stored, weight=0.25)
    assert got.item() == pytest.approx(0.75 * labels + 0.25 * soft, rel=1e-6)


@pytest.fixture(params=["several", "one"])
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits, stored = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    if request.param == "one":
        return logits, torch.randint(5, (4,), generator=draw), stored
    return logits, torch.randint(2, (4, 5), generator=draw).double(), stored


def test_a_student_like_its_teacher_learns_nothing_more(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, targets, stored = batch
    logits = stored.clone().requires_grad_()
    offline_distillation(logits, targets, stored, 1).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


def test_no_gradient_reaches_the_teacher(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, stored = (x.requires_grad_() if x.is_floating_point() else x for x in batch)
    offline_distillation(logits, targets, stored).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert stored.grad is None


def test_a_mixup_of_losses_is_the_published_loss() -> None:
    """As EfficientAT computes it: of mixed labels, and of both teachers' logits by their shares."""
    draw = torch.Generator().manual_seed(1)
    logits, stored = torch.randn(2, 4, 5, generator=draw)
    y = torch.randint(2, (4, 5), generator=draw).float()
    other, share = torch.tensor([2, 0, 3, 1]), torch.tensor([0.7, 0.9, 0.5, 0.8])
    loss = torch.nn.BCEWithLogitsLoss(reduction="none")
    of_each = share[:, None]
    labels = loss(logits, of_each * y + (1 - of_each) * y[other]).mean()
    soft = stored.sigmoid()
    per_clip = share * loss(logits, soft).mean(1) + (1 - share) * loss(logits, soft[other]).mean(1)
    published = 0.1 * labels + (1 - 0.1) * per_clip.mean()
    own, others = (
        offline_distillation(logits, a, b, reduction="none")
        for a, b in ((y, stored), (y[other], stored[other]))
    )
    ours = (share * own + (1 - share) * others).mean()
    assert ours.item() == pytest.approx(published.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": 1.1}, "the teacher's weight is 1.1; allowed 0 to 1, as published 0.9"),
        ({"weight": math.nan}, "weight is nan"),
        ({"stored": (4, 6)}, r"logits of shape \(4, 5\), the teacher's of \(4, 6\); allowed"),
        ({"logits": (4,), "stored": (4,)}, r"logits of shape \(4,\)"),
        ({"targets": torch.zeros(4)}, r"float32 of shape \(4,\); allowed floats of shape \(4, 5\)"),
        ({"targets": torch.zeros(3).long()}, r"int64 of shape \(3,\).* labels of shape \(4,\)"),
        ({"targets": torch.zeros(4, 5).long()}, r"int64 of shape \(4, 5\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], said: str) -> None:
    shape = {"logits": (4, 5), "stored": (4, 5), **changed}
    with pytest.raises(ValueError, match=said):
        offline_distillation(
            torch.zeros(shape["logits"]),
            changed.get("targets", torch.zeros(4, 5)),
            torch.zeros(shape["stored"]),
            changed.get("weight", 0.9),
        )
