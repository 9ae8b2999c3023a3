"""The supernet: every architecture of a space in one network with shared weights.

Every convolution has its full width. A cell's output is multiplied by the probability that each
channel is there, sum_i w_i mask_i with mask_i the first channels that option i has; branches,
residual and the whole cell are multiplied by their probabilities. At a single architecture that is
its network, with the channels beyond its widths at zero. Different from the published code:

- Masks come after batch norm. There they come before it, and its bias fills the masked channels.
- "Same" padding of strided convolutions is that of Keras and TensorFlow Lite, which the exported
  network runs with. There it is computed as if the stride were 1, which shifts the window.
- Scores are normalised over classes. There they are normalised over the batch.
- The classes' logits have no ReLU.
- Weights start as Keras', like those of the exported network. There they start as PyTorch's.
- Fusion cells have no batch norm that is never used: 128 parameters less in each, at 64 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.micronas.mixture import Mixture, of_cell
from kwsearch.micronas.space import (
    KERNELS,
    Architecture,
    FusionPlace,
    Operator,
    Space,
    TimePlace,
    operators,
)

DROPOUT = 0.3


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis: those of Keras' and TensorFlow Lite's "same".

    The output has ceil(size / stride) positions; of an odd number of zeros, more come after.

    >>> same_padding(128, 3, 2), same_padding(9, 9, 2), same_padding(9, 3, 1)
    ((0, 1), (4, 4), (1, 1))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
) -> nn.Conv2d:
    """Without padding. Weights and biases start as Keras': Glorot-uniform, zero."""
    found = nn.Conv2d(in_channels, out_channels, kernel_size, stride)
    nn.init.xavier_uniform_(found.weight)
    assert found.bias is not None
    nn.init.zeros_(found.bias)
    return found


def same(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution with "same" padding. x: (B, C, H, W)  out: (B, O, ceil(H / stride), …)"""
    sides = zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)  # type: ignore[arg-type]
    (top, bottom), (left, right) = (same_padding(*side) for side in sides)
    out: Tensor = conv(F.pad(x, (left, right, top, bottom)))
    return out


class ConvUnit(nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.conv = conv2d(*args)
        self.norm = nn.BatchNorm2d(self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(F.relu(same(self.conv, x)))
        return out


class PrefixMask(nn.Module):
    """How far each channel is there. chances: (options,)  out: (C, 1, 1)"""

    masks: Tensor

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        there = torch.arange(channels[-1]) < torch.tensor(channels)[:, None]
        self.register_buffer("masks", there.float(), persistent=False)

    def forward(self, chances: Tensor) -> Tensor:
        return (chances @ self.masks)[:, None, None]


class SuperTimeCell(nn.Module):
    """x: (B, C, T, S)  out: (B, O, ceil(T / 2), S)"""

    def __init__(self, place: TimePlace) -> None:
        super().__init__()
        read, written = place.in_channels[-1], place.channels[-1]
        self.convs = nn.ModuleList(ConvUnit(read, written, (k, 1), (2, 1)) for k in KERNELS)
        self.norm = nn.BatchNorm2d(written)
        self.mask = PrefixMask(place.channels)

    def forward(self, x: Tensor, own: Mixture) -> Tensor:
        out: Tensor = sum(w * conv(x) for w, conv in zip(own["kernel"], self.convs, strict=True))
        out = self.norm(out) * self.mask(own["channels"])
        return F.dropout2d(out, DROPOUT, self.training)


class SuperFusionCell(nn.Module):
    """x: (B, C, T, S)  out: (B, O, T, S or ceil(S / 2))"""

    def __init__(self, place: FusionPlace) -> None:
        super().__init__()
        read, written = place.in_channels[-1], place.channels[-1]
        stride = 2 if place.reducing else 1
        self.skippable = not place.reducing
        self.bottleneck = ConvUnit(read, written, (1, place.sensors), (1, stride))
        self.branches = nn.ModuleList(ConvUnit(written, written, (k, 1)) for k in KERNELS)
        self.residual = ConvUnit(read, written, (1, stride), (1, stride))
        self.mask = PrefixMask(place.channels)

    def forward(self, x: Tensor, own: Mixture) -> Tensor:
        narrow = self.bottleneck(x) * self.mask(own["bottleneck"])
        out: Tensor = own["residual"][1] * self.residual(x)
        for kernel, branch in zip(KERNELS, self.branches, strict=True):
            out = out + own[f"branch{kernel}"][1] * branch(narrow)
        out = out * self.mask(own["channels"])
        if self.skippable:
            skip, keep = own["keep"]
            out = skip * x + keep * out
        return F.dropout2d(out, DROPOUT, self.training)


class Supernet(nn.Module):
    """x: (B, 1, T, S), mixture: of every decision  out: (B, classes) logarithms of probabilities"""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.cells = nn.ModuleDict()
        for place in space.cells:
            of = SuperTimeCell if isinstance(place, TimePlace) else SuperFusionCell
            self.cells[place.name] = of(place)  # type: ignore[arg-type]
        self.conv = conv2d(space.cells[-1].channels[-1], space.classes, (1, 1))
        self.norm = nn.BatchNorm2d(space.classes)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        mixture = {name: one.to(x) for name, one in mixture.items()}
        for name, cell in self.cells.items():
            x = cell(x, of_cell(mixture, name))
        return F.log_softmax(self.norm(self.conv(x)).mean((2, 3)), 1)


def supernet_params(space: Space, *, as_published: bool = False) -> int:
    """Parameters of the supernet; as_published counts the norms that are never used, too.

    A convolution with its norm has kh kw C_in C_out + 3 C_out.
    """
    total = 0

    def unit(read: int, written: int, positions: int) -> int:
        return positions * read * written + 3 * written

    for place in space.cells:
        read, written = place.in_channels[-1], place.channels[-1]
        if isinstance(place, TimePlace):
            total += sum(unit(read, written, kernel) for kernel in KERNELS) + 2 * written
            continue
        total += unit(read, written, place.sensors) + unit(read, written, 1 + place.reducing)
        total += sum(unit(written, written, kernel) for kernel in KERNELS)
        total += 2 * written * as_published
    return total + unit(space.cells[-1].channels[-1], space.classes, 1)


class Network(nn.Module):
    """The exported network of a list of operators. x: (B, 1, T, S)  out: (B, classes) logits

    It has no batch norm, and dropout after every cell; its softmax is left to the loss, which takes
    logits. It starts anew: nothing is taken from a supernet.
    """

    def __init__(self, network: tuple[Operator, ...]) -> None:
        super().__init__()
        self.operators = network
        self.convs = nn.ModuleDict()
        for one in network:
            if one.key.kind == "conv2d":
                (read,), (kh, kw), (down, right) = one.key.inputs, one.key.kernel, one.key.strides
                conv = conv2d(read[-1], one.key.output[-1], (kh, kw), (down, right))
                self.convs[one.name.replace(".", "_")] = conv
        ends = {one.cell: one.name for one in network}
        self._last = {name for cell, name in ends.items() if cell != "head"}

    def forward(self, x: Tensor) -> Tensor:
        made = {"input": x}
        for one in self.operators:
            out = run(one, [made[name] for name in one.inputs], self.convs)
            drop = self.training and one.name in self._last
            made[one.name] = F.dropout(out, DROPOUT, drop)
        return out


def run(
    one: Operator,
    inputs: Sequence[Tensor],
    convs: nn.ModuleDict,
    convolved: Callable[[nn.Module, Tensor], Tensor] = same,
    positions: tuple[int, int] = (2, 3),
) -> Tensor:
    """An operator with the convolutions of its network. A softmax is left to the caller.

    convolved: a convolution with "same" padding. positions: the dimensions of steps and sensors.
    """
    if one.key.kind == "add":
        return inputs[0] + inputs[1]
    (x,) = inputs
    if one.key.kind == "conv2d":
        x = convolved(convs[one.name.replace(".", "_")], x)
        return F.relu(x) if one.relu else x
    return x.mean(positions) if one.key.kind == "gap2d" else x


def largest(
    num_classes: int = 6,
    in_channels: int = 1,
    steps: int = 128,
    sensors: int = 9,
    width: float = 1.0,
) -> Network:
    """That of the largest architecture of the published space, its channels times `width`.

    Raises ValueError for more than one channel.
    """
    if in_channels != 1:
        raise ValueError(f"in_channels {in_channels}: windows (1, steps, sensors) have one")
    published = Space(steps, sensors, num_classes)
    if width != 1:
        time, fusion = (
            tuple(sorted({max(round(c * width), 1) for c in grid}))
            for grid in (published.time_channels, published.fusion_channels)
        )
        published = replace(published, time_channels=time, fusion_channels=fusion)
    return extract(published, published.maximum())


def extract(space: Space, architecture: Architecture) -> Network:
    """The plain network of an architecture, to be trained from scratch. Raises SpaceError."""
    return Network(operators(space, architecture))
