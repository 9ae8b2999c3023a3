"""`to_static_` gives the plain network that a converted one equals, or changes nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import (
    Plan,
    PlanError,
    Warehouse,
    convert_,
    plan_model,
    set_temperature_,
    to_static_,
)
from kwlayers.conv import _KWLayer


class Net(nn.Module):
    """Images (3, 8, 6). One layer under two names, a grouped, a padded one, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding="same", bias=False, padding_mode="circular")
        self.again = self.a
        self.b = nn.Conv2d(8, 16, 3, padding=(2, 1), dilation=2)
        self.down = nn.Conv2d(16, 16, 2, stride=(2, 1), groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.a(self.norm(self.stem(x))).relu()).relu()
        x = self.down(self.b(x).relu())
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def signal_net() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 4, stride=2, padding=3))


def volume_net() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 8, 2))


def token_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False))


IMAGE = (3, 8, 6)
GROUPS = {"pair": ["a", "b"], "down": ["down"], "head": ["head"]}
Builder = Callable[[], nn.Module]
MODELS: dict[str, tuple[Builder, tuple[int, ...], dict[str, Any]]] = {
    "2-D": (Net, IMAGE, {"sharing": GROUPS, "ratio": 1}),
    "more cells": (Net, IMAGE, {"sharing": GROUPS, "ratio": 2.5}),
    "basis": (Net, IMAGE, {"sharing": GROUPS, "ratio": 1, "basis_ratio": 0.25}),
    "small cells": (Net, IMAGE, {"sharing": GROUPS, "ratio": 1, "cell_ratio": (0.5, 0.5)}),
    "whole kernels": (
        Net,
        IMAGE,
        {"sharing": [["a"], ["b"], ["down"]], "ratio": 1, "spatial_partition": False},
    ),
    "1-D": (signal_net, (2, 12), {"sharing": [["0", "2"]], "ratio": 1}),
    "3-D": (volume_net, (1, 4, 4, 4), {"sharing": [["0", "2"]], "ratio": 1}),
    "linear": (token_net, (7, 8), {"sharing": [["0", "2"]], "ratio": 1}),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net_plan(ratio: float = 1) -> Plan:
    return plan_model(Net(), IMAGE, sharing=GROUPS, ratio=ratio)


def converted(ratio: float = 1, **options: Any) -> Any:
    return convert_(Net(), net_plan(ratio), **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_warm_started_model_comes_back_bit_for_bit(name: str) -> None:
    build, size, settings = MODELS[name]
    model = build()
    original = copy.deepcopy(model)
    before = dict(model.named_parameters())
    convert_(model, plan_model(model, size, **settings), warm_start="cells")
    dynamic = {n for n, m in model.named_modules() if isinstance(m, _KWLayer)}
    assert dynamic
    assert to_static_(model) is model

    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert repr(model) == repr(original)
    for key, parameter in model.named_parameters():
        if key.removesuffix(".weight") not in dynamic:
            assert parameter is before[key]
        assert parameter.requires_grad
    x = torch.randn(2, *size)
    assert torch.equal(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_attention_has_a_static_equal_too(name: str) -> None:
    build, size, settings = MODELS[name]
    model = build()
    original = copy.deepcopy(model)
    to_static_(convert_(model, plan_model(model, size, **settings), warm_start=True))
    for key, tensor in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ratio", [1, 0.5, 0.1])
@pytest.mark.parametrize("mode", [True, "cells"])
def test_with_fewer_cells_the_static_model_is_the_approximation(ratio: float, mode: Any) -> None:
    model = converted(ratio, warm_start=mode).double().eval()
    x = torch.randn(2, *IMAGE, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(to_static_(model)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 2, 0.5])
def test_a_model_trained_at_temperature_one_keeps_its_function(ratio: float) -> None:
    model = set_temperature_(converted(ratio), 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, *IMAGE, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(2, *IMAGE, dtype=torch.float64)
    expected = model(x)
    assert not any(isinstance(m, (_KWLayer, Warehouse)) for m in to_static_(model).modules())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_layer_under_two_names_stays_one_layer() -> None:
    model = to_static_(converted(warm_start=True))
    assert type(model.a) is nn.Conv2d
    assert model.a is model.again


def test_mode_dtype_and_frozen_cells_are_kept() -> None:
    model = converted(warm_start="cells").to(torch.bfloat16)
    model.a.eval()
    model.kw_warehouses["down"].cells.requires_grad_(False)
    to_static_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.a.training, model.b.training) == (False, True)
    assert (model.b.weight.requires_grad, model.down.weight.requires_grad) == (True, False)
    assert model.down.bias.requires_grad


def test_the_static_model_can_be_converted_again() -> None:
    model = to_static_(converted(warm_start="cells"))
    assert not hasattr(model, "kw_warehouses")
    convert_(model, net_plan(0.5))
    assert model.kw_warehouses.warm_start is None


def test_running_statistics_are_left_alone() -> None:
    model = set_temperature_(converted(), 1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms
    to_static_(model)
    for norm in norms:
        assert norm.num_batches_tracked == 0
        assert not norm.running_mean.any()


# What is refused ---------------------------------------------------------------------


def refuse(model: Any, message: str) -> None:
    before = [(name, id(m)) for name, m in model.named_modules()]
    with pytest.raises(PlanError, match=re.escape(message)):
        to_static_(model)
    assert [(name, id(m)) for name, m in model.named_modules()] == before


def test_a_dynamic_layer_is_refused_by_name_and_temperature() -> None:
    model = set_temperature_(converted(), 1)
    model.down.attention.temperature.fill_(0.25)
    refuse(
        model,
        "down is at temperature 0.25: its kernel depends on the input, and no static layer "
        "computes the same; one trained at temperature 1 has a static equal",
    )
    to_static_(set_temperature_(model, 1))


def test_a_warm_started_model_is_refused_once_its_attention_is_trained() -> None:
    model = converted(warm_start=True)
    model(torch.randn(4, *IMAGE)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    refuse(model, "a is at temperature 0: its kernel depends on the input")


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, nn.Sequential, lambda model: torch.compile(model, backend="eager")],
    ids=["parallel", "parent", "compiled"],
)
def test_what_holds_a_converted_model_is_refused(wrap: Callable[[nn.Module], Any]) -> None:
    wrapped = wrap(converted(warm_start=True))
    kind = type(wrapped).__name__
    refuse(
        wrapped,
        f"the model ({kind}) has no kw_warehouses: pass the one that convert_ returned, out of any "
        "wrapper",
    )


def test_a_static_model_is_refused() -> None:
    refuse(Net(), "the model (Net) has no kw_warehouses")
    with pytest.raises(PlanError, match=r"model: expected an nn\.Module, got dict"):
        to_static_({})


def test_a_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    convert_(model, net_plan())
    refuse(model, "a is on the meta device: its temperature and cells have no values")


def test_a_layer_with_hooks_is_refused() -> None:
    model = converted(warm_start="cells")
    model.b.register_forward_hook(lambda *_: None)
    refuse(model, "b carries hooks, which would be lost: remove them first")
