"""The search space: every sample is a plan on the budget."""

from __future__ import annotations

import functools
import math
import random
import re
from typing import Any

import optuna
import pytest
import torch

from kwlayers import Rule, convert_
from kwlayers.plan import Network, Plan, PlanError, Site
from kwlayers.planner import BudgetError
from kwlayers.sharing import Settings
from kwsearch.budget import Target
from kwsearch.latency.predict import Latency
from kwsearch.networks import build_model, trace_model
from kwsearch.recipe import Space as Section
from kwsearch.shapes import Shape
from kwsearch.space import Sample, Space, fingerprint

WIDE = Section(
    split=3,
    cell_ratio=[1, 0.5, [0.5, 1]],
    sharing=["stage", "position", "layer"],
    reduction=[0.0625, 0.03125],
    basis_ratio=[1, 0.25],
)
# Every dimension, and some layers of each network that may stay static.
STATIC = {
    "resnet18": ["layer4.*"],
    "resnet50": ["layer4.*.conv[13]", "layer1.*"],
    "mobilenetv2_100": ["blocks.*.conv_dw"],
    "convnext_tiny": ["stages.3.*"],
}
REACHABLE = [
    (model, total_ratio)
    for model in STATIC
    for total_ratio in (0.4, 0.5, 1.0, 2.0)
    if (model, total_ratio) != ("mobilenetv2_100", 0.4)
]

network = functools.cache(trace_model)


def space(model: str, target: Target, section: Section = WIDE) -> Space:
    return Space(network(model), Settings(), target, section)


def widest(model: str) -> Section:
    return WIDE.model_copy(
        update={
            "sharing_by_stage": True,
            "spatial_partition": (True, False),
            "keep_static": (tuple(STATIC[model]),),
            "temperature_epochs": (0, 3),
        }
    )


def random_plans(whole: Space, count: int) -> list[tuple[Sample, Plan]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    samples = [whole.sample(study.ask()) for _ in range(count)]
    return [(sample, whole.project(sample)) for sample in samples]


def assert_within_one_percent(plan: Plan, model: str, total_ratio: float) -> None:
    target = total_ratio * network(model).params
    assert 0.99 * target <= plan.cost().params.total <= target


def assert_builds(plan: Plan, model: str) -> None:
    with torch.device("meta"):
        built = convert_(build_model(model), plan)
    assert sum(p.numel() for p in built.parameters()) == plan.cost().params.total


@pytest.mark.parametrize(
    ("model", "total_ratio"),
    [
        pytest.param(*one, marks=() if one[1] in (0.5, 2.0) else pytest.mark.slow)
        for one in REACHABLE
    ],
)
def test_every_sample_is_on_the_budget_and_at_most_one_percent_below(
    model: str, total_ratio: float
) -> None:
    plans = random_plans(space(model, Target(total_ratio=total_ratio), widest(model)), 8)
    for _, plan in plans:
        assert_within_one_percent(plan, model, total_ratio)
    assert_builds(plans[-1][1], model)
    assert len({fingerprint(plan) for _, plan in plans}) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("model", "total_ratio"), REACHABLE)
def test_a_thousand_samples_are_on_the_budget(model: str, total_ratio: float) -> None:
    plans = random_plans(space(model, Target(total_ratio=total_ratio), widest(model)), 1000)
    for _, plan in plans:
        assert_within_one_percent(plan, model, total_ratio)
    for _, plan in plans[:50]:
        assert_builds(plan, model)


def test_no_shape_of_mobilenet_reaches_four_tenths() -> None:
    # A converted layer has 16 attention weights per input channel at least, a static one its
    # kernel: with the parameters outside of both, that is more than the target.
    traced = network("mobilenetv2_100")
    sites = [site for site in traced.sites if site.name != "classifier"]
    kernels = [math.prod(site.kernel) for site in sites]
    least = traced.params - sum(kernels)
    least += sum(min(16 * s.in_channels, k) for s, k in zip(sites, kernels, strict=True))
    assert least == 1_517_624 > 0.4 * traced.params
    with pytest.raises(
        BudgetError, match=r"(?s)below the floor of 1,983,660.*the lowest floor found in"
    ):
        space("mobilenetv2_100", Target(total_ratio=0.4), widest("mobilenetv2_100"))


@pytest.mark.parametrize("model", ["resnet18", "convnext_tiny"])
def test_no_plan_can_take_one_more_cell(model: str) -> None:
    whole = space(model, Target(total_ratio=0.5), widest(model))
    for sample, plan in random_plans(whole, 10):
        cells = [group.num_cells for group in plan.groups]
        layout = whole._layout(sample.shape)
        assert all(
            layout.sized([n + (i == k) for k, n in enumerate(cells)]).cost().params.total
            > whole.allowed
            for i in range(len(cells))
        )


def test_the_start_is_the_uniform_plan() -> None:
    whole = space("resnet20", Target(total_ratio=0.5), WIDE)
    assert whole.project(whole.sample(_start(whole))) == whole.uniform
    assert (
        whole.uniform.groups
        == Space(network("resnet20"), Settings(), Target(total_ratio=0.5), Section()).uniform.groups
    )


def test_a_ratio_budget_allows_what_its_uniform_plan_spends() -> None:
    whole = space("resnet18", Target(ratio=0.5))
    assert whole.allowed == whole.uniform.cost().params.total
    assert [group.ratio for group in whole.uniform.groups] == [0.5] * 4


def test_relative_ratios_move_the_budget_between_warehouses() -> None:
    whole = space("resnet18", Target(params=8_000_000))
    even = {"stage0_conv": 1.0, "stage1_conv": 1.0, "stage2_conv": 1.0, "stage3_conv": 1.0}
    late = whole.project(Sample(Shape(Settings()), even | {"stage3_conv": 2.0}))
    early = whole.project(Sample(Shape(Settings()), even | {"stage3_conv": 0.5}))
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
    assert sample.shape.settings.sharing == "stage"


def test_settings_out_of_reach_start_from_their_nearest_neighbour() -> None:
    whole = Space(
        network("resnet18"),
        Settings(sharing="layer"),
        Target(params=1_200_000),
        Section(sharing=["stage"]),
    )
    assert [group.name for group in whole.uniform.groups] == [f"stage{i}_conv" for i in range(4)]
    assert whole.start()["sharing"] == "stage"
    assert whole.project(whole.sample(_start(whole))) == whole.uniform


def test_a_budget_below_the_floor_is_refused_before_the_search() -> None:
    with pytest.raises(BudgetError, match="below the floor of 973,770"):
        space("resnet18", Target(params=500_000))


def layers(*channels: int) -> Network:
    """Two 1x1 convolutions of each width, on one position, beside 1,000 other parameters."""
    sites = tuple(Site(f"{letter}{c}", "conv2d", c, c, (1, 1)) for c in channels for letter in "ab")
    weights = sum(math.prod(site.kernel) for site in sites)
    return Network(sites, weights + 1000, weights, (3, 1, 1))


def test_single_cells_change_warehouses_to_reach_the_band() -> None:
    # A warehouse of width c with n cells for 2 mixtures has n * c² + 2 * (16c + 32) + 34(n + 1)
    # parameters: 40 makes 1,634 n + 1,378 and 48 makes 2,338 n + 1,634.
    def total(n40: int, n48: int) -> int:
        return 1000 + 1634 * n40 + 1378 + 2338 * n48 + 1634

    sharing = {"w40": ["?40"], "w48": ["?48"]}
    target = total(5, 2)
    # At one ratio they get 3 cells each, and the 930 that are left, 5 %, are no cell of either.
    assert target - total(3, 3) == 930
    whole = Space(
        layers(40, 48), Settings(sharing=sharing), Target(params=target), Section(split=2)
    )
    plan = whole.project(Sample(whole._start, {"w40": 1.001, "w48": 1.0}))
    assert plan.cost().params.total >= 0.99 * target
    assert [group.num_cells for group in plan.groups] == [5, 2]


def test_cells_too_coarse_for_the_band_are_refused_or_moved() -> None:
    # 4,096 for a cell and 34 for its attention: the 2,000 that are left are half of one more.
    sharing = {"all": ["?64"]}
    two_cells = 1000 + 2 * 4096 + 2 * (16 * 64 + 32) + 34 * 3
    target = Target(params=two_cells + 2000)
    with pytest.raises(BudgetError, match=f"too coarse, and the closest has {two_cells:,};"):
        Space(layers(64), Settings(sharing=sharing), target, Section())
    whole = Space(
        layers(64), Settings(sharing=sharing), target, Section(cell_ratio=[0.25], tolerance=0.05)
    )
    assert whole.start()["cell_ratio"] == "0.25,0.25"
    loose = Space(layers(64), Settings(sharing=sharing), target, Section(tolerance=0.2))
    assert loose.uniform.cost().params.total == two_cells


def test_the_sharing_of_each_stage_is_a_choice_of_its_own() -> None:
    section = WIDE.model_copy(update={"sharing_by_stage": True})
    whole = space("resnet18", Target(total_ratio=1.0), section)
    changes = {"sharing/stage1": "layer", "sharing/stage3": "position"}
    trial = optuna.trial.FixedTrial(
        whole.start() | changes | _ratios(whole, {1: "layer", 3: "position"})
    )
    names = [group.name for group in whole.project(whole.sample(trial)).groups]
    assert [name for name in names if name.startswith("stage")] == [
        "stage0_conv",
        "stage2_conv",
        "stage3_conv1",
        "stage3_conv0",
    ]
    # Stage 1: what is left of layer2, and the layers that open layer3.
    assert [name for name in names if name.startswith("layer")] == [
        "layer2_0_conv2",
        "layer2_1_conv1",
        "layer2_1_conv2",
        "layer3_0_conv1",
        "layer3_0_downsample_0",
    ]


def test_sharing_by_stage_needs_rules_to_choose_from() -> None:
    target = Target(params=8_000_000)
    with pytest.raises(PlanError, match="nothing to choose from; list rules besides 'stage'"):
        space("resnet18", target, Section(sharing_by_stage=True))
    groups = Settings(sharing={"all": ["layer*.conv?"]})
    with pytest.raises(PlanError, match="sharing_by_stage: the method's sharing is explicit"):
        Space(network("resnet18"), groups, target, Section(sharing_by_stage=True))


def test_layers_that_are_kept_static_are_in_no_warehouse() -> None:
    section = Section(keep_static=[["layer4.*", "layer1.0.conv2"]], split=1)
    whole = space("resnet18", Target(total_ratio=1.0), section)
    plan = whole.project(
        whole.sample(optuna.trial.FixedTrial({"keep_static": "layer4.*,layer1.0.conv2"}))
    )
    kept = {layer for group in whole.uniform.groups for layer in group.layers}
    kept -= {layer for group in plan.groups for layer in group.layers}
    assert len(kept) == 6  # of layer4: conv1, the shortcut and three more; and layer1.0.conv2
    assert all(name.startswith("layer4.") for name in kept - {"layer1.0.conv2"})
    assert_within_one_percent(plan, "resnet18", 1.0)
    assert_builds(plan, "resnet18")


def test_kept_layers_leave_explicit_groups_too() -> None:
    settings = Settings(sharing={"early": ["layer[12].*conv*"], "late": ["layer4.*conv*"]})
    whole = Space(
        network("resnet18"),
        settings,
        Target(total_ratio=1.0),
        Section(keep_static=[["layer4.*", "layer1.*"]], split=1),
    )
    trial = optuna.trial.FixedTrial({"keep_static": "layer4.*,layer1.*"})
    groups = whole.project(whole.sample(trial)).groups
    assert [group.name for group in groups] == ["early"]
    assert all(layer.startswith("layer2.") for layer in groups[0].layers)


def test_a_pattern_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match=r"keep_static: no convolution .* is named 'layer9\.\*'"):
        space("resnet18", Target(params=8_000_000), Section(keep_static=[["layer9.*"]]))


def test_a_choice_that_cannot_be_is_refused_before_the_search() -> None:
    groups = Settings(sharing={"all": ["layer[12].*"]})  # with a 1x1 shortcut among the 3x3
    with pytest.raises(PlanError, match="without spatial partition all kernels"):
        Space(network("resnet18"), groups, Target(ratio=0.5), Section(spatial_partition=[False]))


def test_cells_that_span_the_kernel_are_a_choice() -> None:
    whole = space("resnet18", Target(total_ratio=0.5), Section(spatial_partition=[False], split=1))
    sample = whole.sample(optuna.trial.FixedTrial({"spatial_partition": "no"}))
    assert {group.cell[2:] for group in whole.project(sample).groups} == {(1, 1), (3, 3)}


def test_the_temperature_is_sampled_and_changes_no_plan() -> None:
    whole = space("resnet18", Target(ratio=0.5), Section(temperature_epochs=[0, 3], split=1))
    epochs = {}
    for label in ("proxy", 0.0, 3.0):
        sample = whole.sample(optuna.trial.FixedTrial({"temperature_epochs": label}))
        epochs[label] = sample.temperature_epochs
        assert whole.project(sample) == whole.uniform
    assert epochs == {"proxy": None, 0.0: 0, 3.0: 3}
    assert whole.start() == {"temperature_epochs": "proxy"}


def test_every_sample_keeps_the_limit_on_macs() -> None:
    free = space("resnet18", Target(total_ratio=1.0))
    all_macs = [plan.cost().macs.total for _, plan in random_plans(free, 30)]
    limit = sorted(all_macs)[5]
    section = WIDE.model_copy(update={"limits": WIDE.limits.model_copy(update={"macs": limit})})
    whole = space("resnet18", Target(total_ratio=1.0), section)
    plans = random_plans(whole, 30)
    assert max(plan.cost().macs.total for _, plan in plans) <= limit
    for _, plan in plans:
        assert_within_one_percent(plan, "resnet18", 1.0)
    assert len({fingerprint(plan) for _, plan in plans}) == 30


def test_a_limit_that_no_plan_keeps_is_refused_with_the_fewest_macs() -> None:
    # The layers' own products alone are more.
    section = WIDE.model_copy(
        update={"limits": WIDE.limits.model_copy(update={"macs": network("resnet18").macs})}
    )
    with pytest.raises(BudgetError, match=r"macs 1,814,073,344: the fewest found at .* are 1,8"):
        space("resnet18", Target(total_ratio=0.5), section)


def test_the_size_is_the_product_of_the_choices() -> None:
    section = widest("resnet18")
    # cells, sharing of four stages, reductions, bases, partition, static or not, temperatures
    assert space("resnet18", Target(ratio=1.0), section).size() == 3 * 3**4 * 2 * 2 * 2 * 2 * 3
    assert space("resnet18", Target(ratio=1.0)).size() == 3 * 3 * 2 * 2
    assert space("resnet18", Target(ratio=1.0), Section()).size() == 1


def test_the_warehouses_are_counted_over_all_shapes() -> None:
    # 4 stages; 19 convolutions after the stem and the first without a stage to share with.
    assert space("resnet18", Target(ratio=1.0)).warehouses() == (4, 19)
    assert space("resnet18", Target(ratio=1.0), Section()).warehouses() == (4, 4)
    by_stage = WIDE.model_copy(update={"sharing_by_stage": True})
    assert space("resnet18", Target(ratio=1.0), by_stage).warehouses() == (4, 19)


def test_the_valid_share_counts_plans_that_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = space("resnet20", Target(total_ratio=0.5))
    assert whole.valid_share(20, seed=1) == 1.0
    floor, plans = whole._layout(Shape(Settings())).floor(), iter(range(20))

    def project(sample: Sample) -> Plan:
        return floor if next(plans) % 4 == 0 else whole.uniform

    monkeypatch.setattr(whole, "project", project)
    assert whole.valid_share(20, seed=1) == 0.75


def test_random_points_repeat_with_their_seed() -> None:
    whole = space("resnet18", Target(total_ratio=0.5), widest("resnet18"))
    once, again, other = (whole.random(random.Random(seed)) for seed in (7, 7, 8))
    assert once == again != other


def test_neighbours_are_other_plans_and_repeatable() -> None:
    whole = space("resnet18", Target(params=8_000_000))
    sample = Sample(Shape(Settings()), {f"stage{i}_conv": 1.0 for i in range(4)}, 3)
    first = list(whole.neighbours(sample, 1))
    assert first == list(whole.neighbours(sample, 1))
    assert len({fingerprint(whole.project(other)) for other in first[:200]}) > 50
    assert {other.shape.settings.sharing for other in first} == {"stage", "position", "layer"}
    # Other temperatures, of which the proxy's is one, come after 80 splits at this one.
    assert {other.temperature_epochs for other in first[:80]} == {3}
    assert {other.temperature_epochs for other in first} == {3, None}


def test_without_a_split_the_neighbours_are_all_shapes() -> None:
    section = WIDE.model_copy(update={"split": 1.0})
    whole = space("resnet18", Target(params=8_000_000), section)
    sample = Sample(Shape(Settings()), {f"stage{i}_conv": 1.0 for i in range(4)})
    plans = {fingerprint(whole.project(other)) for other in whole.neighbours(sample, 0)}
    # 3 cell ratios, 3 sharings, 2 reductions, 2 bases, and all of them are reachable.
    assert len(plans) == 36


def test_explicit_groups_can_be_searched() -> None:
    settings = Settings(sharing={"early": ["layer[12].*conv*"], "late": ["layer[34].*conv*"]})
    whole = Space(network("resnet18"), settings, Target(ratio=0.5), Section(cell_ratio=[1, 0.5]))
    trial = optuna.trial.FixedTrial(whole.start() | {"cell_ratio": "0.5,0.5"})
    assert whole.project(whole.sample(trial)).cost().params.total <= whole.allowed


def test_a_fingerprint_is_of_the_plan_and_not_of_its_names() -> None:
    whole = space("resnet20", Target(total_ratio=0.5))
    plan = whole.uniform
    assert fingerprint(plan) == fingerprint(whole.project(whole.sample(_start(whole))))
    more = whole._layout(Shape(Settings())).sized([g.num_cells + 1 for g in plan.groups])
    assert fingerprint(plan) != fingerprint(more)


def _start(whole: Space) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(whole.start())


def _ratios(whole: Space, rules: dict[int, str]) -> dict[str, Any]:
    """Equal ratios for the warehouses of the start with these rules in some stages."""
    by_stage = tuple((stage, rules.get(stage, rule)) for stage, rule in whole._start.stage_sharing)
    shape = Shape(whole._start.settings, stage_sharing=by_stage)
    return {f"relative_ratio/by_stage/{name}": 1.0 for name in whole._even(shape)}


def test_a_plan_of_unknown_latency_does_not_count() -> None:
    known: set[str] = set()
    asked: list[str] = []

    def latency(plan: Plan) -> Latency:
        asked.append(fingerprint(plan))
        if asked[-1] not in known:
            raise PlanError("the table says nothing")
        return Latency(1, 0.9, 1.1, 1, 0, 0, 0)

    limits = WIDE.limits.model_copy(update={"lut": "t.yaml", "latency_ms": 2})
    section = Section(split=2).model_copy(update={"limits": limits})
    given = network("resnet18"), Settings(), Target(ratio=0.5), section
    with pytest.raises(BudgetError, match=r"limits\.latency_ms 2: .*; the table says nothing"):
        Space(*given, latency)
    known.add(asked[0])
    plans = [plan for _, plan in random_plans(Space(*given, latency), 5)]
    assert {fingerprint(plan) for plan in plans} == known


FAMILY = Section(
    split=2,
    tolerance=0.02,
    reduction=[0.0625, 0.03125],
    method=["kernel_warehouse", "odconv", "dyconv", "kernel_dna", "pad_net"],
    methods={"odconv": {"reduction": [0.125]}, "pad_net": {"num_kernels": [2, 4]}},
)


def test_samples_of_every_method_are_on_one_budget() -> None:
    whole = space("resnet18", Target(total_ratio=1.5), FAMILY)
    allowed = int(1.5 * network("resnet18").params)
    seen = set()
    for _, plan in random_plans(whole, 60):
        (method,) = {group.method for group in plan.groups}
        seen.add(method)
        deployed = plan.cost().deployed
        # KernelDNA shares kernels and has no use for more parameters.
        assert deployed <= allowed
        assert deployed >= 0.98 * allowed or method == "kernel_dna"
        assert_builds(plan, "resnet18")
    assert seen == set(FAMILY.method)
    assert whole.valid_share(40, 0) == 1.0


def test_a_choice_is_made_only_where_the_method_has_it() -> None:
    whole = space("resnet18", Target(total_ratio=1.5), FAMILY)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    asked: dict[str, set[str]] = {}
    for _ in range(60):
        trial = study.ask()
        whole.sample(trial)
        names = {name for name in trial.params if not name.startswith("relative_ratio/")}
        asked.setdefault(trial.params["method"], set()).update(names - {"method"})
    assert asked == {
        "kernel_warehouse": {"reduction"},
        "odconv": {"reduction", "odconv/reduction"},
        "dyconv": {"reduction"},
        "kernel_dna": {"reduction"},
        "pad_net": {"reduction", "pad_net/num_kernels"},
    }


def test_the_size_is_the_sum_over_methods() -> None:
    methods = {"odconv": {"norm": ["layer"], "reduction": [0.25]}}
    whole = space("resnet18", Target(total_ratio=2), Section(method=["odconv"], methods=methods))
    # KernelWarehouse as it is; ODConv by either norm and with either reduction.
    assert whole.size() == 1 + 2 * 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"method": ["odconv"], "methods": {"odconv": {"num_kernels": [2]}}},
            "search.space.methods.odconv.num_kernels: it is what the budget decides",
        ),
        ({"methods": {"odconv": {"reduction": [0.25]}}}, "odconv: list it in search.space.method"),
        (
            {"method": ["odconv"], "methods": {"odconv": {"cells": [1]}}},
            "search.space.methods.odconv: there is no cells; its settings are num_kernels, ",
        ),
        (
            {"method": ["odconv"], "methods": {"odconv": {"reduction": [2]}}},
            "search.space.methods.odconv: reduction 2: allowed is a number above 0 and at most 1",
        ),
    ],
)
def test_methods_that_cannot_be_searched_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        space("resnet18", Target(total_ratio=2), Section(**section))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "section", "name"),
    [
        ("fdconv", {"reduction": [0.25]}, "search.space.reduction"),
        (
            "pad_net",
            {"methods": {"pad_net": {"dynamic_fraction": [0.5]}}},
            "search.space.methods.pad_net.dynamic_fraction",
        ),
    ],
)
def test_a_size_is_no_choice(method: str, section: dict[str, Any], name: str) -> None:
    from kwlayers.methods import find

    with pytest.raises(PlanError, match=f"{re.escape(name)}: it is what the budget decides"):
        Space(
            network("resnet18"),
            find(method).settings(),
            Target(total_ratio=1.2),
            Section(split=2, **section),
        )


def test_relative_ratios_of_rules_hold_for_every_sample() -> None:
    """Half as many cells over mixtures where a rule says so, whatever the cells."""
    settings = Settings(sharing="layer", rules=(Rule(["layer4.*"], ratio=0.25),))
    found = Space(
        network("resnet18"), settings, Target(ratio=0.5), Section(cell_ratio=[[0.5, 0.5]], split=1)
    )
    shapes = [sample for sample, _ in random_plans(found, 8)]
    assert len({str(sample.shape) for sample in shapes}) == 2
    for sample in shapes:
        plan = found.project(sample)
        ratios = []
        for last in (False, True):
            own = [g for g in plan.warehouses if g.layers[0].startswith("layer4.") == last]
            units = sum(group.unit(plan.of(group)) for group in own)
            ratios.append(sum(group.num_cells for group in own) / units)
        assert ratios[1] / ratios[0] == pytest.approx(0.5, rel=0.15)  # cells are whole


def test_a_choice_of_no_method_is_refused() -> None:
    from kwlayers.methods import find

    with pytest.raises(PlanError, match=r"search\.space\.cell_ratio: odconv has no cell_ratio"):
        Space(
            network("resnet18"),
            find("odconv").settings(),
            Target(total_ratio=2),
            Section(cell_ratio=[0.5]),
        )
