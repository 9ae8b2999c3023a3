"""Stages inferred from what tracing saw, against the official ones and against small networks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kwlayers
from kwlayers import Network, PlanError, Settings, convert_, plan_network, trace
from kwlayers.families import recognise
from kwlayers.sharing import why_static
from kwlayers.stages import INFERRED, _infer, place
from kwsearch import zoo


def warehouses(found: Network, **settings: Any) -> dict[str, tuple[str, ...]]:
    plan = plan_network(found, Settings(**settings), ratio=1)
    return {group.name: group.layers for group in plan.groups}


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Block(nn.Module):
    """Two convolutions beside a shortcut, and squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, se: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None
        self.gate = nn.Conv2d(outputs, outputs, 1) if se else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x).relu())
        if self.gate is not None:
            out = out * self.gate(out.mean((2, 3), keepdim=True)).sigmoid()
        return out + (x if self.shortcut is None else self.shortcut(x))


def residual(se: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Sequential(Block(64, 64, se=se), Block(64, 64, se=se)),
        nn.Sequential(Block(64, 128, 2, se=se), Block(128, 128, se=se)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def test_the_first_layers_of_a_stage_belong_to_the_stage_that_they_read() -> None:
    found = trace(residual(), (3, 16, 16))
    assert place(found.sites).family == INFERRED
    assert warehouses(found) == {
        "stage0_conv": names("1.0.first 1.0.second 1.1.first 1.1.second 2.0.first 2.0.shortcut"),
        "stage1_conv": names("2.0.second 2.1.first 2.1.second"),
    }
    labels = place(found.sites).labels
    assert labels["0"].static == "the first convolution stays static"
    assert labels["5"].static == "the last layer stays static"


def test_a_shortcut_has_the_position_of_the_layer_beside_it() -> None:
    found = warehouses(trace(residual(), (3, 16, 16)), sharing="position")
    assert found == {
        "stage0_conv0": names("1.0.first 1.1.first 2.0.first 2.0.shortcut"),
        "stage0_conv1": names("1.0.second 1.1.second"),
        "stage1_conv1": names("2.0.second 2.1.second"),
        "stage1_conv0": names("2.1.first"),
    }


def test_layers_on_pooled_inputs_stay_static_even_where_all_maps_are_single_positions() -> None:
    for size in (16, 2):  # at 2 pixels the second stage works on 1 x 1
        found = trace(residual(se=True), (3, size, size))
        labels = place(found.sites).labels
        gates = {name: label.static for name, label in labels.items() if name.endswith("gate")}
        assert set(gates.values()) == {
            "its input is pooled to one position, as in squeeze-and-excitation"
        }
        assert len(gates) == 4


def test_convolutions_without_blocks_share_by_output_size_and_width() -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 128), (128, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if (inputs, outputs) == (64, 64) else []
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))
    # The third reads maps of half the size: nothing of the stage before.
    assert warehouses(trace(model, (3, 16, 16))) == {
        "stage0_conv": names("2"),
        "stage1_conv": names("5 7 9"),
    }


@pytest.mark.parametrize("rank", [1, 3])
def test_networks_of_signals_and_videos_have_stages_too(rank: int) -> None:
    conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    width = 128  # narrower, 27 mixtures a kernel would be too many to share

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.first = conv(inputs, outputs, 3, stride, 1)
            self.second = conv(outputs, outputs, 3, padding=1)
            self.shortcut = conv(inputs, outputs, 1, stride)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()) + self.shortcut(x)

    stages = [Residual(width, width, 1), Residual(width, 2 * width, 2)]
    model = nn.Sequential(
        conv(2, width, 3), *map(nn.Sequential, stages), nn.Flatten(2), nn.Linear(4**rank, 3)
    )
    found = trace(model, (2, *(10,) * rank))
    assert warehouses(found) == {
        "stage0_conv": names("1.0.first 1.0.second 1.0.shortcut 2.0.first 2.0.shortcut"),
        "stage1_conv": names("2.0.second"),
    }
    convert_(model, plan_network(found, Settings(), ratio=1))
    model(torch.randn(3, 2, *(10,) * rank)).sum().backward()
    assert all(p.grad is not None for p in model.kw_warehouses.parameters())


def test_a_convolution_over_a_single_channel_stays_static() -> None:
    class Gate(nn.Module):  # efficient channel attention: over the channels' means
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)
            self.gate = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x * self.gate(x.mean((2, 3))[:, None])[:, 0, :, None, None]

    found = trace(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Sequential(Gate(), Gate())), (3, 8, 8))
    assert warehouses(found) == {"stage0_conv": names("1.0.conv 1.1.conv")}
    label = place(found.sites).labels["1.0.gate"]
    assert label.static == "it has a single channel in and out"


def test_a_last_layer_that_cannot_be_converted_is_the_last_all_the_same() -> None:
    class Head(nn.Linear):
        pass

    layers = [nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    found = trace(nn.Sequential(*layers, Head(64, 5)), (3, 8, 8))
    assert warehouses(found) == {"stage0_conv": ("1",)}


def test_kinds_of_layers_in_one_place_of_a_block_have_warehouses_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plane = nn.Conv2d(32, 32, 3, padding=1)
            self.line = nn.Conv1d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.plane(x).flatten(2)).view(x.shape)

    found = trace(nn.Sequential(nn.Conv2d(3, 32, 1), nn.Sequential(Two(), Two())), (3, 8, 8))
    assert warehouses(found) == {
        "stage0_conv_conv2d": names("1.0.plane 1.1.plane"),
        "stage0_conv_conv1d": names("1.0.line 1.1.line"),
    }


def test_depthwise_grouped_and_other_convolutions_have_warehouses_of_their_own() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = nn.Conv2d(64, 64, 1)
            self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
            self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
            self.expand = nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.expand(self.grouped(self.depthwise(self.reduce(x))))

    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Sequential(Mixed(), Mixed()))
    assert warehouses(trace(model, (3, 8, 8))) == {
        "stage0_conv": names("1.0.reduce 1.0.expand 1.1.reduce 1.1.expand"),
        # 9 mixtures each: two of 64 numbers a cell would have attention of 16 * 19 * 18 weights.
        "stage0_dwconv": names("1.0.depthwise"),
        "stage0_gconv": names("1.0.grouped 1.1.grouped"),
        "stage0_dwconv_2": names("1.1.depthwise"),
    }


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.table = nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        v = v + self.table(torch.zeros(x.shape[1], 2, dtype=x.dtype, device=x.device))
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def test_parts_of_a_transformer_block_share_over_its_depth_and_tables_stay_static() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Sequential(*map(TransformerBlock, [32] * 3)))
    found = trace(model, (6, 8))
    assert warehouses(found) == {
        "0": ("0",),
        "stage0_attn": names(
            " ".join(f"1.{i}.attn.{n}" for i in range(3) for n in ("qkv", "proj"))
        ),
        "stage0_mlp": names(" ".join(f"1.{i}.mlp.{n}" for i in range(3) for n in (0, 1))),
    }
    label = place(found.sites).labels["1.0.attn.table"]
    assert label.static == "its input does not depend on the image"


def test_layers_whose_attention_would_outweigh_their_kernels_are_set_apart() -> None:
    # Dense layers: 3 x 3 from 24 to 8 channels, 1 x 1 from ever more channels.
    class Dense(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(inputs, 24, 1)
            self.three = nn.Conv2d(24, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, self.three(self.one(x))), 1)

    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Sequential(*(Dense(16 + 8 * i) for i in range(6)))
    )
    found = trace(model, (3, 8, 8))
    plan = plan_network(found, Settings(), ratio=1)
    assert sorted(n for g in plan.groups for n in g.layers) == sorted(
        site.name for site in found.sites if site.name != "0"
    )
    for group in plan.groups:
        kernels = [found[name].kernel[:2] for name in group.layers]
        if len(group.layers) > 1 and len(set(kernels)) > 1:
            cost = sum(16 * m * (group.num_cells + 1) for m in group.mixtures(plan.of(group)))
            assert cost <= sum(24 * 8 * 9 for _ in group.layers)
    one_warehouse = plan_network(found, Settings(sharing={"all": ["1.*"]}), ratio=1)
    assert plan.cost().params.attention < one_warehouse.cost().params.attention / 10


# The papers' backbones: what is inferred is what the official models have, but for their quirks.


def inferred(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with torch.device("meta"):
        found = trace(zoo.create(name), zoo.MODELS[name].input_size)
    official = recognise(found.sites)
    assert official is not None
    return _infer(found.sites), official.labels


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet20"])
def test_the_official_stages_and_positions_of_basic_resnets_are_inferred(name: str) -> None:
    found, official = inferred(name)
    for layer, label in official.items():
        assert bool(found[layer].static) == bool(label.static), layer
        if not label.static:
            place = (found[layer].stage, found[layer].kind, found[layer].position)
            assert place == (label.stage, label.kind, label.position), layer


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_bottleneck_resnets_differ_by_the_two_layers_that_read_the_stem(name: str) -> None:
    found, official = inferred(name)
    quirks = {
        layer
        for layer, label in official.items()
        if (found[layer].stage, bool(found[layer].static), found[layer].position)
        != (label.stage, bool(label.static), label.position)
    }
    assert quirks == {"layer1.0.conv1", "layer1.0.downsample.0"}


def test_convnext_and_deit_have_the_official_stages() -> None:
    found, official = inferred("convnext_tiny")
    for layer, label in official.items():
        if ".blocks." in layer:
            assert found[layer].stage == label.stage, layer
    found, official = inferred("deit_tiny")
    for layer, label in official.items():
        if not label.static:
            assert found[layer].stage == 0
            assert (found[layer].kind == "mlp") == (label.kind == "mlp")


# Other people's networks

FEW = ["resnext50_32x4d", "regnety_002", "mobilenetv3_small_050", "lcnet_050", "mixer_s32_224"]
MANY = names("""
    resnet18d seresnet50 resnest14d res2net50_26w_4s skresnet18 ecaresnet26t dpn68 dla34 tresnet_m
    regnetx_002 efficientnet_b0 tf_efficientnet_lite0 efficientnetv2_rw_t mobilenetv4_conv_small
    mnasnet_050 fbnetc_100 tinynet_e ghostnet_050 rexnet_100 hardcorenas_a densenet121
    inception_v3 inception_v4 xception41 cspdarknet53 darknet53 repvgg_a0 mobileone_s0 hgnet_tiny
    selecsls42b starnet_s1 convnextv2_atto inception_next_tiny poolformer_s12 convmixer_768_32
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 vit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 levit_128 pvt_v2_b0
    twins_svt_small coat_tiny crossvit_tiny_240 volo_d1_224 beit_base_patch16_224
    eva02_tiny_patch14_224 focalnet_tiny_srf davit_tiny gcvit_xxtiny maxvit_tiny_rw_224
    coatnet_nano_rw_224 mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1
    fastvit_t8 efficientvit_b0 efficientvit_m0 tiny_vit_5m_224 resmlp_12_224 gmlp_s16_224
    hrnet_w18_small nfnet_f0 vgg11_bn
""")


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MANY)])
def test_a_network_of_timm_is_planned_converted_trained_and_counted(
    timm: ModuleType, name: str
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = model.pretrained_cfg["input_size"]
    found = trace(model, size)
    plan = plan_network(found, Settings(), ratio=1)
    cost = plan.cost()
    static = sum(p.numel() for p in model.parameters())
    assert cost.params.total < 1.8 * static
    # The published form does the operations that torch counts.
    convert_(model, plan, backend="published")
    assert sum(p.numel() for p in model.parameters()) == cost.params.total
    model.requires_grad_(False).eval()
    # torch does not count its fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    model.requires_grad_(True)
    assert counter.get_total_flops() == 2 * cost.macs.total
    for parameter in model.parameters():
        if not parameter.any():  # some start as nothing, and would stop all gradients
            nn.init.normal_(parameter, std=0.1)
    out = model.train()(torch.randn(2, *size))
    (out[0] if isinstance(out, tuple) else out).square().mean().backward()
    for group in plan.groups:
        grad = model.kw_warehouses[group.name].cells.grad
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.any()
    why = why_static(found, Settings())
    dynamic = {layer for group in plan.groups for layer in group.layers}
    assert all(bool(why[site.name]) != (site.name in dynamic) for site in found.sites)


def test_a_network_of_subclasses_says_why_it_stays_static(timm: ModuleType) -> None:
    with torch.device("meta"):
        model = timm.create_model("nf_resnet26", num_classes=10)
    found = trace(model, (3, 64, 64))
    reasons = {site.fixed for site in found.sites if site.kind == "conv2d"}
    assert reasons == {"ScaledStdConv2d may compute something else from its weight"}
    with pytest.raises(PlanError, match="and 28 more stay static: ScaledStdConv2d may compute"):
        kwlayers.plan_model(model, (3, 64, 64), ratio=1)
