"""An architecture as an int8 TensorFlow Lite file, trained, rounded, and run on what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kwsearch import architectures, data, labelled_data, proxy
from kwsearch.export.errors import ExportError, ExportFailed
from kwsearch.latency.table import TableError
from kwsearch.micronas import tflite
from kwsearch.micronas.cycles import CycleError
from kwsearch.micronas.space import Operator, operators
from kwsearch.micronas.supernet import Network, extract
from kwsearch.recipe import Proxy, Recipe, Search

if TYPE_CHECKING:
    from kwsearch.labelled_data import LabelledData

# Training windows, of all classes, over which the ranges of activations are taken.
_CALIBRATION = 256


@dataclass(frozen=True)
class Deployed:
    """split: of the windows that accuracies are of, "test" or "held-out"; absent: then why there
    are no others. windows: how many. broken: limits of the recipe that the file does not keep.
    timed: whether cycles of its operators were counted; untold: why they could not be, where the
    recipe names a table.

    floating: accuracy before rounding. check: of the file. mean, deviation: of each sensor, which
    normalise windows.
    """

    split: str
    windows: int
    floating: float
    check: tflite.Check
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    absent: str = ""
    broken: tuple[str, ...] = ()
    timed: bool = False
    untold: str = ""

    def lines(self) -> list[str]:
        """In words."""
        one = self.check
        drop = 100 * (one.accuracy - self.floating)
        found = [
            f"{self.split} windows ({self.windows:,}): {self.floating:.2%} as trained, "
            f"{one.accuracy:.2%} in int8 ({drop:+.2f} points)",
            f"file {one.file_bytes:,} bytes; tensors alive at once {one.live_bytes:,} bytes, "
            f"{one.predicted_bytes:,} predicted; arena {one.arena_bytes:,} bytes by the plan in "
            f"the file ({one.ratio:.2f} of the prediction), {one.greedy_bytes:,} where it is not "
            "followed; the kernels' scratch aside",
        ]
        if self.absent:
            found.append(f"there are no test windows: {self.absent}")
        if self.untold:
            found.append(f"latency is not compared with its limit: {self.untold}")
        if self.timed:
            found.append(
                "the first convolution is depthwise in the file: its cycles are not those of the "
                "latency table"
            )
        return found

    def notes(self) -> list[str]:
        """What firmware must know."""
        mean, deviation = (
            ", ".join(f"{v:.9g}" for v in row) for row in (self.mean, self.deviation)
        )
        return [
            "Windows are normalised sensor by sensor, (x - mean) / deviation:",
            f"mean {mean}",
            f"deviation {deviation}",
        ]


def deploy(
    recipe: Recipe,
    path: Path,
    weights: Path | None,
    kept: Path,
    report: Callable[[int, float], None],
) -> Deployed:
    """Write the recipe's architecture to `path`, and run the file on the test windows; on the
    held-out ones where there are no others.

    weights: a state dict of its network; None trains it by the recipe's proxy, and then they are
    `kept`. report: told of every epoch. Raises ExportError, TFLiteError, data.DataError.
    """
    if not recipe.of_architectures:
        raise ExportError(
            "int8 TensorFlow Lite is of micronas' architectures; of plans there are onnx and "
            "program"
        )
    architecture = architectures.architecture_of(recipe)
    if architecture is None:
        raise ExportError(
            "the recipe has no architecture: `kwsearch optimize` writes one to best.yaml"
        )
    if recipe.micronas is not None and recipe.micronas.warehouse is not None:
        raise ExportError(
            "the architecture's kernels are mixed from warehouses: TensorFlow Lite Micro's are "
            "constant; take the best without (micronas.warehouses: [])"
        )
    tflite.need()
    space, how = architectures.space_of(recipe), architectures.counted_how(recipe)
    network = operators(space, architecture)
    took, untold = _latency(recipe, network)
    settings = recipe.proxy or Proxy()
    examples = labelled_data.load(settings, (1, space.steps, space.sensors))
    architectures.check_fit(space, examples.train)
    seed = (recipe.search or Search()).seed

    def make() -> Network:
        return extract(space, architecture)

    if weights is None:
        model = _trained(make, settings, examples, seed, report)
        torch.save(model.state_dict(), kept)
    else:
        model = _loaded(make(), weights)
    windows = data.subset(examples.train, _CALIBRATION, seed=seed)
    tflite.export(model, examples.batch(windows.x), path)
    split, scored, absent = _scored(settings, examples)
    x = scored.batch(scored.valid.x)
    check = tflite.check(path, network, x, scored.valid.y, **how)
    # What kernels need beside tensors is in the prediction only, if it is counted.
    held = max(check.arena_bytes, check.predicted_bytes)
    flash = sum(one.key.flash for one in network)
    return Deployed(
        split,
        len(scored.valid.y),
        scored.score(model, settings.batch_size),
        check,
        tuple(examples.mean.flatten().tolist()),
        tuple(examples.std.flatten().tolist()),
        absent,
        architectures.limits_of(recipe).broken(took, held, flash),
        took is not None,
        untold,
    )


def _latency(recipe: Recipe, network: tuple[Operator, ...]) -> tuple[float | None, str]:
    """Milliseconds by the recipe's table; why nobody can tell, where it has one."""
    try:
        table = architectures.table_of(recipe)
        return None if table is None else table.latency(network).milliseconds, ""
    except (OSError, TableError, CycleError) as error:
        return None, str(error)


def _trained(
    make: Callable[[], Network],
    settings: Proxy,
    examples: LabelledData,
    seed: int,
    report: Callable[[int, float], None],
) -> Network:
    kept: list[Any] = []
    try:
        proxy.train(make, None, examples, settings, seed, report, done=kept.append)
    except ArithmeticError as error:  # a loss that is not finite
        raise ExportFailed(f"the training failed: {error}") from None
    trained: Network = kept[0].to("cpu").eval()
    return trained


def _loaded(model: Network, weights: Path) -> Network:
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # of many kinds, by what the file is
        first = str(error).strip().splitlines()[0]
        raise ExportError(
            f"--weights {weights}: not the weights of this network: {first}"
        ) from None
    return model.eval()


def _scored(settings: Proxy, examples: LabelledData) -> tuple[str, LabelledData, str]:
    """The split, its windows, and why it is not the test part."""
    try:
        return "test", labelled_data.load_test(settings, examples), ""
    except data.DataError as error:
        return "held-out", examples, str(error)
