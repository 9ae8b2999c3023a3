"""MN and DyMN: the published counts, names and outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kwlayers
from kwlayers import methods, plan_network, set_temperature_
from kwlayers.context import DyReLUB
from kwlayers.counter import MacCounter
from kwlayers.methods.dymn import ContextConv2d
from kwsearch import zoo
from kwsearch.networks import build_model, trace_model

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "data/published_audio_networks.json").read_text()
)["networks"]
# Measured with the published code on ten seconds (128 x 1000) and 527 classes: parameters, those
# with buffers, MACs of convolutions, linear layers and matrix products.
COUNTS = {
    "mn04": (983_599, 993_485, 110_643_072),
    "mn10": (4_876_831, 4_901_277, 541_078_208),
    "mn20": (17_909_287, 17_958_133, 2_059_375_488),
    "dymn04": (1_961_239, 1_972_124, 117_432_704),
    "dymn10": (10_548_479, 10_575_124, 581_672_832),
    "dymn20": (39_966_143, 40_019_252, 2_220_951_552),
    "dymn04_replace_se": (1_829_287, 1_839_821, 115_995_520),
    "dymn10_replace_se": (9_833_935, 9_859_909, 574_425_664),
}
PARAMS = {
    "mn01": 123_783,
    "mn02": 324_695,
    "mn05": 1_431_239,
    "mn30": 39_086_367,
    "mn40": 68_427_303,
}
# Parameters, and millions of MACs, of dymn10 without some of it.
WITHOUT = [
    (("no_dyrelu",), 8_396_959, 579.54),
    (("no_dyconv",), 6_692_327, 576.54),
    (("no_ca",), 10_548_479, 581.67),
    (("no_ca", "no_dyconv", "no_dyrelu"), 4_540_807, 574.40),
]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dymn04": ("dymn04", {}),
    "dymn04_replace_se": ("dymn04_replace_se", {}),
    "dymn04 with 3 pieces, 2 kernels, context_ratio 8": (
        "dymn04",
        {"relu_pieces": 3, "num_kernels": 2, "context_ratio": 8},
    ),
    "dymn04 without coordinate attention": ("dymn04", {"no_ca": True}),
    "mn04": ("mn04", {}),
}
AUDIO = [name for name, model in zoo.MODELS.items() if model.num_classes == 527]


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name, **options).eval()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: tuple[int, ...] = (1, 128, 1000)) -> int:
    with MacCounter() as counter, torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    return counter.macs


# Counts


def test_the_zoo_has_every_published_width() -> None:
    assert set(AUDIO) == set(COUNTS) | set(PARAMS)
    assert all(zoo.MODELS[name].input_size == (1, 128, 1000) for name in AUDIO)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_buffers_and_macs_are_the_published_code_s(name: str) -> None:
    model = on_meta(name)
    wanted, with_buffers, work = COUNTS[name]
    assert params(model) == wanted
    buffers = {key: b.numel() for key, b in model.named_buffers()}
    temperatures = [key for key in buffers if key.endswith("temperature")]
    dynamic = [m for m in model.modules() if isinstance(m, ContextConv2d)]
    # The published code forgets temperatures: the only buffers that it has not.
    assert len(temperatures) == len(dynamic)
    assert params(model) + sum(buffers.values()) - len(temperatures) == with_buffers
    assert macs(model) == work


@pytest.mark.parametrize("name", PARAMS)
def test_other_widths_have_the_published_parameters(name: str) -> None:
    assert params(on_meta(name)) == PARAMS[name]


@pytest.mark.parametrize(("flags", "wanted", "millions"), WITHOUT)
def test_without_a_part_counts_are_the_published_ablations(
    flags: tuple[str, ...], wanted: int, millions: float
) -> None:
    model = on_meta("dymn10", **dict.fromkeys(flags, True))
    assert params(model) == wanted
    assert round(macs(model) / 1e6, 2) == millions


def round_to_eights(value: float) -> int:
    nearest = max(8, int(value + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * value else nearest


@pytest.mark.parametrize(
    ("kernels", "pieces", "ratio", "classes", "size"),
    [(2, 3, 8, 10, (128, 1000)), (6, 2, 2, 50, (64, 250)), (4, 1, 4, 200, (40, 101))],
)
def test_counts_at_other_settings_are_those_of_the_closed_form(
    kernels: int, pieces: int, ratio: int, classes: int, size: tuple[int, int]
) -> None:
    model = on_meta(
        "dymn10",
        num_kernels=kernels,
        relu_pieces=pieces,
        context_ratio=ratio,
        num_classes=classes,
    )
    table = (
        (16, 3, 16, 16, 1), (16, 3, 64, 24, 2), (24, 3, 72, 24, 1), (24, 5, 72, 40, 2),
        (40, 5, 120, 40, 1), (40, 5, 120, 40, 1), (40, 3, 240, 80, 2), (80, 3, 200, 80, 1),
        (80, 3, 184, 80, 1), (80, 3, 184, 80, 1), (80, 3, 480, 112, 1), (112, 3, 672, 112, 1),
        (112, 5, 672, 160, 2), (160, 5, 960, 160, 1), (160, 5, 960, 160, 1),
    )  # fmt: skip
    bands, frames = (math.ceil(s / 2) for s in size)
    total = 9 * 16 + 2 * 16 + 160 * 960 + 2 * 960 + (960 + 1) * 1280 + (1280 + 1) * classes
    work = 9 * 16 * bands * frames + 960 * 1280 + 1280 * classes
    for c, k, e, o, s in table:
        h = min(max(round_to_eights(e // ratio), 32), 128)
        after = math.ceil(bands / s), math.ceil(frames / s)
        expands = e != c
        static = expands * c * e + k * k * e + e * o
        heads, joint = 2 + expands, bands + frames
        total += kernels * static + heads * kernels * (h + 1) + (h + 1) * 2 * pieces * e
        total += c * h + 2 * h + 2 * (h * e + e) + 2 * (expands * e + e + o)
        work += expands * c * e * bands * frames + (k * k * e + e * o) * math.prod(after)
        work += c * h * joint + h * e * sum(after)
        work += kernels * static + heads * h * kernels + 2 * pieces * h * e
        bands, frames = after
    work += 160 * 960 * bands * frames
    assert params(model) == total
    assert macs(model, (1, *size)) == work


# Names and outputs


def noise(shape: tuple[int, ...], number: int) -> Tensor:
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(n * 12.9898 + number * 78.233) * 43758.5453
    return (wave % 1 * 2 - 1).view(shape)


def published_weights(network: str, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a published network, without counters of batches.

    Where shapes are not recorded they are those of `model`.
    """
    recorded = PUBLISHED[network].get("parameters", PUBLISHED["dymn04"]["parameters"])
    own = model.state_dict()
    state = {}
    for number, line in enumerate(recorded):
        name, _, shape = line.partition(" ")
        sizes = tuple(map(int, shape.split("x")))
        if "parameters" not in PUBLISHED[network]:
            sizes = shape_of(name, own)
        value = noise(sizes, number)
        if len(sizes) == 1:
            value = 0.3 * value + name.endswith("weight")
        state[name] = value
    for name in own:
        if name.endswith("running_mean"):
            state[name] = torch.zeros_like(own[name])
        elif name.endswith("running_var"):
            state[name] = torch.ones_like(own[name])
    for name in PUBLISHED[network].get("constants", PUBLISHED["dymn04"]["constants"]):
        pieces = own[name].numel() // 2
        lambdas = [1.0] * pieces + [0.5] * pieces
        init_v = [1.0] + [0.0] * (2 * pieces - 1)
        state[name] = torch.tensor(lambdas if name.endswith("lambdas") else init_v)
    return state


def shape_of(name: str, own: dict[str, Tensor]) -> tuple[int, ...]:
    """Of the published tensor of that name."""
    kernels = own.get(name.replace("conv.weight", "conv.kernels"))
    if name not in own and kernels is not None:
        return (1, 1, len(kernels), kernels[0].numel())
    return tuple(own[name.replace("residuals.0", "attention.fc")].shape)


@pytest.mark.parametrize("network", [n for n in PUBLISHED if "parameters" in PUBLISHED[n]])
def test_published_checkpoints_load_and_nothing_of_them_is_left_out(network: str) -> None:
    name, options = SETTINGS[network]
    model = zoo.create(name, num_classes=7, **options).double()
    set_temperature_(model, 0.5)
    state = published_weights(network, model)
    assert zoo.load_weights(model, state) is model
    loaded = sum(p.numel() for p in state.values() if p.dim() != 0)
    own = {k: v for k, v in model.state_dict().items() if v.dim() != 0}
    assert loaded == sum(v.numel() for v in own.values())
    sums = sorted(round(float(v.double().square().sum()), 6) for v in state.values())
    assert sums == sorted(round(float(v.square().sum()), 6) for v in own.values())
    # Networks that were trained to the end have temperature 0.
    assert not any(v for k, v in model.state_dict().items() if k.endswith("temperature"))


@pytest.mark.parametrize("network", PUBLISHED)
def test_outputs_are_those_of_the_published_network(network: str) -> None:
    name, options = SETTINGS[network]
    model = zoo.create(name, num_classes=7, **options).double().train()
    zoo.load_weights(model, published_weights(network, model))
    model.get_submodule("classifier.4").eval()  # no dropout
    steps = torch.linspace(0.2, 2, 270, dtype=torch.float64).view(3, 1, 1, 90)
    x = noise((3, 1, 64, 90), 99) * steps
    expected = torch.tensor(PUBLISHED[network]["outputs"], dtype=torch.float64)
    assert (expected[0] - expected[1]).abs().max() > 1  # inputs matter
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-7)


def test_a_checkpoint_of_other_kernels_is_refused() -> None:
    model = zoo.create("dymn04", num_classes=7, num_kernels=2)
    with pytest.raises(ValueError, match=r"layers\.0\.depth_conv\.kernels \(1, 1, 4, 72\) instead"):
        zoo.load_weights(model, published_weights("dymn04", model))


# What the networks do


@pytest.mark.parametrize("name", ["mn01", "dymn04", "dymn04_replace_se"])
def test_training_reaches_every_parameter_at_other_sizes(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.create(name, num_classes=5, in_channels=2, width=0.5).train()
    out = model(torch.randn(3, 2, 20, 31))
    assert out.shape == (3, 5)
    out.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert model.embed(torch.randn(2, 2, 20, 31)).shape[0] == 2


def test_fresh_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    model = zoo.create("dymn10")
    block: Any = model.get_submodule("layers.13")
    assert isinstance(block.depth_act, DyReLUB)
    # Kaiming-normal, fan out: 5x5 depthwise kernels count 960 outputs, whatever their groups.
    assert float(block.depth_conv.kernels.detach().std()) == pytest.approx(
        math.sqrt(2 / (960 * 25)), rel=0.03
    )
    assert float(block.proj_conv.kernels.detach().std()) == pytest.approx(
        math.sqrt(2 / 160), rel=0.03
    )
    for layer in (block.depth_act.coef_net[0], block.proj_conv.attention.fc):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not layer.bias.any()


def test_flags_are_true_or_false_and_only_dymn_has_them() -> None:
    with pytest.raises(ValueError, match="dymn10: no_ca must be True or False, not 1"):
        zoo.create("dymn10", no_ca=1)
    with pytest.raises(TypeError, match="mn10 has no option 'no_ca'"):
        zoo.create("mn10", no_ca=True)
    with pytest.raises(ValueError, match="num_kernels must be a positive integer, not True"):
        zoo.create("dymn10", num_kernels=True)


# Plans


def test_by_name_its_convolutions_are_static_so_that_any_method_can_make_them_dynamic() -> None:
    network = trace_model("dymn10")
    assert network.params == 6_692_327
    plan = plan_network(network, methods.find("dymn").settings())
    cost = plan.cost()
    # The published network is DyMN's own method on it.
    assert (cost.params.total, cost.macs.total) == (10_548_479, 581_672_832)
    assert len(plan.groups) == 44


def test_dymn_s_own_plan_builds_the_published_network() -> None:
    size = (1, 64, 90)
    model = build_model("dymn04", size, 7)
    settings = methods.find("dymn").settings()
    plan = plan_network(kwlayers.trace(model, size), settings)
    made = kwlayers.convert_(model, plan).double().train()
    zoo.load_weights(made, published_weights("dymn04", made))
    other = zoo.create("dymn04", num_classes=7).double().train()
    zoo.load_weights(other, published_weights("dymn04", other))
    x = torch.randn(2, *size, dtype=torch.float64)
    made.get_submodule("classifier.4").eval()
    other.get_submodule("classifier.4").eval()
    torch.testing.assert_close(made(x), other(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kernel_warehouse", "odconv", "condconv"])
def test_other_methods_take_the_place_of_its_convolutions(name: str) -> None:
    size = (1, 32, 45)
    torch.manual_seed(0)
    model = build_model("dymn04", size, 7, 0.5)
    sized: dict[str, Any] = {"ratio": 1.0} if name == "kernel_warehouse" else {}
    plan = plan_network(kwlayers.trace(model, size), methods.find(name).settings(), **sized)
    layers = {layer for group in plan.groups for layer in group.layers}
    blocks = {layer for layer in layers if layer.startswith("layers.")}
    assert blocks
    assert all(layer.endswith(("exp_conv", "depth_conv", "proj_conv")) for layer in blocks)
    made = kwlayers.convert_(model, plan)
    assert params(made) == plan.cost().params.total
    made(torch.randn(2, *size)).sum().backward()


def test_a_network_with_its_own_dynamic_layers_is_not_planned() -> None:
    with pytest.raises(kwlayers.PlanError, match="already converted: it has dynamic layers"):
        kwlayers.trace(on_meta("dymn04"), (1, 128, 1000))
