"""How a search goes: on a terminal a bar for it and one for every running trial, else lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.progress import TaskID


class Live:
    """A watcher that prints to stderr, so that results can be piped."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self.best: dict[float | None, tuple[float, int]] = {}
        self.running: dict[int, TaskID] = {}
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.study = self.bars.add_task("trials", total=None)

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def expect(self, trials: int) -> None:
        """How many trials the study has in all."""
        self.bars.update(self.study, total=trials)

    def known(self, trials: Sequence[FrozenTrial]) -> None:
        for trial in trials:
            self._is_best(trial)
        self.bars.update(self.study, completed=len(trials))

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None:
        self._end(trial.number)
        self.running[trial.number] = self.bars.add_task(
            f"  trial {trial.number}: {self._what(trial)}",
            total=until,
            completed=trial.last_step or 0,
        )

    @staticmethod
    def _what(trial: FrozenTrial) -> str:
        """Of a plan its part of the budget; of an architecture its parameters, once chosen."""
        attrs = trial.user_attrs
        if "params" not in attrs:
            return "a supernet"
        if "params" not in trial.constraints:
            return f"{attrs['params']:,} parameters"
        allowed = attrs["params"] - trial.constraints["params"]
        return f"{attrs['params']:,} parameters, {attrs['params'] / allowed:.1%} of the budget"

    def epoch(self, number: int, step: int, accuracy: float) -> None:
        task = self.running[number]
        head = self.bars.tasks[self.bars.task_ids.index(task)].description.partition(", now")[0]
        self.bars.update(task, completed=step, description=f"{head}, now {accuracy:.1%}")

    def pause(self, number: int, step: int, accuracy: float) -> None:
        self._end(number)
        if step:
            self.say(f"trial {number}: {accuracy:.2%} after epoch {step}, waits")
        else:
            self.say(f"trial {number}: score {accuracy:.4g}, waits")

    def done(self, trial: FrozenTrial) -> None:
        from kwsearch.study_report import result_of
        from kwsearch.trials import accuracy_of, baseline

        self._end(trial.number)
        accuracy = accuracy_of(trial)
        text = result_of(trial) if accuracy is None else f"{accuracy:.2%}"
        if self._is_best(trial):
            text += "  best so far"
        name = baseline(trial)
        self.say(f"trial {trial.number}{f' ({name})' if name else ''}: {text}")
        self.bars.advance(self.study)

    def final(self, number: int, seed: int, result: Mapping[str, Any]) -> None:
        if "error" in result:
            text = f"failed: {result['error']}"
        else:
            text = f"{result['valid']:.2%} held-out"
            if result["test"] is not None:
                text += f", {result['test']:.2%} test"
        self.say(f"final training of trial {number}, seed {seed}: {text}")

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def _end(self, number: int) -> None:
        """A trial does not run any more."""
        task = self.running.pop(number, None)
        if task is not None:
            self.bars.remove_task(task)

    def _is_best(self, trial: FrozenTrial) -> bool:
        """Whether it is the best plan of its budget so far; kept and shown if so."""
        from kwsearch.trials import best_of, budget_of

        budget = budget_of(trial)
        if best_of([trial]) is None or trial.values[0] <= self.best.get(budget, (-1.0, 0))[0]:
            return False
        self.best[budget] = trial.values[0], trial.number
        shown = ", ".join(f"{value:.1%} (trial {n})" for value, n in self.best.values())
        self.bars.update(self.study, description=f"trials, best {shown}")
        return True
