"""A study as its run directory has it now, read without taking part: it may be running."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from kwsearch.recipe import Recipe, load_recipe
from kwsearch.run_directory import JOURNAL, LOCK, RECIPE, SearchError, holds_study

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
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
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from kwsearch.storage import Place, whole

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not holds_study(directory):
        raise SearchError(f"{directory} holds no study: there is no {JOURNAL} in it")
    recipe = load_recipe(directory / RECIPE)
    place = Place.of(directory)
    if place.url is not None:
        with place.opened(lambda message: None) as storage:
            trials, attributes = _read(storage, place.study)
        return Snapshot(directory, recipe, trials, attributes, is_running(directory))
    content = (directory / JOURNAL).read_bytes()
    with tempfile.NamedTemporaryFile() as copy, whole(directory / JOURNAL):
        # The last line may be in the middle of being written.
        copy.write(content[: content.rfind(b"\n") + 1])
        copy.flush()
        journal = JournalStorage(JournalFileBackend(copy.name))
        trials, attributes = _read(journal, place.study)
    return Snapshot(directory, recipe, trials, attributes, is_running(directory))


def _read(storage: BaseStorage, study: str) -> tuple[tuple[FrozenTrial, ...], dict[str, Any]]:
    """The trials and the attributes of the study; none if it is only about to be created."""
    for known in storage.get_all_studies():
        if known.study_name == study:
            key = known._study_id
            trials = tuple(storage.get_all_trials(key, deepcopy=False))
            return trials, storage.get_study_user_attrs(key)
    return (), {}


def is_running(directory: Path) -> bool:
    """Whether a process drives the study there, as far as one can see."""
    if not (directory / LOCK).exists():  # which asking would make
        return False
    lock = filelock.FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False
    lock.release()
    return False
