"""What torch allocates, counted without data: as its profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kwsearch.allocations import Allocations, cpu_scratch, no_scratch
from kwsearch.timing import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

# What oneDNN takes for itself, in bytes, and is not counted: more for the gradients of a stem.
SMALL, STEM = 80_000, 500_000


def counted(run: Callable[[], Any], *held: Tensor, scratch: Any = cpu_scratch) -> int:
    allocations = Allocations(scratch)
    allocations.ignore(held)
    with allocations:
        kept = run()
    del kept
    return max(accumulate((event.nbytes for event in allocations.events), initial=0))


# (images, channels, outputs, side, kernel, stride, groups)
CONVOLUTIONS = [
    (4, 64, 64, 14, 3, 1, 1),
    (4, 64, 96, 28, 3, 2, 1),
    (4, 24, 40, 28, 3, 1, 1),  # no multiple of a block of 16 channels
    (32, 3, 64, 64, 7, 2, 1),  # a few channels are not copied
    (16, 64, 128, 28, 1, 1, 1),
    (4, 64, 128, 28, 1, 1, 1),  # 1x1 of few images: no oneDNN on one thread
    (4, 64, 128, 28, 1, 2, 1),
    (1, 64, 128, 14, 3, 1, 1),  # small: im2col
    (1, 64, 64, 40, 3, 1, 1),
    (4, 96, 96, 28, 3, 1, 96),
    (1, 96, 96, 28, 3, 2, 96),
    (1, 512, 512, 14, 3, 1, 4),  # as kernels of single samples
    (4, 96, 96, 14, 7, 1, 96),
]


# By im2col whatever the processor: oneDNN has no float64.
COLUMNS = [
    (4, 24, 40, 28, 3, 1, 1),  # of all the images at a time
    (4, 24, 40, 28, 1, 2, 1),
    (4, 64, 64, 28, 1, 1, 1),  # none
    (4, 32, 32, 28, 3, 1, 4),  # one group after the other
    (4, 24, 24, 28, 3, 1, 24),
    (1, 32, 32, 28, 3, 1, 4),
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "case"),
    [(torch.float32, case) for case in CONVOLUTIONS] + [(torch.float64, case) for case in COLUMNS],
    ids=str,
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_convolution_takes_what_the_profiler_sees(
    dtype: torch.dtype, case: tuple[int, ...], last: bool, backward: bool
) -> None:
    images, channels, outputs, side, kernel, stride, groups = case

    def peak(device: str, measure: Callable[..., int]) -> int:
        layout = torch.channels_last if last else torch.contiguous_format
        to = {"device": device, "dtype": dtype}
        x = torch.zeros(images, channels, side, side, **to).to(memory_format=layout)
        weight = torch.zeros(outputs, channels // groups, kernel, kernel, **to)
        weight = weight.to(memory_format=layout)
        x.requires_grad_()
        weight.requires_grad_()

        def conv() -> Tensor:
            return F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)

        if not backward:
            return measure(conv, x, weight)
        out = conv()
        grad = torch.zeros_like(out)
        return measure(lambda: torch.autograd.grad(out, (x, weight), grad), x, weight, out, grad)

    expected = peak("cpu", lambda run, *_: peak_bytes(run))
    allowed = STEM if backward and channels == 3 else SMALL
    assert peak("meta", counted) == pytest.approx(expected, rel=0.05, abs=allowed)
    # The scratch memory is seen: without it the count is another, where there is much.
    plain = peak("meta", lambda run, *held: counted(run, *held, scratch=no_scratch))
    assert plain <= expected


def test_memory_ends_with_its_last_tensor_and_views_are_free() -> None:
    def run() -> Tensor:
        first = torch.empty(100, device="meta")  # 400 bytes
        second = first.view(10, 10) + 1  # 400 more
        del first
        third = second.t() + 1  # 400, and the first are gone
        return third[0]

    allocations = Allocations(no_scratch)
    with allocations:
        kept = run()
        assert len(allocations.alive()) == 1
    sums = list(accumulate(event.nbytes for event in allocations.events))
    assert (max(sums), sums[-1]) == (800, 400)
    del kept
    assert sum(event.nbytes for event in allocations.events) == 0


def test_memory_that_was_there_before_does_not_count() -> None:
    x = torch.empty(100, device="meta")
    assert counted(lambda: x.t(), x) == 0
    assert counted(lambda: x + 1, x) == 400


def test_gradients_are_added_up_in_place_as_autograd_does_unwatched() -> None:
    def backward(device: str) -> tuple[Callable[[], Any], Tensor]:
        x = torch.zeros(1000, 100, device=device, requires_grad=True)
        y = x * 1
        parts = [y * 2, y * 3, y * 4]  # three gradients of y are added up
        return lambda: torch.autograd.grad([p.sum() for p in parts], x), x

    run, _ = backward("cpu")
    expected = peak_bytes(run)
    run, x = backward("meta")
    allocations = Allocations(no_scratch)
    allocations.ignore([x])
    with allocations, allocations.adding_up():
        run()
    found = max(accumulate((event.nbytes for event in allocations.events), initial=0))
    assert found == pytest.approx(expected, rel=0.01)


def test_mixed_dtypes_are_copied_first_on_a_cpu() -> None:
    def run(device: str) -> Callable[[], Tensor]:
        wide = torch.zeros(100_000, device=device)
        narrow = torch.zeros(100_000, dtype=torch.bfloat16, device=device)
        return lambda: wide.add_(narrow)

    assert counted(run("meta")) == peak_bytes(run("cpu")) == 400_000
