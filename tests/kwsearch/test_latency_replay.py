"""Calls by themselves: they run, on data of their own, and only the call is timed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import kwlayers
from kwlayers.methods import NAMES, find
from kwsearch.latency.calls import Call, calls_of
from kwsearch.latency.replay import Replay
from kwsearch.networks import planning_model
from tests.zoo import network_for

pytestmark = pytest.mark.usefixtures("one_thread")


def calls(name: str, ratio: float | None, training: bool, side: int = 16) -> list[Call]:
    size = (3, side, side)
    model = planning_model(name, size).to("meta")
    if ratio is not None:
        kwlayers.convert_(model, kwlayers.plan_model(model, size, ratio=ratio))
    return list(calls_of(model, 2, size, training))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "ratio", "side"),
    [("resnet20", None, 16), ("resnet20", 0.5, 16), ("deit_tiny", 1, 32)],
)
def test_every_call_of_a_network_can_be_timed(
    name: str, ratio: float | None, side: int, training: bool
) -> None:
    found = calls(name, ratio, training, side)
    assert len(found) > 10
    for call in found:
        assert Replay(call).seconds() >= 0, call


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("ratio", [None, 1])
@pytest.mark.parametrize("name", ["mobilenetv2_050", "convnext_tiny", "resnet50"])
def test_so_can_those_of_other_networks(name: str, ratio: float | None, training: bool) -> None:
    for call in calls(name, ratio, training, 32):
        assert Replay(call).seconds() >= 0, call


@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"]
)
@pytest.mark.parametrize("method", [name for name in NAMES if name != "kernel_warehouse"])
def test_so_can_layers_of_all_methods(method: str, training: bool) -> None:
    """On numbers that are finite: every tensor of the layer was given some."""
    name, size = network_for(method)
    model = planning_model(name, size).to("meta")
    plan = kwlayers.plan_model(model, size, method=find(method).settings())
    kwlayers.convert_(model, plan)
    found = [call for call in calls_of(model, 2, size, training) if call.kind[:6] == "layer "]
    # The smallest and the largest: in between are more of the same.
    for call in sorted(found, key=lambda call: call.work)[:: len(found) - 1]:
        replay = Replay(call)
        assert replay.seconds() > 0, call
        for run in replay.runs[:2]:
            with torch.no_grad():
                assert torch.isfinite(run.call([run.held[0]])).all(), call
            assert all(torch.isfinite(tensor).all() for tensor in run.own), call


def test_so_can_a_dy_relu() -> None:
    name, size = network_for("dymn")
    found = calls_of(planning_model(name, size).to("meta"), 2, size, training=True)
    for call in [call for call in found if call.kind.startswith("dy_relu")][:3]:
        assert Replay(call).seconds() > 0, call


def test_the_clock_is_read_around_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks whenever it is read says how often it was."""
    monkeypatch.setattr(Replay, "_start", lambda replay: 0.0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten()).to("meta")
    for training in (False, True):
        for call in calls_of(model, 2, (3, 8, 8), training):
            ticks = itertools.count()
            replay = Replay(call)
            replay.clock = lambda ticks=ticks: float(next(ticks))
            seconds = replay.seconds()
            # One tick a call, and one for its backward if anything needs a gradient.
            differentiates = training and call.kind.split()[0] in (
                "conv2d", "relu", "flatten", "cross_entropy",
            )  # fmt: skip
            assert seconds == 1 + differentiates, call


def test_starting_backward_is_no_part_of_a_call() -> None:
    """It takes a tick here, as the backward of any call does: what is left is the forward's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).to("meta")
    for call in calls_of(model, 2, (3, 8, 8), True):
        replay = Replay(call)
        ticks = itertools.count()
        replay.clock = lambda ticks=ticks: float(next(ticks))
        assert replay.seconds() == 1, call


def test_layers_of_a_warehouse_go_backward_together_and_leave_its_buffer_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ticks: one a layer, one for the backward of all, less one for the buffers."""
    monkeypatch.setattr(Replay, "_start", lambda replay: 0.0)
    size = (3, 16, 16)
    model = planning_model("resnet20", size).to("meta")
    kwlayers.convert_(model, kwlayers.plan_model(model, size, ratio=1))
    found = [
        c for c in calls_of(model, 2, size, True) if c.kind.split()[0] in ("attention", "mixing")
    ]
    for call in found[:6]:
        replay = Replay(call)
        ticks = itertools.count()
        replay.clock = lambda ticks=ticks: float(next(ticks))
        assert replay.seconds() == 1
        uses = [id(run) for run in replay.runs]
        assert len(uses) == 2 * len(set(uses))  # each twice
        assert len(replay.warehouses) == (len(set(uses)) if "mixing" in call.kind else 0)
        assert all(cells.grad is None for cells in replay.warehouses)


def test_kept_tensors_stay_and_others_are_written_before_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Conv2d(3, 8, 3).to("meta")
    (call,) = [c for c in calls_of(model, 2, (3, 8, 8), False) if c.kind != "module"]
    seen = []
    function, *rest = call.what

    def watched(x: torch.Tensor, weight: torch.Tensor, *more: object) -> torch.Tensor:
        seen.append((x.data_ptr(), weight.data_ptr(), x.clone()))
        return function(x, weight, *more)  # type: ignore[no-any-return]

    replay = Replay(Call(call.kind, call.family, 0, call.work, (watched, *rest)))
    replay.seconds()
    replay.seconds()
    half = len(seen) // 2
    assert half > 2
    assert [one[1] for one in seen[:half]] == [one[1] for one in seen[half:]]
    assert len({one[1] for one in seen}) == half  # every copy has its own weight
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen[:half], seen[half:], strict=True))
