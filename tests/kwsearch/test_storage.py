"""Studies in databases: where they are, how they move, and whose business a password is."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from kwsearch import cli, snapshot
from kwsearch.database import Database, StorageError, masked
from kwsearch.executors import ExecutorError
from kwsearch.passwords import without_password
from kwsearch.run_directory import SearchError
from kwsearch.storage import Place
from kwsearch.study_copy import move
from tests.kwsearch.databases import PASSWORD, MariaDB, Postgres, free_port
from tests.kwsearch.distributed import Watcher, study


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
        ("nonsense", r"storage \(no URL\): allowed are URLs such as postgresql://"),
        ("nosuchdb://u:secret@h/d", r"storage nosuchdb://u:\*\*\*@h/d: allowed are URLs such"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", r"u:\*\*\*@127.0.0.1:1/d: .* failed"),
        (
            "mysql://u:secret@127.0.0.1:1/d",
            r"u:\*\*\*@.*'MySQLdb'; give mysql\+pymysql://",
        ),
        ("mysql+pymysql://u:secret@h/d?ssl-mode=REQUIRED", r"storage mysql.*unexpected keyword"),
        ("grpc://127.0.0.1:1", r"storage grpc://127.0.0.1:1: (nobody answers|pip install)"),
    ],
)
def test_a_storage_that_is_none_is_said_without_its_password(
    url: str, message: str, tmp_path: Path
) -> None:
    for library in ("psycopg", "pymysql"):
        if f"+{library}:" in url:
            pytest.importorskip(library, reason=f"{library} is not installed")
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


def test_a_proxy_before_the_database_serves_a_driver_and_may_be_away(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed")
    url = f"grpc://127.0.0.1:{(port := free_port())}"
    code = (
        "import sys\nfrom optuna.storages import RDBStorage, run_grpc_proxy_server\n"
        "run_grpc_proxy_server(RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    template = postgres.url.replace("{", "{{").replace("}", "}}")
    command = [sys.executable, "-c", code, template, str(port)]
    servers = [subprocess.Popen(command, stderr=subprocess.DEVNULL)]

    def again() -> None:
        servers[-1].kill()
        servers[-1].wait()
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    try:
        monkeypatch.syspath_prepend(tmp_path)
        watcher = Watcher(at_2=again)
        found = study(tmp_path, "trials: 5, pruner: none", url, watcher, name="proxied")
        assert len(found.run(function="simulated:train").trials) == 5
        assert any(line.startswith("the database is away (") for line in watcher.said)
        assert len(snapshot.take(tmp_path / "run").trials) == 5
    finally:
        servers[-1].kill()
        servers[-1].wait()


def test_a_variable_is_where_new_studies_go_and_disturbs_no_others(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = "trials: 1, pruner: none"
    for name in ("journal", "database"):
        monkeypatch.syspath_prepend(tmp_path / name)
        study(tmp_path / name, few, None).run(function="simulated:train")
        monkeypatch.setenv("KWSEARCH_STORAGE", postgres.url)
    assert (tmp_path / "journal/run/study.journal").exists()
    assert not (tmp_path / "database/run/study.journal").exists()
    for name in ("journal", "database"):
        more = study(tmp_path / name, "trials: 2, pruner: none", None, resume=True)
        assert len(more.run(function="simulated:train").trials) == 2


def test_a_copy_that_is_interrupted_leaves_nothing(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    study(tmp_path, "trials: 2, pruner: none", None).run(function="simulated:train")
    copy = optuna.copy_study

    def interrupted(**given: Any) -> None:
        copy(**given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna, "copy_study", interrupted)
        with pytest.raises(KeyboardInterrupt):
            move(tmp_path / "run", postgres.url, "half", print)
    assert len(snapshot.take(tmp_path / "run").trials) == 2
    assert move(tmp_path / "run", postgres.url, "half", print)[0] == 2


def test_names_that_differ_in_case_only_are_taken(
    server: Postgres | MariaDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "a")
    few = "trials: 1, pruner: none"
    study(tmp_path / "a", few, server.url, name="Case").run(function="simulated:train")
    with pytest.raises(SearchError, match="has a study case already"):
        study(tmp_path / "b", few, server.url, name="case").run(function="simulated:train")
    with pytest.raises(SearchError, match="name has 256 characters: allowed are 1 to 255"):
        study(tmp_path / "c", few, server.url, name="x" * 256)


# Optuna leaves its connection to the garbage collector, which psycopg does not like.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tables_of_another_optuna_are_one_clear_error(postgres: Postgres, tmp_path: Path) -> None:
    with Place(tmp_path, postgres.url, "any").opened(print):
        pass
    own = Database(postgres.url, print)
    query = text("SELECT version_num FROM alembic_version")
    revision = own.now(lambda c: c.execute(query).scalar())
    change = text("UPDATE alembic_version SET version_num = :revision")
    own.now(lambda c: c.execute(change, {"revision": "v9.9.9"}))
    try:
        with (
            pytest.raises(StorageError, match=r"storage postgresql.*no longer compatible with the"),
            Place(tmp_path, postgres.url, "any").opened(print),
        ):
            pass
    finally:
        own.now(lambda c: c.execute(change, {"revision": revision}))
        own.close()
        gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_user_who_may_not_make_tables_is_told(postgres: Postgres, tmp_path: Path) -> None:
    own = Database(postgres.url, print)
    own.now(lambda c: c.execute(text("CREATE ROLE guest LOGIN PASSWORD 'guest'")))
    own.now(lambda c: c.execute(text("CREATE SCHEMA guarded")))
    own.close()
    where = f"@127.0.0.1:{postgres.port}/postgres?options=-csearch_path%3Dguarded"
    with (
        pytest.raises(StorageError, match=r"storage postgresql.*permission denied|no schema"),
        Place(tmp_path, f"postgresql+psycopg://guest:guest{where}", "any").opened(print),
    ):
        pass
    gc.collect()


@pytest.mark.parametrize("executor", ["local", "queue"])
def test_a_second_ctrl_c_does_not_wait_for_a_database_that_is_away(
    tmp_path: Path, executor: str
) -> None:
    own = Postgres()
    (tmp_path / "r.yaml").write_text(
        "format: 1\nmodel: {name: resnet20, num_classes: 10}\ninput: [1, 8, 8]\n"
        "budget: {total_ratio: 0.5}\nsearch: {trials: 50, workers: 1, finalists: 0}\n"
        "proxy: {data: digits, subset: 128, epochs: 1, threads: 1}\n"
    )
    command = [sys.executable, "-m", "kwsearch", "optimize", "r.yaml", "--storage", own.url]
    running = subprocess.Popen(
        [*command, "--executor", executor], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None

    def hear(words: str) -> None:
        assert running.stderr is not None
        for line in running.stderr:
            if words in line:
                return
        raise AssertionError(f"never said: {words}")

    try:
        hear("50 trials, study in runs/r")
        while not (tmp_path / "runs/r/study.storage.json").exists():
            time.sleep(0.1)
        time.sleep(2)
        own.stop()
        hear("the database is away (")
        running.send_signal(signal.SIGINT)
        hear("stopping: ")
        running.send_signal(signal.SIGINT)
        last = running.communicate(timeout=30)[1]
        assert running.returncode == 130
        assert "interrupted; nothing is lost: add --resume to go on with runs/r" in last
        assert "Traceback" not in last
    finally:
        running.kill()
        running.wait()
        own.start()
        own.close()


def test_a_trial_that_the_database_made_twice_is_trained_once(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    made = optuna.storages.RDBStorage._create_new_trial
    calls = []

    def lost(storage: Any, study_id: int, template_trial: Any = None) -> Any:
        """The answer to the first and third is lost after it was done."""
        number = made(storage, study_id, template_trial)
        calls.append(number)
        if len(calls) in (1, 4):
            raise OperationalError("lost", None, Exception("lost"))
        return number

    monkeypatch.setattr(optuna.storages.RDBStorage, "_create_new_trial", lost)
    found = study(tmp_path, "trials: 5, pruner: none", postgres.url, name="twice")
    result = found.run(function="simulated:train")
    assert len(calls) == 7
    states = [t.state.name for t in result.trials]
    assert sorted(states) == ["COMPLETE"] * 5 + ["FAIL"] * 2
    plans = [t.user_attrs["fingerprint"] for t in result.trials if t.state.name == "COMPLETE"]
    assert len(set(plans)) == 5
    assert sum(plan.startswith("static") for plan in plans) == 1
    # A copy in which that happens is no copy.
    calls.clear()
    monkeypatch.setenv("KWSEARCH_STORAGE", postgres.url)
    with pytest.raises(StorageError, match="the copy of twice is not like it"):
        move(tmp_path / "run", f"sqlite:///{tmp_path}/other.db", "copied", print)
    assert move(tmp_path / "run", None, None, print)[0] == 7


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3c/r#t@host:5432/db",
        "postgresql+psycopg://me:s3c@r@host/db",
        "postgresql://host/db?user=me&password=s3cr",
        "postgresql://host/db?sslpassword=s3c",
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
    assert "s3c" not in masked("postgresql://me:with blank s3c@host/db")
    plain = "postgresql://me@host/db?connect_timeout=10"
    assert without_password(plain) == masked(plain) == plain
