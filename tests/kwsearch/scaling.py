"""How a study scales: `python -m tests.kwsearch.scaling local 1 2 4 8 16`, `… simulated 1000 3000`.

With an executor (local, ray, or queue with a URL as the last argument): trials that sleep, against
the ideal of as many at a time as there are slots, and the driver's CPU time. Simulated: trials of
realistic length on slots that exist in virtual time only, so that all time is the driver's own;
after the slots the trials, and settings of the search in place of the defaults: `sampler=random`.
"""

from __future__ import annotations

import heapq
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from kwsearch import optimize
from kwsearch.executors import Event, Finished, Job, Reported, Started
from kwsearch.recipe import parse_recipe

SLEEP, ROUNDS, EPOCHS = 10.0, 4, 12
SLEEPING = f"""
import time

def train(report, *, trained, first, until):
    time.sleep({SLEEP})
    return 0.5
"""
WORKER = """
import sys
sys.path.insert(0, {folder!r})
from kwsearch.worker import Worker
if __name__ == "__main__":
    Worker({url!r}, {study!r}, print, functions=frozenset({{"sleeping:train"}})).run()
"""


class Watcher:
    """Notes when trials start and end."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []  # seconds of this process until then

    def start(self, *given: Any) -> None:
        self.starts.append(time.monotonic())

    def done(self, trial: Any) -> None:
        self.ends.append(time.monotonic())
        self.cpu.append(time.process_time())

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def study(
    folder: Path,
    slots: int,
    trials: int,
    executor: str,
    watcher: Any,
    search: Sequence[str] = ("finalists: 0", "sampler: random", "pruner: none"),
    **options: Any,
) -> Any:
    recipe = parse_recipe(
        "format: 1\nmodel: resnet18\nbudget: {total_ratio: 0.5}\n"
        f"proxy: {{epochs: {EPOCHS}}}\n"
        f"search: {{trials: {trials}, workers: {slots}, executor: {executor}, "
        f"{', '.join(search)}, resources: {{cpus: 0.001}}}}\n"
    )
    return optimize.PlanStudy(recipe, folder, resume=False, watcher=watcher, **options)


def sleeping(executor: str, slots: int, url: str | None) -> None:
    """One line: trials an hour, of the ideal, and the driver's CPU time for each."""
    with tempfile.TemporaryDirectory() as name:
        folder, watcher = Path(name), Watcher()
        (folder / "sleeping.py").write_text(SLEEPING)
        sys.path.insert(0, name)
        own = f"scaling-{time.time_ns()}"
        workers = []
        if url is not None:
            code = WORKER.format(folder=name, url=url, study=own)
            command = [sys.executable, "-c", code]
            workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(slots)]
            time.sleep(5 + slots)
        options = {} if url is None else {"storage": url, "name": own}
        made = study(folder / "run", slots, slots * ROUNDS, executor, watcher, **options)
        made.run(function="sleeping:train")
        for worker in workers:
            worker.wait()
        sys.path.remove(name)
    # From the end of the first trial in each slot: starting processes is not the question here.
    rest = watcher.ends[slots:]
    took = rest[-1] - watcher.ends[slots - 1]
    cpu = (watcher.cpu[-1] - watcher.cpu[slots - 1]) / len(rest)
    ideal = slots / SLEEP
    print(
        f"{executor}, {slots} slots: {3600 * len(rest) / took:,.0f} trials an hour, "
        f"{len(rest) / took / ideal:.1%} of ideal, {1e3 * cpu:.0f} ms of the "
        "driver's CPU for each",
        flush=True,
    )


class Virtual:
    """Slots in virtual time: nothing is waited for."""

    def __init__(self, slots: int, minutes: float) -> None:
        self.capacity, self.minutes, self.now = slots, minutes, 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0
        self._jobs: set[int] = set()
        self._epochs: dict[int, int] = {}
        self._dice = random.Random(0)

    @property
    def running(self) -> int:
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        self._jobs.add(job.trial)
        epoch_s = 60 * self.minutes * self._dice.lognormvariate(0, 0.3) / EPOCHS
        key, until = (job.trial, job.attempt), job.arguments["until"]
        first = self._epochs.get(job.trial, 0)
        self._epochs[job.trial] = until
        self._put(self.now, Started(*key, 1))
        for epoch in range(first + 1, until + 1):
            value = self._dice.random()
            self._put(self.now + epoch_s * (epoch - first), Reported(*key, epoch, value))
        self._put(self.now + epoch_s * (until - first), Finished(*key, value))

    def _put(self, when: float, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def wait(self, timeout: float | None) -> list[Event]:
        if not self._events:
            return []
        self.now, _, event = heapq.heappop(self._events)
        if isinstance(event, Finished):
            self._jobs.discard(event.trial)
        return [event]

    def cancel(self, trial: int) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


def simulated(slots: int, trials: int, settings: list[str], minutes: float = 10) -> None:
    """One line: the driver's CPU time for each trial, from its proposal to its end."""
    with tempfile.TemporaryDirectory() as name:
        watcher, executor = Watcher(), Virtual(slots, minutes)
        search = ["finalists: 0", *(one.replace("=", ": ") for one in settings)]
        made = study(Path(name) / "run", slots, trials, "local", watcher, search)
        begun = time.process_time()
        made.run(executor, function="nothing:nothing")
    each = (watcher.cpu[-1] - begun) / len(watcher.ends)
    print(
        f"{len(watcher.ends)} trials on {slots} slots: {1e3 * each:.0f} ms of the driver's CPU for "
        f"each, so that trials of {minutes:g} minutes keep it busy from "
        f"{60 * minutes / each:,.0f} slots on"
    )


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind, *numbers = sys.argv[1:]
    if kind == "simulated":
        simulated(int(numbers[0]), int(numbers[1]), numbers[2:])
    else:
        where = numbers.pop() if kind == "queue" else None
        for number in numbers:
            sleeping(kind, int(number), where)
