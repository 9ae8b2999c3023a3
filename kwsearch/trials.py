"""What a study's trials say about themselves: names of their attributes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Who trains a trial since when, at which attempt; the seconds that earlier attempts took.
LEASE = "lease"
# Of a trial that the database made twice, which counts for nothing.
DOUBLE = "double"
# Why it did not complete; how long it trained; micro-batches per batch.
REASON, SECONDS, SPLITS = "reason", "seconds", "splits"
# The budget that it is for, as the recipe gives it: b, parameters, or a ratio of parameters.
BUDGET = "budget"
# Of a study: why no other trial can be had.
EXHAUSTED = "exhausted"
# What tells it from all others; how often the same plan had been trained before.
FINGERPRINT, AGAIN = "fingerprint", "again"
# Epochs of falling temperature, where they are not the proxy's.
TEMPERATURE = "temperature_epochs"
# Scores before training, by name.
SCORES = "scores"
# Milliseconds of a forward pass by a latency table.
LATENCY = "latency_ms"
# Of architectures: what was chosen, bytes of activations at their peak and of weights, and the
# number of the supernet that chose it.
ARCHITECTURE, PEAK, FLASH, SUPERNET = "architecture", "peak_bytes", "flash_bytes", "supernet"
# And b of KernelWarehouse on its convolutions.
WAREHOUSE = "warehouse"
# The baselines, which have a kind: the plan of equal ratios, a static network, and of architectures
# the largest within the limits.
KIND, UNIFORM, STATIC, LARGEST = "kind", "uniform", "static", "largest"
NAMES = {UNIFORM: "uniform plan", STATIC: "static network", LARGEST: "largest architecture"}


def accuracy_of(trial: FrozenTrial) -> float | None:
    """Of a complete trial; optuna gives stopped ones a value, too, which is that of their rung."""
    return trial.values[0] if trial.state.name == "COMPLETE" else None


def is_static(trial: FrozenTrial) -> bool:
    """Whether a trial is that of the static twin."""
    return baseline(trial) == STATIC


def baseline(trial: FrozenTrial) -> str | None:
    """What kind of baseline a trial is, if any."""
    kind: str | None = trial.user_attrs.get(KIND)
    return kind


def budget_of(trial: FrozenTrial) -> float | None:
    """The budget that a trial is for; trials are compared under one budget only."""
    budget: float | None = trial.user_attrs.get(BUDGET)
    return budget


def by_budget(trials: Iterable[FrozenTrial]) -> dict[float | None, list[FrozenTrial]]:
    """Trials of each budget, in the order of the first of each."""
    found: dict[float | None, list[FrozenTrial]] = {}
    for trial in trials:
        found.setdefault(budget_of(trial), []).append(trial)
    return found


def complete_plans(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those that were trained in full, without static networks."""
    return [t for t in trials if t.state.name == "COMPLETE" and not is_static(t)]


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The complete plan with the highest accuracy, the earliest if several have it."""
    return max(complete_plans(trials), key=lambda t: (t.values[0], -t.number), default=None)


def rung_pairs(trials: Iterable[FrozenTrial], rung: int, last: int) -> list[tuple[float, float]]:
    """Accuracies of complete plans at a rung's step and at the last."""
    return [
        (trial.intermediate_values[rung], trial.intermediate_values[last])
        for trial in complete_plans(trials)
        if rung in trial.intermediate_values and last in trial.intermediate_values
    ]


def score_pairs(trials: Iterable[FrozenTrial]) -> dict[str, list[tuple[float, float]]]:
    """By score of the untrained network: it and the accuracy of complete plans."""
    found: dict[str, list[tuple[float, float]]] = {}
    for trial in complete_plans(trials):
        for name, score in trial.user_attrs.get(SCORES, {}).items():
            found.setdefault(name, []).append((score, trial.values[0]))
    return found


def front(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials that no other beats, with more accuracy and no more parameters, MACs,
    latency, memory and flash, or as much accuracy and less of one of those; by parameters. What one
    of two does not say is not compared. Static networks count.
    """
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]

    def worth(trial: FrozenTrial) -> list[float | None]:
        attrs = trial.user_attrs
        costs = [attrs.get(name) for name in ("params", "macs", LATENCY, PEAK, FLASH)]
        return [trial.values[0], *(None if cost is None else -cost for cost in costs)]

    def beaten(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
        both = [(a, b) for a, b in zip(one, other, strict=True) if None not in (a, b)]
        return any(b > a for a, b in both) and all(b >= a for a, b in both)  # type: ignore[operator]

    worths = [worth(trial) for trial in complete]
    found = [
        trial
        for trial, one in zip(complete, worths, strict=True)
        if not any(beaten(one, other) for other in worths)
    ]
    return sorted(found, key=lambda trial: (trial.user_attrs["params"], trial.number))
