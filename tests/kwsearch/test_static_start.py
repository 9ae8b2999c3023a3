"""Studies whose trainings start from the static network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwlayers import convert_, plan_model
from kwsearch import checkpoint, labelled_data, proxy, static_start
from kwsearch.cli import run
from kwsearch.recipe import Proxy
from kwsearch.zoo import create

SETTINGS = Proxy(
    data="digits",
    resolution=8,
    subset=1000,
    epochs=2,
    batch_size=64,
    lr=0.05,
    threads=1,
    init="warm_start",
)


def make_model() -> nn.Module:
    return create("resnet20", num_classes=10, in_channels=1)


@pytest.fixture(scope="module")
def images() -> labelled_data.LabelledData:
    return labelled_data.load(SETTINGS, (1, 8, 8))


@pytest.mark.usefixtures("one_thread")
def test_the_static_network_is_trained_once_and_is_what_trainings_start_from(
    images: labelled_data.LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = static_start.weights(make_model, images, SETTINGS, tmp_path, None)
    # By hand: the same training from scratch.
    own = SETTINGS.model_copy(update={"init": "scratch"})
    kept: list[nn.Module] = []
    static = proxy.train(
        make_model, None, images, own, 0, lambda epoch, accuracy: None, done=kept.append
    )
    for name, tensor in kept[0].state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["static_1.pt"]

    def no_training(*args: Any, **kwargs: Any) -> float:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(proxy, "train", no_training)
        again = static_start.weights(make_model, images, SETTINGS, tmp_path, None)
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())

    # At b = 1 a trial starts where the static network ended.
    plan = plan_model(make_model(), (1, 8, 8), ratio=1)
    model = make_model()
    model.load_state_dict(found)
    convert_(model, plan, warm_start=True)
    assert images.score(model, 64) == static
    slow = SETTINGS.model_copy(update={"lr": 1e-9})
    accuracies: list[float] = []
    proxy.train(
        make_model,
        plan,
        images,
        slow,
        1,
        lambda epoch, accuracy: accuracies.append(accuracy),
        initial=found,
    )
    assert accuracies == pytest.approx([static] * 2, abs=0.06)  # batch norms move a little


@pytest.mark.usefixtures("one_thread")
def test_after_a_kill_the_static_network_goes_on_from_its_last_epoch(
    images: labelled_data.LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = static_start.weights(make_model, images, SETTINGS, tmp_path / "a", None)
    saved = checkpoint.save
    calls = []

    def dies(path: Path, key: str, state: dict[str, Any]) -> None:
        saved(path, key, state)
        calls.append(path.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            static_start.weights(make_model, images, SETTINGS, tmp_path / "b", 1.0)
    assert calls == ["static_1.training.pt"]
    found = static_start.weights(make_model, images, SETTINGS, tmp_path / "b", 1.0)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


TEXT = """
format: 1
model: {name: resnet20, num_classes: 10}
input: [1, 8, 8]
budget: {total_ratio: 0.5}
search: {trials: 3, finalists: 0, seed: 0, pruner: none}
proxy: {data: digits, subset: 300, epochs: 1, init_epochs: 2, init: warm_start, threads: 1}
"""


def search(folder: Path, *overrides: str) -> int:
    (folder / "r.yaml").write_text(TEXT)
    return run(["optimize", str(folder / "r.yaml"), *overrides, "--run-dir", str(folder / "run")])


@pytest.mark.slow
def test_all_trials_of_a_study_start_from_static_networks_of_their_width(tmp_path: Path) -> None:
    assert search(tmp_path, "--quiet") == 0
    files = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("static_*.pt"))
    # That of the plans, and that of the static twin, which is narrower.
    assert len(files) == 2
    assert "static_1.pt" in files


def test_a_temperature_has_nothing_to_do_where_trainings_start_warm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(tmp_path, "search.space.temperature_epochs=[0, 1]") == 2
    assert "temperature_epochs: with proxy.init warm_start the" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_static_start_is_the_untrained_static_network(images: labelled_data.LabelledData) -> None:
    plan = plan_model(make_model(), (1, 8, 8), ratio=1)
    still = SETTINGS.model_copy(update={"init": "static", "lr": 1e-9, "epochs": 1})
    kept: list[nn.Module] = []
    proxy.train(make_model, plan, images, still, 5, lambda *told: None, done=kept.append)
    state = kept[0].state_dict()
    assert {float(v) for k, v in state.items() if k.endswith("attention.temperature")} == {0}
    torch.manual_seed(5)
    static = make_model().train()
    x = images.batch(images.train.x[:32])
    with torch.no_grad():
        torch.testing.assert_close(kept[0].train()(x), static(x), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_search_may_start_from_untrained_static_networks(tmp_path: Path) -> None:
    assert search(tmp_path, "proxy.init=static", "search.trials=2", "--quiet") == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("static_*.pt"))
