"""What the driver of a study asks of whatever runs its trials: jobs in, events out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Job:
    """One attempt of one trial.

    function: "package.module:function", called in the worker as function(report, **arguments);
    report(step, value) passes progress on and never blocks. Its answer is the value of Finished.
    attempt: counted from 1. threads: CPU threads of the worker, None leaves torch's own.
    device: CUDA_VISIBLE_DEVICES of the worker, None leaves it.
    """

    trial: int
    attempt: int
    function: str
    arguments: dict[str, Any]
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Event:
    """What became of a job. The last one of a job is Finished, Failed, Lost or Cancelled."""

    trial: int
    attempt: int


@dataclass(frozen=True)
class Started(Event):
    """The worker has taken up the job."""

    pid: int


@dataclass(frozen=True)
class Reported(Event):
    """Progress."""

    step: int
    value: float


@dataclass(frozen=True)
class Finished(Event):
    """The answer of the function, a float as a rule."""

    value: Any


@dataclass(frozen=True)
class Failed(Event):
    """The function raised: out of memory, an ArithmeticError, or anything else.

    message: "TypeName: first line". details: the traceback as text.
    """

    kind: Literal["memory", "diverged", "error"]
    message: str
    details: str


@dataclass(frozen=True)
class Lost(Event):
    """The worker ended in the middle of the job; the message says how. suspect: whether the job
    itself may be why, as it is not where a node is taken back.
    """

    message: str
    suspect: bool = True


@dataclass(frozen=True)
class Cancelled(Event):
    """The job was stopped by cancel."""


class Executor(Protocol):
    """Runs jobs and decides nothing."""

    @property
    def capacity(self) -> int:
        """Jobs at a time."""

    @property
    def running(self) -> int:
        """Jobs whose last event wait has not given yet."""

    def submit(self, job: Job) -> None:
        """Start a job; ValueError if as many as capacity are running."""

    def wait(self, timeout: float | None) -> list[Event]:
        """At least one event, in order per job; none after timeout seconds or if nothing runs."""

    def cancel(self, trial: int) -> None:
        """Stop the job of this trial, if any: Cancelled comes, or its end if that was faster."""

    def finish(self) -> None:
        """No more jobs will come: workers that were started elsewhere may go home."""

    def close(self) -> None:
        """End all workers now; what was running gives no more events."""


class ExecutorError(ValueError):
    """Where trials should run is not there, or cannot run them; the user can mend it."""
