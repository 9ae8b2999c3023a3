"""Peak memory: measured values, hand arithmetic, and expectations by enumeration."""

from __future__ import annotations

import random

import pytest
import torch

from kwsearch.micronas.mixture import as_double, equal, one_hot
from kwsearch.micronas.peak_memory import ExpectedPeak, live_bytes, peak_bytes, published_peak
from kwsearch.micronas.space import (
    Architecture,
    FusionCell,
    Space,
    SpaceError,
    TimeCell,
    operators,
)
from tests.kwsearch.micronas.spaces import (
    SKODA_R,
    TINY,
    UCI_HAR,
    alike,
    every,
    published,
    random_mixture,
)

# Of section 3.5: the published surrogate, and liveness as TensorFlow Lite has it.
MEASURED = [
    (UCI_HAR, "min", 3_504, 3_456),
    (UCI_HAR, "middle", 10_240, 7_680),
    (UCI_HAR, "wide", 14_016, 13_824),
    (UCI_HAR, "max", 20_480, 25_600),
    (SKODA_R, "min", 5_808, 5_760),
    (SKODA_R, "middle", 30_720, 23_040),
    (SKODA_R, "max", 61_440, 76_800),
]


@pytest.mark.parametrize(("space", "name", "surrogate", "liveness"), MEASURED)
def test_both_are_those_measured(space: Space, name: str, surrogate: int, liveness: int) -> None:
    one = published(space)[name]
    assert peak_bytes(operators(space, one)) == liveness
    assert float(published_peak(space, one_hot(space, one))) == surrogate


# With so many classes that the logits are the largest tensor.
MANY = Space(6, 3, 40, (2, 4), (4, 8), plain_cells=1)
LEFT_OUT = FusionCell(8, 8, (3,), False, keep=False)
# Numbers 11 and 12 of the published random search.
SAVED = [
    (
        Architecture(
            (TimeCell(3, 16), TimeCell(3, 12)),
            (
                FusionCell(16, 32, (3, 7), True),
                FusionCell(56, 64, (5,), False),
                LEFT_OUT,
                FusionCell(32, 16, (5,), True),
                FusionCell(8, 24, (3, 5), True),
                LEFT_OUT,
            ),
        ),
        46_080,
    ),
    (
        Architecture(
            (TimeCell(7, 4), TimeCell(3, 16)),
            (
                FusionCell(32, 40, (3, 5, 7), False),
                FusionCell(24, 32, (3, 5, 7), True),
                LEFT_OUT,
                FusionCell(48, 16, (3,), False),
                FusionCell(16, 24, (3, 5, 7), False),
                LEFT_OUT,
            ),
        ),
        36_480,
    ),
]


@pytest.mark.parametrize(("one", "surrogate"), SAVED, ids=["11", "12"])
def test_the_surrogate_of_saved_architectures_is_the_saved_one(
    one: Architecture, surrogate: int
) -> None:
    assert float(published_peak(SKODA_R, one_hot(SKODA_R, one))) == surrogate


@pytest.mark.parametrize(
    ("channels", "branches", "surrogate"),
    [
        # Tensors of 16x5x64 = 5,120: the addition's three, and the input of a branch to come.
        (16, (3, 5, 7), 3 * 5_120 + 5_120),
        # Scratch 4*7*64, output, input, and an accumulator of 16*5*8 by 7, the width's number.
        (4, (7,), 1_792 + 5_120 + 5_120 + 640 * 7),
    ],
)
def test_the_surrogates_terms_are_those_of_the_specification(
    channels: int, branches: tuple[int, ...], surrogate: int
) -> None:
    one = alike(UCI_HAR, 3, channels, 64, 64, branches, False)
    assert float(published_peak(UCI_HAR, one_hot(UCI_HAR, one))) == surrogate


def test_the_surrogate_is_above_the_truth_where_nothing_is_there_to_be_added() -> None:
    assert peak_bytes(operators(SKODA_R, SAVED[0][0])) == 28_800


def test_the_published_surrogate_of_an_even_mixture_is_that_measured() -> None:
    assert float(published_peak(UCI_HAR, equal(UCI_HAR))) == pytest.approx(8_840, rel=1e-12)


def test_live_bytes_are_those_counted_by_hand() -> None:
    network = operators(TINY, alike(TINY, 3, 2, 4, 8, (3, 5), True, keep=False))
    # input 18; time 18; bottleneck 3*2*4 = 24; others 3*2*8 = 48; logits 3*2*2 = 12
    assert live_bytes(network) == [
        18 + 18,
        18 + 24,  # the time cell's output stays for the residual
        18 + 24 + 48,
        18 + 24 + 48 + 48,
        18 + 48 + 48 + 48,
        18 + 48 + 48,
        48 + 48 + 48,
        48 + 12,
        12 + 2,
        2 + 2,
    ]


def test_an_addition_in_place_takes_nothing_more() -> None:
    network = operators(TINY, alike(TINY, 3, 2, 4, 8, (3, 5), True, keep=False))
    found = live_bytes(network, in_place_add=True)
    assert (found[4], found[6]) == (18 + 48 + 48, 48 + 48)
    # Of the largest network: input, bottleneck, and two branches of 5,120 bytes.
    assert peak_bytes(operators(UCI_HAR, UCI_HAR.maximum()), in_place_add=True) == 4 * 5_120


def test_scratch_of_a_convolution_is_two_columns_of_its_input() -> None:
    network = operators(UCI_HAR, UCI_HAR.minimum())
    # The second time cell: 64x9x4 in, 32x9x4 out, and 4 * 3 * 4.
    assert peak_bytes(network, conv_scratch=True) == 2_304 + 1_152 + 48
    network = operators(UCI_HAR, UCI_HAR.maximum())
    # The convolution of 7: input, bottleneck, sum, itself, and 4 * 7 * 64.
    assert peak_bytes(network, in_place_add=True, conv_scratch=True) == 4 * 5_120 + 1_792


@pytest.mark.parametrize("how", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "space", [UCI_HAR, SKODA_R, TINY, MANY], ids=["uci", "skoda", "tiny", "many"]
)
def test_the_expectation_of_one_architecture_is_its_peak(
    space: Space, how: tuple[bool, bool]
) -> None:
    in_place, scratch = how
    expected = ExpectedPeak(space, in_place_add=in_place, conv_scratch=scratch)
    rng = random.Random(0)
    for _ in range(25):
        one = space.random(rng)
        network = operators(space, one)
        peak = peak_bytes(network, in_place_add=in_place, conv_scratch=scratch)
        assert float(expected(one_hot(space, one))) == peak


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_expectation_of_a_mixture_is_that_over_all_architectures(seed: int) -> None:
    mixture = random_mixture(TINY, seed)
    one = torch.tensor([0.0, 1.0]).double()
    mixture |= {"fusion1.residual": one, "fusion2.branch5": one}  # so that all have an output
    mixture |= {"time1.kernel": one.new_tensor([0, 0.2, 0.8]), "fusion1.branch7": one.flip(0)}
    mixture |= {"fusion1.branch3": one.flip(0), "fusion2.branch7": one}
    total = weight = 0.0
    for chance, chosen in every(TINY, mixture):
        total += chance * peak_bytes(operators(TINY, TINY.architecture(chosen)))
        weight += chance
    assert weight == pytest.approx(1)
    assert float(ExpectedPeak(TINY)(mixture)) == pytest.approx(total, rel=1e-12)


def test_a_cell_without_output_counts_as_left_out() -> None:
    mixture = one_hot(TINY, alike(TINY, 3, 4, 8, 4, (3,), False, keep=False))
    mixture["fusion1.branch3"] = torch.tensor([1.0, 0.0])
    # The time cell's 18 in and 36 out are the most that is left.
    assert float(ExpectedPeak(TINY)(mixture)) == 18 + 36


def test_every_decision_that_matters_has_a_gradient() -> None:
    # A kernel makes a difference to scratch only, and the first one's is below that of the second.
    assert _without_gradient(ExpectedPeak(SKODA_R)) == ["time1.kernel", "time2.kernel"]
    assert _without_gradient(ExpectedPeak(SKODA_R, conv_scratch=True)) == ["time1.kernel"]


def _without_gradient(expected: ExpectedPeak) -> list[str]:
    """A gradient that is the same for all options is none once a softmax has passed it on."""
    mixture = random_mixture(SKODA_R, 0)
    names = list(mixture)
    leaves = [mixture[name].requires_grad_() for name in names]
    grads = torch.autograd.grad(expected(mixture), leaves)
    return [name for name, grad in zip(names, grads, strict=True) if grad.max() - grad.min() < 1e-9]


def test_gradients_are_those_of_small_changes() -> None:
    mixture = random_mixture(TINY, 1)
    expected = ExpectedPeak(TINY)
    name = "fusion1.channels"
    mixture[name].requires_grad_()
    (grad,) = torch.autograd.grad(expected(mixture), mixture[name])
    shift = torch.tensor([1e-3, -1e-3]).double()
    with torch.no_grad():
        low, high = ({**mixture, name: mixture[name] + sign * shift} for sign in (-1, 1))
        change = expected(high) - expected(low)
    assert float(change) == pytest.approx(float(2 * grad @ shift), rel=1e-9)


def test_the_published_surrogate_has_a_gradient() -> None:
    mixture = {name: one.requires_grad_() for name, one in equal(UCI_HAR).items()}
    published_peak(UCI_HAR, mixture).backward()  # type: ignore[no-untyped-call]
    reached = {name for name, one in mixture.items() if one.grad is not None and one.grad.any()}
    # The second time cell is the largest, and nothing else has one.
    assert reached == {"time1.channels", "time2.channels", "time2.kernel"}


def test_a_mixture_of_another_space_is_refused() -> None:
    mixture = equal(TINY)
    with pytest.raises(SpaceError, match=r"^fusion1\.bottleneck: of shape \(2,\): must be of "):
        as_double(Space(6, 3, 2, (2, 4)), mixture)
    del mixture["time1.kernel"]
    with pytest.raises(SpaceError, match=r"^time1\.kernel: missing: must be of shape \(3,\)"):
        ExpectedPeak(TINY)(mixture)
