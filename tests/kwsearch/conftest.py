"""Fixtures of the tests that train small networks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kwlayers import plan_model
from kwlayers.plan import Plan
from kwsearch import zoo
from tests.kwsearch.databases import MariaDB, Postgres
from tests.kwsearch.distributed import WORKER


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A small one, of resnet20."""
    with torch.device("meta"):
        model = zoo.create("resnet20")
    return plan_model(model, (3, 32, 32), params=60_000)


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of one's own into the current directory, an empty one, and names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    before = set(sys.modules)

    def write(text: str) -> str:
        name = f"own_{tmp_path.name}_{len(list(tmp_path.glob('own_*.py')))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real one."""
    found = Postgres()
    yield found
    found.close()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A real one, which stands for MySQL, too."""
    found = MariaDB()
    yield found
    found.close()


@pytest.fixture(params=["postgres", "mariadb"])
def server(request: pytest.FixtureRequest) -> Postgres | MariaDB:
    """Either."""
    found: Postgres | MariaDB = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def importable() -> Iterator[None]:
    """Workers find the functions of test files where the driver's sys.path says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts workers of a study at a URL, in processes; none of them is left."""
    workers: list[subprocess.Popen[bytes]] = []

    def one(study: str, url: str, folder: Path = tmp_path) -> subprocess.Popen[bytes]:
        paths = [str(folder), str(Path(__file__).parent)]
        code = tmp_path / "run_worker.py"
        code.write_text(WORKER.format(paths=paths, url=url, study=study))
        with open(tmp_path / "worker.log", "ab") as log:
            workers.append(subprocess.Popen([sys.executable, str(code)], stdout=log, stderr=log))
        return workers[-1]

    yield one
    for worker in workers:
        worker.kill()
        worker.wait()
