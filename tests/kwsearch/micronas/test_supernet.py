"""The supernet and the networks taken out of it: counts, padding, masks, and that they agree."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from kwsearch.micronas.mixture import equal, one_hot
from kwsearch.micronas.space import Architecture, Space, operators, params
from kwsearch.micronas.supernet import (
    Network,
    PrefixMask,
    Supernet,
    conv2d,
    extract,
    same,
    same_padding,
    supernet_params,
)
from tests.kwsearch.micronas.spaces import SKODA_R, TINY, UCI_HAR, random_mixture


def count(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(
    ("space", "published", "cells"), [(UCI_HAR, 256_850, 3), (SKODA_R, 687_470, 6)]
)
def test_parameters_are_the_published_ones_but_for_unused_norms(
    space: Space, published: int, cells: int
) -> None:
    assert supernet_params(space, as_published=True) == published
    assert supernet_params(space) == published - 128 * cells
    assert count(Supernet(space)) == published - 128 * cells


@pytest.mark.parametrize("space", [UCI_HAR, SKODA_R, TINY], ids=["uci_har", "skoda_r", "tiny"])
def test_networks_have_the_parameters_of_the_closed_form(space: Space) -> None:
    rng = random.Random(0)
    for one in (space.minimum(), space.maximum(), *(space.random(rng) for _ in range(5))):
        model = extract(space, one)
        assert count(model) == params(operators(space, one))
        assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    # As TensorFlow's documentation of "SAME" works them out.
    [(128, 3, 2, (0, 1)), (128, 7, 2, (2, 3)), (9, 3, 2, (1, 1)), (9, 9, 2, (4, 4)),
     (30, 2, 2, (0, 0)), (15, 2, 2, (0, 1)), (8, 8, 1, (3, 4)), (5, 1, 2, (0, 0))],
)  # fmt: skip
def test_padding_is_that_of_keras(
    size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    assert same_padding(size, kernel, stride) == padding


def slow_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Position by position: where the window leaves the input there is nothing."""
    _, _, height, width = x.shape
    out_height, out_width = (-(-n // s) for n, s in zip((height, width), conv.stride, strict=True))
    assert conv.bias is not None
    out = conv.bias[None, :, None, None].repeat(len(x), 1, out_height, out_width)
    pads = []
    for n, m, k, s in zip((height, width), (out_height, out_width), conv.kernel_size, conv.stride,
                          strict=True):  # fmt: skip
        pads.append(max((m - 1) * s + k - n, 0) // 2)
    for i in range(out_height):
        for j in range(out_width):
            for a in range(conv.kernel_size[0]):
                for b in range(conv.kernel_size[1]):
                    row = i * conv.stride[0] + a - pads[0]
                    column = j * conv.stride[1] + b - pads[1]
                    if 0 <= row < height and 0 <= column < width:
                        out[:, :, i, j] += x[:, :, row, column] @ conv.weight[:, :, a, b].T
    return out


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 1), (2, 1)), ((7, 1), (2, 1)), ((1, 5), (1, 2)), ((1, 2), (1, 2)), ((5, 1), (1, 1))],
)
@pytest.mark.parametrize("size", [(8, 5), (7, 4)])
def test_same_convolutions_are_the_definition(
    kernel: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = conv2d(3, 2, kernel, stride).double()
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, *size).double()
    torch.testing.assert_close(same(conv, x), slow_same(x, conv), rtol=1e-12, atol=1e-12)


def test_a_mask_is_the_first_channels_of_each_option() -> None:
    mask = PrefixMask((2, 4, 5))
    found = mask(torch.tensor([0.5, 0.3, 0.2]))[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1, 1, 0.5, 0.5, 0.2]))


@pytest.mark.parametrize("training", [True, False])
def test_masked_channels_are_zero(training: bool) -> None:
    torch.manual_seed(0)
    net = Supernet(TINY).train(training)
    for part in net.modules():  # norms that have been trained have biases
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.bias)
    seen: list[Tensor] = []
    for cell in net.cells.values():
        cell.register_forward_hook(lambda *args: seen.append(args[2]))
    net(torch.randn(4, 1, 6, 3), one_hot(TINY, TINY.minimum()))
    assert [out.shape[1] for out in seen] == [4, 8, 8]
    for out, width in zip(seen, (2, 4, 4), strict=True):
        assert out[:, :width].any()
        assert not out[:, width:].any()


def test_scores_are_of_each_window_by_itself() -> None:
    torch.manual_seed(0)
    net = Supernet(TINY).eval()
    x = torch.randn(5, 1, 6, 3)
    found = net(x, equal(TINY))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(found[2:3], net(x[2:3], equal(TINY)))
    assert found.min() < -1e-3  # also of one window: not zero, as over a batch


def taken(net: Supernet, space: Space, architecture: Architecture) -> Network:
    """The plain network with the supernet's weights, cut to its widths."""
    model = extract(space, architecture).double()
    for one in model.operators:
        if one.key.kind != "conv2d":
            continue
        cell, name = one.name.split(".")
        if cell == "head":
            conv = net.conv
        elif name == "conv":
            conv = net.cells[cell].convs[(3, 5, 7).index(one.key.kernel[0])].conv
        elif name.startswith("branch"):
            conv = net.cells[cell].branches[(3, 5, 7).index(int(name[-1]))].conv
        else:
            conv = getattr(net.cells[cell], name).conv
        mine = model.convs[one.name.replace(".", "_")]
        written, read = mine.weight.shape[:2]
        with torch.no_grad():
            mine.weight.copy_(conv.weight[:written, :read])
            mine.bias.copy_(conv.bias[:written])
    return model


def test_at_one_architecture_the_supernet_is_its_network() -> None:
    torch.manual_seed(0)
    space = Space(12, 7, 3, (2, 4), (4, 8), time_limit=3, sensor_limit=2)
    net = Supernet(space).double().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.0  # with mean 0 and variance 1: nothing
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.bias)
    x = torch.randn(3, 1, 12, 7).double()
    rng = random.Random(0)
    for _ in range(20):
        one = space.random(rng)
        plain = taken(net, space, one).eval()
        expected = torch.log_softmax(plain(x), 1)
        torch.testing.assert_close(net(x, one_hot(space, one)), expected, rtol=1e-9, atol=1e-9)


def test_a_networks_dropout_follows_every_cell_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = extract(TINY, TINY.maximum())
    assert model._last == {"time1.conv", "fusion1.add3", "fusion2.add3"}
    x = torch.randn(2, 1, 6, 3)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_every_decision_has_a_gradient() -> None:
    torch.manual_seed(0)
    net = Supernet(SKODA_R).double()
    mixture = {name: one.requires_grad_() for name, one in random_mixture(SKODA_R, 0).items()}
    loss = net(torch.randn(4, 1, 64, 30).double(), mixture)[:, 0].sum()
    grads = torch.autograd.grad(loss, list(mixture.values()))
    assert all(grad.max() > grad.min() for grad in grads)
