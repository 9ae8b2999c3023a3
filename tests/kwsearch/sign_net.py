"""A network for sign language that is small enough for tests."""

from __future__ import annotations

from kwsearch.zoo.resnet import resnet18
from kwsearch.zoo.sign import SignNet


def small(in_channels: int = 3, num_classes: int = 4) -> SignNet:
    return SignNet(resnet18(1, in_channels, 0.0625), num_classes, 0.0625)
