"""Real databases for tests: PostgreSQL of the pgserver wheel, and MariaDB where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib import util
from pathlib import Path

import pytest

PASSWORD = "s3cret-{word}"
# Root may not run a database.
USER = "nobody" if os.geteuid() == 0 else None


def folder() -> Path:
    """Into which that user may look, as not into everybody's."""
    found = Path(tempfile.mkdtemp(prefix="kwsearch-database-"))
    found.chmod(0o755)
    return found


def owned(path: Path) -> Path:
    """A new folder of that user."""
    path.mkdir(mode=0o700)
    if USER is not None:
        shutil.chown(path, USER)
    return path


def free_port() -> int:
    """On which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Postgres:
    """A server on this machine that asks for a password; it can be stopped and started."""

    def __init__(self) -> None:
        found = util.find_spec("pgserver")
        if found is None or found.origin is None or util.find_spec("psycopg") is None:
            pytest.skip("pgserver and psycopg are not installed")
        self.folder = folder()
        packages = Path(found.origin).parents[1]
        for part in ("pgserver/pginstall", "pgserver.libs"):
            shutil.copytree(packages / part, self.folder / part)
        self.data, self.port = owned(self.folder / "data"), free_port()
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._do("initdb", "-U", "tester", "--auth=scram-sha-256", f"--pwfile={secret}")
        self.start()

    @property
    def url(self) -> str:
        """With the password."""
        return f"postgresql+psycopg://tester:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """And wait until it answers."""
        where = f"-h 127.0.0.1 -p {self.port} -k {self.data} -F"
        self._do("pg_ctl", "start", "-w", "-o", where, "-l", str(self.data / "log"))

    def stop(self) -> None:
        """At once, as if it had crashed."""
        self._do("pg_ctl", "stop", "-m", "immediate", "-w")

    def close(self) -> None:
        """Nothing is left."""
        self.stop()
        shutil.rmtree(self.folder)

    def _do(self, program: str, *arguments: str) -> None:
        command = [
            str(self.folder / "pgserver/pginstall/bin" / program),
            "-D",
            str(self.data),
            *arguments,
        ]
        subprocess.run(
            command,
            user=USER,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )


class MariaDB:
    """The same, of Debian's mariadb-server, say."""

    def __init__(self) -> None:
        programs = [shutil.which(name) for name in ("mariadbd", "mariadb-install-db")]
        if None in programs or util.find_spec("pymysql") is None:
            pytest.skip("mariadb-server and pymysql are not installed")
        self._server, install = map(str, programs)
        self.folder = folder()
        self.data, self.port = owned(self.folder / "data"), free_port()
        base = ["--no-defaults", f"--datadir={self.data}"]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
        subprocess.run([install, *base, "--skip-test-db"], user=USER, check=True, **options)  # type: ignore[call-overload]
        self._first = self.folder / "first.sql"
        self._first.write_text(
            "CREATE DATABASE IF NOT EXISTS studies;\n"
            f"CREATE USER IF NOT EXISTS tester@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL ON studies.* TO tester@'127.0.0.1';\n"
        )
        self.start()

    @property
    def url(self) -> str:
        """With the password."""
        return f"mysql+pymysql://tester:{PASSWORD}@127.0.0.1:{self.port}/studies"

    def start(self) -> None:
        """And wait until it answers."""
        own = [f"--port={self.port}", f"--socket={self.data}/socket", f"--init-file={self._first}"]
        self._process = subprocess.Popen(
            [
                self._server,
                "--no-defaults",
                f"--datadir={self.data}",
                *own,
                "--bind-address=127.0.0.1",
                "--skip-name-resolve",
            ],
            user=USER,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as if it had crashed."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Nothing is left."""
        self.stop()
        shutil.rmtree(self.folder)
