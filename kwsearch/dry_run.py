"""What a search would be: its space, its plans, its time, memory and disk. Needs no data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import counted
from kwsearch import engines
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.rungs import Rung
from kwsearch.train_step import TrainStep
from kwsearch.trials import ARCHITECTURE, FLASH, LATENCY, PEAK

if TYPE_CHECKING:
    from kwsearch.latency.predict import Latency
    from kwsearch.micronas.feasible import Feasible
    from kwsearch.space import Space

_SAMPLES = 100


@dataclass(frozen=True)
class Forecast(ABC):
    """Of any study. step_s: of one training step of the uniform plan, or the largest architecture,
    measured here. train_bytes: of that step, counted. workers: trials at a time, None for as many
    as a cluster has room for. train_images: of an epoch, None where neither the recipe nor this
    machine says.
    seconds: of the whole study on one worker, if no trial were stopped early (most) and if all were
    at the first rung but the calibration (least); None without train_images.
    checkpoint_bytes: of one unfinished trial. disk_bytes: the most that can be unfinished.
    """

    trials: int
    rungs: tuple[int, ...]
    trainings: int
    step_s: float
    train_bytes: int
    workers: int | None
    train_images: int | None
    least_seconds: float | None
    most_seconds: float | None
    checkpoint_bytes: int
    disk_bytes: int

    @abstractmethod
    def space_lines(self) -> Iterator[str]:
        """What is searched, in words."""

    def step_lines(self) -> Iterator[str]:
        """What a step takes."""
        yield (
            f"a step of the {self.of}: {self.step_s * 1e3:,.0f} ms, "
            f"{self.train_bytes / 1e6:,.0f} MB with weights, gradients and optimizer"
        )

    @property
    @abstractmethod
    def of(self) -> str:
        """Whose step that is."""

    def lines(self) -> Iterator[str]:
        """All of it in words."""
        yield from self.space_lines()
        at_a_time = "as many as there are workers" if self.workers is None else self.workers
        finals = f"at most {counted(self.trainings, 'training')}" if self.trainings else "none"
        yield (
            f"trials: {self.trials}, {at_a_time} at a time, rungs at epoch "
            f"{', '.join(map(str, self.rungs))}; finals: {finals}"
        )
        yield from self.step_lines()
        if self.least_seconds is None or self.most_seconds is None:
            yield "time: unknown, for want of the data set or proxy.subset"
        else:
            hours = [f"{s / 3600:,.2f}" for s in (self.least_seconds, self.most_seconds)]
            yield f"time on one worker: {' to '.join(dict.fromkeys(hours))} h"
        yield (
            f"disk: at most {self.disk_bytes / 1e6:,.0f} MB of checkpoints "
            f"({self.checkpoint_bytes / 1e6:,.1f} MB each)"
        )


@dataclass(frozen=True)
class PlanForecast(Forecast):
    """params_allowed: of each budget, in the order of a sweep.

    combinations: of all choices but the split over the warehouses, which is continuous.
    warehouses, step_s, train_bytes, checkpoint_bytes: under the last budget.
    valid_share: of random samples, the least of all budgets. most_bytes: that a step may take.
    latency_ms: of the uniform plan's forward pass by a table, and its interval. most_ms: that no
    plan may surely be over.
    """

    combinations: int
    warehouses: tuple[int, int]
    params_allowed: list[int]
    valid_share: float
    most_bytes: int | None
    latency_ms: tuple[float, float, float] | None
    most_ms: float | None

    @property
    def of(self) -> str:
        return "uniform plan"

    def space_lines(self) -> Iterator[str]:
        fewest, most = self.warehouses
        warehouses = counted(most, "warehouse")
        if fewest != most:
            warehouses = f"{fewest} to {warehouses}"
        yield f"space: {counted(self.combinations, 'combination')}, {warehouses} to split over"
        yield (
            f"budget: {' / '.join(f'{n:,}' for n in self.params_allowed)} parameters at most; "
            f"{self.valid_share:.1%} of random samples are on it"
        )

    def step_lines(self) -> Iterator[str]:
        yield from super().step_lines()
        if self.most_bytes is not None:
            fits = "under" if self.train_bytes <= self.most_bytes else "OVER"
            yield (
                f"    {fits} search.space.limits.train_memory, {self.most_bytes / 1e6:,.0f} MB; "
                "other plans are counted before they are trained"
            )
        if self.latency_ms is not None:
            ms, low, high = self.latency_ms
            limit = ""
            if self.most_ms is not None:
                limit = f"; search.space.limits.latency_ms is {self.most_ms:g}"
            yield f"a forward pass of it: {ms:.3g} ms, {low:.3g} to {high:.3g}{limit}"


@dataclass(frozen=True)
class ArchitectureForecast(Forecast):
    """architectures: of the space, limits or not. largest: what the largest within them costs.
    supernet_s: of one step of a supernet, measured here; None without any.
    """

    architectures: int
    largest: dict[str, Any]
    supernet_s: float | None

    @property
    def of(self) -> str:
        return "largest architecture"

    def space_lines(self) -> Iterator[str]:
        yield f"space: {self.architectures:.2g} architectures"
        costs = self.largest
        took = f", {costs[LATENCY]:.4g} ms" if LATENCY in costs else ""
        yield (
            f"the largest within the limits: {costs['params']:,} parameters, {costs['macs']:,} "
            f"MACs, {costs[PEAK]:,} bytes of memory, {costs[FLASH]:,} bytes of flash{took}"
        )

    def step_lines(self) -> Iterator[str]:
        yield from super().step_lines()
        if self.supernet_s is not None:
            yield f"a step of the supernet: {self.supernet_s * 1e3:,.0f} ms"


def forecast(
    recipe: Recipe,
    spaces: Sequence[Space],
    rungs: tuple[Rung, ...],
    train_bytes: int,
    latency: Latency | None,
    trainings: int,
    trust: bool,
) -> PlanForecast:
    """Of the search spaces of all budgets. train_bytes, latency: of the last one's uniform plan.
    trainings: of the finalists, at most.
    """
    search, proxy = recipe.search or Search(), recipe.proxy or Proxy()
    uniform = spaces[-1].uniform
    step_s = TrainStep(recipe, uniform, proxy, trust).seconds()
    params = uniform.cost().params.total
    return PlanForecast(
        **_course(recipe, rungs, trainings, step_s, train_bytes, checkpoint_bytes(params, proxy)),
        combinations=spaces[-1].size(),
        warehouses=spaces[-1].warehouses(),
        params_allowed=[space.allowed for space in spaces],
        valid_share=min(space.valid_share(_SAMPLES, search.seed) for space in spaces),
        most_bytes=search.space.limits.train_memory,
        latency_ms=None if latency is None else (latency.ms, latency.low, latency.high),
        most_ms=search.space.limits.latency_ms,
    )


def forecast_architectures(
    recipe: Recipe,
    feasible: Feasible,
    largest: Mapping[str, Any],
    rungs: tuple[Rung, ...],
    train_bytes: int,
) -> ArchitectureForecast:
    """largest: the facts of the largest architecture within the limits."""
    search, proxy = recipe.search or Search(), recipe.proxy or Proxy()
    step_s = TrainStep(recipe, None, proxy, architecture=largest[ARCHITECTURE]).seconds()
    finalists = min(search.finalists, search.trials - 1)
    trainings = (finalists + 1) * search.seeds if finalists > 0 else 0
    supernet_s, stops = None, rungs
    checkpoint = checkpoint_bytes(largest["params"], proxy)
    if search.strategy == "differentiable":
        from kwsearch import supernet_search

        supernet_s = supernet_search.step_seconds(feasible, search.supernet)
        checkpoint = max(checkpoint, supernet_search.checkpoint_bytes(feasible))
        stops = (Rung(proxy.epochs, proxy.epochs),)  # beside the supernets'
    found = _course(recipe, stops, trainings, step_s, train_bytes, checkpoint)
    if supernet_s is not None and (images := found["train_images"]) is not None:
        epochs, steps = search.supernet.epochs, -(-images // search.supernet.batch_size)
        supernets = (search.trials - 1) * epochs * steps * supernet_s
        found["least_seconds"] = found["most_seconds"] = found["most_seconds"] + supernets
    return ArchitectureForecast(
        **{**found, "rungs": tuple(rung.step for rung in rungs)},
        architectures=feasible.space.architectures,
        largest=dict(largest),
        supernet_s=supernet_s,
    )


def _course(
    recipe: Recipe,
    rungs: tuple[Rung, ...],
    trainings: int,
    step_s: float,
    train_bytes: int,
    checkpoint: int,
) -> dict[str, Any]:
    """What any study has. checkpoint: bytes of a trial's."""
    search, proxy = recipe.search or Search(), recipe.proxy or Proxy()
    workers = engines.planned_slots(search, proxy, lambda: train_bytes)
    images = images_of(proxy)
    least = most = None
    if images is not None:
        steps = -(-images // proxy.batch_size)
        least, most = seconds_of(step_s, steps, search.trials, search.calibration, rungs, trainings)
    unfinished = search.trials if workers is None or len(rungs) > 1 else workers
    return {
        "trials": search.trials,
        "rungs": tuple(rung.step for rung in rungs),
        "trainings": trainings,
        "step_s": step_s,
        "train_bytes": train_bytes,
        "workers": workers,
        "train_images": images,
        "least_seconds": least,
        "most_seconds": most,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": checkpoint * max(unfinished, workers or 0),
    }


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
    from kwsearch import examples

    count = proxy.subset or examples.count(proxy)
    if count is None:
        return None
    return count - round(count * proxy.holdout)


def checkpoint_bytes(params: int, proxy: Proxy) -> int:
    """Parameters and the optimizer's copies of them, in float32."""
    copies = 2 if proxy.optimizer == "adamw" else int(proxy.momentum > 0)
    return 4 * params * (1 + copies)
