"""Where a study itself is: a journal in its run directory, or a database.

The run directory says which, without the password, in `MARK`.
"""

from __future__ import annotations

import json
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
from sqlalchemy.exc import SQLAlchemyError

from kwsearch.database import Database, Patience, StorageError, masked, refusal
from kwsearch.files import write_whole
from kwsearch.passwords import STORAGE, of_environment
from kwsearch.run_directory import JOURNAL, MARK, STUDY, TRIALS, SearchError

PROXY = "grpc://"
_NAME = 255  # characters


@contextmanager
def whole(journal: Path) -> Iterator[None]:
    """While a journal is read. Raises SearchError for one that is damaged, with the line."""
    try:
        yield
    except (ValueError, KeyError, TypeError):
        for number, line in enumerate(journal.read_bytes().splitlines(), 1):
            try:
                json.loads(line)
            except ValueError:
                raise SearchError(
                    f"{journal}:{number}: damaged, no record of a study; take a copy that is "
                    f"whole, or begin anew in another --run-dir ({TRIALS} says what was found)"
                ) from None
        raise


@dataclass(frozen=True)
class Place:
    """Of a study. url: of a database, None for the journal in `directory`. Raises SearchError for a
    name that no database takes.
    """

    directory: Path
    url: str | None = None
    study: str = STUDY

    def __post_init__(self) -> None:
        if not 0 < len(self.study) <= _NAME:
            raise SearchError(
                f"the study's name has {len(self.study)} characters: allowed are 1 to {_NAME}; "
                "--study gives another"
            )

    @classmethod
    def of(cls, directory: Path, url: str | None = None, study: str | None = None) -> Place:
        """Where the study of this run directory is, or shall be: without `url` in
        $KWSEARCH_STORAGE, and without that in a journal. Raises SearchError if that is not where
        it was asked for.
        """
        mark = directory / MARK
        known = of_environment()
        if not mark.exists():
            if not (directory / JOURNAL).exists():
                url = url or known
            if url is not None and (directory / JOURNAL).exists():
                raise SearchError(
                    f"{directory} has its study in {JOURNAL}: leave --storage out, or move it with "
                    "`kwsearch study copy`"
                )
            return cls(directory) if url is None else cls(directory, url, study or directory.name)
        kept = json.loads(mark.read_text(encoding="utf-8"))
        moved = url is not None and _bare(masked(url)) != _bare(kept["storage"])
        if moved or study not in (None, kept["study"]):
            raise SearchError(
                f"{directory} has its study {kept['study']} in {kept['storage']}, not "
                f"{study or kept['study']} in {masked(url or kept['storage'])}: `kwsearch study "
                "copy` moves it"
            )
        if url is None and known and _bare(masked(known)) == _bare(kept["storage"]):
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
            with whole(self.directory / JOURNAL):
                storage = JournalStorage(JournalFileBackend(str(self.directory / JOURNAL)))
            yield storage
            return
        found = _proxy(self.url) if self.url.startswith(PROXY) else _database(self.url, say)
        try:
            patience = Patience(masked(self.url), say)
            yield cast(BaseStorage, _Patient(get_storage(found), patience))
        finally:
            found.remove_session()
            if isinstance(found, RDBStorage):
                found.engine.dispose()


def _bare(url: str) -> str:
    """A masked URL as it is where the password is in a file of the user's."""
    return url.replace(":***@", "@")


def _database(url: str, say: Callable[[str], object]) -> RDBStorage:
    Database(url, say).close()  # says what is wrong with it
    try:
        template = url.replace("{", "{{").replace("}", "}}")  # which Optuna fills in
        return RDBStorage(template, engine_kwargs={"pool_pre_ping": True})
    except (RuntimeError, StorageInternalError, SQLAlchemyError) as error:
        raise refusal(masked(url), error) from error


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
        raise StorageError(f'storage {url}: pip install "kwsearch[grpc]"') from None
    try:
        proxy.wait_server_ready(timeout=10)
    except Exception as error:  # of grpc, which only this needs
        raise StorageError(f"storage {url}: nobody answers ({type(error).__name__})") from None
    return proxy


def has_study(storage: BaseStorage, name: str) -> bool:
    """Whether there is one of that name, or one that the database (MySQL) or people take for it."""
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return name.casefold() in map(str.casefold, optuna.get_all_study_names(storage))
    return True


def give_up(storage: BaseStorage) -> None:
    """It is not waited for any more."""
    if isinstance(storage, _Patient):
        storage.patience.limit = 0.0


class _Patient:
    """A storage of which every method is tried again while the database is away. What was done
    though its answer was lost is done twice: of a new trial that is one more, which
    `proposals.Proposer` finds.
    Raises StorageError for what the database refuses.
    """

    def __init__(self, storage: BaseStorage, patience: Patience) -> None:
        self._storage, self.patience = storage, patience

    def __getattr__(self, method: str) -> Any:
        return partial(self._do, method)

    def _do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        tries = 0

        def once() -> Any:
            nonlocal tries
            tries += 1
            try:
                return getattr(self._storage, method)(*args, **kwargs)
            except UpdateFinishedTrialError:
                if tries > 1 and method == "set_trial_state_values":
                    return True  # the first try did it
                raise

        try:
            return self.patience.call(once)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise refusal(self.patience.name, error) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "grpc":
                raise
            raise refusal(self.patience.name, error) from error
