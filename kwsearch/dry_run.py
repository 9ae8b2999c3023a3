"""What a search would be: its space, its plans, its time, memory and disk. Needs no data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwsearch import engines
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.rungs import Rung
from kwsearch.train_step import TrainStep

if TYPE_CHECKING:
    from kwlayers.plan import Plan
    from kwsearch.latency.predict import Latency
    from kwsearch.space import Space

_SAMPLES = 100


@dataclass(frozen=True)
class Forecast:
    """params_allowed: of each budget, in the order of a sweep.

    combinations: of all choices but the split over the warehouses, which is continuous.
    warehouses, step_s, train_bytes, checkpoint_bytes: under the last budget.
    valid_share: of random samples, the least of all budgets. step_s: of one training step of the
    uniform plan, measured here. train_bytes: of that step, counted. train_images: of an epoch, None
    where neither the recipe nor this machine says.
    most_bytes: that it may be. latency_ms: of the uniform plan's forward pass by a table, and its
    interval. most_ms: that no plan may surely be over. workers: trials at a time, None
    for as many as a cluster has room for.
    seconds: of the whole study on one worker, if no trial were stopped early (most) and if all were
    at the first rung but the calibration (least); None without train_images.
    checkpoint_bytes: of one unfinished trial. disk_bytes: the most that can be unfinished.
    """

    combinations: int
    warehouses: tuple[int, int]
    params_allowed: list[int]
    valid_share: float
    trials: int
    rungs: tuple[int, ...]
    trainings: int
    step_s: float
    train_bytes: int
    most_bytes: int | None
    latency_ms: tuple[float, float, float] | None
    most_ms: float | None
    workers: int | None
    train_images: int | None
    least_seconds: float | None
    most_seconds: float | None
    checkpoint_bytes: int
    disk_bytes: int


def forecast(
    recipe: Recipe,
    spaces: Sequence[Space],
    rungs: tuple[Rung, ...],
    train_bytes: int,
    latency: Latency | None,
    trainings: int,
    trust: bool,
) -> Forecast:
    """Of the search spaces of all budgets. train_bytes, latency: of the last one's uniform plan.
    trainings: of the finalists, at most.
    """
    search, proxy = recipe.search or Search(), recipe.proxy or Proxy()
    uniform = spaces[-1].uniform
    step_s = TrainStep(recipe, uniform, proxy, trust).seconds()
    workers = engines.planned_slots(search, proxy, lambda: train_bytes)
    images = images_of(proxy)
    least = most = None
    if images is not None:
        steps = -(-images // proxy.batch_size)
        least, most = seconds_of(step_s, steps, search.trials, search.calibration, rungs, trainings)
    checkpoint = checkpoint_bytes(uniform, proxy)
    unfinished = search.trials if workers is None or len(rungs) > 1 else workers
    return Forecast(
        combinations=spaces[-1].size(),
        warehouses=spaces[-1].warehouses(),
        params_allowed=[space.allowed for space in spaces],
        valid_share=min(space.valid_share(_SAMPLES, search.seed) for space in spaces),
        trials=search.trials,
        rungs=tuple(rung.step for rung in rungs),
        trainings=trainings,
        step_s=step_s,
        train_bytes=train_bytes,
        most_bytes=search.space.limits.train_memory,
        latency_ms=None if latency is None else (latency.ms, latency.low, latency.high),
        most_ms=search.space.limits.latency_ms,
        workers=workers,
        train_images=images,
        least_seconds=least,
        most_seconds=most,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * max(unfinished, workers or 0),
    )


def seconds_of(
    step_s: float,
    steps: int,
    trials: int,
    calibration: int,
    rungs: tuple[Rung, ...],
    trainings: int,
) -> tuple[float, float]:
    """The least and the most seconds of a study. trainings: of the finalists, in full."""
    full = rungs[-1].step * steps * step_s
    first = rungs[0].step * steps * step_s
    complete = min(trials, max(calibration, 2))
    final = trainings * full
    return complete * full + (trials - complete) * first + final, trials * full + final


def images_of(proxy: Proxy) -> int | None:
    """Training images of an epoch, as far as the recipe or the data on this machine say."""
    from kwsearch import data

    count = proxy.subset
    if count is None:
        try:
            count = len(data.load(proxy.data, "train", size=None).y)
        except data.DataError:
            return None
    return count - round(count * proxy.holdout)


def checkpoint_bytes(plan: Plan, proxy: Proxy) -> int:
    """Parameters and the optimizer's copies of them, in float32."""
    copies = 2 if proxy.optimizer == "adamw" else int(proxy.momentum > 0)
    return 4 * plan.cost().params.total * (1 + copies)
