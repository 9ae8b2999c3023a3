"""Counts: the integers of the reference implementation, and closed forms worked by hand."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kwlayers
from kwlayers import Network, Plan, Share, Site, WarehouseGroup
from kwlayers.cost import MacParts, ParamParts
from kwlayers.warehouses import attention_cost
from kwsearch import zoo

# Counted by running the official implementation of KernelWarehouse on its 20 configurations.
ORACLES = json.loads((Path(__file__).parents[1] / "data" / "kernel_warehouse.json").read_text())
PUBLISHED = [entry["config"] for entry in ORACLES if "settings" in entry]
STATIC = [entry["config"] for entry in ORACLES if "settings" not in entry]

# The settings that the official MobileNetV2 1/2x models have in their code: depthwise layers
# and the stem at ratio 1; of the 1x1 layers only stage 6; the classifier.
_HALF = {"ratio": 0.5, "cell_ratio": (0.5, 0.5)}
MOBILENET_HALF: dict[str, Any] = {
    "ratio": 1.0,
    "reduction": 1 / 32,
    "sharing": {
        "stem": ["conv_stem"],
        "dw1": ["blocks.0.0.conv_dw", "blocks.1.0.conv_dw"],
        "dw2": ["blocks.1.1.conv_dw", "blocks.2.0.conv_dw"],
        "dw3": ["blocks.2.[12].conv_dw", "blocks.3.0.conv_dw"],
        "dw4": ["blocks.3.[123].conv_dw", "blocks.4.0.conv_dw"],
        "dw5": ["blocks.4.[12].conv_dw", "blocks.5.0.conv_dw"],
        "expand6": Share(["blocks.5.[12].conv_pw", "blocks.6.0.conv_pw"], **_HALF),
        "dw6": ["blocks.5.[12].conv_dw", "blocks.6.0.conv_dw"],
        "project6": Share(["blocks.5.[12].conv_pwl", "blocks.6.0.conv_pwl", "conv_head"], **_HALF),
        "classifier": Share(["classifier"], ratio=0.5, cell_ratio=(1, 0.025)),
    },
}


def oracle(config: str) -> dict[str, Any]:
    (entry,) = (entry for entry in ORACLES if entry["config"] == config)
    return entry


def backbone(config: str) -> str:
    return config.split("_", 1)[1] if config.startswith("kw") else config


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name)


@functools.cache
def network(name: str) -> Network:
    return kwlayers.trace(on_meta(name), zoo.MODELS[name].input_size)


@functools.cache
def published_plan(config: str) -> Plan:
    given = oracle(config)["settings"]
    if isinstance(given, str):
        assert given == "hard-coded in the reference model"
        options = dict(MOBILENET_HALF)
    else:
        sharing = {2: "stage", 1: "position"}[len(given["sharing_range"])]
        options = {
            "ratio": given["cell_num_ratio"],
            "cell_ratio": (given["cell_outplane_ratio"], given["cell_inplane_ratio"]),
            "sharing": sharing,
            "reduction": given.get("reduction", 1 / 16),
            "basis_ratio": given.get("nonlocal_basis_ratio", 1.0),
        }
    name = backbone(config)
    return kwlayers.plan_model(on_meta(name), zoo.MODELS[name].input_size, **options)


def test_the_oracles_are_5_static_and_15_published_configurations() -> None:
    assert len(STATIC) == 5
    assert len(PUBLISHED) == 15
    assert len({entry["config"] for entry in ORACLES}) == 20


@pytest.mark.parametrize("config", STATIC)
def test_a_static_backbone_has_the_reference_counts(config: str) -> None:
    expected = oracle(config)
    found = network(config)
    assert (found.params, found.macs) == (expected["params"], expected["macs_224"])


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_published_setting_has_the_reference_parameters_by_part(config: str) -> None:
    expected = oracle(config)
    params = published_plan(config).cost().params
    assert vars(params) == {
        "total": expected["params"],
        "kernels": expected["warehouse_params"],
        "attention": expected["attention_params"],
        "unchanged": expected["other_params"],
    }
    replaced = network(backbone(config)).params - params.unchanged
    assert replaced == expected["replaced_static_weights"]


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_published_setting_has_the_reference_macs_by_part(config: str) -> None:
    expected = oracle(config)
    macs = published_plan(config).cost().macs
    assert macs.total == expected["macs_224"]
    assert macs.mixing == expected["mixing_macs"]
    assert macs.attention == expected["attention_macs"]
    assert macs.conv + macs.unchanged == expected["conv_and_other_macs"]


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_published_setting_has_the_reference_warehouses(config: str) -> None:
    def shape(entry: dict[str, Any]) -> tuple[tuple[int, ...], int]:
        return tuple(entry["cells"]), entry["layers"]

    plan = published_plan(config)
    found = Counter(((g.num_cells, *g.cell), len(g.layers)) for g in plan.warehouses)
    assert found == Counter(map(shape, oracle(config)["warehouses"]))


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_published_setting_builds_a_network_with_the_reference_parameters(config: str) -> None:
    expected = oracle(config)
    model = kwlayers.convert_(on_meta(backbone(config)), published_plan(config))
    built: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if name.startswith("kw_warehouses."):
            built["kernels"] += parameter.numel()
        elif ".attention." in f".{name}":
            built["attention"] += parameter.numel()
        else:
            built["rest"] += parameter.numel()
    assert built == {
        "kernels": expected["warehouse_params"],
        "attention": expected["attention_params"],
        "rest": expected["other_params"],
    }


# By hand: Conv2d(32 -> 64, 3x3, bias) on 10x10 positions, and Linear(48 -> 80, bias).


def small_network(samples: int = 1) -> Network:
    conv = Site("conv", "conv2d", 32, 64, (3, 3), bias=True, positions=100, samples=samples)
    linear = Site("fc", "linear", 48, 80, (1,), bias=True, positions=7)
    params = (64 * 32 * 9 + 64) + (80 * 48 + 80) + 1000
    macs = 100 * 64 * 32 * 9 + 7 * 80 * 48 + 5000
    return Network((conv, linear), params, macs, (32, 10, 10))


def conv_group(**changes: Any) -> WarehouseGroup:
    return WarehouseGroup("w", ("conv",), (32, 16, 1, 1), 12, **changes)


def test_an_attention_branch_is_counted_layer_by_layer() -> None:
    # m = 2 * 2 * 9 = 36, n = 12, h = max(32/16, 16) = 16:
    # fc1 32*16, norm 2*16, fc2 16*13*36, bias 13*36.
    cost = Plan(small_network(), (conv_group(),)).cost()
    assert cost.params.attention == 512 + 32 + 7488 + 468
    assert cost.macs.attention == 512 + 7488
    # A layer norm leaves fc1 its bias, which is no MAC.
    cost = Plan(small_network(), (conv_group(norm="layer"),)).cost()
    assert cost.params.attention == 512 + 32 + 7488 + 468 + 16
    assert cost.macs.attention == 512 + 7488


def test_a_nonlocal_basis_is_counted_with_its_expansion() -> None:
    # b = 1/3 given: local = int(36/3) = 12, so others 0, width 16:
    # fc2 16*(12+16+1)*36, fc3 16*0, bias 13*36.
    group = conv_group(ratio=1 / 3, basis_ratio=0.5)
    cost = Plan(small_network(), (group,)).cost()
    assert cost.params.attention == 512 + 32 + 16 * 29 * 36 + 0 + 468
    assert cost.macs.attention == 512 + 16 * 29 * 36
    # 36 of M = 360 mixtures, n = 120: local 12, others 108, width 54:
    # fc2 16*(12+54+1)*36, fc3 54*108, bias 121*36; the expansion runs once per mixture.
    attention = attention_cost(
        32, 36, 120, 360, ratio=None, reduction=1 / 16, basis_ratio=0.5, norm="batch"
    )
    assert attention.params == 512 + 32 + 16 * 67 * 36 + 54 * 108 + 121 * 36
    assert attention.macs == 512 + 16 * 67 * 36 + 36 * 54 * 108


def test_parameters_split_into_cells_attention_and_the_rest() -> None:
    cost = Plan(small_network(), (conv_group(),)).cost()
    assert cost.params.warehouses == 12 * 32 * 16
    # Both biases, the linear layer and what is no layer stay.
    assert cost.params.unchanged == 64 + (80 * 48 + 80) + 1000
    assert cost.params.total == 12 * 32 * 16 + 8500 + 64 + 3920 + 1000


def test_mixing_counts_every_cell_for_every_weight_whatever_the_resolution() -> None:
    cost = Plan(small_network(), (conv_group(),)).cost()
    weight = 64 * 32 * 9
    assert cost.macs.mixing == 12 * weight
    assert cost.macs.conv == 100 * weight
    assert cost.macs.unchanged == 7 * 80 * 48 + 5000
    assert cost.macs.total == 112 * weight + 8000 + 26880 + 5000


def test_a_layer_that_runs_on_more_samples_mixes_and_attends_for_each() -> None:
    once = Plan(small_network(), (conv_group(),)).cost().macs
    thrice = Plan(small_network(samples=3), (conv_group(),)).cost().macs
    assert thrice.mixing == 3 * once.mixing
    assert thrice.attention == 3 * once.attention
    assert thrice.conv == once.conv


def test_layers_of_one_warehouse_share_its_cells_and_have_attention_of_their_own() -> None:
    sites = tuple(Site(name, "conv2d", 32, 32, (1, 1), positions=4) for name in "ab")
    plan = Plan(
        Network(sites, 2 * 1024, 2 * 4 * 1024, (32, 2, 2)),
        (WarehouseGroup("w", ("a", "b"), (32, 32, 1, 1), 2),),
    )
    # Each: m = 1, h = 16: 512 + 32 + 16*3 + 3.
    assert plan.cost().params.attention == 2 * 595
    assert plan.cost().params.warehouses == 2 * 1024
    assert plan.cost().macs.mixing == 2 * (2 * 1024)


def test_costs_by_layer_list_static_and_converted_layers_in_module_order() -> None:
    conv, linear = Plan(small_network(), (conv_group(),)).cost_by_layer()
    nothing = {"kernel_params": 0, "modulation_macs": 0}
    assert vars(conv) == {
        **nothing,
        "name": "conv",
        "group": "w",
        "mixtures": 36,
        "attention_params": 8500,
        "static_params": 64,
        "conv_macs": 1843200,
        "mixing_macs": 221184,
        "attention_macs": 8000,
    }
    assert vars(linear) == {
        **nothing,
        "name": "fc",
        "group": None,
        "mixtures": 0,
        "attention_params": 0,
        "static_params": 3920,
        "conv_macs": 26880,
        "mixing_macs": 0,
        "attention_macs": 0,
    }


@pytest.mark.parametrize("config", PUBLISHED)
def test_the_layers_of_a_published_setting_add_up_to_its_totals(config: str) -> None:
    plan = published_plan(config)
    cost, layers = plan.cost(), plan.cost_by_layer()
    assert len(layers) == len(plan.network.sites)
    assert sum(layer.attention_params for layer in layers) == cost.params.attention
    assert sum(layer.mixing_macs for layer in layers) == cost.macs.mixing
    assert sum(layer.attention_macs for layer in layers) == cost.macs.attention
    assert sum(layer.conv_macs for layer in layers if layer.group) == cost.macs.conv


def test_parts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not add up to 7"):
        ParamParts(total=7, kernels=1, attention=2, unchanged=3)
    with pytest.raises(AssertionError, match="negative part"):
        MacParts(total=1, conv=2, mixing=-1, attention=0, unchanged=0)
