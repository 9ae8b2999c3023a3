"""From a budget to a plan: targets met from below, settings checked, errors that say what to do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import kwlayers
from kwlayers import (
    BudgetError,
    Network,
    Plan,
    PlanError,
    Rule,
    Settings,
    Share,
    Site,
    plan_network,
)
from kwlayers.families import recognise
from kwlayers.plan import Other
from kwlayers.planner import lay_out
from kwlayers.rules import NothingToConvert
from kwlayers.sharing import why_static
from kwsearch import zoo
from tests.zoo import IMAGES

MODELS = IMAGES


@functools.cache
def network(name: str) -> Network:
    with torch.device("meta"):
        model = zoo.create(name)
    return kwlayers.trace(model, zoo.MODELS[name].input_size)


def conv(name: str, in_: int, out: int, k: int = 3, **changes: Any) -> Site:
    return Site(name, "conv2d", in_, out, (k, k), positions=16, **changes)


def unknown_network(*more: Site) -> Network:
    """A network of no family: two convolutions of each size between a stem and a head."""
    sites = (
        conv("begin", 3, 8),
        conv("body.a", 8, 8),
        conv("body.b", 8, 16),
        conv("body.c", 16, 32, 1),
        *more,
        Site("out", "linear", 32, 10, (1,), bias=True),
    )
    weights = sum(math.prod(site.kernel) for site in sites)
    macs = sum(site.positions * math.prod(site.kernel) for site in sites)
    return Network(sites, weights + 10, macs, (3, 4, 4))


def refusal(network: Network, settings: Settings | None = None, **budget: Any) -> str:
    with pytest.raises(PlanError) as error:
        plan_network(network, settings or Settings(), **(budget or {"ratio": 1.0}))
    return str(error.value)


def layers(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {group.name: group.layers for group in plan.groups}


def quick_or_slow(name: str) -> object:
    """A model; of two that are alike the larger one takes its time."""
    large = name in ("resnet101", "resnet50", "mobilenetv2_100")
    return pytest.param(name, marks=pytest.mark.slow if large else ())


def floor_of(name: str) -> Plan:
    with pytest.raises(BudgetError) as error:
        plan_network(network(name), Settings(), params=1)
    return error.value.floor


# Parameter targets


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in MODELS])
def test_20_targets_from_the_floor_to_4x_are_met_from_below_and_maximally(name: str) -> None:
    found = network(name)
    floor = floor_of(name).cost().params.total
    for k in range(20):
        target = floor + (4 * found.params - floor) * k // 19
        plan = plan_network(found, Settings(), params=target)
        total = plan.cost().params.total
        assert total <= target
        steps = []
        for index, group in enumerate(plan.groups):
            groups = list(plan.groups)
            groups[index] = replace(group, num_cells=group.num_cells + 1)
            steps.append(Plan(found, tuple(groups)).cost().params.total - total)
        assert min(steps) > 0
        assert total + min(steps) > target, "another cell would have fitted"
        assert target - total <= max(0.005 * target, min(steps))


@pytest.mark.parametrize("name", MODELS)
def test_the_floor_itself_is_met_and_one_parameter_less_is_not(name: str) -> None:
    floor = floor_of(name)
    assert {group.num_cells for group in floor.groups} == {1}
    total = floor.cost().params.total
    assert plan_network(network(name), Settings(), params=total) == floor
    with pytest.raises(BudgetError):
        plan_network(network(name), Settings(), params=total - 1)


def test_a_target_with_a_nonlocal_basis_is_met_from_below_and_maximally() -> None:
    # Attention is not linear in the number of cells here.
    found = network("resnet50")
    settings = Settings(cell_ratio=(0.5, 0.5), basis_ratio=1 / 16)
    for target in (5_000_000, 12_345_678, 17_638_264, 40_000_000):
        plan = plan_network(found, settings, params=target)
        total = plan.cost().params.total
        assert total <= target
        for index, group in enumerate(plan.groups):
            groups = list(plan.groups)
            groups[index] = replace(group, num_cells=group.num_cells + 1)
            assert Plan(found, tuple(groups)).cost().params.total > target


def test_a_target_of_a_ratio_gives_the_cells_of_that_ratio_back() -> None:
    found = network("resnet18")
    by_ratio = plan_network(found, Settings(), ratio=2.0)
    by_params = plan_network(found, Settings(), params=by_ratio.cost().params.total)
    assert [g.num_cells for g in by_params.groups] == [g.num_cells for g in by_ratio.groups]
    assert {g.ratio for g in by_ratio.groups} == {2.0}
    assert {g.ratio for g in by_params.groups} == {None}


def test_a_target_below_the_floor_says_what_the_floor_is_made_of() -> None:
    found = unknown_network()
    # One warehouse per layer, with cells (8, 8), (16, 8) and (32, 16): m = 9, 9 and 1.
    # n = 1, h = 16: C*h + 2h + h*2*m + 2*m.
    attention = (128 + 32 + 288 + 18) + (128 + 32 + 288 + 18) + (256 + 32 + 32 + 2)
    cells = 8 * 8 + 16 * 8 + 32 * 16
    rest = 8 * 3 * 9 + (32 * 10 + 10)
    with pytest.raises(BudgetError) as error:
        plan_network(found, Settings(sharing="layer"), params=1_000)
    assert str(error.value) == (
        f"params 1,000: below the floor of {attention + cells + rest:,} (unchanged {rest} "
        "[out 330 + begin 216 + norms and others 0] + "
        f"attention of 3 layers {attention:,} + one cell in each of 3 warehouses {cells})"
    )
    assert error.value.target == 1_000
    assert error.value.floor.cost().params.total == attention + cells + rest
    with pytest.raises(BudgetError) as error:
        plan_network(found, Settings(sharing={"all": ["body.a"]}), params=1_000)
    assert "attention of 1 layer 466 + one cell in the warehouse 64)" in str(error.value)


def test_the_floor_of_resnet18_is_explained_with_its_published_unchanged_part() -> None:
    message = refusal(network("resnet18"), params=100_000)
    assert message.startswith("params 100,000: below the floor of ")
    assert (
        "(unchanged 532,008 [fc 513,000 + conv1 9,408 + norms and others 9,600] + "
        "attention of 19 layers "
    ) in message
    # Cells of 64^2, 128^2, 256^2 and 512^2.
    assert message.endswith(" + one cell in each of 4 warehouses 348,160)")


# Ratios


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1, 2.5])
def test_a_ratio_sizes_every_warehouse_alike(ratio: float) -> None:
    plan = plan_network(network("mobilenetv2_100"), Settings(), ratio=ratio)
    assert len(plan.groups) == 13
    for group in plan.groups:
        assert group.num_cells == max(int(sum(group.mixtures(plan.of(group))) * ratio), 1)
        assert group.ratio == ratio


def test_a_share_may_have_settings_of_its_own() -> None:
    sharing = {
        "a": Share(["body.a"], ratio=2, cell_ratio=(0.5, 0.25), reduction=0.5, basis_ratio=0.25),
        "b": Share(["body.b"], spatial_partition=False),
    }
    a, b = plan_network(unknown_network(), Settings(sharing=sharing), ratio=1).groups
    # body.a: 2 * 4 * 9 = 72 mixtures.
    assert (a.cell, a.num_cells, a.ratio) == ((4, 2, 1, 1), 144, 2)
    assert (a.reduction, a.basis_ratio) == (0.5, 0.25)
    assert (b.cell, b.num_cells, b.ratio) == ((16, 8, 3, 3), 1, 1)
    assert (b.reduction, b.basis_ratio) == (1 / 16, 1.0)


def test_ratios_of_shares_are_proportions_under_a_parameter_target() -> None:
    sharing = {"a": Share(["body.a"], ratio=2, cell_ratio=(0.5, 0.5)), "b": ["body.b"]}
    plan = plan_network(unknown_network(), Settings(sharing=sharing), params=1_000_000)
    a, b = (group.num_cells / sum(group.mixtures(plan.of(group))) for group in plan.groups)
    assert a / b == pytest.approx(2, rel=0.01)
    assert plan.cost().params.total <= 1_000_000


def test_rounded_cells_are_noted_with_their_warehouse() -> None:
    plan = plan_network(unknown_network(), Settings(sharing="layer", cell_ratio=(0.7, 1)), ratio=1)
    assert plan.notes[0] == (
        "body_a: cell ratio 0.7 of 8 output channels is 5, which does not divide 8: "
        "rounded down to 4"
    )
    assert len(plan.notes) == 3


@pytest.mark.parametrize("budget", [{}, {"ratio": 1.0, "params": 10_000}])
def test_exactly_one_budget_is_given(budget: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as error:
        plan_network(unknown_network(), Settings(sharing="layer"), **budget)
    assert str(error.value) == "give exactly one budget: ratio=0.5 or params=12_000_000"


@pytest.mark.parametrize("ratio", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_ratio_is_a_number_above_0(ratio: Any) -> None:
    message = f"ratio {ratio!r}: it must be a number above 0, at most 1,000"
    refused = refusal(unknown_network(), Settings(sharing="layer"), ratio=ratio)
    assert refused == message
    with pytest.raises(PlanError) as error:
        Share(["body.a"], ratio=ratio)
    assert str(error.value) == message


def test_a_target_beyond_reason_is_refused_and_not_filled() -> None:
    network = unknown_network()
    message = f"params {10**30:,}: over 1,000 times the static model's {network.params:,}"
    assert refusal(network, Settings(sharing="layer"), params=10**30) == message


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell_ratio": (1.0,)}, "cell_ratio (1.0,): two numbers (out, in) in (0, 1]"),
        ({"cell_ratio": 0.5}, "cell_ratio 0.5: two numbers (out, in) in (0, 1]"),
        ({"cell_ratio": (1, 0)}, "cell_ratio (1, 0): two numbers (out, in) in (0, 1]"),
        ({"cell_ratio": (2, 1)}, "cell_ratio (2, 1): two numbers (out, in) in (0, 1]"),
        ({"reduction": 0}, "reduction 0: it must be in (0, 1]"),
        ({"basis_ratio": 1.5}, "basis_ratio 1.5: it must be in (0, 1]"),
        ({"reduction": "1/16"}, "reduction '1/16': it must be in (0, 1]"),
        ({"cell_ratio": ("1", 1)}, "cell_ratio ('1', 1): two numbers (out, in) in (0, 1]"),
        ({"cell_ratio": (True, 1)}, "cell_ratio (True, 1): two numbers (out, in) in (0, 1]"),
        (
            {"sharing": 5},
            "sharing 5: allowed are 'stage', 'position', 'layer', or groups of glob patterns over "
            "module names",
        ),
        ({"rules": 5}, "rules 5: expected a list"),
        (
            {"rules": ["x"]},
            "rules: expected kwlayers.Rule('layer1.*', static=True) and the like, got 'x'",
        ),
        (
            {"rules": [{"layers": "x"}]},
            "rules: expected kwlayers.Rule('layer1.*', static=True) and the like, got "
            "{'layers': 'x'}",
        ),
        ({"norm": "group"}, "norm 'group': allowed are 'auto', 'batch' and 'layer'"),
        (
            {"sharing": "block"},
            "sharing 'block': allowed are 'stage', 'position', 'layer', or groups of glob "
            "patterns over module names",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_is_allowed(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as error:
        Settings(**changes)
    assert str(error.value) == message


def test_a_share_is_checked_before_it_is_used() -> None:
    for wrong, message in (
        (lambda: Share(5), "layers 5: expected a list"),  # type: ignore[arg-type]
        (lambda: Rule([5], static=True), "layers [5]: a glob pattern, or a list of them"),  # type: ignore[list-item]
        (lambda: Rule("a", share=5), "share 5: the name of a warehouse"),  # type: ignore[arg-type]
        (lambda: Rule("a", basis_ratio=2), "basis_ratio 2: it must be in (0, 1]"),
    ):
        with pytest.raises(PlanError) as error:
            wrong()
        assert str(error.value) == message


def test_one_rule_may_stand_alone_and_a_list_is_as_good_as_a_tuple() -> None:
    rule = Rule("body.a", static=True)
    one: Any = rule
    assert Settings(rules=one) == Settings(rules=(rule,)) == Settings(rules=[rule])  # type: ignore[arg-type]
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 16, 16, 1 + i % 2) for i in range(4)))
    plan = kwlayers.plan_model(model, (3, 8, 8), ratio=1, rules=Rule("2", static=True))
    assert layers(plan) == {"stage0_conv": ("1",)}


@pytest.mark.parametrize("cell_ratio", [(1, 0), (2, 1), (0.5,), 0.5])
def test_a_cell_ratio_of_a_share_is_checked_like_any(cell_ratio: Any) -> None:
    with pytest.raises(PlanError, match=r"cell_ratio .* two numbers"):
        Share(["body.a"], cell_ratio=cell_ratio)


def test_settings_reach_every_warehouse() -> None:
    settings = Settings((0.5, 0.25), "layer", 1 / 8, 1 / 4, False, "layer")
    plan = plan_network(unknown_network(), settings, ratio=1)
    assert [group.cell for group in plan.groups] == [(4, 2, 3, 3), (8, 2, 3, 3), (16, 4, 1, 1)]
    for group in plan.groups:
        assert (group.reduction, group.basis_ratio, group.norm) == (1 / 8, 1 / 4, "layer")


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), "batch"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1)),
            "layer",
        ),
    ],
)
def test_auto_norm_is_a_layer_norm_where_the_model_has_no_batch_norm(
    make: Callable[[], nn.Module], norm: str
) -> None:
    for asked, expected in (("auto", norm), ("batch", "batch"), ("layer", "layer")):
        plan = kwlayers.plan_model(make(), (4, 5, 5), ratio=1, sharing=[["2"]], norm=asked)
        assert plan.groups[0].norm == expected


def test_plan_model_hands_every_setting_on() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    options = {
        "cell_ratio": (0.5, 0.25),
        "sharing": [["1", "2"]],
        "reduction": 1 / 8,
        "basis_ratio": 1 / 4,
        "spatial_partition": False,
        "norm": "batch",
    }
    for budget in ({"ratio": 0.5}, {"params": 8_000}):
        plan = kwlayers.plan_model(model, (4, 9, 9), **budget, **options)
        traced = kwlayers.trace(model, (4, 9, 9))
        assert plan == plan_network(traced, Settings(**options), **budget)
        assert plan.groups[0].cell == (4, 2, 3, 3)


# Sharing


@pytest.mark.parametrize("sharing", ["stage", "position", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_in_one_warehouse_or_static_by_its_role(name: str, sharing: str) -> None:
    found = network(name)
    known = recognise(found.sites)
    assert known is not None
    plan = plan_network(found, Settings(sharing=sharing), ratio=1)
    grouped = [layer for group in plan.groups for layer in group.layers]
    static = [layer for layer, label in known.labels.items() if label.static]
    assert sorted(grouped + static) == sorted(site.name for site in found.sites)
    assert len(set(grouped)) == len(grouped) > 0
    assert "fc" not in grouped


@pytest.mark.parametrize("name", MODELS)
def test_each_level_of_sharing_refines_the_one_before(name: str) -> None:
    found = network(name)
    levels = []
    for sharing in ("stage", "position", "layer"):
        plan = plan_network(found, Settings(sharing=sharing), ratio=1)
        levels.append([set(group.layers) for group in plan.groups])
    stage, position, layer = levels
    assert all(any(fine <= coarse for coarse in stage) for fine in position)
    assert len(stage) < len(position) < len(layer)
    assert {len(group) for group in layer} == {1}


# How many of stage, position and layer. By hand: a ResNet has 4 stages of 2 or 3 positions;
# layers without stem, head and (bottlenecks) the first conv1 and downsample.
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet18", (4, 8, 19)),
        ("resnet34", (4, 8, 35)),
        ("resnet50", (4, 12, 50)),
        ("resnet101", (4, 12, 101)),
        ("resnet20", (3, 6, 20)),
        # Stem, 6 stages of dw and pw; pw of stages 1-6 in two positions; 52 convolutions.
        ("mobilenetv2_100", (13, 19, 52)),
        # Stem, 3 downsamples, 4 stages of dw and pw, pw in two positions; 4 + 3 * 18 layers.
        ("convnext_tiny", (12, 16, 58)),
        ("deit_tiny", (2, 4, 48)),
    ],
)
def test_each_level_of_sharing_has_as_many_warehouses_as_the_family_has_parts(
    name: str, counts: tuple[int, ...]
) -> None:
    plans = (
        plan_network(network(name), Settings(sharing=s), ratio=1)
        for s in ("stage", "position", "layer")
    )
    assert tuple(len(plan.groups) for plan in plans) == counts


def test_an_unknown_network_is_shared_by_layer_between_a_static_stem_and_head() -> None:
    plan = plan_network(unknown_network(), Settings(sharing="layer"), ratio=1)
    assert layers(plan) == {"body_a": ("body.a",), "body_b": ("body.b",), "body_c": ("body.c",)}


def test_a_layer_that_cannot_be_converted_stays_static_with_a_note() -> None:
    found = unknown_network(conv("twice", 16, 16, fixed="its weight is tied to another layer's"))
    plan = plan_network(found, Settings(sharing="layer"), ratio=1)
    assert "twice" not in layers(plan)
    assert plan.notes == ("twice stays static: its weight is tied to another layer's",)


def test_a_network_without_convertible_layers_is_refused_with_the_reason() -> None:
    tied = replace(unknown_network(), sites=(conv("a", 8, 8), conv("b", 8, 8, fixed="it is tied")))
    message = (
        "no layer can be converted: a stays static: the first convolution stays static; b stays "
        "static: it is tied (a rule with a share converts what is static by default)"
    )
    assert refusal(tied, Settings(sharing="layer")) == message
    empty = replace(unknown_network(), sites=())
    message = "no layer can be converted: the network has none"
    assert refusal(empty, Settings(sharing="layer")) == message
    up, down = Other("up", "ConvTranspose2d", 64), Other("down", "ConvTranspose2d", 64)
    assert refusal(replace(empty, others=(up, down, Other("", "Net", 9))), Settings()) == (
        "no layer can be converted: up and 1 more: their own weights stay static "
        "(ConvTranspose2d); the model itself: its own weights stay static (Net)"
    )


def test_rules_that_keep_every_layer_static_are_the_reason() -> None:
    rules = (Rule("body.*", static=True), Rule(["begin", "out"], static=True))
    assert refusal(unknown_network(), Settings(rules=rules)) == (
        "no layer can be converted: begin and 1 more stay static: a rule keeps it static "
        "(begin, out); body.a and 2 more stay static: a rule keeps it static (body.*)"
    )
    with pytest.raises(NothingToConvert, match=r"body\.a and 2 more stay static: keep_static has"):
        lay_out(unknown_network(), Settings(), keep_static=["body.*"])


def test_reasons_name_the_last_word_on_each_layer() -> None:
    found = unknown_network(conv("twice", 16, 16, fixed="it is tied"))
    settings = Settings(rules=(Rule(["*.a", "twice", "begin"], static=True),))
    rule = "a rule keeps it static (*.a, twice, begin)"
    assert why_static(found, settings) == {
        "begin": rule,
        "body.a": rule,
        "body.b": "",
        "body.c": "",
        "twice": "it is tied",
        "out": "the last layer stays static",
    }
    grouped = why_static(found, Settings(sharing={"all": ["body.*"]}))
    assert grouped["begin"] == grouped["out"] == "no sharing group has it"


# Kernels that are less than their attention


def narrow_network() -> Network:
    """Between stem and head: attention of at least 96 * 16 + 66 = 1,602 weights each."""
    return unknown_network(
        conv("thin", 96, 16, 1),  # 1,536
        conv("wide", 96, 17, 1),  # 1,632
        conv("depth", 96, 96, groups=96),  # 864
    )


def test_a_layer_that_its_attention_would_outweigh_stays_static_unless_it_is_named() -> None:
    found = narrow_network()
    plan = plan_network(found, Settings(sharing="layer"), ratio=1)
    assert {"wide", "depth"} <= set(layers(plan))
    assert "thin" not in layers(plan)
    cost = {layer.name: layer for layer in plan.cost_by_layer()}
    # One mixture of one cell: 96 -> 16 with its norm, 16 -> 2, and the bias of those.
    assert cost["wide"].attention_params == 96 * 16 + 2 * 16 + 16 * 2 + 2 == 1602
    assert why_static(found, Settings())["thin"] == (
        "even with a single cell, its attention would outweigh its kernel"
    )
    slim = Settings(sharing="layer", reduction=1 / 64)  # hidden: never under 16
    assert "thin" not in layers(plan_network(found, slim, ratio=1))
    for named in (
        Settings(sharing="layer", rules=(Rule("thin", share="thin"),)),
        Settings(sharing={"thin": ["thin"]}),
    ):
        assert layers(plan_network(found, named, ratio=1))["thin"] == ("thin",)


def test_a_depthwise_layer_is_dynamic_all_the_same_with_a_note() -> None:
    found = narrow_network()
    (note,) = plan_network(found, Settings(), ratio=1).notes
    assert note == (
        "depth: depthwise layers are dynamic, as in the published MobileNetV2 and ConvNeXt, "
        "though attention outweighs such kernels (a rule can keep them static)"
    )
    kept = Settings(rules=(Rule("depth", static=True),))
    assert plan_network(found, kept, ratio=1).notes == ()
    named = Settings(sharing={"depth": ["depth"]})
    assert plan_network(found, named, ratio=1).notes == ()
    more = unknown_network(conv("d1", 96, 96, groups=96), conv("d2", 96, 96, groups=96))
    (note,) = plan_network(more, Settings(), ratio=1).notes
    assert note.startswith("d1 and 1 more: depthwise layers are dynamic")


# Ratios that whole cells cannot be


def test_a_ratio_that_is_not_reached_is_noted_with_what_is() -> None:
    found = unknown_network()
    # 9, 9 and 1 mixtures: 4, 4 and 1 cells at 1/2.
    plan = plan_network(found, Settings(sharing="layer"), ratio=0.5)
    assert [group.num_cells for group in plan.groups] == [4, 4, 1]
    assert {group.ratio for group in plan.groups} == {0.5}
    assert plan.notes == (
        "b = 0.4737, not 0.5, as cells are whole and every warehouse has one: "
        "9 cells over 19 mixtures",
    )
    one = plan_network(found, Settings(sharing={"c": ["body.c"]}), ratio=0.5)
    assert one.notes[0].endswith("every warehouse has one: 1 cell over 1 mixture")
    assert plan_network(found, Settings(sharing="layer"), ratio=2).notes == ()
    own = Settings(sharing={"a": Share(["body.a"], ratio=2), "b": ["body.b"]})
    assert plan_network(found, own, ratio=1).notes == ()


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("a.b_c", "a_b.c"), ["a_b_c", "a_b_c_"]),
        (("a.3x3-conv", "ü"), ["a_3x3_conv", "layer"]),
    ],
)
def test_any_module_name_makes_a_warehouse_name_of_its_own(
    names: tuple[str, ...], groups: list[str]
) -> None:
    found = Network(
        (conv("begin", 3, 8), *(conv(name, 8, 8) for name in names), conv("end", 8, 3)),
        10_000,
        10**6,
        (3, 4, 4),
    )
    plan = plan_network(found, Settings(sharing="layer"), ratio=1)
    assert [group.name for group in plan.groups] == groups
    assert tuple(group.layers[0] for group in plan.groups) == names


# Glob patterns


def test_groups_of_patterns_are_ordered_by_their_first_layer_and_leave_the_rest_alone() -> None:
    sharing = [["body.c"], ["body.[ab]", "begin"]]
    plan = plan_network(unknown_network(), Settings(sharing=sharing), ratio=1)
    assert layers(plan) == {"group1": ("begin", "body.a", "body.b"), "group0": ("body.c",)}
    # gcds: 8 of 8, 8, 16 and 1 of 3, 8, 8.
    assert plan.groups[0].cell == (8, 1, 1, 1)


def test_groups_may_be_named_and_a_single_pattern_may_stand_alone() -> None:
    for given in ("body.*", ["body.*"], Share("body.*"), Share(["body.*"])):
        plan = plan_network(unknown_network(), Settings(sharing={"all": given}), ratio=1)
        assert layers(plan) == {"all": ("body.a", "body.b", "body.c")}


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (
            {"one": ["body.d"]},
            "group 'one': no convolution or linear layer is named 'body.d'; did you mean 'body.c'?",
        ),
        (
            [["layer4.*.conv"]],
            "group 'group0': no convolution or linear layer is named 'layer4.*.conv'; there are "
            "'begin' to 'out'",
        ),
        ([["body.a"], ["body.*"]], "body.a matches group 'group0' and group 'group1'"),
        (
            {"mix": ["body.c", "out"]},
            "group 'mix': layers of one kind share a warehouse, got conv2d, linear",
        ),
        ({"none": []}, "group 'none': it has no layers"),
        ({"a.b": ["body.a"]}, "group 'a.b': a name is made of letters, digits and underscores"),
    ],
)
def test_patterns_that_make_no_groups_are_refused_with_the_reason(
    sharing: Any, message: str
) -> None:
    assert refusal(unknown_network(), Settings(sharing=sharing)) == message


def test_a_pattern_that_asks_for_a_layer_that_cannot_be_converted_is_refused() -> None:
    found = unknown_network(conv("twice", 16, 16, fixed="its weight is tied to another layer's"))
    assert refusal(found, Settings(sharing=[["body.c", "twice"]])) == (
        "group 'group0': twice cannot be converted: its weight is tied to another layer's"
    )


# Whole kernels


def test_without_spatial_partition_automatic_groups_are_split_by_kernel_size() -> None:
    plan = plan_network(network("resnet18"), Settings(spatial_partition=False), ratio=1)
    cells = {group.name: group.cell for group in plan.groups}
    assert cells == {
        "stage0_conv_3x3": (64, 64, 3, 3),
        "stage0_conv_1x1": (128, 64, 1, 1),
        "stage1_conv_3x3": (128, 128, 3, 3),
        "stage1_conv_1x1": (256, 128, 1, 1),
        "stage2_conv_3x3": (256, 256, 3, 3),
        "stage2_conv_1x1": (512, 256, 1, 1),
        "stage3_conv": (512, 512, 3, 3),
    }
    assert layers(plan)["stage0_conv_1x1"] == ("layer2.0.downsample.0",)


def test_without_spatial_partition_explicit_groups_have_one_kernel_size() -> None:
    settings = Settings(sharing={"all": ["body.*"]}, spatial_partition=False)
    assert refusal(unknown_network(), settings) == (
        "group 'all': without spatial partition all kernels of a warehouse have one size, "
        "got 1x1, 3x3"
    )
    share = Share(["body.*"], spatial_partition=True)
    settings = Settings(sharing={"all": share}, spatial_partition=False)
    assert plan_network(unknown_network(), settings, ratio=1).groups[0].cell == (8, 8, 1, 1)


def test_kinds_of_layers_that_stages_mix_get_warehouses_of_their_own() -> None:
    # A 1x1 convolution where the others of its stage are linear.
    found = network("deit_tiny")
    sites = tuple(
        replace(site, kind="conv2d", kernel_size=(1, 1)) if site.name.endswith("fc2") else site
        for site in found.sites
    )
    plan = plan_network(replace(found, sites=sites), Settings(), ratio=1)
    assert [group.name for group in plan.groups] == [
        "stage0_attention",
        "stage0_mlp_linear",
        "stage0_mlp_conv2d",
    ]


# Rules: exceptions from the sharing


def resnet(rules: list[Rule], **settings: Any) -> Plan:
    return plan_network(network("resnet18"), Settings(rules=tuple(rules), **settings), ratio=1)


def test_a_rule_keeps_layers_static() -> None:
    plan = resnet([Rule("layer1.*", static=True), Rule(["layer4.1.conv?"], static=True)])
    found = layers(plan)
    assert found["stage0_conv"] == ("layer2.0.conv1", "layer2.0.downsample.0")
    assert found["stage3_conv"] == ("layer4.0.conv2",)


def test_a_rule_gives_layers_a_warehouse_of_their_own_with_its_settings() -> None:
    rule = Rule(["*.downsample.0", "fc_not*", "fc"], share="short", cell_ratio=(0.5, 1), ratio=2)
    with pytest.raises(PlanError, match=r"rule 1 \(\*\.downsample\.0, fc_not\*, fc\): no conv"):
        resnet([rule])
    plan = resnet([Rule("*.downsample.0", share="short", cell_ratio=(0.5, 1), ratio=2)])
    found = layers(plan)
    assert found["short"] == tuple(f"layer{i}.0.downsample.0" for i in (2, 3, 4))
    assert "layer2.0.downsample.0" not in found["stage0_conv"]
    (short,) = (group for group in plan.groups if group.name == "short")
    # 128 x 64, 256 x 128, 512 x 256 in cells of 64 x 64: 2 + 8 + 32 mixtures, two cells each.
    assert (short.cell, short.mixtures(plan.of(short)), short.num_cells) == (
        (64, 64, 1, 1),
        (2, 8, 32),
        84,
    )


def test_a_rule_converts_what_is_static_by_default_and_a_later_rule_wins() -> None:
    assert layers(resnet([Rule("fc", share="head")]))["head"] == ("fc",)
    rules = [Rule("layer4.*", static=True), Rule("layer4.1.*", share="stage3_conv")]
    found = layers(resnet(rules))
    assert found["stage3_conv"] == ("layer4.1.conv1", "layer4.1.conv2")
    assert "layer4.0.conv1" not in found["stage2_conv"]
    assert "stage3_conv" not in layers(resnet(rules[::-1]))


def test_a_rule_without_a_share_sets_what_whole_warehouses_have() -> None:
    plan = resnet([Rule(["layer4.0.conv2", "layer4.1.*"], ratio=0.5, reduction=1 / 8)])
    assert [g.ratio for g in plan.groups] == [1, 1, 1, 0.5]
    assert [g.reduction for g in plan.groups] == [1 / 16, 1 / 16, 1 / 16, 1 / 8]
    with pytest.raises(PlanError) as error:
        resnet([Rule("layer4.1.*", ratio=0.5)])
    assert str(error.value) == (
        "rule 1 (layer4.1.*): its settings are for a part of warehouse 'stage3_conv', without "
        "layer4.0.conv2: cover all of its layers, or give the matched ones a share of their own"
    )
    with pytest.raises(PlanError, match=r"rule 1 \(conv1\): the layers are in no warehouse"):
        resnet([Rule("conv1", ratio=0.5)])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"static": True, "ratio": 1},
        {"static": True, "share": "a"},
        {"static": True, "dynamic": True},
    ],
)
def test_a_rule_is_either_static_or_a_share_or_settings(given: dict[str, Any]) -> None:
    with pytest.raises(
        PlanError, match=r"rule for layer1\.\*: either static, or dynamic, or a share or set"
    ):
        Rule("layer1.*", **given)


def test_a_dynamic_rule_gives_each_layer_a_warehouse_of_its_own() -> None:
    found = layers(resnet([Rule(["conv1", "layer4.1.*"], dynamic=True, reduction=1 / 8)]))
    assert found["conv1"] == ("conv1",)
    assert found["layer4_1_conv1"] == ("layer4.1.conv1",)
    assert all(not name.startswith("layer4.1") for name in found["stage3_conv"])
    with pytest.raises(PlanError, match="either dynamic, each layer by itself, or a share"):
        Rule("conv1", dynamic=True, share="a")


def test_rules_hold_for_explicit_groups_too() -> None:
    groups = {"early": ["layer[12].*"], "late": ["layer[34].*"]}
    found = layers(resnet([Rule("layer2.*", share="late")], sharing=groups))
    assert all(name.startswith("layer1") for name in found["early"])
    assert found["late"][0] == "layer2.0.conv1"
