"""ODConv: the published counts, and what it reduces to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kwlayers import convert_
from kwlayers.methods.condconv import CondConv2d
from kwlayers.methods.dyconv import DYConv2d
from kwlayers.methods.odconv import ODConv1d, ODConv2d
from kwlayers.methods.pad_net import PADConv2d
from tests.kwlayers.methods.reference import (
    built_counts,
    oracle,
    plan_of,
    published,
    settings,
    to_build,
    to_count,
)

PUBLISHED = [
    ("ODConv", "resnet18", "od_resnet18(reduction=0.0625, kernel_num=2)", 2),
    ("ODConv", "resnet18", "od_resnet18(reduction=0.0625, kernel_num=4)", 4),
    ("ODConv", "resnet50", "od_resnet50(reduction=0.0625, kernel_num=4)", 4),
    ("ODConv", "mobilenetv2_0.75", "od_mobilenetv2_075(reduction=0.0625, kernel_num=4)", 4),
    ("ODConv", "mobilenetv2_1.0", "od_mobilenetv2_100(reduction=0.0625, kernel_num=4)", 4),
    ("ODConv", "mobilenetv2_1.0", "od_mobilenetv2_100(reduction=0.0625, kernel_num=8)", 8),
    ("ODConv (PAD-Net copy)", "resnet10", "od_resnet10(kernel_num=4)", 4),
    ("ODConv (PAD-Net copy)", "resnet50", "od_resnet50(kernel_num=4)", 4),
]
# From the specification's digest, which the published code was run for, too.
DIGEST = [
    ("resnet18", 1, 11_943_944, 1_814_319_792),
    ("resnet50", 1, 28_635_112, 4_092_215_984),
    ("mobilenetv2_1.0", 1, 4_940_185, 302_181_232),
    ("mobilenetv2_0.5", 1, 2_425_537, 97_573_088),
    ("mobilenetv2_0.5", 4, 4_435_501, 97_576_736),
]
CASES = [(name, k, *oracle(method, made)) for method, name, made, k in PUBLISHED] + DIGEST


@pytest.mark.parametrize(("name", "kernels", "params", "macs"), to_count(CASES))
def test_counts_are_those_of_the_published_code(
    name: str, kernels: int, params: int, macs: int
) -> None:
    plan = published(name, settings("odconv", num_kernels=kernels))
    cost = plan.cost()
    assert cost.params.total == params
    # It sums over kernels without a matrix product, which nobody counts.
    assert cost.macs.total - cost.macs.mixing - cost.macs.modulation == macs


@pytest.mark.parametrize(("name", "kernels", "params", "macs"), to_build(CASES))
def test_so_are_those_of_the_built_network(name: str, kernels: int, params: int, macs: int) -> None:
    plan = published(name, settings("odconv", num_kernels=kernels))
    # Ours is one product for each layer of several kernels.
    weights = sum(plan.network[layer].weights for group in plan.groups for layer in group.layers)
    assert built_counts(name, plan) == (params, macs + (kernels * weights if kernels > 1 else 0))


@pytest.mark.parametrize(
    ("name", "kernels", "mixing", "modulation"),
    [
        ("resnet18", 1, 10_985_472, 3_186_176),
        ("resnet18", 4, 43_942_464, 3_186_176),
        ("resnet50", 1, 11_317_248, 17_712_128),
        ("resnet50", 4, 82_707_008, 17_712_128),
        ("mobilenetv2_1.0", 1, 64_224, 10_590_272),
        ("mobilenetv2_1.0", 4, 8_756_196, 10_590_272),
    ],
)
def test_mixing_and_modulation_are_those_of_the_specification(
    name: str, kernels: int, mixing: int, modulation: int
) -> None:
    macs = published(name, settings("odconv", num_kernels=kernels)).cost().macs
    assert (macs.mixing, macs.modulation) == (mixing, modulation)


def neutral(layer: nn.Module) -> None:
    """Every sigmoid at nearly 1, the softmax even."""
    attention = layer.attention
    nn.init.zeros_(attention.fc2.weight)
    nn.init.constant_(attention.fc2.bias, 60)


@pytest.mark.parametrize("kernels", [1, 3])
@pytest.mark.parametrize(
    ("size", "groups"), [(1, 1), (3, 1), (3, 2), (3, 8)], ids=["1x1", "3x3", "grouped", "depthwise"]
)
def test_neutral_attention_is_a_plain_convolution(kernels: int, size: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = ODConv2d(
        8, 8, size, 2, 1, groups=groups, num_kernels=kernels, dtype=torch.float64
    ).eval()
    neutral(layer)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    weight = layer.kernels.mean(0)
    expected = F.conv2d(x, weight, layer.bias, 2, 1, groups=groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("kernels", [1, 4])
def test_it_is_the_definition_sample_by_sample(groups: int, kernels: int) -> None:
    """a_c and a_f on the weights of each sample; column j of group q has a_c of q * C / g + j."""
    torch.manual_seed(0)
    layer = ODConv2d(8, 8, 3, groups=groups, num_kernels=kernels, bias=False, dtype=torch.float64)
    layer.eval()
    x = torch.randn(3, 8, 7, 7, dtype=torch.float64)
    seen = layer.attention(x)
    for b in range(3):
        weight = torch.zeros_like(layer.kernels[0])
        for k in range(kernels):
            mixed = layer.kernels[k] * (1 if seen.kernel is None else seen.kernel[b, k])
            weight += mixed * seen.position[b].view(3, 3)
        width = 8 // groups
        for o in range(8):
            first = o // (8 // groups) * width
            weight[o] *= seen.channel[b, first : first + width].view(-1, 1, 1)
            weight[o] *= 1 if seen.filter is None else seen.filter[b, o]
        expected = F.conv2d(x[b : b + 1], weight, groups=groups)
        torch.testing.assert_close(layer(x)[b : b + 1], expected, rtol=1e-12, atol=1e-12)


def test_attentions_that_a_layer_lacks_are_not_there() -> None:
    depthwise = ODConv2d(8, 8, 3, groups=8, num_kernels=2)
    assert depthwise.attention.heads == (8, 0, 9, 2)
    pointwise = ODConv2d(8, 4, 1, num_kernels=1)
    assert pointwise.attention.heads == (8, 4, 0, 0)
    assert ODConv1d(8, 4, 5, num_kernels=1).attention.heads == (8, 4, 5, 0)


def test_at_the_start_of_the_warm_up_attention_is_nearly_even() -> None:
    torch.manual_seed(0)
    layer = ODConv2d(16, 16, 3, num_kernels=4).eval()
    layer.attention.temperature.fill_(1)  # T = 30
    seen = layer.attention(torch.randn(8, 16, 6, 6))
    assert (seen.kernel - 0.25).abs().max() < 0.05
    assert (seen.channel - 0.5).abs().max() < 0.05
    z = layer.attention.fc2(
        F.relu(layer.attention.norm(layer.attention.fc1(torch.ones(1, 16, 2, 2).mean((2, 3)))))
    )
    cold = torch.sigmoid(z[:, :16] / 30)
    torch.testing.assert_close(layer.attention(torch.ones(1, 16, 2, 2)).channel, cold)


def test_a_layer_that_is_called_twice_is_counted_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.conv(self.conv(self.stem(x))).mean((2, 3)))
            return out

    model = Twice().eval()
    plan = plan_of(model, settings("odconv", num_kernels=3), (3, 6, 6))
    (group,) = plan.groups
    assert plan.of(group)[0].samples == 2
    convert_(model, plan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 6, 6))
    otherwise = sum(group.counted_otherwise(plan.of(group)).values())
    assert counter.get_total_flops() // 2 == plan.cost().macs.total + otherwise


@pytest.mark.parametrize("groups", [1, 8])
def test_kernels_start_as_published_whatever_the_groups(groups: int) -> None:
    """N(0, 2 / (k^2 * C_out))."""
    torch.manual_seed(0)
    for kind, own in ((ODConv2d, {}), (DYConv2d, {}), (CondConv2d, {}), (PADConv2d, {})):
        layer = kind(64, 128, 3, groups=groups, num_kernels=4, **own)
        parts = [layer.kernels, *([layer.static] if kind is PADConv2d else [])]
        for part in parts:
            assert part.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.03)
