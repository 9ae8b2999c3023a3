"""The published settings and the recipes that hold them, against the official code's counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kwlayers
from kwsearch.networks import build_model, trace_model
from kwsearch.published import PUBLISHED, Published, find, of_model
from kwsearch.recipe import load_recipe
from kwsearch.resolve import network_of, outcome_of

ROOT = Path(__file__).parents[2]
ORACLES = {
    entry["config"]: entry
    for entry in json.loads((ROOT / "tests/data/kernel_warehouse.json").read_text())
}


def oracle_of(entry: Published) -> dict:
    ratio = {0.25: "1d4", 0.5: "1d2"}.get(entry.ratio, f"{entry.ratio:g}")
    return ORACLES[f"kw{ratio}x_{entry.model}"]


def test_there_are_fifteen_settings_and_a_recipe_for_each() -> None:
    assert len(PUBLISHED) == 15
    slugs = {entry.slug for entry in PUBLISHED}
    assert slugs == {path.stem for path in (ROOT / "recipes").glob("kw_*.yaml")}


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.slug)
def test_a_recipe_builds_what_the_official_code_builds(entry: Published) -> None:
    oracle = oracle_of(entry)
    recipe = load_recipe(ROOT / "recipes" / f"{entry.slug}.yaml")
    with torch.device("meta"):
        model = recipe.create_model()
    plan = recipe.plan_for(model)
    cost = plan.cost()
    assert cost.params.total == oracle["params"]
    assert cost.params.warehouses == oracle["warehouse_params"]
    assert cost.params.attention == oracle["attention_params"]
    assert cost.params.unchanged == oracle["other_params"]
    assert cost.macs.total == oracle["macs_224"]
    assert cost.macs.mixing == oracle["mixing_macs"]
    assert cost.macs.attention == oracle["attention_macs"]
    ours = Counter(((w.num_cells, *w.cell), len(w.layers)) for w in plan.warehouses)
    assert ours == Counter((tuple(w["cells"]), w["layers"]) for w in oracle["warehouses"])
    kwlayers.convert_(model, plan)
    assert sum(p.numel() for p in model.parameters()) == oracle["params"]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=() if entry.ratio == 1 else pytest.mark.slow)
        for entry in PUBLISHED
    ],
    ids=lambda entry: entry.slug,
)
def test_torch_counts_the_official_macs_in_the_built_network(entry: Published) -> None:
    with torch.device("meta"), torch.no_grad():
        model = build_model(entry.model).eval()
        kwlayers.convert_(model, entry.plan(trace_model(entry.model)))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * oracle_of(entry)["macs_224"]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.slug)
def test_a_recipe_says_what_the_table_says(entry: Published) -> None:
    path = ROOT / "recipes" / f"{entry.slug}.yaml"
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = build_model(entry.model)
    assert recipe.plan_for(model) == entry.plan(trace_model(entry.model))
    assert recipe.training is not None
    assert recipe.training.epochs == entry.epochs
    assert recipe.training.temperature_epochs == entry.temperature_epochs
    opening = path.read_text().splitlines()
    assert opening[0].startswith(f"# {entry.name}: KernelWarehouse at b = {entry.ratio:g}")
    assert opening[3] == f"#     kwsearch budget recipes/{path.name}"


def test_a_published_setting_is_found_by_model_and_ratio() -> None:
    found = find("resnet18", 0.25)
    assert found is not None
    assert (found.name, found.top1) == ("ResNet18 1/4x", 72.73)
    assert find("resnet18", 0.3) is None
    assert [entry.ratio for entry in of_model("resnet50")] == [0.5, 1, 4]


def test_a_published_setting_holds_for_other_classes() -> None:
    entry = find("mobilenetv2_100", 0.5)
    assert entry is not None
    plan = entry.plan(trace_model("mobilenetv2_100", (3, 96, 96), 10))
    classifier = plan.groups[-1]
    # 10 x 1280 in cells of 10 x 32: 40 mixtures, half as many cells.
    assert (classifier.name, classifier.cell, classifier.num_cells) == (
        "classifier",
        (10, 32, 1),
        20,
    )


# Parameters as counted in the published implementations, with our models' heads.
OTHERS = {
    "odconv_resnet18_1x": 11_943_944,
    "odconv_resnet18_4x": 44_901_640,
    "odconv_resnet50_1x": 28_635_112,
    "odconv_resnet50_4x": 90_670_888,
    "odconv_resnet101_1x": 50_820_000,  # in the README of its authors, in units of 10,000
    "odconv_resnet101_2x": 90_440_000,
    "odconv_mobilenetv2_100_1x": 4_940_185,
    "odconv_mobilenetv2_100_4x": 11_512_149,
    "odconv_mobilenetv2_075_1x": 3_510_000,  # in the same README
    "odconv_mobilenetv2_075_4x": 7_496_013,
    "odconv_mobilenetv2_050_1x": 2_425_537,
    "odconv_mobilenetv2_050_4x": 4_435_501,
    "dyconv_resnet18_4x": 45_239_348,
    "dyconv_resnet50_4x": 97_138_424,
    "dyconv_mobilenetv2_100_4x": 10_653_944,
    "dyconv_mobilenetv2_050_4x": 4_122_588,
    "condconv_resnet18_8x": 88_599_656,
    "condconv_resnet50_8x": 170_398_376,
    "condconv_mobilenetv2_100_8x": 15_969_808,
    "condconv_mobilenetv2_050_8x": 5_221_072,
    "dcd_resnet18": 14_703_332,
    "dcd_resnet50": 29_835_056,
    "dcd_mobilenetv2_100": 5_720_028,
    "dcd_mobilenetv2_050": 2_664_300,
    "fdconv_resnet18": 11_745_712 + 512 * 1000 + 1000,  # of a backbone, and the head
    "fdconv_resnet50": 27_155_152 + 2048 * 1000 + 1000,
    "kernel_dna_resnet18": 9_240_798,
    "kernel_dna_resnet50": 22_778_060,
    "kernel_dna_mobilenetv2_100": 3_136_840,
    "kernel_dna_mobilenetv2_050": 1_878_232,
    "pad_net_resnet50_0.3": 47_902_917 + 1,  # weights are whole: at most one less a group
    "dymn04": 1_961_239,
    "dymn10": 10_548_479,
    "dymn20": 39_966_143,
    "dymn04_replace_se": 1_829_287,
    "dymn10_replace_se": 9_833_935,
}


def test_every_other_published_setting_has_its_recipe() -> None:
    stems = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert stems >= set(OTHERS)
    searches = {
        *("quickstart", "fashion_mnist", "esc50", "micronas", "phoenix14", "phoenix14_design"),
    }
    assert all(stem.startswith("kw_") for stem in stems - set(OTHERS) - searches)


@pytest.mark.parametrize("stem", OTHERS)
def test_the_recipes_of_other_methods_count_as_published(stem: str) -> None:
    path = ROOT / "recipes" / f"{stem}.yaml"
    recipe = load_recipe(path)
    cost = outcome_of(recipe, network_of(recipe)).plan.cost()
    unit = 10_000 if OTHERS[stem] % 10_000 == 0 else 1
    assert abs(round(cost.deployed / unit) * unit - OTHERS[stem]) <= ("pad_net" in stem)
    opening = path.read_text().splitlines()
    assert opening[1].startswith(f"# {cost.deployed:,} parameters")
    size = "x".join(map(str, recipe.input or ()))
    assert f"{cost.macs.total:,} MACs at {size}." in opening[1]
    assert opening[3] == f"#     kwsearch budget recipes/{path.name}"
