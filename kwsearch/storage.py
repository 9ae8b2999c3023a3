"""Where a study itself is: a journal in its run directory, or a database.

The run directory says which, without the password, in `MARK`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import DBAPIError

from kwsearch.database import PATIENCE, Database, StorageError, is_away, line_of, masked
from kwsearch.files import write_whole
from kwsearch.passwords import STORAGE
from kwsearch.run_directory import JOURNAL, MARK, STUDY, SearchError

PROXY = "grpc://"


@dataclass(frozen=True)
class Place:
    """Of a study. url: of a database, None for the journal in `directory`."""

    directory: Path
    url: str | None = None
    study: str = STUDY

    @classmethod
    def of(cls, directory: Path, url: str | None = None, study: str | None = None) -> Place:
        """Where the study of this run directory is, or shall be. Raises SearchError if that is not
        where it was asked for.
        """
        mark = directory / MARK
        if not mark.exists():
            if url is not None and (directory / JOURNAL).exists():
                raise SearchError(
                    f"{directory} has its study in {JOURNAL}: leave --storage out, or move it with "
                    "`kwsearch study copy`"
                )
            return cls(directory) if url is None else cls(directory, url, study or directory.name)
        kept = json.loads(mark.read_text(encoding="utf-8"))
        if (url is not None and masked(url) != kept["storage"]) or study not in (
            None,
            kept["study"],
        ):
            raise SearchError(
                f"{directory} has its study {kept['study']} in {kept['storage']}, not "
                f"{study or kept['study']} in {masked(url or kept['storage'])}: `kwsearch study "
                "copy` moves it"
            )
        if url is None and (known := os.environ.get(STORAGE)) and masked(known) == kept["storage"]:
            url = known
        if url is None and ":***@" in kept["storage"]:
            raise SearchError(
                f"{directory} has its study in {kept['storage']}, whose password is not kept: "
                f"set {STORAGE} to the URL with it"
            )
        return cls(directory, url or kept["storage"], kept["study"])

    @property
    def begun(self) -> bool:
        """Whether a study was begun there."""
        return (self.directory / (JOURNAL if self.url is None else MARK)).exists()

    def study_in(self, directory: Path) -> str:
        """The name of the study, among those of other run directories."""
        return directory.name if self.url is None else self.study

    def mark(self) -> None:
        """Say in the run directory where its study is."""
        if self.url is not None:
            kept = {"storage": masked(self.url), "study": self.study}
            write_whole(self.directory / MARK, json.dumps(kept) + "\n")

    @contextmanager
    def opened(self, say: Callable[[str], object]) -> Iterator[BaseStorage]:
        """The storage: a journal, a database or an Optuna proxy before one (grpc://host:port).

        A database may be away for a while: `say` is told. Raises database.StorageError if it cannot
        be reached at first.
        """
        if self.url is None:
            yield JournalStorage(JournalFileBackend(str(self.directory / JOURNAL)))
        elif self.url.startswith(PROXY):
            proxy = _proxy(self.url)
            yield proxy
            proxy.remove_session()
        else:
            Database(self.url, say).close()  # says what is wrong with it
            found = RDBStorage(self.url, engine_kwargs={"pool_pre_ping": True})
            try:
                yield cast(BaseStorage, _Patient(get_storage(found), masked(self.url), say))
            finally:
                found.remove_session()
                found.engine.dispose()


def _proxy(url: str) -> BaseStorage:
    host, _, port = url.removeprefix(PROXY).rpartition(":")
    if not host or not port.isdigit():
        raise StorageError(f"storage {url}: an Optuna proxy is grpc://HOST:PORT")
    try:
        from optuna.storages import GrpcStorageProxy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=int(port))
    except ImportError:
        raise StorageError(f"storage {url}: needs grpcio and protobuf") from None
    try:
        proxy.wait_server_ready(timeout=10)
    except Exception as error:  # of grpc, which only this needs
        raise StorageError(f"storage {url}: nobody answers ({type(error).__name__})") from None
    return proxy


def has_study(storage: BaseStorage, name: str) -> bool:
    """Whether there is one of that name."""
    return name in optuna.get_all_study_names(storage)


def _absence_in(error: BaseException | None) -> DBAPIError | None:
    """What says that the database is away, among an error and what led to it."""
    while error is not None:
        if isinstance(error, DBAPIError) and is_away(error):
            return error
        error = error.__cause__ or error.__context__
    return None


class _Patient:
    """A storage of which every method is tried again while the database is away. What was done
    though its answer was lost is done twice: of a new trial that is one more, which nobody begins.
    """

    def __init__(self, storage: BaseStorage, name: str, say: Callable[[str], object]) -> None:
        self._storage, self._name, self._say = storage, name, say

    def __getattr__(self, method: str) -> Any:
        return partial(self._do, method)

    def _do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline, tries = time.monotonic() + PATIENCE, 0
        while True:
            try:
                return getattr(self._storage, method)(*args, **kwargs)
            except UpdateFinishedTrialError:
                if tries and method == "set_trial_state_values":
                    return True  # the first try did it
                raise
            except (StorageInternalError, DBAPIError) as error:
                cause = _absence_in(error)
                if cause is None:
                    raise
                if time.monotonic() > deadline:
                    raise StorageError(f"storage {self._name}: {line_of(cause)}") from None
                if not tries:
                    self._say(f"the database is away ({line_of(cause)}): waiting for it")
                tries += 1
                time.sleep(1)
