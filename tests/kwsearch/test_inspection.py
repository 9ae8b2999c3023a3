"""kwsearch inspect: every layer, where it stands, what it costs, and totals that add up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kwlayers import Rule, Settings, plan_network, trace
from kwsearch import zoo
from kwsearch.cli import run
from kwsearch.inspection import layers_of
from kwsearch.terminal import new_table
from tests.zoo import ANYWHERE

OURS = "kernel_warehouse"


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


@pytest.mark.parametrize("method", ANYWHERE)
def test_parts_of_every_method_add_up(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("resnet20", "--method", method, *(() if method != OURS else ("--ratio", "1")))
    found = json.loads(inspected(capsys, *asked, "--json"))
    layers = found["layers"]
    for part, total in found["macs"].items():
        if part in ("conv", "mixing", "attention", "modulation"):
            assert sum(layer["macs"][part] for layer in layers) == total
    assert sum(layer["params"]["attention"] for layer in layers) == found["params"]["attention"]
    kernels = sum(layer["params"]["kernels"] for layer in layers)
    shared = sum(w["num_cells"] * prod(w["cell"]) for w in found["warehouses"])
    assert kernels + shared == found["params"].get("warehouses", found["params"].get("kernels"))
    text = inspected(capsys, *asked)
    assert ("modulation" in text) is bool(found["macs"].get("modulation"))
    (head,) = (line for line in text.splitlines() if line.startswith(" layer "))
    assert ("warehouse" in head) is (method == OURS)


def test_added_blocks_stay_static_for_the_reason_of_those_they_are_like(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = json.loads(inspected(capsys, "resnet50", "--method", "kernel_dna", "--json"))
    why = {layer["name"]: layer["static"] for layer in found["layers"]}
    assert why["layer3.6.conv1"] == why["layer3.5.conv1"] != "no group has it"
    assert why["layer3.6.conv2"] == ""  # the parent of the one that was left


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
    assert by_name["layer1.0.conv1"]["static"] == "a rule keeps it static (layer1.*)"
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
    settings = Settings(rules=(Rule("layer[12].*", static=True),))
    plan = plan_network(found, settings, ratio=1)
    why = {layer.name: layer.static for layer in layers_of(plan, settings)}
    assert why["layer1.0.conv1"] == "a rule keeps it static (layer[12].*)"
    assert why["fc"] == "the head stays static"
    assert why["layer3.1.conv1"] == ""
    # A plan of unknown origin does not say why.
    why = {layer.name: layer.static for layer in layers_of(plan)}
    assert why["layer1.0.conv1"] == "no group has it"


RULES = """\
format: 1
model: resnet18
input: 3x32x32
budget: {ratio: 0.5}
method:
  rules:
    - {layers: ["layer1.*"], static: true}
    - {layers: ["*.downsample.0"], share: shortcuts, cell_ratio: 0.5}
    - {layers: ["fc"], share: head}
"""


def test_inspect_and_budget_have_the_same_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RULES)
    found = json.loads(inspected(capsys, str(recipe), "--json"))
    stages: dict[str, set[int | None]] = {}
    attention: dict[str, int] = {}
    for layer in found["layers"]:
        if layer["warehouse"]:
            name = layer["warehouse"]
            stages.setdefault(name, set()).add(layer["stage"])
            attention[name] = attention.get(name, 0) + layer["params"]["attention"]
    assert stages.pop("shortcuts") == {0, 1, 2}
    assert stages.pop("head") == {None}
    assert stages == {f"stage{i}_conv": {i} for i in range(4)}
    assert run(["budget", str(recipe)]) == 0
    table, *_ = capsys.readouterr().out.split(" static layers, norms")
    rows = re.findall(r"^ (\S+(?: \S+)?) .* ([\d,]+) +[\d,]+ +[\d,]+ $", table, re.M)
    assert {name: int(count.replace(",", "")) for name, count in rows} == {
        "shortcuts": attention["shortcuts"],
        "head": attention["head"],
        **{f"stage {i}": attention[f"stage{i}_conv"] for i in range(4)},
    }


NETS = """
    import torch
    from torch import nn

    def mlp():
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10))

    def encoder():
        return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def layer():
        return nn.Conv2d(3, 8, 3)

    def ups():
        up = [nn.ConvTranspose2d(32, 32, 2, 2) for _ in range(2)]
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), *up, nn.Conv2d(32, 8, 1))
"""


def test_a_network_that_stays_static_is_shown_with_its_reasons(
    own_code: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = own_code(NETS)
    text = inspected(capsys, f"{own}:mlp", "--trust", "--input", "3x32x32", "--ratio", "0.5")
    assert text.startswith(f"{own}:mlp at 3x32x32: 0 layers in 0 warehouses, 2 static\n")
    assert "parameters: 394,634, 1.00 x static (394,634)\n" in text
    assert "(1) even with a single cell, its attention would outweigh its kernel\n" in text
    text = inspected(capsys, f"{own}:encoder", "--trust", "--input", "5x32", "--params", "1k")
    assert "(2) TransformerEncoderLayer reads its weight without calling it\n" in text
    assert "self_attn: its own weights stay static (MultiheadAttention)\n" in text
    text = inspected(capsys, f"{own}:layer", "--trust", "--input", "3x8x8")
    assert re.search("^ the model itself +8x3x3x3 +static", text, re.M)
    found = json.loads(inspected(capsys, f"{own}:layer", "--trust", "--input", "3x8x8", "--json"))
    assert found["warehouses"] == []
    assert found["params"]["total"] == found["static"]["params"] == 8 * 27 + 8
    # Only inspect has something to show.
    assert run(["budget", f"{own}:layer", "--trust", "--input", "3x8x8", "--ratio", "1"]) == 2
    assert "the model itself stays static: it has no parent" in capsys.readouterr().err


def test_modules_that_are_no_layers_are_shown_as_static(
    own_code: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (f"{own_code(NETS)}:ups", "--trust", "--input", "3x8x8")
    text = inspected(capsys, *asked)
    assert ": 1 layer in 1 warehouse, 2 static\n" in text
    assert "2 and 1 more: their own weights stay static (ConvTranspose2d)\n" in text
    others = json.loads(inspected(capsys, *asked, "--json"))["others"]
    params = 32 * 32 * 4 + 32
    assert others == [
        {"name": name, "kind": "ConvTranspose2d", "params": params} for name in ("2", "3")
    ]


# Widths: of a file, of $COLUMNS, of a terminal


def test_a_table_in_a_file_folds_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = inspected(capsys, "deit_tiny", "--ratio", "0.5")
    assert text.count("stage0_attention") == 24
    assert run(["budget", "deit_tiny", "--ratio", "0.5", "--by", "layer"]) == 0
    assert capsys.readouterr().out.count(" blocks.11.attn.qkv ") == 2


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_narrow_table_drops_columns_before_it_folds_names(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = inspected(capsys, "deit_tiny", "--ratio", "0.5")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = inspected(capsys, "deit_tiny", "--ratio", "0.5")
    assert max(map(len, text.splitlines())) <= columns
    assert text.count("stage0_attention") == 24
    assert "left out, as the terminal is narrow: unchanged params" in text
    assert "left out" not in whole
    (row, *_) = (line for line in text.splitlines() if "stage0_attention" in line)
    (full, *_) = (line for line in whole.splitlines() if "stage0_attention" in line)
    # attn.qkv: m = 576 / 192, n of half of 12 * (3 + 1).
    assert row.split()[0] == "attn.qkv"
    assert set(row.split()) < set(full.split())
    assert row.split()[row.split().index("stage0_attention") + 1 :][:2] == ["3", "24"]


def test_a_section_of_a_narrowed_table_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(("name", "kernel"), ("count",), spare=("kernel",))
    table.add_row("first", "k" * 40, "1")
    table.add_section()
    table.add_row("total", "k" * 40, "2")
    Console(width=30).print(table)
    lines = [line.strip("─ ") for line in capsys.readouterr().out.splitlines()]
    assert [re.sub(" +", " ", line) for line in lines] == [
        *("", "name count", "", "first 1", "", "total 2", ""),
        *("left out, as the terminal is", "narrow: kernel"),
    ]
