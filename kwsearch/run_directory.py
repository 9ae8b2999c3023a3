"""The folder of a study: its files, whose it is, and one process at a time.

study.journal is Optuna's journal, recipe.yaml the recipe with its overrides, best.yaml the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from kwsearch.recipe import Proxy, Recipe, Search, load_recipe, write_recipe

JOURNAL, RECIPE, BEST = "study.journal", "recipe.yaml", "best.yaml"


class SearchError(ValueError):
    """A search that cannot start or go on, for a reason that the user can mend."""


def prepare(directory: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Check that a study that is there is the recipe's; its provenance, None if there is none."""
    path = directory / RECIPE
    if (directory / JOURNAL).exists():
        if not resume:
            raise SearchError(
                f"{directory} holds a study already: --resume to go on with it, or --run-dir for "
                "another place"
            )
        begun = load_recipe(path)
        if changed := _changes(begun, recipe):
            raise SearchError(
                f"{directory} holds a study of another recipe ({', '.join(changed)} differ): "
                "only search.trials and search.timeout may change; use another --run-dir"
            )
        return dict(begun.provenance)
    return None


def write_down(directory: Path, recipe: Recipe, provenance: Mapping[str, Any]) -> None:
    """Keep the recipe of the study, with where it comes from."""
    noted = recipe.model_copy(update={"provenance": dict(provenance)})
    write_recipe(noted, directory / RECIPE, ["The recipe of this study, overrides applied."])


def _changes(before: Recipe, now: Recipe) -> list[str]:
    """Sections that differ in what a study depends on."""

    def essence(recipe: Recipe) -> dict[str, Any]:
        search = recipe.search or Search()
        data = recipe.model_dump(exclude={"provenance", "training", "plan"})
        data["search"] = search.model_dump(exclude={"trials", "timeout"})
        data["proxy"] = (recipe.proxy or Proxy()).model_dump()
        return data

    old, new = essence(before), essence(now)
    return [key for key in old if old[key] != new[key]]


@contextmanager
def sole_driver(directory: Path) -> Iterator[None]:
    """Refuse a second process on the same study."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / "driver.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SearchError(f"another process is running the study in {directory}") from None
    try:
        yield
    finally:
        lock.release()


def mend(journal: Path) -> bool:
    """Clear up after a kill; whether a torn line had to be dropped.

    It can leave Optuna's lock, on which the next run would wait for half a minute, and a torn last
    line, for which Optuna would refuse the journal. Only the sole driver may call this.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return False
    with open(journal, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return whole < len(content)
