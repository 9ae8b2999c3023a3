"""Studies in a real PostgreSQL, with workers that pull their trials from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from kwsearch import cli, database, optimize, snapshot
from kwsearch.database import Database, StorageError, masked
from kwsearch.executors import ExecutorError, Finished, Lost, queue
from kwsearch.executors.queue import QueueExecutor
from kwsearch.passwords import without_password
from kwsearch.recipe import parse_recipe
from kwsearch.run_directory import SearchError
from kwsearch.worker import encode
from tests.kwsearch import test_kills
from tests.kwsearch.postgres import PASSWORD, Postgres
from tests.kwsearch.test_executors import job

WORKER = """
import sys
sys.path[:0] = {paths!r}
from kwsearch.worker import Worker
functions = frozenset({{"simulated:train", "test_executors:hold", "test_executors:count"}})
if __name__ == "__main__":
    Worker({url!r}, {study!r}, print, functions=functions).run()
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    found = Postgres()
    yield found
    found.close()


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(postgres: Postgres, tmp_path: Path) -> Iterator[Start]:
    """Starts workers of a study, in processes; none of them is left."""
    workers: list[subprocess.Popen[bytes]] = []

    def one(study: str, folder: Path = tmp_path) -> subprocess.Popen[bytes]:
        paths = [str(folder), str(Path(__file__).parent)]
        code = tmp_path / "run_worker.py"
        code.write_text(WORKER.format(paths=paths, url=postgres.url, study=study))
        workers.append(subprocess.Popen([sys.executable, str(code)], stdout=subprocess.DEVNULL))
        return workers[-1]

    yield one
    for worker in workers:
        worker.kill()
        worker.wait()


class Watcher:
    """Does something when so many trials are done."""

    def __init__(self, **acts: Callable[[], object]) -> None:
        self.count, self.acts = 0, acts
        self.said: list[str] = []

    def done(self, trial: FrozenTrial) -> None:
        self.count += 1
        self.acts.get(f"at_{self.count}", lambda: None)()

    def say(self, message: str) -> None:
        self.said.append(message)

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def study(
    folder: Path, search: str, url: str | None, watcher: Any = None, **options: Any
) -> optimize.Study:
    """Of simulated trainings."""
    folder.mkdir(exist_ok=True)
    recipe = parse_recipe(
        "format: 1\nmodel: resnet20\nbudget: {total_ratio: 0.5}\n"
        "proxy: {epochs: 3, temperature_epochs: 0}\n"
        f"search: {{{search}, sampler: random, finalists: 0}}\n"
    )
    (folder / "simulated.py").write_text(test_kills.SIMULATED.format(epoch_s=0.1))
    given = {"resume": False, "watcher": watcher or Watcher(), "storage": url, **options}
    return optimize.Study(recipe, folder / "run", **given)


def test_killed_workers_and_a_restarted_database_lose_and_double_nothing(
    postgres: Postgres, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LEASE", 6.0)
    workers = {worker.pid: worker for worker in (start("killed") for _ in range(8))}
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
        postgres.stop()
        time.sleep(3)
        postgres.start()

    meanwhile = [threading.Thread(target=kill), threading.Thread(target=restart)]
    watcher = Watcher(at_10=meanwhile[0].start, at_40=meanwhile[1].start)
    search = "trials: 64, workers: 8, executor: queue, pruner: none"
    own = Database(postgres.url, print)
    study(tmp_path, search, postgres.url, watcher, name="killed").run(function="simulated:train")
    for thread in meanwhile:
        thread.join()
    own.close()
    assert any("was not heard of for 6 s" in line for line in watcher.said)
    assert any(line.startswith("the database is away (") for line in watcher.said)
    monkeypatch.setenv("KWSEARCH_STORAGE", postgres.url)
    test_kills.check(tmp_path, 64, kills=1)
    # The study is over: the others go home.
    assert [worker.wait(30) for pid, worker in workers.items() if pid not in killed] == [0] * 4


def test_deterministic_studies_are_the_same_in_a_queue_and_here(
    postgres: Postgres, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    search = "trials: 16, workers: 3, deterministic: true, calibration: 6"
    for name, where, url in (("here", "local", None), ("there", "queue", postgres.url)):
        monkeypatch.syspath_prepend(tmp_path / name)
        begun = study(tmp_path / name, f"{search}, executor: {where}", url, name="same")
        for _ in range(3 if url else 0):
            start("same", tmp_path / name)
        result = begun.run(function="simulated:train")
        found.append([(t.state, t.value, t.user_attrs["fingerprint"]) for t in result.trials])
    assert found[0] == found[1]
    assert len({state for state, _, _ in found[0]}) == 2  # some were stopped


def test_a_worker_that_is_stopped_gives_its_job_back(postgres: Postgres, start: Start) -> None:
    executor = QueueExecutor(postgres.url, "stopped", 1, encode, print)
    worker = start("stopped")
    executor.submit(job("test_executors:hold", trial=5))
    while len(found := executor.wait(60)) == 0:
        pass
    worker.send_signal(signal.SIGTERM)
    while not isinstance(found[-1], Lost):
        found += executor.wait(60)
    assert found[-1].message.endswith(" stopped")
    assert worker.wait(30) == 0
    executor.close()


def test_a_worker_runs_nothing_but_trials(postgres: Postgres, start: Start) -> None:
    executor = QueueExecutor(postgres.url, "safe", 1, encode, print)
    start("safe")
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
    start("answers")
    executor.submit(job("test_executors:count", trial=1, to=5))
    found: list[Any] = []
    while executor.running:
        found += executor.wait(60)
    assert [getattr(event, "step", None) for event in found] == [None, 0, 1, 2, 3, 4, None]
    assert found[-1] == Finished(1, 1, 2.5)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "now", now)
        left = executor._database.now(
            lambda c: [*c.execute(select(queue.EVENTS)), *c.execute(select(queue.JOBS))]
        )
        executor.close()
    assert left == []


# The study itself -------------------------------------------------------------------------------


def test_a_study_moves_to_a_database_goes_on_there_and_moves_back(
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    study(tmp_path, "trials: 4, pruner: none", None).run(function="simulated:train")
    before = snapshot.take(run).trials
    assert cli.run(["study", "copy", str(run), "--storage", postgres.url, "--study", "moved"]) == 0
    assert "4 trials of " in capsys.readouterr().out
    with pytest.raises(SearchError, match="whose password is not kept: set KWSEARCH_STORAGE"):
        snapshot.take(run)
    monkeypatch.setenv("KWSEARCH_STORAGE", postgres.url)

    def facts(trials: Any) -> list[Any]:
        return [(t.number, t.state, t.values, t.user_attrs, t.intermediate_values) for t in trials]

    assert facts(snapshot.take(run).trials) == facts(before)
    more = study(tmp_path, "trials: 6, pruner: none", postgres.url, resume=True)
    result = more.run(function="simulated:train")
    assert facts(result.trials)[:4] == facts(before)
    assert len(result.trials) == 6
    assert cli.run(["study", "copy", str(run), "--journal"]) == 0
    assert facts(snapshot.take(run).trials) == facts(result.trials)
    assert cli.run(["study", "copy", str(run), "--journal"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_name_that_is_taken_and_another_storage_are_refused(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "a")
    few = "trials: 2, pruner: none"
    study(tmp_path / "a", few, postgres.url, name="taken").run(function="simulated:train")
    with pytest.raises(SearchError, match=r"has a study taken already, and .* is not its run dir"):
        study(tmp_path / "b", few, postgres.url, name="taken").run(function="simulated:train")
    with pytest.raises(SearchError, match=r"has its study taken in postgresql.*:\*\*\*@.*, not"):
        study(tmp_path / "a", few, "sqlite:///x.db", resume=True)
    with pytest.raises(ExecutorError, match="queue: workers take trials from a database: give"):
        study(tmp_path / "c", f"{few}, executor: queue", None).run(function="simulated:train")
    monkeypatch.syspath_prepend(tmp_path / "c")
    mended = study(tmp_path / "c", few, postgres.url, name="mended")
    assert len(mended.run(function="simulated:train").trials) == 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "a storage that is no URL: allowed are URLs such as postgresql://"),
        ("nosuchdb://u:secret@h/d", r"storage nosuchdb://u:\*\*\*@h/d: allowed are URLs such"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", r"u:\*\*\*@127.0.0.1:1/d: .* failed"),
        ("mysql://u:secret@127.0.0.1:1/d", r"storage mysql://u:\*\*\*@.*: No module named 'MySQL"),
        ("grpc://127.0.0.1:1", r"storage grpc://127.0.0.1:1: n"),
    ],
)
def test_a_storage_that_is_none_is_said_without_its_password(
    url: str, message: str, tmp_path: Path
) -> None:
    if url.startswith("postgresql+psycopg"):
        pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(StorageError, match=message) as caught:
        study(tmp_path, "trials: 2", url).run(function="simulated:train")
    assert "secret" not in str(caught.value)


def test_no_password_is_written_down_or_seen_among_processes(
    postgres: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        "format: 1\nmodel: {name: resnet20, num_classes: 10}\ninput: [1, 8, 8]\n"
        "budget: {total_ratio: 0.5}\nsearch: {trials: 2, finalists: 0, executor: queue}\n"
        "proxy: {data: digits, subset: 128, epochs: 1, threads: 1}\n"
    )
    storage = ["--storage", postgres.url]
    kwsearch = [sys.executable, "-m", "kwsearch"]
    options: Any = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    commands = [["optimize", "r.yaml", "--study", "p"], ["worker", "p"]]
    running = [subprocess.Popen([*kwsearch, *command, *storage], **options) for command in commands]
    deadline = time.monotonic() + 60
    while any(PASSWORD in title(process.pid) for process in running):
        assert time.monotonic() < deadline  # they start again at once, without it
        time.sleep(0.05)
    seen, said = set[str](), b""
    while any(process.poll() is None for process in running):
        assert time.monotonic() < deadline + 120
        seen |= {title(process.pid) for process in running}
        time.sleep(0.2)
    for process in running:
        said += process.communicate()[0]
        assert process.returncode == 0, said.decode()
    assert any("-m\0kwsearch\0worker\0p" in one for one in seen)
    assert not any(PASSWORD in one for one in seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"study.storage.json", "events.ndjson", "best.yaml"} <= {path.name for path in files}
    for path in files:
        assert PASSWORD.encode() not in path.read_bytes(), path
    assert PASSWORD.encode() not in said
    kept = json.loads((tmp_path / "runs/r/study.storage.json").read_text())
    assert kept["study"] == "p"
    assert ":***@" in kept["storage"]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_proxy_before_the_database_serves_a_driver(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed")
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom optuna.storages import RDBStorage, run_grpc_proxy_server\n"
            "run_grpc_proxy_server(RDBStorage(sys.argv[1]), host='127.0.0.1', port=13107)",
            postgres.url,
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        monkeypatch.syspath_prepend(tmp_path)
        few = "trials: 3, pruner: none"
        found = study(tmp_path, few, "grpc://127.0.0.1:13107", name="proxied")
        assert len(found.run(function="simulated:train").trials) == 3
        assert len(snapshot.take(tmp_path / "run").trials) == 3
    finally:
        server.kill()
        server.wait()


def test_a_job_script_is_one_of_bash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.yaml").write_text(
        "format: 1\nmodel: resnet20\nbudget: {ratio: 1}\nsearch: {resources: {cpus: 2.5}}\n"
    )
    storage = "postgresql://me:secret@host/db"
    given = ["slurm", "a b.yaml", "proxy.device=cuda", "--storage", storage, "--workers", "3"]
    assert cli.run([*given, "--sbatch", "--partition=gpu"]) == 0
    script = capsys.readouterr().out
    assert "secret" not in script
    for line in ("--array=0-2", "--cpus-per-task=3", "--gpus-per-task=1", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert "kwsearch optimize 'a b.yaml' proxy.device=cuda --run-dir 'runs/a b'" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # With commands that only say what they were asked, the first task is driver and worker.
    for name in ("srun", "kwsearch"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> "{tmp_path}/asked"\n')
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for task in ("0", "1"):
        where = {"SLURM_ARRAY_TASK_ID": task, "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path}
        subprocess.run(["bash", "-c", script], env=where, check=True)
    asked = sorted((tmp_path / "asked").read_text().splitlines())
    assert [line.split(" --")[0] for line in asked[:1]] == [
        "kwsearch optimize a b.yaml proxy.device=cuda"
    ]
    assert asked[1:] == ["srun --cpus-per-task=3 kwsearch worker a b --idle 900"] * 2


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3c/r#t@host:5432/db",
        "postgresql+psycopg://me:s3c@r@host/db",
        "postgresql://host/db?user=me&password=s3cr",
    ],
)
def test_passwords_of_any_form_are_hidden(url: str) -> None:
    for hide in (masked, without_password):
        shown = hide(url)
        assert "s3c" not in shown
        assert "***" in shown
        assert "host" in shown
    line = f"kwsearch optimize r.yaml --storage {url} --workers 4"
    assert "s3c" not in without_password(line)
    assert without_password(line).endswith(" --workers 4")
    plain = "postgresql://me@host/db?connect_timeout=10"
    assert without_password(plain) == masked(plain) == plain
