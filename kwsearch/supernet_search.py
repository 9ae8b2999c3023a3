"""One differentiable search of a study: a supernet on the proxy's examples, kept epoch by epoch."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kwsearch import architectures, checkpoint, memory, proxy
from kwsearch.micronas.differentiable import Search, Settings
from kwsearch.micronas.mixture import one_hot
from kwsearch.micronas.supernet import Supernet
from kwsearch.recipe import Proxy, Recipe
from kwsearch.recipe import Search as SearchSection
from kwsearch.recipe import Supernet as SupernetSection

if TYPE_CHECKING:
    from kwsearch.labelled_data import LabelledData
    from kwsearch.micronas.cycles import CycleTable
    from kwsearch.micronas.feasible import Feasible
    from kwsearch.micronas.space import Architecture, Space

_TIMED = 5  # steps


def run(
    recipe: Recipe,
    examples: LabelledData,
    settings: Proxy,
    seed: int,
    report: Callable[[int, float], None],
    path: Path,
    table: CycleTable | None = None,
    splits: int = 1,
) -> tuple[Architecture, float]:
    """What the supernet chooses within the recipe's limits, and the share of held-out examples that
    it gets right by that.

    Weights learn from the training examples, choices from the held-out ones. report(epoch, share)
    is called after each epoch but the last, which the result tells, counted from 1, and may raise
    to stop. path: its checkpoint; if the file exists, it goes on from there, to the same end.
    table: of cycles; None for the recipe's. splits: by how much smaller batches are, to save
    memory. Raises ArithmeticError for a loss that is not finite.
    """
    examples = examples.moved(proxy.device_of(settings))
    feasible = architectures.feasible_of(recipe, table)
    section = (recipe.search or SearchSection()).supernet
    size = max(section.batch_size // splits, 2)
    # There are more steps then, over which the temperature falls as far.
    decay = section.decay ** (size / section.batch_size)
    chosen = {**section.model_dump(), "batch_size": size, "decay": decay}
    search = Search(
        feasible.space,
        (examples.batch(examples.train.x), examples.train.y),
        (examples.batch(examples.valid.x), examples.valid.y),
        limits=feasible.limits,
        table=feasible.table,
        settings=Settings(**chosen, seed=seed),
        **feasible.how,
    )
    key = _key(recipe, settings, chosen, seed)
    try:
        state = checkpoint.load(path, key)
    except checkpoint.CheckpointError:
        if splits == 1:
            raise
        state = None  # of whole batches, which ran out of memory: it begins anew
    if state is not None:
        search.load_state_dict(state)
    steps = search.steps // section.epochs
    while search.done < search.steps:
        search.step()
        if search.done % steps == 0:
            checkpoint.save(path, key, search.state_dict())
            if search.done < search.steps:
                report(search.done // steps, _accuracy(search, _chosen(search)))
    found = _chosen(search)
    return found, _accuracy(search, found)


def step_seconds(feasible: Feasible, section: SupernetSection) -> float:
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


def step_bytes(feasible: Feasible, section: SupernetSection, device: str) -> int:
    """The peak memory of a step of the weights, counted and not run."""
    space = feasible.space
    step = memory.Step(section.batch_size, device=device)
    return memory.memory_of(
        lambda: _Drawn(space),
        None,
        (1, space.steps, space.sensors),
        step,
        lambda made: torch.optim.Adam(made.parameters()),
    ).total


def checkpoint_bytes(feasible: Feasible) -> int:
    """Weights in float32, and Adam's two copies of them."""
    with torch.device("meta"):
        return 12 * sum(one.numel() for one in Supernet(feasible.space).parameters())


class _Drawn(nn.Module):
    """A supernet by one draw; every choice is computed, whatever it is."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.supernet = Supernet(space)
        self.chances = one_hot(space, space.maximum())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, T, S)  out: (B, classes)"""
        chances = {name: one.to(x.device) for name, one in self.chances.items()}
        out: Tensor = self.supernet(x, chances)
        return out


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


def _key(recipe: Recipe, settings: Proxy, chosen: Mapping[str, Any], seed: int) -> str:
    """The same for searches that one checkpoint can serve, however the study is run. chosen: of the
    supernet.
    """
    limits = (recipe.search or SearchSection()).space.limits
    what = [
        recipe.model_dump(mode="json", include={"input", "model", "micronas"}),
        limits.model_dump(mode="json"),
        settings.model_dump(mode="json", exclude={"threads", "device"}),
        dict(chosen),
        seed,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
