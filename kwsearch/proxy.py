"""The short training that scores a plan: seeded, on held-out images, resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.convert import convert_, prepare_
from kwlayers.optim import parameter_groups
from kwlayers.plan import Plan
from kwlayers.schedule import TemperatureSchedule
from kwsearch import checkpoint as checkpoints
from kwsearch import data
from kwsearch.distillation import offline_distillation
from kwsearch.recipe import Proxy


class Diverged(ArithmeticError):
    """The loss became infinite or not a number."""


class Examples(Protocol):
    """What a proxy trains on and scores on. A part is what one call of the network takes of a
    batch, with what is to be learned of it.
    """

    def steps(self, proxy: Proxy) -> int:
        """Batches of an epoch."""

    def batches(
        self, proxy: Proxy, order: torch.Generator, splits: int
    ) -> Iterator[list[tuple[Any, float]]]:
        """Of an epoch: the parts of each batch, and what each counts."""

    def loss(self, model: nn.Module, part: Any, proxy: Proxy) -> Tensor:
        """Of a part."""

    def score(self, model: nn.Module, batch_size: int) -> float:
        """On the held-out examples, 1 if all is right."""

    def prepare(self, model: nn.Module, proxy: Proxy) -> None:
        """Let a converted network look at some examples, always the same."""

    def criterion(self) -> nn.Module | None:
        """What is trained with the network and is no part of it."""

    def progress(self, share: float) -> None:
        """So much of the training is done."""

    def moved(self, device: torch.device) -> Examples:
        """The same on that device, for one training."""


class Part(NamedTuple):
    """x: (B, C, H, W), mixed. rows: which training examples they are, (B,). beside: which are mixed
    in, where `share` is below 1.
    """

    x: Tensor
    rows: Tensor
    beside: Tensor
    share: float


@dataclass(frozen=True)
class ProxyData:
    """Examples with a label each to train on and to score on, on the training device.

    mean, std: (1, C, 1, 1) of the training examples as floats; (1, 1, 1, S) of series.
    """

    train: data.Images
    valid: data.Images
    channels: int
    mean: Tensor
    std: Tensor

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
            share, others = mixing(len(x), proxy.mixup, order)
            others = others.to(x.device)
            mixed = x if share == 1 else share * x + (1 - share) * x[others]
            sizes = micro_batch_sizes(len(x), splits)
            parts = (torch.split(one, sizes) for one in (mixed, index, index[others]))
            yield [
                (Part(some, rows, beside, share), len(rows) / len(x))
                for some, rows, beside in zip(*parts, strict=True)
            ]

    def loss(self, model: nn.Module, part: Part, proxy: Proxy) -> Tensor:
        logits = model(part.x)
        found = self._learned(logits, part.rows, proxy)
        if part.share == 1:
            return found
        # It is linear in what is to be learned.
        return part.share * found + (1 - part.share) * self._learned(logits, part.beside, proxy)

    def _learned(self, logits: Tensor, rows: Tensor, proxy: Proxy) -> Tensor:
        """By the labels of some training examples, and what a teacher says of them."""
        train = self.train
        if train.teacher is None:
            return F.cross_entropy(logits, train.y[rows])
        return offline_distillation(
            logits, train.y[rows], train.teacher[rows], proxy.teacher_weight
        )

    def score(self, model: nn.Module, batch_size: int) -> float:
        """The share that the network gets right."""
        return evaluate(model, self, batch_size)

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

    def moved(self, device: torch.device) -> ProxyData:
        train, valid = self.train.to(device), self.valid.to(device)
        return ProxyData(train, valid, self.channels, self.mean.to(device), self.std.to(device))


def load(proxy: Proxy, input_size: tuple[int, ...]) -> ProxyData:
    """The proxy's images at its resolution, part of the training images held out.

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
    return ProxyData(train, valid, channels, *train.statistics())


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


_LOOKED_AT = 10  # batches, before training


def load_test(proxy: Proxy, images: ProxyData) -> ProxyData:
    """`images` with the test images to score on. Raises data.DataError where there are none."""
    height, width = images.train.x.shape[-2:]
    test = data.load(proxy.data, "test", size=(height, width), fold=proxy.fold)
    return replace(images, valid=test)


def device_of(proxy: Proxy) -> torch.device:
    """Where to train; `auto` is CUDA if there is one."""
    if proxy.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if proxy.device == "cuda" and not torch.cuda.is_available():
        raise data.DataError("proxy.device is cuda, but torch finds none: use auto or cpu")
    return torch.device(proxy.device)


def train(
    make_model: Callable[[], nn.Module],
    plan: Plan | None,
    images: Examples,
    proxy: Proxy,
    seed: int,
    report: Callable[[int, float], None],
    *,
    until: int | None = None,
    checkpoint: Path | None = None,
    splits: int = 1,
    initial: Mapping[str, Tensor] | None = None,
    done: Callable[[nn.Module], object] | None = None,
) -> float:
    """Train a network and return its accuracy (0 to 1) on the held-out images.

    plan: what the network is converted by; None trains it static, as it is.
    report(epoch, accuracy) is called after each epoch, counted from 1, and may raise to stop.
    until: the last epoch, if not `proxy.epochs`; the schedules span `proxy.epochs` all the same.
    checkpoint: written after each epoch, before its report; if the file exists, the run goes on
    from it and the epochs it holds are not reported again. An unreadable file is overwritten.
    splits: micro-batches per batch, to save memory. Their gradients add up to the batch's, except
    that batch norms see a micro-batch. initial: weights of the static network that it starts from,
    where `proxy.init` is warm_start. done: is given the trained network.

    On the CPU and with as many threads, the same seed gives the same run, whatever interrupts it
    and wherever it stops. Raises Diverged, checkpoint.CheckpointError for a file of another run,
    and OSError if the checkpoint cannot be written.
    """
    last = proxy.epochs if until is None else until
    assert 1 <= last <= proxy.epochs, (until, proxy.epochs)
    torch.manual_seed(seed)
    device = device_of(proxy)
    model = make_model()
    if initial is not None:
        model.load_state_dict(initial)
    if plan is not None:
        convert_(model, plan, warm_start=proxy.starts_static)
    images = images.moved(device)
    cold = plan is not None and not proxy.starts_static
    run = _Run(model.to(device), images, proxy, seed, dynamic=cold)
    key = _key(model, plan, proxy, seed)
    if checkpoint is not None and (state := checkpoints.load(checkpoint, key)) is not None:
        run.load_state_dict(state)
    elif plan is not None:
        images.prepare(model, proxy)
    for epoch in range(len(run.accuracies) + 1, last + 1):
        run.train_epoch(splits)
        run.accuracies.append(images.score(model, proxy.batch_size))
        if checkpoint is not None:
            checkpoints.save(checkpoint, key, run.state_dict())
        report(epoch, run.accuracies[-1])
    if done is not None:
        done(model)
    return run.accuracies[last - 1]


class _Run:
    """A network in training, with all that changes from epoch to epoch."""

    def __init__(
        self, model: nn.Module, images: Examples, proxy: Proxy, seed: int, *, dynamic: bool
    ) -> None:
        self.model = model
        self.images = images
        self.proxy = proxy
        steps = images.steps(proxy)
        self.criterion = images.criterion()
        self.optimizer = optimizer_of(model, proxy)
        if self.criterion is not None and (own := [*self.criterion.parameters()]):
            self.optimizer.add_param_group({"params": own, "weight_decay": proxy.weight_decay})
        self.rates = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, _cosine(proxy.epochs * steps)
        )
        self.temperature = (
            TemperatureSchedule(model, proxy.temperature_epochs, steps) if dynamic else None
        )
        self.order = torch.Generator().manual_seed(seed)
        self.accuracies: list[float] = []

    def train_epoch(self, splits: int) -> None:
        """Raises Diverged."""
        self.model.train()
        self.images.progress(len(self.accuracies) / self.proxy.epochs)
        for parts in self.images.batches(self.proxy, self.order, splits):
            if self.temperature is not None:
                self.temperature.step()
            self.optimizer.zero_grad(set_to_none=True)
            for part, share in parts:
                loss = self.images.loss(self.model, part, self.proxy) * share
                if not math.isfinite(loss.item()):
                    epoch = len(self.accuracies) + 1
                    raise Diverged(f"the loss became {loss.item()} in epoch {epoch}")
                loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.rates.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on bit for bit."""
        cuda = next(self.model.parameters()).device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "temperature": None if self.temperature is None else self.temperature.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if cuda else None,
            "accuracies": self.accuracies,
            "criterion": None if self.criterion is None else self.criterion.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if self.temperature is not None:
            self.temperature.load_state_dict(state["temperature"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random_cuda"])
        self.accuracies = state["accuracies"]
        if self.criterion is not None:
            self.criterion.load_state_dict(state["criterion"])


def _key(model: nn.Module, plan: Plan | None, proxy: Proxy, seed: int) -> str:
    """The same for runs that one checkpoint can serve. Threads and device only change rounding."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = None if plan is None else plan.groups_to_list()
    what = [shapes, groups, proxy.model_dump(exclude={"threads", "device"}), seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def micro_batch_sizes(batch: int, splits: int) -> list[int]:
    """As even as can be; fewer than `splits` if one would hold a single image.

    Batch norms cannot train on one.
    """
    parts = min(splits, max(batch // 2, 1))
    size, larger = divmod(batch, parts)
    return [size + 1] * larger + [size] * (parts - larger)


@torch.no_grad()
def evaluate(model: nn.Module, images: ProxyData, batch_size: int) -> float:
    """Share of held-out images that the model gets right."""
    model.eval()
    right = 0
    batches = (torch.split(part, batch_size) for part in (images.valid.x, images.valid.y))
    for x, y in zip(*batches, strict=True):
        right += int((model(images.batch(x)).argmax(dim=1) == y).sum())
    return right / len(images.valid.y)


def _batches(
    images: ProxyData, proxy: Proxy, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch, (B, C, H, W), and which training examples are in each, (B,)."""
    shuffled = torch.randperm(len(images.train.y), generator=order)
    sizes = _batch_sizes(images, proxy)
    for index in torch.split(shuffled[: sum(sizes)], sizes):
        x = augment(images.train.x[index], proxy.augment, order, type(images.train))
        yield images.batch(x), index.to(x.device)


def mixing(batch: int, mixup: float | None, generator: torch.Generator) -> tuple[float, Tensor]:
    """The share of each example in its mixture, at least a half, and who has the rest: (B,).

    Zhang et al., arXiv 1710.09412; the larger of both shares as in EfficientAT. 1 without mixup.
    """
    if mixup is None:
        return 1.0, torch.arange(batch)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    share = float(np.random.RandomState(seed).beta(mixup, mixup))
    return max(share, 1 - share), torch.randperm(batch, generator=generator)


def _batch_sizes(images: ProxyData, proxy: Proxy) -> list[int]:
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


def optimizer_of(model: nn.Module, proxy: Proxy) -> torch.optim.Optimizer:
    """The optimizer that the proxy names."""
    groups = parameter_groups(model, proxy.weight_decay)
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
