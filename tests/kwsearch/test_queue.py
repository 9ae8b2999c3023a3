"""Studies in real databases, with workers that pull their trials from it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from kwsearch import database
from kwsearch.database import Database, masked
from kwsearch.executors import Event, ExecutorError, Failed, Finished, Job, Lost, Started, queue
from kwsearch.executors.queue import QueueExecutor
from kwsearch.recipe import Proxy, parse_recipe
from kwsearch.trial import Trained
from kwsearch.worker import GRACE, decode, encode
from tests.kwsearch import test_kills
from tests.kwsearch.conftest import Start
from tests.kwsearch.databases import MariaDB, Postgres
from tests.kwsearch.distributed import DRIVER, Watcher, study
from tests.kwsearch.test_executors import job


def test_killed_workers_and_a_restarted_database_lose_and_double_nothing(
    server: Postgres | MariaDB, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LEASE", 6.0)
    workers = {worker.pid: worker for worker in (start("killed", server.url) for _ in range(8))}
    killed: list[int] = []

    def kill() -> None:
        """Half of them, while they train."""
        busy = select(queue.JOBS.c.worker).where(queue.JOBS.c.state == queue.RUNNING)
        while len(killed) < 4:
            for name in own.now(lambda connection: [*connection.execute(busy).scalars()]):
                pid = int(name.split(":")[1])
                if pid not in killed and len(killed) < 4:
                    workers[pid].kill()
                    killed.append(pid)

    def restart() -> None:
        server.stop()
        time.sleep(3)
        server.start()

    meanwhile = [threading.Thread(target=kill), threading.Thread(target=restart)]
    watcher = Watcher(at_10=meanwhile[0].start, at_40=meanwhile[1].start)
    search = "trials: 64, workers: 8, executor: queue, pruner: none"
    own = Database(server.url, print)
    study(tmp_path, search, server.url, watcher, name="killed").run(function="simulated:train")
    for thread in meanwhile:
        thread.join()
    own.close()
    assert any("was not heard of for 6 s" in line for line in watcher.said)
    assert any(line.startswith("the database is away (") for line in watcher.said)
    monkeypatch.setenv("KWSEARCH_STORAGE", server.url)
    test_kills.check(tmp_path, 64, kills=1)
    # The study is over: the others go home.
    assert [worker.wait(30) for pid, worker in workers.items() if pid not in killed] == [0] * 4


def test_a_killed_driver_is_followed_by_another_that_loses_and_doubles_nothing(
    postgres: Postgres, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__).parent
    script = tmp_path / "driver.py"
    script.write_text(
        DRIVER.format(
            paths=[str(tmp_path), str(here), str(here.parents[1])],
            folder=str(tmp_path),
            search="trials: 16, workers: 3, executor: queue, pruner: none",
            url=postgres.url,
            name="followed",
        )
    )
    workers = [start("followed", postgres.url) for _ in range(3)]
    first = subprocess.Popen([sys.executable, str(script)])
    while test_kills.lines(tmp_path) < 12:
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    monkeypatch.setenv("KWSEARCH_STORAGE", postgres.url)
    test_kills.check(tmp_path, 16, kills=1)
    assert [worker.wait(30) for worker in workers] == [0] * 3


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_deterministic_studies_are_the_same_in_a_queue_and_here(
    postgres: Postgres,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
) -> None:
    found = []
    search = "trials: 16, workers: 3, deterministic: true, calibration: 6"
    for name, where, url in (("here", "local", None), ("there", "queue", postgres.url)):
        monkeypatch.syspath_prepend(tmp_path / name)
        own = f"same {sampler}" if url else None
        recipe = f"{search}, executor: {where}"
        begun = study(tmp_path / name, recipe, url, sampler=sampler, name=own)
        for _ in range(3 if url else 0):
            start(own, postgres.url, tmp_path / name)
        result = begun.run(function="simulated:train")
        found.append([(t.state, t.value, t.user_attrs["fingerprint"]) for t in result.trials])
    assert found[0] == found[1]
    assert len({state for state, _, _ in found[0]}) == 2  # some were stopped


def test_a_worker_that_is_stopped_gives_its_job_back(postgres: Postgres, start: Start) -> None:
    executor = QueueExecutor(postgres.url, "stopped", 1, encode, print)
    worker = start("stopped", postgres.url)
    executor.submit(job("test_executors:hold", trial=5))
    found = executor.wait(60)
    assert found
    worker.send_signal(signal.SIGTERM)
    while not isinstance(found[-1], Lost):
        found += executor.wait(60)
    assert found[-1].message.endswith(" was stopped")
    assert not found[-1].suspect
    assert worker.wait(30) == 0
    executor.close()


def test_who_waits_in_vain_is_told_for_what(
    postgres: Postgres, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LONELY", 1.0)
    monkeypatch.setattr(queue, "BEAT", 0.2)
    log = tmp_path / "worker.log"

    def heard(words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    said: list[str] = []
    executor = QueueExecutor(postgres.url, "alone", 1, encode, said.append)
    executor.submit(job("test_executors:count", trial=1, to=1))
    assert executor.wait(4) == []
    shown = re.escape(masked(postgres.url))
    assert re.fullmatch(
        f"no worker takes trials of alone: start `kwsearch worker alone --storage {shown}`, as .*",
        "\n".join(said),
    )  # once
    start("alnoe", postgres.url)
    heard("no study alnoe has a queue here (there are ")
    worker = start("alone", postgres.url)
    assert all_events(executor)
    executor.finish()
    assert worker.wait(30) == 0
    executor.close()
    start("alone", postgres.url)
    heard("alone is over: waiting for a driver that goes on with it")


def test_a_worker_that_is_stopped_while_the_database_is_away_leaves_soon(
    tmp_path: Path, start: Start
) -> None:
    server = Postgres()
    try:
        executor = QueueExecutor(server.url, "away", 1, encode, print)
        worker = start("away", server.url)
        executor.submit(job("test_executors:hold", trial=5))
        assert executor.wait(60)
        server.stop()
        time.sleep(3)
        assert worker.poll() is None  # it waits
        worker.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(GRACE / 2)  # for the database, to give its job back
        assert worker.wait(GRACE + 20) == 1
        assert "StorageError: storage postgresql" in (tmp_path / "worker.log").read_text()
        server.start()
        executor.close()
    finally:
        server.close()


def test_a_worker_that_does_not_see_the_run_directory_says_so(
    postgres: Postgres, tmp_path: Path
) -> None:
    recipe = parse_recipe("format: 1\nmodel: resnet20\nbudget: {ratio: 1}\n").model_dump_json()
    gone = str(tmp_path / "gone" / "0.pt")
    trained = Trained(recipe, Proxy().model_dump_json(), None, 1.0, 0, gone, 1)
    given = {"trained": trained, "first": 0, "until": 1}
    executor = QueueExecutor(postgres.url, "unseen", 1, encode, print)
    worker = subprocess.Popen(
        [sys.executable, "-m", "kwsearch", "worker", "unseen", "-q", "--storage", postgres.url]
    )
    try:
        executor.submit(Job(0, 1, "kwsearch.trial:train_trial", given))
        (failed,) = [event for event in all_events(executor) if not isinstance(event, Started)]
        assert isinstance(failed, Failed)
        assert f"{tmp_path}/gone: workers do not see this folder of the driver" in failed.message
        executor.finish()
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()
        executor.close()


def all_events(executor: QueueExecutor) -> list[Event]:
    found: list[Event] = []
    while executor.running:
        found += (new := executor.wait(60))
        assert new, "no worker"
    return found


def test_a_worker_trusts_a_network_only_if_both_sides_say_so() -> None:
    for driver, worker in ((True, True), (True, False), (False, True)):
        sent = encode({"trained": Trained("", "", None, 1.0, 0, "", 1, trust=driver), "first": 0})
        given = decode(json.loads(json.dumps(sent)), trust=worker)
        assert given["trained"].trust == (driver and worker)
        assert given["first"] == 0


def test_a_worker_runs_nothing_but_trials(postgres: Postgres, start: Start) -> None:
    executor = QueueExecutor(postgres.url, "safe", 1, encode, print)
    start("safe", postgres.url)
    executor.submit(job("os:system", command="true"))
    (failed,) = executor.wait(60)
    assert "os:system: workers run simulated:train, test_executors:count, " in failed.message  # type: ignore[attr-defined]
    executor.close()


def test_a_second_driver_is_refused(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "BEAT", 0.1)
    first = QueueExecutor(postgres.url, "one", 1, encode, print)
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        sleep(seconds)
        first._look()

    monkeypatch.setattr(queue.time, "sleep", meanwhile)
    with pytest.raises(ExecutorError, match=r"another process runs the study one in postgresql"):
        QueueExecutor(postgres.url, "one", 1, encode, print)
    monkeypatch.setattr(queue.time, "sleep", sleep)
    # One that was silent for the lease is followed by another, and finds out.
    second = QueueExecutor(postgres.url, "one", 1, encode, print, lease=0.3)
    second.submit(job("test_executors:hold", trial=3))
    first._looked = 0.0
    with pytest.raises(ExecutorError, match=r"another process runs the study one in postgresql"):
        first.wait(1) if first.running else first._look()
    first.close()  # and leaves the other's jobs alone
    second._looked = 0.0
    second._look()
    assert second.running == 1
    second.close()
    QueueExecutor(postgres.url, "one", 1, encode, print, lease=0.3).close()


def test_no_event_is_lost_where_the_answer_of_the_database_is(
    postgres: Postgres, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = QueueExecutor(postgres.url, "answers", 1, encode, print)
    now = Database.now
    calls = []

    def twice(database: Database, function: Any) -> Any:
        """Every second answer is lost after it was done."""
        found = now(database, function)
        calls.append(1)
        if len(calls) % 2:
            raise OperationalError("lost", None, Exception("lost"))
        return found

    monkeypatch.setattr(Database, "now", twice)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    start("answers", postgres.url)
    executor.submit(job("test_executors:count", trial=1, to=5))
    found = all_events(executor)
    assert [getattr(event, "step", None) for event in found] == [None, 0, 1, 2, 3, 4, None]
    assert found[-1] == Finished(1, 1, 2.5)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "now", now)
        left = executor._database.now(
            lambda c: [*c.execute(select(queue.EVENTS)), *c.execute(select(queue.JOBS))]
        )
        executor.close()
    assert left == []
