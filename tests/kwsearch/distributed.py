"""Studies of simulated trainings, and workers for them, for tests beyond one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from kwsearch import optimize
from kwsearch.recipe import parse_recipe
from tests.kwsearch import test_kills

WORKER = """
import sys
sys.path[:0] = {paths!r}
from kwsearch.worker import Worker
functions = frozenset({{"simulated:train", "test_executors:hold", "test_executors:count"}})
if __name__ == "__main__":
    Worker({url!r}, {study!r}, print, functions=functions).run()
"""


DRIVER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from kwsearch.executors import queue
from tests.kwsearch.distributed import study
queue.LEASE = 4.0
if __name__ == "__main__":
    begun = Path({folder!r}, "run", "study.storage.json").exists()
    made = study(Path({folder!r}), {search!r}, {url!r}, name={name!r}, resume=begun)
    made.run(function="simulated:train")
"""


class Watcher:
    """Does something when so many trials are done."""

    def __init__(self, **acts: Callable[[], object]) -> None:
        self.count, self.acts = 0, acts
        self.said: list[str] = []

    def done(self, trial: FrozenTrial) -> None:
        self.count += 1
        self.acts.get(f"at_{self.count}", lambda: None)()

    def say(self, message: str) -> None:
        self.said.append(message)

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def study(
    folder: Path,
    search: str,
    url: str | None = None,
    watcher: Watcher | None = None,
    sampler: str = "random",
    **options: Any,
) -> optimize.PlanStudy:
    """Of simulated trainings, a tenth of a second an epoch. options: of the study."""
    folder.mkdir(exist_ok=True)
    recipe = parse_recipe(
        "format: 1\nmodel: resnet20\nbudget: {total_ratio: 0.5}\n"
        "proxy: {epochs: 3, temperature_epochs: 0}\n"
        f"search: {{{search}, sampler: {sampler}, finalists: 0}}\n"
    )
    (folder / "simulated.py").write_text(test_kills.SIMULATED.format(epoch_s=0.1))
    given = {"resume": False, "watcher": watcher or Watcher(), "storage": url, **options}
    return optimize.PlanStudy(recipe, folder / "run", **given)
