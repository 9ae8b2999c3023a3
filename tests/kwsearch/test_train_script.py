"""The script that `kwsearch export --to train.py` writes: what it says, and how it trains."""

from __future__ import annotations

import ast
import copy
import csv
import functools
import gzip
import importlib.util
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kwlayers
from kwlayers import PlanError
from kwsearch import data, zoo
from kwsearch.export.train_script import train_script
from kwsearch.recipe import Recipe, load_recipe, parse_recipe
from kwsearch.resolve import network_of, outcome_of
from tests import zoo as swept

RECIPE = """\
format: 1
model: {name: resnet20, num_classes: 10}
input: [3, 8, 8]
budget: {total_ratio: 0.5}
training: {epochs: 2, temperature_epochs: 1, batch_size: 32, lr: 0.05, weight_decay: 0.0005}
"""
IMAGES, TESTS, BATCH = 128, 50, 32
STEPS = IMAGES // BATCH


def recipe(text: str = RECIPE) -> Recipe:
    return parse_recipe(text)


def loaded(text: str, path: Path) -> ModuleType:
    """The script as a module."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, array: Tensor) -> None:
    head = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    content = head + array.to(torch.uint8).contiguous().numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_digits(folder: Path) -> None:
    """MNIST's format, one part packed, with both spellings of its names."""
    folder.mkdir(exist_ok=True)
    for part, stem, dot, ending, count in (
        ("train", "train", "-", "", IMAGES),
        ("test", "t10k", ".", ".gz", TESTS),
    ):
        images = data.load("digits", part)
        write_idx(folder / f"{stem}-images{dot}idx3-ubyte{ending}", images.x[:count, 0])
        write_idx(folder / f"{stem}-labels{dot}idx1-ubyte{ending}", images.y[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, as train_small.py, and digits/."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "train_small.py").write_text(train_script(recipe(), "small.yaml"))
    write_digits(folder / "digits")
    return folder


@pytest.fixture(scope="module")
def script(folder: Path, one_thread: None) -> ModuleType:
    return loaded((folder / "train_small.py").read_text(), folder / "train_small.py")


@pytest.fixture
def train(script: ModuleType, folder: Path) -> Iterator[Any]:
    def run(*options: str, out: Path) -> int:
        code: int = script.main(["--data", str(folder / "digits"), "--out", str(out), *options])
        return code

    return run


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


# What the script is


def test_only_torch_kwlayers_and_the_standard_library_are_imported(folder: Path) -> None:
    tree = ast.parse((folder / "train_small.py").read_text())
    names = {
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    packages = {name.split(".")[0] for name in names}
    assert packages - sys.stdlib_module_names == {"torch", "kwlayers"}
    inside = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body
        for alias in node.names
    }
    assert inside == {"Image", "SummaryWriter"}  # pillow and TensorBoard, when they are asked for


@pytest.mark.parametrize("name", ["fashion_mnist", "kw_convnext_tiny_1x", "kw_mobilenetv2_050_4x"])
def test_the_script_passes_the_linter_and_is_formatted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    path = tmp_path / "train.py"
    source = f"recipes/{name}.yaml"
    path.write_text(train_script(load_recipe(Path(__file__).parents[2] / source), source))
    # Where it lands: not beside kwlayers.
    for what in (["check", "--select", "E,F,W,I,B,UP,C4,SIM"], ["format", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *what, "--isolated", "--line-length", "100", path.name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_head_says_recipe_counts_and_commands(folder: Path, script: ModuleType) -> None:
    plan = outcome_of(recipe(), network_of(recipe())).plan
    cost = plan.cost()
    assert script.__doc__ is not None
    for said in (
        "Train resnet20 as small.yaml plans it.",
        f"{cost.params.total:,} parameters (the static network has {plan.network.params:,})",
        f"{cost.macs.total:,} MACs",
        "one image of 3x8x8",
        "python train.py --data PATH\n",
        "torchrun --nproc-per-node 2 train.py --data PATH",
        "kwsearch export small.yaml --to train.py\n",
    ):
        assert said in script.__doc__
    assert plan.groups_to_list() == script.GROUPS


def test_a_name_with_quotes_and_backslashes_is_only_text(tmp_path: Path) -> None:
    name = 'a\\n"""b".yaml'
    module = loaded(train_script(recipe(), name), tmp_path / "train_quoted.py")
    assert module.__doc__ is not None
    assert f"Train resnet20 as {name} plans it." in module.__doc__


@pytest.mark.parametrize("name", swept.IMAGES)
def test_the_network_of_the_script_is_the_zoo_s(name: str, tmp_path: Path) -> None:
    size = [3, 32, 32]
    text = f"format: 1\nmodel: {{name: {name}, num_classes: 7}}\ninput: {size}\n"
    text += "budget: {ratio: 1}\nmethod: {sharing: layer}\n"
    module = loaded(train_script(recipe(text), "x.yaml"), tmp_path / f"train_{name}.py")
    options = {"img_size": 32} if "img_size" in zoo.get(name).options else {}
    with torch.device("meta"):
        ours, theirs = module.make_model(), zoo.create(name, num_classes=7, **options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    defined = [
        node.name
        for node in ast.parse((tmp_path / f"train_{name}.py").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(defined) == len(set(defined))  # the template defines nothing the zoo does


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_050", "deit_tiny"])
def test_its_outputs_are_those_of_the_zoo_s(name: str, tmp_path: Path) -> None:
    text = f"format: 1\nmodel: {name}\ninput: [3, 32, 32]\nbudget: {{ratio: 1}}\n"
    module = loaded(train_script(recipe(text), "x.yaml"), tmp_path / f"train_out_{name}.py")
    options = {"img_size": 32} if "img_size" in zoo.get(name).options else {}
    torch.manual_seed(0)
    ours = module.make_model().eval()
    torch.manual_seed(0)
    theirs = zoo.create(name, **options).eval()
    assert zoo.get(name).num_classes == module.CLASSES
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x), theirs(x))
    assert float(ours(x).detach().std()) > 0


def test_unused_parts_of_a_module_of_the_zoo_are_left_out(script: ModuleType) -> None:
    assert hasattr(script, "CifarResNet")
    assert not hasattr(script, "resnet50")
    assert not hasattr(script, "__all__")


@pytest.mark.parametrize(
    ("model", "size", "call"),
    [
        ("timm:resnet18", "[1, 32, 32]", 'timm.create_model("resnet18", num_classes=CLASSES'),
        ("timm:deit_tiny_patch16_224", "[3, 32, 32]", "img_size=INPUT[1:]"),
        ("torchvision:resnet18", "[3, 32, 32]", 'torchvision.models.get_model("resnet18"'),
        ("torchvision:vit_b_32", "[3, 64, 64]", "image_size=INPUT[1]"),
    ],
)
def test_networks_of_timm_and_torchvision_are_called_by_name(
    model: str, size: str, call: str, timm: ModuleType, tmp_path: Path
) -> None:
    text = f"format: 1\nmodel: {{name: '{model}', num_classes: 7}}\ninput: {size}\n"
    text += "budget: {ratio: 1}\nmethod: {sharing: layer}\n"
    asked = recipe(text)
    module = loaded(train_script(asked, "x.yaml"), tmp_path / "train_other.py")
    assert call in (tmp_path / "train_other.py").read_text()
    with torch.device("meta"):
        params = sum(p.numel() for p in module.make_model().parameters())
    assert params == network_of(asked).params


def test_own_code_is_imported_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(in_channels, num_classes=4):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "format: 1\nmodel: 'my_nets:small'\ninput: [3, 8, 8]\n"
    asked = recipe(text + "budget: {ratio: 1}\nmethod: {sharing: layer}\n")
    with pytest.raises(PlanError, match="--trust"):
        train_script(asked, "x.yaml")
    module = loaded(train_script(asked, "x.yaml", trust=True), tmp_path / "train_own.py")
    assert "from my_nets import small\n" in (tmp_path / "train_own.py").read_text()
    assert (module.CLASSES, tuple(module.make_model()[0].weight.shape)) == (4, (8, 3, 3, 3))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # Published: 300 epochs, 20 of falling temperature; SGD of ResNets.
        ("", {"epochs": 300, "temperature_epochs": 20, "lr": 0.1, "weight_decay": 0.0001}),
        ("", {"warmup_epochs": 5, "batch_size": 256, "label_smoothing": 0.1, "augment": "auto"}),
        (
            "proxy: {lr: 0.02, batch_size: 16, optimizer: adamw, augment: flip, threads: 3}",
            {"lr": 0.02, "batch_size": 16, "optimizer": "adamw", "augment": "flip", "threads": 3},
        ),
        ("proxy: {epochs: 40}", {"epochs": 40, "warmup_epochs": 2, "label_smoothing": 0}),
        ("proxy: {data: digits}", {"data": None}),
        ("proxy: {data: ./images}", {"data": "./images"}),
        (
            "proxy: {epochs: 8, lr: 0.02}\ntraining: {epochs: 30, lr: 0.3, temperature_epochs: 4}",
            {"epochs": 30, "lr": 0.3, "temperature_epochs": 4},
        ),
        ("proxy: {init: static, epochs: 8}", {"start": "static"}),
        ("proxy: {init: warm_start, epochs: 8}", {"start": "published"}),  # needs weights
        ("training: {epochs: 30}", {"epochs": 30, "temperature_epochs": 2, "warmup_epochs": 0.5}),
    ],
)
def test_defaults_are_the_recipe_s_training_then_its_proxy_then_published(
    sections: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    text = "\n".join(RECIPE.splitlines()[:-1]) + f"\n{sections}\n"
    module = loaded(train_script(recipe(text), "x.yaml"), tmp_path / "train_defaults.py")
    assert {name: module.DEFAULTS[name] for name in expected} == expected
    args = module.parse_args(["--data", "x"])
    expected.pop("data", None)
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_network_without_batch_norm_is_trained_by_adamw(tmp_path: Path) -> None:
    text = "format: 1\nmodel: convnext_tiny\ninput: [3, 32, 32]\nbudget: {ratio: 1}\n"
    module = loaded(train_script(recipe(text), "x.yaml"), tmp_path / "train_adamw.py")
    assert (module.DEFAULTS["optimizer"], module.DEFAULTS["weight_decay"]) == ("adamw", 0.05)


def test_an_optimizer_that_the_script_has_not_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"training\.optimizer 'lamb': the script has sgd and adamw"
    ):
        train_script(recipe(RECIPE.replace("lr: 0.05", "optimizer: lamb")), "x.yaml")


# How it trains


@pytest.fixture(scope="module")
def whole(script: ModuleType, folder: Path) -> Path:
    """An uninterrupted run of two epochs with everything on."""
    out = folder / "whole"
    code = script.main(["--data", str(folder / "digits"), "--out", str(out), *EVERYTHING])
    assert code == 0
    return out


EVERYTHING = ["--ema", "0.5", "--mixup", "0.4", "--augment", "flip", "--label-smoothing", "0.1"]


def test_the_log_has_a_row_for_each_epoch(whole: Path) -> None:
    table = rows(whole)
    assert list(table[0]) == [
        *("epoch", "step", "images", "lr", "temperature", "train_loss", "train_accuracy"),
        *("test_loss", "test_accuracy", "ema_accuracy", "seconds"),
    ]
    assert [int(row["epoch"]) for row in table] == [1, 2]
    assert [int(row["step"]) for row in table] == [STEPS, 2 * STEPS]
    assert [int(row["images"]) for row in table] == [IMAGES, IMAGES]
    assert [float(row["temperature"]) for row in table] == [0, 0]
    # Half a cosine after 1/60 of the epochs, which is not one whole step here.
    for row in table:
        last = int(row["step"]) - 1
        expected = 0.05 * 0.5 * (1 + math.cos(math.pi * last / (2 * STEPS)))
        assert float(row["lr"]) == pytest.approx(expected)


def test_the_log_s_test_accuracy_is_that_of_the_checkpoint(
    whole: Path, script: ModuleType, folder: Path
) -> None:
    state = checkpoint(whole)
    test, train_images = data.load("digits", "test"), data.load("digits", "train")
    x = test.x[:TESTS].float() / 255
    pixels = train_images.x[:IMAGES].float() / 255
    assert float(state["mean"]) == pytest.approx(float(pixels.mean()), rel=1e-4)
    assert float(state["std"]) == pytest.approx(float(pixels.std()), rel=1e-3)
    x = ((x - state["mean"]) / state["std"]).expand(-1, 3, -1, -1)
    last = rows(whole)[-1]
    for weights, accuracy in (("model", "test_accuracy"), ("ema", "ema_accuracy")):
        args = SimpleNamespace(static=False, weights=None, start="published")
        model = script.make_network(args, script.INPUT)
        model.load_state_dict(state[weights])
        with torch.no_grad():
            logits = model.eval()(x)
        right = (logits.argmax(1) == test.y[:TESTS]).float().mean()
        assert float(last[accuracy]) == pytest.approx(float(right))
        if weights == "model":
            loss = F.cross_entropy(logits, test.y[:TESTS])
            assert float(last["test_loss"]) == pytest.approx(float(loss), rel=1e-4)


def test_an_interrupted_run_goes_on_bit_for_bit(
    train: Any,
    script: ModuleType,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        step = torch.optim.SGD.step
        taken = []

        def interrupt(*args: Any, **kwargs: Any) -> Any:
            taken.append(1)
            if len(taken) > STEPS + 2:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        patch.setattr(torch.optim.SGD, "step", interrupt)
        assert train(*EVERYTHING, out=tmp_path) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert checkpoint(tmp_path)["epoch"] == 1
    torch.manual_seed(123)  # whatever was drawn meanwhile
    assert train(*EVERYTHING, "--resume", out=tmp_path) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    there, here = checkpoint(whole), checkpoint(tmp_path)
    for weights in ("model", "ema"):
        assert there[weights].keys() == here[weights].keys()
        for name, tensor in there[weights].items():
            assert torch.equal(tensor, here[weights][name]), name
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]
    assert without == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path)]


def test_an_interrupt_before_the_first_epoch_s_end_says_so(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", interrupt)
    assert train(out=tmp_path) == 130
    assert capsys.readouterr().err.endswith(": interrupted: no epoch was finished\n")


def test_the_average_keeps_whole_numbers_and_follows_weights_and_norms(script: ModuleType) -> None:
    model = nn.BatchNorm1d(1)
    model.register_buffer("assignment", torch.tensor([5, 7, 100]))
    ema = script.averaged(model, 0.9)
    expected: float | None = None
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(10 * value)  # type: ignore
        ema.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert expected is not None
    assert float(ema.module.weight.detach()) == pytest.approx(expected)
    assert float(ema.module.running_mean) == pytest.approx(10 * expected)
    assert ema.module.assignment.tolist() == [5, 7, 100]


def test_the_static_network_is_trained_the_same_way(train: Any, tmp_path: Path) -> None:
    assert train("--static", "--epochs", "1", "--optimizer", "adamw", out=tmp_path) == 0
    (row,) = rows(tmp_path)
    assert (row["temperature"], row["images"]) == ("", str(IMAGES))
    assert checkpoint(tmp_path)["model"].keys() == zoo.create("resnet20").state_dict().keys()


def test_the_temperature_falls_over_its_epochs(train: Any, tmp_path: Path) -> None:
    assert train("--temperature-epochs", "2", "--subset", "64", out=tmp_path) == 0
    assert [float(row["temperature"]) for row in rows(tmp_path)] == [0.5, 0]
    model = checkpoint(tmp_path)["model"]
    assert [float(v) for k, v in model.items() if k.endswith("attention.temperature")][:2] == [0, 0]


@pytest.fixture(scope="module")
def even(folder: Path, one_thread: None) -> ModuleType:
    """The script of a plan with a cell per mixture."""
    text = train_script(recipe(RECIPE.replace("total_ratio: 0.5", "ratio: 1")), "even.yaml")
    return loaded(text, folder / "train_even.py")


def test_an_endless_temperature_stays_at_one(
    train: Any, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--temperature-epochs", "inf", "--subset", "32", "--ema", "0.5"]
    assert train(*asked, out=tmp_path) == 0
    assert [float(row["temperature"]) for row in rows(tmp_path)] == [1, 1]
    state = checkpoint(tmp_path)
    shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "weights.pt")
    assert train(*asked, "--resume", out=tmp_path) == 0
    assert "going on after epoch 2" in capsys.readouterr().out
    model = script.make_network(
        SimpleNamespace(static=False, weights=None, start="published"), script.INPUT
    )
    for weights in ("model", "ema"):
        model.load_state_dict(state[weights])
        static = kwlayers.to_static_(copy.deepcopy(model))
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            expected = model.eval()(x)
            torch.testing.assert_close(static.eval()(x), expected, rtol=0, atol=1e-5)
    # And on from there, at that temperature.
    asked = ["--weights", str(tmp_path / "weights.pt"), "--epochs", "1", "--subset", "32"]
    assert train(*asked, out=tmp_path / "on") == 0
    model = checkpoint(tmp_path / "on")["model"]
    assert {float(v) for k, v in model.items() if k.endswith("attention.temperature")} == {1}


def test_weights_are_a_start_and_keep_the_accuracy(
    even: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: str, *options: str) -> tuple[str, dict[str, str]]:
        given = ["--data", str(folder / "digits"), "--epochs", "1", "--subset", "64", *options]
        assert even.main([*given, "--out", str(tmp_path / out)]) == 0
        (row,) = rows(tmp_path / out)
        return capsys.readouterr().out, row

    _, static = run("static", "--static")
    reached = f"test {float(static['test_loss']):.4f} {100 * float(static['test_accuracy']):.2f} %"
    for name, options in (("converted", ()), ("on", ("--static",))):
        weights = tmp_path / "static" / "checkpoint.pt"
        told, row = run(name, "--weights", str(weights), *options)
        assert f"weights of {weights}: {reached}\n" in told
        assert row["temperature"] == ""
    model = checkpoint(tmp_path / "converted")["model"]
    assert {float(v) for k, v in model.items() if k.endswith("temperature")} == {0}
    trained = f"test {float(rows(tmp_path / 'converted')[0]['test_loss']):.4f}"
    told, _ = run("again", "--weights", str(tmp_path / "converted" / "checkpoint.pt"))
    assert f"checkpoint.pt: {trained}" in told


def test_a_static_start_is_the_untrained_static_network(
    even: ModuleType, folder: Path, tmp_path: Path
) -> None:
    def start(*options: str) -> nn.Module:
        torch.manual_seed(3)
        return even.make_network(even.parse_args(["--data", "x", *options]), even.INPUT).eval()

    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = start("--static")(x)
        torch.testing.assert_close(start("--start", "static")(x), expected, rtol=0, atol=1e-5)
        assert (start()(x) - expected).abs().max() > 1e-3
    asked = ["--data", str(folder / "digits"), "--subset", "64", "--epochs", "1", "--seed", "3"]
    assert even.main([*asked, "--start", "static", "--out", str(tmp_path)]) == 0
    model = checkpoint(tmp_path)["model"]
    assert rows(tmp_path)[0]["temperature"] == ""
    assert {float(v) for k, v in model.items() if k.endswith("temperature")} == {0}


def test_weights_of_other_classes_leave_the_last_layer(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = zoo.create("resnet20", num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in given.items()}}, tmp_path / "w.pt")
    asked = ["--data", "x", "--static", "--weights", str(tmp_path / "w.pt")]
    found = script.make_network(script.parse_args(asked), (3, 8, 8)).state_dict()
    same = {name for name in given if torch.equal(found[name], given[name])}
    assert given.keys() - same == {"fc.weight", "fc.bias"}
    assert found["fc.weight"].shape == (10, 64)
    assert "fc: for other classes, not from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"torn", "cannot be read: torch.save did not write it, or there is more than weights"),
        (b"", "cannot be read: torch.save did not write it, or there is more than weights"),
        (nn.Linear(2, 2), "cannot be read: torch.save did not write it, or there is more than"),
        ([1], "has no weights; a state_dict is looked for"),
        ({}, "has no weights; a state_dict is looked for"),
        ({"epoch": 3}, "has no weights; a state_dict is looked for"),
        ({"model": [1]}, "has no weights; a state_dict is looked for"),
        (nn.Linear(2, 2).state_dict(), "of another network or plan, see bias, bn1.bias, bn1.num_b"),
        ({"weight": torch.tensor([1, math.nan])}, "not all numbers are finite, see weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    content: Any, message: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert train("--weights", str(path), out=tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f": {path}: {message}" in told
    assert "weights_only" not in told
    assert not (tmp_path / "out").exists()


def test_another_plan_s_weights_are_refused(
    script: ModuleType, even: ModuleType, tmp_path: Path
) -> None:
    made = even.make_network(
        SimpleNamespace(static=False, weights=None, start="published"), even.INPUT
    )
    torch.save(made.state_dict(), tmp_path / "w.pt")
    asked = script.parse_args(["--data", "x", "--weights", str(tmp_path / "w.pt")])
    with pytest.raises(script.UserError, match=r"w.pt: of another network or plan, see kw_wareh"):
        script.make_network(asked, script.INPUT)
    # The last warehouse's cells alone differ.
    state, name = made.state_dict(), f"kw_warehouses.{even.GROUPS[-1]['name']}.cells"
    state[name] = state[name].transpose(0, 1)[:, :-1]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(even.UserError, match=f"w.pt: of another network or plan, see {name}$"):
        even.make_network(asked, even.INPUT)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.02), (1, 0.04), (4, 0.1), (5, 0.1), (30, 0.05), (55, 0.0)],
)
def test_the_rate_rises_linearly_and_falls_by_half_a_cosine(
    step: int, expected: float, script: ModuleType
) -> None:
    assert script.learning_rate(step, 55, 5, 0.1) == pytest.approx(expected, abs=1e-12)


def test_a_shorter_training_keeps_the_parts_of_warm_up_and_temperature(script: ModuleType) -> None:
    args = script.parse_args(["--data", "x", "--epochs", "10"])
    assert (args.temperature_epochs, args.warmup_epochs) == pytest.approx((5, 10 / 60), rel=0.02)


def test_autocast_channels_last_and_resolution(train: Any, tmp_path: Path) -> None:
    options = ["--amp", "--channels-last", "--resolution", "12", "--epochs", "1", "--subset", "64"]
    assert train(*options, out=tmp_path) == 0
    assert math.isfinite(float(rows(tmp_path)[0]["train_loss"]))


def test_a_subset_is_the_same_for_every_seed(script: ModuleType, folder: Path) -> None:
    found = []
    for seed in ("0", "1"):
        asked = ["--data", str(folder / "digits"), "--subset", "40", "--seed", seed]
        found.append(script.Data(script.parse_args(asked), torch.device("cpu")).train)
    assert torch.equal(found[0].x, found[1].x)
    whole = script.find_images(folder / "digits", "train")
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found[0].x, whole.x[order[:40]])


def test_processes_share_the_images_of_every_step(script: ModuleType) -> None:
    def order(rank: int, world: int, epoch: int = 0) -> list[list[int]]:
        args = SimpleNamespace(batch_size=10, seed=3)
        held = SimpleNamespace(train=SimpleNamespace(y=torch.zeros(45)))
        run = SimpleNamespace(
            args=args, data=held, steps_per_epoch=4, rank=rank, world=world, epoch=epoch
        )
        run.seed = lambda use: script.Run.seed(run, use)
        return [index.tolist() for index in script.Run.order(run)]

    alone, first, second = order(0, 1), order(0, 2), order(1, 2)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(a) for a in alone]
    assert all(len(part) == 5 for part in first + second)
    seen = [index for step in alone for index in step]
    assert (len(seen), len(set(seen))) == (40, 40)
    assert order(0, 1, epoch=1) != alone


def test_shifted_images_are_windows_of_the_padded_ones(script: ModuleType) -> None:
    torch.manual_seed(0)
    x = torch.randint(1, 256, (20, 2, 16, 8), dtype=torch.uint8)
    out, padded, offsets = script.shifted(x), F.pad(x, (1, 1, 1, 1)), set()
    for image, wide in zip(out, padded, strict=True):
        at = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(image, wide[:, top : top + 16, left : left + 8])
        ]
        assert len(at) == 1
        offsets.update(at)
    assert len(offsets) > 4


# Data


def test_cifar_s_binary_version_is_read(script: ModuleType, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (12, 3072), generator=generator, dtype=torch.uint8)
    for classes, head, train_files, test_file in (
        (10, 1, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
        (100, 2, ["train.bin"], "test.bin"),
    ):
        folder = tmp_path / str(classes)
        folder.mkdir()
        labels = torch.arange(12, dtype=torch.uint8) % 10
        coarse = torch.full((12, head - 1), 99, dtype=torch.uint8)
        records = torch.cat([coarse, labels[:, None], x], 1)
        for name, part in zip(train_files, records[:10].chunk(len(train_files)), strict=True):
            (folder / name).write_bytes(part.numpy().tobytes())
        (folder / test_file).write_bytes(records[10:].numpy().tobytes())
        train, test = (script.find_images(folder, part) for part in ("train", "test"))
        assert (train.classes, test.classes) == (classes, classes)
        assert torch.equal(train.x, x[:10].view(-1, 3, 32, 32))
        assert torch.equal(train.y, labels[:10].long())
        assert torch.equal(test.x.flatten(1), x[10:])
        assert torch.equal(data.load(str(folder), "train").x, train.x)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """An image folder of ten classes; class i is of one colour, (20 i, 255 - 20 i, 7)."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for part, count in (("train", 4), ("val", 1)):
        for i in range(10):
            place = tmp_path / "colours" / part / f"class{i}" / "images"
            place.mkdir(parents=True)
            for j in range(count):
                picture = image.new("RGB", (20 + j, 12), (20 * i, 255 - 20 * i, 7))
                picture.save(place / f"{j}.png")
    return tmp_path / "colours"


def test_image_folders_are_read_by_class(script: ModuleType, colours: Path) -> None:
    images = script.find_images(colours, "train")
    assert (images.classes, images.y.tolist()) == (10, [i for i in range(10) for _ in range(4)])
    for random in (False, True):
        files = script.Files(images, (3, 6, 8), random, 0.875)
        x, y = files[4 * 3 + 1]
        assert (int(y), tuple(x.shape)) == (3, (3, 6, 8))
        assert x.flatten(1).unique(dim=1).flatten().tolist() == [60, 195, 7]
    torch.manual_seed(0)
    boxes = [script.Files(images, (3, 6, 8), True, 1).box(30, 20, 8 / 6) for _ in range(50)]
    for left, top, right, bottom in boxes:
        area = (right - left) * (bottom - top) / 600
        ratio = (right - left) / (bottom - top)
        assert -1e-9 <= left < right <= 30 + 1e-9
        assert -1e-9 <= top < bottom <= 20 + 1e-9
        assert 0.08 <= area <= 1.000001
        assert 0.99 <= ratio <= 16 / 9 + 0.01
    assert script.Files(images, (3, 6, 8), False, 0.5).box(30, 20, 1) == (10, 5, 20, 15)


def test_an_image_folder_is_trained_on(script: ModuleType, colours: Path, tmp_path: Path) -> None:
    asked = ["--data", str(colours), "--out", str(tmp_path), "--epochs", "1"]
    assert script.main([*asked, "--batch-size", "20", "--workers", "1"]) == 0
    assert checkpoint(tmp_path)["settings"]["augment"] == "crop"
    assert float(checkpoint(tmp_path)["mean"][2]) == pytest.approx(7 / 255)


# What cannot be


def _nothing(folder: Path) -> None:
    pass


def _torn(folder: Path) -> None:
    write_digits(folder)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def _damaged(folder: Path) -> None:
    write_digits(folder)
    path = folder / "t10k-images.idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def _no_test(folder: Path) -> None:
    write_digits(folder)
    (folder / "t10k-labels.idx1-ubyte.gz").unlink()


def _eleven(folder: Path) -> None:
    write_digits(folder)
    write_idx(folder / "train-labels-idx1-ubyte", torch.arange(IMAGES) % 11)


def _uneven(folder: Path) -> None:
    write_digits(folder)
    write_idx(folder / "train-labels-idx1-ubyte", torch.arange(IMAGES - 1) % 10)


def _pickled(folder: Path) -> None:
    (folder / "data_batch_1").write_bytes(b"")


def _half_cifar(folder: Path) -> None:
    (folder / "data_batch_1.bin").write_bytes(bytes(3073))


def _strange(folder: Path) -> None:
    pytest.importorskip("PIL", reason="pillow is not installed")
    for name in ("train/a", "val/b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(b"")


def _no_image(folder: Path) -> None:
    pytest.importorskip("PIL", reason="pillow is not installed")
    for part in ("train", "val"):
        for i in range(10):
            (folder / part / str(i)).mkdir(parents=True)
            for j in range(4):
                (folder / part / str(i) / f"{j}.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_nothing, [], "no train images there; looked for {train,t10k}-{images-idx3"),
        (_torn, [], "train-images-idx3-ubyte: not 3-dimensional bytes in MNIST's format"),
        (_damaged, [], "t10k-images.idx3-ubyte.gz: damaged ("),
        (_no_test, [], "no test images there"),
        (_eleven, [], "11 classes, the network has 10 (model.num_classes of its recipe)"),
        (_uneven, [], "128 train images but 127 labels"),
        (_pickled, [], "CIFAR as pickles, which can run code; try the binary version"),
        (_half_cifar, [], "data_batch_2.bin, data_batch_3.bin, data_batch_4.bin"),
        (_strange, [], "class 'b' is not among those of"),
        (_no_image, ["--workers", "1"], ".png: cannot be read as an image ("),
        (write_digits, ["--augment", "crop"], "--augment crop is for image files; try flip"),
        (write_digits, ["--subset", "129"], "--subset 129, but there are 128 training images"),
        (write_digits, ["--subset", "16"], "--batch-size 32, but there are 16 training images"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_in_one_line(
    make: Any,
    options: list[str],
    message: str,
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    assert script.main(["--data", str(folder), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "Traceback" not in said.err
    assert message in said.err


def test_a_folder_that_is_not_there_is_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--data", "nowhere"]) == 2
    assert "--data nowhere: there is no such folder" in capsys.readouterr().err


def test_images_of_other_channels_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = train_script(recipe(RECIPE.replace("[3, 8, 8]", "[1, 8, 8]")), "x.yaml")
    module = loaded(text, tmp_path / "train_grey.py")
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).write_bytes(bytes(3073 * 10))
    assert module.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "images of 3 channels, the network takes 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "--lr -1: allowed is at least 0"),
        (["--lr", "nan"], "--lr nan: allowed is at least 0"),
        (["--epochs", "0"], "--epochs 0: allowed is at least 1"),
        (["--ema", "2"], "--ema 2: allowed is 0 to 1"),
        (["--temperature-epochs", "3"], "--temperature-epochs 3: allowed is 0 to 2, or inf"),
        (["--warmup-epochs", "inf"], "--warmup-epochs inf: allowed is 0 to 2\n"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
    ],
)
def test_options_out_of_range_are_refused(
    options: list[str], message: str, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main(["--data", "x", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_neither_overwritten_nor_mistaken(
    train: Any,
    script: ModuleType,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*EVERYTHING, out=whole) == 2
    assert "exists: --resume goes on from it, or give another --out" in capsys.readouterr().err
    assert train(*EVERYTHING, "--lr", "0.3", "--resume", out=whole) == 2
    assert "is of another training (lr 0.05, now 0.3); try another --out" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    assert train("--resume", out=tmp_path) == 2
    assert "checkpoint.pt: cannot be read: torch.save did not write it" in capsys.readouterr().err
    for content in ([1], {"model": {}}):
        torch.save(content, tmp_path / "checkpoint.pt")
        assert train("--resume", out=tmp_path) == 2
        assert "checkpoint.pt: not a checkpoint of this script\n" in capsys.readouterr().err


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_code_in_a_checkpoint_does_not_run(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"settings": _Code()}, tmp_path / "checkpoint.pt")
    assert train("--resume", out=tmp_path) == 2
    assert "checkpoint.pt: cannot be read: torch.save did not" in capsys.readouterr().err
    assert not Path("ran").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed")])
def test_a_full_disk_stops_it_with_1_and_loses_no_checkpoint(
    error: Exception,
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = torch.save

    def full(state: dict[str, Any], path: Path) -> None:
        if state["epoch"] == 2:
            path.write_bytes(b"half")
            raise error
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    options = ("--static", "--epochs", "2")
    assert train(*options, out=tmp_path) == 1
    assert "epoch 2 cannot be written to " in capsys.readouterr().err
    assert (checkpoint(tmp_path)["epoch"], len(rows(tmp_path))) == (1, 1)
    monkeypatch.undo()
    assert train(*options, "--resume", out=tmp_path) == 0
    assert (checkpoint(tmp_path)["epoch"], len(rows(tmp_path))) == (2, 2)


def test_a_diverging_run_stops_with_1(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--lr", "1e8", "--static", out=tmp_path) == 1
    assert "the loss became nan in epoch 1; lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


# As a program


def test_the_script_runs_alone(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(folder / "train_small.py")),
            *("--data", str(folder / "digits"), "--epochs", "1", "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("epoch 1/1  lr ")
    assert len(rows(tmp_path / "out")) == 1
    assert checkpoint(tmp_path / "out")["epoch"] == 1


@pytest.mark.slow
def test_two_processes_see_as_many_images_as_one(
    folder: Path, script: ModuleType, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(folder / "train_small.py"), "--data", str(folder / "digits"), "--ema", "0.5"),
            *("--epochs", "1", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1  # the first process alone speaks
    (row,) = rows(tmp_path)
    assert (int(row["images"]), int(row["step"])) == (IMAGES, STEPS)
    # All test images count, once: the accuracy is that of the checkpoint on all of them.
    state, test = checkpoint(tmp_path), data.load("digits", "test")
    model = script.make_network(
        SimpleNamespace(static=False, weights=None, start="published"), script.INPUT
    )
    model.load_state_dict(state["model"])
    x = (test.x[:TESTS].float() / 255 - state["mean"]) / state["std"]
    with torch.no_grad():
        guess = model.eval()(x.expand(-1, 3, -1, -1)).argmax(1)
    right = float((guess == test.y[:TESTS]).float().mean())
    assert float(row["test_accuracy"]) == pytest.approx(right)


@pytest.mark.slow
def test_a_compiled_network_trains(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the compiler of C++, which takes many minutes on a CPU.
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    assert train("--compile", "--epochs", "1", out=tmp_path) == 0
    assert math.isfinite(float(rows(tmp_path)[0]["train_loss"]))


@pytest.fixture(scope="module")
def partly(folder: Path, one_thread: None) -> ModuleType:
    """The script of a PAD-Net."""
    text = RECIPE.replace("total_ratio: 0.5}", "ratio: 0.25}\nmethod: {name: pad_net}")
    return loaded(train_script(recipe(text), "partly.yaml"), folder / "train_partly.py")


def test_a_pad_net_is_partitioned_once_at_the_temperature_of_its_start(
    partly: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[float], bool]] = []
    plain = kwlayers.prepare_

    def watched(model: nn.Module, *args: Any) -> nn.Module:
        heat = {float(v) for k, v in model.state_dict().items() if k.endswith("temperature")}
        seen.append((heat, model.kw_warehouses.warm_start is not None))
        return plain(model, *args)

    monkeypatch.setattr(kwlayers, "prepare_", watched)

    def run(out: str, *options: str) -> int:
        """Dynamic weights of the trained network; 0 for a static one."""
        asked = ["--data", str(folder / "digits"), "--epochs", "1", "--subset", "32", *options]
        assert partly.main([*asked, "--out", str(tmp_path / out)]) == 0
        model = checkpoint(tmp_path / out)["model"]
        return sum(int(mask.sum()) for name, mask in model.items() if name.endswith(".mask"))

    (group,) = partly.GROUPS
    assert run("cold") == group["dynamic"]
    assert run("on", "--weights", str(tmp_path / "cold" / "checkpoint.pt")) == group["dynamic"]
    assert seen == [({1.0}, False)]
    assert run("static", "--static") == 0
    static = str(tmp_path / "static" / "checkpoint.pt")
    assert run("warm", "--weights", static) == group["dynamic"]
    assert seen[1:] == [({0.0}, True)]
