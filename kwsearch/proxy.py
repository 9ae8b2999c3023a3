"""The short training that scores a plan: seeded, on held-out examples, resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kwlayers.convert import convert_
from kwlayers.optim import parameter_groups
from kwlayers.plan import Plan
from kwlayers.schedule import TemperatureSchedule
from kwsearch import checkpoint as checkpoints
from kwsearch import data
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
        """Before an epoch: from 0, the first, to 1, the last."""

    def moved(self, device: torch.device) -> Examples:
        """The same on that device, for one training."""


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
    examples: Examples,
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
    """Train a network and return its accuracy (0 to 1) on the held-out examples.

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
    examples = examples.moved(device)
    cold = plan is not None and not proxy.starts_static
    run = _Run(model.to(device), examples, proxy, seed, dynamic=cold)
    key = _key(model, plan, proxy, seed)
    if checkpoint is not None and (state := checkpoints.load(checkpoint, key)) is not None:
        run.load_state_dict(state)
    elif plan is not None:
        examples.prepare(model, proxy)
    for epoch in range(len(run.accuracies) + 1, last + 1):
        run.train_epoch(splits)
        run.accuracies.append(examples.score(model, proxy.batch_size))
        if checkpoint is not None:
            checkpoints.save(checkpoint, key, run.state_dict())
        report(epoch, run.accuracies[-1])
    if done is not None:
        done(model)
    return run.accuracies[last - 1]


class _Run:
    """A network in training, with all that changes from epoch to epoch."""

    def __init__(
        self, model: nn.Module, examples: Examples, proxy: Proxy, seed: int, *, dynamic: bool
    ) -> None:
        self.model = model
        self.examples = examples
        self.proxy = proxy
        steps = examples.steps(proxy)
        self.criterion = examples.criterion()
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
        self.examples.progress(len(self.accuracies) / max(self.proxy.epochs - 1, 1))
        for parts in self.examples.batches(self.proxy, self.order, splits):
            if self.temperature is not None:
                self.temperature.step()
            self.optimizer.zero_grad(set_to_none=True)
            for part, share in parts:
                loss = self.examples.loss(self.model, part, self.proxy) * share
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
