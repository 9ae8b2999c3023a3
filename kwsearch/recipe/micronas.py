"""What a recipe may say of micronas: the space of its architectures, one of them, the supernet."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from kwsearch.recipe.fields import UNIQUE, AtLeast1, Bool, NotNegative, Positive, Ratio
from kwsearch.recipe.sections import Section

MODEL = "micronas"


def _ascending(widths: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in pairwise(widths)):
        raise ValueError(f"not ascending (got {list(widths)}; allowed e.g. [4, 8, 12, 16])")
    return widths


Widths = Annotated[tuple[AtLeast1, ...], Field(min_length=1), AfterValidator(_ascending)]
Kernel = Annotated[Literal[3, 5, 7], WithJsonSchema({"enum": [3, 5, 7]})]


class TimeCell(Section):
    """What was chosen for a time cell."""

    kernel: Kernel = Field(description="steps of its convolution")
    channels: AtLeast1 = Field(description="channels of its output")


class FusionCell(Section):
    """What was chosen for a fusion cell."""

    bottleneck: AtLeast1 = Field(description="channels of its bottleneck")
    channels: AtLeast1 = Field(description="channels of its output")
    branches: tuple[Kernel, ...] = Field(description="kernels of the convolutions that it has")
    residual: Bool = Field(description="whether it has a convolution from its input")
    keep: Bool = Field(default=True, description="false leaves it out")


class Architecture(Section):
    """One choice for every cell."""

    time: tuple[TimeCell, ...] = Field(description="time cells")
    fusion: tuple[FusionCell, ...] = Field(description="fusion cells")


class MicroNAS(Section):
    """The space of architectures, by default the published one; and one of them."""

    time_channels: Widths = Field(
        default=(4, 8, 12, 16), description="widths that time cells may have"
    )
    fusion_channels: Widths = Field(
        default=(8, 16, 24, 32, 40, 48, 56, 64), description="widths that fusion cells may have"
    )
    time_limit: AtLeast1 = Field(
        default=16, description="steps that time cells do not go below when they halve them"
    )
    sensor_limit: AtLeast1 = Field(
        default=5, description="sensors that fusion stages do not go below when they halve them"
    )
    plain_cells: NotNegative = Field(
        default=2, description="cells of a fusion stage after the one that halves"
    )
    in_place_add: Bool = Field(
        default=False, description="the runtime adds into an input that nothing else reads"
    )
    conv_scratch: Bool = Field(
        default=False, description="the runtime's convolutions need CMSIS-NN's scratch memory"
    )
    warehouses: Annotated[tuple[Ratio, ...], UNIQUE] = Field(
        default=(),
        description="ratios b of KernelWarehouse to try on the convolutions of an architecture, "
        "besides none, e.g. [0.5, 1]; of search.strategy sampler",
    )
    warehouse: Ratio | None = Field(
        default=None, description="the ratio b of the architecture's warehouses; null is none"
    )
    architecture: Architecture | None = Field(
        default=None, description="one architecture; null is none chosen yet"
    )


class Supernet(Section):
    """How a supernet is trained: its weights and its choices in turns. Defaults as published."""

    epochs: AtLeast1 = Field(default=100, description="passes over the training windows")
    batch_size: Annotated[AtLeast1, Field(ge=2)] = Field(default=64, description="windows per step")
    lr: Positive = Field(default=1e-3, description="learning rate of the weights")
    logit_lr: Positive = Field(default=0.36, description="first learning rate of the choices")
    last_logit_lr: Positive = Field(default=8e-4, description="their last one, after a cosine")
    clip: Positive = Field(default=5.0, description="norm of the weights' gradients, at most")
    temperature: Positive = Field(default=1.0, description="of the first draw of choices")
    decay: Annotated[Positive, Field(le=1)] = Field(
        default=0.995, description="the temperature's factor from step to step"
    )
    last_temperature: Positive = Field(default=1e-5, description="what it does not fall below")
    above: Positive = Field(
        default=4.0,
        description="weight of a limit that is not kept; less, e.g. 0.1, where networks come out "
        "far smaller than the limits",
    )
    below: Positive = Field(default=0.002, description="weight of a limit that is kept")
