"""The search space: every sample is a plan on the budget."""

from __future__ import annotations

import optuna
import pytest

from kwlayers.planner import BudgetError, Settings
from kwsearch.budget import Target
from kwsearch.networks import trace_model
from kwsearch.recipe import Space as Section
from kwsearch.space import Sample, Space, fingerprint

WIDE = Section(
    split=3,
    cell_ratio=[1, 0.5, [0.5, 1]],
    sharing=["stage", "position", "layer"],
    reduction=[0.0625, 0.03125],
    basis_ratio=[1, 0.25],
)


def space(model: str, target: Target, section: Section = WIDE) -> Space:
    return Space(trace_model(model), Settings(), target, section)


@pytest.mark.parametrize(
    ("model", "total_ratio"),
    [("resnet18", 0.4), ("resnet50", 0.5), ("mobilenetv2_100", 1.0), ("resnet20", 0.5)],
)
def test_every_sample_is_on_the_budget(model: str, total_ratio: float) -> None:
    whole = space(model, Target(total_ratio=total_ratio))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        sample = whole.sample(study.ask())
        plan = whole.project(sample)
        total = plan.cost().params.total
        assert total <= whole.allowed
        cells = [group.num_cells for group in plan.groups]
        layout = whole._layout(sample.settings)
        assert all(
            layout.sized([n + (i == k) for k, n in enumerate(cells)]).cost().params.total
            > whole.allowed
            for i in range(len(cells))
        )
        seen.add(sample.settings.sharing)
    assert len(seen) > 1


def test_the_start_is_the_uniform_plan() -> None:
    whole = space("resnet20", Target(total_ratio=0.5))
    trial = optuna.trial.FixedTrial(whole.start())
    assert whole.project(whole.sample(trial)) == whole.uniform


def test_a_ratio_budget_allows_what_its_uniform_plan_spends() -> None:
    whole = space("resnet18", Target(ratio=0.5))
    assert whole.allowed == whole.uniform.cost().params.total
    assert [group.ratio for group in whole.uniform.groups] == [0.5] * 4


def test_relative_ratios_move_the_budget_between_warehouses() -> None:
    whole = space("resnet18", Target(params=8_000_000))
    even = {"stage0_conv": 1.0, "stage1_conv": 1.0, "stage2_conv": 1.0, "stage3_conv": 1.0}
    late = whole.project(Sample(Settings(), even | {"stage3_conv": 2.0}))
    early = whole.project(Sample(Settings(), even | {"stage3_conv": 0.5}))
    assert late.groups[3].num_cells > whole.uniform.groups[3].num_cells
    assert early.groups[3].num_cells < whole.uniform.groups[3].num_cells
    # Stage 2 has 47 mixtures, stage 3 has 27: twice the ratio within a cell of either.
    b2, b3 = (late.groups[i].num_cells / m for i, m in ((2, 47), (3, 27)))
    assert abs(b3 / 2 - b2) <= 1 / 47 + 1 / 27


def test_a_shape_out_of_reach_becomes_its_nearest_neighbour() -> None:
    # One warehouse per layer needs 2,017,230 parameters at least, one per stage 973,770.
    whole = space(
        "resnet18", Target(params=1_200_000), Section(sharing=["stage", "layer"], split=1)
    )
    sample = whole.sample(optuna.trial.FixedTrial({"sharing": "layer"}))
    assert sample.settings.sharing == "stage"


def test_a_budget_below_the_floor_is_refused_before_the_search() -> None:
    with pytest.raises(BudgetError, match="below the floor of 973,770"):
        space("resnet18", Target(params=500_000))


def test_neighbours_are_other_plans_and_repeatable() -> None:
    whole = space("resnet18", Target(params=8_000_000))
    sample = Sample(Settings(), {f"stage{i}_conv": 1.0 for i in range(4)})
    first = list(whole.neighbours(sample, 1))
    assert first == list(whole.neighbours(sample, 1))
    assert len({fingerprint(whole.project(other)) for other in first}) > 50
    assert {other.settings.sharing for other in first} == {"stage", "position", "layer"}


def test_without_a_split_the_neighbours_are_all_shapes() -> None:
    section = WIDE.model_copy(update={"split": 1.0})
    whole = space("resnet18", Target(params=8_000_000), section)
    sample = Sample(Settings(), {f"stage{i}_conv": 1.0 for i in range(4)})
    plans = {fingerprint(whole.project(other)) for other in whole.neighbours(sample, 0)}
    # 3 cell ratios, 3 sharings, 2 reductions, 2 bases, and all of them are reachable.
    assert len(plans) == 36


def test_explicit_groups_can_be_searched() -> None:
    settings = Settings(sharing={"early": ["layer[12].*conv*"], "late": ["layer[34].*conv*"]})
    whole = Space(
        trace_model("resnet18"), settings, Target(ratio=0.5), Section(cell_ratio=[1, 0.5])
    )
    trial = optuna.trial.FixedTrial(whole.start() | {"cell_ratio": "0.5,0.5"})
    assert whole.project(whole.sample(trial)).cost().params.total <= whole.allowed


def test_a_fingerprint_is_of_the_plan_and_not_of_its_names() -> None:
    whole = space("resnet20", Target(total_ratio=0.5))
    plan = whole.uniform
    assert fingerprint(plan) == fingerprint(whole.project(whole.sample(_start(whole))))
    more = whole._layout(Settings()).sized([g.num_cells + 1 for g in plan.groups])
    assert fingerprint(plan) != fingerprint(more)


def _start(whole: Space) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(whole.start())
