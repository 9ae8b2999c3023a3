"""Targets, what the solver shows, and what is said when nothing fits."""

from __future__ import annotations

import pytest

from kwlayers.plan import PlanError
from kwlayers.planner import BudgetError, lay_out
from kwlayers.sharing import Settings
from kwsearch import published
from kwsearch.budget import Target, meet, plan_ratio_of
from kwsearch.networks import trace_model
from tests.zoo import IMAGES


def test_half_of_resnet50_is_the_published_setting() -> None:
    outcome = meet(trace_model("resnet50"), Target(ratio=0.5), None, "resnet50")
    cost = outcome.plan.cost()
    assert outcome.published is not None
    assert outcome.published.name == "ResNet50 1/2x"
    # Counted in the official code.
    assert vars(cost.params) == {
        "total": 17_638_264,
        "kernels": 11_712_512,
        "attention": 3_793_744,
        "unchanged": 2_132_008,
    }
    assert cost.macs.total == 8_167_645_248
    assert cost.macs.mixing == 4_070_711_296
    assert cost.macs.attention == 7_749_696
    assert cost.macs.conv + cost.macs.unchanged == 4_089_184_256


def test_settings_of_ones_own_are_not_replaced_by_published_ones() -> None:
    outcome = meet(trace_model("resnet50"), Target(ratio=0.5), Settings(), "resnet50")
    assert outcome.published is None
    assert outcome.plan.warehouses[0].cell == (64, 64, 1, 1)


def test_a_ratio_that_was_not_published_uses_the_defaults() -> None:
    outcome = meet(trace_model("resnet18"), Target(ratio=0.3), None, "resnet18")
    assert outcome.published is None
    # 56, 47, 47 and 27 mixtures of 64, 128, 256 and 512 channels, times 0.3, truncated.
    assert [g.num_cells for g in outcome.plan.groups] == [16, 14, 14, 8]


@pytest.mark.parametrize("name", IMAGES)
def test_parameter_targets_are_met_from_below_and_leave_no_room_for_a_cell(name: str) -> None:
    network = trace_model(name)
    layout = lay_out(network, Settings())
    floor = layout.floor().cost().params.total
    targets = [floor + (4 * network.params - floor) * i // 19 for i in range(20)]
    for target in targets:
        plan = meet(network, Target(params=target)).plan
        total = plan.cost().params.total
        assert total <= target
        cells = [group.num_cells for group in plan.groups]
        steps = [
            layout.sized([n + (i == k) for k, n in enumerate(cells)]).cost().params.total - total
            for i in range(len(cells))
        ]
        assert min(steps) > target - total
        assert target - total <= max(0.005 * target, min(steps))


def test_a_total_ratio_is_a_share_of_the_static_parameters() -> None:
    network = trace_model("resnet18")
    outcome = meet(network, Target(total_ratio=0.5))
    assert outcome.plan.cost().params.total <= 11_689_512 // 2
    assert outcome.plan.cost().params.total > 0.995 * 11_689_512 / 2


def test_the_trade_shows_each_plan_once_and_the_chosen_one_first() -> None:
    outcome = meet(trace_model("mobilenetv2_100"), Target(params=3_000_000))
    plans = [candidate.plan for candidate in outcome.candidates]
    assert len(plans) > 1
    assert plans[0] == outcome.plan
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    spreads = [candidate.solution.spread for candidate in outcome.candidates]
    assert spreads[0] == min(spreads)
    mixing = {c.why: c.plan.cost().macs.mixing for c in outcome.candidates}
    assert mixing["fewest mixing MACs"] == min(mixing.values())


def test_a_target_below_the_floor_names_what_binds_and_what_is_near() -> None:
    with pytest.raises(BudgetError) as raised:
        meet(trace_model("resnet18"), Target(params=100_000))
    message = str(raised.value)
    # conv1 64*3*49, fc 513*1000 - 1000 + 1000 = 513,000, twenty batch norms 9,600;
    # one cell each of 64^2, 128^2, 256^2 and 512^2.
    assert "params 100,000: below the floor of 973,770" in message
    assert "unchanged 532,008 [fc 513,000 + conv1 9,408 + norms and others 9,600]" in message
    assert "one cell in each of 4 warehouses 348,160" in message
    assert "try --cell-ratio 0.5,0.5: floor " in message
    assert raised.value.floor.cost().params.total == 973_770


def test_the_nearest_settings_say_whether_they_reach_the_target() -> None:
    with pytest.raises(BudgetError, match=r"--cell-ratio 0\.5,0\.5: floor [\d,]+, reaches"):
        meet(trace_model("resnet18"), Target(params=900_000))


def test_two_targets_are_one_too_many() -> None:
    with pytest.raises(PlanError, match="one target at a time, got ratio and params"):
        Target(ratio=1, params=10)


def test_a_ratio_is_shown_as_reached_and_kept_as_asked() -> None:
    outcome = meet(trace_model("resnet20"), Target(ratio=0.0001))
    # Of one cell each: 6 * 9 + 18 + 2, 5 * 9 + 18 + 2 and 5 * 9 mixtures.
    assert outcome.ratio == 3 / 184
    assert {group.ratio for group in outcome.plan.groups} == {0.0001}
    assert outcome.plan.notes == (
        "b = 0.0163, not 0.0001, as cells are whole and every warehouse has one: "
        "3 cells over 184 mixtures",
    )
    assert meet(trace_model("resnet50"), Target(ratio=0.5), None, "resnet50").ratio == 0.5


@pytest.mark.parametrize("model", published.TITLES)
def test_published_ratios_are_reached(model: str) -> None:
    entries = published.of_model(model)
    assert entries
    for entry in entries:
        assert entry.plan(trace_model(model)).notes == ()


def test_the_ratio_of_a_solved_plan_is_its_cells_over_its_mixtures() -> None:
    plan = meet(trace_model("resnet18"), Target(params=8_000_000)).plan
    cells = sum(group.num_cells for group in plan.groups)
    assert plan_ratio_of(plan) == cells / (56 + 47 + 47 + 27)
