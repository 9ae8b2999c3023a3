"""What workers run, on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kwlayers.convert import convert_
from kwlayers.plan import PlanError
from kwsearch import scores
from kwsearch.data import load
from kwsearch.executors import Failed, Finished, Job, Started
from kwsearch.executors.local import LocalExecutor
from kwsearch.recipe import parse_recipe
from kwsearch.trial import Trained, score_trial

TEXT = """
format: 1
model: {name: resnet20, num_classes: 10}
budget: {total_ratio: 0.5}
proxy: {resolution: 8, batch_size: 16, data: digits}
"""


def test_a_trial_is_scored_before_training_on_its_first_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(TEXT)
    assert recipe.proxy is not None
    with torch.device("meta"):
        plan = recipe.plan_for(recipe.create_model())
    trained = Trained(
        recipe.model_dump_json(),
        recipe.proxy.model_dump_json(),
        plan.groups_to_list(),
        None,
        7,
        str(tmp_path / "none"),
        1,
    )
    found = score_trial(lambda step, value: None, trained=trained, name="grad_norm")
    assert set(found["scores"]) == set(scores.SCORES)
    assert found["value"] == found["scores"]["grad_norm"]
    # By hand: the network of that seed on images of the training set.
    seen: list[torch.Tensor] = []
    original = scores.SCORES["grad_norm"]

    def spy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        seen.extend([x, y])
        return original(model, x, y)

    monkeypatch.setitem(scores.SCORES, "grad_norm", spy)
    score_trial(lambda step, value: None, trained=trained, name="grad_norm")
    torch.manual_seed(7)
    model = convert_(recipe.create_model(), plan)
    torch.manual_seed(7)
    assert found["value"] == pytest.approx(scores.grad_norm(model, *seen), rel=1e-5)
    assert seen[0].shape == (16, 3, 8, 8)
    digits = load("digits", "train", size=(8, 8))
    assert set(seen[1].tolist()) <= set(digits.y.tolist())


def test_a_score_that_is_no_number_ranks_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(TEXT)
    assert recipe.proxy is not None
    monkeypatch.setitem(scores.SCORES, "jacob_cov", lambda model, x, y: float("nan"))
    trained = Trained(
        recipe.model_dump_json(), recipe.proxy.model_dump_json(), None, 0.5, 7, "none", 1
    )
    found = score_trial(lambda step, value: None, trained=trained, name="jacob_cov")
    assert found["value"] < -1e300
    assert set(found["scores"]) == {"grad_norm", "synflow"}


OWN = """
    from torch import nn

    def make(num_classes, in_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes)
        )
"""


def trained_own(name: str, folder: Path, trust: bool) -> Trained:
    text = TEXT.replace("name: resnet20", f"name: {name}") + "input: 1x8x8\n"
    recipe = parse_recipe(text.replace("{resolution: 8,", "{subset: 100, epochs: 1,"))
    assert recipe.proxy is not None
    proxy = recipe.proxy.model_dump_json()
    return Trained(
        recipe.model_dump_json(), proxy, None, None, 7, str(folder / "state.pt"), 1, trust
    )


def test_a_worker_imports_own_code_with_trust_only(
    own_code: Callable[[str], str], tmp_path: Path
) -> None:
    name = f"{own_code(OWN)}:make"
    with pytest.raises(PlanError, match=f"^{name}: it is code of your own: .* which --trust"):
        trained_own(name, tmp_path, trust=False).create_model()
    jobs = [
        Job(
            number, 1, "kwsearch.trial:train_trial", {"trained": trained, "first": 0, "until": 1}, 1
        )
        for number, trained in enumerate(trained_own(name, tmp_path, t) for t in (False, True))
    ]
    with LocalExecutor(1) as executor:
        executor.submit(jobs[0])
        refused = _last(executor)
        executor.submit(jobs[1])
        trained = _last(executor)
    assert isinstance(refused, Failed)
    assert "--trust" in refused.message
    assert isinstance(trained, Finished)
    assert 0 <= trained.value <= 1


def _last(executor: LocalExecutor) -> object:
    while executor.running:
        *_, event = executor.wait(60) or [None]
        assert event is not None, "nothing in a minute"
    assert not isinstance(event, Started)
    return event
