"""Measuring: interleaved rounds, quartiles, the peak memory of one step, the machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

LEAST_ROUNDS = 5
WARM_UP = 0.1  # of the seconds to measure for; at least a round

# One pool that only grows: after the first step no allocation costs page faults.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
# What decides times from outside the command line.
_ENVIRONMENT = (
    "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "PYTORCH_",
    "TRITON_",
)  # fmt: skip

Step = Callable[[], object]
Answer = TypeVar("Answer")


@dataclass
class Times:
    """One step's seconds, by round: by the clock, and of this process's cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def apart(function: Callable[..., Answer], *arguments: object) -> Answer:
    """What a function of a module returns or raises in a fresh process, with as many threads.

    Memory that this process has freed would spare some forms their page faults. Raises
    ChildProcessError where the process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    given = (sender, torch.get_num_threads(), function, arguments)
    process = context.Process(target=_answer, args=given, daemon=True)
    process.start()
    sender.close()
    try:
        returned, found = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(
            f"its process ended with {process.exitcode}; was there enough memory?"
        ) from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if not returned:
        raise found
    answer: Answer = found
    return answer


def _answer(
    sender: Connection, threads: int, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:
        sender.send((False, error))
    except KeyboardInterrupt:
        pass  # the parent has it, too


def turns(names: Sequence[str], round_: int) -> list[str]:
    """The order in a round: it rotates, and every other turn of it runs backwards."""
    turn, first = divmod(round_, len(names))
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    rounds: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Times]:
    """Time all steps in every round, in turns, in this process.

    seconds: to measure for, by which the number of rounds is chosen unless it is given; never
    less than 5. Rounds to warm up are not counted. No garbage is collected in a step.
    """
    device = torch.device(device)
    names = list(steps)
    times = {name: Times() for name in names}
    begun, warm = time.perf_counter(), 0
    while True:
        started = time.perf_counter()
        _round(steps, turns(names, warm), device, None)
        warm += 1
        if time.perf_counter() - begun >= WARM_UP * seconds or warm == rounds:
            break
    if rounds is None:
        took = time.perf_counter() - started
        rounds = max(LEAST_ROUNDS, round(seconds / max(took, 1e-6)))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            _round(steps, turns(names, round_), device, times)
    finally:
        if collecting:
            gc.enable()
    return times


def _round(
    steps: Mapping[str, Step],
    order: Sequence[str],
    device: torch.device,
    times: dict[str, Times] | None,
) -> None:
    clock = clock_of(device)
    for name in order:
        step = steps[name]
        wall, cpu = clock(), time.process_time()
        step()
        wall, cpu = clock() - wall, time.process_time() - cpu
        if times is not None:
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """A clock, in seconds, that waits until all work given to the device is done."""
    if torch.device(device).type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of at least 2 values."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def peak_bytes(step: Step, device: torch.device | str = "cpu") -> int:
    """The most that torch's allocator holds at a time during `step`, above what it held before.

    What libraries allocate past torch (oneDNN's scratch memory) is not seen. Memory that is kept
    between steps counts only where `step` is the first one to need it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    # One event for every allocation, and one of negative size for its end.
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    sizes = [int(event.nbytes()) for event in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes, initial=0))


def record(device: str, command: str) -> dict[str, Any]:
    """What every result is written with: the machine, versions and the command line."""
    return {
        "command": command,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "malloc": malloc(),
        "environment": environment(),
    }


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The processor, its cores and how many of them are ours, the GPU that is used, the system."""
    device = torch.device(device)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of what decides a time."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "python": platform.python_version(),
        "kwsearch": version("kwsearch"),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `-dirty` if it was changed."""
    home = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(home), *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def malloc() -> str:
    """`tuned` where all of `TUNED_MALLOC` is in force, `default`, or else `custom`."""
    given = environment()
    if TUNED_MALLOC.items() <= given.items():
        return "tuned"
    custom = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in given)
    return "custom" if custom else "default"


def environment() -> dict[str, str]:
    """The variables that decide times: of malloc, of threads, of CUDA."""
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)
    }


def can_tune_malloc() -> bool:
    """Whether malloc is glibc's, which reads `TUNED_MALLOC`."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
