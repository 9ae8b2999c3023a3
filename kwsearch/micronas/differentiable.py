"""The differentiable search: supernet and probabilities of decisions, trained in turns.

One step is an update of the logits on a batch of the validation windows, then one of the weights on
a batch of the training windows, each with a new draw of all decisions: a Gumbel-softmax, never
rounded, whose temperature falls by a factor every step. The loss of the weights is the cross
entropy; that of the logits is

    L = cross entropy + c ln(ms / limit) + c ln(bytes / limit) + c ln(flash / limit)

with c = 4 above the limit and 0.002 below, and the expected milliseconds, peak bytes and bytes of
weights of the same draw; without a limit its term is not there. (The paper has none of flash.)
Logits are moved by SGD with a cosine from 0.36 to 0.0008 over all steps, weights by Adam with
gradients clipped to norm 5. At the end the most probable architecture within the limits is taken
(`feasible`). On purpose different from the published code:

- It is its older search that this follows: the current one never calls `backward` on L.
- Where a fusion cell has no branch the residual is on. There all may be off, so that a cell costs
  nothing and the network says nothing; under tight limits that is where it ends.
- The cosine ends with the last step. There it is that of 100 epochs, however many are run.
- Memory is the expectation of the true peak, by which every decision that matters has a gradient.
- Validation batches go through all windows before one comes again. There each is drawn anew.

A step depends on the state before it, the seed and its number only, so that a search that was
saved and loaded goes on as if it had not been interrupted, on the same machine to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.expected import Expected, ExpectedCycles
from kwsearch.micronas.feasible import Feasible, Limits
from kwsearch.micronas.mixture import Mixture, gumbel_softmax, softmax, with_output
from kwsearch.micronas.peak_memory import ExpectedPeak
from kwsearch.micronas.space import Architecture, Space, macs, operators, params
from kwsearch.micronas.supernet import Supernet

Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Of a search; the defaults are the published ones. Raises ValueError.

    lr: of the weights. logit_lr, last_logit_lr: of the logits, first and last. clip: norm of the
    weights' gradients. temperature, decay, last_temperature: of the draws; with the defaults, the
    last is reached after 2,297 steps. above, below: weights of a term whose limit is broken, kept.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    logit_lr: float = 0.36
    last_logit_lr: float = 8e-4
    clip: float = 5.0
    temperature: float = 1.0
    decay: float = 0.995
    last_temperature: float = 1e-5
    above: float = 4.0
    below: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            whole = one.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "an integer" if whole else "a number"
                raise ValueError(f"{one.name} {value!r}: must be {kind}")
            least = {"epochs": 1, "batch_size": 2, "seed": 0}.get(one.name)
            if least is not None and value < least:
                raise ValueError(f"{one.name} {value}: must be at least {least}")
            if least is None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{one.name} {value}: must be positive")
        if self.decay > 1:
            raise ValueError(f"decay {self.decay}: must be at most 1, as temperatures fall")

    def temperature_at(self, step: int) -> float:
        """Of the draws of a step, counted from 0."""
        return max(self.temperature * self.decay**step, self.last_temperature)

    def logit_lr_at(self, step: int, steps: int) -> float:
        """Half a cosine over all steps."""
        half = (1 + math.cos(math.pi * step / steps)) / 2
        return self.last_logit_lr + (self.logit_lr - self.last_logit_lr) * half


@dataclass(frozen=True)
class Step:
    """What a step saw. loss: of the logits, of which cross_entropy is one term.

    milliseconds, bytes: expected of the draw. milliseconds: None without a table.
    """

    number: int
    temperature: float
    logit_lr: float
    train_loss: float
    loss: float
    cross_entropy: float
    milliseconds: float | None
    bytes: float


@dataclass(frozen=True)
class Result:
    """What was found. preferred: the most probable architecture, limits or not.

    binding: which limits the preferred one breaks, so that another had to be taken. broken: which
    the architecture itself breaks, as no other keeps them. milliseconds: None without a table.
    fitted: operators that the table had not measured. bytes: the peak. flash: bytes of weights.
    """

    architecture: Architecture
    preferred: Architecture
    binding: tuple[str, ...]
    broken: tuple[str, ...]
    params: int
    macs: int
    bytes: int
    milliseconds: float | None
    fitted: tuple[str, ...]
    flash: int


class Search:
    """A search over a space, on windows x (N, 1, T, S) with labels y (N,) to train and to validate.

    table: cycles of the device, needed for a limit of milliseconds. in_place_add, conv_scratch: as
    in `peak_memory`. It runs on the device of the windows. Raises ValueError.
    """

    def __init__(
        self,
        space: Space,
        train: Windows,
        valid: Windows,
        *,
        limits: Limits | None = None,
        table: CycleTable | None = None,
        settings: Settings | None = None,
        in_place_add: bool = False,
        conv_scratch: bool = False,
    ) -> None:
        self.space, self.settings = space, settings or Settings()
        self.limits = limits or Limits()
        self.train, self.valid = train, valid
        for name, windows in (("training", train), ("validation", valid)):
            _check_windows(name, windows, space)
        how = {"in_place_add": in_place_add, "conv_scratch": conv_scratch}
        self.feasible = Feasible(space, self.limits, table, **how)
        self._table = table
        self._cycles = None if table is None else ExpectedCycles(space, table)
        self._peak = ExpectedPeak(space, **how)
        self._flash = Expected(space, lambda key: key.flash)
        self.device = train[0].device
        with self._random(0):
            self.supernet = Supernet(space).to(self.device)
            self.logits = _first_logits(space)
        self._weight_optimizer = torch.optim.Adam(self.supernet.parameters(), self.settings.lr)
        self._logit_optimizer = torch.optim.SGD(self.logits.values(), self.settings.logit_lr)
        self.done = 0

    @property
    def steps(self) -> int:
        """Of the whole search."""
        return self.settings.epochs * _batches(len(self.train[1]), self.settings.batch_size)

    def run(self, after_step: Callable[[Step], None] | None = None) -> Result:
        """The rest of the steps, and what they found. Raises ArithmeticError for a loss that is
        not finite.
        """
        while self.done < self.steps:
            step = self.step()
            if after_step is not None:
                after_step(step)
        return self.result()

    def step(self) -> Step:
        """One more. Raises ValueError after the last, ArithmeticError as `run` does."""
        if self.done >= self.steps:
            raise ValueError(f"all {self.steps} steps are done: take the result, or more epochs")
        settings, number = self.settings, self.done
        temperature = settings.temperature_at(number)
        logit_lr = settings.logit_lr_at(number, self.steps)
        self.supernet.train()
        with self._random(number + 1):
            loss, cross_entropy, took, held = self._logit_loss(number, temperature)
            self._check(loss, "logits")
            self._update_logits(loss, logit_lr)
            train_loss = self._train_loss(number, temperature)
            self._check(train_loss, "weights")
            self._update_weights(train_loss)
        self.done += 1
        seen = (train_loss, loss, cross_entropy, took, held)
        numbers = [None if one is None else float(one.detach()) for one in seen]
        return Step(self.done, temperature, logit_lr, *numbers)  # type: ignore[arg-type]

    def result(self) -> Result:
        """Of the logits as they are."""
        mixture = {name: one.detach() for name, one in with_output(softmax(self.logits)).items()}
        preferred = self.feasible.preferred(mixture)
        found, broken = self.feasible.best(mixture)
        network = operators(self.space, found)
        latency = None if self._table is None else self._table.latency(network)
        return Result(
            found,
            preferred,
            self.feasible.broken(preferred),
            broken,
            params(network),
            macs(network),
            self.feasible.bytes(found),
            None if latency is None else latency.milliseconds,
            () if latency is None else latency.fitted,
            self.feasible.flash(found),
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the next step depends on, but for windows, table and code."""
        state = {
            "what": self._what(),
            "done": self.done,
            "supernet": self.supernet.state_dict(),
            "logits": {name: one.detach() for name, one in self.logits.items()},
            "weight_optimizer": self._weight_optimizer.state_dict(),
            "logit_optimizer": self._logit_optimizer.state_dict(),
        }
        return deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another search."""
        for name, mine in self._what().items():
            if (other := state["what"].get(name)) != mine:
                raise ValueError(
                    f"the state is of another search: {name} {other}, not {mine}; load it into "
                    "one that was made alike"
                )
        self.supernet.load_state_dict(state["supernet"])
        with torch.no_grad():
            for name, one in self.logits.items():
                one.copy_(state["logits"][name])
        self._weight_optimizer.load_state_dict(state["weight_optimizer"])
        self._logit_optimizer.load_state_dict(state["logit_optimizer"])
        self.done = state["done"]

    def penalties(self, mixture: Mixture) -> tuple[Tensor, Tensor | None, Tensor]:
        """The sum of the limits' terms; expected milliseconds, if there is a table, and bytes."""
        total = torch.zeros((), dtype=torch.float64)
        took = None if self._cycles is None else self._cycles.milliseconds(mixture)
        if took is not None and self.limits.milliseconds is not None:
            total = total + self._penalty(took, self.limits.milliseconds)
        held = self._peak(mixture)
        if self.limits.bytes is not None:
            total = total + self._penalty(held, self.limits.bytes)
        if self.limits.flash is not None:
            total = total + self._penalty(self._flash(mixture), self.limits.flash)
        return total, took, held

    def _penalty(self, cost: Tensor, limit: float) -> Tensor:
        above = float(cost.detach()) > limit
        weight = self.settings.above if above else self.settings.below
        return weight * (cost / limit).log()

    def _logit_loss(
        self, number: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        x, y = self._batch(self.valid, number, 1)
        mixture = gumbel_softmax(self.logits, temperature)
        cross_entropy = F.nll_loss(self.supernet(x, mixture), y)
        penalty, took, held = self.penalties(mixture)
        return cross_entropy + penalty.to(cross_entropy), cross_entropy, took, held

    def _train_loss(self, number: int, temperature: float) -> Tensor:
        x, y = self._batch(self.train, number, 0)
        with torch.no_grad():
            mixture = gumbel_softmax(self.logits, temperature)
        return F.nll_loss(self.supernet(x, mixture), y)

    def _update_logits(self, loss: Tensor, lr: float) -> None:
        logits = list(self.logits.values())
        for one, grad in zip(logits, torch.autograd.grad(loss, logits), strict=True):
            one.grad = grad
        self._logit_optimizer.param_groups[0]["lr"] = lr
        self._logit_optimizer.step()

    def _update_weights(self, loss: Tensor) -> None:
        self._weight_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.supernet.parameters(), self.settings.clip)
        self._weight_optimizer.step()

    def _check(self, loss: Tensor, of: str) -> None:
        if not math.isfinite(float(loss.detach())):
            raise ArithmeticError(
                f"step {self.done + 1}: the loss of the {of} is {float(loss.detach())}; try a "
                "smaller learning rate, and look for windows that are not finite"
            )

    def _batch(self, windows: Windows, number: int, stream: int) -> Windows:
        """Of a step: windows in an order of each pass over them, in batches as even as can be."""
        x, y = windows
        passed, index = divmod(number, _batches(len(y), self.settings.batch_size))
        generator = torch.Generator().manual_seed(_mixed(self.settings.seed, passed, stream))
        order = torch.randperm(len(y), generator=generator)
        picked = order.tensor_split(_batches(len(y), self.settings.batch_size))[index]
        picked = picked.to(x.device)
        return x[picked], y[picked]

    @contextmanager
    def _random(self, number: int) -> Iterator[None]:
        """Draws and dropout of a step by seed and number; others' random state stays as it was."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_mixed(self.settings.seed, number, 2))
            yield

    def _what(self) -> dict[str, Any]:
        table = self._table
        return {
            "space": asdict(self.space),
            "settings": asdict(self.settings),
            "limits": asdict(self.limits),
            "memory": dict(self.feasible.how),
            "table": table and [table.device, table.clock_mhz, len(table.entries)],
            "windows": [len(self.train[1]), len(self.valid[1])],
        }


def _first_logits(space: Space) -> dict[str, Tensor]:
    """Channels start at 0, all others at 1e-3 N(0, 1)."""
    found = {}
    for one in space.decisions:
        start = torch.zeros(len(one.options))
        if not one.name.endswith((".channels", ".bottleneck")):
            start = 1e-3 * torch.randn(len(one.options))
        found[one.name] = start.requires_grad_()
    return found


def _batches(windows: int, batch_size: int) -> int:
    """Of one pass."""
    return -(-windows // batch_size)


def _mixed(*numbers: int) -> int:
    """One seed of several."""
    found = 0
    for number in numbers:
        found = (found * 1_000_003 + number + 1) % 2**63
    return found


def _check_windows(name: str, windows: Windows, space: Space) -> None:
    x, y = windows
    expected = (1, space.steps, space.sensors)
    if x.dim() != 4 or tuple(x.shape[1:]) != expected or not x.is_floating_point():
        raise ValueError(
            f"{name} windows of shape {tuple(x.shape)}, {x.dtype}: must be floating point of shape "
            f"(N, 1, {space.steps}, {space.sensors})"
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(
            f"{name} labels of shape {tuple(y.shape)}, {y.dtype}: must be int64 of shape "
            f"({len(x)},), one for each window"
        )
    if len(y) < 2:
        raise ValueError(f"{len(y)} {name} windows: batch norms need at least 2")
    if int(y.min()) < 0 or int(y.max()) >= space.classes:
        raise ValueError(
            f"{name} labels from {int(y.min())} to {int(y.max())}: must be from 0 to "
            f"{space.classes - 1}"
        )
