"""A study as its run directory has it now, read without taking part: it may be running."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from kwsearch.recipe import Recipe, load_recipe
from kwsearch.run_directory import JOURNAL, LOCK, RECIPE, SearchError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Snapshot:
    """trials: all of them, by number. attributes: of the study. running: whether one drives it."""

    directory: Path
    recipe: Recipe
    trials: tuple[FrozenTrial, ...]
    attributes: dict[str, Any]
    running: bool

    def trial(self, number: int) -> FrozenTrial:
        """Raises SearchError for a number that the study does not have."""
        if 0 <= number < len(self.trials):
            return self.trials[number]
        have = f"0 to {len(self.trials) - 1}" if self.trials else "none yet"
        raise SearchError(f"trial {number}: {self.directory} has {have}")


def take(directory: Path) -> Snapshot:
    """Raises SearchError for a folder without a study."""
    journal = directory / JOURNAL
    if not journal.exists():
        raise SearchError(f"{directory} holds no study: there is no {JOURNAL} in it")
    recipe = load_recipe(directory / RECIPE)
    content = journal.read_bytes()
    with tempfile.NamedTemporaryFile() as copy:
        # The last line may be in the middle of being written.
        copy.write(content[: content.rfind(b"\n") + 1])
        copy.flush()
        trials, attributes = _read(copy.name)
    return Snapshot(directory, recipe, trials, attributes, _is_running(directory))


def _read(journal: str) -> tuple[tuple[FrozenTrial, ...], dict[str, Any]]:
    """The trials and the attributes of the study; none if it is only about to be created."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(journal))
    trials: tuple[FrozenTrial, ...] = ()
    attributes: dict[str, Any] = {}
    for study in storage.get_all_studies():
        trials += tuple(storage.get_all_trials(study._study_id, deepcopy=False))
        attributes.update(storage.get_study_user_attrs(study._study_id))
    return trials, attributes


def _is_running(directory: Path) -> bool:
    lock = filelock.FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False
    lock.release()
    return False
