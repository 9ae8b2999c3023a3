"""One training step of a plan on random images: what it takes in time and memory, measured here."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kwsearch.recipe import Proxy, Recipe

if TYPE_CHECKING:
    import torch

    from kwlayers.plan import Plan

_STEPS = 5
# What a process holds on a GPU besides torch's own memory: the CUDA context.
_CONTEXT = 600 * 10**6


class TrainStep:
    """A network with random images of the proxy's batch size. nbytes: peak of its first step.

    Those are its weights, gradients and the optimizer's state, and what the step holds on top;
    as torch's allocator counts, exact and the same every time.
    trust: whether the network may be the user's own code.
    """

    def __init__(self, recipe: Recipe, plan: Plan, proxy: Proxy, trust: bool = False) -> None:
        import torch

        from kwlayers.convert import convert_
        from kwlayers.ops.workspace import Workspace
        from kwsearch.proxy import device_of, optimizer_of
        from kwsearch.resolve import create_model, input_of
        from kwsearch.timing import peak_bytes

        if proxy.threads is not None:
            torch.set_num_threads(proxy.threads)
        self.device = device_of(proxy)
        channels, height, width = input_of(recipe)
        if proxy.resolution is not None:
            height = width = proxy.resolution
        with torch.random.fork_rng():
            model = create_model(recipe, trust=trust)
            self.model = convert_(model, plan).to(self.device).train()
            self.x = torch.randn(proxy.batch_size, channels, height, width, device=self.device)
        self.optimizer = optimizer_of(self.model, proxy)
        Workspace.clear()  # it counts, whoever had it before
        held = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.nbytes = held + peak_bytes(self, self.device)

    def __call__(self) -> None:
        import torch
        import torch.nn.functional as F

        self.optimizer.zero_grad(set_to_none=True)
        out = self.model(self.x)
        labels = torch.arange(len(self.x), device=self.device) % out.shape[-1]
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
