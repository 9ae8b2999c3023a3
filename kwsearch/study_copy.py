"""Moving a study between the journal of its run directory and a database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage

from kwsearch.database import StorageError, masked
from kwsearch.run_directory import JOURNAL, MARK, SearchError, holds_study, mend, sole_driver
from kwsearch.storage import Place, has_study


def move(
    directory: Path, url: str | None, name: str | None, say: Callable[[str], object]
) -> tuple[int, str]:
    """The study of a run directory into the database at `url` as `name`, or into its journal.

    How many trials it has, and where they are now. What was there before is kept: a journal under
    another name, a study in a database as it was. Raises SearchError where there is no study, one
    of that name, or a driver; database.StorageError.
    """
    if not holds_study(directory):
        raise SearchError(f"{directory} holds no study")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with sole_driver(directory):
        old = Place.of(directory)
        if old.url == url:
            raise SearchError(f"the study of {directory} is there already")
        new = Place(directory) if url is None else Place(directory, url, name or directory.name)
        journal = directory / JOURNAL
        if old.url is None:
            mend(journal)
        elif journal.exists():  # of before it was moved to the database
            os.replace(journal, directory / f"{JOURNAL}.{int(time.time())}")
        with old.opened(say) as source, new.opened(say) as target:
            where = "the journal" if url is None else masked(url)
            taken = f"{where} has a study {new.study}: give another --study"
            if has_study(target, new.study):
                raise SearchError(taken)
            try:
                optuna.copy_study(
                    from_study_name=old.study,
                    from_storage=source,
                    to_storage=target,
                    to_study_name=new.study,
                )
                count = _same_trials(source, old.study, target, new.study)
            except DuplicatedStudyError:  # made meanwhile
                raise SearchError(taken) from None
            except BaseException:  # Ctrl-C, too
                with suppress(KeyError, StorageError):
                    optuna.delete_study(study_name=new.study, storage=target)
                raise
        if url is None:
            (directory / MARK).unlink()
            return count, str(journal)
        new.mark()
        return count, f"{masked(url)}, study {new.study}"


def _same_trials(source: BaseStorage, old: str, target: BaseStorage, new: str) -> int:
    """How many there are. Raises StorageError if one was written twice, as the answer was lost."""
    was, now = (
        [(t.state, t.params, t.user_attrs) for t in optuna.load_study(
            study_name=name, storage=storage).get_trials(deepcopy=False)]
        for name, storage in ((old, source), (new, target))
    )  # fmt: skip
    if was != now:
        raise StorageError(f"the copy of {old} is not like it: the database was away; try again")
    return len(now)
