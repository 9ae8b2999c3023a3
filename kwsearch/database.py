"""A database that may be away for a while, and whose password is nobody's business."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy import MetaData, create_engine
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)

from kwsearch.passwords import without_password

# Seconds that the database may be away.
PATIENCE = 900.0

Answer = TypeVar("Answer")


class StorageError(ValueError):
    """A database that is not there, or not one for this; the user can mend it."""


def masked(url: str) -> str:
    """Without its password."""
    try:
        make_url(url)
    except (ArgumentError, ValueError):
        return "a storage that is no URL"
    return without_password(url)


class Database:
    """Transactions that wait while the database is away. say: is told so, once each time.
    tables: are made, if they are not there.

    Raises StorageError for a URL that is none, and if it cannot be reached at first.
    """

    def __init__(
        self, url: str, say: Callable[[str], object], tables: MetaData | None = None
    ) -> None:
        self.name, self._say = masked(url), say
        # Goes up whenever the database was away.
        self.absences = 0
        self._told = False
        try:
            self._engine: Engine = create_engine(url, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ValueError):
            raise StorageError(
                f"storage {self.name}: allowed are URLs such as postgresql://user@host/database"
            ) from None
        except ModuleNotFoundError as error:
            raise StorageError(
                f'storage {self.name}: {error}; for PostgreSQL pip install "kwsearch[postgres]"'
            ) from None
        try:
            self.now(lambda connection: None)
            if tables is not None:
                with suppress(IntegrityError, ProgrammingError):  # somebody makes them just now
                    self.now(tables.create_all)
                self.now(tables.create_all)
        except DBAPIError as error:
            self.close()
            raise StorageError(f"storage {self.name}: {line_of(error)}") from None

    def now(self, function: Callable[[Connection], Answer]) -> Answer:
        """In a transaction. Raises DBAPIError."""
        with self._engine.begin() as connection:
            return function(connection)

    def patiently(self, function: Callable[[Connection], Answer]) -> Answer:
        """In a transaction, which is tried until it succeeds; it may be done twice, as an answer
        that is lost is no sign that nothing was done.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = self.now(function)
            except DBAPIError as error:
                if not self.away(error):
                    raise
                if time.monotonic() > deadline:
                    raise StorageError(f"storage {self.name}: {line_of(error)}") from None
                time.sleep(1)
            else:
                self.back()
                return found

    def back(self) -> None:
        """It answers again."""
        self._told = False

    def away(self, error: DBAPIError) -> bool:
        """`is_away`; says so the first time."""
        if not is_away(error):
            return False
        if not self._told:
            self._told = True
            self.absences += 1
            self._say(f"the database is away ({line_of(error)}): waiting for it")
        return True

    def close(self) -> None:
        """Its connections."""
        self._engine.dispose()


def is_away(error: DBAPIError) -> bool:
    """Whether it is the connection that failed, not what was asked."""
    return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))


def line_of(error: DBAPIError) -> str:
    """What went wrong, in one line without the statement."""
    return " ".join(str(error.orig).split())[:200]
