"""The layers of a planned network by themselves: every backend, and whether the best is chosen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers.ops import BACKENDS, kw_conv
from kwlayers.ops.reference import CONV
from kwsearch import timing
from kwsearch.bench import (
    Call,
    Case,
    calls,
    choice_of,
    circumstances,
    cudnn_benchmark,
    try_once,
)


def distinct(case: Case) -> dict[Call, tuple[str, ...]]:
    """The different layers of a case, and the names of all that are alike."""
    found: dict[Call, tuple[str, ...]] = {}
    for name, call in calls(case).items():
        found[call] = (*found.get(call, ()), name)
    return found


# Slower than the best backend by this, no precision is needed.
MANY_TIMES = 5


class Layer:
    """One layer by itself: random x (B, C, *S), attention (B, m, n) and cells (n, *cell)."""

    def __init__(self, call: Call, case: Case, dtype: torch.dtype) -> None:
        self.call, self.case = call, case
        torch.manual_seed(0)
        stored = torch.float32 if dtype.itemsize < 4 else dtype

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, device=case.device).to(dtype)

        x = random(call.batch, call.channels, *call.size, dtype=dtype)
        if call.linear:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif case.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        attention = random(call.batch, call.mixtures, call.num_cells, dtype=torch.float32)
        attention = (attention / attention.abs().sum(-1, keepdim=True)).to(dtype)
        self.tensors = {
            "x": x.requires_grad_(call.needs_grad),
            "attention": attention.requires_grad_(),
            "cells": random(call.num_cells, *call.cell, dtype=stored).requires_grad_(),
        }
        self.weight = random(*call.geometry.kernel, dtype=stored).requires_grad_()

    def mixed(self, backend: str | None, workspace_mb: float | None = None) -> Tensor:
        """The dynamic convolution (B, C_out, *S')."""
        x, attention, cells = self.tensors.values()
        return kw_conv(x, attention, cells, self.call.geometry, backend, workspace_mb)

    def static(self) -> Tensor:
        """The static layer: (B, C_out, *S'), of a linear one (B, S', C_out)."""
        x, geometry = self.tensors["x"], self.call.geometry
        if self.call.linear:
            return F.linear(x.transpose(1, 2), self.weight.flatten(1))
        return CONV[x.dim() - 2](x, self.weight, None, *geometry[1:])

    def step(self, run: Callable[[], Tensor], leaves: Iterable[Tensor]) -> timing.Step:
        """One step: forward, and in training backward to those leaves that need it."""
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.no_grad(), self.case.autocast:
            grad = torch.randn_like(run())

        def forward() -> None:
            with torch.no_grad(), self.case.autocast:
                run()

        def train() -> None:
            with self.case.autocast:
                out = run()
            torch.autograd.grad(out, needed, grad)

        return train if self.case.training else forward


def measure_layer(
    call: Call,
    names: Sequence[str],
    case: Case,
    accepted: Sequence[str],
    seconds: float = 1,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Times of one layer by every accepted backend and of the static layer, as plain data.

    names: of the layers that are alike. seconds, rounds: as `timing.interleave` takes them;
    backends many times slower than the best one take part in 2 rounds only. regret: the chosen
    backend's time over the best one's.
    """
    layer = Layer(call, case, case.compute_dtype)
    choice = choice_of(call, case)
    chosen = str(choice) if case.training else choice.forward
    runs = {backend: functools.partial(layer.mixed, backend) for backend in accepted}
    # Forward by one path and backward by another: no backend's name asks for that.
    runs.setdefault(chosen, functools.partial(layer.mixed, None))
    leaves = list(layer.tensors.values())
    with cudnn_benchmark(case):
        make = functools.partial(layer.step, layer.static, [leaves[0], layer.weight])
        steps = {"static": _step(make, f"{case}: {names[0]}, static")}
        for name, run in runs.items():
            make = functools.partial(layer.step, run, leaves)
            # A dtype may be refused that was not compared.
            with contextlib.suppress(ValueError):
                steps[name] = _step(make, f"{case}: {names[0]}, {name}")
        times = timing.interleave(steps, 0, 2, case.device)
        bound = MANY_TIMES * min(min(taken.wall) for taken in times.values())
        kept = {name for name, taken in times.items() if min(taken.wall) <= bound}
        kept |= {"static", "published", chosen}
        near = {name: step for name, step in steps.items() if name in kept}
        times |= timing.interleave(near, seconds, rounds, case.device)
    quartiles = {name: timing.quartiles(taken.wall) for name, taken in times.items()}
    backends = {name: quartiles[name][1] for name in steps if name != "static"}
    best = min(backends, key=backends.__getitem__)
    geometry = call.geometry
    return {
        **circumstances(case),
        "layers": list(names),
        "count": len(names),
        "kernel": list(geometry.kernel),
        "stride": list(geometry.stride),
        "groups": geometry.groups,
        "input": [call.channels, *call.size],
        "cell": list(call.cell),
        "mixtures": call.mixtures,
        "num_cells": call.num_cells,
        "rounds": max(len(taken.wall) for taken in times.values()),
        "static_s": quartiles["static"][1],
        "backends": {n: backends.get(n) for n in (*timeable(), *backends)},
        "quartiles": {name: [first, third] for name, (first, _, third) in quartiles.items()},
        "chosen": chosen,
        "best": best,
        "regret": backends[chosen] / backends[best],
    }


def _step(make: Callable[[], timing.Step], what: str) -> timing.Step:
    """A step that ran once."""
    step = try_once(make, what)
    try_once(step, what)
    return step


def timeable() -> list[str]:
    """Every backend but the definition, which is slow on purpose."""
    return [backend for backend in BACKENDS if backend != "reference"]
