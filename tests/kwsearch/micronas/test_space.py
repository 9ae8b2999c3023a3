"""MicroNAS' space: published counts, the operators of an architecture, what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kwsearch.micronas.space import (
    Architecture,
    FusionCell,
    Space,
    SpaceError,
    halvings,
    macs,
    operators,
    params,
)
from tests.kwsearch.micronas.spaces import SKODA_R, TINY, UCI_HAR, alike, published

COUNTS = [
    (UCI_HAR, "min", 670, 69_888),
    (UCI_HAR, "middle", 31_654, 2_613_760),
    (UCI_HAR, "wide", 17_334, 1_599_744),
    (UCI_HAR, "max", 249_830, 20_448_256),
    (SKODA_R, "min", 2_494, 468_736),
    (SKODA_R, "middle", 108_802, 20_303_360),
    (SKODA_R, "max", 680_346, 126_551_040),
]


@pytest.mark.parametrize(("space", "name", "weights", "products"), COUNTS)
def test_counts_are_those_measured_of_the_published_code(
    space: Space, name: str, weights: int, products: int
) -> None:
    network = operators(space, published(space)[name])
    assert (params(network), macs(network)) == (weights, products)


def test_minimum_and_maximum_are_the_published_ones() -> None:
    for space in (UCI_HAR, SKODA_R):
        assert space.minimum() == published(space)["min"]
        assert space.maximum() == published(space)["max"]


@pytest.mark.parametrize(
    ("space", "scalars", "time", "reducing", "plain"),
    [(UCI_HAR, 97, 3, 1, 2), (SKODA_R, 166, 2, 2, 4)],
)
def test_choices_are_the_published_ones(
    space: Space, scalars: int, time: int, reducing: int, plain: int
) -> None:
    assert space.scalars == scalars
    assert space.combinations == 12**time * 1024**reducing * 2048**plain
    # 15 of the 16 combinations of three branches and the residual have an output.
    assert space.architectures == 12**time * 960**reducing * 1920**plain


def test_the_published_sizes_of_both_spaces() -> None:
    assert f"{UCI_HAR.combinations:.1e}" == "7.4e+12"
    assert f"{SKODA_R.combinations:.1e}" == "2.7e+21"


@pytest.mark.parametrize(
    ("size", "limit", "times"),
    [
        (128, 16, 3),
        (64, 16, 2),
        (9, 5, 1),
        (30, 5, 2),
        (3, 5, 1),
        (1, 1, 1),
        (8, 1, 3),
        (77, 16, 2),
    ],
)
def test_a_size_is_halved_while_the_half_is_not_below_the_limit(
    size: int, limit: int, times: int
) -> None:
    assert halvings(size, limit) == times


def test_decisions_come_cell_by_cell() -> None:
    assert [one.name for one in TINY.decisions] == [
        "time1.kernel", "time1.channels",
        "fusion1.bottleneck", "fusion1.channels",
        "fusion1.branch3", "fusion1.branch5", "fusion1.branch7", "fusion1.residual",
        "fusion2.bottleneck", "fusion2.channels",
        "fusion2.branch3", "fusion2.branch5", "fusion2.branch7", "fusion2.residual",
        "fusion2.keep",
    ]  # fmt: skip


def test_operators_of_a_whole_cell() -> None:
    network = operators(TINY, alike(TINY, 5, 2, 4, 8, (3, 7), True))
    assert [str(one.key) for one in network] == [
        "conv2d 6x3x1 to 3x3x2, 5x1 by 2x1",
        "conv2d 3x3x2 to 3x2x4, 1x3 by 1x2",
        "conv2d 3x2x4 to 3x2x8, 3x1 by 1x1",
        "conv2d 3x2x4 to 3x2x8, 7x1 by 1x1",
        "add 3x2x8 + 3x2x8 to 3x2x8",
        "conv2d 3x3x2 to 3x2x8, 1x2 by 1x2",
        "add 3x2x8 + 3x2x8 to 3x2x8",
        "conv2d 3x2x8 to 3x2x4, 1x2 by 1x1",
        "conv2d 3x2x4 to 3x2x8, 3x1 by 1x1",
        "conv2d 3x2x4 to 3x2x8, 7x1 by 1x1",
        "add 3x2x8 + 3x2x8 to 3x2x8",
        "conv2d 3x2x8 to 3x2x8, 1x1 by 1x1",
        "add 3x2x8 + 3x2x8 to 3x2x8",
        "conv2d 3x2x8 to 3x2x2, 1x1 by 1x1",
        "gap2d 3x2x2 to 2",
        "softmax 2 to 2",
    ]
    assert [one.inputs for one in network[1:7]] == [
        ("time1.conv",),
        ("fusion1.bottleneck",),
        ("fusion1.bottleneck",),
        ("fusion1.branch3", "fusion1.branch7"),
        ("time1.conv",),
        ("fusion1.add1", "fusion1.residual"),
    ]


def test_logits_have_no_relu_and_all_other_convolutions_do() -> None:
    network = operators(TINY, TINY.maximum())
    plain = [one.name for one in network if one.key.kind == "conv2d" and not one.relu]
    assert plain == ["head.conv"]


def test_a_cell_of_the_residual_only_has_no_bottleneck() -> None:
    network = operators(TINY, alike(TINY, 3, 2, 4, 4, (), True, keep=False))
    names = [one.name for one in network]
    assert names == ["time1.conv", "fusion1.residual", "head.conv", "head.gap", "head.softmax"]
    assert network[2].inputs == ("fusion1.residual",)


def test_every_operator_reads_what_was_made_before_it() -> None:
    rng = random.Random(0)
    for _ in range(50):
        made = {"input": (64, 30, 1)}
        for one in operators(SKODA_R, SKODA_R.random(rng)):
            assert tuple(made[name] for name in one.inputs) == one.key.inputs
            made[one.name] = one.key.output
        assert made["head.softmax"] == (10,)


def test_random_architectures_are_of_all_kinds_and_have_outputs() -> None:
    rng = random.Random(0)
    found = [TINY.random(rng).fusion[1] for _ in range(600)]
    parts = {(cell.branches, cell.residual) for cell in found}
    assert len(parts) == 15
    assert ((), False) not in parts
    assert 240 < sum(cell.keep for cell in found) < 360
    assert TINY.random(random.Random(3)) == TINY.random(random.Random(3))


def test_plain_data_gives_an_architecture_back() -> None:
    rng = random.Random(0)
    for _ in range(20):
        one = UCI_HAR.random(rng)
        assert Architecture.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        assert UCI_HAR.architecture(UCI_HAR.options(one)) == one


def plain(**changes: Any) -> dict[str, Any]:
    found = TINY.maximum().to_dict()
    found["fusion"][0] |= changes
    return found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"time": []}, "architecture: keys time: must have exactly the keys time, fusion"),
        ({"time": 3, "fusion": []}, "time 3: must be a list of cells"),
        (plain(width=3), "fusion1: keys .*, width: must have exactly the keys bottleneck, channel"),
        (plain(branches=3), "fusion1: branches 3: must be a list of kernels"),
        (plain(branches=["3"]), r"fusion1: branches \('3',\): must be a list of integers"),
        (plain(residual=1), "fusion1: residual 1: must be true or false"),
        (plain(channels=8.0), "fusion1: channels 8.0: must be an integer"),
        (plain(channels=True), "fusion1: channels True: must be an integer"),
        ([1], r"architecture: \[1\]: must have exactly the keys"),
    ],
)
def test_other_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=f"^{message}"):
        Architecture.from_dict(data)


def cells(**changes: Any) -> Architecture:
    one = TINY.maximum()
    first = FusionCell(**{**vars(one.fusion[0]), **changes})
    return Architecture(one.time, (first, one.fusion[1]))


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (cells(branches=(), residual=False), "fusion1: neither branch nor residual, so it has no"),
        (cells(branches=(7, 3)), r"fusion1: branches \(7, 3\): must be some of \(3, 5, 7\), asc"),
        (cells(branches=(3, 3)), r"fusion1: branches \(3, 3\): must be some of \(3, 5, 7\), asc"),
        (cells(branches=(4,)), r"fusion1: branches \(4,\): must be some of \(3, 5, 7\)"),
        (cells(keep=False), "fusion1: halves the sensors, and so cannot be left out"),
        (cells(bottleneck=12), r"fusion1: bottleneck 12: must be one of \(4, 8\)"),
        (cells(channels=2), r"fusion1: channels 2: must be one of \(4, 8\)"),
        (alike(TINY, 4, 2, 4, 4, (3,), True), r"time1: kernel 4: must be one of \(3, 5, 7\)"),
        (alike(TINY, 3, 8, 4, 4, (3,), True), r"time1: channels 8: must be one of \(2, 4\)"),
        (Architecture((), ()), "0 time cells: this space has 1"),
        (Architecture(TINY.maximum().time, ()), "0 fusion cells: this space has 2"),
    ],
)
def test_architectures_of_no_space_are_refused(one: Architecture, message: str) -> None:
    with pytest.raises(SpaceError, match=f"^{message}"):
        operators(TINY, one)


def test_options_must_be_complete() -> None:
    with pytest.raises(SpaceError, match=r"^no option for time1\.channels, fusion1\.bottle"):
        TINY.architecture({"time1.kernel": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0: must be an integer of at least 1"),
        ({"classes": 1}, "classes 1: must be an integer of at least 2"),
        ({"plain_cells": -1}, "plain_cells -1: must be an integer of at least 0"),
        ({"sensors": 2.0}, "sensors 2.0: must be an integer of at least 1"),
        ({"time_channels": ()}, r"time_channels \(\): must be a tuple of ascending positive"),
        ({"fusion_channels": (8, 8)}, r"fusion_channels \(8, 8\): must be a tuple of ascending"),
        ({"fusion_channels": (0, 8)}, r"fusion_channels \(0, 8\): must be a tuple of ascending"),
        ({"fusion_channels": [8]}, r"fusion_channels \[8\]: must be a tuple of ascending"),
    ],
)
def test_spaces_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=f"^{message}"):
        Space(**{"steps": 128, "sensors": 9, "classes": 6, **changes})
