"""MN: MobileNetV3-Large for spectrograms, at any width.

Schmid, Koutini and Widmer, "Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge
Distillation", ICASSP 2023, arXiv 2211.04772; Howard et al., "Searching for MobileNetV3", arXiv
1905.02244. Module names are the published code's, so that its weights load. There the forward
returns the pooled features, too: here `embed` gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.zoo.mobilenetv2 import make_divisible
from kwsearch.zoo.width import scaled

__all__ = ["MN"]

NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}
DROPOUT = 0.2
STEM = 16
HEAD = 1280
# (in, kernel, expanded, out, squeeze-and-excitation, hardswish, stride) of each block at width 1.
_BLOCKS = (
    (16, 3, 16, 16, False, False, 1),
    (16, 3, 64, 24, False, False, 2),
    (24, 3, 72, 24, False, False, 1),
    (24, 5, 72, 40, True, False, 2),
    (40, 5, 120, 40, True, False, 1),
    (40, 5, 120, 40, True, False, 1),
    (40, 3, 240, 80, False, True, 2),
    (80, 3, 200, 80, False, True, 1),
    (80, 3, 184, 80, False, True, 1),
    (80, 3, 184, 80, False, True, 1),
    (80, 3, 480, 112, True, True, 1),
    (112, 3, 672, 112, True, True, 1),
    (112, 5, 672, 160, True, True, 2),
    (160, 5, 960, 160, True, True, 1),
    (160, 5, 960, 160, True, True, 1),
)


@dataclass(frozen=True)
class Shape:
    """Of one block. squeezed: whether MN has squeeze-and-excitation there."""

    in_channels: int
    kernel_size: int
    expanded: int
    out_channels: int
    squeezed: bool
    hardswish: bool
    stride: int

    @property
    def has_shortcut(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


def channels(count: int, multiplier: float, width: float) -> int:
    """`count` times the published multiplier, in steps of eight; times `width`, in steps of one."""
    return scaled(make_divisible(count * multiplier), width)


def shapes(multiplier: float, width: float) -> Iterator[Shape]:
    """The blocks of a network, in order."""
    for inputs, kernel, expanded, outputs, squeezed, hardswish, stride in _BLOCKS:
        sizes = (channels(c, multiplier, width) for c in (inputs, expanded, outputs))
        first, middle, last = sizes
        yield Shape(first, kernel, middle, last, squeezed, hardswish, stride)


def activation(x: Tensor, hardswish: bool) -> Tensor:
    return F.hardswish(x, inplace=True) if hardswish else F.relu(x, inplace=True)


class Activation(nn.Module):
    """ReLU or hardswish. Published sequences have it as a module, so its place is in the names."""

    def __init__(self, hardswish: bool) -> None:
        super().__init__()
        self.hardswish = hardswish

    def forward(self, x: Tensor) -> Tensor:
        return activation(x, self.hardswish)


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    padding = (kernel_size - 1) // 2
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
    )
    return conv, nn.BatchNorm2d(out_channels, **NORM)


class SqueezeExcitation(nn.Module):
    """Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018. x: (B, C, F, T)  out: the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // 4)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * scale[..., None, None]


class _OverChannels(nn.Module):
    """Squeeze-and-excitation under the names that the published code gives several of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([SqueezeExcitation(channels)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conc_se_layers[0](x)
        return out


class InvertedResidual(nn.Module):
    """Expand, filter each channel, squeeze and excite, project without activation.

    x: (B, C, F, T)  out: (B, O, F / stride, T / stride)
    """

    def __init__(self, shape: Shape, squeezed: bool) -> None:
        super().__init__()
        self.has_shortcut = shape.has_shortcut
        expanded, act = shape.expanded, shape.hardswish
        depthwise = conv_norm(
            expanded, expanded, shape.kernel_size, stride=shape.stride, groups=expanded
        )
        parts: list[nn.Module] = [nn.Sequential(*depthwise, Activation(act))]
        if expanded != shape.in_channels:
            expand = conv_norm(shape.in_channels, expanded)
            parts.insert(0, nn.Sequential(*expand, Activation(act)))
        if squeezed:
            parts.append(_OverChannels(expanded))
        parts.append(nn.Sequential(*conv_norm(expanded, shape.out_channels)))
        self.block = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.has_shortcut else out


def classifier(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """From pooled features (B, features). The first two modules keep the published places."""
    return nn.Sequential(
        nn.Identity(),
        nn.Identity(),
        nn.Linear(features, hidden),
        nn.Hardswish(),
        nn.Dropout(DROPOUT),
        nn.Linear(hidden, num_classes),
    )


def init_weights(module: nn.Module) -> None:
    # On meta there is nothing to fill, and the first normal_ there costs seconds of imports.
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        else:
            nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MN(nn.Module):
    """x: (B, in_channels, F, T)  out: (B, num_classes)

    ``multiplier`` is the published width, in steps of eight channels; ``width`` scales the result,
    in steps of one.
    """

    def __init__(
        self,
        multiplier: float,
        num_classes: int = 527,
        in_channels: int = 1,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        stem = channels(STEM, multiplier, width)
        blocks = list(shapes(multiplier, width))
        last = blocks[-1].out_channels
        self.features = nn.Sequential(
            nn.Sequential(*conv_norm(in_channels, stem, 3, stride=2), Activation(True)),
            *(InvertedResidual(shape, shape.squeezed) for shape in blocks),
            nn.Sequential(*conv_norm(last, 6 * last), Activation(True)),
        )
        self.classifier = classifier(6 * last, channels(HEAD, multiplier, width), num_classes)
        self.apply(init_weights)

    def embed(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, F, T)  out: (B, features), pooled."""
        out: Tensor = self.features(x)
        return out.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.embed(x))
        return out
