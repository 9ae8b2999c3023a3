"""Trials as tasks of Ray, on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kwsearch.executors import (
    Cancelled,
    Event,
    Executor,
    Finished,
    Job,
    Lost,
    Reported,
    Started,
)
from tests.kwsearch import test_executors
from tests.kwsearch.test_executors import drain, failure_of, job, pid_of, run, value_of

pytest.importorskip("ray", reason="Ray is not installed")

from kwsearch.executors.ray import RayExecutor

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """On this machine, with room for two jobs."""
    with RayExecutor(2, cpus=0.5) as found:
        yield found


def test_events_come_in_order_with_trial_and_attempt(executor: Executor) -> None:
    events = run(executor, replace(job(test_executors.count, trial=7, to=3), attempt=2))
    assert events == [
        Started(7, 2, pid_of(events)),
        Reported(7, 2, 0, 0.0),
        Reported(7, 2, 1, 0.5),
        Reported(7, 2, 2, 1.0),
        Finished(7, 2, 1.5),
    ]
    assert pid_of(events) != os.getpid()


def test_two_jobs_run_at_once_and_a_third_is_refused(executor: Executor, tmp_path: Path) -> None:
    one, other = tmp_path / "1", tmp_path / "2"
    assert (executor.capacity, executor.running) == (2, 0)
    executor.submit(job(test_executors.meet, trial=1, mine=one, other=other))
    executor.submit(job(test_executors.meet, trial=2, mine=other, other=tmp_path / "3"))
    with pytest.raises(ValueError, match="trial 3: all 2 slots are taken"):
        executor.submit(job(test_executors.count, trial=3, to=0))
    assert {type(event) for event in executor.wait(60)} == {Started}
    (tmp_path / "3").touch()
    assert {event.trial for event in drain(executor) if isinstance(event, Finished)} == {1, 2}
    assert executor.wait(None) == []


def test_reports_do_not_wait_for_a_driver_that_does_not_read(
    executor: Executor, tmp_path: Path
) -> None:
    executor.submit(job(test_executors.count_unread, to=500, done=tmp_path / "done"))
    test_executors.appearance(tmp_path / "done")
    _, *reports, last = drain(executor)
    assert reports == [Reported(0, 1, step, step / 2) for step in range(500)]
    assert last == Finished(0, 1, None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError("of 2 GiB"), "memory", "MemoryError: of 2 GiB"),
        (FloatingPointError("loss is nan"), "diverged", "FloatingPointError: loss is nan"),
        (ValueError("first\nsecond"), "error", "ValueError: first"),
        (SystemExit(3), "error", "SystemExit: 3"),
    ],
)
def test_what_the_function_raises_is_a_failure_of_its_kind(
    executor: Executor, error: BaseException, kind: str, message: str
) -> None:
    failed = failure_of(run(executor, job(test_executors.fail, error=error)))
    assert (failed.kind, failed.message) == (kind, message)
    assert "in fail\n    raise error\n" in failed.details


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (job("no_such_module:f"), "ModuleNotFoundError: No module named 'no_such_module'"),
        (job(test_executors.answer_a_function), "answer_a_function.<locals>.<lambda>"),
        (job(test_executors.answer_what_only_the_worker_has), "named 'only_in_the_worker'"),
    ],
    ids=lambda value: value.function if isinstance(value, Job) else "",
)
def test_what_cannot_pass_is_a_failure(executor: Executor, job: Job, message: str) -> None:
    assert message in failure_of(run(executor, job)).message


def test_a_process_that_dies_is_lost_and_the_next_job_runs(executor: Executor) -> None:
    events = run(executor, job(test_executors.die, trial=3, number=signal.SIGKILL))
    assert isinstance(events[-1], Lost)
    assert events[-1].message.startswith("WorkerCrashedError: ")
    assert isinstance(run(executor, job(test_executors.leave, code=5))[-1], Lost)
    assert value_of(run(executor, job(test_executors.interrupt))) == 1.0
    assert value_of(run(executor, job(test_executors.count, to=2))) == 1.0


def test_a_cancelled_job_ends(executor: Executor) -> None:
    executor.submit(job(test_executors.hold, trial=4))
    found: list[Event] = []
    while not any(isinstance(event, Reported) for event in found):
        found += executor.wait(60)
    executor.cancel(4)
    assert drain(executor) == [Cancelled(4, 1)]
    executor.cancel(4)  # nothing to do


def test_a_node_with_another_version_is_said(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kwsearch.executors import ray

    home = ray._Home.of_driver()
    monkeypatch.setattr(ray._Home, "of_driver", lambda: replace(home, version="9.9"))
    failed = failure_of(run(executor, job(test_executors.count, to=0)))
    assert "the driver 9.9: install the same on all machines" in failed.message
