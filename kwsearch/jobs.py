"""What workers are asked to do for a study's trials, and where the checkpoints of that are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from kwsearch.executors import Job
from kwsearch.files import is_here, path_of
from kwsearch.proposals import seed_of
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.run_directory import CHECKPOINTS, SearchError
from kwsearch.rungs import Rung, phase_of
from kwsearch.trial import Trained
from kwsearch.trials import AGAIN, ARCHITECTURE, FINGERPRINT, SUPERNET, TEMPERATURE, WAREHOUSE
from kwsearch.wording import one_line

TRAINING, FINAL = "kwsearch.trial:train_trial", "kwsearch.trial:train_final"
SCORING, SEARCHING = "kwsearch.trial:score_trial", "kwsearch.trial:search_trial"


class Jobs:
    """Of a study of `recipe`. checkpoints: their folder. trust: whether networks may be own code.
    training, final, searching: what trains trials, finalists and supernets, in place of those of
    `kwsearch.trial` (for simulations). cycles: of operators, which supernets need.
    """

    def __init__(
        self,
        recipe: Recipe,
        rungs: Sequence[Rung],
        checkpoints: Path,
        trust: bool,
        training: str = TRAINING,
        final: str = FINAL,
        searching: str = SEARCHING,
        cycles: Mapping[str, Any] | None = None,
    ) -> None:
        self._search, self._proxy = recipe.search or Search(), recipe.proxy or Proxy()
        self._recipe = recipe.model_copy(update={"plan": None}).model_dump_json()
        self._rungs, self._checkpoints, self._trust = tuple(rungs), checkpoints, trust
        self._training, self._final, self._searching = training, final, searching
        self._cycles = cycles

    def begins(self, trial: FrozenTrial) -> int:
        """The rung that a trial trains for first: its supernet's, if it has one."""
        return int(self._search.strategy == "differentiable" and SUPERNET not in trial.user_attrs)

    def of_trial(self, trial: FrozenTrial, rung: int, attempt: int, splits: int) -> Job:
        """Bring it to a rung, from the last checkpoint of the phase that the rung is in."""
        phase = phase_of(self._rungs, rung)
        checkpoint = self._checkpoint(f"{trial.number}-{phase.first}")
        again = trial.user_attrs.get(AGAIN, 0)
        seed = seed_of(self._search.seed, trial.user_attrs[FINGERPRINT], again)
        if self._search.strategy == "differentiable" and rung == 0:
            own = seed_of(self._search.seed, f"supernet {trial.user_attrs[SUPERNET]}")
            searching = {
                "recipe": self._recipe,
                "proxy": self._proxy.model_dump_json(),
                "seed": own,
                "checkpoint": str(checkpoint),
                "splits": splits,
                "cycles": self._cycles,
            }
            return Job(trial.number, attempt, self._searching, searching, self._proxy.threads)
        if self._rungs[rung].epochs == 0:
            trained = self._trained(trial, self._proxy, seed, checkpoint, splits)
            scoring = {"trained": trained, "name": self._search.zero_cost}
            return Job(trial.number, attempt, SCORING, scoring, self._proxy.threads)
        changes: dict[str, Any] = {"epochs": phase.epochs}
        if phase.subset is not None:
            changes["subset"] = phase.subset
        if phase.resolution is not None:
            changes["resolution"] = phase.resolution
        proxy = self._proxy_of(trial)
        # Of a phase that is shorter than it, the temperature takes all.
        changes["temperature_epochs"] = min(proxy.temperature_epochs, phase.epochs)
        proxy = proxy.model_copy(update=changes)
        arguments = {
            "trained": self._trained(trial, proxy, seed, checkpoint, splits),
            "first": phase.first,
            "until": self._rungs[rung].epochs,
        }
        return Job(trial.number, attempt, self._training, arguments, self._proxy.threads)

    def of_final(
        self, trial: FrozenTrial, seed: int, number: int, attempt: int, splits: int
    ) -> Job:
        """Train its plan in full with one of the verdict's seeds. number: of the job."""
        # The same for all candidates, which are compared seed by seed.
        own = seed_of(self._search.seed, f"final {seed}")
        checkpoint = self._checkpoint(f"final-{trial.number}-{seed}")
        trained = self._trained(trial, self._proxy_of(trial), own, checkpoint, splits)
        return Job(number, attempt, self._final, {"trained": trained}, self._proxy.threads)

    def forget(self, number: int) -> None:
        """A trial is told: it needs no checkpoint."""
        for path in self._checkpoints.glob(f"{number}-*.pt"):
            path.unlink(missing_ok=True)

    def forget_final(self, number: int, seed: int) -> None:
        """Its result is kept."""
        self._checkpoint(f"final-{number}-{seed}").unlink(missing_ok=True)

    def _checkpoint(self, name: str) -> Path:
        return self._checkpoints / f"{name}.pt"

    def _proxy_of(self, trial: FrozenTrial) -> Proxy:
        epochs = trial.user_attrs.get(TEMPERATURE)
        if epochs is None:
            return self._proxy
        return self._proxy.model_copy(update={"temperature_epochs": epochs})

    def _trained(
        self, trial: FrozenTrial, proxy: Proxy, seed: int, checkpoint: Path, splits: int
    ) -> Trained:
        return Trained(
            self._recipe,
            proxy.model_dump_json(),
            trial.user_attrs.get("groups"),
            trial.user_attrs.get("width"),
            seed,
            str(checkpoint),
            splits,
            self._trust,
            self._proxy.model_dump_json() if self._proxy.init == "warm_start" else None,
            trial.user_attrs.get(ARCHITECTURE),
            trial.user_attrs.get(WAREHOUSE),
        )


def checkpoint_folder(directory: Path, asked: str | None, own: str | None) -> Path:
    """The folder of a study's checkpoints, made: in its run directory, or where it was asked for.

    own: of the study, as others may have theirs there. Raises SearchError if nothing can be written
    there.
    """
    directory = directory.absolute()
    found = directory / CHECKPOINTS
    try:
        if asked is not None:
            found = path_of(asked) / "-".join(filter(None, (directory.name, own)))
            found = found.absolute() if is_here(found) else found
        found.mkdir(parents=True, exist_ok=True)
        (found / "probe").write_bytes(b"")
        (found / "probe").unlink()
    except Exception as error:  # of many libraries
        if asked is None:
            raise
        raise SearchError(
            f"search.checkpoints {found}: cannot be written: {one_line(error)}"
        ) from None
    return found
