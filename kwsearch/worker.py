"""A worker of the queue: takes jobs of a study from its database, wherever it is started.

It trains in a process of its own, as the engine of one machine does, and goes on training while the
database is away.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from kwsearch.database import Database, absence, refusal
from kwsearch.executors import Cancelled, Event, Failed, Finished, Job, Lost
from kwsearch.executors.local import LocalExecutor
from kwsearch.executors.queue import (
    BEAT,
    DONE,
    EVENTS,
    IDLE,
    JOBS,
    POLL,
    RUNNING,
    STUDIES,
    TABLES,
    WAITING,
    WORKERS,
    to_text,
)
from kwsearch.executors.work import other_version
from kwsearch.interrupts import handled
from kwsearch.trial import Trained

# What a database may ask a worker to run.
FUNCTIONS = frozenset(
    f"kwsearch.trial:{name}"
    for name in ("train_trial", "train_final", "score_trial", "search_trial")
)
_TRAINED = "trained"
# Seconds that a worker which is to stop waits for a database that is away: SLURM kills after 30.
GRACE = 10.0
# Seconds after a job in which it looks for the next one more often.
SOON = 5.0


def encode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trial's job as plain data."""
    return {k: asdict(v) if isinstance(v, Trained) else v for k, v in arguments.items()}


def decode(arguments: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """What `encode` was given. trust: whether own code is imported if the driver trusts it."""
    found = dict(arguments)
    if _TRAINED in found:
        given = found[_TRAINED]
        found[_TRAINED] = Trained(**{**given, "trust": given["trust"] and trust})
    return found


@dataclass
class _Task:
    """A job that this worker has. place: of its next event."""

    key: int
    job: Job
    place: int = 0
    over: bool = False


class Worker:
    """Serves one study. Raises StorageError if the database cannot be reached at first.

    functions: what jobs may run. trust: whether their networks may be own code. idle: seconds
    without a job after which it leaves; None waits for ever. say: is told what it does.
    """

    def __init__(
        self,
        url: str,
        study: str,
        say: Callable[[str], object],
        *,
        functions: frozenset[str] = FUNCTIONS,
        trust: bool = False,
        idle: float | None = None,
    ) -> None:
        self.study, self.say, self.functions, self.trust = study, say, functions, trust
        self.idle = idle
        self.name = f"{platform.node()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._task: _Task | None = None
        self._outbox: deque[tuple[int, int, str]] = deque()
        self._stopping = False
        self._database = Database(url, say, TABLES)
        self._done, self._ended = 0, -SOON
        self._open = False  # whether the study was seen before it was over
        self._told = False  # that it was not

    def run(self) -> int:
        """Until the study is over, nothing was to be done for too long, or SIGTERM or Ctrl-C: what
        runs then is given back. The number of jobs done. Raises StorageError if the database is
        away then, or refuses something.
        """
        with LocalExecutor(1) as self._local, handled(self._stop, "SIGTERM", "SIGINT"):
            over, last, beat = False, time.monotonic(), -BEAT
            patience = self._database.patience
            while self._task is not None or not (over or self._stopping or self._waited(last)):
                self._train()
                last = last if self._task is None else time.monotonic()
                quiet = self._task is not None and not self._outbox
                if quiet and time.monotonic() - beat < BEAT:
                    continue
                try:
                    over, taken = self._database.now(self._exchange)
                except DBAPIError as error:
                    if (reason := absence(error)) is None:
                        raise refusal(patience.name, error) from error
                    patience.limit = GRACE if self._stopping else math.inf
                    patience.wait(reason)
                    continue
                patience.answered()
                beat = time.monotonic()
                self._sent(taken)
        self._leave()
        return self._done

    def _waited(self, last: float) -> bool:
        if self.idle is None or time.monotonic() - last < self.idle:
            return False
        self.say(f"no job for {self.idle:g} s: leaving")
        return True

    def _stop(self, *_: object) -> None:
        """As of a scheduler before it takes a node back, and of Ctrl-C."""
        self._stopping = True
        self._database.patience.restart()

    def _train(self) -> None:
        """Let the job run until something happens, or for a beat."""
        task = self._task
        if task is None:
            soon = time.monotonic() - self._ended < SOON  # the driver has the next one in a moment
            time.sleep(POLL if soon else IDLE)
        elif self._stopping and not task.over:
            for event in self._local.wait(0):  # what it has said already
                self._put(task, event)
            self._local.close()
            if task.over:
                return
            why = f"worker {self.name} was stopped"
            self._put(task, Lost(task.job.trial, task.job.attempt, why, suspect=False))
            self.say(f"trial {task.job.trial} is given back")
        elif not task.over:
            for event in self._local.wait(BEAT):
                self._put(task, event)

    def _put(self, task: _Task, event: Event) -> None:
        """Into the outbox."""
        try:
            text = to_text(event)
        except TypeError as error:  # an answer that is no plain data
            text = to_text(Failed(event.trial, event.attempt, "error", f"TypeError: {error}", ""))
        self._outbox.append((task.key, task.place, text))
        task.place += 1
        task.over = isinstance(event, (Finished, Failed, Lost, Cancelled))
        self._done += isinstance(event, (Finished, Failed))

    def _exchange(self, connection: Connection) -> tuple[bool, Any]:
        """Beat, say what happened, take a job if there is none: whether the study is over, and the
        job's row. All of it may happen twice, where the answer to the first time was lost.
        """
        self._beat(connection)
        task = self._task
        if task is not None:
            own = (JOBS.c.id == task.key) & (JOBS.c.worker == self.name)
            state = connection.execute(select(JOBS.c.state).where(own)).scalar()
            if state is not None:  # else it was given up, and nobody listens
                for key, place, text in self._outbox:
                    with suppress(IntegrityError), connection.begin_nested():
                        put = insert(EVENTS).values(job=key, place=place, content=text)
                        connection.execute(put)
            if state != RUNNING and not task.over:
                self._local.cancel(task.job.trial)
            # Not the state as it was read, which the driver may have changed since.
            end = {"state": DONE} if task.over else {}
            connection.execute(update(JOBS).where(own).values(beats=JOBS.c.beats + 1, **end))
            if not task.over:
                return False, None
        over = select(STUDIES.c.over).where(STUDIES.c.name == self.study)
        known = connection.execute(over).scalar()
        if known is not False:  # or nobody has begun it yet
            self._wait_for_driver(connection, known is not None)
            return self._open, None
        self._open = True
        return False, None if self._stopping else self._taken(connection)

    def _wait_for_driver(self, connection: Connection, known: bool) -> None:
        """Say what is waited for, once."""
        if self._open or self._told:
            return
        self._told = True
        if known:
            self.say(f"{self.study} is over: waiting for a driver that goes on with it")
            return
        names = connection.execute(select(STUDIES.c.name).limit(10)).scalars().all()
        there = f"there are {', '.join(names)}" if names else "there is none"
        self.say(f"no study {self.study} has a queue here ({there}): waiting for its driver")

    def _beat(self, connection: Connection) -> None:
        beat = update(WORKERS).where(WORKERS.c.name == self.name)
        if not connection.execute(beat.values(beats=WORKERS.c.beats + 1)).rowcount:
            row = {"name": self.name, "study": self.study, "beats": 0}
            connection.execute(insert(WORKERS).values(row))

    def _taken(self, connection: Connection) -> Any:
        """The row of a job that is ours now: the first that nobody has."""
        mine = select(JOBS).where(JOBS.c.worker == self.name, JOBS.c.state == RUNNING)
        if (row := connection.execute(mine).first()) is not None:
            return row  # taken before, though the database went away before it said so
        free = select(JOBS).where(JOBS.c.study == self.study, JOBS.c.state == WAITING)
        first = free.order_by(JOBS.c.id).limit(1).with_for_update(skip_locked=True)
        row = connection.execute(first).first()
        if row is None:
            return None
        still = (JOBS.c.id == row.id) & (JOBS.c.state == WAITING)
        take = update(JOBS).where(still).values(state=RUNNING, worker=self.name)
        return row if connection.execute(take).rowcount else None

    def _sent(self, taken: Any) -> None:
        """The database has all that happened, and perhaps a job for us."""
        self._outbox.clear()
        if self._task is not None and self._task.over:
            self._task = None
            self._ended = time.monotonic()
        if taken is None:
            return
        content = json.loads(taken.content)
        message = other_version(content.pop("version", None))
        arguments = content.pop("arguments")
        task = self._task = _Task(taken.id, Job(**content, arguments={}))
        job = task.job
        self.say(f"trial {job.trial}, attempt {job.attempt}")
        if not message and job.function not in self.functions:
            message = f"{job.function}: workers run {', '.join(sorted(self.functions))} only"
        if message:
            self._put(task, Failed(job.trial, job.attempt, "error", message, ""))
        else:
            task.job = replace(job, arguments=decode(arguments, self.trust))
            self._local.submit(task.job)

    def _leave(self) -> None:
        """The driver need not wait to see that this worker is gone."""
        with suppress(DBAPIError):
            gone = delete(WORKERS).where(WORKERS.c.name == self.name)
            self._database.now(lambda connection: connection.execute(gone))
        self._database.close()
