"""What the tests of all methods compare with: counted integers, small networks, a plain loop."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kwlayers import Plan, convert_, methods, trace
from kwlayers.context import ContextBlock, ContextGenerator, DyReLUB
from kwlayers.dynamic import DynamicLayer
from kwlayers.layout import MethodSettings
from kwlayers.rules import NothingToConvert
from kwsearch.zoo.mobilenetv2 import MobileNetV2
from kwsearch.zoo.resnet import BasicBlock, Bottleneck, ResNet

# Counted by building the published implementations: parameters, and MACs of convolutions, linear
# layers and matrix products of one image at 224 px.
_DATA = json.loads((Path(__file__).parents[2] / "data" / "dynamic_convs.json").read_text())
ENTRIES = _DATA["entries"]
# Which of them tests have asked for.
ASKED: set[tuple[str, str]] = set()


def oracle(method: str, constructor: str) -> tuple[int, int]:
    """Parameters and MACs of a published construction. To be called when a module is imported."""
    (found,) = {
        (entry["params"], entry["macs_conv_linear_matmul_224"])
        for entry in ENTRIES
        if (entry["method"], entry["constructor"]) == (method, constructor)
    }
    ASKED.add((method, constructor))
    return found


_BACKBONES: dict[str, Any] = {
    "resnet10": lambda: ResNet(BasicBlock, (1, 1, 1, 1)),
    "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": lambda: ResNet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    **{
        f"mobilenetv2_{width}": functools.partial(MobileNetV2, width)
        for width in (0.35, 0.5, 0.75, 1.0)
    },
}


def backbone(name: str) -> nn.Module:
    """On `meta`."""
    with torch.device("meta"):
        model: nn.Module = _BACKBONES[name]()
    return model


@functools.cache
def network(name: str) -> Any:
    return trace(backbone(name), (3, 224, 224))


def published(name: str, settings: MethodSettings) -> Plan:
    """The plan of settings at their own sizes."""
    layout = settings.lay_out(network(name))
    return Plan(layout.network, layout.groups, layout.notes)


def settings(method: str, **changes: Any) -> Any:
    return methods.find(method).settings(**changes)


def for_small(method: str, **changes: Any) -> Any:
    """Settings by which the small network has dynamic layers, narrow as they are."""
    narrow = {"min_channels": 16} if "min_channels" in methods.find(method).settings().names else {}
    return settings(method, **narrow, **changes)


def to_count(cases: Iterable[Any]) -> list[Any]:
    """Cases of which those of the deepest backbones are slow, where others are like them."""
    deep = ("resnet50", "resnet101", "resnet34")
    return [
        pytest.param(*case, marks=pytest.mark.slow if case[0] in deep else ())
        for case in map(tuple, cases)
    ]


def to_build(cases: Iterable[Any], name: int = 0) -> list[Any]:
    """Cases of which those of large backbones are slow. name: where a case has the backbone's."""
    return [
        pytest.param(*case, marks=() if case[name] in _QUICK else pytest.mark.slow)
        for case in map(tuple, cases)
    ]


_QUICK = ("resnet10", "mobilenetv2_0.35", "mobilenetv2_0.5")


def built_counts(name: str, plan: Plan) -> tuple[int, int]:
    """Parameters of the converted backbone, and the MACs that torch counts in one forward."""
    model = convert_(backbone(name), plan).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


class Small(nn.Module):
    """A stem, two residual blocks with a shortcut, a depthwise and a grouped layer, a head.

    alike: three more blocks that are alike, without the grouped layer.
    """

    def __init__(self, alike: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        more = [_Block(32, 32, 1, 1) for _ in range(3 * alike)]
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2), *more)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=2, dilation=2, groups=out, bias=False)
        self.conv3 = nn.Conv2d(out, out, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn3(self.conv3(self.conv2(y))) + self.shortcut(x))


class _SteeredBlock(ContextBlock):
    """`_Block` with a context that any of its convolutions may take, and a Dy-ReLU."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.context_size = 8
        plain = _Block(channels, out, stride)
        for name, child in plain.named_children():
            self.add_module(name, child)
        self.context_gen = ContextGenerator(channels, 8, out, stride)
        self.act = DyReLUB(out, 8)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context_gen(x)
        y = torch.relu(self.bn1(self.convolve(self.conv1, x, context)))
        y = self.act(self.convolve(self.conv2, y, context), context.vector, context.gates)
        y = self.bn3(self.convolve(self.conv3, y, context))
        return torch.relu(y + self.convolve(self.shortcut, x, context))


class SmallSteered(Small):
    """`Small`, with a context in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_SteeredBlock(16, 16, 1), _SteeredBlock(16, 32, 2))


def small(method: str = "", double: bool = True) -> nn.Module:
    """A network in which the method makes something dynamic."""
    # Some want blocks that are alike, some a context.
    for make in (Small, functools.partial(Small, alike=True), SmallSteered):
        model = _small(make, double)
        try:
            if method:
                plan_of(model, for_small(method))
        except NothingToConvert:
            continue
        return model
    raise AssertionError(f"{method} makes nothing dynamic")


def _small(make: Callable[[], nn.Module], double: bool) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # no norm that is the identity
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double() if double else model


def plan_of(model: nn.Module, settings: MethodSettings, size: Sequence[int] = (3, 12, 12)) -> Plan:
    layout = settings.lay_out(trace(model, size))
    return Plan(layout.network, layout.groups, layout.notes)


def converted(model: nn.Module, settings: MethodSettings, **how: Any) -> nn.Module:
    """A converted copy; restless without a warm start."""
    torch.manual_seed(1)
    made = convert_(copy.deepcopy(model), plan_of(model, settings), **how)
    return made if how.get("warm_start") else restless(made)


@torch.no_grad()
def restless(model: nn.Module) -> nn.Module:
    """With nothing in dynamic layers that is neutral: heads and factors near zero, even norms."""
    for layer in model.modules():
        if not isinstance(layer, DynamicLayer):
            continue
        for parameter in layer.parameters():
            if parameter.numel() == 1 or parameter.abs().max() < 1e-3:
                parameter.add_(torch.randn_like(parameter) / 4)
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """A convolution by CondConv, DY-Conv, ODConv or PAD-Net, sample by sample."""
    seen = layer.router(x) if hasattr(layer, "router") else layer.attention(x)
    maps, rows = (1,) * (x.dim() - 2), []
    for b in range(len(x)):
        alpha = seen[b : b + 1] if isinstance(seen, Tensor) else seen.kernel
        alpha = torch.ones(1, 1).to(x) if alpha is None else alpha[0 if len(alpha) == 1 else b]
        weight = sum(a * kernel for a, kernel in zip(alpha.flatten(), layer.kernels, strict=True))
        if hasattr(layer, "static"):
            l_d = 2 / (1 + torch.exp(-layer.scale))
            weight = torch.where(layer.mask[0], l_d * weight, (2 - l_d) * layer.static[0])
        bias = layer.bias if layer.biases is None else alpha.flatten() @ layer.biases
        one, factor = x[b : b + 1], torch.ones(()).to(x)
        if not isinstance(seen, Tensor):
            one = one * seen.channel[b].view(-1, *maps)
            factor = factor if seen.filter is None else seen.filter[b].view(-1, *maps)
            if seen.position is not None:
                weight = weight * seen.position[b].view(layer.kernel_size)
        out = _CONVS[len(maps)](one, weight, None, *layer.geometry[1:])
        rows.append(out * factor + bias.view(-1, *maps))
    return torch.cat(rows)


def images(count: int = 4, double: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, 12, 12, generator=generator, dtype=torch.float64)
    return x if double else x.float()
