"""`kwsearch export`: which kinds there are, what they need, and that nothing is lost."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import kwlayers
from kwsearch.cli import COMMANDS, export, run
from kwsearch.recipe import load_recipe
from kwsearch.resolve import create_model, network_of, outcome_of, plan_for

RECIPE = """\
format: 1
model: {name: resnet20, num_classes: 10}
input: [3, 8, 8]
budget: {total_ratio: 0.5}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def converted() -> nn.Module:
    """The recipe's network at random weights of its own."""
    torch.manual_seed(7)
    recipe = load_recipe("small.yaml")
    model = create_model(recipe)
    return kwlayers.convert_(model, plan_for(recipe, model))


def call(*args: str) -> Result:
    return CliRunner().invoke(export.command, ["small.yaml", *args])


def test_the_command_is_listed() -> None:
    assert "export" in COMMANDS


def test_a_training_script_is_written_here_by_default(here: Path) -> None:
    result = call("--to", "train.py")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "wrote train.py\n")
    text = (here / "train.py").read_text()
    compile(text, "train.py", "exec")
    assert "    kwsearch export small.yaml --to train.py\n" in text
    assert sorted(path.name for path in here.iterdir()) == ["small.yaml", "train.py"]


def test_overrides_change_the_network_and_are_told(here: Path) -> None:
    result = call("model.num_classes=7", "budget={ratio: 1}", "--to", "train.py", "-o", "t.py")
    assert result.exit_code == 0
    text = (here / "t.py").read_text()
    assert "\nCLASSES = 7\n" in text
    assert "kwsearch export small.yaml model.num_classes=7 'budget={ratio: 1}' --to" in text
    assert "python t.py --data PATH" in text


def test_a_file_is_replaced_with_force_only(here: Path) -> None:
    (here / "train.py").write_text("mine")
    result = call("--to", "train.py")
    assert (result.exit_code, (here / "train.py").read_text()) == (2, "mine")
    assert "train.py exists: --force replaces it, or give another with -o" in result.stderr
    assert call("--to", "train.py", "--force").exit_code == 0
    assert (here / "train.py").read_text() != "mine"


def test_a_failure_leaves_no_file_and_the_old_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        (here / "half.onnx").write_text("half")
        raise OSError("disk full")

    fake = SimpleNamespace(export_onnx=lambda model, size, path: (path.write_text("half"), fail()))
    monkeypatch.setitem(sys.modules, "kwsearch.export.onnx", fake)
    (here / "model.onnx").write_text("old")
    result = call("--to", "onnx", "--force")
    assert str(result.exception) == "-o model.onnx: disk full"
    assert (here / "model.onnx").read_text() == "old"
    assert not list(here.glob(".*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "cake"], "'cake' is not one of 'train.py', 'official.json', 'timm', 'onnx'"),
        ([], "Missing option '--to'"),
        (["--to", "train.py", "-o", "no/t.py"], "-o no/t.py: there is no folder no"),
        (["--to", "train.py", "--weights", "small.yaml"], "they are for onnx, program, static"),
        (["--to", "static"], "--to static needs --weights"),
        (["--to", "onnx", "--ema"], "--ema needs --weights"),
        (["--to", "onnx", "--weights", "none.pt"], "File 'none.pt' does not exist"),
        (["--to", "timm", "-o", "x.txt"], "-o x.txt: Python imports files that end in .py only"),
    ],
)
def test_what_is_asked_wrongly_is_said(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["other.yaml", "--to", "train.py"], "other.yaml: no such file"),
        (["small.yaml", "model=resnet21", "--to", "train.py"], "unknown model 'resnet21'"),
        (["small.yaml", "model='a.b:c'", "--to", "train.py"], "--trust"),
        (["small.yaml", "training={optimizer: lamb}", "--to", "train.py"], "sgd and adamw"),
    ],
)
def test_a_wrong_recipe_exits_with_2_and_one_message(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", *args]) == 2
    assert message in capsys.readouterr().err
    assert not Path("train.py").exists()


def test_official_config_and_timm_module_are_asked_of_their_writers(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def write_config(plan: kwlayers.Plan) -> dict[str, int]:
        seen.append(plan)
        return {"params": plan.cost().params.total}

    official = SimpleNamespace(write_config=write_config)
    module = SimpleNamespace(
        write_timm_module=lambda recipe, path, name: path.write_text(f"# {name}")
    )
    monkeypatch.setitem(sys.modules, "kwlayers.official", official)
    monkeypatch.setitem(sys.modules, "kwsearch.export.timm_module", module)
    recipe = load_recipe("small.yaml")
    plan = outcome_of(recipe, network_of(recipe)).plan
    assert call("--to", "official.json").exit_code == 0
    assert json.loads((here / "official.json").read_text()) == {"params": plan.cost().params.total}
    assert seen == [plan]
    assert call("--to", "timm").exit_code == 0
    assert (here / "kw_model.py").read_text() == "# kw_model"


@pytest.mark.parametrize(("kind", "file"), [("onnx", "model.onnx"), ("program", "model.pt2")])
@pytest.mark.parametrize("form", ["none", "plain", "model", "ema"])
def test_a_graph_is_exported_with_the_weights_that_were_given(
    kind: str, file: str, form: str, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []

    def take(model: nn.Module, size: tuple[int, ...], path: Path) -> None:
        exported.append((model.training, size, model.state_dict()))
        path.write_text("graph")

    fake = SimpleNamespace(export_onnx=take, export_program=take)
    monkeypatch.setitem(sys.modules, "kwsearch.export.onnx", fake)
    weights = converted.state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    files = {
        "plain": weights,
        "model": {"model": weights, "ema": zeros},
        "ema": {"model": zeros, "ema": weights},
    }
    args = ["--to", kind]
    if form != "none":
        torch.save(files[form], "weights.pt")
        args += ["--weights", "weights.pt"] + (["--ema"] if form == "ema" else [])
    result = call(*args)
    assert result.exit_code == 0
    assert ("note: without --weights the weights are random" in result.stderr) == (form == "none")
    assert Path(file).read_text() == "graph"
    ((training, size, state),) = exported
    assert (training, size) == (False, (3, 8, 8))
    same = all(torch.equal(value, weights[name]) for name, value in state.items())
    assert state.keys() == weights.keys()
    assert same == (form != "none")


def save(weights: Any, path: str = "weights.pt") -> None:
    torch.save(weights, path)


def test_weights_of_temperature_one_become_the_static_network_s(converted: nn.Module) -> None:
    save({"model": kwlayers.set_temperature_(converted, 1).state_dict(), "ema": None})
    result = call("--to", "static", "--weights", "weights.pt")
    assert (result.exit_code, result.stderr) == (0, "wrote static.pt\n")
    static = create_model(load_recipe("small.yaml"))
    static.load_state_dict(torch.load("static.pt", weights_only=True))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(static.eval()(x), converted.eval()(x), rtol=0, atol=1e-5)


def test_dynamic_weights_have_no_static_equal(
    converted: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    save(converted.state_dict())
    assert run(["export", "small.yaml", "--to", "static", "--weights", "weights.pt"]) == 2
    assert capsys.readouterr().err == (
        "Error: --weights weights.pt: layer1.0.conv1 is at temperature 0: its kernel depends on "
        "the input, and no static layer computes the same; one trained at temperature 1 has a "
        "static equal (train.py --temperature-epochs inf)\n"
    )
    assert not Path("static.pt").exists()


@pytest.mark.parametrize("kind", export.KINDS)
def test_a_folder_that_takes_no_file_is_named_before_the_work(
    kind: str,
    converted: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kwsearch.resolve.outcome_of", lambda *_: pytest.fail("planned"))
    save(converted.state_dict())
    made = "/proc/made.tflite" if kind == "tflite" else "/proc/made.py"
    args = ["--to", kind, "-o", made]
    args += ["--weights", "weights.pt"] if export.KINDS[kind].weights else []
    assert run(["export", "small.yaml", *args]) == 1
    assert capsys.readouterr().err == f"Error: -o {made}: No such file or directory\n"


@pytest.mark.parametrize("kind", ["train.py", "static"])
def test_a_file_that_cannot_grow_is_named(
    kind: str, here: Path, converted: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    save(kwlayers.set_temperature_(converted, 1).state_dict())
    args = ["--to", kind, "-o", "made"]
    args += ["--weights", "weights.pt"] if export.KINDS[kind].weights else []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert run(["export", "small.yaml", *args]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == "Error: -o made: File too large\n"
    assert sorted(path.name for path in here.iterdir()) == ["small.yaml", "weights.pt"]


def test_what_cannot_be_read_elsewhere_is_not_blamed_on_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = SimpleNamespace(export_onnx=lambda *_: Path("nowhere").read_text())
    monkeypatch.setitem(sys.modules, "kwsearch.export.onnx", fake)
    assert run(["export", "small.yaml", "--to", "onnx"]) == 1
    assert "Error: [Errno 2] No such file or directory: 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "told"), [("{'classes': x}", "dict"), ("x[..., None]", "a tensor (2, 4, 1)")]
)
def test_a_network_that_does_not_classify_is_refused(
    out: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"nets_{told.split()[0]}"
    Path(f"{name}.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        x = super().forward(x)\n"
        f"        return {out}\n"
        "def make():\n"
        "    return Net(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),\n"
        "        nn.Flatten(), nn.Linear(8, 4))\n"
    )
    args = [f"model={{name: '{name}:make'}}", "budget={ratio: 1}", "--trust", "--to", "train.py"]
    assert run(["export", "small.yaml", *args]) == 2
    message = f"the model gives {told} for 2 images, evaluated: classifying images needs a tensor"
    assert f"{message} (2, classes)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"text: 1", b"\x80\x02\x00\xff", b"", nn.Linear(2, 2)])
def test_weights_that_cannot_be_read_are_refused(content: Any) -> None:
    if isinstance(content, bytes):
        Path("weights.pt").write_bytes(content)
    else:
        save(content)
    result = call("--to", "onnx", "--weights", "weights.pt")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --weights weights.pt: cannot be read: torch.save did not write it, or there is "
        "more than weights and numbers in it; looked for is the training script's checkpoint or "
        "torch.save(model.state_dict(), …)\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [1], "has no weights; a state_dict is looked for"),
        (lambda _: {1: 2}, "has no weights; a state_dict is looked for"),
        (lambda weights: dict(list(weights.items())[1:]), "of another network or plan, see conv1"),
        (lambda weights: {**weights, "fc.weight": torch.zeros(3, 64)}, "of another network or p"),
    ],
    ids=["list", "numbers", "one less", "classes"],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[Any], Any], message: str, converted: nn.Module
) -> None:
    save(change(converted.state_dict()))
    result = call("--to", "onnx", "--weights", "weights.pt")
    assert result.exit_code == 2
    assert f"Error: --weights weights.pt: {message}" in result.stderr
    assert result.stderr.endswith(".weight\n") == ("another" in message)


def test_weights_of_a_distributed_network_are_taken(converted: nn.Module) -> None:
    kwlayers.set_temperature_(converted, 1)
    save({"state_dict": {f"module.{k}": v for k, v in converted.state_dict().items()}})
    assert call("--to", "static", "--weights", "weights.pt").exit_code == 0


def test_weights_of_the_static_network_or_another_plan_are_told_apart(
    converted: nn.Module,
) -> None:
    recipe = load_recipe("small.yaml")
    static = create_model(recipe)
    save(static.state_dict(), "static.pt")
    other = load_recipe("small.yaml", ["budget={ratio: 1}"])
    save(kwlayers.convert_(static, plan_for(other, static)).state_dict(), "other.pt")
    told = call("--to", "program", "--weights", "static.pt")
    message = "static.pt: the static network's weights; train.py --weights starts from them\n"
    assert (told.exit_code, told.stderr.endswith(f"Error: --weights {message}")) == (2, True)
    told = call("--to", "program", "--weights", "other.pt")
    cells = ", ".join(f"kw_warehouses.stage{i}_conv.cells" for i in range(3))
    message = f"--weights other.pt: of another network or plan, see {cells}\n"
    assert (told.exit_code, told.stderr.endswith(message)) == (2, True)


def test_cells_of_another_shape_are_another_plan_s() -> None:
    torch.manual_seed(0)
    given = {}
    for shape in ("1, 0.5", "0.5, 1"):  # as many cells and mixtures, of as many numbers
        sharing = "{all: ['layer3.*.conv2']}"
        given[shape] = [
            f"method={{sharing: {sharing}, cell_ratio: [{shape}]}}",
            "budget={ratio: 1}",
        ]
        recipe = load_recipe("small.yaml", given[shape])
        model = create_model(recipe)
        kwlayers.convert_(model, plan_for(recipe, model))
        save(kwlayers.set_temperature_(model, 1).state_dict(), f"{shape[0]}.pt")
    told = call(*given["1, 0.5"], "--to", "static", "--weights", "0.pt")
    message = "--weights 0.pt: of another network or plan, see kw_warehouses.all.cells\n"
    assert (told.exit_code, told.stderr.endswith(message)) == (2, True)
    assert call(*given["1, 0.5"], "--to", "static", "--weights", "1.pt").exit_code == 0


def test_averages_are_asked_of_checkpoints_that_have_them(converted: nn.Module) -> None:
    weights = converted.state_dict()
    for content in (weights, {"model": weights, "ema": None}, [1]):
        save(content)
        none = call("--to", "static", "--weights", "weights.pt", "--ema")
        assert (none.exit_code, Path("static.pt").exists()) == (2, False)
        assert "--ema: weights.pt has no averaged weights; leave it out" in none.stderr


@pytest.mark.parametrize("kind", ["onnx", "program", "static"])
def test_weights_that_are_no_numbers_are_warned_of(
    kind: str, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(export_onnx=lambda *_: None, export_program=lambda *_: None)
    monkeypatch.setitem(sys.modules, "kwsearch.export.onnx", fake)
    weights = kwlayers.set_temperature_(converted, 1).state_dict()
    weights["fc.bias"][3] = math.nan
    save(weights)
    result = call("--to", kind, "--weights", "weights.pt")
    assert result.exit_code == 0
    warning = "warning: --weights weights.pt: not all numbers are finite, see fc.bias\n"
    assert result.stderr.startswith(warning)


def test_the_help_names_every_kind() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(f"{kind}, " in " ".join(result.stdout.split()) for kind in export.KINDS)


def test_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kwsearch.cli import export; "
        "sys.exit(bool({'torch', 'pydantic', 'yaml', 'optuna'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
