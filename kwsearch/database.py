"""A database that may be away for a while, and whose password is nobody's business."""

from __future__ import annotations

import math
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

from kwsearch import passwords
from kwsearch.interrupts import sleep
from kwsearch.passwords import STORAGE
from kwsearch.wording import one_line

# Seconds that the database may be away.
PATIENCE = 900.0
# Numbers that MySQL's libraries call operational: no right, no such user, column or table.
_REFUSALS = frozenset({1044, 1045, 1054, 1142, 1146})

Answer = TypeVar("Answer")


class StorageError(ValueError):
    """A database that is not there, or not one for this; the user can mend it."""


def masked(url: str) -> str:
    """Without its password; of what is no URL nothing at all, which may be one."""
    try:
        make_url(url)
    except (ArgumentError, ValueError):
        return "(no URL)"
    return passwords.masked(url)


class Patience:
    """Tries until a storage answers, `limit` seconds long. say: is told that it does not."""

    def __init__(self, name: str, say: Callable[[str], object]) -> None:
        self.name, self._say = name, say
        self.limit = PATIENCE
        # Goes up whenever it was away.
        self.absences = 0
        self._since: float | None = None
        self._told = False

    def call(self, function: Callable[[], Answer]) -> Answer:
        """What `function` gives, tried until it succeeds; it may be done twice, as an answer that
        is lost is no sign that nothing was done. Raises what is no absence.
        """
        while True:
            try:
                found = function()
            except Exception as error:
                reason = absence(error)
                if reason is None:
                    raise
            else:
                self.answered()
                return found
            self.wait(reason)

    def wait(self, reason: str) -> None:
        """It was just tried, in vain. Raises StorageError after `limit`, and KeyboardInterrupt,
        after which nothing waits any more.
        """
        now = time.monotonic()
        if self._since is not None and not self._told:
            self._told = True
            self.absences += 1
            most = "" if self.limit == math.inf else f", {self.limit / 60:.0f} minutes at most"
            self._say(f"the database is away ({reason}): waiting for it{most}")
        pause = 1.0 if self._told else 0.1  # a deadlock is over at once
        self._since = self._since or now
        if now - self._since >= self.limit:
            raise StorageError(f"storage {self.name}: {reason}")
        try:
            sleep(pause)
        except KeyboardInterrupt:
            self.limit = 0.0
            raise

    def restart(self) -> None:
        """Whatever it waited until now does not count."""
        self._since = None

    def answered(self) -> None:
        """It is there."""
        if self._told:
            self._say("the database is there again")
        self._since, self._told = None, False


class Database:
    """Transactions that wait while the database is away. say: is told so. tables: are made, if they
    are not there.

    Raises StorageError for a URL that is none, and if it cannot be reached at first.
    """

    def __init__(
        self, url: str, say: Callable[[str], object], tables: MetaData | None = None
    ) -> None:
        self.name = masked(url)
        self.patience = Patience(self.name, say)
        try:
            self._engine: Engine = create_engine(url, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ValueError):
            raise StorageError(
                f"storage {self.name}: allowed are URLs such as postgresql://user@host/database"
            ) from None
        except ImportError as error:
            mysql = url.startswith(("mysql", "mariadb"))
            advice = (
                'give mysql+pymysql://…, and pip install "kwsearch[mysql]"'
                if mysql
                else 'for PostgreSQL pip install "kwsearch[postgres]"'
            )
            raise StorageError(f"storage {self.name}: {error}; {advice}") from None
        try:
            self.now(lambda connection: None)
            if tables is not None:
                for _ in tables.sorted_tables:
                    # Somebody makes the next one just now: MySQL calls that an OperationalError.
                    with suppress(IntegrityError, ProgrammingError, OperationalError):
                        self.now(tables.create_all)
                self.now(tables.create_all)
        except DBAPIError as error:
            self.close()
            reason = line_of(error)
            if "password" in reason:
                reason += f"; a password belongs into ~/.pgpass, or with the URL into ${STORAGE}"
            raise StorageError(f"storage {self.name}: {reason}") from None
        except (RuntimeError, TypeError) as error:  # of the library, for options it does not know
            self.close()
            raise StorageError(f"storage {self.name}: {error}") from None

    def now(self, function: Callable[[Connection], Answer]) -> Answer:
        """In a transaction. Raises DBAPIError."""
        with self._engine.begin() as connection:
            return function(connection)

    def patiently(self, function: Callable[[Connection], Answer]) -> Answer:
        """In a transaction, as `Patience.call`. Raises IntegrityError, and StorageError for what
        the database refuses.
        """
        try:
            return self.patience.call(lambda: self.now(function))
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise refusal(self.name, error) from error

    def close(self) -> None:
        """Its connections."""
        self._engine.dispose()


def absence(error: BaseException | None) -> str | None:
    """Why a database did not answer, by an error or what led to it; None if it did."""
    while error is not None:
        if isinstance(error, DBAPIError) and (
            error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))
        ):
            number = next(iter(getattr(error.orig, "args", ())), None)
            return None if number in _REFUSALS else line_of(error)
        if (reason := _behind_proxy(error)) is not None:
            return reason
        error = error.__cause__ or error.__context__
    return None


def _behind_proxy(error: BaseException) -> str | None:
    """Of a gRPC call: nobody answers, or the proxy's own database does not."""
    code, details = (getattr(error, name, None) for name in ("code", "details"))
    if not (callable(code) and callable(details)):
        return None
    kind, text = code().name, str(details())
    lost = any(sign in text for sign in ("OperationalError", "InterfaceError", "during the commit"))
    return one_line(text) if kind == "UNAVAILABLE" or lost else None


def line_of(error: BaseException) -> str:
    """What went wrong, in one line; of a database without the statement."""
    said = error.orig if isinstance(error, DBAPIError) else error
    return one_line(said)


def refusal(name: str, error: BaseException) -> StorageError:
    """What a storage has against what was asked of it, in one line."""
    while error.__cause__ is not None and not isinstance(error, DBAPIError):
        error = error.__cause__
    return StorageError(f"storage {name}: {line_of(error)}")
