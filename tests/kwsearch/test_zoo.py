"""The zoo builds the published backbones: same size, same names, same function."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwsearch import zoo
from tests.zoo import IMAGES as SWEPT

IMAGES = [*SWEPT, "mobilenetv2_075"]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
TIMM_NAMES = {
    "mobilenetv2_050": "mobilenetv2_050",
    "mobilenetv2_075": "mobilenetv2_075",
    "mobilenetv2_100": "mobilenetv2_100",
    "convnext_tiny": "convnext_tiny",
    "deit_tiny": "deit_tiny_patch16_224",
}
REFERENCED = (*RESNETS, "resnet20", *TIMM_NAMES)

PARAMS = {
    # Counted with the reference implementation of KernelWarehouse (its unchanged backbones).
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenetv2_050": 1_968_680,
    "mobilenetv2_075": 2_636_424,  # counted in ODConv's published code
    "mobilenetv2_100": 3_504_872,
    "convnext_tiny": 28_589_128,
    # num_params in torchvision's weight metadata.
    "resnet34": 21_797_672,
    "resnet101": 44_549_160,
    # timm's deit_tiny_patch16_224.
    "deit_tiny": 5_717_416,
    # By hand: stem 464, stages 14,016 + 51,648 + 205,696 (each with its batch norms and
    # projection), classifier 650.
    "resnet20": 272_474,
}

MACS = {
    # Convolutions and linear layers at 224x224; source as above.
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "mobilenetv2_050": 97_131_840,
    "mobilenetv2_075": 209_069_792,
    "mobilenetv2_100": 300_774_272,
    "convnext_tiny": 4_455_531_264,
    # By hand: patches 196 * 147,456, blocks 12 * 197 * 442,368, classifier 192,000.
    "deit_tiny": 1_074_851_328,
    # By hand, 32x32: 1,024 * (432 + 13,824) + 256 * 51,200 + 64 * 204,800 + 640.
    "resnet20": 40_813_184,
}
# "_ops" in torchvision's weight metadata, in units of 10^9 multiply-adds.
GIGAMACS = {"resnet18": 1.814, "resnet34": 3.664, "resnet50": 4.089, "resnet101": 7.801}


def on_meta(name: str, **options: int) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name, **options)


def small(name: str, **options: int) -> tuple[nn.Module, Tensor]:
    """A model and an input that is small, and not square where the model allows it."""
    if name == "deit_tiny":
        options["img_size"] = 32
    size = (32, 32) if name == "deit_tiny" else (70, 64)
    return zoo.create(name, **options), torch.randn(2, options.get("in_channels", 3), *size)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@pytest.fixture
def reference(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Builds the same network out of torchvision's or timm's code."""

    def build(name: str, **options: Any) -> nn.Module:
        if name in TIMM_NAMES:
            timm: ModuleType = request.getfixturevalue("timm")
            model: nn.Module = timm.create_model(TIMM_NAMES[name], pretrained=False, **options)
            return model
        torchvision_models: ModuleType = request.getfixturevalue("torchvision_models")
        if name == "resnet20":
            return cifar_resnet_of_torchvision_blocks(torchvision_models.resnet, **options)
        model = getattr(torchvision_models, name)(weights=None, **options)
        assert isinstance(model, nn.Module)
        return model

    return build


def cifar_resnet_of_torchvision_blocks(resnet: Any, num_classes: int = 10) -> nn.Module:
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(16)
    model.maxpool = nn.Identity()
    model.inplanes = 16
    model.layer1 = model._make_layer(resnet.BasicBlock, 16, 3)
    model.layer2 = model._make_layer(resnet.BasicBlock, 32, 3, stride=2)
    model.layer3 = model._make_layer(resnet.BasicBlock, 64, 3, stride=2)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(64, num_classes)
    assert isinstance(model, nn.Module)
    return model


@torch.no_grad()
def make_every_parameter_matter(model: nn.Module) -> None:
    """Move biases, norms, layer scales, tokens and running statistics off their neutral values."""
    for parameter in model.parameters():
        if parameter.squeeze().ndim <= 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)


def python(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# What the networks are


def test_the_zoo_holds_exactly_the_models_with_published_numbers() -> None:
    assert set(IMAGES) == set(PARAMS) == set(REFERENCED)
    for name in IMAGES:
        entry = zoo.MODELS[name]
        cifar = name == "resnet20"
        assert entry.name == name
        assert entry.input_size == ((3, 32, 32) if cifar else (3, 224, 224))
        assert entry.num_classes == (10 if cifar else 1000)
        assert entry.summary
        assert zoo.get(name) is entry


@pytest.mark.parametrize("name", IMAGES)
def test_parameters_are_the_published_number(name: str) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", IMAGES)
def test_macs_are_the_published_number_and_each_layer_runs_once(name: str) -> None:
    model = on_meta(name).eval()
    calls: Counter[nn.Module] = Counter()
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d | nn.Linear)
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        calls[module] += 1
        macs += module.weight.numel() * (output.numel() // output.shape[channels])

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        assert type(layer) in (nn.Conv2d, nn.Linear)
        layer.register_forward_hook(count)
    with torch.no_grad():
        out = model(torch.empty(1, *zoo.get(name).input_size, device="meta"))

    assert out.shape == (1, zoo.get(name).num_classes)
    assert len(layers) >= 20
    assert calls == Counter(layers)
    if name in MACS:
        assert macs == MACS[name]
    if name in GIGAMACS:
        assert round(macs / 1e9, 3) == GIGAMACS[name]
    assert name in MACS or name in GIGAMACS


@pytest.mark.parametrize("name", REFERENCED)
def test_state_dict_has_the_names_order_and_shapes_of_the_reference(
    name: str, reference: Callable[..., nn.Module]
) -> None:
    ours = shapes(on_meta(name))
    with torch.device("meta"):
        theirs = shapes(reference(name))
    if name == "convnext_tiny":
        assert set(ours) == set(theirs)
        pointwise = [key for key in ours if ours[key] != theirs[key]]
        assert len(pointwise) == 2 * (3 + 3 + 9 + 3)  # fc1 and fc2 of every block, nothing else
        assert all(key.endswith((".mlp.fc1.weight", ".mlp.fc2.weight")) for key in pointwise)
        assert all(ours[key] == (*theirs[key], 1, 1) for key in pointwise)
    else:
        assert ours == theirs
        assert [*ours] == [*theirs]


@pytest.mark.parametrize("name", REFERENCED)
def test_outputs_are_those_of_the_reference_with_the_same_weights(
    name: str, reference: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    ours, x = small(name, num_classes=7)
    theirs = reference(name, num_classes=7, **({"img_size": 32} if name == "deit_tiny" else {}))
    make_every_parameter_matter(theirs)
    x = x.double()
    ours.double().eval()
    theirs.double().eval()
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() > 1e-3  # fresh weights are other weights
        actual = zoo.load_weights(ours, theirs.state_dict())(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-6  # the images reach the output
    # 1e-9: double precision through a hundred layers; one wrong constant is far above it.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", IMAGES)
def test_training_reaches_every_parameter_with_other_channels_and_classes(name: str) -> None:
    model, x = small(name, in_channels=2, num_classes=5)
    out = model(x)
    assert out.shape == (2, 5)
    out.square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_channels_round_to_eights_but_never_lose_more_than_a_tenth() -> None:
    from kwsearch.zoo.mobilenetv2 import MobileNetV2

    with torch.device("meta"):
        model = MobileNetV2(0.35)
    # 0.35 * 32 = 11.2 would round to 8, more than 10 % too little, so it becomes 16.
    assert model.get_parameter("conv_stem.weight").shape[0] == 16
    assert model.get_parameter("conv_head.weight").shape[0] == 1280


# Fresh weights


@pytest.mark.parametrize(
    ("name", "parameter", "std"),
    [
        ("resnet18", "layer4.0.conv1.weight", (2 / (512 * 9)) ** 0.5),
        ("resnet18", "fc.weight", 0.01),
        ("resnet20", "layer3.0.conv2.weight", (2 / (64 * 9)) ** 0.5),
        ("mobilenetv2_050", "conv_head.weight", (2 / 1280) ** 0.5),
        ("mobilenetv2_050", "classifier.weight", 0.01),
        ("convnext_tiny", "stages.3.blocks.0.mlp.fc1.weight", 0.02),
        ("convnext_tiny", "head.fc.weight", 0.02),
        ("deit_tiny", "blocks.0.attn.qkv.weight", 0.02),
        ("deit_tiny", "pos_embed", 0.02),
    ],
)
def test_fresh_weights_have_the_spread_of_the_official_code(
    name: str, parameter: str, std: float
) -> None:
    torch.manual_seed(0)
    weight = zoo.create(name).get_parameter(parameter)
    assert weight.numel() >= 30_000  # so that 3 % is many standard errors
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("resnet20", "fc"),
        ("mobilenetv2_050", "classifier"),
        ("convnext_tiny", "head.fc"),
        ("deit_tiny", "head"),
    ],
)
def test_the_classifier_starts_without_bias(name: str, head: str) -> None:
    assert not zoo.create(name).get_parameter(f"{head}.bias").any()


def test_layer_scale_starts_at_a_millionth() -> None:
    gammas = [p for k, p in zoo.create("convnext_tiny").named_parameters() if k.endswith("gamma")]
    assert len(gammas) == 18
    assert all(torch.equal(gamma, torch.full_like(gamma, 1e-6)) for gamma in gammas)


# Cost of building


def test_importing_the_zoo_and_reading_it_does_not_import_torch() -> None:
    probe = "; import json, sys; print(json.dumps('torch' in sys.modules))"
    assert python("import kwsearch.zoo as zoo; zoo.get('resnet50')" + probe) is False
    # The probe does see torch where it is imported.
    assert python("import kwsearch.zoo as zoo; zoo.create('resnet20')" + probe) is True


def test_building_on_meta_allocates_nothing_and_imports_only_the_models() -> None:
    grown, devices = python(
        "import json, sys, torch, kwsearch.zoo as zoo\n"
        "before = set(sys.modules)\n"
        "with torch.device('meta'):\n"
        "    models = [zoo.create(name) for name in zoo.MODELS]\n"
        "grown = [name for name in sys.modules if name not in before]\n"
        "devices = {t.device.type for m in models for t in m.state_dict().values()}\n"
        "print(json.dumps([grown, sorted(devices)]))"
    )
    assert devices == ["meta"]
    assert "kwsearch.zoo.resnet" in grown
    # A random fill on meta would load hundreds of modules and take seconds.
    others = [name for name in grown if not name.startswith(("kwlayers", "kwsearch"))]
    assert len(others) < 20, others


# Wrong input


def test_an_unknown_name_is_answered_with_suggestions_and_the_list() -> None:
    with pytest.raises(zoo.UnknownModelError) as caught:
        zoo.get("resnet-50")
    message = str(caught.value)
    assert message.startswith("unknown model 'resnet-50': did you mean resnet50")
    assert all(name in message for name in zoo.MODELS)
    assert isinstance(caught.value, ValueError)


def test_a_name_like_no_other_gets_the_list_without_a_guess() -> None:
    with pytest.raises(zoo.UnknownModelError, match="unknown model 'xyz': the zoo has resnet18"):
        zoo.create("xyz")


def test_an_unknown_option_is_answered_with_the_options_of_that_model() -> None:
    with pytest.raises(
        TypeError,
        match=r"^resnet18 has no option 'img_size'; it accepts num_classes, in_channels$",
    ):
        zoo.create("resnet18", img_size=32)
    with pytest.raises(
        TypeError,
        match=r"^deit_tiny has no option 'classes'; it accepts num_classes, in_channels, img_size$",
    ):
        zoo.create("deit_tiny", classes=10)


@pytest.mark.parametrize("option", ["num_classes", "in_channels", "img_size"])
@pytest.mark.parametrize("value", [0, -1, "10", 2.0])
def test_options_must_be_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"^deit_tiny: {option} must be a positive integer, not {value!r}$"
    ):
        zoo.create("deit_tiny", **{option: value})


def test_an_image_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^img_size must be a multiple of 16, not 100; try 96$"):
        zoo.create("deit_tiny", img_size=100)


def test_deit_refuses_images_of_another_size_than_its_own() -> None:
    model = on_meta("deit_tiny", img_size=32)
    with pytest.raises(ValueError, match=r"takes 32x32 images, not 48x32; create it with another"):
        model(torch.empty(1, 3, 48, 32, device="meta"))


# Loading weights


def test_weights_that_do_not_fit_are_refused_in_one_message_and_nothing_is_copied() -> None:
    torch.manual_seed(0)
    model = zoo.create("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state: dict[str, Any] = dict(zoo.create("resnet20", num_classes=7).state_dict())
    del state["layer1.0.conv1.weight"]
    state["layer4.0.conv1.weight"] = torch.zeros(1)
    state["bn1.weight"] = [1.0] * 16

    with pytest.raises(ValueError, match="the weights do not fit the model") as caught:
        zoo.load_weights(model, state)
    message = str(caught.value)
    assert "missing (1): layer1.0.conv1.weight\n" in message
    assert "unexpected (1): layer4.0.conv1.weight\n" in message
    assert "mismatching (3): " in message
    assert "bn1.weight is a list instead of a tensor" in message
    assert "fc.weight (7, 64) instead of (10, 64)" in message
    assert "fc.bias (7,) instead of (10,)" in message
    assert "num_classes" in message.splitlines()[-1]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_long_list_of_problems_is_cut_after_ten() -> None:
    with pytest.raises(ValueError, match=r"missing \(107\): .*, and 97 more") as caught:
        zoo.load_weights(zoo.create("resnet20"), {})
    assert "unexpected" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_only_trailing_ones_are_forgiven() -> None:
    model = zoo.create("resnet20", num_classes=1)
    state = model.state_dict()
    state["fc.bias"] = torch.tensor(3.0)  # () for (1,)
    state["bn1.weight"] = torch.full((16, 1, 1), 2.0)
    zoo.load_weights(model, state)
    assert model.get_parameter("fc.bias").tolist() == [3.0]
    assert model.get_parameter("bn1.weight").tolist() == [2.0] * 16
    state["bn1.weight"] = torch.ones(1, 16)
    with pytest.raises(ValueError, match=r"bn1.weight \(1, 16\) instead of \(16,\)"):
        zoo.load_weights(model, state)


def test_checkpoints_from_before_batch_counters_load() -> None:
    model = zoo.create("resnet20")
    source = zoo.create("resnet20").state_dict()
    old = {key: value for key, value in source.items() if "num_batches_tracked" not in key}
    assert len(source) - len(old) == 21
    assert zoo.load_weights(model, old) is model
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_a_model_on_meta_is_told_how_to_get_memory_before_weights() -> None:
    model = on_meta("resnet20")
    state = zoo.create("resnet20").state_dict()
    with pytest.raises(ValueError, match=r"on the meta device .* model.to_empty\(device=\"cpu\"\)"):
        zoo.load_weights(model, state)
    zoo.load_weights(model.to_empty(device="cpu"), state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
