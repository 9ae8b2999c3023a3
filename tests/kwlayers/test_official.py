"""Configs and state dicts of the official repository, against what its own code builds.

Integers and names are those that the official code gave (tests/data). Functions are compared with
the official forward, written here a second time, plainly, over a dict of tensors.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kwlayers
from kwlayers import Network, Plan, PlanError, Settings, convert_, official, plan_network
from kwlayers.official_models import buildable
from kwsearch import zoo
from kwsearch.published import PUBLISHED, Published

DATA = Path(__file__).parents[1] / "data"
ORACLES = {
    entry["config"]: entry for entry in json.loads((DATA / "kernel_warehouse.json").read_text())
}
STATES = json.loads((DATA / "official_state_dicts.json").read_text())
# Beside its integers an oracle has the settings of its config.
NAMES = sorted(ORACLES)


def config_of(name: str) -> dict[str, Any]:
    """The config file of an oracle, without its training options."""
    model = "_".join(name.split("_")[1:]) if name.startswith("kw") else name
    settings = ORACLES[name].get("settings", {})
    if isinstance(settings, str):
        return {"model": f"kw1d2x_{model}"}
    return {"model": f"kw_{model}" if name.startswith("kw") else model, **settings}


@functools.cache
def network(name: str) -> Network:
    with torch.device("meta"):
        return kwlayers.trace(zoo.create(name), zoo.MODELS[name].input_size)


def built(name: str, plan: Plan, **options: Any) -> nn.Module:
    """A model of the zoo, converted if the plan says so."""
    model = zoo.create(name, **options)
    return convert_(model, plan) if plan.groups else model


# Configs to plans


def test_every_shipped_config_has_an_oracle() -> None:
    assert len(NAMES) == 20
    assert sum("warehouses" in oracle for oracle in ORACLES.values()) == 15
    assert set(NAMES) == set(STATES["digests"])


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_a_config_is_what_the_official_code_builds(name: str) -> None:
    oracle = ORACLES[name]
    config = official.read_config(config_of(name))
    plan = official.plan(config, network(config.backbone))
    cost = plan.cost()
    assert cost.params.total == oracle["params"]
    assert cost.macs.total == oracle["macs_224"]
    assert cost.params.warehouses == oracle.get("warehouse_params", 0)
    assert cost.params.attention == oracle.get("attention_params", 0)
    assert cost.macs.mixing == oracle.get("mixing_macs", 0)
    assert cost.macs.attention == oracle.get("attention_macs", 0)
    ours = Counter((g.num_cells, *g.cell, len(g.layers)) for g in plan.groups)
    theirs = Counter((*w["cells"], w["layers"]) for w in oracle.get("warehouses", ()))
    assert ours == theirs


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.slug)
def test_the_plan_of_a_config_is_the_published_setting(entry: Published) -> None:
    ratio = {0.25: "1d4", 0.5: "1d2"}.get(entry.ratio, f"{entry.ratio:g}")
    plan = official.plan(config_of(f"kw{ratio}x_{entry.model}"), network(entry.model))
    assert plan == entry.plan(network(entry.model))


def test_a_config_is_read_from_a_file_with_its_training_options(tmp_path: Path) -> None:
    path = tmp_path / "kw1d2x_resnet50.json"
    settings = {"cell_num_ratio": 0.5, "sharing_range": "layer_conv", "nonlocal_basis_ratio": 0.25}
    path.write_text(json.dumps({"model": "kw_resnet50", "drop_path": 0.1, "aa": None, **settings}))
    config = official.read_config(path)
    assert config == official.read_config(str(path))
    assert config.cell_num_ratio == (0.5,)
    assert config.nonlocal_basis_ratio == 0.25
    assert config.training == {"drop_path": 0.1, "aa": None}
    assert (config.backbone, config.is_static, config.is_half) == ("resnet50", False, False)
    assert hash(config) == hash(replace(config))


def test_what_a_config_leaves_out_is_as_the_official_program_has_it() -> None:
    config = official.read_config({"model": "kw_resnet18"})
    assert config.reduction == (0.0625,)
    assert config.cell_num_ratio == config.cell_inplane_ratio == config.cell_outplane_ratio == (1,)
    # Its models share by stage if nothing is said, but the program says [].
    assert config.sharing_range == ()
    assert config.nonlocal_basis_ratio == 1
    assert len(official.plan(config, network("resnet18")).groups) == 19


def test_a_sharing_range_that_is_a_string_stands_for_its_letters() -> None:
    letters = official.read_config({"model": "kw_resnet18", "sharing_range": "layer_conv"})
    assert letters.sharing_range == tuple("layer_conv")
    words = official.read_config({"model": "kw_resnet18", "sharing_range": ["layer", "conv"]})
    found = network("resnet18")
    assert official.plan(letters, found) == official.plan(words, found)
    # On MobileNetV2 the same letters share by kind and position: pwconv0 begins with p.
    mobile = {"model": "kw_mobilenetv2_050", "sharing_range": "layer_conv"}
    by_position = {"model": "kw_mobilenetv2_050", "sharing_range": ["layer"]}
    found = network("mobilenetv2_050")
    assert official.plan(mobile, found) == official.plan(by_position, found)


def test_prefixes_share_as_in_the_official_names() -> None:
    def groups(model: str, prefixes: list[str]) -> dict[str, tuple[str, ...]]:
        config = {"model": f"kw_{model}", "sharing_range": prefixes}
        return {g.name: g.layers for g in official.plan(config, network(model)).groups}

    # Both convolutions of a block, which is stage 0's third at layer2.0 …
    found = groups("resnet18", ["conv"])
    assert found["stage0_layer1_conv"] == ("layer1.1.conv1", "layer1.1.conv2")
    assert found["stage0_layer2_conv"] == ("layer2.0.conv1",)
    assert found["stage0_layer3_conv"] == ("layer2.0.downsample.0",)
    assert found["stage1_layer0_conv"] == ("layer2.0.conv2",)
    # … and whole stages together.
    assert len(groups("resnet18", ["stage", "layer", "conv"])) == 1
    downsamples = groups("convnext_tiny", ["stage", "layer"])["stage_layer_conv0"]
    assert downsamples == tuple(f"stages.{i}.downsample.1" for i in (1, 2, 3))
    assert groups("convnext_tiny", ["pwconv"])["stage1_layer2_pwconv"] == (
        "stages.1.blocks.2.mlp.fc1",
        "stages.1.blocks.2.mlp.fc2",
    )
    # The last 1x1 convolution of MobileNetV2 is another block of stage 6.
    mobile = groups("mobilenetv2_050", ["pwconv"])
    assert mobile["stage6_layer2_pwconv"] == ("blocks.6.0.conv_pw", "blocks.6.0.conv_pwl")
    assert mobile["stage6_layer3_pwconv"] == ("conv_head",)


def test_values_per_warehouse_are_in_the_official_order() -> None:
    # By layer, the official ResNet asks for a downsample before the block's convolutions.
    ratios = [1.0] * 19
    ratios[4] = 2.0
    config = {"model": "kw_resnet18", "cell_num_ratio": ratios}
    plan = official.plan(config, network("resnet18"))
    assert [g.layers for g in plan.groups if g.ratio == 2] == [("layer2.0.downsample.0",)]
    # ConvNeXt asks for its three downsamples right after the stem.
    config = {
        "model": "kw_convnext_tiny",
        "sharing_range": ["layer", "pwconv"],
        "cell_inplane_ratio": [1, 0.5, *[1] * 10],
        "reduction": [1 / 16, 1 / 16, 1 / 8, *[1 / 16] * 9],
    }
    groups = {g.name: g for g in official.plan(config, network("convnext_tiny")).groups}
    assert groups["downsample1"].cell == (192, 48, 1, 1)
    assert [g.name for g in groups.values() if g.reduction == 1 / 8] == ["downsample2"]


def test_a_model_is_traced_at_the_size_of_its_config() -> None:
    with torch.device("meta"):
        model = zoo.create("resnet18")
    config = {"model": "kw_resnet18", "input_size": 96}
    assert official.plan(config, model).network.input_size == (3, 96, 96)
    assert official.plan(config, model, (3, 64, 32)).network.input_size == (3, 64, 32)
    assert official.plan({"model": "resnet18"}, model) == Plan(network("resnet18"), ())


def test_classes_and_width_may_differ() -> None:
    with torch.device("meta"):
        model = zoo.create("mobilenetv2_100", num_classes=10, width=0.5)
    plan = official.plan({"model": "kw1d2x_mobilenetv2_100"}, model)
    assert plan.groups[-1].cell == (10, 32, 1)


CONFIG_ERRORS: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "no model: there are resnet18, "),
    "another model": ({"model": "kw_resnet34"}, "unknown model 'kw_resnet34': there are resnet18"),
    "a misspelt key": (
        {"model": "kw_resnet18", "cell_num_rato": 1},
        "unknown key 'cell_num_rato': did you mean 'cell_num_ratio'?",
    ),
    "an unknown key": (
        {"model": "kw_resnet18", "spatial_partition": False},
        "unknown key 'spatial_partition': the plan has reduction, ",
    ),
    "text": (
        {"model": "kw_resnet18", "cell_num_ratio": "1x"},
        "cell_num_ratio '1x': a number above 0, or a list of one for each warehouse",
    ),
    "true": ({"model": "kw_resnet18", "reduction": True}, "reduction True: a number in (0, 1]"),
    "zero": ({"model": "kw_resnet18", "cell_num_ratio": [1, 0]}, "cell_num_ratio [1, 0]: a number"),
    "an empty list": ({"model": "kw_resnet18", "reduction": []}, "reduction []: a number in"),
    "a cell beyond its layers": (
        {"model": "kw_resnet18", "cell_inplane_ratio": 2},
        "cell_inplane_ratio 2: a number in (0, 1]",
    ),
    "a list of bases": (
        {"model": "kw_resnet50", "nonlocal_basis_ratio": [0.5]},
        "nonlocal_basis_ratio [0.5]: one number above 0 for all warehouses",
    ),
    "an empty prefix": (
        {"model": "kw_resnet18", "sharing_range": ["layer", ""]},
        "sharing_range ['layer', '']: prefixes of warehouse names",
    ),
    "settings of a static model": (
        {"model": "resnet18", "cell_num_ratio": 1},
        "cell_num_ratio: resnet18 ignores it, its settings are fixed",
    ),
    "settings of the 1/2x model": (
        {"model": "kw1d2x_mobilenetv2_050", "reduction": 0.0625},
        "reduction: kw1d2x_mobilenetv2_050 ignores it, its settings are fixed",
    ),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_a_config_that_cannot_be_is_refused(case: str) -> None:
    data, message = CONFIG_ERRORS[case]
    with pytest.raises(PlanError, match=re.escape(message)):
        official.read_config(data)


def test_all_problems_of_a_config_are_listed_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "kw.json"
    path.write_text('{"model": "kw_resnet19", "reductoin": 1, "cell_num_ratio": -1}')
    with pytest.raises(PlanError) as error:
        official.read_config(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: this is no config of the official code:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "unknown model 'kw_resnet19'",
        "unknown key 'reductoin'",
        "cell_num_ratio -1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("model: kw_resnet18", "this is no JSON"),
        ("[1]", "expected an object of settings, got list"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=re.escape(f"{path}: {message}")):
        official.read_config(path)


def test_what_is_no_config_and_no_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="config: expected a path or a mapping, got list"):
        official.read_config([])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"plan: expected a kwlayers.Plan, got dict"):
        official.write_config({})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"model: expected an nn.Module, got str"):
        official.plan({"model": "kw_resnet18"}, "resnet18")  # type: ignore[arg-type]


def test_a_config_made_by_hand_needs_a_model_of_the_repository() -> None:
    with pytest.raises(PlanError, match="unknown model 'resnet34'"):
        official.Config("resnet34")


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        ("kw_resnet18", "resnet50", "for resnet18 (resnet of 21 layers), the network is resnet50"),
        ("kw_resnet18", "resnet34", "the network is another (resnet of 37 layers)"),
        ("kw_mobilenetv2_050", "mobilenetv2_100", "the network is mobilenetv2_100"),
        ("kw_resnet18", "resnet20", "none of theirs by torchvision's or timm's names"),
        ("kw_resnet18", "deit_tiny", "ResNets of four stages, MobileNetV2 and ConvNeXt"),
    ],
)
def test_a_config_for_another_network_is_refused(config: str, found: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        official.plan({"model": config}, network(found))


def test_a_list_needs_a_value_for_each_warehouse() -> None:
    config = {"model": "kw_resnet18", "sharing_range": ["layer", "conv"], "reduction": [0.1, 0.2]}
    with pytest.raises(PlanError, match=r"reduction has 2 values: .* 4 warehouses \(stage0_layer_"):
        official.plan(config, network("resnet18"))


# Plans to configs


@pytest.mark.parametrize("name", NAMES)
def test_a_config_comes_back_from_its_plan(name: str) -> None:
    config = official.read_config(config_of(name))
    plan = official.plan(config, network(config.backbone))
    written = json.loads(json.dumps(official.write_config(plan)))
    assert official.plan(written, plan.network) == plan
    assert {"reduction": 0.0625, **config_of(name)} == (
        written if config.model.startswith("kw_") else {"reduction": 0.0625, **written}
    )


@pytest.mark.parametrize("sharing", ["stage", "position", "layer"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2_050", "convnext_tiny"])
def test_every_level_of_sharing_can_be_written(name: str, sharing: str) -> None:
    options = {"sharing": sharing, "cell_ratio": (0.5, 0.25), "reduction": 1 / 32}
    plan = plan_network(network(name), Settings(**options, basis_ratio=0.25), ratio=0.5)  # type: ignore[arg-type]
    assert official.plan(official.write_config(plan), plan.network) == plan


def test_settings_of_their_own_become_lists_in_the_official_order() -> None:
    config = {
        "model": "kw_resnet50",
        "reduction": [0.0625, 0.125, 0.0625, 0.0625],
        "cell_num_ratio": [0.5, 1, 2, 0.25],
        "cell_inplane_ratio": [0.5, 1, 1, 0.25],
        "cell_outplane_ratio": 0.5,
        "sharing_range": ["layer", "conv"],
        "nonlocal_basis_ratio": 0.5,
    }
    plan = official.plan(config, network("resnet50"))
    assert official.write_config(plan) == config


def test_solved_cells_are_said_by_a_ratio_that_gives_them() -> None:
    plan = official.plan({"model": "kw_resnet18", "cell_num_ratio": 0.25}, network("resnet18"))
    solved = Plan(plan.network, tuple(replace(group, ratio=None) for group in plan.groups))
    written = official.write_config(solved)
    again = official.plan(written, plan.network)
    assert [g.num_cells for g in again.groups] == [g.num_cells for g in plan.groups]
    assert [g.layers for g in again.groups] == [g.layers for g in plan.groups]


def test_cells_that_were_rounded_are_said_by_their_size() -> None:
    # 0.3 of 64 is 19, rounded down to 16: a quarter. A third of 96 is 32.
    for name, ratio, side in (("resnet18", 0.3, 16), ("convnext_tiny", 1 / 3, 32)):
        settings = Settings(cell_ratio=(ratio, ratio), sharing="stage")
        plan = plan_network(network(name), settings, ratio=1)
        assert side in {size for group in plan.groups for size in group.cell}
        again = official.plan(official.write_config(plan), plan.network)
        assert [g.cell for g in again.groups] == [g.cell for g in plan.groups]


def test_another_input_size_is_said_and_read_back() -> None:
    with torch.device("meta"):
        model = zoo.create("resnet18")
    plan = kwlayers.plan_model(model, (3, 64, 64), ratio=1)
    written = official.write_config(plan)
    assert written["input_size"] == 64
    assert official.plan(written, model) == plan


def changed(plan: Plan, name: str = "", **changes: Any) -> Plan:
    """One group with other settings, the first by default; its cells are solved for by default."""
    name = name or plan.groups[0].name
    groups = tuple(
        replace(group, **{"ratio": None, **changes}) if group.name == name else group
        for group in plan.groups
    )
    assert groups != plan.groups
    return Plan(plan.network, groups)


def by_stage(name: str, **options: Any) -> Plan:
    return plan_network(network(name), Settings(**options), ratio=1)


def half_plan() -> Plan:
    return official.plan({"model": "kw1d2x_mobilenetv2_050"}, network("mobilenetv2_050"))


PLAN_ERRORS: dict[str, tuple[Callable[[], Plan], str]] = {
    "no official model": (
        lambda: by_stage("resnet34"),
        "the official repository has resnet18, resnet50, ",
    ),
    "a network of another family": (lambda: by_stage("deit_tiny"), "MobileNetV2 and ConvNeXt"),
    "solved cells": (
        lambda: plan_network(network("resnet18"), Settings(), params=9_000_000),
        "the official code builds whole multiples or fractions only",
    ),
    "a ratio of 0.3": (
        lambda: plan_network(network("resnet18"), Settings(), ratio=0.3),
        "group 'stage0_conv': 16 cells for 56 mixtures",
    ),
    "cells handed out otherwise": (
        lambda: changed(by_stage("resnet18"), ratio=0.26, num_cells=14),
        "14 cells for 56 mixtures; the official code shares them out among the layers otherwise: "
        "plan with ratio 0.25, which gives as many",
    ),
    "columns of a basis cut otherwise": (
        # Nine layers of 49 mixtures, a cell each: 1/49 of 49 truncates to 0 in double precision.
        lambda: changed(by_stage("convnext_tiny", basis_ratio=0.5), "stage2_dwconv", num_cells=9),
        "9 cells for 441 mixtures; the official code shares them out among the layers otherwise",
    ),
    "one layer static": (
        lambda: Plan(network("resnet18"), by_stage("resnet18", sharing="layer").groups[1:]),
        "the official model is another: it makes layer1.0.conv1 dynamic",
    ),
    "one layer more": (
        lambda: by_stage("resnet18", sharing={"all": ["layer*", "conv1"]}),
        "the official model is another: it keeps conv1 static",
    ),
    "groups of one's own": (
        lambda: by_stage("resnet18", sharing=[["layer[12]*"], ["layer[34]*"]]),
        "cannot say these groups: group0 of ",
    ),
    "whole kernels": (
        lambda: by_stage("resnet18", sharing="layer", spatial_partition=False),
        "cells of (64, 64, 3, 3); the official models always partition kernels",
    ),
    "another norm": (
        lambda: by_stage("resnet18", norm="layer"),
        "group 'stage0_conv': norm 'layer'; the official resnet has 'batch'",
    ),
    "two bases": (
        lambda: changed(by_stage("resnet18", basis_ratio=0.5), basis_ratio=0.25),
        "basis_ratio 0.25, 0.5: the official code takes one for all warehouses",
    ),
    "a 1/2x model of another attention": (
        lambda: changed(half_plan(), reduction=1 / 16),
        "the official kw1d2x_mobilenetv2_050 has fixed settings",
    ),
    "a 1/2x model with a basis": (
        lambda: changed(half_plan(), basis_ratio=0.5),
        "the official kw1d2x_mobilenetv2_050 has fixed settings",
    ),
}


@pytest.mark.parametrize("case", PLAN_ERRORS)
def test_a_plan_that_the_official_code_cannot_build_is_refused(case: str) -> None:
    make, message = PLAN_ERRORS[case]
    with pytest.raises(PlanError, match=re.escape(message)):
        official.write_config(make())


def handed_out(mixtures: int, ratio: float) -> int:
    """Cells that the official code hands to a layer."""
    if ratio >= 1:
        return mixtures * int(ratio)
    every = int(1 / ratio)
    return sum(i % every == (i // every) % every for i in range(mixtures))


@pytest.mark.parametrize("mixtures", [(1,), (5,), (3, 1), (9, 9, 9), (18, 2, 9, 9), (147,)])
def test_the_official_code_hands_out_all_cells_of_what_counts_as_buildable(
    mixtures: tuple[int, ...],
) -> None:
    total = sum(mixtures)

    def builds(ratio: float) -> int | None:
        """The cells that a ratio gives, if the official code hands out as many."""
        cells = max(int(total * ratio), 1)
        return cells if sum(handed_out(m, ratio) for m in mixtures) == cells else None

    tried = [k / (20 * total) for k in range(1, 60 * total)] + [1 / r for r in range(1, 2 * total)]
    possible = {builds(ratio) for ratio in tried}
    found = {n: [b for b, _ in buildable(n, mixtures)] for n in range(1, 3 * total)}
    assert all(builds(ratio) == n for n, ratios in found.items() for ratio in ratios)
    assert [n for n in found if n * n >= total and bool(found[n]) != (n in possible)] == []
    assert found[total]


# State dicts: names and shapes


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """As in the data: tensors, entries, SHA-256 of the sorted lines."""
    lines = sorted(
        f"{key} {'x'.join(map(str, shape)) or 'scalar'}" for key, shape in shapes.items()
    )
    entries = sum(math.prod(shape) for shape in shapes.values())
    return f"{len(shapes)} {entries} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def official_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in official.to_official(model).items()}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    """The official names and shapes of a config, from the data."""
    found: dict[str, tuple[int, ...]] = {}
    for key, text in STATES["listed"][name].items():
        shape = tuple(int(size) for size in text.split("x"))
        if key.endswith(".*"):
            tensors = ("weight", "bias", "running_mean", "running_var")
            found |= {f"{key[:-1]}{tensor}": shape for tensor in tensors}
            found[f"{key[:-1]}num_batches_tracked"] = ()
        else:
            found[key] = shape
    return found


def test_the_lists_of_the_data_have_its_digests() -> None:
    assert set(STATES["listed"]) == {"kw1x_resnet18", "kw1d2x_mobilenetv2_050"}
    for name in STATES["listed"]:
        assert digest(listed(name)) == STATES["digests"][name]


@pytest.mark.parametrize("name", STATES["listed"])
def test_names_and_shapes_are_those_of_the_official_state_dict(name: str) -> None:
    config = official.read_config(config_of(name))
    with torch.device("meta"):
        model = built(config.backbone, official.plan(config, network(config.backbone)))
    assert official_shapes(model) == listed(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_the_official_names_and_shapes(name: str) -> None:
    config = official.read_config(config_of(name))
    with torch.device("meta"):
        model = built(config.backbone, official.plan(config, network(config.backbone)))
    assert digest(official_shapes(model)) == STATES["digests"][name]


OTHERS = ["kw1x_resnet18", "kw1d2x_mobilenetv2_100", "convnext_tiny", "kw1x_convnext_tiny"]


@pytest.mark.parametrize("name", OTHERS)
def test_torchvisions_models_have_the_official_names_and_shapes(
    torchvision_models: ModuleType, name: str
) -> None:
    config = official.read_config(config_of(name))
    theirs = {"mobilenetv2_100": "mobilenet_v2"}.get(config.backbone, config.backbone)
    with torch.device("meta"):
        model = getattr(torchvision_models, theirs)()
        plan = official.plan(config, model)
        model = convert_(model, plan) if plan.groups else model
    assert digest(official_shapes(model)) == STATES["digests"][name]


@pytest.mark.parametrize("name", OTHERS)
def test_timms_models_have_the_official_names_and_shapes(timm: ModuleType, name: str) -> None:
    config = official.read_config(config_of(name))
    with torch.device("meta"):
        model = timm.create_model(config.backbone)
        plan = official.plan(config, model)
        model = convert_(model, plan) if plan.groups else model
    assert digest(official_shapes(model)) == STATES["digests"][name]


# State dicts: the function. The official forward, plainly, on a dict of tensors.

State = dict[str, Tensor]


class Warehouse:
    """One `warehouse_manager.weights.i`; its layers take runs of cells, in module order."""

    def __init__(self, state: State, index: int, ratio: float) -> None:
        self.cells = state[f"warehouse_manager.weights.{index}"]
        self.ratio = ratio
        self.next = 0

    def run(self, mixtures: int) -> int:
        """Where the next layer's own cells begin."""
        start = self.next
        self.next += handed_out(mixtures, self.ratio)
        return start


def norm_1d(state: State, key: str, x: Tensor) -> Tensor:
    if f"{key}.running_mean" in state:
        x = (x - state[f"{key}.running_mean"]) / (state[f"{key}.running_var"] + 1e-5).sqrt()
    else:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{key}.weight"] + state[f"{key}.bias"]


def attention(state: State, key: str, pooled: Tensor, warehouse: Warehouse) -> list[list[Tensor]]:
    """One weight per image, mixture and cell."""
    n = len(warehouse.cells)
    hidden = pooled @ state[f"{key}.fc1.weight"].T + state.get(f"{key}.fc1.bias", 0)
    hidden = norm_1d(state, f"{key}.norm1", hidden).clamp(min=0)
    z = hidden @ state[f"{key}.fc2.weight"].T + state.get(f"{key}.fc2.bias", 0)
    if f"{key}.fc3.weight" in state:
        m = len(state[f"{key}.basis_bias"]) // (n + 1)
        local, start = int(warehouse.ratio * m), warehouse.run(m)
        bias = state[f"{key}.basis_bias"].view(m, n + 1)
        rows = []
        for image in z.view(len(z), m, -1):
            for i, row in enumerate(image):
                others = state[f"{key}.fc3.weight"] @ row[local:-1]
                columns = [*others[:start], *row[:local], *others[start:], row[-1]]
                rows.append(torch.stack(columns) + bias[i])
        z = torch.stack(rows).view(len(z), m * (n + 1))
    z = z.view(len(z), -1, n + 1)
    alpha = z / (z.abs().sum(2, keepdim=True) + 1e-3)
    return [[row[:-1] for row in image] for image in alpha]


def conv(
    state: State,
    key: str,
    x: Tensor,
    warehouse: Warehouse | None,
    out_channels: int = 0,
    size: int = 1,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    bias = state.get(f"{key}.bias")
    if warehouse is None:
        return F.conv2d(x, state[f"{key}.weight"], bias, stride, padding, 1, groups)
    alphas = attention(state, f"{key}.attention", x.mean((2, 3)), warehouse)
    cells = warehouse.cells.reshape(*warehouse.cells.shape[:3])
    _, co, ci = cells.shape
    outputs, inputs = out_channels // co, x.shape[1] // groups // ci
    images = []
    for image, alpha in zip(x, alphas, strict=True):
        kernel = x.new_zeros(out_channels, x.shape[1] // groups, size, size)
        assert len(alpha) == size * size * outputs * inputs
        for i, weights in enumerate(alpha):  # position, output block, input block
            position, block = divmod(i, outputs * inputs)
            o, c = divmod(block, inputs)
            row, column = divmod(position, size)
            mixed = torch.tensordot(weights, cells, 1)
            kernel[o * co : (o + 1) * co, c * ci : (c + 1) * ci, row, column] = mixed
        images.append(F.conv2d(image[None], kernel, bias, stride, padding, 1, groups))
    return torch.cat(images)


def batch_norm(state: State, key: str, x: Tensor) -> Tensor:
    tensors = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{key}.{name}"] for name in tensors))


def resnet18(state: State, x: Tensor, warehouses: Callable[[int], Warehouse]) -> Tensor:
    """KW_ResNet of basic blocks, shared by stage."""
    w = [warehouses(index) for index in range(4)]
    x = batch_norm(state, "bn1", conv(state, "conv1", x, None, stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(4):
        for block in range(2):
            key = f"layer{stage + 1}.{block}"
            opens = stage > 0 and block == 0
            before = w[stage - 1] if opens else w[stage]
            out_channels = len(state[f"{key}.bn1.weight"])
            shape = {"out_channels": out_channels, "size": 3, "padding": 1}
            y = conv(state, f"{key}.conv1", x, before, stride=1 + opens, **shape)
            y = batch_norm(state, f"{key}.bn1", y).relu()
            y = batch_norm(state, f"{key}.bn2", conv(state, f"{key}.conv2", y, w[stage], **shape))
            if opens:
                x = conv(state, f"{key}.downsample.0", x, before, out_channels, stride=2)
                x = batch_norm(state, f"{key}.downsample.1", x)
            x = (x + y).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def mobilenetv2_half(state: State, x: Tensor, warehouses: Callable[[int], Warehouse]) -> Tensor:
    """KW1d2x_MobileNetV2. Warehouses: stem, dw of stages 1-5, pw0, dw, pw1 of 6, classifier."""
    w = [warehouses(index) for index in range(10)]
    depthwise = {1: w[1], 2: w[2], 3: w[3], 4: w[4], 5: w[5], 6: w[7]}
    # The stage of each block: the first of a new one belongs to the one before.
    stages = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    strides = {2: 2, 4: 2, 7: 2, 14: 2}

    def layer(key: str, bn: str, x: Tensor, warehouse: Warehouse | None, **options: Any) -> Tensor:
        options["out_channels"] = len(state[f"{bn}.weight"])
        return batch_norm(state, bn, conv(state, key, x, warehouse, **options))

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = relu6(layer("features.0.0", "features.0.1", x, w[0], size=3, stride=2, padding=1))
    for index, stage in enumerate(stages, 1):
        key, y = f"features.{index}.conv", x
        last = stage == 6
        at = 0
        if index > 1:
            y = relu6(layer(f"{key}.0.0", f"{key}.0.1", y, w[6] if last else None))
            at = 1
        y = relu6(
            layer(
                f"{key}.{at}.0",
                f"{key}.{at}.1",
                y,
                depthwise[stage],
                size=3,
                stride=strides.get(index, 1),
                padding=1,
                groups=y.shape[1],
            )
        )
        y = layer(f"{key}.{at + 1}", f"{key}.{at + 2}", y, w[8] if last else None)
        x = x + y if x.shape == y.shape and strides.get(index, 1) == 1 else y
    x = relu6(layer("features.18.0", "features.18.1", x, w[8])).mean((2, 3))
    # The classifier's cells (n, c_out, c_in, 1) mix a matrix.
    classes = len(state["classifier.1.conv.bias"])
    pixels = x[:, :, None, None]
    return conv(state, "classifier.1.conv", pixels, w[9], classes)[:, :, 0, 0]


def convnext(state: State, x: Tensor, warehouses: Callable[[int], Warehouse]) -> Tensor:
    """KW_ConvNeXt. Warehouses: stem, three downsamples, then depthwise and 1x1 of each stage."""
    w = [warehouses(index) for index in range(12)]

    def norm(key: str, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        x = F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], 1e-6)
        return x.movedim(-1, 1)

    for stage, depth in enumerate((3, 3, 9, 3)):
        width = len(state[f"stages.{stage}.0.norm.weight"])
        key = f"downsample_layers.{stage}"
        if stage == 0:
            x = norm(f"{key}.1", conv(state, f"{key}.0", x, w[0], width, size=4, stride=4))
        else:
            x = conv(state, f"{key}.1", norm(f"{key}.0", x), w[stage], width, size=2, stride=2)
        depthwise, pointwise = w[4 + 2 * stage], w[5 + 2 * stage]
        for block in range(depth):
            key = f"stages.{stage}.{block}"
            y = conv(state, f"{key}.dwconv", x, depthwise, width, size=7, padding=3, groups=width)
            y = norm(f"{key}.norm", y)
            y = F.gelu(conv(state, f"{key}.pwconv1", y, pointwise, 4 * width))
            x = x + state[f"{key}.gamma"] * conv(state, f"{key}.pwconv2", y, pointwise, width)
    return norm("norm", x.mean((2, 3))) @ state["head.weight"].T + state["head.bias"]


def half_ratio(index: int) -> float:
    return 0.5 if index in (6, 8, 9) else 1


SHARED = {"sharing_range": ["layer", "conv"]}
Forward = Callable[[State, Tensor, Callable[[int], Warehouse]], Tensor]
# name: (config, width of the network, the official forward, ratio of each warehouse).
TINY: dict[str, tuple[dict[str, Any], float, Forward, Callable[[int], float]]] = {
    "resnet18 1x": ({"model": "kw_resnet18", **SHARED}, 0.25, resnet18, lambda i: 1),
    "resnet18 2x, own ratios": (
        {"model": "kw_resnet18", **SHARED, "cell_num_ratio": [2, 1, 4, 1]},
        0.25,
        resnet18,
        lambda i: (2, 1, 4, 1)[i],
    ),
    "resnet18 1/2x, basis": (
        {
            "model": "kw_resnet18",
            **SHARED,
            "cell_num_ratio": 0.5,
            "cell_inplane_ratio": 0.5,
            "cell_outplane_ratio": 0.5,
            "nonlocal_basis_ratio": 0.0625,
        },
        0.125,
        resnet18,
        lambda i: 0.5,
    ),
    "mobilenetv2 1/2x": (
        {"model": "kw1d2x_mobilenetv2_050"},
        0.5,
        mobilenetv2_half,
        half_ratio,
    ),
    "convnext 1x": (
        {"model": "kw_convnext_tiny", "sharing_range": ["layer", "pwconv"]},
        0.125,
        convnext,
        lambda i: 1,
    ),
}


def randomise(state: State) -> State:
    """Tensors that no two swapped ones can hide behind; statistics that keep signals alive."""
    torch.manual_seed(1)
    return {key: random_like(key, value) for key, value in state.items()}


def random_like(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return torch.tensor(7)
    values = torch.randn_like(value)
    if key.endswith(("running_var", "norm.weight", "norm1.weight", "gamma")):
        return values.square() + 0.1
    if "warehouse" in key or key.endswith("cells"):
        return values
    if value.dim() > 1:
        return values / math.sqrt(value[0].numel())
    return values + 0.5


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Callable[[State], Tensor]]]:
    """A converted tiny network in double precision, and the official forward on its images."""
    config, width, forward, ratio = TINY[request.param]
    read = official.read_config(config)
    torch.manual_seed(0)
    model = zoo.create(read.backbone, num_classes=10, width=width)
    model = convert_(model, official.plan(read, model, (3, 32, 32))).double().eval()
    model.images = images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        yield (
            model,
            lambda state: forward(state, images, lambda i: Warehouse(state, i, ratio(i))),
        )


def assert_same(one: Tensor, other: Tensor) -> None:
    spread = (other[0] - other[1]).abs().max()
    assert spread > 1e-3, "the images make no difference: nothing is compared"
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(spread))


def test_official_weights_give_the_official_function_here(
    tiny: tuple[nn.Module, Callable[[State], Tensor]],
) -> None:
    model, forward = tiny
    state = randomise(official.to_official(model))
    assert official.from_official_(model, state) is model
    assert_same(model(model.images), forward(state))
    again = official.to_official(model)
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_our_weights_give_our_function_there(
    tiny: tuple[nn.Module, Callable[[State], Tensor]],
) -> None:
    model, forward = tiny
    own = {k: v for k, v in model.state_dict().items() if ".attention.assignment" not in k}
    model.load_state_dict(
        {k: v if k.endswith("temperature") else random_like(k, v) for k, v in own.items()},
        strict=False,
    )
    assert_same(model(model.images), forward(official.to_official(model)))


# State dicts: what checkpoints look like, and what is refused


@functools.cache
def tiny_plan() -> Plan:
    with torch.device("meta"):
        model = zoo.create("resnet18", num_classes=10, width=0.125)
    return official.plan({"model": "kw_resnet18", **SHARED}, model, (3, 32, 32))


def small() -> nn.Module:
    torch.manual_seed(0)
    return built("resnet18", tiny_plan(), num_classes=10, width=0.125)


@pytest.mark.parametrize("wrapping", ["none", "model", "state_dict", "ddp", "both"])
def test_a_state_dict_is_found_in_what_holds_it(wrapping: str) -> None:
    model = small()
    state = given = randomise(official.to_official(model))
    if wrapping in ("ddp", "both"):
        given = {f"module.{key}": value for key, value in given.items()}
    if wrapping in ("model", "state_dict", "both"):
        given = {"state_dict" if wrapping == "state_dict" else "model": given, "epoch": 3}  # type: ignore[dict-item]
    official.from_official_(model, given)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert torch.equal(model.kw_warehouses.stage3_conv.cells, state["warehouse_manager.weights.3"])


def test_a_checkpoint_of_the_official_program_loads_without_running_code(tmp_path: Path) -> None:
    model = small()
    state = randomise(official.to_official(model))
    path = tmp_path / "checkpoint-best.pth"
    arguments = argparse.Namespace(model="kw_resnet18", lr=0.1)
    torch.save({"model": state, "optimizer": {}, "epoch": "best", "args": arguments}, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        official.from_official_(model, torch.load(path, weights_only=True))
    assert torch.equal(model.bn1.weight, state["bn1.weight"])


def test_loaded_weights_run_at_temperature_zero() -> None:
    model = small()
    state = official.to_official(model)
    kwlayers.set_temperature_(model, 0.5)
    official.from_official_(model, state)
    found = [m.temperature.item() for m in model.modules() if isinstance(m, kwlayers.Attention)]
    assert set(found) == {0.0}
    assert len(found) == 19


def test_a_temperature_above_zero_is_not_written() -> None:
    model = kwlayers.set_temperature_(small(), 0.25)
    with pytest.raises(PlanError, match=r"conv1 is at temperature 0.25, the official code would"):
        official.to_official(model)


def test_tensors_share_the_models_memory() -> None:
    model = small()
    official.to_official(model)["warehouse_manager.weights.0"].zero_()
    assert not model.kw_warehouses.stage0_conv.cells.any()


def test_old_checkpoints_may_lack_the_counters_of_batch_norms() -> None:
    model = small()
    state = randomise(official.to_official(model))
    left = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(state) - len(left) == 20 + 19
    official.from_official_(model, left)
    assert torch.equal(model.fc.bias, state["fc.bias"])


def test_all_that_does_not_fit_is_listed_and_nothing_is_copied() -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state: dict[str, Any] = randomise(official.to_official(model))
    del state["layer1.0.conv1.attention.fc1.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    state["warehouse_manager.weights.2"] = torch.zeros(3, 32, 32, 1, 1)
    state["fc.weight"] = state["fc.weight"].T
    state["fc.bias"] = [0.0] * 10
    with pytest.raises(PlanError) as error:
        official.from_official_(model, state)
    assert str(error.value).splitlines() == [
        "the weights are not those of this model in its official form:",
        "  missing (1): layer1.0.conv1.attention.fc1.weight",
        "  unexpected (1): layer1.0.conv1.weight",
        "  misshapen (3): fc.weight (64, 10) instead of (10, 64), fc.bias list instead of (10,), "
        "warehouse_manager.weights.2 (3, 32, 32, 1, 1) instead of (47, 32, 32, 1, 1)",
        "convert a model of as many classes by the plan of the weights' own config "
        "(kwlayers.official.plan)",
    ]
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_weights_of_another_model_are_refused() -> None:
    static = zoo.create("resnet18", num_classes=10, width=0.125)
    with pytest.raises(PlanError, match=r"missing \(137\): .* and 129 more\n  unexpected \(19\)"):
        official.from_official_(small(), official.to_official(static))


def test_what_is_no_state_dict_is_refused() -> None:
    with pytest.raises(PlanError, match="expected an official state dict, got list"):
        official.from_official_(small(), [])  # type: ignore[arg-type]


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        model = built("resnet18", tiny_plan(), num_classes=10, width=0.125)
    with pytest.raises(PlanError, match="the model is on the meta device"):
        official.from_official_(model, {})


class Wide(nn.Module):
    """A ResNet with a parameter that the official one has not."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(zoo.create("resnet18", width=0.125).__dict__)
        self.token = nn.Parameter(torch.zeros(3))


MODEL_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (dict, "model: expected an nn.Module, got dict"),
    "another family": (
        lambda: zoo.create("deit_tiny", width=0.1),
        "the official repository has ResNets of four stages",
    ),
    "a ResNet of three stages": (lambda: zoo.create("resnet20"), "ResNets of four stages"),
    "names of one's own": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "none of theirs by"),
    "a parameter more": (Wide, "token: the official resnet has no such tensor"),
    "data-parallel": (lambda: nn.DataParallel(small()), "wrapped in DataParallel: pass the one"),
    "one layer static": (
        lambda: custom(sharing={"a": ["layer[12]*"], "b": ["layer3*", "layer4.1*"]}),
        "the official model is another: it makes layer4.0.downsample.0, layer4.0.conv1, layer4.0."
        "conv2 dynamic",
    ),
    "a dynamic stem": (
        lambda: custom(sharing={"a": ["layer3*"], "b": ["conv1"]}),
        "it keeps conv1 static",
    ),
    "a ratio of 0.3": (
        lambda: custom(ratio=0.3),
        "kw_warehouses.stage0_conv: 16 cells for 56 mixtures; the official code, which hands out",
    ),
    "cells of a basis that start elsewhere": (
        lambda: rebuilt("resnet18", ratio=0.26, num_cells=14),
        "stage0_conv: 14 cells for 56 mixtures; the official code, which hands out whole",
    ),
    "columns of a basis cut otherwise": (
        lambda: rebuilt("convnext_tiny", "stage2_dwconv", num_cells=9),
        "stage2_dwconv: 9 cells for 441 mixtures; the official code, which hands out whole",
    ),
}


def rebuilt(model: str, group: str = "", **changes: Any) -> nn.Module:
    """A model with a basis, and one warehouse changed."""
    plan = changed(by_stage(model, basis_ratio=0.5), group, **changes)
    with torch.device("meta"):
        return built(model, plan)


def custom(ratio: float = 1, **options: Any) -> nn.Module:
    model = zoo.create("resnet18", num_classes=10, width=0.125)
    return convert_(model, kwlayers.plan_model(model, (3, 32, 32), ratio=ratio, **options))


@pytest.mark.parametrize("case", MODEL_ERRORS)
def test_a_model_that_is_no_official_one_is_refused(case: str) -> None:
    make, message = MODEL_ERRORS[case]
    model = make()
    for use in (official.to_official, lambda model: official.from_official_(model, {})):
        with pytest.raises(PlanError, match=re.escape(message)):
            use(model)
