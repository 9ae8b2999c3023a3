"""What a worker runs: one training of one plan, or of the static twin."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwsearch.files import is_here, path_of
from kwsearch.recipe import Proxy, Recipe
from kwsearch.trials import SCORES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kwlayers.plan import Network, Plan
    from kwsearch.labelled_data import LabelledData
    from kwsearch.sign_data import SignData


@dataclass(frozen=True)
class Trained:
    """What is trained, as plain data that a worker can be sent.

    recipe, proxy: as JSON. groups: of the plan; None for the static twin of that `width`, and for
    an `architecture`. warehouse: b of KernelWarehouse on the convolutions of an architecture.
    checkpoint: a file, or its URL. splits: micro-batches per batch. trust: whether the network may
    be the user's own code; a recipe cannot say that. init: the proxy (JSON) that trains the static
    network whose weights it starts from; None for fresh weights.
    """

    recipe: str
    proxy: str
    groups: list[dict[str, Any]] | None
    width: float | None
    seed: int
    checkpoint: str
    splits: int
    trust: bool = False
    init: str | None = None
    architecture: dict[str, Any] | None = None
    warehouse: float | None = None

    def plan(self) -> Plan | None:
        """Of the network that is trained; None for the static twin."""
        from kwlayers.plan import Plan

        if self.warehouse is not None:
            from kwsearch import architectures

            recipe = Recipe.model_validate_json(self.recipe)
            assert self.architecture is not None
            return architectures.plan_of(recipe, self.architecture, self.warehouse)
        if self.groups is None:
            return None
        return Plan.from_groups(_network(self.recipe, self.trust), self.groups)

    def create_model(self) -> nn.Module:
        """The static network, on the current device."""
        from kwsearch import architectures
        from kwsearch.resolve import create_model

        recipe = Recipe.model_validate_json(self.recipe)
        if self.architecture is not None:
            return architectures.network(recipe, self.architecture)
        return create_model(recipe, self.width, self.trust)

    def initial(self) -> dict[str, Tensor] | None:
        """The static weights to start from, trained first if nobody has; None for fresh ones."""
        from kwsearch import static_start

        if self.init is None:
            return None
        return static_start.weights(
            self.create_model,
            _images(self.recipe, self.init, self.trust),
            Proxy.model_validate_json(self.init),
            path_of(self.checkpoint).parent,
            self.width,
        )

    def train(
        self,
        report: Callable[[int, float], None],
        until: int | None = None,
        done: Callable[[nn.Module], object] | None = None,
    ) -> float:
        """As `kwsearch.proxy.train`. Raises FileNotFoundError where a checkpoint cannot be kept."""
        from kwsearch import proxy

        folder = path_of(self.checkpoint).parent
        if is_here(folder) and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: workers do not see this folder of the driver: put the run directory "
                "where all machines do, or search.checkpoints into object storage"
            )

        return proxy.train(
            self.create_model,
            self.plan(),
            _images(self.recipe, self.proxy, self.trust),
            Proxy.model_validate_json(self.proxy),
            self.seed,
            report,
            until=until,
            checkpoint=path_of(self.checkpoint),
            splits=self.splits,
            initial=self.initial(),
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
    from kwsearch import proxy
    from kwsearch.labelled_data import LabelledData
    from kwsearch.scores import score_all

    settings = Proxy.model_validate_json(trained.proxy)
    images = _images(trained.recipe, trained.proxy, trained.trust)
    assert isinstance(images, LabelledData)  # others have no scores before training
    images = images.moved(proxy.device_of(settings))

    initial = trained.initial()

    def make_model() -> nn.Module:
        model, plan = trained.create_model(), trained.plan()
        if initial is not None:
            model.load_state_dict(initial)
        return model if plan is None else convert_(model, plan, warm_start=settings.starts_static)

    # Out of memory before: of fewer images, and then its scores are another scale.
    batch = slice(0, max(settings.batch_size // trained.splits, 2))
    x, y = images.batch(images.train.x[batch]), images.train.y[batch]
    found = score_all(make_model, x, y, trained.seed)
    finite = {key: score for key, score in found.items() if math.isfinite(score)}
    return {"value": finite.get(name, -sys.float_info.max), SCORES: finite}


def search_trial(
    report: Callable[[int, float], None],
    *,
    recipe: str,
    proxy: str,
    seed: int,
    checkpoint: str,
    splits: int = 1,
    cycles: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a supernet; the facts of the architecture that it chooses, and as the "value" what it
    gets right of the held-out examples itself, by that architecture.

    cycles: the driver's table, as plain data. splits: by how much smaller batches are.
    """
    from kwsearch import architectures, supernet_search
    from kwsearch.labelled_data import LabelledData
    from kwsearch.micronas.cycles import CycleTable

    settings = Proxy.model_validate_json(proxy)
    parsed = Recipe.model_validate_json(recipe)
    examples = _images(recipe, proxy, False)
    assert isinstance(examples, LabelledData)
    table = None if cycles is None else CycleTable.from_dict(cycles)
    found, accuracy = supernet_search.run(
        parsed, examples, settings, seed, report, path_of(checkpoint), table, splits
    )
    feasible = architectures.feasible_of(parsed, table)
    return {"value": accuracy, **architectures.facts(feasible, found)}


def train_final(report: Callable[[int, float], None], *, trained: Trained) -> dict[str, Any]:
    """Train in full; the accuracies on held-out ("valid") and test images, None without any."""
    from kwsearch import examples, proxy
    from kwsearch.data import DataError

    settings = Proxy.model_validate_json(trained.proxy)
    recipe = Recipe.model_validate_json(trained.recipe)
    found: dict[str, Any] = {"test": None}

    def score(model: nn.Module) -> None:
        with contextlib.suppress(DataError):  # a data set without test images
            known = _images(trained.recipe, trained.proxy, trained.trust)
            tested = examples.load_test(recipe, settings, known)
            moved = tested.moved(proxy.device_of(settings))
            found["test"] = moved.score(model, settings.batch_size)

    found["valid"] = trained.train(report, done=score)
    return found


# A worker trains many plans of one network, on the same images.
@functools.lru_cache(maxsize=1)
def _network(recipe: str, trust: bool) -> Network:
    from kwsearch.resolve import network_of

    return network_of(Recipe.model_validate_json(recipe), trust)


@functools.lru_cache(maxsize=2)
def _images(recipe: str, proxy: str, trust: bool) -> LabelledData | SignData:
    from kwsearch import examples

    return examples.load(
        Recipe.model_validate_json(recipe), Proxy.model_validate_json(proxy), trust
    )
