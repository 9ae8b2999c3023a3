"""What a worker does with a job, wherever it runs."""

from __future__ import annotations

import importlib
import pickle
import platform
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from kwsearch.executors import Event, Failed, Finished, Job, Reported


def answer(
    job: Job, arguments: Callable[[], dict[str, Any]], send: Callable[[Event], object]
) -> Finished | Failed:
    """Do the job. arguments: read here, where they may turn out to be unreadable. send: is given
    what the function reports.
    """

    def report(step: int, value: float) -> None:
        send(Reported(job.trial, job.attempt, int(step), float(value)))

    try:
        module, _, name = job.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        # It came too early for the environment if the driver's main module imports it.
        torch: Any = sys.modules.get("torch")
        if job.threads is not None and torch is not None:
            torch.set_num_threads(job.threads)
        return Finished(job.trial, job.attempt, function(report, **arguments()))
    except BaseException as error:  # SystemExit, too: the worker stays.
        return failed(job, error)


def other_version(of_driver: str | None) -> str:
    """What is wrong if this machine has another kwsearch than the driver; nothing if not."""
    own = version("kwsearch")
    if own == of_driver:
        return ""
    where = f"{platform.node()} has kwsearch {own}, the driver {of_driver}"
    return f"{where}: install the same on all machines"


def packed(job: Job, event: Event) -> bytes:
    """To be sent to the driver; in place of an answer that cannot be, its failure."""
    try:
        return pickle.dumps(event)
    except Exception as error:
        return pickle.dumps(failed(job, error))


def unpacked(job: Job, message: bytes) -> Event:
    """What was sent; the class of an answer may exist in the worker only, which is a failure."""
    try:
        event: Event = pickle.loads(message)
    except Exception as error:
        return failed(job, error)
    return event


def failed(job: Job, error: BaseException) -> Failed:
    """Of what a job raised."""
    lines = str(error).splitlines()
    name = type(error).__name__
    return Failed(
        job.trial,
        job.attempt,
        _kind_of(error),
        f"{name}: {lines[0]}" if lines else name,
        "".join(traceback.format_exception(error)),
    )


def _kind_of(error: BaseException) -> Literal["memory", "diverged", "error"]:
    """The kind of Failed. torch's errors are told by name and text: it may not be imported."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    ):
        return "memory"
    return "diverged" if isinstance(error, ArithmeticError) else "error"
