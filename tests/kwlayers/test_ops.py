"""The reference is the definition of the operation; every other backend equals it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers.ops import BACKENDS, ConvGeometry, kw_conv
from kwlayers.ops.paths import PATHS
from kwlayers.ops.reference import kw_conv_ref

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# "triton" has tests of its own, which switch its interpreter on first.
FAST = sorted(set(BACKENDS) - {"reference", "triton"})

# Largest error over the largest value of a tensor, against the reference in float64.
TOLERANCE = {
    # The paths only differ in the order of at most some thousand additions: 1e3 * 2^-53.
    torch.float64: 1e-12,
    # The same, 1e3 * 2^-24, though errors of both signs mostly cancel.
    torch.float32: 1e-5,
    # Mixed kernels and their gradients are rounded to 11 and 8 bits before they are used, the
    # result once more, and the CPU's half convolution rounds partial sums: four units.
    torch.float16: 4 * 2**-10,
    torch.bfloat16: 4 * 2**-7,
}


class Case(NamedTuple):
    """One size of the operation; kernel (C_out, C_in / groups, *k), cell (c_out, c_in, *k)."""

    batch: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    cell: tuple[int, ...]
    num_cells: int
    groups: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        rank = len(self.size)
        return ConvGeometry(
            self.kernel,
            (self.stride,) * rank,
            (self.padding,) * rank,
            (self.dilation,) * rank,
            self.groups,
        )

    @property
    def num_mixtures(self) -> int:
        count = 1
        for size, part in zip(self.kernel, self.cell, strict=True):
            count *= size // part
        return count

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """x, attention (signed, each row of L1 norm 1) and cells."""
        torch.manual_seed(0)
        channels = self.kernel[1] * self.groups
        x = torch.randn(self.batch, channels, *self.size, dtype=torch.float64)
        attention = torch.randn(self.batch, self.num_mixtures, self.num_cells, dtype=torch.float64)
        attention = attention / attention.abs().sum(-1, keepdim=True)
        cells = torch.randn(self.num_cells, *self.cell, dtype=torch.float64)
        return [t.to(dtype) for t in (x, attention, cells)]


CASES = {
    "one sample": Case(1, (7, 5), (8, 4, 3, 3), (4, 2, 1, 1), 5, padding=1),
    "three samples": Case(3, (7, 5), (8, 4, 3, 3), (4, 2, 1, 1), 5, padding=1),
    "33 channels": Case(3, (7, 5), (33, 33, 3, 3), (11, 33, 1, 1), 3, padding=1),
    "groups": Case(3, (7, 5), (6, 2, 3, 3), (3, 1, 1, 1), 4, groups=3, padding=1),
    "depthwise": Case(3, (7, 5), (33, 1, 3, 3), (33, 1, 1, 1), 9, groups=33, padding=1),
    "depthwise, one sample": Case(1, (7, 5), (6, 1, 3, 3), (2, 1, 1, 1), 5, groups=6),
    "stride 2": Case(3, (7, 5), (4, 4, 3, 3), (2, 4, 1, 1), 4, stride=2, padding=1),
    "stride 2 of 1x1": Case(1, (7, 5), (4, 6, 1, 1), (2, 2, 1, 1), 4, stride=2),
    "dilation 2": Case(3, (7, 5), (4, 4, 3, 3), (2, 4, 1, 1), 4, dilation=2, padding=2),
    "one cell": Case(3, (7, 5), (4, 4, 3, 3), (2, 2, 1, 1), 1, padding=1),
    "one mixture": Case(3, (7, 5), (4, 4, 1, 1), (4, 4, 1, 1), 3),
    "many more cells than mixtures": Case(3, (7, 5), (4, 6, 1, 1), (4, 6, 1, 1), 50),
    "whole kernels as cells": Case(3, (7, 5), (4, 6, 3, 3), (2, 3, 3, 3), 5, padding=1),
    "part of the kernel's extent": Case(3, (7, 5), (4, 6, 2, 4), (2, 3, 1, 2), 5),
    "uneven kernel": Case(3, (7, 5), (4, 6, 1, 3), (2, 2, 1, 1), 5),
    "1-D": Case(3, (11,), (6, 4, 3), (3, 2, 1), 5, padding=1),
    "1-D, stride 2 and groups": Case(3, (11,), (6, 2, 4), (3, 2, 2), 5, groups=2, stride=2),
    "linear": Case(3, (7,), (9, 33, 1), (3, 11, 1), 4),
    "3-D": Case(3, (3, 5, 4), (4, 6, 3, 3, 3), (2, 3, 1, 1, 1), 5, padding=1),
    "3-D, one sample and groups": Case(
        1, (4, 5, 3), (4, 2, 2, 1, 3), (2, 2, 1, 1, 3), 3, groups=2, stride=2
    ),
}


def refusal(backend: str, case: Case) -> str | None:
    """Why a backend cannot do a case."""
    if backend not in PATHS:
        return None
    return PATHS[backend].refuses(case.geometry, case.cell)


# What each backend is compared on, and what it says no to.
DONE = [(b, name) for b in FAST for name, case in CASES.items() if not refusal(b, case)]
REFUSED = [(b, name) for b in FAST for name, case in CASES.items() if refusal(b, case)]


def some_of(*names: str) -> list[tuple[str, str]]:
    """What of `DONE` is about these cases."""
    return [(backend, name) for backend, name in DONE if name in names]


def run(backend: str, case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of x, attention and cells for an uneven loss."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = kw_conv(*leaves, case.geometry, backend)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out.flatten() * slope).sum(), leaves)]


def assert_equal(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "x", "attention", "cells"), got, expected, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == dtype, name
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


# The definition itself ---------------------------------------------------------------


def test_the_reference_gives_what_a_hand_calculation_gives() -> None:
    x = torch.tensor([[[3.0]], [[1.0]]])
    cells = torch.tensor([4.0, 6.0]).view(2, 1, 1, 1)
    attention = torch.tensor([[[0.5, -1.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]])
    geometry = ConvGeometry((2, 1, 1), (1,), (0,), (1,), 1)
    # Sample 1: kernels 0.5*4 - 6 = -4 and 2*4 = 8, times 3; sample 2: 6 and 4 + 6.
    expected = torch.tensor([[[-12.0], [24.0]], [[6.0], [10.0]]])
    assert torch.equal(kw_conv_ref(x, attention, cells, geometry), expected)


@pytest.mark.parametrize(
    "name", ["three samples", "groups", "part of the kernel's extent", "1-D", "3-D"]
)
def test_the_reference_numbers_mixtures_by_position_then_output_then_input(name: str) -> None:
    case = CASES[name]
    x, attention, cells = case.tensors()
    blocks = [size // part for size, part in zip(case.kernel, case.cell, strict=True)]
    order = [*range(2, len(blocks)), 0, 1]  # slowest to fastest
    outputs = []
    for sample in range(case.batch):
        weight = torch.empty(case.kernel, dtype=torch.float64)
        for element in itertools.product(*map(range, case.kernel)):
            mixture = 0
            for axis in order:
                mixture = mixture * blocks[axis] + element[axis] // case.cell[axis]
            inside = tuple(e % part for e, part in zip(element, case.cell, strict=True))
            weight[element] = attention[sample, mixture] @ cells[(slice(None), *inside)]
        conv = CONV[len(case.size)]
        outputs.append(
            conv(x[sample : sample + 1], weight, padding=case.padding, groups=case.groups)
        )
    expected = torch.cat(outputs)
    got = kw_conv_ref(x, attention, cells, case.geometry)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_one_hot_attention_makes_the_reference_a_plain_convolution_of_the_chosen_cells() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    cells = torch.randn(9, 3, 2, 1, 3, dtype=torch.float64)
    # A 6x4x1x3 kernel is 2 (out) x 2 (in) cells: mixtures out0 in0, out0 in1, out1 in0, out1 in1.
    chosen = torch.tensor([7, 0, 3, 7])
    attention = F.one_hot(chosen, 9).double().expand(2, 4, 9)
    weight = torch.cat(
        [torch.cat([cells[7], cells[0]], dim=1), torch.cat([cells[3], cells[7]], dim=1)], dim=0
    )
    geometry = ConvGeometry((6, 4, 1, 3), (2, 1), (0, 2), (1, 2), 1)
    got = kw_conv_ref(x, attention, cells, geometry)
    expected = F.conv2d(x, weight, stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_each_sample_has_a_kernel_of_its_own() -> None:
    case = CASES["groups"]
    x, attention, cells = case.tensors()
    alone = [
        kw_conv_ref(x[i : i + 1], attention[i : i + 1], cells, case.geometry)
        for i in range(case.batch)
    ]
    assert torch.equal(kw_conv_ref(x, attention, cells, case.geometry), torch.cat(alone))
    swapped = kw_conv_ref(x, attention.flip(0), cells, case.geometry)
    assert not torch.allclose(swapped[0], alone[0])


# Every other backend -----------------------------------------------------------------


def test_there_are_backends_to_compare_with_the_reference() -> None:
    assert len(FAST) > 5
    assert len(DONE) > 100
    for backend in FAST:
        assert sum(name == backend for name, _ in DONE) >= 15


@pytest.mark.parametrize(("backend", "name"), DONE)
def test_a_backend_equals_the_reference_in_output_and_every_gradient(
    backend: str, name: str
) -> None:
    case = CASES[name]
    expected = run("reference", case, case.tensors())
    assert_equal(run(backend, case, case.tensors()), expected, torch.float64)


@pytest.mark.parametrize(("backend", "name"), REFUSED)
def test_a_backend_that_cannot_do_a_layer_says_so(backend: str, name: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot do this layer: it needs"):
        kw_conv(*case.tensors(), case.geometry, backend)


@pytest.mark.parametrize(
    ("backend", "name"), some_of("33 channels", "groups", "part of the kernel's extent", "3-D")
)
@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d != torch.float64], ids=str)
def test_a_backend_keeps_the_dtype_and_its_accuracy(
    backend: str, dtype: torch.dtype, name: str
) -> None:
    case = CASES[name]
    rounded = case.tensors(dtype)
    expected = run("reference", case, [t.double() for t in rounded])
    assert_equal(run(backend, case, rounded), expected, dtype)


def strided(t: Tensor) -> Tensor:
    """The same values, two apart in memory and with the last axis first."""
    spread = torch.empty(*reversed(t.shape), 2, dtype=t.dtype)
    spread[..., 0] = t.permute(*reversed(range(t.dim())))
    return spread[..., 0].permute(*reversed(range(t.dim())))


@pytest.mark.parametrize(("backend", "name"), some_of("three samples", "groups", "1-D", "3-D"))
def test_memory_layout_changes_no_value(backend: str, name: str) -> None:
    case = CASES[name]
    plain = case.tensors()
    expected = run("reference", case, plain)
    views = [strided(t) for t in plain]
    assert not any(t.is_contiguous() for t in views)
    assert_equal(run(backend, case, views), expected, torch.float64)


@pytest.mark.parametrize(("backend", "name"), some_of("three samples", "stride 2", "groups", "3-D"))
def test_channels_last_changes_no_value(backend: str, name: str) -> None:
    case = CASES[name]
    x, attention, cells = case.tensors()
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    last = x.contiguous(memory_format=formats[len(case.size)])
    assert not last.is_contiguous()
    expected = run("reference", case, [x, attention, cells])
    assert_equal(run(backend, case, [last, attention, cells]), expected, torch.float64)


def test_attention_shared_by_all_samples_may_be_an_expanded_tensor() -> None:
    case = CASES["three samples"]
    x, attention, cells = case.tensors()
    attention = attention[:1].expand_as(attention)
    expected = kw_conv_ref(x, attention.contiguous(), cells, case.geometry)
    for backend in FAST:
        got = kw_conv(x, attention, cells, case.geometry, backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("backend", "name"), some_of("three samples", "groups", "1-D", "3-D"))
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(backend: str, name: str) -> None:
    case = CASES[name]._replace(batch=0)
    out, x, attention, cells = run(backend, case, case.tensors())
    weight = torch.zeros(case.kernel, dtype=torch.float64)
    image = torch.zeros(0, case.kernel[1] * case.groups, *case.size, dtype=torch.float64)
    conv = CONV[len(case.size)]
    assert out.shape == conv(image, weight, padding=case.padding, groups=case.groups).shape
    assert x.shape == image.shape
    assert attention.shape == (0, case.num_mixtures, case.num_cells)
    assert torch.equal(cells, torch.zeros(case.num_cells, *case.cell, dtype=torch.float64))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "mixtures", "cells"])
def test_attention_of_the_wrong_size_is_refused(backend: str, axis: int) -> None:
    case = CASES["three samples"]
    x, attention, cells = case.tensors()
    short = attention.narrow(axis, 0, 1)
    with pytest.raises(ValueError, match="attention of shape"):
        kw_conv(x, short, cells, case.geometry, backend)


def test_the_default_backend_is_one_of_the_listed() -> None:
    case = CASES["groups"]
    default = kw_conv(*case.tensors(), case.geometry)
    assert any(
        torch.equal(default, kw_conv(*case.tensors(), case.geometry, name)) for name in BACKENDS
    )


def test_a_workspace_of_nothing_is_refused() -> None:
    case = CASES["groups"]
    with pytest.raises(ValueError, match="workspace_mb 0: it must be above 0"):
        kw_conv(*case.tensors(), case.geometry, workspace_mb=0)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    case = CASES["groups"]
    with pytest.raises(
        ValueError, match=r"backend 'cudnn': allowed are reference, published, loop"
    ):
        kw_conv(*case.tensors(), case.geometry, backend="cudnn")
