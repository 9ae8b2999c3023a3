"""MobileNetV2: Sandler et al., "Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381.

Module names are timm's, so that its weights load. The 1280 channels of the head do not shrink
with the width, as the paper asks for multipliers below 1; above 1 they grow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.zoo.width import scaled

__all__ = ["MobileNetV2", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100"]

# The paper's table 2 after its first block: output channels c, repeats n, stride s (t is 6).
_STAGES = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_EXPANSION = 6
_HEAD = 1280


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor`` that is at least 90 % of ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


class SeparableBlock(nn.Module):
    """The first block (t = 1): nothing to expand, and no shortcut because the width halves.

    x: (B, C, H, W)  out: (B, O, H, W)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_dw = _depthwise(in_channels, stride=1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = _pointwise(in_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = _relu6(self.bn1(self.conv_dw(x)))
        out: Tensor = self.bn2(self.conv_pw(x))
        return out


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project without activation.

    x: (B, C, H, W)  out: (B, O, H / stride, W / stride)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * _EXPANSION
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv_pw = _pointwise(in_channels, hidden)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_dw = _depthwise(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv_pwl = _pointwise(hidden, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _relu6(self.bn1(self.conv_pw(x)))
        out = _relu6(self.bn2(self.conv_dw(out)))
        out = self.bn3(self.conv_pwl(out))
        return x + out if self.has_shortcut else out


def _init_weights(module: nn.Module) -> None:
    # On meta there is nothing to fill, and the first normal_ there costs seconds of imports.
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


class MobileNetV2(nn.Module):
    """x: (B, in_channels, H, W)  out: (B, num_classes)

    ``multiplier`` is the paper's, in steps of eight channels; ``width`` scales the result, in
    steps of one.
    """

    def __init__(
        self,
        multiplier: float,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        stem = scaled(make_divisible(32 * multiplier), width)
        channels = scaled(make_divisible(16 * multiplier), width)
        head = scaled(_HEAD, max(multiplier * width, 1.0))
        self.conv_stem = nn.Conv2d(in_channels, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        stages = [nn.Sequential(SeparableBlock(stem, channels))]
        for full_width, repeats, first_stride in _STAGES:
            out_channels = scaled(make_divisible(full_width * multiplier), width)
            blocks = []
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _pointwise(channels, head)
        self.bn2 = nn.BatchNorm2d(head)
        self.classifier = nn.Linear(head, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = _relu6(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = _relu6(self.bn2(self.conv_head(x)))
        out: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


def mobilenetv2_050(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0
) -> MobileNetV2:
    return MobileNetV2(0.5, num_classes, in_channels, width)


def mobilenetv2_075(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0
) -> MobileNetV2:
    return MobileNetV2(0.75, num_classes, in_channels, width)


def mobilenetv2_100(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0
) -> MobileNetV2:
    return MobileNetV2(1.0, num_classes, in_channels, width)
