"""The memory and time of a training step, and how many trials fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kwlayers.plan import Plan
from kwsearch import train_step
from kwsearch.recipe import Proxy, Recipe, parse_recipe
from kwsearch.train_step import TrainStep, fitting, slots, train_bytes

TEXT = """
format: 1
model: resnet20
budget: {total_ratio: 0.5}
proxy: {resolution: 8, batch_size: 4, optimizer: sgd, momentum: 0, weight_decay: 0}
"""


def step_of(*overrides: str) -> TrainStep:
    recipe = parse_recipe(TEXT, overrides=overrides)
    assert recipe.proxy is not None
    return TrainStep(recipe, plan_of(recipe), recipe.proxy)


def plan_of(recipe: Recipe) -> Plan:
    with torch.device("meta"):
        return recipe.plan_for(recipe.create_model())


def bytes_of(*overrides: str) -> int:
    recipe = parse_recipe(TEXT, overrides=overrides)
    assert recipe.proxy is not None
    return train_bytes(recipe, plan_of(recipe), recipe.proxy)


def test_memory_grows_by_what_a_larger_batch_saves() -> None:
    sizes = [bytes_of(f"proxy.batch_size={batch}") for batch in (4, 8, 12)]
    # Weights, gradients and workspaces aside, memory is proportional to the batch.
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert 0 < first == pytest.approx(second, rel=0.05)


def test_momentum_is_another_copy_of_the_weights() -> None:
    recipe = parse_recipe(TEXT)
    weights = 4 * plan_of(recipe).cost().params.total
    assert bytes_of("proxy.momentum=0.9") - bytes_of() == weights
    assert bytes_of() > 2 * weights


def test_memory_is_that_of_the_proxy_s_images() -> None:
    assert bytes_of("proxy.resolution=16") > bytes_of() == bytes_of("proxy.resolution=8")
    assert bytes_of("proxy.resolution=null") == bytes_of("proxy.resolution=32")


def test_a_step_trains_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    step = step_of()
    assert torch.equal(torch.get_rng_state(), before)
    weight = step.model.get_parameter("fc.weight")
    old = weight.detach().clone()
    assert step.seconds() > 0
    assert not torch.equal(weight, old)


def test_a_cpu_has_as_many_slots_as_its_cores_have_threads_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never() -> int:
        raise AssertionError

    monkeypatch.setattr(train_step.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert slots(Proxy(device="cpu", threads=2), never) == 4
    assert slots(Proxy(device="cpu", threads=3), never) == 2
    assert slots(Proxy(device="cpu", threads=16), never) == 1
    assert slots(Proxy(device="cpu"), never) == 1


def test_gpus_have_slots_for_what_fits_nine_tenths_of_the_fullest() -> None:
    # 0.9 x 80 GB holds 4 times 17 GB, 0.9 x 70 GB 3 times.
    assert fitting([80, 80], 17) == 8
    assert fitting([80, 70], 17) == 6
    assert fitting([10], 17) == 1


def test_trials_on_gpus_share_them_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    import kwsearch.proxy

    monkeypatch.setattr(kwsearch.proxy, "device_of", lambda proxy: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10**10, 2 * 10**10))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert train_step.gpus(Proxy()) == ["0", "1"]
    # 9 GB hold three times 2.4 GB and their contexts of 0.6.
    assert slots(Proxy(), lambda: 2_400_000_000) == 6
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert train_step.gpus(Proxy()) == ["3", "5"]


@pytest.mark.slow
def test_the_memory_limit_turns_away_plans_before_they_are_trained(tmp_path: Path) -> None:
    from tests.kwsearch import test_optimize

    overrides = ("proxy={epochs: 3, resolution: 8, batch_size: 4}", "search.trials=4")
    search, _ = test_optimize.study(tmp_path / "free", *overrides)
    trials = test_optimize.run(search, test_optimize.score).trials
    plans = {
        t.number: search._train_bytes(Plan.from_groups(search.network, t.user_attrs["groups"]))
        for t in trials
        if "groups" in t.user_attrs
    }
    uniform = plans.pop(0)
    # As much as the uniform plan is allowed: none of what is trained then takes more.
    limit = f"search.space.limits.train_memory={uniform}"
    search, _ = test_optimize.study(tmp_path / "limited", *overrides, limit)
    for trial in test_optimize.run(search, test_optimize.score).trials:
        if "groups" in trial.user_attrs:
            plan = Plan.from_groups(search.network, trial.user_attrs["groups"])
            assert search._train_bytes(plan) <= uniform
    limit = f"search.space.limits.train_memory={uniform - 1}"
    search, _ = test_optimize.study(tmp_path / "none", *overrides, limit)
    with pytest.raises(test_optimize.optimize.SearchError, match="train_memory: the uniform plan"):
        test_optimize.run(search, test_optimize.score)
