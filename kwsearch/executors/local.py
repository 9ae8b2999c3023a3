"""Trials in processes of this machine: one spawned worker per slot, kept from job to job."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

from kwsearch.executors import Cancelled, Event, Failed, Finished, Job, Lost, Started
from kwsearch.executors.work import answer, packed, unpacked

# Seconds between SIGTERM and SIGKILL.
GRACE = 1.0
# Seconds between two looks at whether the other side lives. Pipes tell it at once, unless a
# process that was forked meanwhile (of a DataLoader, say) holds them open.
LOOK = 0.5


class Pinned(NamedTuple):
    """What a worker process has for life."""

    threads: int | None
    device: str | None


class LocalExecutor:
    """Runs up to `slots` jobs at a time, each in its own process; for use from one thread.

    A worker starts with the first job of its slot, serves the later ones, and is replaced after it
    died, was cancelled, or has other threads or another device than its next job. Slot i has
    devices[i % len(devices)]; the threads and the device of a job come first.
    """

    def __init__(self, slots: int, threads: int | None = None, devices: Sequence[str] = ()) -> None:
        if slots < 1:
            raise ValueError(f"slots {slots}: there must be at least 1")
        self._slots = [
            _Slot(Pinned(threads, devices[i % len(devices)] if devices else None))
            for i in range(slots)
        ]
        # Before multiprocessing's own, which would wait for idle workers for ever.
        atexit.register(self.close)

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Jobs at a time."""
        return len(self._slots)

    @property
    def running(self) -> int:
        """Jobs whose last event wait has not given yet."""
        return sum(slot.job is not None for slot in self._slots)

    def submit(self, job: Job) -> None:
        """Start a job; ValueError if every slot is taken."""
        idle = [slot for slot in self._slots if slot.job is None]
        if not idle:
            raise ValueError(f"trial {job.trial}: all {self.capacity} slots are taken")
        next((slot for slot in idle if slot.has_worker_for(job)), idle[0]).run(job)

    def wait(self, timeout: float | None) -> list[Event]:
        """At least one event, in order per job; none after timeout seconds or if nothing runs."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            busy = [slot for slot in self._slots if slot.job is not None]
            events = [event for slot in busy for event in slot.events()]
            left = deadline - time.monotonic()
            if events or not busy or left <= 0:
                return events
            sources = [source for slot in busy for source in slot.sources()]
            connection.wait(sources, min(left, LOOK))

    def cancel(self, trial: int) -> None:
        """Stop the job of this trial, if any: Cancelled comes, or its end if that was faster."""
        for slot in self._slots:
            if slot.job is not None and slot.job.trial == trial:
                slot.cancel()

    def finish(self) -> None:
        """Nothing to do: workers end with `close`."""

    def close(self) -> None:
        """End all workers now; what was running gives no more events."""
        for slot in self._slots:
            slot.terminate()
        for slot in self._slots:
            slot.clear()


class _Slot:
    """A place for one job, with the worker that serves it."""

    def __init__(self, pinned: Pinned) -> None:
        self.job: Job | None = None
        self._pinned = pinned
        self._worker: _Worker | None = None
        self._cancelled = False

    def _pinned_for(self, job: Job) -> Pinned:
        return Pinned(
            self._pinned.threads if job.threads is None else job.threads,
            self._pinned.device if job.device is None else job.device,
        )

    def has_worker_for(self, job: Job) -> bool:
        return (
            self._worker is not None
            and self._worker.pinned == self._pinned_for(job)
            and self._worker.exitcode is None
        )

    def run(self, job: Job) -> None:
        arguments = pickle.dumps(job.arguments)
        if not self.has_worker_for(job):
            self.clear()
            self._worker = _Worker(self._pinned_for(job))
        assert self._worker is not None
        self.job, self._cancelled = job, False
        # To a worker that died this moment: then the job is lost, as events() will find.
        with suppress(BrokenPipeError):
            plain = replace(job, arguments={}, threads=self._worker.pinned.threads)
            self._worker.jobs.send((plain, arguments))

    def sources(self) -> tuple[Connection, int]:
        """What is ready when there may be events."""
        assert self._worker is not None
        return self._worker.answers, self._worker.process.sentinel

    def events(self) -> list[Event]:
        """What the job has given since the last call."""
        assert self.job is not None
        assert self._worker is not None
        job, worker, found = self.job, self._worker, list[Event]()
        # Looked up before reading: of a worker that is dead now, all it ever sent can be read.
        dead = worker.exitcode is not None
        try:
            while self.job is not None and worker.answers.poll():
                event = unpacked(job, worker.answers.recv_bytes())
                found.append(event)
                if isinstance(event, (Finished, Failed)):
                    self.job = None
        except (EOFError, OSError):  # Closed, perhaps in the middle of a message.
            worker.end()
            dead = True
        if dead and self.job is not None:
            end = (job.trial, job.attempt)
            found.append(Cancelled(*end) if self._cancelled else Lost(*end, worker.obituary()))
            self.job = None
        return found

    def cancel(self) -> None:
        assert self._worker is not None
        self._cancelled = True
        self._worker.end()

    def terminate(self) -> None:
        if self._worker is not None:
            self._worker.process.terminate()

    def clear(self) -> None:
        """No job and no worker."""
        if self._worker is not None:
            self._worker.end()
            self._worker.jobs.close()
            self._worker.answers.close()
        self.job = self._worker = None


class _Worker:
    """The driver's side of a process."""

    def __init__(self, pinned: Pinned) -> None:
        context = multiprocessing.get_context("spawn")
        jobs, self.jobs = context.Pipe(duplex=False)
        self.answers, answers = context.Pipe(duplex=False)
        self.pinned = pinned
        # Not a daemon: those may not have children, as a DataLoader wants.
        self.process = context.Process(
            target=_work, args=(jobs, answers, pinned, os.getpid()), daemon=False
        )
        # Blocked from its first moment until it is ignored: Ctrl-C goes to the whole group, and
        # imports take seconds. The tracker unblocks SIGINT when it starts, so it starts first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        jobs.close()
        answers.close()

    @property
    def exitcode(self) -> int | None:
        """None while it lives."""
        return self.process.exitcode

    def end(self) -> None:
        """SIGTERM, and SIGKILL if that was not enough."""
        self.process.terminate()
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()

    def obituary(self) -> str:
        """How it died."""
        code = self.exitcode
        assert code is not None
        if code < 0:
            return f"worker {self.process.pid} was killed by {signal.Signals(-code).name}"
        return f"worker {self.process.pid} ended with exit code {code}"


# From here on: in the worker.


def _work(jobs: Connection, answers: Connection, pinned: Pinned, driver: int) -> None:
    """Serve jobs until the driver is gone. What they print is no part of its result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    if pinned.threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(pinned.threads)
    if pinned.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = pinned.device
    outbox = _Outbox(answers)
    with redirect_stdout(sys.stderr), suppress(EOFError):
        while True:
            job, arguments = jobs.recv()
            outbox.send(packed(job, Started(job.trial, job.attempt, os.getpid())))
            outbox.send(_answer(job, arguments, outbox))
            outbox.empty()


def _end_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(LOOK)
    os._exit(1)


def _answer(job: Job, arguments: bytes, outbox: _Outbox) -> bytes:
    """Do the job: the packed Finished or Failed."""
    return packed(
        job, answer(job, lambda: pickle.loads(arguments), lambda e: outbox.send(packed(job, e)))
    )


class _Outbox:
    """Messages to the driver: written as they come while the pipe has room, kept when not.

    Written by the caller, not by a thread: what was sent outlives a SIGKILL.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._room = select.poll()
        self._room.register(pipe.fileno(), select.POLLOUT)
        self._kept: deque[bytes] = deque()

    def send(self, message: bytes) -> None:
        """Never blocks with a message below PIPE_BUF (4 KiB): room is room for that much."""
        self._kept.append(message)
        while self._kept and self._room.poll(0):
            self._write()

    def empty(self) -> None:
        """Write all that is left, however long the driver takes to read it."""
        while self._kept:
            self._write()

    def _write(self) -> None:
        try:
            self._pipe.send_bytes(self._kept.popleft())
        except BrokenPipeError:  # The driver is gone.
            os._exit(1)
