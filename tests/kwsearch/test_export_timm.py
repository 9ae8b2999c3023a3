"""The module that is written for timm: its network is the recipe's, and timm trains it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kwlayers import PlanError
from kwsearch import zoo
from kwsearch.export import timm_module as exporting
from kwsearch.export.errors import ExportError
from kwsearch.export.timm_module import TIMM_NAMES, module_name, timm_module, write_timm_module
from kwsearch.networks import trace_model
from kwsearch.recipe import Recipe, load_recipe, parse_recipe
from kwsearch.resolve import network_of, outcome_of
from tests.zoo import IMAGES

RECIPES = Path(__file__).parents[2] / "recipes"
pytestmark = pytest.mark.usefixtures("timm", "one_thread")


def recipe(model: str, size: str = "[3, 32, 32]", **sections: str) -> Recipe:
    text = f"format: 1\nmodel: {model}\ninput: {size}\nbudget: {{ratio: 0.5}}\n"
    return parse_recipe(text + "".join(f"{key}: {value}\n" for key, value in sections.items()))


@pytest.fixture
def load(tmp_path: Path, timm: ModuleType) -> Iterator[Any]:
    """Write the module of a recipe and import it; all is forgotten afterwards."""
    loaded = []

    def write_and_import(given: Recipe, name: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        write_timm_module(given, path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield write_and_import
    for name in loaded:
        timm.models._registry._clear_model_entries(name)
        timm.models._registry._model_entrypoints.pop(name, None)
        del sys.modules[name]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_a_step(model: Any, channels: int, side: int, classes: int) -> None:
    """With timm's optimizer; the loss of the batch falls."""
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    x, y = torch.randn(4, channels, side, side), torch.arange(4) % classes
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    losses = []
    for _ in range(3):
        out = model(x)
        assert out.shape == (4, classes)
        loss = nn.functional.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# The network ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_timm_builds_the_layers_of_the_zoo_under_the_same_names(
    name: str, timm: ModuleType
) -> None:
    network = trace_model(name)
    if name not in TIMM_NAMES:
        assert name == "resnet20"
        assert not timm.is_model(name)
        return
    made, traced = exporting._of_timm(timm, *TIMM_NAMES[name], network, zoo.get(name).num_classes)
    assert exporting._layers(traced) == exporting._layers(network)
    assert len(traced.sites) > 10
    assert made.base in timm.list_models()


CASES = {
    "zoo": (lambda: load_recipe(RECIPES / "kw_resnet18_0.5x.yaml"), 64, 1000, "timm"),
    "zoo, not in timm": (
        lambda: load_recipe(RECIPES / "quickstart.yaml"),
        32,
        10,
        "timm and kwsearch",
    ),
    "timm": (lambda: recipe("timm:resnet10t"), 32, 1000, "timm"),
    "torchvision": (
        lambda: recipe("torchvision:shufflenet_v2_x0_5", method="{sharing: layer}"),
        64,
        1000,
        "timm and torchvision",
    ),
    "an image size of its own": (
        lambda: recipe("{name: deit_tiny, num_classes: 10}", "[3, 32, 32]"),
        32,
        10,
        "timm",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_registered_network_is_the_recipes(case: str, timm: ModuleType, load: Any) -> None:
    make, side, classes, needs = CASES[case]
    given = make()
    module = load(given, "kw_test")
    plan = outcome_of(given, network_of(given)).plan
    cost = plan.cost()
    assert f"{cost.params.total:,} parameters" in module.__doc__
    assert f"{cost.macs.total:,} MACs" in module.__doc__
    assert f"Needs torch, kwlayers and {needs}." in module.__doc__

    model = timm.create_model("kw_test")
    assert params(model) == cost.params.total
    built = {name: w.cells.shape for name, w in model.kw_warehouses.items()}
    assert built == {group.name: (group.num_cells, *group.cell) for group in plan.groups}
    assert model.kw_warehouses.layers == {group.name: group.layers for group in plan.groups}
    assert model.num_classes == classes == model.default_cfg["num_classes"]
    train_a_step(model, 3, side, classes)


@pytest.mark.parametrize("case", ["zoo", "zoo, not in timm"])
def test_other_classes_and_channels_keep_the_cells(case: str, timm: ModuleType, load: Any) -> None:
    make, side, *_ = CASES[case]
    load(make(), "kw_test")
    model = timm.create_model("kw_test")
    other = timm.create_model("kw_test", num_classes=7, in_chans=1)
    for name, warehouse in model.kw_warehouses.items():
        assert other.kw_warehouses[name].cells.shape == warehouse.cells.shape
    assert params(other) < params(model)
    assert other.num_classes == 7
    train_a_step(other, 1, side, 7)


def test_what_timm_passes_on_reaches_the_network(timm: ModuleType, load: Any) -> None:
    load(CASES["zoo"][0](), "kw_test")
    # As timm's train.py calls it.
    model = timm.create_model(
        "kw_test", pretrained=False, in_chans=3, num_classes=None, drop_rate=0.25,
        drop_path_rate=None, global_pool="max", scriptable=False, checkpoint_path="",
    )  # fmt: skip
    assert model.drop_rate == 0.25
    assert model.global_pool.pool_type == "max"
    assert model.num_classes == 1000
    assert timm.create_model("kw_test", num_classes=0)(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


def test_data_is_loaded_as_for_the_network_of_timm(timm: ModuleType, load: Any) -> None:
    load(recipe("resnet18", "[3, 96, 96]"), "kw_test")
    model = timm.create_model("kw_test")
    own = timm.create_model("resnet18")
    config = timm.data.resolve_data_config({}, model=model)
    expected = timm.data.resolve_data_config({}, model=own)
    assert config == {**expected, "input_size": (3, 96, 96)}
    assert timm.get_pretrained_cfg("kw_test").classifier == "fc"
    assert not timm.models.is_model_pretrained("kw_test")

    load(recipe("resnet20", "[1, 28, 28]"), "kw_gray")
    config = timm.data.resolve_data_config({}, model=timm.create_model("kw_gray"))
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 28, 28), (0.5,), (0.5,))


def test_a_fresh_process_finds_the_network_by_name(tmp_path: Path) -> None:
    write_timm_module(CASES["zoo, not in timm"][0](), tmp_path / "kw_quick.py")
    stubs = (
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    try: library.define(name + '(Tensor a, Tensor b, float c) -> Tensor')\n"
        "    except RuntimeError: pass\n"
    )
    code = "import kw_quick, timm; print(len(list(timm.create_model('kw_quick').parameters())))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{stubs}{code}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(RECIPES.parent), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 100


# Its temperature -----------------------------------------------------------------------


def temperatures(model: nn.Module) -> set[float]:
    return {float(t) for name, t in model.named_buffers() if name.endswith("attention.temperature")}


def test_the_temperature_falls_with_the_batches_of_training(timm: ModuleType, load: Any) -> None:
    load(CASES["zoo, not in timm"][0](), "kw_test")
    assert temperatures(timm.create_model("kw_test")) == {0.0}
    model = timm.create_model("kw_test", temperature_steps=4)
    x = torch.randn(2, 3, 32, 32)
    assert temperatures(model) == {1.0}
    for step in range(1, 3):
        model.train()(x)
        assert temperatures(model) == {1 - step / 4}
        model.eval()(x)
        assert temperatures(model) == {1 - step / 4}

    resumed = timm.create_model("kw_test", temperature_steps=4)
    resumed.load_state_dict(model.state_dict())
    seen = []
    for _ in range(4):
        resumed.train()(x)
        seen += temperatures(resumed)
    assert seen == [0.25, 0.0, 0.0, 0.0]


def test_long_warm_ups_end_at_zero_and_low_precision_is_refused(
    timm: ModuleType, load: Any
) -> None:
    module = load(CASES["zoo, not in timm"][0](), "kw_test")
    model = timm.create_model("kw_test", temperature_steps=20_000).train()
    cool = next(iter(model._forward_pre_hooks.values()))
    layer = model.layer1[0].conv1
    for _ in range(15_000):
        cool(layer, ())
    assert float(layer.attention.temperature) == pytest.approx(0.25, abs=1e-3)
    for _ in range(5_100):
        cool(layer, ())
    assert float(layer.attention.temperature) == 0
    with pytest.raises(
        TypeError, match=r"temperature in torch.bfloat16 cannot fall in small steps"
    ):
        model.bfloat16()(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="temperature_steps -1: at least 0"):
        module.kw_test(temperature_steps=-1)


# Refused -------------------------------------------------------------------------------


def test_what_the_network_cannot_be_is_refused_when_it_is_created(
    timm: ModuleType, load: Any
) -> None:
    load(CASES["zoo, not in timm"][0](), "kw_test")
    with pytest.raises(RuntimeError, match="kw_test has no pretrained weights; load yours"):
        timm.create_model("kw_test", pretrained=True)
    with pytest.raises(TypeError, match=r"resnet20 takes num_classes and in_chans, not \{'drop_"):
        timm.create_model("kw_test", drop_rate=0.1)
    load(CASES["torchvision"][0](), "kw_other")
    with pytest.raises(ValueError, match="torchvision's networks take 3 channels, not 1"):
        timm.create_model("kw_other", in_chans=1)
    load(load_recipe(RECIPES / "kw_mobilenetv2_100_0.5x.yaml"), "kw_third")
    message = (
        r"kw_third was planned for num_classes=1000, in_chans=3, not for num_classes=7, in_chans=3"
        r".*classifier: cells of shape \(1000, 32, 1\).*plan the recipe again"
    )
    with pytest.raises(PlanError, match=message):
        timm.create_model("kw_third", num_classes=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # An accent of its own: Python looks for the one letter that both make.
        ("kw_u\u0308", "'kw_u\u0308': not a name that Python can import; call it e.g. kw_u"),
        ("my net", "'my net': not a name that Python can import; call it e.g. kw_my_net"),
        ("kw_0.5x", "'kw_0.5x': not a name that Python can import; call it e.g. kw_0_5x"),
        ("class", "'class': not a name that Python can import; call it e.g. kw_class"),
        ("resnet18", "'resnet18': timm has a network of that name; call it e.g. kw_resnet18"),
        ("timm", "'timm': the module would hide the package of that name; call it e.g. kw_timm"),
    ],
)
def test_a_name_that_cannot_be_registered_is_refused_with_one_that_can(
    name: str, message: str, tmp_path: Path
) -> None:
    given = recipe("resnet20")
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        write_timm_module(given, tmp_path / f"{name}.py")
    assert list(tmp_path.iterdir()) == []
    assert "def kw_fine(" in timm_module(given, "kw_fine")


def test_letters_of_any_alphabet_name_a_network(timm: ModuleType, load: Any) -> None:
    assert load(recipe("resnet20"), "kw_ü").kw_ü.__name__ == "kw_ü"
    assert params(timm.create_model("kw_ü", num_classes=10)) > 0


def test_a_file_name_becomes_a_name(tmp_path: Path) -> None:
    assert module_name("resnet18-0.5x") == "kw_resnet18_0_5x"
    assert module_name("kw_resnet18_0.5x") == "kw_resnet18_0_5x"
    write_timm_module(recipe("resnet20"), tmp_path / ".tmp", name="kw_given")
    assert "def kw_given(" in (tmp_path / ".tmp").read_text()


def test_code_of_your_own_is_refused_with_what_to_do() -> None:
    message = "nets:small is code of your own: call kwlayers.convert_ in it, and put timm.models"
    with pytest.raises(ExportError, match=message):
        timm_module(recipe("nets:small"), "kw_small")


def test_a_missing_timm_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ExportError, match=r"needs timm, not installed here: pip install \"kwsearch\[zoo\]\""
    ):
        timm_module(recipe("resnet20"), "kw_small")
