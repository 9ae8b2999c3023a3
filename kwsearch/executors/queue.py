"""Trials in a queue: a table of a database, from which workers anywhere take them.

The driver writes jobs and reads events; a worker (`kwsearch.worker`) takes a job, writes events and
counts its beats. Nobody compares clocks: a worker whose count stands still for the lease, by the
driver's own clock, is lost, and what it writes afterwards is not read. While the database cannot
be reached everybody waits.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT, VARCHAR
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from kwsearch.database import Database
from kwsearch.executors import (
    Cancelled,
    Event,
    ExecutorError,
    Failed,
    Finished,
    Job,
    Lost,
    Reported,
    Started,
)
from kwsearch.executors.local import GRACE

# Seconds between beats, without one until a worker is lost, and between two looks: of the driver
# for events, of a worker without a job for one.
BEAT, LEASE, POLL, IDLE = 2.0, 30.0, 0.1, 1.0
# Seconds without any worker until the driver says so.
LONELY = 10.0

TABLES = MetaData()
# MySQL takes names that differ in case only for the same.
_name = String(255).with_variant(
    VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
_text = Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")  # whose Text is 64 KiB
STUDIES = Table(
    "kwsearch_studies",
    TABLES,
    Column("name", _name, primary_key=True),
    Column("driver", _name),
    Column("beats", Integer, nullable=False),
    Column("over", Boolean, nullable=False),
)
WORKERS = Table(
    "kwsearch_workers",
    TABLES,
    Column("name", _name, primary_key=True),
    Column("study", _name, nullable=False, index=True),
    Column("beats", Integer, nullable=False),
)
JOBS = Table(
    "kwsearch_jobs",
    TABLES,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("study", _name, nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("worker", _name),
    Column("beats", Integer, nullable=False),
    Column("content", _text, nullable=False),
)
EVENTS = Table(
    "kwsearch_events",
    TABLES,
    Column("job", BigInteger, primary_key=True, autoincrement=False),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("content", _text, nullable=False),
)
# Of a job: nobody has it; a worker has it; the worker shall stop it; the worker is done with it.
WAITING, RUNNING, STOPPED, DONE = "waiting", "running", "stopped", "done"

Answer = TypeVar("Answer")
_KINDS = {kind.__name__: kind for kind in (Started, Reported, Finished, Failed, Lost, Cancelled)}


def to_text(event: Event) -> str:
    """As JSON. Raises TypeError for an answer that is no plain data."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def from_text(text: str) -> Event:
    """What `to_text` wrote."""
    data = json.loads(text)
    event: Event = _KINDS[data.pop("event")](**data)
    return event


@dataclass
class Pulse:
    """When counts of beats were last seen to change, by this process's clock."""

    lease: float
    _seen: dict[Any, tuple[int, float]] = field(default_factory=dict)

    def beats(self, who: Any, count: int) -> bool:
        """Whether it has changed within the lease; the first time it has."""
        before = self._seen.get(who)
        if before is None or before[0] != count:
            self._seen[who] = count, time.monotonic()
            return True
        return time.monotonic() - before[1] <= self.lease

    def reset(self) -> None:
        """Nobody could be seen for a while."""
        self._seen.clear()


@dataclass
class _Queued:
    """A job in the table."""

    job: Job
    cancelled: bool = False
    place: int = 0  # of the next event


class QueueExecutor:
    """Up to `slots` jobs in the queue at a time, None for as many as there are workers.

    encode: makes a job's arguments plain data. say: is told when the database is away. lease:
    seconds without a beat after which a worker is lost, by default LEASE. Raises ExecutorError if
    another driver runs the study, and StorageError if the database cannot be reached.
    """

    def __init__(
        self,
        url: str,
        study: str,
        slots: int | None,
        encode: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        say: Callable[[str], object],
        lease: float | None = None,
    ) -> None:
        self.study, self._slots, self._encode = study, slots, encode
        self._name = secrets.token_hex(8)
        self._jobs: dict[int, _Queued] = {}
        self._ends: list[Event] = []  # found, and not given yet
        self._pulse, self._absences = Pulse(lease or LEASE), 0
        self._looked = -BEAT
        self._workers = 0
        self._say, self._served = say, time.monotonic()  # when a worker was last seen
        self._database = Database(url, say, TABLES)
        try:
            self._take_over()
        except BaseException:
            self._database.close()
            raise

    @property
    def capacity(self) -> int:
        """Jobs at a time; at least 1, which then waits for a worker."""
        self._look()
        return self._places

    @property
    def _places(self) -> int:
        """As it was when we looked last: who saw room may submit."""
        return max(self._workers if self._slots is None else self._slots, 1)

    @property
    def running(self) -> int:
        """Jobs whose last event wait has not given yet."""
        return len(self._jobs) + len(self._ends)

    def submit(self, job: Job) -> None:
        """Put a job in the queue; ValueError if as many as capacity are in it."""
        if self.running >= self._places:
            raise ValueError(f"trial {job.trial}: all {self._places} slots are taken")
        arguments = self._encode(job.arguments)
        content = {**vars(job), "arguments": arguments, "version": version("kwsearch")}
        key = (time.time_ns() >> 20 << 20) + secrets.randbits(20)  # taken in this order
        row = {"id": key, "study": self.study, "state": WAITING, "beats": 0}
        put = insert(JOBS).values({**row, "content": json.dumps(content)})
        with suppress(IntegrityError):  # it is there, though the answer to the first try was lost
            self._do(lambda connection: connection.execute(put))
        self._jobs[key] = _Queued(job)

    def wait(self, timeout: float | None) -> list[Event]:
        """At least one event, in order per job; none after timeout seconds or if nothing runs."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while self.running:
            self._look()
            found = self._read() + self._ends
            self._ends = []
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(left, POLL))
        return []

    def cancel(self, trial: int) -> None:
        """Stop the job of this trial, if any: Cancelled comes, or its end if that was faster."""
        for key, queued in self._jobs.items():
            if queued.job.trial == trial:
                queued.cancelled = True
                stop = update(JOBS).where(JOBS.c.id == key).values(state=STOPPED)
                self._do(lambda connection, stop=stop: connection.execute(stop))  # type: ignore[misc]

    def finish(self) -> None:
        """No more jobs will come: workers go home."""
        self._do(lambda connection: connection.execute(self._own(over=True)))

    def close(self) -> None:
        """Workers stop what they run; it gives no more events."""
        with suppress(DBAPIError):  # away: then they find out when another driver comes
            self._database.now(self._step_down)
        self._jobs.clear()
        self._database.close()

    def _own(self, **values: Any) -> Any:
        mine = (STUDIES.c.name == self.study) & (STUDIES.c.driver == self._name)
        return update(STUDIES).where(mine).values(**values)

    def _clear(self, connection: Connection) -> bool:
        """No jobs and events of this study, whoever has put them there; whether workers had any."""
        old = select(JOBS.c.id, JOBS.c.worker).where(JOBS.c.study == self.study)
        rows = connection.execute(old).all()
        keys = [row.id for row in rows]
        connection.execute(delete(EVENTS).where(EVENTS.c.job.in_(keys)))
        connection.execute(delete(JOBS).where(JOBS.c.id.in_(keys)))
        return any(row.worker is not None for row in rows)

    def _step_down(self, connection: Connection) -> None:
        """Unless somebody else has taken over."""
        if connection.execute(self._own(driver=None)).rowcount:
            self._clear(connection)

    def _take_over(self) -> None:
        """Be the study's driver, unless another one beats within the lease."""
        row = select(STUDIES.c.driver, STUDIES.c.beats).where(STUDIES.c.name == self.study)
        before = self._do(lambda connection: connection.execute(row).first())
        deadline = time.monotonic() + self._pulse.lease
        while before is not None and before.driver is not None and time.monotonic() < deadline:
            time.sleep(BEAT)
            if self._do(lambda connection: connection.execute(row).first()) != before:
                raise self._taken()

        def take(connection: Connection) -> bool | None:
            """Whether workers had jobs of before; None if somebody else was faster."""
            values = {"driver": self._name, "beats": 0, "over": False}
            if before is None:
                connection.execute(insert(STUDIES).values(name=self.study, **values))
            else:
                as_it_was = (STUDIES.c.driver.is_not_distinct_from(before.driver)) & (
                    STUDIES.c.beats == before.beats
                )
                own = STUDIES.c.driver == self._name  # the answer to a first try was lost
                take = update(STUDIES).where(STUDIES.c.name == self.study, as_it_was | own)
                if not connection.execute(take.values(**values)).rowcount:
                    return None
            return self._clear(connection)

        try:
            busy = self._do(take)
        except IntegrityError:
            raise self._taken() from None
        if busy is None:
            raise self._taken()
        if busy:  # until they have seen that theirs are gone, lest a trial be trained twice
            time.sleep(BEAT + GRACE)

    def _taken(self) -> ExecutorError:
        return ExecutorError(
            f"another process runs the study {self.study} in {self._database.name}"
        )

    def _read(self) -> list[Event]:
        """Events that have arrived."""
        if not self._jobs:
            return []
        new = or_(
            *((EVENTS.c.job == key) & (EVENTS.c.place >= q.place) for key, q in self._jobs.items())
        )
        ordered = select(EVENTS).where(new).order_by(EVENTS.c.job, EVENTS.c.place)
        rows = self._do(lambda connection: [*connection.execute(ordered)])
        found = []
        for row in rows:
            queued = self._jobs.get(row.job)
            if queued is None:
                continue
            queued.place = row.place + 1
            event = from_text(row.content)
            found.append(event)
            if isinstance(event, (Finished, Failed, Lost, Cancelled)):
                self._forget(row.job)
        return found

    def _look(self) -> None:
        """Beat, count the workers, and give up those that are silent: at every beat."""
        if time.monotonic() - self._looked < BEAT:
            return
        gap, self._looked = time.monotonic() - self._looked, time.monotonic()
        workers = select(WORKERS.c.name, WORKERS.c.beats).where(WORKERS.c.study == self.study)
        jobs = select(JOBS).where(JOBS.c.id.in_(list(self._jobs)))

        def look(connection: Connection) -> tuple[list[Any], list[Any]]:
            if not connection.execute(self._own(beats=STUDIES.c.beats + 1)).rowcount:
                raise self._taken()
            return [*connection.execute(workers)], [*connection.execute(jobs)]

        there, own = self._do(look)
        if self._absences != self._database.patience.absences or gap > self._pulse.lease / 2:
            # Nobody was looked at for a while, or could be.
            self._absences = self._database.patience.absences
            self._pulse.reset()
        silent = [row.name for row in there if not self._pulse.beats(row.name, row.beats)]
        self._workers = len(there) - len(silent)
        if self._workers:
            self._served = time.monotonic()
        elif time.monotonic() - self._served > LONELY:
            self._served = math.inf  # once
            self._say(
                f"no worker takes trials of {self.study}: start `kwsearch worker {self.study} "
                f"--storage {self._database.name}`, as often as you like"
            )
        if silent:
            gone = delete(WORKERS).where(WORKERS.c.name.in_(silent))
            self._do(lambda connection: connection.execute(gone))
        if self._jobs.keys() - {row.id for row in own}:
            raise self._taken()
        for row in own:
            if row.state == DONE:
                continue
            queued = self._jobs[row.id]
            end = queued.job.trial, queued.job.attempt
            if row.worker is None:
                if queued.cancelled:
                    self._ends.append(Cancelled(*end))
                    self._forget(row.id)
            elif not self._pulse.beats(row.id, row.beats):
                why = f"worker {row.worker} was not heard of for {self._pulse.lease:g} s"
                self._ends.append(Cancelled(*end) if queued.cancelled else Lost(*end, why))
                self._forget(row.id)

    def _forget(self, key: int) -> None:
        """A job is over: whoever has it still finds it gone, and stops."""
        del self._jobs[key]

        def forget(connection: Connection) -> None:
            connection.execute(delete(JOBS).where(JOBS.c.id == key))
            connection.execute(delete(EVENTS).where(EVENTS.c.job == key))

        self._do(forget)

    def _do(self, function: Callable[[Connection], Answer]) -> Answer:
        return self._database.patiently(function)
