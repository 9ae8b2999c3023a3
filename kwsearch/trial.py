"""What a worker runs: one training of one plan, or of the static twin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwsearch.recipe import Proxy, Recipe

if TYPE_CHECKING:
    from kwlayers.plan import Network
    from kwsearch.proxy import ProxyData


def train_trial(
    report: Callable[[int, float], None],
    *,
    recipe: str,
    groups: list[dict[str, Any]] | None,
    width: float | None,
    proxy: str,
    seed: int,
    first: int,
    until: int,
    checkpoint: str,
    splits: int,
) -> float:
    """Train to epoch `until` of a phase, and return the accuracy on the held-out images.

    recipe, proxy: as JSON. groups: of the plan; None for the static twin of that `width`. first:
    steps of the phases before this one, which reports count too. checkpoint: a file. splits:
    micro-batches per batch.
    """
    from kwlayers.plan import Plan
    from kwsearch.proxy import train
    from kwsearch.resolve import create_model

    asked = Recipe.model_validate_json(recipe)
    settings = Proxy.model_validate_json(proxy)
    plan = None if groups is None else Plan.from_groups(_network(recipe), groups)
    return train(
        lambda: create_model(asked, width),
        plan,
        _images(recipe, proxy),
        settings,
        seed,
        lambda epoch, accuracy: report(first + epoch, accuracy),
        until=until,
        checkpoint=Path(checkpoint),
        splits=splits,
    )


# A worker trains many plans of one network, on the same images.
@functools.lru_cache(maxsize=1)
def _network(recipe: str) -> Network:
    from kwsearch.resolve import network_of

    return network_of(Recipe.model_validate_json(recipe))


@functools.lru_cache(maxsize=2)
def _images(recipe: str, proxy: str) -> ProxyData:
    from kwsearch import proxy as proxies
    from kwsearch.resolve import input_of

    size = input_of(Recipe.model_validate_json(recipe))
    return proxies.load(Proxy.model_validate_json(proxy), size)
