"""DCD: the published counts, its definition, and what it reduces to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import Plan, PlanError, Rule
from kwlayers.methods.dcd import DCDConv1d, DCDConv2d, DCDConv3d, DCDGroup, DCDLinear, latent_of
from kwlayers.plan import Network, Site
from kwlayers.planner import BudgetError, plan_network
from tests.kwlayers.methods.reference import (
    built_counts,
    converted,
    images,
    network,
    oracle,
    plan_of,
    published,
    settings,
    small,
    to_build,
)

_MOBILENET = "mobilenetv2_dcd(width_mult=%s, fc_squeeze=%d)"
PUBLISHED: list[tuple[str, int, int, int]] = [
    ("resnet101", 16, *oracle("DCD", "resnet101_dcd()")),
    ("mobilenetv2_0.75", 8, *oracle("DCD", _MOBILENET % ("0.75", 8))),
    ("mobilenetv2_0.75", 16, *oracle("DCD", _MOBILENET % ("0.75", 16))),
    ("mobilenetv2_0.35", 8, *oracle("DCD", _MOBILENET % ("0.35", 8))),
]
# From the specification's digest, which the published code was run for, too.
DIGEST = [
    ("resnet18", 16, 14_703_332, 1_883_045_531),
    ("resnet50", 16, 29_835_056, 4_372_631_098),
    ("mobilenetv2_1.0", 16, 5_720_028, 398_388_084),
    ("mobilenetv2_0.5", 16, 2_664_300, 131_834_676),
]
# PAD-Net's, with G and D of the convolutions twice: those have s * (L^2 + C_out) parameters, by
# hand. They cost no more MACs.
PADDED = [
    ("resnet10", *oracle("PAD DCD", "resnet10_dcd_pad()"), 564_608),
    ("resnet18", *oracle("PAD DCD", "resnet18_dcd_pad()"), 1_427_328),
    ("resnet34", *oracle("PAD DCD", "resnet34_dcd_pad()"), 2_820_736),
]


@pytest.mark.parametrize(("name", "fc_squeeze", "params", "macs"), [*PUBLISHED, *DIGEST])
def test_counts_are_those_of_the_published_code(
    name: str, fc_squeeze: int, params: int, macs: int
) -> None:
    plan = published(name, settings("dcd", fc_squeeze=fc_squeeze))
    cost = plan.cost()
    assert cost.params.total == params
    # lambda is no matrix product, which nobody counts.
    assert cost.macs.total - cost.macs.modulation == macs


@pytest.mark.parametrize(("name", "fc_squeeze", "params", "macs"), to_build([*PUBLISHED, *DIGEST]))
def test_so_are_those_of_the_built_network(
    name: str, fc_squeeze: int, params: int, macs: int
) -> None:
    plan = published(name, settings("dcd", fc_squeeze=fc_squeeze))
    assert built_counts(name, plan) == (params, macs)


@pytest.mark.parametrize(("name", "params", "macs", "twice"), PADDED)
def test_counts_are_those_of_pad_net_without_its_second_half(
    name: str, params: int, macs: int, twice: int
) -> None:
    cost = published(name, settings("dcd")).cost()
    assert cost.params.total == params - twice
    assert cost.macs.total - cost.macs.modulation == macs


def test_the_wider_attention_of_mobilenet_is_the_published_default() -> None:
    plan = published("mobilenetv2_1.0", settings("dcd", fc_squeeze=8))
    assert plan.cost().params.total == 7_452_088


def test_parts_of_a_layer_and_of_the_head_are_counted_by_hand() -> None:
    """64 -> 64, 3x3, L = 16, s = 16, m = 4 at 56 px; 512 -> 1000, L = s = 32."""
    first, *_, head = published("resnet18", settings("dcd")).cost_by_layer()[1:]
    kernels = 36_864 + 16 * (64 + 64)
    attention = 16 * 256 + 16 * 16 + 16 * 16**2 + 16 * 64
    assert (first.kernel_params, first.attention_params) == (kernels + 4 * 16, attention)
    assert (first.conv_macs, first.attention_macs) == ((kernels + 256) * 3136, attention)
    assert (first.modulation_macs, first.mixing_macs) == (64 * 3136, 0)
    kernels = 512_000 + 32 * (512 + 1000)
    attention = 32 * 512 + 1024 + 32_768 + 32 * 1000
    assert (head.kernel_params, head.attention_params) == (kernels + 128, attention)
    assert (head.conv_macs, head.attention_macs) == (kernels + 1024, attention)
    assert (head.modulation_macs, head.static_params) == (1000, 1000)


SIZES = [
    ("basic", 16, 32, 16, (8, 4, 4)),
    ("basic", 64, 64, 16, (16, 16, 4)),
    ("basic", 128, 256, 16, (22, 32, 4)),
    ("basic", 512, 512, 16, (45, 128, 4)),
    ("bottleneck", 3, 16, 16, (1, 4, 1)),
    ("bottleneck", 64, 256, 16, (8, 4, 1)),
    ("bottleneck", 2048, 512, 16, (45, 128, 1)),
    ("mobilenet", 16, 96, 16, (8, 4, 4)),
    ("mobilenet", 96, 24, 16, (12, 9, 1)),
    ("mobilenet", 24, 144, 16, (12, 9, 4)),
    ("mobilenet", 160, 960, 16, (20, 40, 4)),
    ("mobilenet", 960, 320, 16, (40, 100, 1)),
    ("mobilenet", 960, 320, 8, (40, 200, 1)),
    ("mobilenet", 24, 6, 16, (4, 4, 1)),
]


def conv_site(inputs: int, outputs: int, **own: Any) -> Site:
    return Site("a.conv", "conv2d", inputs, outputs, (3, 3), positions=64, **own)


@pytest.mark.parametrize(("variant", "inputs", "outputs", "divisor", "expected"), SIZES)
def test_sizes_of_the_variants_are_those_found_by_hand(
    variant: str, inputs: int, outputs: int, divisor: int, expected: tuple[int, int, int]
) -> None:
    site = conv_site(inputs, outputs)
    chosen = settings("dcd", variant=variant, fc_squeeze=divisor)
    group = chosen.group(Network((site,), 1, 1, (inputs, 8, 8)), "a", [site], chosen)
    assert (group.latent, group.squeeze, group.cells) == expected
    assert group.unit([site]) == group.latent == latent_of(variant, inputs, outputs)[0]
    resized = group.resized(5)
    assert (resized.latent, resized.squeeze, resized.cells) == (5, *expected[1:])
    assert resized.unit([site]) == group.latent


@pytest.mark.parametrize(
    ("name", "variant"),
    [("resnet18", "basic"), ("resnet50", "bottleneck"), ("mobilenetv2_0.5", "mobilenet")],
)
def test_the_variant_is_that_of_the_family(name: str, variant: str) -> None:
    *convolutions, head = published(name, settings("dcd")).groups
    assert {group.variant for group in convolutions} == {variant}
    assert (head.variant, head.latent, head.squeeze, head.cells) == ("classifier", 32, 32, 1)
    forced = published(name, settings("dcd", variant="bottleneck"))
    assert {group.variant for group in forced.groups} == {"bottleneck", "classifier"}


def layers_of(plan: Plan) -> set[str]:
    return {layer for group in plan.groups for layer in group.layers}


def test_default_layers_are_the_published_ones() -> None:
    resnet = layers_of(published("resnet18", settings("dcd")))
    stages, blocks, convs = (1, 2, 3, 4), (0, 1), (1, 2)
    expected = {f"layer{s}.{b}.conv{c}" for s, b, c in itertools.product(stages, blocks, convs)}
    assert resnet == expected | {"fc"}
    mobilenet = layers_of(published("mobilenetv2_1.0", settings("dcd")))
    depths = {1: 2, 2: 3, 3: 4, 4: 3, 5: 3, 6: 1}
    names = [f"blocks.{stage}.{block}" for stage, n in depths.items() for block in range(n)]
    expected = {f"{name}.{conv}" for name in names for conv in ("conv_pw", "conv_pwl")}
    assert mobilenet == expected | {"classifier"}
    elsewhere = plan_of(small(), settings("dcd"))
    assert layers_of(elsewhere) == {"blocks.0.conv1", "blocks.1.conv1", "head"}
    assert {group.variant for group in elsewhere.groups} == {"bottleneck", "classifier"}


def test_why_a_layer_stays_static_is_said() -> None:
    found = settings("dcd").why_static(network("mobilenetv2_1.0"))
    assert found["blocks.0.0.conv_pw"] == "the first block stays static"
    assert found["conv_head"] == "the last convolution stays static"
    assert "mix what groups keep apart" in found["blocks.1.0.conv_dw"]
    assert found["classifier"] == found["blocks.1.0.conv_pw"] == ""
    found = settings("dcd", classifier=False).why_static(network("resnet18"))
    assert found["fc"] == "the head stays static"
    assert found["layer2.0.downsample.0"] == "the shortcut stays static"


def test_torchvision_s_first_block_stays_static_too() -> None:
    depthwise: dict[str, Any] = {"kernel_size": (3, 3), "groups": 8}
    kinds: dict[str, dict[str, Any]] = {"features.0.0": {}, "features.1.conv.0.0": depthwise}
    kinds["features.1.conv.1"] = {}
    for block in range(2, 18):
        for layer, kind in (("0.0", {}), ("1.0", depthwise), ("2", {})):
            kinds[f"features.{block}.conv.{layer}"] = kind
    kinds |= {"features.18.0": {}, "classifier.1": {"kind": "linear", "kernel_size": (1,)}}
    pointwise: dict[str, Any] = {"kind": "conv2d", "kernel_size": (1, 1)}
    sites = tuple(
        Site(name=name, in_channels=8, out_channels=8, **{**pointwise, **kind})
        for name, kind in kinds.items()
    )
    found = settings("dcd").why_static(Network(sites, 1, 1, (3, 32, 32)))
    dynamic = {name for name, reason in found.items() if not reason}
    blocks = {f"features.{block}.conv.{layer}" for block in range(2, 18) for layer in ("0.0", "2")}
    assert dynamic == blocks | {"classifier.1"}
    assert found["features.1.conv.1"] == "the first block stays static"


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(27, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x.flatten(1)))
        return out


def test_linear_layers_but_the_head_are_dynamic_by_rule_only() -> None:
    (head,) = plan_of(Perceptron(), settings("dcd"), (3, 3, 3)).groups
    assert (head.layers, head.variant) == (("head",), "classifier")
    rule = Rule(["layers.2"], dynamic=True)
    for variant in ("auto", "basic"):
        plan = plan_of(Perceptron(), settings("dcd", rules=rule, variant=variant), (3, 3, 3))
        layer = plan.groups[0]
        assert (layer.latent, layer.squeeze, layer.cells) == (8, 4, 1)
    plan = plan_of(Perceptron(), settings("dcd", rules=rule, classifier=False), (3, 3, 3))
    assert layers_of(plan) == {"layers.2"}


def hs(t: Tensor) -> Tensor:
    return (t + 3).clamp(0, 6) / 3


def restless(layer: Any) -> Any:
    """Norms that are not the identity."""
    for norm in (layer.norm1, layer.norm2):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return layer


def normed(z: Tensor, norm: Any) -> Tensor:
    """z: (B, L, positions)."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = z.mean((0, 2)), z.var((0, 2), unbiased=False)
    unit = (z - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    return unit * norm.weight[:, None] + norm.bias[:, None]


def cells_by_hand(x: Tensor, cells: int) -> Tensor:
    """x: (B, C, *S) with even last sizes  out: (B, C * cells), the cells of a channel together."""
    if cells == 1:
        return x.flatten(2).mean(2)
    if x.dim() == 3:
        parts = x.chunk(4, dim=2)
    else:
        parts = tuple(half for row in x.chunk(2, dim=-2) for half in row.chunk(2, dim=-1))
    return torch.stack([part.flatten(2).mean(2) for part in parts], dim=2).flatten(1)


def definition(layer: Any, x: Tensor, seen: Tensor, conv: Any) -> Tensor:
    """conv: of the static kernel with a sample. seen: (B, C, *S'), what Q reads."""
    attention = layer.attention
    q, p = layer.q.weight.flatten(1), layer.p.weight.flatten(1)
    u = cells_by_hand(x, attention.cells) @ attention.fc.weight.T
    y = u * hs(u @ attention.gate.weight.T)
    z = normed(torch.stack([q @ sample.flatten(1) for sample in seen]), layer.norm1)
    latent = attention.latent
    mixed = []
    for b in range(len(x)):
        phi = (attention.phi.weight @ y[b]).view(latent, latent)
        mixed.append(phi @ z[b])
    fused = normed(torch.stack(mixed), layer.norm2) + z
    out = []
    for b in range(len(x)):
        static = conv(x[b : b + 1], layer.weight)[0]
        scale = hs(attention.scale.weight @ y[b]).view(-1, *(1,) * (static.dim() - 1))
        out.append(static * scale + (p @ fused[b]).view(static.shape))
    return torch.stack(out)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cells", [1, 4])
def test_it_is_the_definition_sample_by_sample(cells: int, training: bool) -> None:
    torch.manual_seed(0)
    layer = DCDConv2d(
        8, 6, 3, 2, 1, bias=False, latent=5, squeeze=3, cells=cells, dtype=torch.float64
    )
    restless(layer).train(training)
    x = torch.randn(3, 8, 8, 6, dtype=torch.float64)
    expected = definition(
        layer, x, x[..., ::2, ::2], lambda one, weight: F.conv2d(one, weight, None, 2, 1)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_it_is_the_definition_in_one_and_three_dimensions() -> None:
    torch.manual_seed(0)
    own: dict[str, Any] = {"bias": False, "latent": 2, "squeeze": 3, "dtype": torch.float64}
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    for cells in (1, 4):
        layer = restless(DCDConv1d(4, 6, 5, 1, 2, cells=cells, **own)).eval()
        expected = definition(layer, x, x, lambda one, w: F.conv1d(one, w, padding=2))
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64)
    for cells in (1, 4):
        volume = restless(DCDConv3d(4, 6, 1, cells=cells, **own)).eval()
        expected = definition(volume, x, x, F.conv3d)
        torch.testing.assert_close(volume(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_linear_layer_is_the_definition_over_tokens(training: bool) -> None:
    torch.manual_seed(0)
    layer = DCDLinear(6, 4, latent=3, squeeze=2, dtype=torch.float64)
    restless(layer).train(training)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    maps = x.transpose(1, 2)
    static = definition(layer, maps, maps, lambda one, weight: weight @ one)
    expected = static.transpose(1, 2) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    if not training:
        vectors = torch.cat([layer(one) for one in x[:, 0]]).view(3, 4)
        torch.testing.assert_close(layer(x[:, 0]), vectors, rtol=1e-12, atol=1e-12)


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 2},
    {"kernel_size": 3, "dilation": 2, "stride": 3, "padding": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 4, "dilation": 2, "padding": 3},
    {"kernel_size": (1, 5), "padding": "same"},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_without_phi_it_is_a_convolution_with_p_q_at_the_kernel_s_centre(
    geometry: dict[str, Any], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer = DCDConv2d(4, 6, **geometry, latent=3, squeeze=2, dtype=torch.float64).eval()
    nn.init.zeros_(layer.attention.phi.weight)
    nn.init.zeros_(layer.attention.scale.weight)
    nn.init.normal_(layer.bias)
    plain = nn.Conv2d(4, 6, **geometry, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
        rows, columns = ((k - 1) // 2 for k in plain.kernel_size)
        low_rank = layer.p.weight.flatten(1) @ layer.q.weight.flatten(1)
        plain.weight[:, :, rows, columns] += low_rank / (1 + layer.norm1.eps) ** 0.5
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_p_and_d_of_zero_leave_a_plain_layer(training: bool) -> None:
    torch.manual_seed(0)
    conv = restless(DCDConv2d(8, 6, 3, 2, 1, cells=4, dtype=torch.float64)).train(training)
    linear = restless(DCDLinear(8, 6, dtype=torch.float64)).train(training)
    for layer in (conv, linear):
        nn.init.normal_(layer.bias)
        nn.init.zeros_(layer.p.weight)
        nn.init.zeros_(layer.attention.scale.weight)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, None, 2, 1) + conv.bias.view(-1, 1, 1))
    y = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(linear(y), F.linear(y[:, None], linear.weight)[:, 0] + linear.bias)


def test_a_warm_start_is_exact_and_trains_p_and_d_from_there() -> None:
    model = small().eval()
    model.head.weight.requires_grad_(False)
    made = converted(model, settings("dcd"), warm_start=True).eval()
    x = images()
    torch.testing.assert_close(made(x), model(x), rtol=1e-12, atol=1e-12)
    made(x).square().sum().backward()
    for layer, static in (
        (made.blocks[0].conv1, model.blocks[0].conv1),
        (made.head, model.head),
    ):
        assert torch.equal(layer.weight, static.weight)
        assert layer.weight.requires_grad == static.weight.requires_grad
        assert layer.p.weight.grad.abs().sum() > 0
        assert layer.attention.scale.weight.grad.abs().sum() > 0
    assert set(made.kw_warehouses.warm_start.errors.values()) == {0.0}


def test_kernels_start_as_published() -> None:
    """Convolutions at N(0, 2 / (k^2 C_out)), linear layers as torch.nn's."""
    torch.manual_seed(0)
    layer = DCDConv2d(256, 128, 3, latent=64, squeeze=16)
    for kernel, variance in (
        (layer.weight, 2 / (9 * 128)),
        (layer.q.weight, 2 / 64),
        (layer.p.weight, 2 / 128),
        (layer.attention.fc.weight, 1 / (3 * 256)),
        (layer.attention.phi.weight, 1 / (3 * 16)),
    ):
        assert kernel.var().item() == pytest.approx(variance, rel=0.1)
    before = layer.weight.detach().clone()
    layer.norm1.running_mean.fill_(5)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert not layer.norm1.running_mean.any()
    linear = DCDLinear(256, 128, latent=64, squeeze=16)
    assert linear.weight.var().item() == pytest.approx(1 / (3 * 256), rel=0.1)


def test_a_layer_has_the_published_sizes_of_a_bottleneck_by_default() -> None:
    attention = DCDConv2d(256, 64, 3).attention
    assert (attention.latent, attention.fc.out_features, attention.cells) == (16, 16, 1)


def test_a_vector_alone_trains_with_running_statistics() -> None:
    torch.manual_seed(0)
    layer = restless(DCDLinear(8, 6, latent=3, squeeze=2))
    x = torch.randn(1, 8)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    layer.train()(torch.randn(1, 4, 8))  # four tokens have statistics of their own
    assert layer.norm1.num_batches_tracked == 1


@pytest.mark.parametrize(
    "layer", [DCDConv2d(4, 6, 3, cells=4), DCDLinear(4, 6)], ids=["conv", "linear"]
)
def test_an_empty_batch_stays_one(layer: nn.Module) -> None:
    x = torch.empty(0, 4, 8, 8) if isinstance(layer, DCDConv2d) else torch.empty(0, 4)
    assert layer.eval()(x).shape[:2] == (0, 6)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="groups 2: dcd takes no grouped convolution: its latent"):
        DCDConv2d(8, 8, 3, groups=2)
    with pytest.raises(PlanError, match=r"blocks\.0\.conv2 cannot be converted: dcd takes no"):
        plan_of(small(), settings("dcd", rules=Rule(["*.conv2"], dynamic=True)))
    grouped = Network((conv_site(8, 8, groups=2),), 1, 1, (8, 8, 8))
    with pytest.raises(PlanError, match=r"a\.conv: dcd takes no grouped"):
        Plan(grouped, (DCDGroup("a", ("a.conv",), 2, 4),))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="variant 'wide': allowed is 'auto' or 'basic' or 'bott"):
        settings("dcd", variant="wide")
    with pytest.raises(PlanError, match="fc_squeeze 0: allowed is a whole number at least 1"):
        settings("dcd", fc_squeeze=0)
    with pytest.raises(PlanError, match="classifier 'yes': allowed is true or false"):
        settings("dcd", classifier="yes")
    with pytest.raises(PlanError, match=r"reduction: of another method; by dcd there is ratio"):
        settings("dcd", rules=Rule(["*"], reduction=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": 0}, "latent is 0"),
        ({"squeeze": 0}, "squeeze 0: allowed is a whole number"),
        ({"cells": 2}, "cells 2: allowed are 1 and 4"),
        ({"cells": 1.0}, r"cells 1\.0: allowed is a whole number"),
        ({"variant": "wide"}, "variant 'wide': allowed is .*'classifier'"),
        ({"layers": ("blocks.0.conv1", "blocks.1.conv1")}, "2 layers: by dcd each has a group"),
        ({"layers": ("head",), "cells": 4}, "cells 4: a linear layer pools to 1"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {"name": "a", "layers": ("blocks.0.conv1",), "latent": 4, "squeeze": 4}
    traced = plan_of(small(), settings("dcd")).network
    assert Plan(traced, (DCDGroup(**good),)).groups[0].describe() == "L = 4"
    with pytest.raises(PlanError, match=message):
        Plan(traced, (DCDGroup(**{**good, **changes}),))


def test_layers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="latent 0: at least 1"):
        DCDConv2d(8, 8, 3, latent=0)
    with pytest.raises(ValueError, match="squeeze 0: at least 1"):
        DCDLinear(8, 8, squeeze=0)
    with pytest.raises(ValueError, match="cells 3: allowed are 1 and 4"):
        DCDConv2d(8, 8, 3, cells=3)
    with pytest.raises(ValueError, match="cells 4: a linear layer pools to 1"):
        DCDLinear(8, 8, cells=4)


def test_a_budget_scales_all_layers_alike() -> None:
    name, _, params, _ = DIGEST[0]
    exact = plan_network(network(name), settings("dcd"), params=params)
    assert exact.groups == published(name, settings("dcd")).groups
    half = plan_network(network(name), settings("dcd"), params=14_000_000)
    assert half.cost().params.total <= 14_000_000
    shares = [group.latent / group.unit(half.of(group)) for group in half.groups]
    assert max(shares) - min(shares) < 0.1
    assert max(shares) < 1


def test_what_a_budget_cannot_be_is_said() -> None:
    traced = network("resnet18")
    with pytest.raises(PlanError, match=r"ratio 0\.5: dcd has no ratio.* params or total_ratio"):
        plan_network(traced, settings("dcd"), ratio=0.5)
    # The static kernels stay.
    with pytest.raises(BudgetError, match="static kernels and one latent channel a layer"):
        plan_network(traced, settings("dcd"), params=11_000_000)
