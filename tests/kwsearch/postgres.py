"""A real PostgreSQL, of the pgserver wheel, for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from importlib import util
from pathlib import Path

import pytest

PASSWORD = "s3cret-word"


class Postgres:
    """A server on this machine that asks for a password; it can be stopped and started."""

    def __init__(self) -> None:
        found = util.find_spec("pgserver")
        if found is None or found.origin is None or util.find_spec("psycopg") is None:
            pytest.skip("pgserver and psycopg are not installed")
        # Root may not run it, and others may not look into everybody's folders.
        self.folder = Path(tempfile.mkdtemp(prefix="kwsearch-postgres-"))
        self.folder.chmod(0o755)
        packages = Path(found.origin).parents[1]
        for part in ("pgserver/pginstall", "pgserver.libs"):
            shutil.copytree(packages / part, self.folder / part)
        self.user = "nobody" if os.geteuid() == 0 else None
        self.data = self.folder / "data"
        self.data.mkdir(mode=0o700)
        if self.user is not None:
            shutil.chown(self.data, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
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
            user=self.user,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
