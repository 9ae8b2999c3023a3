"""The static twin: the widest network of an architecture within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kwlayers.plan import PlanError
from kwsearch import zoo
from kwsearch.static_twin import NoTwin, static_twin
from tests.zoo import IMAGES

# What each architecture's width scales, from its paper's table of channels.
CHANNELS = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), (64, 128, 256, 512)),
    # Half of 16 ... 320 in eights: 8, 16, 16, 32, 48, 80, 160. The head's 1280 wait for width 2.
    "mobilenetv2_050": (16, 8, 32, 48, 80, 160),
    "mobilenetv2_100": (32, 16, 24, 64, 96, 160, 320),
    "convnext_tiny": (96, 192, 384, 768),
    "deit_tiny": (64,),
    "resnet20": (16, 32, 64),
}


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, width: float) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name, width=width)


def resnet20_params(a: int, b: int, c: int, classes: int = 10) -> int:
    """By hand, for stages of a, b and c channels; every convolution has a batch norm."""
    stem = 27 * a + 2 * a
    first = 6 * (9 * a * a + 2 * a)
    second = 9 * a * b + 5 * 9 * b * b + a * b + 7 * 2 * b  # six convolutions and a projection
    third = 9 * b * c + 5 * 9 * c * c + b * c + 7 * 2 * c
    return stem + first + second + third + c * classes + classes


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.4, 0.5, 0.73, 1, 2, 3.1])
def test_it_is_the_best_of_all_widths_of_resnet20(ratio: float) -> None:
    assert resnet20_params(16, 32, 64) == 272_474  # the published network
    budget = int(ratio * 272_474)
    # Channels round at k + 1/2: a width between each two such widths, for any stage.
    edges = sorted({(k + 0.5) / c for c in (16, 32, 64) for k in range(2 * c)})
    widths = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    fits = [
        size
        for width in widths
        if (size := resnet20_params(*(max(round(c * width), 1) for c in (16, 32, 64)))) <= budget
    ]
    twin = static_twin("resnet20", budget, (3, 32, 32), 10)
    assert len(widths) > 100
    assert twin.params == max(fits)
    assert params_of(twin.create()) == twin.params


def test_half_of_resnet20_by_hand() -> None:
    twin = static_twin("resnet20", 272_474 // 2, (3, 32, 32), 10)
    assert twin.params == resnet20_params(11, 23, 45) == 136_207
    # Stages at 32x32, 16x16 and 8x8; see the parameters above.
    macs = 1024 * (27 * 11 + 6 * 9 * 11**2)
    macs += 256 * (9 * 11 * 23 + 5 * 9 * 23**2 + 11 * 23)
    macs += 64 * (9 * 23 * 45 + 5 * 9 * 45**2 + 23 * 45) + 45 * 10
    assert twin.macs == macs


LARGE = ("resnet101", "mobilenetv2_100", "resnet34", "resnet50", "convnext_tiny")


def quick_or_slow(name: str, *more: float) -> object:
    """A case; of two models that are alike the larger one takes its time."""
    return pytest.param(name, *more, marks=pytest.mark.slow if name in LARGE else ())


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in IMAGES])
def test_the_budget_of_the_published_network_gives_that_network(name: str) -> None:
    with torch.device("meta"):
        published = params_of(zoo.create(name))
    entry = zoo.get(name)
    twin = static_twin(name, published, entry.input_size, entry.num_classes)
    assert (twin.width, twin.params) == (1.0, published)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *(quick_or_slow(name, 0.7) for name in IMAGES),
        ("mobilenetv2_100", 1.3),
        ("convnext_tiny", 2.0),
    ],
)
def test_it_keeps_the_budget_and_the_next_wider_one_does_not(name: str, ratio: float) -> None:
    assert set(CHANNELS) == set(IMAGES)
    entry = zoo.get(name)
    budget = int(ratio * params_of(on_meta(name, 1.0)))
    twin = static_twin(name, budget, entry.input_size, entry.num_classes)
    channels = CHANNELS[name]
    if name == "mobilenetv2_100" and twin.width > 1:
        channels = (*channels, 1280)
    wider = min((math.floor(c * twin.width + 0.5) + 0.5) / c for c in channels) + 1e-6
    assert params_of(on_meta(name, twin.width)) == twin.params <= budget
    assert params_of(on_meta(name, wider)) > budget


@pytest.mark.parametrize(
    "name",
    [quick_or_slow(n) for n in ("mobilenetv2_100", "convnext_tiny", "deit_tiny", "resnet50")],
)
def test_a_twin_takes_its_images_and_has_its_classes(name: str) -> None:
    twin = static_twin(name, 2_000_000, (1, 32, 32), 7)
    model = twin.create()
    assert params_of(model) == twin.params
    out = model(torch.randn(2, 1, 32, 32))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_budget_below_the_narrowest_network_has_no_twin() -> None:
    floor = resnet20_params(1, 1, 1)
    assert static_twin("resnet20", floor, (3, 32, 32), 10).params == floor
    message = (
        rf"^params {floor - 1}: below the narrowest static resnet20, which has {floor} "
        r"\(input 3x32x32, 10 classes\)$"
    )
    with pytest.raises(NoTwin, match=message):
        static_twin("resnet20", floor - 1, (3, 32, 32), 10)


def test_the_head_of_mobilenetv2_grows_but_does_not_shrink() -> None:
    def head(name: str, width: float) -> int:
        return on_meta(name, width).get_parameter("conv_head.weight").shape[0]

    assert head("mobilenetv2_100", 0.3) == 1280
    assert head("mobilenetv2_100", 1.4) == 1792  # as MobileNetV2 1.4 in the paper's code
    assert head("mobilenetv2_050", 1.9) == 1280
    assert head("mobilenetv2_050", 2.8) == 1792


@pytest.mark.parametrize("width", [0, -1.0, math.inf, math.nan])
def test_a_width_is_a_positive_number(width: float) -> None:
    with pytest.raises(ValueError, match=r"^resnet20: width must be a positive number, not "):
        zoo.create("resnet20", width=width)


def test_another_network_is_compared_with_as_it_is_or_not_at_all(
    own_code: Callable[[str], str],
) -> None:
    module = own_code(
        """
        from torch import nn

        def make(in_channels, num_classes=4):
            return nn.Sequential(nn.Flatten(), nn.Linear(9 * in_channels, num_classes))
        """
    )
    name = f"{module}:make"
    params = 9 * 2 * 5 + 5
    twin = static_twin(name, params, (2, 3, 3), 5, trust=True)
    assert (twin.width, twin.params, twin.macs) == (1.0, params, 9 * 2 * 5)
    assert params_of(twin.create()) == params
    assert static_twin(name, 10 * params, (2, 3, 3), 5, trust=True) == twin
    assert static_twin(name, params, (2, 3, 3), None, trust=True).params == 9 * 2 * 4 + 4
    message = (
        rf"^params {params - 1}: below those of {name}, {params}, and only networks of the zoo "
        "can be made narrower$"
    )
    with pytest.raises(NoTwin, match=message):
        static_twin(name, params - 1, (2, 3, 3), 5, trust=True)
    with pytest.raises(PlanError, match="--trust"):
        static_twin(name, params, (2, 3, 3), 5)
