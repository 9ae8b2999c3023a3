"""What happens in a study, one JSON object per line: for people who watch, and for programs."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kwsearch.trials import FLASH, LATENCY, PEAK, REASON, accuracy_of, baseline

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.study import Watcher


class EventLog:
    """A watcher that writes all it is told to a file, and tells the next one.

    echo: takes every line, too.
    """

    def __init__(
        self, path: Path, watcher: Watcher, echo: Callable[[str], object] | None = None
    ) -> None:
        self.path = path
        self.watcher = watcher
        self.echo = echo

    def __enter__(self) -> EventLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        self._write("study", finished=len(trials))
        self.watcher.known(trials)

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None:
        facts = {
            key: trial.user_attrs.get(key)
            for key in ("budget", "fingerprint", "params", "macs", LATENCY, PEAK, FLASH)
            if key in trial.user_attrs or key not in (PEAK, FLASH)
        }
        kind = baseline(trial)
        self._write("start", trial=trial.number, attempt=attempt, until=until, kind=kind, **facts)
        self.watcher.start(trial, attempt, until)

    def epoch(self, number: int, step: int, accuracy: float) -> None:
        self._write("epoch", trial=number, epoch=step, accuracy=accuracy)
        self.watcher.epoch(number, step, accuracy)

    def pause(self, number: int, step: int, accuracy: float) -> None:
        self._write("pause", trial=number, epoch=step, accuracy=accuracy)
        self.watcher.pause(number, step, accuracy)

    def done(self, trial: FrozenTrial) -> None:
        self._write(
            "done",
            trial=trial.number,
            state=trial.state.name.lower(),
            accuracy=accuracy_of(trial),
            reason=trial.user_attrs.get(REASON),
        )
        self.watcher.done(trial)

    def final(self, number: int, seed: int, result: Mapping[str, Any]) -> None:
        self._write("final", trial=number, seed=seed, **result)
        self.watcher.final(number, seed, result)

    def say(self, message: str) -> None:
        self._write("note", message=message)
        self.watcher.say(message)

    def _write(self, event: str, **facts: Any) -> None:
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **facts})
        self.file.write(line + "\n")
        self.file.flush()
        if self.echo is not None:
            self.echo(line)
