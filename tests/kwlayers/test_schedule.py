"""The temperature falls as published, is saved with the model, and resumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwlayers import (
    Attention,
    KWConv1d,
    KWLinear,
    TemperatureSchedule,
    Warehouse,
    set_temperature_,
)


def make() -> Any:
    torch.manual_seed(0)
    cells = Warehouse(6, (2, 2, 1))
    return nn.ModuleDict(
        {
            "cells": cells,
            "conv": KWConv1d(2, 4, 1, warehouse=cells),
            "head": nn.Sequential(nn.ReLU(), KWLinear(4, 2, warehouse=cells)),
        }
    )


def temperatures(model: nn.Module) -> set[float]:
    found = {float(m.temperature) for m in model.modules() if isinstance(m, Attention)}
    assert found
    return found


# Setting -----------------------------------------------------------------------------


def test_every_layer_is_set_and_the_model_returned() -> None:
    model = make()
    assert temperatures(model) == {0.0}
    assert set_temperature_(model, 0.25) is model
    assert temperatures(model) == {0.25}
    assert sum(isinstance(m, Attention) for m in model.modules()) == 2


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_temperature_outside_zero_to_one_is_refused(wrong: float) -> None:
    model = make()
    with pytest.raises(ValueError, match=re.escape(f"temperature {wrong}: it must be in [0, 1]")):
        set_temperature_(model, wrong)
    assert temperatures(model) == {0.0}


# The published formula ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "steps"), [(20, 5), (15, 7), (1, 1), (2, 1), (0.5, 6), (2.5, 3)], ids=str
)
def test_temperatures_follow_the_published_formula_counted_from_one(
    warmup: float, steps: int
) -> None:
    model = make()
    schedule = TemperatureSchedule(model, warmup, steps)
    iterations = int(warmup * steps) + 3
    for it in range(1, iterations + 1):
        expected = max(0.0, 1 - it / (warmup * steps))
        assert schedule.step() == expected
        assert schedule.temperature == expected
        assert temperatures(model) == {float(torch.tensor(expected))}
    assert schedule.temperature == 0.0


def test_two_epochs_of_two_steps_give_four_quarters() -> None:
    schedule = TemperatureSchedule(make(), 2, 2)
    assert [schedule.step() for _ in range(6)] == [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]


def test_before_the_first_step_the_model_is_at_temperature_one() -> None:
    model = make()
    schedule = TemperatureSchedule(model, 2, 2)
    assert schedule.temperature == 1.0
    assert temperatures(model) == {1.0}


def test_without_warmup_the_temperature_is_zero_from_the_start() -> None:
    model = set_temperature_(make(), 0.5)
    schedule = TemperatureSchedule(model, 0, 10)
    assert temperatures(model) == {0.0}
    assert [schedule.step() for _ in range(3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("warmup", "steps"), [(-1, 10), (20, 0), (float("nan"), 10)])
def test_a_schedule_that_cannot_be_is_refused(warmup: float, steps: int) -> None:
    message = (
        f"warmup_epochs {warmup}, steps_per_epoch {steps}: at least 0 epochs, of at least 1 step"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TemperatureSchedule(make(), warmup, steps)


def test_a_model_without_our_layers_is_refused() -> None:
    message = "the model has no dynamic layer: convert_ it first"
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(nn.Linear(2, 2), 20, 10)


# Saving and resuming -----------------------------------------------------------------


def test_the_temperature_is_in_the_state_of_the_model() -> None:
    model = make()
    schedule = TemperatureSchedule(model, 2, 2)
    schedule.step()
    names = [name for name in model.state_dict() if name.endswith("temperature")]
    assert names == ["conv.attention.temperature", "head.1.attention.temperature"]
    loaded = make()
    loaded.load_state_dict(model.state_dict())
    assert temperatures(loaded) == {0.75}


def test_a_resumed_schedule_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    model = make()
    schedule = TemperatureSchedule(model, 4, 2)
    for _ in range(3):
        schedule.step()
    torch.save({"model": model.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "at 3")
    rest = [schedule.step() for _ in range(7)]
    assert rest[:2] == [1 - 4 / 8, 1 - 5 / 8]

    resumed_model = make()
    resumed = TemperatureSchedule(resumed_model, 1, 1)
    state = torch.load(tmp_path / "at 3", weights_only=True)
    assert temperatures(resumed_model) == {1.0}
    resumed.load_state_dict(state["schedule"])
    assert resumed.temperature == 1 - 3 / 8
    assert temperatures(resumed_model) == {1 - 3 / 8}
    resumed_model.load_state_dict(state["model"])
    assert temperatures(resumed_model) == {1 - 3 / 8}
    assert [resumed.step() for _ in range(7)] == rest


def test_a_step_counts_also_where_the_temperature_stays_zero() -> None:
    schedule = TemperatureSchedule(make(), 1, 1)
    for _ in range(5):
        schedule.step()
    assert schedule.state_dict() == {"last_step": 5, "warmup_steps": 1}
