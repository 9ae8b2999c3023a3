"""The command line: what it prints, its exit codes, and that it starts at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kwlayers.plan import PlanError
from kwsearch import cli
from kwsearch.recipe import load_recipe

ROOT = Path(__file__).parents[2]


class Ran:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kwsearch", *args])
        code = cli.run(list(args))
        return Ran(code, *capsys.readouterr())

    return call


def numbers(line: str) -> list[int]:
    return [int(text.replace(",", "")) for text in re.findall(r"(?<![\w.])[\d,]+(?![\w.])", line)]


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


HEAVY = {"torch", "optuna", "pydantic", "numpy", "fvcore"}


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_after("from kwsearch import cli; cli.run(['--help'])")
    assert not HEAVY & loaded
    assert "click" in loaded


def test_the_import_check_can_fail() -> None:
    assert "pydantic" in modules_after("from kwsearch import cli; cli.run(['schema'])") & HEAVY


def test_a_budget_needs_neither_torchs_compiler_nor_the_search() -> None:
    loaded = modules_after(
        "from kwsearch import cli; cli.run(['budget', 'resnet50', '--ratio', '0.5'])"
    )
    assert not {"torch._dynamo", "sympy", "optuna", "pydantic"} & loaded
    assert "torch" in loaded


def test_help_lists_every_command_with_its_own_help(run) -> None:
    shown = run("--help").out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\w", shown, re.M)
        assert run(name, "--help").code == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kwsearch", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert re.fullmatch(r"kwsearch, version \d+\.\d+\.\d+\n", done.stdout)


def test_budget_of_half_a_resnet50_as_json(run) -> None:
    ran = run("budget", "resnet50", "--ratio", "0.5", "--json")
    data = json.loads(ran.out)
    assert ran.code == 0
    assert data["model"] == "resnet50"
    assert data["input"] == [3, 224, 224]
    assert data["ratio"] == 0.5
    assert data["static"] == {"params": 25_557_032, "macs": 4_089_184_256}
    assert data["params"] == {
        "total": 17_638_264,
        "warehouses": 11_712_512,
        "attention": 3_793_744,
        "unchanged": 2_132_008,
    }
    macs = data["macs"]
    assert macs["total"] == 8_167_645_248
    assert macs["mixing"] == 4_070_711_296
    assert macs["attention"] == 7_749_696
    assert macs["conv"] + macs["unchanged"] == 4_089_184_256
    assert data["published"] == "ResNet50 1/2x"
    assert [w["num_cells"] for w in data["warehouses"]] == [174, 208, 276, 94]
    assert data["warehouses"][0]["cell"] == [32, 32, 1, 1]
    assert "layer1.0.conv2" in data["warehouses"][0]["layers"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("resnet50", "--ratio", "0.5"),
        ("mobilenetv2_100", "--ratio", "4"),
        ("resnet20", "--params", "300k", "--sharing", "layer"),
        ("deit_tiny", "--total-ratio", "0.5x"),
    ],
)
@pytest.mark.parametrize("by", ["stage", "layer"])
def test_the_columns_of_both_tables_add_up(run, arguments: tuple[str, ...], by: str) -> None:
    lines = run("budget", *arguments, "--by", by).out.splitlines()
    stated = {
        "parameters": numbers(next(line for line in lines if line.startswith("parameters: ")))[0],
        "MACs": numbers(next(line for line in lines if line.startswith("MACs: ")))[0],
    }
    for unit in ("parameters", "MACs"):
        first = next(i for i, line in enumerate(lines) if re.match(rf" *{unit} ", line))
        end = next(i for i in range(first, len(lines)) if lines[i].strip().startswith("total"))
        width = 5 if unit == "MACs" else 4 if by == "stage" else 3
        body = [numbers(line)[-width:] for line in lines[first + 2 : end] if line.strip()]
        total = numbers(lines[end])[-width:]
        assert len(body) >= 2
        assert [sum(column) for column in zip(*body, strict=True)] == total
        parts = total[:-1] if width > 3 else total
        assert sum(parts) == stated[unit]
        if width > 3:
            assert all(sum(row[:-1]) == row[-1] for row in body)


def test_flops_are_twice_the_macs(run) -> None:
    macs = run("budget", "resnet18", "--ratio", "1").out
    flops = run("budget", "resnet18", "--ratio", "1", "--flops").out
    assert "MACs: 2,199,216,128" in macs
    assert f"FLOPs: {2 * 2_199_216_128:,}" in flops


def test_without_a_target_the_published_settings_are_shown(run) -> None:
    shown = run("budget", "resnet18").out
    for name, params in (("ResNet18 1/4x", "4,031,768"), ("ResNet18 4x", "45,862,085")):
        assert re.search(rf"{name} +{params}", shown)
    assert re.search(r"static +11,689,512 +1.00 +1,814,073,344", shown)
    assert "smallest reachable with these options: 973,770 parameters" in shown


def test_without_published_settings_the_usual_ratios_are_shown(run) -> None:
    assert "no published setting; usual ratios" in run("budget", "resnet34").out
    data = json.loads(run("budget", "resnet34", "--json").out)
    assert [entry["ratio"] for entry in data["settings"]] == [0.25, 0.5, 1, 2, 4]
    assert data["published"] is False


def test_a_plan_option_replaces_the_published_setting(run) -> None:
    data = json.loads(
        run("budget", "resnet50", "--ratio", "1/2", "--cell-ratio", "1", "--json").out
    )
    assert "published" not in data
    assert data["warehouses"][0]["cell"] == [64, 64, 1, 1]


def test_classes_and_input_keep_the_published_setting(run) -> None:
    command = ("budget", "resnet50", "--ratio", "0.5", "--classes", "10", "--input", "3x64x64")
    data = json.loads(run(*command, "--json").out)
    assert data["published"] == "ResNet50 1/2x"
    # The head is 2048 x 990 weights and 990 biases smaller.
    assert data["params"]["total"] == 17_638_264 - 2049 * 990


def test_a_recipe_is_written_though_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "kwsearch", "budget", "resnet20", "--ratio", "1"]
    subprocess.run([*command, "-o", "r.yaml"], cwd=tmp_path, stdout=writes, check=True)
    os.close(writes)
    assert (tmp_path / "r.yaml").exists()


def test_a_written_recipe_is_counted_as_it_stands(run, tmp_path: Path) -> None:
    recipe = tmp_path / "out.yaml"
    wrote = run("budget", "resnet18", "--params", "8M", "-o", str(recipe), "--json")
    assert wrote.code == 0
    assert f"wrote {recipe}" in wrote.err
    assert recipe.read_text().startswith("# resnet18: at most 8,000,000 parameters")
    again = json.loads(run("budget", str(recipe), "--json").out)
    first = json.loads(wrote.out)
    for key in ("params", "macs", "warehouses", "static"):
        assert again[key] == first[key]
    assert run("validate", str(recipe)).code == 0


def test_a_recipe_without_a_plan_is_solved(run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("format: 1\nmodel: resnet20\nbudget: {params: 150k}\n")
    data = json.loads(run("budget", str(recipe), "--json").out)
    assert 0.98 * 150_000 < data["params"]["total"] <= 150_000


def test_a_target_plans_a_recipe_anew(run) -> None:
    data = json.loads(
        run("budget", str(ROOT / "recipes/kw_resnet18_1x.yaml"), "--params", "6M", "--json").out
    )
    assert 0.995 * 6_000_000 < data["params"]["total"] <= 6_000_000


def test_what_is_left_after_training_is_what_the_budget_is_about(run, tmp_path: Path) -> None:
    # Counts as test_pad_net.py has them from PAD-Net's closed forms.
    ran = run("budget", "resnet50", "--method", "pad_net")
    assert "parameters: 120,583,980" in ran.out
    assert "47,902,917 are left after training, 1.87 x static: budgets are of these" in ran.out
    made = tmp_path / "made.yaml"
    args = ("--method", "pad_net", "--params", "20M", "--json", "-o", str(made))
    data = json.loads(run("budget", "resnet18", *args).out)
    assert data["deployed"] <= 20_000_000 < data["params"]["total"]
    assert (
        f"# {data['deployed']:,} parameters ({data['params']['total']:,} while" in made.read_text()
    )


def test_the_check_knows_what_fvcore_cannot_see(run) -> None:
    ran = run("budget", "deit_tiny", "--ratio", "0.5", "--input", "3x32x32", "--check")
    assert ran.code == 0
    # 12 layers, queries by keys and weights by values, 5 x 5 tokens of 192 channels.
    assert f"-{12 * 2 * 25 * 192:,} fused attention, which it cannot see" in ran.out
    assert "layer norms, which it counts" in ran.out
    assert "UNEXPLAINED" not in ran.out


def test_writing_a_recipe_anew_keeps_its_other_sections(run, tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    run("budget", str(ROOT / "recipes/quickstart.yaml"), "--params", "100k", "-o", str(out))
    before, after = (load_recipe(p) for p in (ROOT / "recipes/quickstart.yaml", out))
    assert (after.search, after.proxy) == (before.search, before.proxy)
    assert after.budget is not None
    assert after.budget.params == 100_000
    assert after.plan is not None


def test_a_plan_with_ratios_of_its_own_is_not_planned_anew(run) -> None:
    recipe = str(ROOT / "recipes/kw_mobilenetv2_100_0.5x.yaml")
    counted = json.loads(run("budget", recipe, "--json").out)
    assert counted["params"]["total"] == 2_654_396
    cells = sum(w["num_cells"] for w in counted["warehouses"])
    # 9 + 36 + 18 + 27 + 36 + 27 + 27 mixtures at ratio 1, and twice 6, 40 and 20 cells.
    assert counted["ratio"] == pytest.approx(cells / (180 + 2 * (6 + 40 + 20)), rel=0.02)
    ran = run("budget", recipe, "--params", "2M")
    assert ran.code == 2
    assert "ratios of their own (0.5, 1)" in ran.err


def test_an_accuracy_is_claimed_only_for_the_network_that_had_it(run) -> None:
    assert "(73.33 % ImageNet top-1)" in run("budget", "resnet18", "--ratio", "0.5").out
    for changed in (("--classes", "10"), ("--input", "3x64x64")):
        shown = run("budget", "resnet18", "--ratio", "0.5", *changed).out
        assert "published setting ResNet18 1/2x" in shown
        assert "top-1" not in shown
        assert "73.33" not in run("budget", "resnet18", *changed).out
    assert "73.33 %" in run("budget", "resnet18").out


def test_options_that_replace_a_published_setting_say_so(run) -> None:
    ran = run("budget", "resnet18", "--ratio", "0.5", "--norm", "auto")
    assert "published setting ResNet18 1/2x is not used" in ran.err


def test_the_check_explains_every_difference(run) -> None:
    ran = run("budget", "resnet20", "--ratio", "0.5", "--check")
    assert ran.code == 0
    assert re.search(r"FlopCounterMode / 2 ([\d,]+), ours \1: equal", ran.out)
    assert "batch norms, which it counts" in ran.out
    assert "UNEXPLAINED" not in ran.out


WRONG = [
    (("budget", "resnet51", "--ratio", "1"), 2, "did you mean resnet50"),
    (("budget", "resnet18", "--ratio", "0"), 2, "not a ratio (got '0'"),
    (("budget", "resnet18", "--ratio", "1", "--params", "8M"), 2, "one target at a time"),
    (("budget", "resnet18", "--params", "8 apples"), 2, "not a count (got '8 apples'"),
    (("budget", "resnet18", "--params", "1k"), 3, "below the floor of 973,770"),
    (("budget", "resnet18", "--ratio", "1", "--cell-ratio", "2"), 2, "cell_ratio (2.0, 2.0)"),
    (("budget", "resnet18", "--ratio", "1", "--cell-ratio", "1,1,1"), 2, "one ratio, or two"),
    (("budget", "resnet18", "--ratio", "1", "--reduction", "2"), 2, "reduction 2.0"),
    (("budget", "resnet18", "--ratio", "1", "--sharing", "block"), 2, "is not one of"),
    (("budget", "resnet18", "--ratio", "1", "--input", "3x"), 2, "not an input size"),
    (("budget", "deit_tiny", "--ratio", "1", "--input", "3x224x200"), 2, "square images"),
    (("budget", "deit_tiny", "--ratio", "1", "--input", "3x8x8"), 2, "deit_tiny"),
    (("budget", "resnet18", "--ratio", "1", "--classes", "0"), 2, "--classes"),
    (("budget", "resnet18", "--check"), 2, "need a target"),
    (("budget", "missing.yaml"), 2, "missing.yaml"),
    (("budget", str(ROOT / "recipes/kw_resnet18_1x.yaml"), "--sharing", "layer"), 2, "has a plan"),
    (("budget", "resnet18", "--ratio", "1", "-o", "/nowhere/r.yaml"), 2, "no folder /nowhere"),
    (("budget", "resnet18", "--ratio", "1", "-o", "r.txt"), 2, "a recipe's name ends in .yaml"),
    (("budget", "resnet18", "--params", "1e30"), 2, "over 1,000 times the static model's"),
    (("budget", "resnet18", "--ratio", "1e6"), 2, "at most 1,000"),
    (("budget", "recipes/missing"), 2, "recipes/missing"),
    (("budgt",), 2, "budgt"),
    (("optimize", "missing.yaml"), 2, "missing.yaml"),
    (("optimize", str(ROOT / "recipes/quickstart.yaml"), "proxy.epoch=1"), 2, "did you mean"),
    (("validate", "missing.yaml"), 2, "missing.yaml"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), WRONG, ids=[" ".join(w[0]) for w in WRONG]
)
def test_wrong_input_gets_one_message_and_its_exit_code(
    run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ran = run(*arguments)
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_rounded_cells_are_reported(run) -> None:
    ran = run("budget", "resnet18", "--ratio", "1", "--cell-ratio", "0.3", "--json")
    notes = json.loads(ran.out)["notes"]
    assert notes[0].startswith("stage0_conv: cell ratio 0.3 of 64 output channels is 19")
    assert notes[0].endswith("rounded down to 16")


def test_models_lists_the_zoo_and_its_published_ratios(run) -> None:
    entries = json.loads(run("models", "--json").out)
    assert [e["published_ratios"] for e in entries if e["name"] == "resnet18"] == [
        [0.25, 0.5, 1, 2, 4]
    ]
    assert "published at 1/4, 1/2, 1, 2, 4" in run("models").out


def test_an_interrupted_command_exits_with_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kwsearch.networks.trace_model", interrupted)
    assert run("budget", "resnet18", "--ratio", "1").code == 130


def test_models_says_the_other_forms_and_finds_names(run, timm) -> None:
    shown = run("models").out
    assert "timm:NAME" in shown
    assert "torchvision:NAME" in shown
    assert "package.module:function with --trust" in shown
    ran = run("models", "timm:resnext50_32*")
    assert (ran.code, ran.out) == (0, "timm:resnext50_32x4d\n")
    assert json.loads(run("models", "timm:resnext50_32*", "--json").out) == ["timm:resnext50_32x4d"]
    ran = run("models", "timm:no_such")
    assert (ran.code, ran.err) == (1, "Error: timm:no_such: there is none of that name\n")
    assert run("models", "resnet").code == 2


def test_a_budget_of_a_network_of_timm(run, timm) -> None:
    ran = run("budget", "timm:resnext50_32x4d", "--ratio", "0.5", "--sharing", "layer", "--json")
    data = json.loads(ran.out)
    assert ran.code == 0
    assert (data["model"], data["input"]) == ("timm:resnext50_32x4d", [3, 224, 224])
    # As torchvision documents it.
    assert data["static"]["params"] == 25_028_904
    assert "published" not in data
    assert len(data["warehouses"]) >= 50
    assert data["params"]["total"] == sum(
        data["params"][part] for part in ("warehouses", "attention", "unchanged")
    )


def test_a_missing_package_ends_with_how_to_get_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    ran = run("budget", "timm:resnext50_32x4d", "--ratio", "0.5")
    assert (ran.code, ran.out) == (2, "")
    assert 'not installed: `pip install "kwsearch[zoo]"`' in ran.err


OWN = """
    from torch import nn

    def make(in_channels, num_classes=4):
        return nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
        )
"""


def test_a_budget_of_own_code_from_its_name_to_its_recipe(run, own_code) -> None:
    name = f"{own_code(OWN)}:make"
    plan = ("--ratio", "1", "--sharing", "layer")
    ran = run("budget", name, *plan, "--input", "3x8x8")
    assert (ran.code, ran.out) == (2, "")
    assert f"Error: {name}: it is code of your own: " in ran.err
    assert "give --input" in run("budget", name, *plan, "--trust").err
    ran = run(
        "budget", name, *plan, "--input", "2x8x8", "--classes", "7", "--trust", "-o", "own.yaml",
        "--json",
    )  # fmt: skip
    assert ran.code == 0
    assert json.loads(ran.out)["static"]["params"] == 9 * (2 + 16) * 16 + 2 * 16 + 16 * 7 + 7
    recipe = load_recipe("own.yaml")
    assert (recipe.model.name, recipe.model.num_classes, recipe.input) == (name, 7, (2, 8, 8))
    assert "#     kwsearch budget own.yaml --trust" in Path("own.yaml").read_text()
    assert "trust" not in recipe.to_dict()
    assert run("budget", "own.yaml").code == 2
    again = run("budget", "own.yaml", "--trust", "--check", "--json")
    assert again.code == 0
    assert json.loads(again.out)["params"] == json.loads(ran.out)["params"]
    assert recipe.create_model(trust=True)(torch.zeros(1, 2, 8, 8)).shape == (1, 7)
    with pytest.raises(PlanError, match="in Python trust=True"):
        recipe.create_model()


def test_the_recipe_of_a_network_for_videos_has_their_size(
    run, torchvision_models, tmp_path: Path
) -> None:
    path = str(tmp_path / "video.yaml")
    ran = run("budget", "torchvision:r3d_18", "--ratio", "1", "--json", "-o", path)
    data = json.loads(ran.out)
    assert (ran.code, data["input"]) == (0, [3, 16, 112, 112])
    assert load_recipe(path).input == (3, 16, 112, 112)
    assert json.loads(run("budget", path, "--json").out)["params"] == data["params"]


def test_the_budget_of_another_method(run) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(run("budget", "resnet18", "--method", "odconv", "--json").out)
    # ODConv 1x, counted in the published code.
    assert data["params"]["total"] == 11_943_944
    assert set(data["params"]) == {"total", "kernels", "attention", "unchanged"}
    assert data["macs"]["total"] - data["macs"]["mixing"] - data["macs"]["modulation"] == (
        1_814_319_792
    )
    four = json.loads(
        run("budget", "resnet18", "--method", "odconv", "--set", "num_kernels=4", "--json").out
    )
    assert four["params"]["total"] == 44_901_640
    assert run("budget", "resnet18", "--method", "odconv", "--ratio", "4").out.startswith(
        "resnet18 at 3x224x224, ODConv, K = 4\nparameters: 44,901,640"
    )


@pytest.mark.parametrize("method", ["condconv", "odconv", "dcd", "fdconv", "kernel_dna", "pad_net"])
def test_other_counters_agree_on_every_method_and_its_recipe_is_read_again(
    method: str,
    run,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    out = tmp_path / "r.yaml"
    done = run("budget", "resnet20", "--method", method, "--check", "-o", str(out))
    assert done.code == 0, done.err
    assert "UNEXPLAINED" not in done.out
    again = run("budget", str(out))
    assert again.code == 0
    first, second = (ran.out.splitlines()[1:5] for ran in (done, again))
    assert first == second
    out.write_text(f"format: 1\nmodel: resnet20\nmethod: {{name: {method}}}\n")
    assert run("budget", str(out)).out.splitlines()[1:5] == first  # as published
    assert "layer1.0.conv1" in run("inspect", "resnet20", "--method", method, "--json").out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "odcon"), "is not one of"),
        (("--method", "odconv", "--set", "num_kernels"), "expected KEY=VALUE"),
        (("--method", "odconv", "--set", "cells=3"), "odconv has no cells: its settings are"),
        (("--method", "odconv", "--set", "num_kernels=0"), "num_kernels 0: allowed is a whole"),
        (("--method", "odconv", "--cell-ratio", "0.5"), "odconv has no cell_ratio"),
        (("--method", "odconv", "--ratio", "0.5"), "whole kernel or more, ratio 1"),
        (("--method", "dcd", "--ratio", "2"), "ratio"),
    ],
)
def test_settings_of_methods_that_cannot_be(
    args: tuple[str, ...],
    message: str,
    run,  # type: ignore[no-untyped-def]
) -> None:
    ran = run("budget", "resnet20", *args)
    assert ran.code == 2
    assert message in ran.err
