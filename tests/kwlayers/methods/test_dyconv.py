"""DY-Conv: the published counts, and what it reduces to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kwlayers.methods.dyconv import DYConv2d, DYLinear
from tests.kwlayers.methods.reference import (
    built_counts,
    oracle,
    published,
    settings,
    to_build,
    to_count,
)

_RESNET = "ResNet(partial(DynamicConvolution, {%s}), %s, [%s])"
_MOBILENET = "DyMobileNetV2(conv_layer=DynamicConvolution, width_multiplier=%s)"
PUBLISHED = [
    ("resnet10", "DyResNet10()  # nof_kernels=4, reduce=16", 4, 16),
    ("resnet34", "DyResNet34()  # nof_kernels=4, reduce=16", 4, 16),
    ("resnet18", _RESNET % ("'nof_kernels': 8", "BasicBlock", "2, 2, 2, 2"), 8, 16),
    ("resnet18", _RESNET % ("'nof_kernels': 4, 'reduce': 4", "BasicBlock", "2, 2, 2, 2"), 4, 4),
    ("resnet50", _RESNET % ("'nof_kernels': 2", "Bottleneck", "3, 4, 6, 3"), 2, 16),
    ("resnet101", _RESNET % ("'nof_kernels': 4", "Bottleneck", "3, 4, 23, 3"), 4, 16),
    ("mobilenetv2_1.0", _MOBILENET % "1.0", 4, 16),
    ("mobilenetv2_0.5", _MOBILENET % "0.5", 4, 16),
    ("mobilenetv2_0.35", _MOBILENET % "0.35", 4, 16),
]
# From the specification's digest, which the published code was run for, too.
DIGEST = [
    ("resnet18", 4, 16, 45_239_348, 1_814_150_592),
    ("resnet50", 4, 16, 97_138_424, 4_090_428_928),
]
CASES = [(name, k, q, *oracle("DY-Conv", made)) for name, made, k, q in PUBLISHED] + DIGEST


@pytest.mark.parametrize(("name", "kernels", "divisor", "params", "macs"), to_count(CASES))
def test_counts_are_those_of_the_published_code(
    name: str, kernels: int, divisor: int, params: int, macs: int
) -> None:
    plan = published(name, settings("dyconv", num_kernels=kernels, reduction=1 / divisor))
    cost = plan.cost()
    assert cost.params.total == params
    # It sums over kernels without a matrix product, which nobody counts; ours is one.
    assert cost.macs.total - cost.macs.mixing == macs


@pytest.mark.parametrize(("name", "kernels", "divisor", "params", "macs"), to_build(CASES))
def test_so_are_those_of_the_built_network(
    name: str, kernels: int, divisor: int, params: int, macs: int
) -> None:
    plan = published(name, settings("dyconv", num_kernels=kernels, reduction=1 / divisor))
    assert built_counts(name, plan) == (params, macs + plan.cost().macs.mixing)


@pytest.mark.parametrize(
    ("name", "mixing"),
    [("resnet18", 44_630_016), ("resnet50", 93_782_016), ("mobilenetv2_1.0", 8_755_584)],
)
def test_mixing_is_that_of_the_specification(name: str, mixing: int) -> None:
    assert published(name, settings("dyconv")).cost().macs.mixing == mixing


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_one_kernel_is_a_plain_convolution(groups: int) -> None:
    torch.manual_seed(0)
    layer = DYConv2d(8, 8, 3, 2, 1, groups=groups, num_kernels=1, dtype=torch.float64)
    torch.nn.init.normal_(layer.biases)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    expected = F.conv2d(x, layer.kernels[0], layer.biases[0], 2, 1, groups=groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_it_is_the_definition_sample_by_sample() -> None:
    torch.manual_seed(0)
    layer = DYConv2d(8, 6, 3, padding=1, groups=2, num_kernels=3, dtype=torch.float64)
    torch.nn.init.normal_(layer.biases)
    layer.attention.temperature.fill_(0.5)
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    fc1, fc2 = layer.attention.fc1, layer.attention.fc2
    for b in range(3):
        logits = fc2.weight @ torch.relu(fc1.weight @ x[b].mean((1, 2))) + fc2.bias
        alpha = torch.softmax(logits / 15.5, 0)  # half way from 30 to 1
        weight = sum(a * w for a, w in zip(alpha, layer.kernels, strict=True))
        bias = alpha @ layer.biases
        expected = F.conv2d(x[b : b + 1], weight, bias, padding=1, groups=2)
        torch.testing.assert_close(layer(x)[b : b + 1], expected, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_mixes_weights_by_entry_of_the_first_axis() -> None:
    torch.manual_seed(0)
    layer = DYLinear(6, 4, num_kernels=3, dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    alpha = layer.attention(x.transpose(1, 2))
    for b in range(2):
        weight = (alpha[b].view(3, 1, 1) * layer.kernels[..., 0]).sum(0)
        torch.testing.assert_close(layer(x)[b], x[b] @ weight.T, rtol=1e-12, atol=1e-12)
    assert layer(x[0, 0]).shape == (4,)


def test_attention_is_nearly_even_at_the_start_of_the_warm_up() -> None:
    torch.manual_seed(0)
    layer = DYConv2d(64, 8, 3, num_kernels=4)
    layer.attention.temperature.fill_(1)
    alpha = layer.attention(torch.randn(8, 64, 4, 4))
    assert (alpha - 0.25).abs().max() < 0.05
    assert math.isclose(alpha.sum().item(), 8, rel_tol=1e-5)
