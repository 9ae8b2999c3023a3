"""The search space of MicroNAS, and any architecture of it as a list of plain operators.

A window of T steps from S sensors goes through time cells, which halve the steps, then through
fusion stages, which halve the sensors in one cell and keep them in `plain_cells` more, then through
a 1x1 convolution to the classes, global average pooling and a softmax. A size is halved, rounding
up, while the half is not below its limit, and at least once.

A time cell is one convolution: its kernel and its channels are chosen. A fusion cell is a
bottleneck over all sensors, then up to three convolutions of 3, 5 and 7 steps beside each other,
then a residual convolution from its input; their sum is its output. Bottleneck and output widths,
each branch, the residual, and for plain cells whether they are kept at all, are chosen.

A fusion cell with neither branch nor residual has no output. The published code draws again when an
export fails on one; here no such cell can be made: a random cell is drawn among the others, and
the most probable one is looked for among them. The same holds for cells that are not kept.

The exported network has no ReLU on the logits of the classes, which the published one has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

KERNELS = (3, 5, 7)

Shape = tuple[int, ...]


class SpaceError(ValueError):
    """A space that cannot be, or an architecture that is none of a space."""


class Key(NamedTuple):
    """What an operator does, which is what its cost depends on.

    kind: conv2d, add, gap2d or softmax. inputs, output: (H, W, C) or (C,). kernel, strides: (h, w)
    of a convolution with "same" padding.
    """

    kind: str
    inputs: tuple[Shape, ...]
    output: Shape
    kernel: Shape = ()
    strides: Shape = ()

    @property
    def params(self) -> int:
        """Weights and biases."""
        if self.kind != "conv2d":
            return 0
        return (math.prod(self.kernel) * self.inputs[0][-1] + 1) * self.output[-1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a convolution."""
        if self.kind != "conv2d":
            return 0
        return math.prod(self.kernel) * self.inputs[0][-1] * math.prod(self.output)

    @property
    def flash(self) -> int:
        """Bytes of its weights in int8 and its biases in int32."""
        if self.kind != "conv2d":
            return 0
        return (math.prod(self.kernel) * self.inputs[0][-1] + 4) * self.output[-1]

    def at(self, read: int, written: int) -> Key:
        """The same work with other channels of inputs and output."""
        inputs = tuple((*shape[:-1], read) for shape in self.inputs)
        return self._replace(inputs=inputs, output=(*self.output[:-1], written))

    def __str__(self) -> str:
        read = " + ".join(_by(shape) for shape in self.inputs)
        how = f", {_by(self.kernel)} by {_by(self.strides)}" if self.kernel else ""
        return f"{self.kind} {read} to {_by(self.output)}{how}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """The inverse of `str(key)`. Raises ValueError."""
        found = re.fullmatch(r"(\w+) ([\dx +]+) to ([\dx]+)(?:, ([\dx]+) by ([\dx]+))?", text)
        if found is None:
            raise ValueError(f"not an operator: {text!r}")
        kind, read, written, kernel, strides = found.groups()
        inputs = tuple(_sizes(one) for one in read.split(" + "))
        return cls(kind, inputs, _sizes(written), _sizes(kernel), _sizes(strides))


class Operator(NamedTuple):
    """One step of a network. inputs: names of the operators it reads, or `input`."""

    name: str
    inputs: tuple[str, ...]
    key: Key
    relu: bool = False

    @property
    def cell(self) -> str:
        """The cell it is of."""
        return self.name.split(".")[0]


class Decision(NamedTuple):
    """One choice. name: its cell's and its own."""

    name: str
    options: tuple[int, ...]


@dataclass(frozen=True)
class TimeCell:
    """What was chosen for a time cell."""

    kernel: int
    channels: int


@dataclass(frozen=True)
class FusionCell:
    """What was chosen for a fusion cell. branches: the kernels that are there."""

    bottleneck: int
    channels: int
    branches: tuple[int, ...]
    residual: bool
    keep: bool = True


@dataclass(frozen=True)
class Architecture:
    """One choice for every decision of a space."""

    time: tuple[TimeCell, ...]
    fusion: tuple[FusionCell, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dictionaries."""
        return {
            "time": [dict(vars(cell)) for cell in self.time],
            "fusion": [{**vars(cell), "branches": list(cell.branches)} for cell in self.fusion],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse. Raises SpaceError."""
        _check_keys("architecture", data, cls)
        return cls(
            tuple(_cell(TimeCell, f"time{i}", one) for i, one in _listed(data, "time")),
            tuple(_cell(FusionCell, f"fusion{i}", one) for i, one in _listed(data, "fusion")),
        )


@dataclass(frozen=True)
class TimePlace:
    """A time cell's place. steps, sensors: of its input. in_channels: the widths it may have."""

    name: str
    steps: int
    sensors: int
    in_channels: tuple[int, ...]
    channels: tuple[int, ...]

    def decisions(self) -> tuple[Decision, ...]:
        """What is chosen here."""
        return (
            Decision(f"{self.name}.kernel", KERNELS),
            Decision(f"{self.name}.channels", self.channels),
        )

    def cell(self, chosen: Mapping[str, int]) -> TimeCell:
        """chosen: an option of each decision."""
        return TimeCell(chosen[f"{self.name}.kernel"], chosen[f"{self.name}.channels"])

    def chosen(self, cell: TimeCell) -> dict[str, int]:
        """The inverse."""
        return {f"{self.name}.kernel": cell.kernel, f"{self.name}.channels": cell.channels}

    def operators(self, cell: TimeCell, in_channels: int, source: str) -> tuple[Operator, ...]:
        """source: the operator that it reads."""
        read = (self.steps, self.sensors, in_channels)
        written = (_half(self.steps), self.sensors, cell.channels)
        key = Key("conv2d", (read,), written, (cell.kernel, 1), (2, 1))
        return (Operator(f"{self.name}.conv", (source,), key, relu=True),)


@dataclass(frozen=True)
class FusionPlace:
    """A fusion cell's place. reducing: halves the sensors; only others can be left out."""

    name: str
    steps: int
    sensors: int
    reducing: bool
    in_channels: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def out_sensors(self) -> int:
        """Sensors of its output."""
        return _half(self.sensors) if self.reducing else self.sensors

    def decisions(self) -> tuple[Decision, ...]:
        """What is chosen here."""
        switches = [*(f"branch{kernel}" for kernel in KERNELS), "residual"]
        if not self.reducing:
            switches.append("keep")
        return (
            Decision(f"{self.name}.bottleneck", self.channels),
            Decision(f"{self.name}.channels", self.channels),
            *(Decision(f"{self.name}.{switch}", (0, 1)) for switch in switches),
        )

    def cell(self, chosen: Mapping[str, int]) -> FusionCell:
        """chosen: an option of each decision."""
        return FusionCell(
            chosen[f"{self.name}.bottleneck"],
            chosen[f"{self.name}.channels"],
            tuple(k for k in KERNELS if chosen[f"{self.name}.branch{k}"]),
            bool(chosen[f"{self.name}.residual"]),
            self.reducing or bool(chosen[f"{self.name}.keep"]),
        )

    def chosen(self, cell: FusionCell) -> dict[str, int]:
        """The inverse."""
        found = {
            f"{self.name}.bottleneck": cell.bottleneck,
            f"{self.name}.channels": cell.channels,
            **{f"{self.name}.branch{k}": int(k in cell.branches) for k in KERNELS},
            f"{self.name}.residual": int(cell.residual),
        }
        return found if self.reducing else {**found, f"{self.name}.keep": int(cell.keep)}

    def operators(self, cell: FusionCell, in_channels: int, source: str) -> tuple[Operator, ...]:
        """In the order of execution: a branch is added as soon as it is there, the residual last.

        source: the operator that it reads.
        """
        if not cell.keep:
            return ()
        found: list[Operator] = []
        read = (self.steps, self.sensors, in_channels)
        narrow = (self.steps, self.out_sensors, cell.bottleneck)
        written = (self.steps, self.out_sensors, cell.channels)
        stride = 2 if self.reducing else 1
        total: str | None = None

        def conv(name: str, source: str, key: Key) -> str:
            found.append(Operator(f"{self.name}.{name}", (source,), key, relu=True))
            return found[-1].name

        def plus(part: str) -> str:
            if total is None:
                return part
            number = sum(one.key.kind == "add" for one in found) + 1
            key = Key("add", (written, written), written)
            found.append(Operator(f"{self.name}.add{number}", (total, part), key))
            return found[-1].name

        if cell.branches:
            over_all = Key("conv2d", (read,), narrow, (1, self.sensors), (1, stride))
            bottleneck = conv("bottleneck", source, over_all)
        for kernel in cell.branches:
            key = Key("conv2d", (narrow,), written, (kernel, 1), (1, 1))
            total = plus(conv(f"branch{kernel}", bottleneck, key))
        if cell.residual:
            key = Key("conv2d", (read,), written, (1, stride), (1, stride))
            total = plus(conv("residual", source, key))
        return tuple(found)


@dataclass(frozen=True)
class Space:
    """Windows of `steps` from `sensors`, to be told apart into `classes`.

    time_channels, fusion_channels: widths that cells may have, ascending. time_limit,
    sensor_limit: what halving does not go below. plain_cells: of a stage, after its reducing one.
    """

    steps: int
    sensors: int
    classes: int
    time_channels: tuple[int, ...] = (4, 8, 12, 16)
    fusion_channels: tuple[int, ...] = (8, 16, 24, 32, 40, 48, 56, 64)
    time_limit: int = 16
    sensor_limit: int = 5
    plain_cells: int = 2

    def __post_init__(self) -> None:
        least = {"classes": 2, "plain_cells": 0}
        for name in ("steps", "sensors", "classes", "time_limit", "sensor_limit", "plain_cells"):
            value = getattr(self, name)
            if type(value) is not int or value < least.get(name, 1):
                raise SpaceError(
                    f"{name} {value!r}: must be an integer of at least {least.get(name, 1)}"
                )
        for name in ("time_channels", "fusion_channels"):
            grid = getattr(self, name)
            whole = isinstance(grid, tuple) and grid and all(type(c) is int for c in grid)
            if not whole or grid[0] < 1 or any(a >= b for a, b in pairwise(grid)):
                raise SpaceError(
                    f"{name} {grid!r}: must be a tuple of ascending positive integers, as (4, 8)"
                )

    @cached_property
    def cells(self) -> tuple[TimePlace | FusionPlace, ...]:
        """The cells' places, in order."""
        found: list[TimePlace | FusionPlace] = []
        steps, sensors = self.steps, self.sensors
        widths: tuple[int, ...] = (1,)
        for i in range(halvings(self.steps, self.time_limit)):
            found.append(TimePlace(f"time{i + 1}", steps, sensors, widths, self.time_channels))
            steps, widths = _half(steps), self.time_channels
        number = 0
        for _ in range(halvings(self.sensors, self.sensor_limit)):
            for reducing in (True, *(False,) * self.plain_cells):
                number += 1
                name, grid = f"fusion{number}", self.fusion_channels
                place = FusionPlace(name, steps, sensors, reducing, widths, grid)
                found.append(place)
                sensors, widths = place.out_sensors, grid
        return tuple(found)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """All choices, cell by cell."""
        return tuple(decision for cell in self.cells for decision in cell.decisions())

    @property
    def scalars(self) -> int:
        """How many numbers the relaxation of all choices has."""
        return sum(len(decision.options) for decision in self.decisions)

    @property
    def combinations(self) -> int:
        """Combinations of options, as published: cells without an output are among them."""
        return math.prod(len(one.options) for one in self.decisions)

    @property
    def architectures(self) -> int:
        """Combinations that are networks: 15 of 16 in each fusion cell."""
        found = self.combinations
        for cell in self.cells:
            found = found // 16 * 15 if isinstance(cell, FusionPlace) else found
        return found

    def check(self, architecture: Architecture) -> None:
        """Raises SpaceError for an architecture that is none of this space."""
        for kind, cells, of in (
            ("time", architecture.time, TimePlace),
            ("fusion", architecture.fusion, FusionPlace),
        ):
            expected = sum(isinstance(place, of) for place in self.cells)
            if len(cells) != expected:
                raise SpaceError(f"{len(cells)} {kind} cells: this space has {expected}")
        for place, cell in zip(self.cells, _cells(architecture), strict=True):
            _check_cell(place, cell)

    def options(self, architecture: Architecture) -> dict[str, int]:
        """The chosen option of each decision. Raises SpaceError."""
        self.check(architecture)
        found: dict[str, int] = {}
        for place, cell in zip(self.cells, _cells(architecture), strict=True):
            found |= place.chosen(cell)  # type: ignore[arg-type] # of its kind: was checked
        return found

    def architecture(self, chosen: Mapping[str, int]) -> Architecture:
        """chosen: an option of each decision. Raises SpaceError."""
        if missing := [one.name for one in self.decisions if one.name not in chosen]:
            raise SpaceError(f"no option for {', '.join(missing)}: every decision needs one")
        time, fusion = [], []
        for place in self.cells:
            if isinstance(place, TimePlace):
                time.append(place.cell(chosen))
            else:
                fusion.append(place.cell(chosen))
        found = Architecture(tuple(time), tuple(fusion))
        self.check(found)
        return found

    def random(self, rng: Random) -> Architecture:
        """Each as probable as any other."""
        chosen = {one.name: rng.choice(one.options) for one in self.decisions}
        for place in self.cells:
            if isinstance(place, FusionPlace):
                some = rng.randrange(1, 16)
                for bit, part in enumerate((*(f"branch{k}" for k in KERNELS), "residual")):
                    chosen[f"{place.name}.{part}"] = some >> bit & 1
        return self.architecture(chosen)

    def minimum(self) -> Architecture:
        """The published least: first options everywhere, but a branch of 3. The network of only
        residual convolutions is smaller still.
        """
        chosen = {one.name: one.options[0] for one in self.decisions}
        for place in self.cells:
            if isinstance(place, FusionPlace):
                chosen[f"{place.name}.branch{KERNELS[0]}"] = 1
        return self.architecture(chosen)

    def maximum(self) -> Architecture:
        """The last option of every decision."""
        return self.architecture({one.name: one.options[-1] for one in self.decisions})


def halvings(size: int, limit: int) -> int:
    """How often a size is halved, rounding up: while the half is at least `limit`, at least once.

    >>> halvings(128, 16), halvings(30, 5), halvings(3, 5)
    (3, 2, 1)
    """
    found = 0
    while size > 1 and _half(size) >= limit:
        size, found = _half(size), found + 1
    return max(found, 1)


def operators(space: Space, architecture: Architecture) -> tuple[Operator, ...]:
    """The network of an architecture, in the order of execution. Raises SpaceError."""
    space.check(architecture)
    found: list[Operator] = []
    source, channels = "input", 1
    for place, cell in zip(space.cells, _cells(architecture), strict=True):
        added = place.operators(cell, channels, source)  # type: ignore[arg-type] # was checked
        if added:
            source, channels = added[-1].name, cell.channels
        found += added
    return (*found, *head(space, channels, source))


def head(space: Space, channels: int, source: str) -> tuple[Operator, ...]:
    """From the last cell's output, of that many channels, to the classes."""
    last = space.cells[-1]
    assert isinstance(last, FusionPlace)
    read, classes = (last.steps, last.out_sensors), (space.classes,)
    conv = Key("conv2d", ((*read, channels),), (*read, space.classes), (1, 1), (1, 1))
    return (
        Operator("head.conv", (source,), conv),
        Operator("head.gap", ("head.conv",), Key("gap2d", (conv.output,), classes)),
        Operator("head.softmax", ("head.gap",), Key("softmax", (classes,), classes)),
    )


def params(network: tuple[Operator, ...]) -> int:
    """Weights and biases: sum of (kh kw C_in + 1) C_out."""
    return sum(one.key.params for one in network)


def macs(network: tuple[Operator, ...]) -> int:
    """Multiply-accumulates: sum of kh kw C_in C_out H_out W_out."""
    return sum(one.key.macs for one in network)


def _half(size: int) -> int:
    return -(-size // 2)


def _sizes(text: str | None) -> Shape:
    """The inverse of `_by`; () of nothing."""
    return tuple(map(int, text.split("x"))) if text else ()


def _by(sizes: Shape) -> str:
    return "x".join(map(str, sizes))


def _cells(architecture: Architecture) -> tuple[TimeCell | FusionCell, ...]:
    return (*architecture.time, *architecture.fusion)


def _check_cell(place: TimePlace | FusionPlace, cell: TimeCell | FusionCell) -> None:
    if isinstance(cell, FusionCell):
        if not cell.branches and not cell.residual:
            raise SpaceError(
                f"{place.name}: neither branch nor residual, so it has no output; it needs one of "
                f"the branches {KERNELS} or the residual"
            )
        if sorted({*cell.branches} & {*KERNELS}) != list(cell.branches):
            raise SpaceError(
                f"{place.name}: branches {cell.branches}: must be some of {KERNELS}, ascending"
            )
        if isinstance(place, FusionPlace) and place.reducing and not cell.keep:
            raise SpaceError(f"{place.name}: halves the sensors, and so cannot be left out")
        widths = {"bottleneck": cell.bottleneck, "channels": cell.channels}
    else:
        if cell.kernel not in KERNELS:
            raise SpaceError(f"{place.name}: kernel {cell.kernel}: must be one of {KERNELS}")
        widths = {"channels": cell.channels}
    for name, width in widths.items():
        if width not in place.channels:
            raise SpaceError(f"{place.name}: {name} {width}: must be one of {place.channels}")


def _listed(data: Mapping[str, Any], name: str) -> enumerate[Any]:
    if not isinstance(data[name], (list, tuple)):
        raise SpaceError(f"{name} {data[name]!r}: must be a list of cells")
    return enumerate(data[name], 1)


def _check_keys(what: str, data: Any, of: type[Any]) -> None:
    expected = [one.name for one in fields(of)]
    if not isinstance(data, Mapping) or sorted(map(str, data)) != sorted(expected):
        had = f"keys {', '.join(map(str, data))}" if isinstance(data, Mapping) else repr(data)
        raise SpaceError(f"{what}: {had}: must have exactly the keys {', '.join(expected)}")


def _cell(of: type[Any], name: str, data: Any) -> Any:
    _check_keys(name, data, of)
    values = dict(data)
    if "branches" in values:
        if not isinstance(values["branches"], (list, tuple)):
            raise SpaceError(f"{name}: branches {values['branches']!r}: must be a list of kernels")
        values["branches"] = tuple(values["branches"])
    for key, value in values.items():
        expected = bool if key in ("residual", "keep") else tuple if key == "branches" else int
        numbers = value if key == "branches" else ()
        if type(value) is not expected or any(type(one) is not int for one in numbers):
            kind = {bool: "true or false", tuple: "a list of integers", int: "an integer"}
            raise SpaceError(f"{name}: {key} {value!r}: must be {kind[expected]}")
    return of(**values)
