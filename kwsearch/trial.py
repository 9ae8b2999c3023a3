"""What a worker runs: one training of one plan, or of the static twin."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwsearch.recipe import Proxy, Recipe
from kwsearch.trials import SCORES

if TYPE_CHECKING:
    from torch import nn

    from kwlayers.plan import Network
    from kwsearch.proxy import ProxyData


@dataclass(frozen=True)
class Trained:
    """What is trained, as plain data that a worker can be sent.

    recipe, proxy: as JSON. groups: of the plan; None for the static twin of that `width`.
    checkpoint: a file. splits: micro-batches per batch.
    """

    recipe: str
    proxy: str
    groups: list[dict[str, Any]] | None
    width: float | None
    seed: int
    checkpoint: str
    splits: int

    def train(
        self,
        report: Callable[[int, float], None],
        until: int | None = None,
        done: Callable[[nn.Module], object] | None = None,
    ) -> float:
        """As `kwsearch.proxy.train`."""
        from kwlayers.plan import Plan
        from kwsearch import proxy
        from kwsearch.resolve import create_model

        recipe = Recipe.model_validate_json(self.recipe)
        plan = None if self.groups is None else Plan.from_groups(_network(self.recipe), self.groups)
        return proxy.train(
            lambda: create_model(recipe, self.width),
            plan,
            _images(self.recipe, self.proxy),
            Proxy.model_validate_json(self.proxy),
            self.seed,
            report,
            until=until,
            checkpoint=Path(self.checkpoint),
            splits=self.splits,
            done=done,
        )


def train_trial(
    report: Callable[[int, float], None], *, trained: Trained, first: int, until: int
) -> float:
    """Train to epoch `until` of a phase, and return the accuracy on the held-out images.

    first: steps of the phases before this one, which reports count too.
    """
    return trained.train(lambda epoch, accuracy: report(first + epoch, accuracy), until)


def score_trial(
    report: Callable[[int, float], None], *, trained: Trained, name: str
) -> dict[str, Any]:
    """The zero-cost score `name` ("value") and all others ("scores") of the untrained network.

    On the first training images, a batch of them. One that is no number ranks last, and is
    left out of the scores.
    """
    from kwlayers.convert import convert_
    from kwlayers.plan import Plan
    from kwsearch import proxy
    from kwsearch.resolve import create_model
    from kwsearch.scores import score_all

    recipe = Recipe.model_validate_json(trained.recipe)
    settings = Proxy.model_validate_json(trained.proxy)
    images = proxy.moved(_images(trained.recipe, trained.proxy), proxy.device_of(settings))

    def make_model() -> nn.Module:
        model = create_model(recipe, trained.width)
        if trained.groups is None:
            return model
        return convert_(model, Plan.from_groups(_network(trained.recipe), trained.groups))

    # Out of memory before: of fewer images, and then its scores are another scale.
    batch = slice(0, max(settings.batch_size // trained.splits, 2))
    x, y = images.batch(images.train.x[batch]), images.train.y[batch]
    found = score_all(make_model, x, y, trained.seed)
    finite = {key: score for key, score in found.items() if math.isfinite(score)}
    return {"value": finite.get(name, -sys.float_info.max), SCORES: finite}


def train_final(report: Callable[[int, float], None], *, trained: Trained) -> dict[str, Any]:
    """Train in full; the accuracies on held-out ("valid") and test images, None without any."""
    from kwsearch import proxy
    from kwsearch.data import DataError

    settings = Proxy.model_validate_json(trained.proxy)
    found: dict[str, Any] = {"test": None}

    def score(model: nn.Module) -> None:
        with contextlib.suppress(DataError):  # a data set without test images
            images = proxy.load_test(settings, _images(trained.recipe, trained.proxy))
            images = proxy.moved(images, proxy.device_of(settings))
            found["test"] = proxy.evaluate(model, images, settings.batch_size)

    found["valid"] = trained.train(report, done=score)
    return found


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
