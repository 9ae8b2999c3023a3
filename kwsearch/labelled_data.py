"""Images, sound and series with a label each as a proxy's examples, scored by accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.convert import prepare_
from kwsearch import data
from kwsearch.distillation import offline_distillation
from kwsearch.recipe import Proxy

_LOOKED_AT = 10  # batches, before training


class Part(NamedTuple):
    """x: (B, C, H, W). rows: which training examples they are, (B,). With mixup beside: which are
    mixed in, and share: how much of each is its own, (B,).
    """

    x: Tensor
    rows: Tensor
    beside: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True)
class LabelledData:
    """Examples with a label each to train on and to score on, on the training device.

    mean, std: (1, C, 1, 1) of the training examples as floats; (1, 1, 1, S) of series.
    """

    train: data.Images
    valid: data.Images
    channels: int
    mean: Tensor
    std: Tensor
    notes: tuple[str, ...] = ()

    def batch(self, x: Tensor) -> Tensor:
        """x: (B, c, H, W) as stored  out: (B, C, H, W) normalised; grey becomes every channel."""
        x = (self.train.floats(x) - self.mean) / self.std
        return x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x

    def steps(self, proxy: Proxy) -> int:
        return len(_batch_sizes(self, proxy))

    def batches(
        self, proxy: Proxy, order: torch.Generator, splits: int
    ) -> Iterator[list[tuple[Part, float]]]:
        for x, index in _batches(self, proxy, order):
            sizes = micro_batch_sizes(len(x), splits)
            columns = [x, index]
            if proxy.mixup is not None:
                share, others = (one.to(x.device) for one in mixing(len(x), proxy.mixup, order))
                portion = share.view(-1, *[1] * (x.dim() - 1))
                columns = [torch.lerp(x[others], x, portion), index, index[others], share]
            parts = (torch.split(column, sizes) for column in columns)
            yield [(Part(*part), len(part[0]) / len(x)) for part in zip(*parts, strict=True)]

    def loss(self, model: nn.Module, part: Part, proxy: Proxy) -> Tensor:
        logits = model(part.x)
        losses = self._learned(logits, part.rows, proxy)
        if part.share is not None:
            assert part.beside is not None
            # They are linear in what is to be learned.
            losses = torch.lerp(self._learned(logits, part.beside, proxy), losses, part.share)
        return losses.mean()

    def _learned(self, logits: Tensor, rows: Tensor, proxy: Proxy) -> Tensor:
        """By the labels of some training examples, and what a teacher says of them: (B,)."""
        train = self.train
        if train.teacher is None:
            return F.cross_entropy(logits, train.y[rows], reduction="none")
        return offline_distillation(
            logits, train.y[rows], train.teacher[rows], proxy.teacher_weight, reduction="none"
        )

    @torch.no_grad()
    def score(self, model: nn.Module, batch_size: int) -> float:
        """The share of the held-out examples that the network gets right."""
        model.eval()
        right = 0
        batches = (torch.split(part, batch_size) for part in (self.valid.x, self.valid.y))
        for x, y in zip(*batches, strict=True):
            right += int((model(self.batch(x)).argmax(dim=1) == y).sum())
        return right / len(self.valid.y)

    def prepare(self, model: nn.Module, proxy: Proxy) -> None:
        prepare_(model, self._first_batches(proxy), F.cross_entropy)

    def _first_batches(self, proxy: Proxy) -> Iterator[tuple[Tensor, Tensor]]:
        start, train = 0, self.train
        for size in _batch_sizes(self, proxy)[:_LOOKED_AT]:
            yield self.batch(train.x[start : start + size]), train.y[start : start + size]
            start += size

    def criterion(self) -> None:
        return None

    def progress(self, share: float) -> None:
        """Nothing depends on it."""

    def moved(self, device: torch.device) -> LabelledData:
        train, valid = self.train.to(device), self.valid.to(device)
        return LabelledData(train, valid, self.channels, self.mean.to(device), self.std.to(device))


def load(proxy: Proxy, input_size: tuple[int, ...]) -> LabelledData:
    """The proxy's examples, images at its resolution, part of the training examples held out.

    Raises data.DataError.
    """
    if len(input_size) != 3:
        raise data.DataError(
            f"the proxy's data are images, the input is {'x'.join(map(str, input_size))}: only "
            "networks of images can be searched"
        )
    channels, height, width = input_size
    size = (height, width) if proxy.resolution is None else (proxy.resolution, proxy.resolution)
    images = data.load(proxy.data, "train", size=size, fold=proxy.fold)
    _check_kind(images, proxy)
    if images.x.shape[1] not in (1, channels):
        raise data.DataError(
            f"{images.name} has {images.x.shape[1]} channels, the model takes {channels}: set "
            f"input to {images.x.shape[1]}x{height}x{width}"
        )
    if proxy.teacher is not None:
        images = data.taught(images, Path(proxy.teacher))
    if proxy.subset is not None:
        images = data.subset(images, proxy.subset, seed=0)
    train, valid = data.split_holdout(images, proxy.holdout, seed=0)
    return LabelledData(train, valid, channels, *train.statistics())


def _check_kind(images: data.Images, proxy: Proxy) -> None:
    if isinstance(images, data.Clips):
        kind, size = "sound, whose mel bands and frames", "1x128x500 for 5 seconds"
        mirrored = "time"
    elif isinstance(images, data.Series):
        kind, size = "time series, whose samples and sensors", "1x128x9"
        mirrored = "the order of sensors"
    else:
        return
    if proxy.resolution is not None:
        raise data.DataError(
            f"proxy.resolution {proxy.resolution}: of images; {images.name} is {kind} the "
            f"recipe's input has, e.g. {size}"
        )
    if proxy.augment == "flip":
        raise data.DataError(
            f"proxy.augment flip: it would turn {mirrored} around in {images.name}; try shift, or "
            "none"
        )


def load_test(proxy: Proxy, images: LabelledData) -> LabelledData:
    """`images` with the test images to score on. Raises data.DataError where there are none."""
    height, width = images.train.x.shape[-2:]
    test = data.load(proxy.data, "test", size=(height, width), fold=proxy.fold)
    return replace(images, valid=test)


def micro_batch_sizes(batch: int, splits: int) -> list[int]:
    """As even as can be; fewer than `splits` if one would hold a single image.

    Batch norms cannot train on one.
    """
    parts = min(splits, max(batch // 2, 1))
    size, larger = divmod(batch, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _batches(
    images: LabelledData, proxy: Proxy, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch, (B, C, H, W), and which training examples are in each, (B,)."""
    shuffled = torch.randperm(len(images.train.y), generator=order)
    sizes = _batch_sizes(images, proxy)
    for index in torch.split(shuffled[: sum(sizes)], sizes):
        x = augment(images.train.x[index], proxy.augment, order, type(images.train))
        yield images.batch(x), index.to(x.device)


def mixing(batch: int, mixup: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The share of each example in its mixture, at least a half, and who has the rest: (B,), (B,).

    Zhang et al., arXiv 1710.09412; one share for each example and the larger of both as in
    EfficientAT's training of DyMN.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator))
    drawn = np.random.RandomState(seed).beta(mixup, mixup, batch)
    shares = torch.from_numpy(np.maximum(drawn, 1 - drawn)).float()
    return shares, torch.randperm(batch, generator=generator)


def _batch_sizes(images: LabelledData, proxy: Proxy) -> list[int]:
    """Of one epoch. A last batch of one is left out: batch norms cannot train on it."""
    whole, rest = divmod(len(images.train.y), proxy.batch_size)
    return [proxy.batch_size] * whole + ([rest] if rest > 1 or not whole else [])


def augment(
    x: Tensor, how: str, generator: torch.Generator, kind: type[data.Images] = data.Images
) -> Tensor:
    """x: (B, C, H, W), of that kind. `shift` moves each batch by up to its kind's reach, an eighth
    of the width, in a padding of silence; `flip` does so too and mirrors images at random.
    """
    if how == "none":
        return x
    rows, columns = kind.reach((x.shape[-2], x.shape[-1]))
    top = int(torch.randint(0, 2 * rows + 1, (1,), generator=generator))
    left = int(torch.randint(0, 2 * columns + 1, (1,), generator=generator))
    padded = F.pad(x, (columns, columns, rows, rows), value=kind.silence)
    x = padded[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    if how == "flip":
        mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    return x
