"""Random settings on every backbone: nothing crashes, counts are those of the built network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import kwlayers
from kwlayers import Network, Plan, Settings, plan_network
from kwsearch import zoo
from tests.zoo import IMAGES

MODELS = IMAGES
Budget = tuple[str, float]

ratios = st.one_of(
    st.floats(0.05, 4).map(lambda ratio: round(ratio, 3)),
    st.sampled_from([0.25, 1 / 3, 0.5, 1, 2, 4]),
)
cell_ratios = st.tuples(*2 * [st.sampled_from([1, 1, 0.5, 0.25, 0.3])])
# Cells finer than this make tens of thousands of mixtures in a ResNet101.
settings_of_plans = st.builds(
    Settings,
    cell_ratio=cell_ratios,
    sharing=st.sampled_from(["stage", "position", "layer"]),
    reduction=st.sampled_from([1 / 32, 1 / 16, 1 / 8]),
    basis_ratio=st.sampled_from([1.0, 1.0, 0.25, 1 / 16]),
    spatial_partition=st.booleans(),
    norm=st.sampled_from(["auto", "batch", "layer"]),
)
# The share of the way from the floor to four times the static parameters.
budgets = st.one_of(
    st.tuples(st.just("ratio"), ratios), st.tuples(st.just("params"), st.floats(0, 1))
)


def small(name: str) -> dict[str, int]:
    """Options of a model that runs on 32x32."""
    return {"img_size": 32} if name == "deit_tiny" else {}


@functools.cache
def network(name: str) -> Network:
    with torch.device("meta"):
        return kwlayers.trace(zoo.create(name, **small(name)), (3, 32, 32))


def plan_of(name: str, options: Settings, budget: Budget) -> Plan:
    kind, value = budget
    if kind == "ratio":
        return plan_network(network(name), options, ratio=value)
    with pytest.raises(kwlayers.BudgetError) as error:
        plan_network(network(name), options, params=1)
    floor = error.value.floor.cost().params.total
    target = floor + int(value * max(4 * network(name).params - floor, 0))
    plan = plan_network(network(name), options, params=target)
    assert plan.cost().params.total <= target
    return plan


def built_parts(model: nn.Module) -> dict[str, int]:
    parts = Counter({"total": 0, "kernels": 0, "attention": 0, "unchanged": 0})
    for name, parameter in model.named_parameters():
        parts["total"] += parameter.numel()
        if name.startswith("kw_warehouses."):
            parts["kernels"] += parameter.numel()
        elif ".attention." in f".{name}":
            parts["attention"] += parameter.numel()
        else:
            parts["unchanged"] += parameter.numel()
    return dict(parts)


def check(name: str, options: Settings, budget: Budget) -> Plan:
    """The plan, after building it without data and counting what was built."""
    plan = plan_of(name, options, budget)
    with torch.device("meta"):
        model = kwlayers.convert_(zoo.create(name, **small(name)), plan)
    assert built_parts(model) == vars(plan.cost().params)
    assert len(plan.groups) > 0
    assert Plan.from_dict(plan.to_dict()) == plan
    return plan


def train_a_step(name: str, plan: Plan) -> None:
    """Forward and backward of two images; every parameter takes part."""
    torch.manual_seed(0)
    model = kwlayers.convert_(zoo.create(name, **small(name)), plan)
    kwlayers.set_temperature_(model, 0.5)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, zoo.MODELS[name].num_classes)
    assert out.isfinite().all()
    out.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def sweep(name: str, examples: int, run: Callable[[Settings, Budget], None]) -> None:
    """`run` on random settings, the same every time, others for every backbone."""
    ran = 0

    @seed(MODELS.index(name))
    @settings(max_examples=examples, deadline=None, database=None)
    @given(settings_of_plans, budgets)
    def draw(options: Settings, budget: Budget) -> None:
        nonlocal ran
        run(options, budget)
        ran += 1

    draw()
    assert ran == examples


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("resnet101", "mobilenetv2_100") else ())
        for n in MODELS
    ],
)
def test_random_settings_build_networks_with_the_planned_parameters(name: str) -> None:
    sweep(name, 4, lambda options, budget: check(name, options, budget))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_050", "deit_tiny"])
def test_random_settings_of_small_backbones_train_a_step(name: str) -> None:
    sweep(name, 3, lambda options, budget: train_a_step(name, plan_of(name, options, budget)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_300_random_settings_build_networks_that_train_a_step(name: str) -> None:
    def run(options: Settings, budget: Budget) -> None:
        plan = check(name, options, budget)
        if plan.cost().params.total < 60_000_000:
            train_a_step(name, plan)

    sweep(name, 34, run)


def test_the_sweep_reaches_every_level_budget_and_kind_of_cell() -> None:
    seen: Counter[str] = Counter()

    def note(options: Settings, budget: Budget) -> None:
        seen.update([str(options.sharing), budget[0], f"whole {not options.spatial_partition}"])
        seen.update([f"basis {options.basis_ratio < 1}", options.norm])

    for name in MODELS:
        sweep(name, 4, note)
    wanted = ["stage", "position", "layer", "ratio", "params", "auto", "batch"]
    wanted += ["whole True", "whole False", "basis True", "basis False"]
    assert [item for item in wanted if not seen[item]] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_backbone_is_planned_and_built_at_its_own_input_size(name: str) -> None:
    entry = zoo.MODELS[name]
    with torch.device("meta"):
        model = zoo.create(name)
    plan = kwlayers.plan_model(model, entry.input_size, ratio=1)
    kwlayers.convert_(model, plan)
    assert built_parts(model) == vars(plan.cost().params)
