"""Executors: what becomes of jobs in real processes, whoever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kwsearch.executors import (
    Cancelled,
    Event,
    Executor,
    Failed,
    Finished,
    Job,
    Lost,
    Reported,
    Started,
)
from kwsearch.executors.local import LocalExecutor

Report = Callable[[int, float], None]
# Seconds after which something hangs; nothing here takes a tenth of it.
DEADLINE = 60.0

# What workers do. They import this file as a module of its own, from its folder.


def count(report: Report, to: int) -> float:
    for step in range(to):
        report(step, step / 2)
    return to / 2


def appearance(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


def wait_for(report: Report, path: Path, then: float) -> float:
    appearance(path)
    return then


def meet(report: Report, mine: Path, other: Path) -> str | None:
    mine.touch()
    appearance(other)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def count_unread(report: Report, to: int, done: Path) -> None:
    count(report, to)
    done.touch()


def fail(report: Report, error: BaseException) -> None:
    raise error


def answer_a_function(report: Report) -> object:
    return lambda: 0


def answer_what_only_the_worker_has(report: Report) -> object:
    module = ModuleType("only_in_the_worker")
    sys.modules[module.__name__] = module
    exec("class Answer: pass", vars(module))
    return module.Answer()


def die(report: Report, number: int) -> None:
    count(report, 100)
    os.kill(os.getpid(), number)
    time.sleep(DEADLINE)


def leave(report: Report, code: int) -> None:
    os._exit(code)


def fork_and_die(report: Report, until: Path, too_late: Path) -> None:
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    # The child keeps every pipe of its parent open, as the workers of a DataLoader do.
    try:
        appearance(until)
    except TimeoutError:
        too_late.touch()
    finally:
        os._exit(0)


def have_a_child(report: Report) -> int | None:
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    return child.exitcode


def interrupt(report: Report) -> float:
    os.kill(os.getpid(), signal.SIGINT)
    return 1.0


def hold(report: Report, deaf: bool = False) -> None:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(0, 0.0)
    time.sleep(DEADLINE)


def pinned(report: Report) -> tuple[str | None, ...]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return tuple(os.environ.get(name) for name in names)


def threads_of_torch(report: Report, then: int) -> int:
    import torch

    found = torch.get_num_threads()
    torch.set_num_threads(then)
    return found


def allocate(report: Report, size: int) -> None:
    import torch

    torch.empty(size, dtype=torch.uint8)


def out_of_memory_without_a_word(report: Report) -> None:
    import torch

    raise torch.OutOfMemoryError


# What the driver does.


def job(function: Callable[..., Any] | str, trial: int = 0, **arguments: Any) -> Job:
    name = function if isinstance(function, str) else f"test_executors:{function.__name__}"
    return Job(trial, 1, name, arguments)


def drain(executor: Executor) -> list[Event]:
    """All events until nothing runs."""
    found = list[Event]()
    while executor.running:
        events = executor.wait(DEADLINE)
        assert events, "nothing happened"
        found += events
    return found


def run(executor: Executor, job: Job) -> list[Event]:
    executor.submit(job)
    return drain(executor)


def pid_of(events: list[Event]) -> int:
    assert isinstance(events[0], Started)
    return events[0].pid


def value_of(events: list[Event]) -> Any:
    assert isinstance(events[-1], Finished)
    return events[-1].value


def failure_of(events: list[Event]) -> Failed:
    assert isinstance(events[-1], Failed)
    return events[-1]


pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def executor(importable: None) -> Iterator[LocalExecutor]:
    """Two slots; every test gives them back idle."""
    with LocalExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def with_three_threads(importable: None) -> Iterator[LocalExecutor]:
    with LocalExecutor(1, threads=3) as executor:
        yield executor


def test_events_come_in_order_with_trial_and_attempt(executor: Executor) -> None:
    events = run(executor, replace(job(count, trial=7, to=3), attempt=2))
    assert events == [
        Started(7, 2, pid_of(events)),
        Reported(7, 2, 0, 0.0),
        Reported(7, 2, 1, 0.5),
        Reported(7, 2, 2, 1.0),
        Finished(7, 2, 1.5),
    ]
    assert pid_of(events) != os.getpid()


def test_two_slots_run_at_once_and_a_third_job_is_refused(
    executor: Executor, tmp_path: Path
) -> None:
    one, other = tmp_path / "1", tmp_path / "2"
    assert (executor.capacity, executor.running) == (2, 0)
    executor.submit(job(meet, trial=1, mine=one, other=other))
    assert executor.running == 1
    # Either ends only if the other has begun.
    executor.submit(job(meet, trial=2, mine=other, other=tmp_path / "3"))
    assert executor.running == 2
    with pytest.raises(ValueError, match="trial 3: all 2 slots are taken"):
        executor.submit(job(count, trial=3, to=0))
    (tmp_path / "3").touch()
    events = drain(executor)
    assert {event.trial for event in events if isinstance(event, Finished)} == {1, 2}


def test_there_is_at_least_one_slot() -> None:
    with pytest.raises(ValueError, match="slots 0: there must be at least 1"):
        LocalExecutor(0)


def test_wait_gives_nothing_after_its_timeout_or_when_nothing_runs(
    executor: Executor, tmp_path: Path
) -> None:
    assert executor.wait(None) == []
    executor.submit(job(wait_for, path=tmp_path / "go", then=2.5))
    assert [type(event) for event in executor.wait(DEADLINE)] == [Started]
    assert executor.wait(0) == []
    assert executor.wait(0.1) == []
    (tmp_path / "go").touch()
    assert value_of(drain(executor)) == 2.5


def test_a_worker_serves_many_jobs_whatever_became_of_them(executor: Executor) -> None:
    jobs = [job(count, to=1), job(fail, error=ValueError("no")), job(interrupt), job(count, to=1)]
    assert len({pid_of(run(executor, job)) for job in jobs}) == 1


def test_a_job_may_have_processes_of_its_own(executor: Executor) -> None:
    assert value_of(run(executor, job(have_a_child))) == 0


def test_reports_do_not_wait_for_a_driver_that_does_not_read(
    executor: Executor, tmp_path: Path
) -> None:
    # Ten times what fits into a pipe of 64 KiB at 100 bytes a report.
    number = 7000
    executor.submit(job(count_unread, to=number, done=tmp_path / "done"))
    appearance(tmp_path / "done")
    _, *reports, last = drain(executor)
    assert reports == [Reported(0, 1, step, step / 2) for step in range(number)]
    assert last == Finished(0, 1, None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), "memory", "MemoryError"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "memory",
            "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (FloatingPointError("loss is nan"), "diverged", "FloatingPointError: loss is nan"),
        (OverflowError("too large"), "diverged", "OverflowError: too large"),
        (RuntimeError("shapes differ"), "error", "RuntimeError: shapes differ"),
        (ValueError("first\nsecond"), "error", "ValueError: first"),
        (SystemExit(3), "error", "SystemExit: 3"),
    ],
)
def test_what_the_function_raises_is_a_failure_of_its_kind(
    executor: Executor, error: BaseException, kind: str, message: str
) -> None:
    failed = failure_of(run(executor, replace(job(fail, trial=-4, error=error), attempt=3)))
    assert (failed.trial, failed.attempt) == (-4, 3)
    assert (failed.kind, failed.message) == (kind, message)
    assert failed.details.startswith("Traceback")
    assert "in fail\n    raise error\n" in failed.details


def test_memory_that_torch_cannot_have_is_a_failure_of_memory(
    with_three_threads: Executor,
) -> None:
    # 2**60 bytes are more than an address space has.
    failed = failure_of(run(with_three_threads, job(allocate, size=2**60)))
    assert failed.kind == "memory", failed.message
    failed = failure_of(run(with_three_threads, job(out_of_memory_without_a_word)))
    assert (failed.kind, failed.message) == ("memory", "OutOfMemoryError")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (job("no_such_module:f"), "ModuleNotFoundError: No module named 'no_such_module'"),
        (job("test_executors:f"), "AttributeError: module 'test_executors' has no attribute 'f'"),
        (job(count), "TypeError: count() missing 1 required positional argument: 'to'"),
        (job(answer_a_function), "answer_a_function.<locals>.<lambda>"),
        (job(answer_what_only_the_worker_has), "No module named 'only_in_the_worker'"),
    ],
    ids=lambda value: value.function if isinstance(value, Job) else "",
)
def test_a_function_or_an_answer_that_cannot_pass_is_a_failure(
    executor: Executor, job: Job, message: str
) -> None:
    failed = failure_of(run(executor, job))
    assert failed.kind == "error"
    assert message in failed.message


def test_a_killed_worker_gives_its_reports_and_the_slot_works_on(executor: Executor) -> None:
    events = run(executor, job(die, trial=3, number=signal.SIGKILL))
    pid = pid_of(events)
    assert events[1:-1] == [Reported(3, 1, step, step / 2) for step in range(100)]
    assert events[-1] == Lost(3, 1, f"worker {pid} was killed by SIGKILL")
    events = run(executor, job(leave, code=5))
    assert events[-1] == Lost(0, 1, f"worker {pid_of(events)} ended with exit code 5")
    assert pid_of(events) != pid
    assert value_of(run(executor, job(count, to=2))) == 1.0


def test_a_worker_that_died_idle_is_replaced() -> None:
    with LocalExecutor(1) as executor:
        pid = pid_of(run(executor, job(count, to=1)))
        os.kill(pid, signal.SIGKILL)
        for process in multiprocessing.active_children():
            if process.pid == pid:
                process.join()
        assert pid_of(run(executor, job(count, to=1))) != pid


def test_a_worker_is_lost_though_its_child_lives_on(executor: Executor, tmp_path: Path) -> None:
    until, too_late = tmp_path / "until", tmp_path / "too late"
    executor.submit(job(fork_and_die, until=until, too_late=too_late))
    events = executor.wait(None)
    while not isinstance(events[-1], Lost):
        events = executor.wait(None)
    assert not too_late.exists()
    until.touch()
    assert value_of(run(executor, job(count, to=2))) == 1.0


@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf to SIGTERM"])
def test_a_cancelled_job_ends_and_the_slot_works_on(deaf: bool) -> None:
    with LocalExecutor(1) as executor:
        executor.submit(job(hold, trial=5, deaf=deaf))
        events = list[Event]()
        while not any(isinstance(event, Reported) for event in events):
            events += executor.wait(DEADLINE)
        executor.cancel(4)  # Does not run.
        assert executor.wait(0) == []
        executor.cancel(5)
        executor.cancel(5)
        assert executor.running == 1
        assert drain(executor) == [Cancelled(5, 1)]
        executor.cancel(5)
        assert value_of(run(executor, job(count, to=2))) == 1.0


def test_a_job_that_was_done_before_it_was_cancelled_is_finished(tmp_path: Path) -> None:
    with LocalExecutor(1) as executor:
        executor.submit(job(wait_for, path=tmp_path / "go", then=2.5))
        assert [type(event) for event in executor.wait(DEADLINE)] == [Started]
        (tmp_path / "go").touch()
        # All but the answer is read: the next that arrives is the answer.
        worker = executor._slots[0]._worker
        assert worker is not None
        assert worker.answers.poll(DEADLINE)
        executor.cancel(0)
        assert drain(executor) == [Finished(0, 1, 2.5)]
        assert value_of(run(executor, job(count, to=2))) == 1.0


def test_workers_ignore_sigint_from_their_first_moment() -> None:
    with LocalExecutor(1) as executor:
        before = multiprocessing.active_children()
        executor.submit(job(interrupt))
        (process,) = set(multiprocessing.active_children()) - set(before)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert value_of(drain(executor)) == 1.0


def test_threads_are_pinned_before_and_after_torch_is_imported(
    with_three_threads: Executor,
) -> None:
    # In the first job the environment does it. What a job changes is no matter of the next.
    assert value_of(run(with_three_threads, job(threads_of_torch, then=1))) == 3
    assert value_of(run(with_three_threads, job(threads_of_torch, then=1))) == 3
    assert value_of(run(with_three_threads, job(pinned)))[:2] == ("3", "3")


def test_slots_take_devices_in_turn_and_a_job_may_bring_its_own(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(3)]
    with LocalExecutor(3, devices=["0", "GPU-7"]) as executor:
        for i, mine in enumerate(files):
            executor.submit(job(meet, trial=i, mine=mine, other=files[i - 1]))
        values = {event.trial: event.value for event in drain(executor) if type(event) is Finished}
        assert values == {0: "0", 1: "GPU-7", 2: "0"}
        own = replace(job(pinned), threads=2, device="9")
        first = run(executor, own)
        assert value_of(first) == ("2", "2", "9")
        # Every job goes to a worker that has what it needs.
        assert value_of(run(executor, job(pinned)))[-1] == "GPU-7"
        assert pid_of(run(executor, own)) == pid_of(first)


def test_close_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    executor = LocalExecutor(2)
    assert value_of(run(executor, job(count, to=2))) == 1.0
    executor.submit(job(hold, trial=1))
    executor.submit(job(hold, trial=2))
    assert len(set(multiprocessing.active_children()) - before) == 2
    executor.close()
    assert set(multiprocessing.active_children()) == before
    assert executor.running == 0
    executor.close()


DRIVER = """
import sys
from kwsearch.executors import Job, Reported
from kwsearch.executors.local import LocalExecutor

if __name__ == "__main__":
    executor = LocalExecutor(2)
    executor.submit(Job(0, 1, "test_executors:count", {"to": 0}))
    executor.submit(Job(1, 1, "test_executors:hold", {}))
    events = []
    while executor.running == 2 or not any(isinstance(event, Reported) for event in events):
        events += executor.wait(None)
    print("one is idle, one holds", flush=True)
    if sys.argv[1] == "wait":
        executor.wait(None)
"""


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "forgets to close"])
def test_workers_end_with_their_driver(tmp_path: Path, killed: bool) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), "wait" if killed else "go"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "one is idle, one holds\n"
    if killed:
        driver.kill()
    # Workers have inherited stdout and stderr: these end when the last process has.
    try:
        assert driver.communicate(timeout=DEADLINE / 3) == ("", "")
    finally:
        driver.kill()
    assert driver.returncode == (-signal.SIGKILL if killed else 0)


def test_the_driver_s_side_imports_neither_torch_nor_optuna() -> None:
    code = "import sys, kwsearch.executors.local; print({'torch', 'optuna'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
