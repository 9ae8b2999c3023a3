"""One differentiable search of a study: a supernet on the proxy's examples, kept epoch by epoch."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kwsearch import architectures, checkpoint, proxy
from kwsearch.micronas.differentiable import Search, Settings
from kwsearch.micronas.mixture import one_hot
from kwsearch.recipe import Proxy, Recipe, Supernet
from kwsearch.recipe import Search as SearchSection

if TYPE_CHECKING:
    from kwsearch.micronas.feasible import Feasible
    from kwsearch.micronas.space import Architecture
    from kwsearch.proxy import ProxyData

_TIMED = 5  # steps


def run(
    recipe: Recipe,
    examples: ProxyData,
    settings: Proxy,
    seed: int,
    report: Callable[[int, float], None],
    path: Path,
) -> tuple[Architecture, float]:
    """What the supernet chooses within the recipe's limits, and the share of held-out examples that
    it gets right by that.

    Weights learn from the training examples, choices from the held-out ones. report(epoch, share)
    is called after each epoch, counted from 1, and may raise to stop. path: its checkpoint; if the
    file exists, it goes on from there, to the same end. Raises ArithmeticError for a loss that is
    not finite.
    """
    examples = examples.moved(proxy.device_of(settings))
    feasible = architectures.feasible_of(recipe)
    section = (recipe.search or SearchSection()).supernet
    search = Search(
        feasible.space,
        (examples.batch(examples.train.x), examples.train.y),
        (examples.batch(examples.valid.x), examples.valid.y),
        limits=feasible.limits,
        table=feasible.table,
        settings=Settings(**section.model_dump(), seed=seed),
        **feasible.how,
    )
    key = _key(recipe, settings, seed)
    if (state := checkpoint.load(path, key)) is not None:
        search.load_state_dict(state)
    steps = search.steps // section.epochs
    while search.done < search.steps:
        search.step()
        if search.done % steps == 0:
            checkpoint.save(path, key, search.state_dict())
            report(search.done // steps, _accuracy(search, _chosen(search)))
    found = _chosen(search)
    return found, _accuracy(search, found)


def step_seconds(feasible: Feasible, section: Supernet) -> float:
    """Of one step, measured on random windows: the median of a few after the first."""
    space = feasible.space
    x = torch.randn(section.batch_size, 1, space.steps, space.sensors)
    y = torch.arange(len(x)) % space.classes
    search = Search(
        space,
        (x, y),
        (x, y),
        limits=feasible.limits,
        table=feasible.table,
        settings=Settings(**{**section.model_dump(), "epochs": _TIMED + 1}, seed=0),
        **feasible.how,
    )
    took = []
    for _ in range(_TIMED + 1):
        begun = time.perf_counter()
        search.step()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def _chosen(search: Search) -> Architecture:
    return search.result().architecture


@torch.no_grad()
def _accuracy(search: Search, architecture: Architecture) -> float:
    """Of the supernet with the weights that it shares, on the held-out examples."""
    supernet = search.supernet
    trained = supernet.training
    supernet.eval()
    x, y = search.valid
    chances = one_hot(search.space, architecture)
    size = search.settings.batch_size
    right = 0
    for part, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
        right += int((supernet(part, chances).argmax(1) == labels).sum())
    supernet.train(trained)
    return right / len(y)


def _key(recipe: Recipe, settings: Proxy, seed: int) -> str:
    """The same for searches that one checkpoint can serve."""
    rest = settings.model_dump_json(exclude={"threads", "device"})
    what = recipe.model_dump_json(exclude={"provenance", "training"}) + rest + str(seed)
    return hashlib.sha256(what.encode()).hexdigest()[:16]
