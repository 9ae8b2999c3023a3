"""The folder of a study: its files, whose it is, and one process at a time.

study.journal is Optuna's journal, recipe.lock.yaml the recipe with overrides and defaults filled
in, trials.csv a table, events.ndjson what happened, best.yaml the result.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwsearch.files import alone, write_whole
from kwsearch.recipe import Proxy, Recipe, Search, load_recipe, write_recipe
from kwsearch.trials import (
    BUDGET,
    FLASH,
    LATENCY,
    PEAK,
    REASON,
    SECONDS,
    accuracy_of,
    baseline,
)
from kwsearch.wording import one_line

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

JOURNAL, RECIPE, BEST = "study.journal", "recipe.lock.yaml", "best.yaml"
# In place of a journal: says which database has the study. And the study's name in a journal.
MARK, STUDY = "study.storage.json", "kwsearch"
CHECKPOINTS, TRIALS, EVENTS, LOCK = "checkpoints", "trials.csv", "events.ndjson", "driver.lock"


# What is there before the journal is.
_BEGUN = {RECIPE, EVENTS, LOCK, CHECKPOINTS, f"{JOURNAL}.lock"}
# What may differ when a study goes on.
_FREE = {
    *("trials", "timeout", "workers", "executor", "resources", "checkpoints"),
    *("finalists", "seeds"),
}


class SearchError(ValueError):
    """A search that cannot start or go on, for a reason that the user can mend."""


def holds_study(directory: Path) -> bool:
    """Whether a study was begun there."""
    return any((directory / name).exists() for name in (JOURNAL, MARK))


def prepare(directory: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Check that the directory is for this study; the provenance of what is there of it, or None.

    Raises SearchError for a study not to be resumed, another's, other files, or nothing to resume.
    """
    path = directory / RECIPE
    if holds_study(directory):
        if not resume:
            raise SearchError(
                f"{directory} holds a study already: --resume to go on with it, or --run-dir for "
                "another place"
            )
        begun = load_recipe(path)
        if changed := _changes(begun, recipe):
            raise SearchError(
                f"{directory} holds a study of another recipe: {'; '.join(changed)}. Repeat what "
                f"it was started with ({RECIPE} has all of it), or use another --run-dir; only "
                f"{', '.join(f'search.{name}' for name in sorted(_FREE))} may change"
            )
        return dict(begun.provenance)
    found = {path.name for path in directory.iterdir()} if directory.exists() else set()
    # A dot begins what is about to be renamed.
    if others := sorted(name for name in found - _BEGUN if not name.startswith(".")):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise SearchError(
            f"{directory} holds no study but {others[0]}{more}: --run-dir for another place"
        )
    if resume and not found & _BEGUN:
        raise SearchError(
            f"nothing to resume in {directory}: leave --resume out, or give a study's --run-dir"
        )
    return None


def write_down(directory: Path, recipe: Recipe, provenance: Mapping[str, Any]) -> None:
    """Keep the recipe of the study, with where it comes from."""
    search = recipe.search or Search()
    unused = search.strategy == "sampler" and "supernet" not in search.model_fields_set
    filled = {
        "search": search.model_dump(exclude={"supernet"} if unused else None),
        "proxy": (recipe.proxy or Proxy()).model_dump(),
        "provenance": dict(provenance),
    }
    locked = Recipe.model_validate({**recipe.to_dict(), **filled})
    write_recipe(
        locked, directory / RECIPE, ["The recipe of this study: overrides and defaults filled in."]
    )


def write_trials(directory: Path, trials: Sequence[FrozenTrial]) -> None:
    """trials.csv: a line per finished trial, the columns of the search space last."""
    chosen = sorted({key for trial in trials for key in trial.params})
    known = set().union(*(trial.user_attrs for trial in trials))
    facts = ["params", "macs", LATENCY, *(one for one in (PEAK, FLASH) if one in known)]
    facts += [SECONDS, "fingerprint", REASON]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "kind", "budget", "state", "accuracy", "epochs", *facts, *chosen])
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                baseline(trial) or "",
                trial.user_attrs.get(BUDGET, ""),
                trial.state.name.lower(),
                "" if (accuracy := accuracy_of(trial)) is None else accuracy,
                trial.last_step or 0,
                *(trial.user_attrs.get(fact, "") for fact in facts),
                *(trial.params.get(key, "") for key in chosen),
            ]
        )
    write_whole(directory / TRIALS, text.getvalue())


def _changes(before: Recipe, now: Recipe) -> list[str]:
    """What differs of what a study depends on: the setting, and both values."""

    def essence(recipe: Recipe) -> dict[str, Any]:
        search = recipe.search or Search()
        data = recipe.model_dump(exclude={"provenance", "training", "plan"})
        data["search"] = search.model_dump(exclude=_FREE)
        data["proxy"] = (recipe.proxy or Proxy()).model_dump()
        return data

    def differing(old: Any, new: Any, where: str) -> Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new}):
                yield from differing(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        elif old != new:
            yield f"{where} is {_short(old)} there and {_short(new)} here"

    found = [*differing(essence(before), essence(now), "")]
    return found if len(found) <= 4 else [*found[:3], f"{len(found) - 3} more"]


def _short(value: Any) -> str:
    return "nothing" if value is None else one_line(value, 60)


@contextmanager
def sole_driver(directory: Path) -> Iterator[None]:
    """Refuse a second process on the same study."""
    directory.mkdir(parents=True, exist_ok=True)
    otherwise = SearchError(f"another process is running the study in {directory}")
    with alone(directory / LOCK, otherwise):
        yield


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
