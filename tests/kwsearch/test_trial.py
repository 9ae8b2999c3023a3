"""What workers run, on images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kwlayers.convert import convert_
from kwsearch import scores
from kwsearch.data import load
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
