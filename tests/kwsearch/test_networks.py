"""Networks by name: of the zoo, timm, torchvision, and of one's own with --trust."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kwlayers.plan import PlanError
from kwsearch import cli, networks, zoo
from kwsearch.networks import build_model, count_outputs, planning_model, source, trace_model

OWN = """
    from torch import nn

    def make_model(num_classes=5, in_channels=3):
        return nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, num_classes),
        )
"""


def own_params(classes: int, channels: int) -> int:
    return 9 * channels * 4 + 4 + 4 * classes + classes


def is_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def no_download(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("weights were asked for")


# The zoo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_name_of_the_zoo_is_its_entry(name: str) -> None:
    found, entry = source(name), zoo.get(name)
    assert (found.name, found.input_size, found.num_classes) == (
        name,
        entry.input_size,
        entry.num_classes,
    )
    assert found.scalable
    assert is_meta(planning_model(name))


def test_a_network_of_the_zoo_is_built_for_a_size_classes_and_a_width() -> None:
    model = build_model("resnet20", (1, 8, 8), 7, 0.5)
    assert model.get_parameter("conv1.weight").shape == (8, 1, 3, 3)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 7)


def test_an_unknown_name_is_told_what_else_there_is() -> None:
    message = (
        r"^unknown model 'resnet51': did you mean resnet\d+ or resnet\d+\? the zoo has .*; "
        r"others are timm:NAME, torchvision:NAME, or package\.module:function of your own "
        r"\(with --trust\)$"
    )
    with pytest.raises(zoo.UnknownModelError, match=message):
        source("resnet51")


@pytest.mark.parametrize("name", ["a:b:c", ":b", "a:", "a b:c", "a..b:c", "1a:b", "http:/x"])
def test_a_name_of_no_form_is_told_the_forms(name: str) -> None:
    with pytest.raises(zoo.UnknownModelError, match=r"allowed are a name of the zoo \(resnet18"):
        source(name, trust=True)


# timm and torchvision ----------------------------------------------------------------------------

# torchvision keeps the parameters and GMACs of each network with its weights; timm has the same
# architectures under other names.
ALIKE = {
    "resnext50_32x4d": "resnext50_32x4d",
    "regnety_004": "regnet_y_400mf",
    "densenet121": "densenet121",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenetv3_small_100": "mobilenet_v3_small",
    "vgg11_bn": "vgg11_bn",
    "vit_base_patch16_224": "vit_b_16",
    "swin_tiny_patch4_window7_224": "swin_t",
}


@pytest.mark.parametrize("name", ALIKE)
def test_both_packages_give_the_network_that_torchvision_documents(
    name: str, timm: ModuleType, torchvision_models: ModuleType
) -> None:
    documented = torchvision_models.get_model_weights(ALIKE[name]).DEFAULT.meta
    theirs = trace_model(f"torchvision:{ALIKE[name]}")
    assert theirs.params == documented["num_params"]
    assert round(theirs.macs / 1e9, 3) == documented["_ops"]
    assert trace_model(f"timm:{name}").params == documented["num_params"]


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        ("timm:cspresnet50", (3, 256, 256), 1000),
        ("timm:vit_tiny_patch16_224.augreg_in21k", (3, 224, 224), 21843),
        ("torchvision:inception_v3", (3, 299, 299), 1000),
        ("torchvision:efficientnet_b1", (3, 240, 240), 1000),
        ("torchvision:fcn_resnet50", (3, 224, 224), 21),
        ("torchvision:r3d_18", (3, 16, 112, 112), 400),
    ],
)
def test_sizes_and_classes_are_those_of_the_packages(
    name: str, size: tuple[int, ...], classes: int, timm: ModuleType, torchvision_models: ModuleType
) -> None:
    found = source(name)
    assert (found.name, found.input_size, found.num_classes) == (name, size, classes)
    assert not found.scalable


@pytest.mark.parametrize(
    "name",
    [
        "timm:mixer_s16_224",
        "timm:convnextv2_atto",
        "timm:levit_128",
        "timm:maxvit_tiny_tf_224",
        "torchvision:fcn_resnet50",
        "torchvision:maxvit_t",
        "torchvision:r3d_18",
    ],
)
def test_planning_has_no_weights_and_loads_none(
    name: str, timm: ModuleType, torchvision_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = importlib.import_module("torchvision.models._api")
    monkeypatch.setattr(api.WeightsEnum, "get_state_dict", no_download)
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_download)
    assert is_meta(planning_model(name))
    network = trace_model(name)
    assert network.input_size == source(name).input_size
    assert sum(not site.fixed for site in network.sites) >= 3


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:resnet10t"])
def test_a_network_of_timm_takes_other_images_and_classes(name: str, timm: ModuleType) -> None:
    model = build_model(name, (1, 64, 32), 7)
    assert model(torch.zeros(2, 1, 64, 32)).shape == (2, 7)
    assert trace_model(name, (1, 64, 32), 7).input_size == (1, 64, 32)


def test_a_network_of_torchvision_takes_other_images_and_classes(
    torchvision_models: ModuleType,
) -> None:
    model = build_model("torchvision:mobilenet_v3_small", (3, 64, 32), 7).eval()
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 7)
    # Positions of 14 x 14 patches and the class token.
    vit = planning_model("torchvision:vit_b_32", (3, 448, 448), 7)
    assert vit.get_parameter("encoder.pos_embedding").shape == (1, 14**2 + 1, 768)
    assert vit.get_parameter("heads.head.weight").shape == (7, 768)
    assert trace_model("torchvision:maxvit_t", (3, 448, 448)).input_size == (3, 448, 448)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(name: str, torchvision_models: ModuleType) -> None:
    size = source(f"torchvision:{name}").size()
    model = planning_model(f"torchvision:{name}", size, 7)
    assert not any("aux" in part for part, _ in model.named_modules())
    assert count_outputs(model, size) == 7


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("torchvision:resnet18", (1, 64, 64), "take 3 channels, not 1; those of the zoo and timm"),
        ("torchvision:vit_b_16", (3, 64, 32), "takes square images, not 3x64x32"),
        ("torchvision:raft_small", None, "does not take a batch of images or videos alone"),
        ("torchvision:ssd300_vgg16", None, "does not take a batch of images or videos alone"),
        ("torchvision:maxvit_t", (3, 100, 100), "cannot be built for 3x100x100: ValueError: "),
        (
            "timm:mixer_s16_224",
            (3, 224),
            r"cannot be built for 3x224: \w+Error: ",
        ),
    ],
)
def test_what_a_package_cannot_build_is_refused(
    name: str,
    size: tuple[int, ...] | None,
    message: str,
    timm: ModuleType,
    torchvision_models: ModuleType,
) -> None:
    with pytest.raises(PlanError, match=rf"^{name}:? .*{message}"):
        trace_model(name, size)


def test_only_the_zoo_has_widths(timm: ModuleType) -> None:
    assert source("timm:resnet10t").build((3, 32, 32), 2, 1.0) is not None
    with pytest.raises(PlanError, match=r"^timm:resnet10t: only networks of the zoo can be scaled"):
        build_model("timm:resnet10t", (3, 32, 32), 2, 0.5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:resnext50_32x4", "did you mean timm:resnext50_32x4d or "),
        ("timm:resnet50.a2_in2k", "did you mean timm:resnet50.a2_in1k or "),
        ("torchvision:efficientnetb0", "did you mean torchvision:efficientnet_b0 or "),
        ("timm:", "`kwsearch models timm:PART` lists"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", ""),
    ],
)
def test_an_unknown_name_of_a_package_is_told_close_ones(
    name: str, hint: str, timm: ModuleType, torchvision_models: ModuleType
) -> None:
    message = rf"^unknown model '{re.escape(name)}': {re.escape(hint)}"
    with pytest.raises(zoo.UnknownModelError, match=message):
        source(name)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_one_message(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'^{package}:x: it needs the package {package}, .*: `pip install "kwsearch\[zoo\]"`$'
    with pytest.raises(PlanError, match=message):
        source(f"{package}:x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: oper"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_a_package_that_does_not_load_says_why(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(PlanError, match=rf"^timm:x: importing timm fails: {reason}"):
        source("timm:x")


def test_names_are_found_by_a_part_or_a_glob(
    timm: ModuleType, torchvision_models: ModuleType
) -> None:
    assert "timm:resnext50_32x4d" in networks.matching("timm:resnext50")
    assert networks.matching("timm:convnextv2_[ab]*o") == ["timm:convnextv2_atto"]
    assert networks.matching("torchvision:vit_?_14") == ["torchvision:vit_h_14"]
    assert networks.matching("torchvision:rcnn") == []
    with pytest.raises(PlanError, match=r"^resnet: give timm:PART or torchvision:PART of"):
        networks.matching("resnet")


# Your own ----------------------------------------------------------------------------------------


def test_own_code_is_imported_with_trust_only(own_code: Callable[[str], str]) -> None:
    module = own_code("raise SystemExit('imported')")
    name = f"{module}:make_model"
    assert source(name).input_size is None  # that much needs no import
    message = (
        rf"^{name}: it is code of your own: building it would import {module} and call "
        r"make_model\(\), which --trust allows \(in Python trust=True\)$"
    )
    for refused in (build_model, planning_model, trace_model):
        with pytest.raises(PlanError, match=message):
            refused(name, (3, 8, 8), 2)  # type: ignore[operator]
    assert module not in sys.modules
    with pytest.raises(
        PlanError, match=rf"importing {module} fails: SystemExit: imported \(.*:1\)"
    ):
        trace_model(name, (3, 8, 8), 2, trust=True)


def test_a_misspelt_package_is_not_taken_for_own_code() -> None:
    message = "^timn:resnet18: did you mean timm:resnet18[?] Otherwise it is code of your own: "
    with pytest.raises(PlanError, match=message):
        trace_model("timn:resnet18")


def test_own_code_is_called_with_channels_and_classes(own_code: Callable[[str], str]) -> None:
    name = f"{own_code(OWN)}:make_model"
    network = trace_model(name, (1, 8, 8), 7, trust=True)
    assert network.params == own_params(7, 1)
    assert network.macs == 9 * 4 * 64 + 4 * 7
    assert trace_model(name, (3, 8, 8), trust=True).params == own_params(5, 3)
    assert is_meta(planning_model(name, (1, 8, 8), 7, trust=True))
    model = build_model(name, (1, 8, 8), 7, trust=True)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


def test_own_code_gets_what_its_signature_takes(own_code: Callable[[str], str]) -> None:
    module = own_code(
        OWN
        + """
    def fixed():
        return make_model(3, 2)

    def anything(**options):
        assert sorted(options) == ["in_channels", "num_classes"]
        return make_model(**options)

    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.body = make_model(num_classes)

        def forward(self, x):
            return self.body(x)

        @staticmethod
        def small():
            return Net(1)
    """
    )
    assert trace_model(f"{module}:fixed", (2, 8, 8), trust=True).params == own_params(3, 2)
    assert trace_model(f"{module}:anything", (2, 8, 8), 9, True).params == own_params(9, 2)
    assert trace_model(f"{module}:Net", (3, 8, 8), 9, trust=True).params == own_params(9, 3)
    assert trace_model(f"{module}:Net.small", (3, 8, 8), trust=True).params == own_params(1, 3)
    with pytest.raises(PlanError, match=r"it takes no num_classes, so .* for 9 classes: leave out"):
        build_model(f"{module}:fixed", (2, 8, 8), 9, trust=True)
    message = (
        rf"needs num_classes: give --classes, .* model: {{name: {module}:Net, num_classes: 10}}"
    )
    with pytest.raises(PlanError, match=message):
        build_model(f"{module}:Net", (3, 8, 8), trust=True)


def test_the_input_size_of_own_code_must_be_given(own_code: Callable[[str], str]) -> None:
    module = own_code(OWN)
    name = f"{module}:make_model"
    with pytest.raises(PlanError, match=rf"^{name}: its input size is not known: give --input"):
        trace_model(name, trust=True)
    with pytest.raises(PlanError, match=rf"^{module}:makes: {module} has no makes$"):
        trace_model(f"{module}:makes", trust=True)


def test_what_own_code_prints_is_no_result(
    own_code: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = own_code(
        OWN
        + """
    print("imported")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            print("called")
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), make_model(5, 8))

        def forward(self, x):
            print("traced")
            return self.body(x)
    """
    )
    trace_model(f"{module}:Net", (3, 8, 8), trust=True)
    count_outputs(build_model(f"{module}:Net", (3, 8, 8), trust=True), (3, 8, 8))
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[:3] == ["imported", "called", "traced"]
    assert cli.run(["budget", f"{module}:Net", "--trust", "--input", "3x8x8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == [3, 8, 8]
    step = ["--ratio", "1", "--batch", "2", "--check", "--json"]
    assert cli.run(["budget", f"{module}:Net", "--trust", "--input", "3x8x8", *step]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["memory"]["step"]["batch"] == 2
    assert "traced" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make():\n    return 3", r"it returned int, not a torch\.nn\.Module"),
        ("make = 3", "make is of type int, not a function"),
        ("def maker(): ...", r"own_\w+ has no make; did you mean maker\?"),
        (
            "def make():\n    raise KeyError('depth')",
            r"it cannot be built for 3x8x8: KeyError: 'depth' \(.*own_\w+\.py:2\)",
        ),
        ("def make():\n    raise SystemExit(3)", "cannot be built for 3x8x8: SystemExit: 3"),
        ("def make(depth): ...", "cannot be built for 3x8x8: TypeError: .* 'depth'"),
        (
            "import nowhere_at_all",
            r"ModuleNotFoundError: No module named 'nowhere_at_all' \(.*:1\)",
        ),
        ("def make(:", r"importing own_\w+ fails: SyntaxError: "),
    ],
)
def test_what_own_code_does_wrong_is_one_message(
    text: str, message: str, own_code: Callable[[str], str]
) -> None:
    name = f"{own_code(text)}:make"
    with pytest.raises(PlanError, match=rf"^{name}: .*{message}"):
        trace_model(name, (3, 8, 8), trust=True)


def test_a_module_that_is_not_there_is_one_message(own_code: Callable[[str], str]) -> None:
    message = "^own_nothing.nets:make: importing own_nothing.nets fails: ModuleNotFoundError: "
    with pytest.raises(PlanError, match=message):
        trace_model("own_nothing.nets:make", (3, 8, 8), trust=True)


def test_own_code_that_needs_data_is_planned_on_the_cpu(own_code: Callable[[str], str]) -> None:
    module = own_code(
        OWN
        + """
    def make(num_classes=5):
        import torch
        return make_model(int(torch.full((), 6).item()))
    """
    )
    assert trace_model(f"{module}:make", (3, 8, 8), trust=True).params == own_params(6, 3)


# What a network gives ----------------------------------------------------------------------------


class Gives(nn.Module):
    """Something of its images, when evaluated and when trained."""

    def __init__(self, evaluated: Callable[..., Any], trained: Callable[..., Any]) -> None:
        super().__init__()
        self.evaluated, self.trained = evaluated, trained

    def forward(self, x: torch.Tensor) -> Any:
        return (self.trained if self.training else self.evaluated)(x.flatten(1))


def test_outputs_are_counted_in_evaluation_and_training() -> None:
    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    assert count_outputs(Gives(same, same), (3, 2, 2)) == 12
    # Training that needs data cannot be tried without any.
    assert count_outputs(Gives(same, lambda x: x * x.sum().item()), (3, 2, 2)) == 12
    for wrong, said in (
        (lambda x: {"out": x}, "dict"),
        (lambda x: (x, x), "tuple"),
        (lambda x: x[:, :, None], r"a tensor \(2, 12, 1\)"),
    ):
        for gives, when in ((Gives(wrong, same), "evaluated"), (Gives(same, wrong), "trained")):
            with pytest.raises(PlanError, match=rf"the model gives {said} for 2 images, {when}: "):
                count_outputs(gives, (3, 2, 2))
    with pytest.raises(PlanError, match="does not run on images of 3x2x2, evaluated: RuntimeError"):
        count_outputs(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), (3, 2, 2))
