"""The plan as a value: written, read, compared, and refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kwlayers import Network, Plan, PlanError, Site, WarehouseGroup, methods
from kwlayers.plan import Other, counted, match_layers

SITES = (
    Site("stem", "conv2d", 3, 16, (3, 3), positions=64),
    Site("layer1.0.conv1", "conv2d", 16, 16, (3, 3), positions=64),
    Site("layer1.0.conv2", "conv2d", 16, 32, (3, 3), positions=64),
    Site("layer1.1.conv1", "conv2d", 32, 32, (1, 1), positions=64),
    Site("tied", "conv2d", 16, 16, (1, 1), positions=64, fixed="its weight is tied"),
    Site("fc", "linear", 32, 10, (1,), bias=True),
)
NETWORK = Network(SITES, 20_000, 2_000_000, (3, 8, 8))
LAYERS = ("layer1.0.conv1", "layer1.0.conv2")


def group(**changes: Any) -> WarehouseGroup:
    fields = {"name": "w", "cell": (16, 16, 1, 1), "num_cells": 5, "layers": LAYERS, **changes}
    return WarehouseGroup(**fields)


def refusal(*groups: WarehouseGroup) -> str:
    with pytest.raises(PlanError) as error:
        Plan(NETWORK, groups)
    return str(error.value)


# Written and read


def test_a_plan_survives_json() -> None:
    plan = Plan(
        dataclasses.replace(NETWORK, others=(Other("up", "ConvTranspose2d", 64),)),
        (
            group(ratio=0.5, reduction=1 / 32, basis_ratio=1 / 16, norm="layer"),
            WarehouseGroup("head", ("fc",), (10, 8, 1), 2),
        ),
    )
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.cost() == plan.cost()
    assert read.network["layer1.0.conv1"].kernel_size == (3, 3)
    assert read.network.others[0].kind == "ConvTranspose2d"


def test_plain_data_names_the_method_first_and_holds_only_json_types() -> None:
    data = Plan(NETWORK, (group(),)).to_dict()
    assert list(data) == ["network", "groups"]
    assert data["groups"] == [
        {
            "method": "kernel_warehouse",
            "name": "w",
            "cell": [16, 16, 1, 1],
            "num_cells": 5,
            "layers": list(LAYERS),
            "ratio": None,
            "reduction": 0.0625,
            "basis_ratio": 1.0,
            "norm": "batch",
        }
    ]
    assert next(iter(data["groups"][0])) == "method"
    assert json.loads(json.dumps(data)) == data


def test_plans_that_differ_in_one_number_are_not_equal() -> None:
    assert Plan(NETWORK, (group(),)) != Plan(NETWORK, (group(num_cells=6),))
    assert Plan(NETWORK, (group(),)) == Plan(NETWORK, (group(),), notes=("rounded",))


@pytest.mark.parametrize(
    "value", [Plan(NETWORK, (group(),)), NETWORK, SITES[0], group()], ids=lambda v: type(v).__name__
)
def test_plans_and_what_they_hold_are_frozen(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_groups_from_a_recipe_may_name_layers_by_pattern_in_any_order() -> None:
    data = group(layers=()).__dict__ | {"layers": ["layer1.*.conv2", "layer1.0.conv?"]}
    plan = Plan.from_groups(NETWORK, [data])
    assert plan.groups == (group(layers=LAYERS),)


def test_a_pattern_is_matched_case_sensitively_against_whole_names() -> None:
    with pytest.raises(PlanError, match="no convolution or linear layer is named 'conv1'"):
        match_layers(NETWORK, ["conv1"], "here")
    with pytest.raises(PlanError, match="did you mean 'stem'"):
        match_layers(NETWORK, ["Stem"], "here")
    assert match_layers(NETWORK, ["*.conv1"], "here") == ("layer1.0.conv1", "layer1.1.conv1")


def test_warehouses_and_mixtures_are_listed_in_order() -> None:
    plan = Plan(NETWORK, (group(), group(name="v", layers=("layer1.1.conv1",))))
    assert [g.name for g in plan.warehouses] == ["w", "v"]
    assert plan.groups[0].mixtures(plan.of(plan.groups[0])) == (9, 18)
    assert plan.groups[1].mixtures(plan.of(plan.groups[1])) == (4,)


# Refused


def test_an_unknown_layer_of_a_network_is_an_error_with_the_closest_name() -> None:
    assert NETWORK["fc"] is SITES[-1]
    with pytest.raises(PlanError) as error:
        NETWORK["layer1.0.conv3"]
    assert str(error.value) == (
        "no convolution or linear layer is named 'layer1.0.conv3'; did you mean 'layer1.0.conv2'?"
    )
    with pytest.raises(PlanError) as error:
        NETWORK["xyz"]
    assert str(error.value) == (
        "no convolution or linear layer is named 'xyz'; there are 'stem' to 'fc'"
    )
    with pytest.raises(PlanError) as error:
        Network((), 0, 0, (3,))["xyz"]
    assert str(error.value) == (
        "no convolution or linear layer is named 'xyz': the network has none"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a.b"}, "group 'a.b': a name is made of letters, digits and underscores"),
        ({"name": 5}, "group 5: a name is made of letters, digits and underscores"),
        ({"name": "__"}, "group '__': a name is made of letters, digits and underscores"),
        ({"name": ""}, "group '': a name is made of letters, digits and underscores"),
        ({"name": "é"}, "group 'é': a name is made of letters, digits and underscores"),
        ({"num_cells": 0}, "group 'w': num_cells is 0; an integer >= 1 is needed"),
        ({"num_cells": 1.5}, "group 'w': num_cells is 1.5; an integer >= 1 is needed"),
        ({"norm": "group"}, "group 'w': norm 'group'; allowed are batch, layer"),
        ({"ratio": 0.0}, "group 'w': ratio 0.0; it must be above 0"),
        ({"ratio": float("nan")}, "group 'w': ratio nan; it must be above 0"),
        ({"reduction": 0}, "group 'w': reduction 0; it must be in (0, 1]"),
        ({"reduction": 1.5}, "group 'w': reduction 1.5; it must be in (0, 1]"),
        ({"basis_ratio": -0.5}, "group 'w': basis_ratio -0.5; it must be in (0, 1]"),
        ({"layers": ()}, "group 'w': it has no layers"),
        ({"layers": LAYERS[::-1]}, "group 'w': layers must be listed once each, in module order"),
        ({"layers": LAYERS[:1] * 2}, "group 'w': layers must be listed once each, in module order"),
        (
            {"layers": ("stem", "fc")},
            "group 'w': layers of one kind share a warehouse, got conv2d, linear",
        ),
        ({"layers": ("tied",)}, "group 'w': tied cannot be converted: its weight is tied"),
        (
            {"layers": ("layer1.0.conv9",)},
            "no convolution or linear layer is named 'layer1.0.conv9'; did you mean "
            "'layer1.0.conv2'?",
        ),
        (
            {"cell": (16, 5, 1, 1)},
            "group 'w': layer1.0.conv1: cells of shape (16, 5, 1, 1) do not tile a kernel of "
            "shape (16, 16, 3, 3)",
        ),
        (
            {"cell": (0, 16, 1, 1)},
            "group 'w': layer1.0.conv1: cells of shape (0, 16, 1, 1) do not tile a kernel of "
            "shape (16, 16, 3, 3)",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_plan_that_cannot_be_is_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    assert refusal(group(**changes)) == message


def test_two_groups_have_different_names() -> None:
    other = group(layers=("layer1.1.conv1",))
    assert refusal(group(), other) == "group 'w': the name is taken; every group needs its own"


def test_a_layer_is_in_one_group() -> None:
    other = group(name="v", layers=LAYERS[1:])
    assert refusal(group(), other) == "group 'v': layer1.0.conv2 is already in group 'w'"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "plan: expected a mapping, got list"),
        ({"network": 3}, "network: expected a mapping, got int"),
        (
            {"network": {"sites": 3, "params": 1, "macs": 1, "input_size": [3]}},
            "network.sites: expected a list, got int",
        ),
        (
            {"network": {"sites": [], "params": 1, "macs": 1, "input_size": [3], "others": [2]}},
            "network.others: expected a mapping, got int",
        ),
        ({"network": NETWORK, "groups": 5}, "groups: expected a list, got int"),
        ({"network": NETWORK, "groups": ["w"]}, "groups: expected a mapping, got str"),
        (
            {"network": NETWORK, "groups": [{**group().__dict__, "layers": "fc"}]},
            "group 'w': layers: expected a list, got str",
        ),
        (
            {"network": NETWORK, "groups": [{"method": "kernel_warehouses"}]},
            "unknown method 'kernel_warehouses': did you mean 'kernel_warehouse'? allowed are "
            + ", ".join(methods.NAMES),
        ),
        (
            {"network": NETWORK, "groups": [{"num_cell": 3}]},
            "groups: unknown keys ['num_cell']; allowed are ['name', 'layers', 'cell', "
            "'num_cells', 'ratio', 'reduction', 'basis_ratio', 'norm']",
        ),
    ],
)
def test_data_that_is_no_plan_is_refused_with_where_and_what(data: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_dict(data)
    assert str(error.value) == message


def test_a_group_without_its_required_fields_is_refused_with_their_names() -> None:
    with pytest.raises(PlanError, match=r"groups: .*'layers', 'cell', and 'num_cells'"):
        Plan.from_groups(NETWORK, [{"name": "w"}])


def test_counts_have_their_plural() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2, 1000)] == [
        "0 layers",
        "1 layer",
        "2 layers",
        "1,000 layers",
    ]


def test_a_pattern_that_matches_nothing_is_refused_with_the_group() -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_groups(NETWORK, [{**group().__dict__, "layers": ["layer2.*"]}])
    assert str(error.value).startswith(
        "group 'w': no convolution or linear layer is named 'layer2.*'; "
    )
