"""Where the official models put each layer, spelt out by hand, under every library's names."""

from __future__ import annotations

import functools
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import kwlayers
from kwlayers import Network, Plan, Settings, Site, plan_network
from kwlayers.families import recognise
from kwlayers.stages import INFERRED, place
from kwsearch import zoo
from tests.zoo import IMAGES


def trace(model: nn.Module) -> Network:
    return kwlayers.trace(model, (3, 224, 224))


@functools.cache
def network(name: str) -> Network:
    with torch.device("meta"):
        model = zoo.create(name)
    return kwlayers.trace(model, zoo.MODELS[name].input_size)


@functools.cache
def timms(timm: ModuleType, name: str) -> Network:
    return trace(timm.create_model(name))


def groups(found: Network, sharing: str = "stage") -> dict[str, tuple[str, ...]]:
    plan = plan_network(found, Settings(sharing=sharing), ratio=1)
    return {group.name: group.layers for group in plan.groups}


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def static(found: Network) -> dict[str, str]:
    known = recognise(found.sites)
    assert known is not None
    return {name: label.static for name, label in known.labels.items() if label.static}


# ResNet: conv1 and downsample of a stage's first block belong to the stage before.


def test_resnet18_hands_the_first_layers_of_a_stage_to_the_stage_before() -> None:
    assert groups(network("resnet18")) == {
        "stage0_conv": names(
            "layer1.0.conv1 layer1.0.conv2 layer1.1.conv1 layer1.1.conv2 "
            "layer2.0.conv1 layer2.0.downsample.0"
        ),
        "stage1_conv": names(
            "layer2.0.conv2 layer2.1.conv1 layer2.1.conv2 layer3.0.conv1 layer3.0.downsample.0"
        ),
        "stage2_conv": names(
            "layer3.0.conv2 layer3.1.conv1 layer3.1.conv2 layer4.0.conv1 layer4.0.downsample.0"
        ),
        "stage3_conv": names("layer4.0.conv2 layer4.1.conv1 layer4.1.conv2"),
    }
    assert static(network("resnet18")) == {
        "conv1": "the stem stays static",
        "fc": "the head stays static",
    }


def test_resnet18_by_position_keeps_the_downsample_with_the_first_convolutions() -> None:
    found = groups(network("resnet18"), "position")
    assert found["stage0_conv0"] == names(
        "layer1.0.conv1 layer1.1.conv1 layer2.0.conv1 layer2.0.downsample.0"
    )
    assert found["stage0_conv1"] == names("layer1.0.conv2 layer1.1.conv2")
    assert found["stage3_conv0"] == names("layer4.1.conv1")
    assert found["stage3_conv1"] == names("layer4.0.conv2 layer4.1.conv2")
    assert len(found) == 8


def test_the_first_block_of_a_bottleneck_resnet_stays_partly_static() -> None:
    found = groups(network("resnet50"))
    assert found["stage0_conv"] == names(
        "layer1.0.conv2 layer1.0.conv3 "
        "layer1.1.conv1 layer1.1.conv2 layer1.1.conv3 "
        "layer1.2.conv1 layer1.2.conv2 layer1.2.conv3 "
        "layer2.0.conv1 layer2.0.downsample.0"
    )
    assert found["stage3_conv"] == names(
        "layer4.0.conv2 layer4.0.conv3 "
        "layer4.1.conv1 layer4.1.conv2 layer4.1.conv3 "
        "layer4.2.conv1 layer4.2.conv2 layer4.2.conv3"
    )
    assert static(network("resnet50")) == {
        "conv1": "the stem stays static",
        "layer1.0.conv1": "no stage before the first to share with",
        "layer1.0.downsample.0": "no stage before the first to share with",
        "fc": "the head stays static",
    }


def test_resnet50_by_position_has_three_warehouses_per_stage() -> None:
    found = groups(network("resnet50"), "position")
    assert found["stage0_conv0"] == names(
        "layer1.1.conv1 layer1.2.conv1 layer2.0.conv1 layer2.0.downsample.0"
    )
    assert found["stage0_conv1"] == names("layer1.0.conv2 layer1.1.conv2 layer1.2.conv2")
    assert found["stage0_conv2"] == names("layer1.0.conv3 layer1.1.conv3 layer1.2.conv3")
    assert len(found) == 12


def test_by_layer_the_static_layers_of_a_bottleneck_resnet_stay_static() -> None:
    found = groups(network("resnet50"), "layer")
    assert "layer1_0_conv1" not in found
    assert "layer1_0_downsample_0" not in found
    assert found["layer2_0_downsample_0"] == names("layer2.0.downsample.0")


def test_a_cifar_resnet_is_a_resnet_of_three_stages() -> None:
    found = groups(network("resnet20"))
    assert list(found) == ["stage0_conv", "stage1_conv", "stage2_conv"]
    assert found["stage2_conv"][:2] == names("layer3.0.conv2 layer3.1.conv1")
    assert found["stage1_conv"][-2:] == names("layer3.0.conv1 layer3.0.downsample.0")


# MobileNetV2: the first block after a change of stage belongs, whole, to the stage before.


def test_mobilenetv2_follows_the_official_stages_of_its_block_groups() -> None:
    found = groups(network("mobilenetv2_100"))
    assert found["stem"] == ("conv_stem",)
    # The first block's conv_pw projects; it has no expansion.
    assert found["stage1_dwconv"] == names("blocks.0.0.conv_dw blocks.1.0.conv_dw")
    assert found["stage1_pwconv"] == names(
        "blocks.0.0.conv_pw blocks.1.0.conv_pw blocks.1.0.conv_pwl"
    )
    assert found["stage2_dwconv"] == names("blocks.1.1.conv_dw blocks.2.0.conv_dw")
    assert found["stage5_pwconv"] == names(
        "blocks.4.1.conv_pw blocks.4.1.conv_pwl blocks.4.2.conv_pw blocks.4.2.conv_pwl "
        "blocks.5.0.conv_pw blocks.5.0.conv_pwl"
    )
    # Groups 5 and 6 are both stage 6, which also takes the last 1x1 convolution.
    assert found["stage6_dwconv"] == names(
        "blocks.5.1.conv_dw blocks.5.2.conv_dw blocks.6.0.conv_dw"
    )
    assert found["stage6_pwconv"] == names(
        "blocks.5.1.conv_pw blocks.5.1.conv_pwl blocks.5.2.conv_pw blocks.5.2.conv_pwl "
        "blocks.6.0.conv_pw blocks.6.0.conv_pwl conv_head"
    )
    assert len(found) == 13
    assert static(network("mobilenetv2_100")) == {"classifier": "the head stays static"}


def test_mobilenetv2_by_position_separates_expanding_from_projecting() -> None:
    found = groups(network("mobilenetv2_100"), "position")
    assert found["stage1_pwconv0"] == ("blocks.1.0.conv_pw",)
    assert found["stage1_pwconv1"] == names("blocks.0.0.conv_pw blocks.1.0.conv_pwl")
    assert found["stage6_pwconv1"] == names(
        "blocks.5.1.conv_pwl blocks.5.2.conv_pwl blocks.6.0.conv_pwl conv_head"
    )


# ConvNeXt and DeiT


def test_convnext_has_warehouses_of_their_own_for_stem_and_downsamples() -> None:
    found = groups(network("convnext_tiny"))
    assert found["stem"] == ("stem.0",)
    for stage in (1, 2, 3):
        assert found[f"downsample{stage}"] == (f"stages.{stage}.downsample.1",)
    assert found["stage0_dwconv"] == tuple(f"stages.0.blocks.{i}.conv_dw" for i in range(3))
    assert found["stage0_pwconv"] == tuple(
        f"stages.0.blocks.{i}.mlp.fc{k}" for i in range(3) for k in (1, 2)
    )
    assert len(found["stage2_pwconv"]) == 18
    assert len(found) == 12
    assert static(network("convnext_tiny")) == {"head.fc": "the head stays static"}
    assert groups(network("convnext_tiny"), "position")["stage0_pwconv2"] == tuple(
        f"stages.0.blocks.{i}.mlp.fc2" for i in range(3)
    )


def test_deit_shares_one_warehouse_among_attentions_and_one_among_mlps() -> None:
    found = network("deit_tiny")
    assert groups(found) == {
        "stage0_attention": tuple(
            f"blocks.{i}.attn.{part}" for i in range(12) for part in ("qkv", "proj")
        ),
        "stage0_mlp": tuple(f"blocks.{i}.mlp.{part}" for i in range(12) for part in ("fc1", "fc2")),
    }
    assert list(groups(found, "position")) == [
        "stage0_attention0",
        "stage0_attention1",
        "stage0_mlp0",
        "stage0_mlp1",
    ]
    assert static(found) == {
        "patch_embed.proj": "the patch embedding stays static",
        "head": "the head stays static",
    }


# Other libraries' names


def shapes(found: Network, sharing: str) -> list[tuple[Any, ...]]:
    """What a plan's warehouses are, without their names; a linear layer as a 1x1 convolution."""
    plan: Plan = plan_network(found, Settings(sharing=sharing), ratio=1)
    return [
        ((*group.cell, 1)[:4], group.num_cells, len(group.layers), group.mixtures(plan.of(group)))
        for group in plan.groups
    ]


def build(library: Any, name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(library, name)(**options)
    return model


@pytest.mark.parametrize("sharing", ["stage", "position", "layer"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("mobilenetv2_100", "mobilenet_v2"),
        ("convnext_tiny", "convnext_tiny"),
    ],
)
def test_torchvisions_names_give_the_same_warehouses(
    torchvision_models: ModuleType, ours: str, theirs: str, sharing: str
) -> None:
    found = trace(build(torchvision_models, theirs))
    assert shapes(found, sharing) == shapes(network(ours), sharing)


@pytest.mark.parametrize("sharing", ["stage", "position", "layer"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("mobilenetv2_050", "mobilenetv2_050"),
        ("mobilenetv2_100", "mobilenetv2_100"),
        ("convnext_tiny", "convnext_tiny"),
        ("deit_tiny", "deit_tiny_patch16_224"),
    ],
)
def test_timms_names_give_the_same_warehouses(
    timm: ModuleType, ours: str, theirs: str, sharing: str
) -> None:
    found = timms(timm, theirs)
    assert shapes(found, sharing) == shapes(network(ours), sharing)


def test_timms_convnext_has_linear_layers_where_ours_has_1x1_convolutions(timm: ModuleType) -> None:
    found = timms(timm, "convnext_tiny")
    plan = plan_network(found, Settings(), ratio=1)
    cells = {group.name: group.cell for group in plan.groups}
    assert cells["stage0_pwconv"] == (96, 96, 1)
    assert cells["stage0_dwconv"] == (96, 1, 1, 1)
    ours = plan_network(network("convnext_tiny"), Settings(), ratio=1)
    assert {g.name: g.cell for g in ours.groups}["stage0_pwconv"] == (96, 96, 1, 1)
    assert plan.cost().params == ours.cost().params


def test_torchvisions_convnext_blocks_are_numbered_over_all_features(
    torchvision_models: ModuleType,
) -> None:
    found = groups(trace(build(torchvision_models, "convnext_tiny")))
    assert found["stage1_dwconv"] == tuple(f"features.3.{i}.block.0" for i in range(3))
    assert found["stage3_pwconv"] == tuple(
        f"features.7.{i}.block.{k}" for i in range(3) for k in (3, 5)
    )


def test_torchvisions_mobilenetv2_blocks_are_numbered_through(
    torchvision_models: ModuleType,
) -> None:
    found = groups(trace(build(torchvision_models, "mobilenet_v2")))
    assert found["stage1_dwconv"] == names("features.1.conv.0.0 features.2.conv.1.0")
    assert found["stage1_pwconv"] == names(
        "features.1.conv.1 features.2.conv.0.0 features.2.conv.2"
    )
    # Block groups of 1, 2, 3, 4, 3, 3, 1: the third begins with features.4, the sixth
    # (features.14) hands its first block to stage 5.
    assert found["stage2_dwconv"] == names("features.3.conv.1.0 features.4.conv.1.0")
    assert found["stage6_pwconv"] == names(
        "features.15.conv.0.0 features.15.conv.2 features.16.conv.0.0 features.16.conv.2 "
        "features.17.conv.0.0 features.17.conv.2 features.18.0"
    )


def test_torchvisions_vision_transformer_shares_its_mlps_and_keeps_its_attention(
    torchvision_models: ModuleType,
) -> None:
    found = trace(build(torchvision_models, "vit_b_16"))
    assert list(groups(found)) == ["stage0_mlp"]
    assert groups(found)["stage0_mlp"] == tuple(
        f"encoder.layers.encoder_layer_{i}.mlp.{k}" for i in range(12) for k in (0, 3)
    )


# Look-alikes


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0",
        "mnasnet_100",
        "mobilenetv2_110d",
        "mobilenetv3_large_100",
        "seresnet50",
        "resnext50_32x4d",
        "eva02_tiny_patch14_224",
        "resnet50d",
        "swin_tiny_patch4_window7_224",
        "mixer_s16_224",
    ],
)
def test_a_network_that_only_borrows_a_familys_names_is_not_recognised(
    timm: ModuleType, name: str
) -> None:
    model = timm.create_model(name)
    found = kwlayers.trace(model, model.pretrained_cfg["input_size"])
    assert recognise(found.sites) is None
    assert place(found.sites).family == INFERRED


def sites_of(text: str, **changes: Any) -> list[Site]:
    return [Site(name, "conv2d", 8, 8, (3, 3), **changes) for name in text.split()]


def test_a_resnet_with_one_layer_more_is_not_recognised() -> None:
    known = "conv1 layer1.0.conv1 layer1.0.conv2 fc"
    assert recognise(sites_of(known)) is not None
    assert recognise(sites_of(known + " layer1.0.se.fc1")) is None


def test_a_network_of_stem_and_head_alone_is_no_family() -> None:
    assert recognise(sites_of("conv1 fc")) is None
    assert recognise([]) is None


def test_every_model_of_the_zoo_is_of_a_family() -> None:
    families = Counter(recognise(network(name).sites).family.split()[0] for name in IMAGES)  # type: ignore[union-attr]
    assert families == {"resnet": 5, "mobilenetv2": 2, "convnext": 1, "vit": 1}
