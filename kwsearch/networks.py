"""A model by name, for an input size and a number of classes; and what tracing it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kwlayers.plan import Network, PlanError
from kwsearch import zoo

if TYPE_CHECKING:
    from torch import nn

InputSize = tuple[int, ...]


def build_model(
    name: str,
    input_size: InputSize | None = None,
    num_classes: int | None = None,
    width: float | None = None,
) -> nn.Module:
    """The model `name` on the current device, its stem for the channels of `input_size`.

    width: scales its channels. Defaults are the zoo's. Raises `zoo.UnknownModelError` and
    PlanError.
    """
    entry = zoo.get(name)
    size = input_size or entry.input_size
    options: dict[str, Any] = {"in_channels": size[0]}
    if width is not None:
        options["width"] = width
    if num_classes is not None:
        options["num_classes"] = num_classes
    if "img_size" in entry.options:
        if len(set(size[1:])) > 1:
            raise PlanError(f"{name} takes square images, not {'x'.join(map(str, size))}")
        options["img_size"] = size[1]
    try:
        return zoo.create(name, **options)
    except zoo.UnknownModelError:
        raise
    except ValueError as error:
        raise PlanError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None


def trace_model(
    name: str, input_size: InputSize | None = None, num_classes: int | None = None
) -> Network:
    """The network behind a name, built and run on `meta`: no weights, no data."""
    import torch

    from kwlayers.sites import trace

    with torch.device("meta"):
        model = build_model(name, input_size, num_classes)
    return trace(model, input_size or zoo.get(name).input_size)
