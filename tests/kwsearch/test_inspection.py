"""kwsearch inspect: every layer, where it stands, what it costs, and totals that add up."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kwlayers import Rule, Settings, plan_network, trace
from kwsearch import zoo
from kwsearch.cli import run
from kwsearch.inspection import layers_of


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert run(["inspect", *args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ["resnet20", "mobilenetv2_050", "deit_tiny"])
def test_the_layers_add_up_to_the_plan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspected(capsys, model, "--ratio", "0.5", "--sharing", "stage", "--json"))
    layers = found["layers"]
    for part in ("mixing", "attention"):
        assert sum(layer["macs"][part] for layer in layers) == found["macs"][part] > 0
    assert sum(layer["macs"]["conv"] for layer in layers) == found["macs"]["conv"]
    assert sum(layer["params"]["attention"] for layer in layers) == found["params"]["attention"]
    cells = {w["name"]: w["num_cells"] for w in found["warehouses"]}
    for layer in layers:
        assert bool(layer["static"]) == (layer["warehouse"] is None)
        if not layer["static"]:
            assert layer["cells"] == cells[layer["warehouse"]]
            assert layer["mixtures"] > 0


def test_a_small_network_is_shown_as_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.rstrip() for line in inspected(capsys, "resnet20", "--ratio", "1").splitlines()]
    text = "\n".join(lines)
    assert lines[0] == "resnet20 at 3x32x32: 20 layers in 3 warehouses, 2 static"
    assert "\n layer1.0\n   conv1 " in text
    (shortcut,) = (line for line in lines if line.startswith("   downsample.0   32x16x1x1"))
    # The 1x1 kernel of 32 x 16 in cells of 16 x 16: two mixtures, from stage 0's 56 + 18 + 2.
    assert shortcut.split()[2:6] == ["0", "stage0_conv", "2", "74"]
    assert "(1) the stem stays static" in lines
    assert "(2) the head stays static" in lines
    # 3 x 3 over 16 channels at 32 x 32, twice for FLOPs.
    assert "2.36M" in text
    assert "4.72M" in inspected(capsys, "resnet20", "--ratio", "1", "--flops")


def test_a_recipe_with_rules_says_what_they_keep(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "format: 1\nmodel: resnet20\nbudget: {ratio: 1}\nmethod:\n  rules:\n"
        "    - {layers: [layer1.*], static: true}\n"
        "    - {layers: [layer3.*], share: late, cell_ratio: 0.5, ratio: 2}\n"
    )
    found = json.loads(inspected(capsys, str(recipe), "--json"))
    by_name = {layer["name"]: layer for layer in found["layers"]}
    assert by_name["layer1.0.conv1"]["static"] == "no warehouse takes it"
    assert by_name["layer3.0.conv1"]["warehouse"] == "late"
    (late,) = (w for w in found["warehouses"] if w["name"] == "late")
    # The common channels of layer3 are 64 (out) and 32 (in).
    assert late["cell"] == [32, 16, 1, 1]
    assert late["num_cells"] == 2 * sum(
        layer["mixtures"] for layer in found["layers"] if layer["warehouse"] == "late"
    )
    # The plan says it all: written, it gives the same again, rules or not.
    written = tmp_path / "plan.yaml"
    assert run(["budget", str(recipe), "-o", str(written)]) == 0
    capsys.readouterr()
    assert json.loads(inspected(capsys, str(written), "--json"))["layers"] == found["layers"]
    assert "share: late" in written.read_text()


def test_a_rule_that_does_nothing_is_refused_with_its_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "format: 1\nmodel: resnet20\nbudget: {ratio: 1}\n"
        "method: {rules: [{layers: [layer9.*], static: true}]}\n"
    )
    assert run(["inspect", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "rule 1 (layer9.*): no convolution or linear layer is named 'layer9.*'" in message


def test_layers_that_nothing_converts_say_so() -> None:
    with torch.device("meta"):
        found = trace(zoo.create("resnet20"), (3, 32, 32))
    plan = plan_network(found, Settings(rules=(Rule("layer[12].*", static=True),)), ratio=1)
    why = {layer.name: layer.static for layer in layers_of(plan)}
    assert why["layer1.0.conv1"] == "no warehouse takes it"
    assert why["fc"] == "the head stays static"
    assert why["layer3.1.conv1"] == ""
