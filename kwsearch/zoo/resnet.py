"""ResNets: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

Module names are torchvision's. The stride of a bottleneck sits on its 3x3 convolution
("V1.5"), not on the first 1x1 as in the paper: that is what published weights expect.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.zoo.width import scaled

__all__ = ["CifarResNet", "ResNet", "resnet18", "resnet20", "resnet34", "resnet50", "resnet101"]


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. x: (B, C, H, W)  out: (B, width, H / stride, W / stride)"""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + identity, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1. x: (B, C, H, W)  out: (B, 4 * width, H / stride, W / stride)"""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + identity, inplace=True)


Block = type[BasicBlock] | type[Bottleneck]


def _stage(block: Block, in_channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    out_channels = width * block.expansion
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(out_channels, width, 1) for _ in range(depth - 1)))


def _init_weights(module: nn.Module) -> None:
    # On meta there is nothing to fill, and the first normal_ there costs seconds of imports.
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


class ResNet(nn.Module):
    """The ImageNet network: four stages at strides 4 to 32.

    x: (B, in_channels, H, W)  out: (B, num_classes)
    """

    def __init__(
        self,
        block: Block,
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        w1, w2, w3, w4 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        wide = block.expansion
        self.conv1 = _conv(in_channels, w1, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(w1)
        self.layer1 = _stage(block, w1, w1, depths[0], stride=1)
        self.layer2 = _stage(block, w1 * wide, w2, depths[1], stride=2)
        self.layer3 = _stage(block, w2 * wide, w3, depths[2], stride=2)
        self.layer4 = _stage(block, w3 * wide, w4, depths[3], stride=2)
        self.fc = nn.Linear(w4 * wide, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


class CifarResNet(nn.Module):
    """The CIFAR network of the paper's section 4.2: three stages of 16, 32 and 64 channels.

    Where the shape changes the shortcut is a projection (the paper's option B).
    x: (B, in_channels, H, W)  out: (B, num_classes)
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        w1, w2, w3 = (scaled(channels, width) for channels in (16, 32, 64))
        self.conv1 = _conv(in_channels, w1, 3)
        self.bn1 = nn.BatchNorm2d(w1)
        self.layer1 = _stage(BasicBlock, w1, w1, depth, stride=1)
        self.layer2 = _stage(BasicBlock, w1, w2, depth, stride=2)
        self.layer3 = _stage(BasicBlock, w2, w3, depth, stride=2)
        self.fc = nn.Linear(w3, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


def resnet18(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width)


def resnet34(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, width)


def resnet50(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width)


def resnet101(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, width)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    return CifarResNet(3, num_classes, in_channels, width)
