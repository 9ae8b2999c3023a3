"""What trials train on: images, sound and sensors with a label each, or videos with sentences."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kwsearch import data, labelled_data
from kwsearch.labelled_data import LabelledData
from kwsearch.recipe import Proxy, Recipe
from kwsearch.resolve import input_of

if TYPE_CHECKING:
    from kwsearch.sign_data import SignData


def load(recipe: Recipe, settings: Proxy, trust: bool = False) -> LabelledData | SignData:
    """By the recipe's input: videos have one dimension more. trust: whether the network may be the
    user's own code. Raises data.DataError.
    """
    size = input_of(recipe)
    if len(size) != 4:
        return labelled_data.load(settings, size)
    from kwsearch import networks, sign_data

    choice = recipe.model
    model = networks.planning_model(choice.name, recipe.input, choice.num_classes, trust)
    return sign_data.load(settings, frame_size(recipe, settings), model)


def load_test(
    recipe: Recipe, settings: Proxy, examples: LabelledData | SignData
) -> LabelledData | SignData:
    """`examples` with the test part to score on. Raises data.DataError where there is none."""
    if isinstance(examples, LabelledData):
        return labelled_data.load_test(settings, examples)
    from kwsearch import sign_data

    return sign_data.load_test(settings, frame_size(recipe, settings), examples)


def frame_size(recipe: Recipe, settings: Proxy) -> tuple[int, int]:
    """(H, W) that the proxy trains on."""
    height, width = input_of(recipe)[-2:]
    return (height, width) if settings.resolution is None else (settings.resolution,) * 2


def fingerprint(examples: LabelledData | SignData) -> str:
    """Of the training part."""
    train = examples.train
    if isinstance(train, data.Videos):
        return data.fingerprint_videos(train)
    return data.fingerprint(train)


def count(settings: Proxy) -> int | None:
    """Examples of the training part with what is held out of it, as far as this machine says."""
    with suppress(data.DataError):
        return len(data.load(settings.data, "train"))
    with suppress(data.DataError):
        return len(data.load_videos(settings.data, "train", (4, 4)))
    return None
