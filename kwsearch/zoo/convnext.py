"""ConvNeXt: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545.

Module names are timm's. The two layers of each MLP are 1x1 convolutions here, not linear
layers on channels-last maps: the same function, and every one of them is a convolution that
can be made dynamic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.zoo.width import scaled

__all__ = ["ConvNeXt", "convnext_tiny"]

_EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map. x: (B, C, H, W)  out: (B, C, H, W)"""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """x: (B, C, H, W)  out: (B, C, H, W), with 4 C channels in between"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """x: (B, C, H, W)  out: (B, C, H, W)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.mlp = Mlp(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gamma.view(1, -1, 1, 1) * self.mlp(self.norm(self.conv_dw(x)))
        return out


class Stage(nn.Module):
    """x: (B, C, H, W)  out: (B, O, H / 2, W / 2), or the same size in the first stage"""

    def __init__(self, in_channels: int, channels: int, depth: int, first: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = (
            nn.Identity()
            if first
            else nn.Sequential(
                LayerNorm2d(in_channels), nn.Conv2d(in_channels, channels, 2, stride=2)
            )
        )
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out


class Head(nn.Module):
    """Pool, normalise, classify. x: (B, C, H, W)  out: (B, num_classes)"""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=_EPS)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
        return out


def _init_weights(module: nn.Module) -> None:
    # On meta there is nothing to fill.
    if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXt(nn.Module):
    """x: (B, in_channels, H, W)  out: (B, num_classes)"""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 4, stride=4), LayerNorm2d(widths[0])
        )
        before = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(
                Stage(before[index], widths[index], depth, first=index == 0)
                for index, depth in enumerate(depths)
            )
        )
        self.head = Head(widths[-1], num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)))
        return out


def convnext_tiny(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> ConvNeXt:
    widths = tuple(scaled(channels, width) for channels in (96, 192, 384, 768))
    return ConvNeXt((3, 3, 9, 3), widths, num_classes, in_channels)
