"""What a study's trials say about themselves: names of their attributes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Who trains a trial since when, at which attempt; the seconds that earlier attempts took.
LEASE = "lease"
# Why it did not complete; how long it trained; micro-batches per batch.
REASON, SECONDS, SPLITS = "reason", "seconds", "splits"
# Epochs of falling temperature, where they are not the proxy's.
TEMPERATURE = "temperature_epochs"
# What it trains, where that is no plan: the static twin.
KIND, STATIC = "kind", "static"
# The numbers of the baselines.
UNIFORM, TWIN = 0, 1


def is_static(trial: FrozenTrial) -> bool:
    """Whether a trial is that of the static twin."""
    return trial.user_attrs.get(KIND) == STATIC


def baseline(trial: FrozenTrial) -> str | None:
    """What kind of baseline a trial is, if any."""
    if is_static(trial):
        return "static"
    return "uniform" if trial.number == UNIFORM else None


def rung_pairs(trials: Iterable[FrozenTrial], rung: int, last: int) -> list[tuple[float, float]]:
    """Accuracies of complete plans at a rung's step and at the last."""
    return [
        (trial.intermediate_values[rung], trial.intermediate_values[last])
        for trial in trials
        if trial.state.name == "COMPLETE"
        and not is_static(trial)
        and rung in trial.intermediate_values
        and last in trial.intermediate_values
    ]
