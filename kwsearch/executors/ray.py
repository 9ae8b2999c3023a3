"""Trials as tasks of a Ray cluster: one that is there, or one on this machine.

A task is a generator of its events, which Ray streams to the driver in order. Ray retries nothing:
a task that is lost with its node or its process is an event, and the driver decides.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from kwsearch.executors import (
    Cancelled,
    Event,
    ExecutorError,
    Failed,
    Finished,
    Job,
    Lost,
    Started,
)
from kwsearch.executors.work import answer, failed, other_version, packed, unpacked
from kwsearch.wording import one_line

# Before Ray is loaded: nothing is reported to anybody.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

try:
    import ray
    from ray.exceptions import (
        NodeDiedError,
        OutOfMemoryError,
        RayError,
        RayTaskError,
        TaskCancelledError,
    )
except ImportError:
    raise ExecutorError('executor ray: Ray is missing; pip install "kwsearch[ray]"') from None

# Seconds between two looks at how many trials the cluster has room for.
_LOOK = 1.0
# Seconds that a cluster has to accept a connection.
_PATIENCE = 10.0


class RayExecutor:
    """Runs up to `slots` jobs at a time, None for as many as the cluster has room for.

    cpus, gpus: that Ray keeps for each, fractions too. address: of a cluster; None is
    $RAY_ADDRESS, and without that a cluster on this machine. A process that is connected to one
    already stays so. Raises ExecutorError if there is no
    cluster, or if none of its nodes can ever run a job.
    """

    def __init__(
        self,
        slots: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        address: str | None = None,
    ) -> None:
        if gpus > 1 and gpus != int(gpus):
            raise ExecutorError(
                f"search.resources.gpus {gpus:g}: allowed are whole GPUs, or a part of one"
            )
        self._slots, self._cpus, self._gpus = slots, cpus, gpus
        self._jobs: dict[int, tuple[Job, Any]] = {}
        self._seen = (0, -_LOOK)  # room, and when
        self._connected = not ray.is_initialized()
        if self._connected:
            _connect(address)
        if not self._room():
            message = self._impossible()
            self.close()
            raise ExecutorError(message)
        self._task = ray.remote(_train)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Jobs at a time; at least 1, which then waits for a node."""
        if time.monotonic() - self._seen[1] > _LOOK:
            self._seen = self._room(), time.monotonic()
        return self._places

    @property
    def _places(self) -> int:
        """As it was when we looked last: who saw room may submit."""
        room = self._seen[0]
        return max(room if self._slots is None else min(self._slots, room), 1)

    @property
    def running(self) -> int:
        """Jobs whose last event wait has not given yet."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Start a job, as soon as Ray has room for it; ValueError if as many as capacity run."""
        if self.running >= self._places:
            raise ValueError(f"trial {job.trial}: all {self._places} slots are taken")
        task = self._task.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_retries=0,
            num_returns="streaming",
            name=f"kwsearch trial {job.trial}",
        )
        self._jobs[job.trial] = job, task.remote(job, _Home.of_driver())

    def wait(self, timeout: float | None) -> list[Event]:
        """At least one event, in order per job; none after timeout seconds or if nothing runs."""
        if not self._jobs:
            return []
        tasks = [task for _, task in self._jobs.values()]
        ready, _ = ray.wait(tasks, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        found: list[Event] = []
        for trial, (_, task) in [*self._jobs.items()]:
            if task in ready:
                found += self._events(trial)
        return found

    def cancel(self, trial: int) -> None:
        """Stop the job of this trial, if any: Cancelled comes, or its end if that was faster."""
        if trial in self._jobs:
            ray.cancel(self._jobs[trial][1], force=True)

    def finish(self) -> None:
        """Nothing to do: workers end with `close`."""

    def close(self) -> None:
        """End all workers now; what was running gives no more events."""
        for trial in self._jobs:
            self.cancel(trial)
        self._jobs.clear()
        if self._connected:
            ray.shutdown()

    def _events(self, trial: int) -> Iterator[Event]:
        """What has arrived; the last one of a job ends it."""
        job, task = self._jobs[trial]
        while True:
            event = _next(job, task)
            yield event
            if isinstance(event, (Finished, Failed, Lost, Cancelled)):
                del self._jobs[trial]
                return
            if not ray.wait([task], timeout=0)[0]:
                return

    def _room(self) -> int:
        """Jobs that the nodes can run at a time, if nothing else runs on them."""
        return sum(map(self._fits, _nodes()))

    def _fits(self, node: dict[str, float]) -> int:
        cpu, gpu = node.get("CPU", 0.0), node.get("GPU", 0.0)
        fits = _times(self._cpus, cpu) if self._cpus else None
        if self._gpus:
            # A task has a part of one GPU, or whole ones.
            own = int(gpu) * _times(self._gpus, 1) if self._gpus < 1 else _times(self._gpus, gpu)
            fits = own if fits is None else min(fits, own)
        return int(cpu) if fits is None else fits

    def _impossible(self) -> str:
        nodes = ", ".join(
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in _nodes()
        )
        return (
            f"a trial asks for {self._cpus:g} CPUs and {self._gpus:g} GPUs, which no node of the "
            f"Ray cluster has: its nodes have {nodes or 'nothing'}; lower search.resources"
        )


@dataclass(frozen=True)
class _Home:
    """Of the driver: where relative paths and own code are, as far as a node has them, too."""

    folder: str
    paths: tuple[str, ...]
    version: str

    @classmethod
    def of_driver(cls) -> _Home:
        return cls(os.getcwd(), tuple(map(os.path.abspath, sys.path)), version("kwsearch"))

    def enter(self) -> None:
        with suppress(OSError):
            os.chdir(self.folder)
        sys.path += [path for path in self.paths if path not in sys.path and os.path.exists(path)]


def _connect(address: str | None) -> None:
    """To a cluster of this or other machines."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    where = address or os.environ.get("RAY_ADDRESS")
    if where is None:
        options["include_dashboard"] = False
    try:
        if where is not None:
            _reach(where)
        ray.init(address, **options)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise ExecutorError(
            f"no Ray cluster at {where or 'this machine'}: {one_line(error)}; `ray start --head` "
            "starts one, and --address says where"
        ) from None
    # What befell a task is an event, and standard output is for results.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _reach(address: str) -> None:
    """Raise OSError at once where nobody listens, for which Ray waits for minutes."""
    if address.startswith("ray://"):
        raise ValueError("Ray Client does not stream results; give HOST:PORT, on a node of it")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _PATIENCE).close()


def _times(part: float, whole: float) -> int:
    """How often it fits, whatever 0.6 / 0.2 is in binary."""
    return int(whole / part + 1e-6)


def _nodes() -> list[dict[str, float]]:
    """What each node has that lives."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _next(job: Job, task: Any) -> Event:
    """The next event of a job of which something is ready."""
    end = job.trial, job.attempt
    try:
        message = ray.get(next(task))
    except StopIteration:
        return Lost(*end, "its task ended without an answer")
    except TaskCancelledError:
        return Cancelled(*end)
    except OutOfMemoryError as error:
        return failed(job, MemoryError(_line(error)))
    except RayTaskError as error:  # not of the function, whose errors are events: of the way here
        return failed(job, error.cause if isinstance(error.cause, Exception) else error)
    except NodeDiedError as error:
        return Lost(*end, _line(error), suspect=False)
    except RayError as error:
        return Lost(*end, _line(error))
    return unpacked(job, message)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


# From here on: in the worker.


def _train(job: Job, home: _Home) -> Iterator[bytes]:
    """The events of a job, packed."""
    for event in _events_of(job, home):
        yield packed(job, event)


def _events_of(job: Job, home: _Home) -> Iterator[Event]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C of the driver's terminal is not for it
    yield Started(job.trial, job.attempt, os.getpid())
    if wrong := other_version(home.version):
        yield failed(job, RuntimeError(wrong))
        return
    home.enter()
    if job.threads is not None:  # before torch is imported, as on one machine
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job.threads)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def work() -> None:
        events.put(answer(job, lambda: job.arguments, events.put))

    # A generator cannot yield from within the function that reports.
    threading.Thread(target=work, daemon=True).start()
    while True:
        event = events.get()
        yield event
        if isinstance(event, (Finished, Failed)):
            return
