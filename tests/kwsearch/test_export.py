"""`kwsearch export`: which kinds there are, what they need, and that nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
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
    assert isinstance(result.exception, OSError)
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
        (["--to", "onnx", "--weights", "small.yaml"], "--weights small.yaml: cannot be read"),
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


def test_static_weights_are_saved(
    here: Path, converted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[nn.Module] = []

    def to_static_(model: nn.Module) -> nn.Module:
        given.append(model)
        return nn.Linear(2, 3)

    monkeypatch.setattr(kwlayers, "to_static_", to_static_, raising=False)
    torch.save({"model": converted.state_dict(), "ema": None}, "checkpoint.pt")
    result = call("--to", "static", "--weights", "checkpoint.pt")
    assert result.exit_code == 0
    assert list(torch.load("static.pt", weights_only=True)) == ["weight", "bias"]
    expected = converted.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in given[0].state_dict().items())
    none = call("--to", "static", "--weights", "checkpoint.pt", "--ema", "-o", "ema.pt")
    assert (none.exit_code, (here / "ema.pt").exists()) == (2, False)
    assert "--ema: checkpoint.pt has no averaged weights; leave it out" in none.stderr


def test_weights_of_another_network_are_refused(converted: nn.Module) -> None:
    state = converted.state_dict()
    state.pop("fc.weight")
    torch.save(state, "weights.pt")
    result = call("--to", "onnx", "--weights", "weights.pt")
    assert result.exit_code == 2
    assert "--weights weights.pt: not of this recipe's network" in result.stderr
    assert "fc.weight" in result.stderr
    plain = call("--to", "onnx", "--weights", "weights.pt", "--ema")
    assert (plain.exit_code, "is not a checkpoint of train.py" in plain.stderr) == (2, True)


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
