"""The short training that scores a plan: seeded, on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.convert import convert_
from kwlayers.plan import Plan
from kwlayers.schedule import TemperatureSchedule
from kwsearch import data
from kwsearch.recipe import Proxy


class Diverged(ArithmeticError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class ProxyData:
    """Images to train on and to score on, as bytes on the training device.

    mean, std: (1, C, 1, 1) of the training images, in units of 0 to 1.
    """

    train: data.Images
    valid: data.Images
    channels: int
    mean: Tensor
    std: Tensor

    def batch(self, x: Tensor) -> Tensor:
        """x: (B, c, H, W) bytes  out: (B, C, H, W) normalised; grey becomes every channel."""
        x = (x.float() / 255 - self.mean) / self.std
        return x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x


def load(proxy: Proxy, input_size: tuple[int, ...]) -> ProxyData:
    """The proxy's images at its resolution, part of the training images held out.

    Raises data.DataError. Test images are never used.
    """
    channels, height, width = input_size
    size = (height, width) if proxy.resolution is None else (proxy.resolution, proxy.resolution)
    images = data.load(proxy.data, "train", size=size)
    if images.x.shape[1] not in (1, channels):
        raise data.DataError(
            f"{images.name} has {images.x.shape[1]} channels, the model takes {channels}: set "
            f"input to {images.x.shape[1]}x{height}x{width}"
        )
    if proxy.subset is not None:
        images = data.subset(images, proxy.subset, seed=0)
    train, valid = data.split_holdout(images, proxy.holdout, seed=0)
    x = train.x.float() / 255
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    std = x.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
    return ProxyData(train, valid, channels, mean, std)


def device_of(proxy: Proxy) -> torch.device:
    """Where to train; `auto` is CUDA if there is one."""
    if proxy.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if proxy.device == "cuda" and not torch.cuda.is_available():
        raise data.DataError("proxy.device is cuda, but torch finds none: use auto or cpu")
    return torch.device(proxy.device)


def train(
    make_model: Callable[[], nn.Module],
    plan: Plan,
    images: ProxyData,
    proxy: Proxy,
    seed: int,
    report: Callable[[int, float], None],
) -> float:
    """Train the converted network and return its accuracy (0 to 1) on the held-out images.

    report(epoch, accuracy) is called after each epoch, counted from 1, and may raise to stop.
    On the CPU and with as many threads, the same seed gives the same run. Raises Diverged.
    """
    torch.manual_seed(seed)
    device = device_of(proxy)
    model = convert_(make_model(), plan).to(device)
    images = _to(images, device)
    steps = len(_batch_sizes(images, proxy))
    optimizer = _optimizer(model, proxy)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(proxy.epochs * steps))
    temperature = TemperatureSchedule(model, proxy.temperature_epochs, steps)
    order = torch.Generator().manual_seed(seed)
    accuracy = 0.0
    for epoch in range(1, proxy.epochs + 1):
        model.train()
        for x, y in _batches(images, proxy, order):
            temperature.step()
            loss = F.cross_entropy(model(x), y)
            if not math.isfinite(loss.item()):
                raise Diverged(f"the loss became {loss.item()} in epoch {epoch}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
        accuracy = evaluate(model, images, proxy.batch_size)
        report(epoch, accuracy)
    return accuracy


@torch.no_grad()
def evaluate(model: nn.Module, images: ProxyData, batch_size: int) -> float:
    """Share of held-out images that the model gets right."""
    model.eval()
    right = 0
    batches = (torch.split(part, batch_size) for part in (images.valid.x, images.valid.y))
    for x, y in zip(*batches, strict=True):
        right += int((model(images.batch(x)).argmax(dim=1) == y).sum())
    return right / len(images.valid.y)


def _to(images: ProxyData, device: torch.device) -> ProxyData:
    def moved(part: data.Images) -> data.Images:
        return data.Images(
            part.x.to(device), part.y.to(device), part.num_classes, part.name, part.classes
        )

    return ProxyData(
        moved(images.train),
        moved(images.valid),
        images.channels,
        images.mean.to(device),
        images.std.to(device),
    )


def _batches(
    images: ProxyData, proxy: Proxy, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    shuffled = torch.randperm(len(images.train.y), generator=order)
    sizes = _batch_sizes(images, proxy)
    for index in torch.split(shuffled[: sum(sizes)], sizes):
        x = augment(images.train.x[index], proxy.augment, order)
        yield images.batch(x), images.train.y[index]


def _batch_sizes(images: ProxyData, proxy: Proxy) -> list[int]:
    """Of one epoch. A last batch of one is left out: batch norms cannot train on it."""
    whole, rest = divmod(len(images.train.y), proxy.batch_size)
    return [proxy.batch_size] * whole + ([rest] if rest > 1 or not whole else [])


def augment(x: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """x: (B, C, H, W). `shift` moves each batch by up to an eighth of its size in zero padding;
    `flip` does so too and mirrors images at random.
    """
    if how == "none":
        return x
    reach = max(x.shape[-1] // 8, 1)
    top, left = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(x, (reach,) * 4)
    x = padded[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    if how == "flip":
        mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    return x


def _optimizer(model: nn.Module, proxy: Proxy) -> torch.optim.Optimizer:
    """Weight decay on kernels, cells and matrices, not on norms and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": proxy.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if proxy.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=proxy.lr, momentum=proxy.momentum, nesterov=proxy.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=proxy.lr)


def _cosine(steps: int) -> Callable[[int], float]:
    """Linear over the first twentieth, then half a cosine down to 0."""
    warmup = max(steps // 20, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor
