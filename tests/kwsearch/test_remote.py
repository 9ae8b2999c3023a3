"""Checkpoints and images at URLs: through fsspec, on this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kwsearch import checkpoint, data
from kwsearch.data import DataError, remote
from kwsearch.files import NoSuchPlace, is_here, path_of
from kwsearch.recipe import load_recipe
from tests.kwsearch import test_static_start

pytest.importorskip("upath", reason="universal_pathlib is not installed")


def test_a_checkpoint_in_object_storage_is_written_and_read() -> None:
    folder = path_of("memory://checkpoints")
    folder.mkdir(exist_ok=True)
    path = folder / "3-0.pt"
    assert not is_here(path)
    assert checkpoint.load(path, "key") is None
    checkpoint.save(path, "key", {"x": torch.arange(3)})
    found = checkpoint.load(path, "key")
    assert found is not None
    assert found["x"].tolist() == [0, 1, 2]
    with pytest.raises(checkpoint.CheckpointError, match=r"3-0\.pt is not a checkpoint of this"):
        checkpoint.load(path, "another")
    assert [one.name for one in folder.glob("3-*.pt")] == ["3-0.pt"]
    path.unlink()
    assert checkpoint.load(path, "key") is None


def test_a_protocol_that_nothing_reads_is_said() -> None:
    with pytest.raises(NoSuchPlace, match=r"nosuch://b/c: .*'nosuch'; pip install"):
        path_of("nosuch://b/c")
    with pytest.raises(DataError, match=r"nosuch://b/c: .*; pip install \"kwsearch\[remote\]\""):
        data.load("nosuch://b/c")


def test_images_are_brought_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)

    def write(count: int) -> None:
        x, y = rng.integers(0, 255, (count, 8, 8)), np.arange(count) % 3
        np.savez(tmp_path / "images.npz", x=x.astype(np.uint8), y=y)

    write(40)
    url = f"file://{tmp_path}/images.npz"
    first, local = data.load(url), data.load(tmp_path / "images.npz")
    assert torch.equal(first.x, local.x)
    assert torch.equal(first.y, local.y)
    brought = [*(tmp_path / "cache").glob("*/images.npz")]
    assert len(brought) == 1
    data.load(url)
    assert [*(tmp_path / "cache").glob("*/images.npz")] == brought
    write(50)
    assert len(data.load(url).y) == len(data.load(tmp_path / "images.npz").y) != len(first.y)
    with pytest.raises(DataError, match=r"file://.*/none\.npz: no such file or folder"):
        data.load(f"file://{tmp_path}/none.npz")


def test_a_folder_of_images_comes_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        image.new("RGB", (8, 8), "red").save(tmp_path / "pets" / name / "1.png")
    found = data.load(f"file://{tmp_path}/pets", size=(8, 8))
    shutil.rmtree(tmp_path / "pets")
    assert found.classes == ("cat", "dog")
    assert found.x.shape == (2, 3, 8, 8)


def test_a_search_keeps_its_checkpoints_where_it_is_told(tmp_path: Path) -> None:
    there = tmp_path / "bucket"
    options = [f"search.checkpoints=file://{there}", "search.trials=2", "--quiet"]
    assert test_static_start.search(tmp_path, *options) == 0
    # What trainings start from stays; those of trials go with them.
    own = load_recipe(tmp_path / "run/recipe.lock.yaml").provenance["id"]
    (folder,) = there.iterdir()
    assert folder.name == f"run-{own}"  # others may have a folder run, too
    assert "static_1.pt" in {path.name for path in folder.iterdir()}
    assert not list(folder.glob("[0-9]*-*.pt"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_that_cannot_be_written_are_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert test_static_start.search(tmp_path, f"search.checkpoints=file://{tmp_path}/file") == 2
    said = capsys.readouterr().err
    where = re.escape(f"search.checkpoints file://{tmp_path}/file/run-")
    assert re.search(where + "[0-9a-f]{8}: cannot be written: ", said)
