"""One training step of a plan or an architecture: its time, measured here, its memory, and how many
trials fit.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kwsearch.recipe import Proxy, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kwlayers.plan import Plan

_STEPS = 5
# What a process holds on a GPU besides torch's own memory: the CUDA context.
_CONTEXT = 600 * 10**6


class TrainStep:
    """A network with random images of the proxy's batch size, to be timed.

    plan, architecture: of the network, one of them. trust: whether it may be the user's own code.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan | None,
        proxy: Proxy,
        trust: bool = False,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        import torch

        from kwlayers.convert import convert_
        from kwsearch.proxy import device_of, optimizer_of

        if proxy.threads is not None:
            torch.set_num_threads(proxy.threads)
        self.device = device_of(proxy)
        with torch.random.fork_rng():
            model = _builder(recipe, trust, architecture)()
            if plan is not None:
                model = convert_(model, plan)
            self.model = model.to(self.device).train()
            size = (proxy.batch_size, *_input_of(recipe, proxy))
            self.x = torch.randn(size, device=self.device)
        self.optimizer = optimizer_of(self.model, proxy)

    def __call__(self) -> None:
        import torch
        import torch.nn.functional as F

        self.optimizer.zero_grad(set_to_none=True)
        out = self.model(self.x).flatten(0, -2)  # rows of logits, of videos several each
        labels = torch.arange(len(out), device=self.device) % out.shape[-1]
        F.cross_entropy(out, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def seconds(self) -> float:
        """The median of a few more steps."""
        found = []
        for _ in range(_STEPS):
            began = time.perf_counter()
            self()
            _wait(self.device)
            found.append(time.perf_counter() - began)
        return statistics.median(found)


def train_bytes(
    recipe: Recipe,
    plan: Plan | None,
    proxy: Proxy,
    trust: bool = False,
    architecture: Mapping[str, Any] | None = None,
) -> int:
    """The peak memory of a training step at the proxy's batch size, counted and not run."""
    from kwsearch import memory
    from kwsearch.proxy import device_of, optimizer_of

    return memory.memory_of(
        _builder(recipe, trust, architecture, counted=True),
        plan,
        _input_of(recipe, proxy),
        memory.Step(proxy.batch_size, device=device_of(proxy).type),
        lambda made: optimizer_of(made, proxy),
    ).total


def _builder(
    recipe: Recipe, trust: bool, architecture: Mapping[str, Any] | None, counted: bool = False
) -> Callable[[], nn.Module]:
    """What makes the network; counted: which may be on `meta`."""
    from kwsearch import architectures, networks
    from kwsearch.resolve import create_model

    if architecture is not None:
        return partial(architectures.network, recipe, architecture)
    if not counted:
        return partial(create_model, recipe, trust=trust)
    model = recipe.model
    return partial(networks.planning_model, model.name, recipe.input, model.num_classes, trust)


def _input_of(recipe: Recipe, proxy: Proxy) -> tuple[int, ...]:
    """(C, H, W) that the proxy trains on, of videos (C, T, H, W)."""
    from kwsearch.resolve import input_of

    *others, height, width = input_of(recipe)
    if proxy.resolution is not None:
        height = width = proxy.resolution
    return (*others, height, width)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def gpus(proxy: Proxy) -> list[str]:
    """The GPUs to train on, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    from kwsearch.proxy import device_of

    if device_of(proxy).type != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def slots(proxy: Proxy, nbytes: Callable[[], int]) -> int:
    """How many trials fit at a time: on GPUs by the memory of one, on a CPU by its threads.

    nbytes: the memory of a trial, asked only if there is a GPU.
    """
    import torch

    devices = gpus(proxy)
    if devices:
        need = nbytes() + _CONTEXT
        free = [torch.cuda.mem_get_info(i)[0] for i in range(len(devices))]
        return fitting(free, need)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // (proxy.threads or cores or 1), 1)


def fitting(free: list[int], need: int) -> int:
    """Trials of `need` bytes on devices of `free` bytes, taken in turns: as many on each as fit
    the fullest, nine tenths of it; at least one each.
    """
    return max(int(min(free) * 0.9) // need, 1) * len(free)
