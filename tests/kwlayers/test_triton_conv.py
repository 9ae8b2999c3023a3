"""The Triton kernels equal torch's own convolution, sample by sample, and its gradients.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers.ops import triton_conv
from kwlayers.ops.geometry import ConvGeometry

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []

# The switch to the interpreter counts where Triton is imported and where a kernel is first used.
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}


def set_interpreter(patch: pytest.MonkeyPatch) -> None:
    for name, value in INTERPRET.items():
        patch.setenv(name, value)


with pytest.MonkeyPatch.context() as patch:
    set_interpreter(patch)
    triton = pytest.importorskip("triton", reason="Triton is not installed")
if not CUDA and isinstance(triton.language.zeros, triton.JITFunction):
    pytest.skip("Triton was imported before it could be interpreted", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        set_interpreter(patch)
        yield


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Largest error over the largest value of a tensor, against float64 with the same inputs.
TOLERANCE = {
    # Some hundred additions of float32, whose errors mostly cancel.
    torch.float32: 1e-5,
    # Sums are of float32; only the result is rounded, to 11 and 8 bits: four units.
    torch.float16: 4 * 2**-10,
    torch.bfloat16: 4 * 2**-7,
}


class Case(NamedTuple):
    """kernel: (go, gi, co, ci, *k)."""

    batch: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def geometry(self) -> ConvGeometry:
        out_blocks, in_blocks, out, inn, *spatial = self.kernel
        kernel = (out_blocks * out, in_blocks * inn, *spatial)
        return ConvGeometry(kernel, self.stride, self.padding, self.dilation, 1)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """x, kernels and a gradient of the output."""
        torch.manual_seed(0)
        geometry = self.geometry
        _, inn, *spatial = geometry.kernel
        x = torch.randn(self.batch, inn, *self.size)
        kernels = torch.randn(self.batch, math.prod(spatial), *self.kernel[:4])
        grad = torch.randn(self.batch, geometry.kernel[0], *geometry.out_size(self.size))
        x, kernels, grad = (t.to(DEVICE, dtype) for t in (x, kernels, grad))
        return x, kernels, grad


def case(
    batch: int,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Case:
    rank = len(size)
    return Case(batch, size, kernel, (stride,) * rank, (padding,) * rank, (dilation,) * rank)


CASES = {
    "one sample": case(1, (7, 5), (1, 1, 4, 6, 3, 3), padding=1),
    "three samples of 2x3 blocks": case(3, (7, 5), (2, 3, 4, 2, 3, 3), padding=1),
    "33 channels": case(1, (7, 5), (3, 1, 11, 33, 1, 3)),
    "33 channels in blocks": case(1, (3, 3), (1, 3, 33, 11, 1, 3), padding=1),
    "blocks of 17 channels": case(1, (3, 2), (2, 2, 17, 17, 1, 2)),
    "1x1": case(3, (7, 5), (1, 2, 5, 3, 1, 1)),
    "1x1, padded": case(1, (3, 2), (1, 1, 5, 3, 1, 1), padding=1),
    "1x1, stride 2": case(1, (7, 5), (3, 2, 2, 3, 1, 1), stride=2),
    "stride 2": case(1, (7, 5), (2, 2, 3, 2, 3, 3), stride=2, padding=1),
    "stride 2, even": case(1, (8, 6), (1, 1, 3, 2, 2, 2), stride=2),
    "stride 3, wider than the kernel": case(1, (8, 6), (1, 1, 3, 2, 2, 2), stride=3),
    "stride 2, wider than the map": Case(1, (1, 3), (1, 1, 3, 2, 1, 3), (2, 2), (0, 1), (1, 1)),
    "dilation 2": case(1, (7, 5), (1, 2, 4, 3, 3, 3), padding=2, dilation=2),
    "dilation 2 and stride 2": case(1, (7, 5), (1, 1, 4, 3, 3, 3), 2, 1, 2),
    "dilation 3 and stride 2": case(1, (9, 8), (1, 1, 4, 3, 2, 3), 2, 1, 3),
    "axes of different kinds": Case(1, (7, 9), (1, 2, 3, 2, 2, 3), (1, 3), (2, 1), (3, 2)),
    "uneven kernel": case(3, (7, 5), (2, 1, 2, 3, 1, 3)),
    "padding beyond the kernel": case(1, (2, 2), (1, 1, 2, 3, 2, 1), padding=3),
    "one position": case(3, (3, 3), (1, 1, 4, 5, 3, 3)),
    "1-D": case(3, (11,), (2, 1, 3, 4, 3), padding=1),
    "1-D, stride 2": case(1, (11,), (1, 2, 3, 2, 4), stride=2, padding=1),
    "3-D": case(1, (3, 4, 3), (1, 2, 3, 2, 2, 2, 2), padding=1),
    "3-D, stride 2": case(1, (4, 5, 3), (2, 1, 2, 3, 2, 1, 3), stride=2, padding=1),
}


def full(kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """(B, T, go, gi, co, ci) as (B, C_out, C_in, *k)."""
    blocks_first = kernels.permute(0, 2, 4, 3, 5, 1)
    return blocks_first.reshape(kernels.shape[0], *geometry.kernel)


def expected(x: Tensor, kernels: Tensor, grad: Tensor, geometry: ConvGeometry) -> list[Tensor]:
    """Output and gradients of x and kernels, by torch in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, kernels)]
    convolution = CONV[x.dim() - 2]
    weights = full(leaves[1], geometry)
    settings = (geometry.stride, geometry.padding, geometry.dilation)
    outputs = [
        convolution(one[None], weight, None, *settings)
        for one, weight in zip(leaves[0], weights, strict=True)
    ]
    out = torch.cat(outputs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def products(x: Tensor, kernels: Tensor, grad: Tensor, geometry: ConvGeometry) -> list[Tensor]:
    return [
        triton_conv.conv(x, kernels, geometry),
        triton_conv.conv_input_grad(grad, kernels, geometry, tuple(x.shape[2:])),
        triton_conv.conv_kernel_grad(x, grad, tuple(kernels.shape), geometry),
    ]


def assert_equal(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "x", "kernels"), got, wanted, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == dtype, name
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


# Values ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_three_products_are_those_of_torch(name: str) -> None:
    tensors = CASES[name].tensors()
    geometry = CASES[name].geometry
    assert_equal(products(*tensors, geometry), expected(*tensors, geometry), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["33 channels", "stride 2", "1-D", "1x1"])
def test_half_the_bits_give_what_torch_gives_up_to_rounding(name: str, dtype: torch.dtype) -> None:
    tensors = CASES[name].tensors(dtype)
    geometry = CASES[name].geometry
    assert_equal(products(*tensors, geometry), expected(*tensors, geometry), dtype)


def test_taps_are_row_major_and_a_channel_is_its_block_then_its_place_in_it() -> None:
    go, gi, co, ci = 2, 3, 2, 2
    spatial = (2, 3)
    # An input of one lit channel and position reads single weights out of the kernel.
    for block, inner, row, column in itertools.product(range(gi), range(ci), [1], [0, 2]):
        kernels = torch.arange(6.0 * go * gi * co * ci).view(1, 6, go, gi, co, ci)
        x = torch.zeros(1, gi * ci, *spatial)
        x[0, block * ci + inner, row, column] = 1
        geometry = ConvGeometry((go * co, gi * ci, *spatial), (1, 1), (0, 0), (1, 1), 1)
        out = triton_conv.conv(x.to(DEVICE), kernels.to(DEVICE), geometry).cpu().flatten()
        tap = row * 3 + column
        wanted = [
            float(kernels[0, tap, o_block, block, o_inner, inner])
            for o_block, o_inner in itertools.product(range(go), range(co))
        ]
        assert out.tolist() == wanted


def test_the_same_call_gives_the_same_bits() -> None:
    chosen = CASES["33 channels"]
    tensors = chosen.tensors()
    first, second = (products(*tensors, chosen.geometry) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Layouts -----------------------------------------------------------------------------

LAYOUT = case(2, (5, 4), (2, 2, 2, 3, 2, 2), stride=2, padding=1)


def strided(x: Tensor) -> Tensor:
    """Equal, but every other element of a tensor in reverse order of axes."""
    axes = tuple(reversed(range(x.dim())))
    held = x.permute(axes).repeat_interleave(2, dim=-1)
    return held[..., ::2].permute(axes)


def test_any_strides_give_the_same_values() -> None:
    tensors = LAYOUT.tensors()
    views = [strided(t) for t in tensors]
    for tensor, view in zip(tensors, views, strict=True):
        assert torch.equal(tensor, view)
        assert not view.is_contiguous()
    got = products(*views, LAYOUT.geometry)
    assert_equal(got, expected(*tensors, LAYOUT.geometry), torch.float32)


def test_expanded_tensors_give_the_same_values() -> None:
    x, kernels, grad = (t[:1].expand_as(t) for t in LAYOUT.tensors())
    grad = grad[:, :, :1].expand_as(grad)
    got = products(x, kernels, grad, LAYOUT.geometry)
    assert_equal(got, expected(x, kernels, grad, LAYOUT.geometry), torch.float32)


@pytest.mark.parametrize(
    ("chosen", "memory_format"),
    [
        (LAYOUT, torch.channels_last),
        (CASES["3-D"], torch.channels_last_3d),
        (LAYOUT, torch.contiguous_format),
    ],
    ids=["channels_last", "channels_last_3d", "contiguous"],
)
def test_results_have_the_memory_format_of_x_and_of_the_gradient(
    chosen: Case, memory_format: torch.memory_format
) -> None:
    x, kernels, grad = chosen.tensors()
    x, grad = (t.contiguous(memory_format=memory_format) for t in (x, grad))
    got = products(x, kernels, grad, chosen.geometry)
    assert got[0].is_contiguous(memory_format=memory_format)
    assert got[1].is_contiguous(memory_format=memory_format)
    assert_equal(got, expected(x, kernels, grad, chosen.geometry), torch.float32)


def test_samples_may_lie_more_than_32_bits_apart() -> None:
    apart = 2**30 + 8  # which itself is an int of 32 bits
    storage = torch.empty(2 * apart + 8, dtype=torch.float16, device=DEVICE)  # pages of no memory
    x = storage.as_strided((3, 2, 3), (apart, 3, 1))
    x.copy_(torch.arange(18.0).view(3, 2, 3))
    kernels = torch.ones(3, 1, 1, 1, 1, 2, dtype=torch.float16, device=DEVICE)
    geometry = ConvGeometry((1, 2, 1), (1,), (0,), (1,), 1)
    out = triton_conv.conv(x, kernels, geometry)
    assert out.tolist() == [[[3, 5, 7]], [[15, 17, 19]], [[27, 29, 31]]]
    slopes = triton_conv.conv_kernel_grad(x, torch.ones_like(out), tuple(kernels.shape), geometry)
    assert slopes.flatten().tolist() == [3, 12, 21, 30, 39, 48]


@pytest.mark.parametrize("name", ["33 channels", "1x1", "1-D", "dilation 2"])
def test_nothing_outside_the_tensors_is_read_or_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = CASES[name].tensors()
    margin = 4096
    outputs = []

    def within(value: float, shape: tuple[int, ...], **settings: Any) -> Tensor:
        storage = torch.full((math.prod(shape) + 2 * margin,), value, **settings)
        outputs.append(storage)
        return storage[margin:-margin].view(shape)

    def empty(*shape: Any, **settings: Any) -> Tensor:
        return within(7.0, tuple(shape[0] if isinstance(shape[0], tuple) else shape), **settings)

    inputs = [within(math.nan, tuple(t.shape), device=DEVICE).copy_(t) for t in tensors]
    outputs.clear()
    monkeypatch.setattr(torch, "empty", empty)
    got = products(*inputs, CASES[name].geometry)
    monkeypatch.undo()
    assert_equal(got, expected(*tensors, CASES[name].geometry), torch.float32)
    assert len(outputs) == 3
    for storage in outputs:
        assert (storage[:margin] == 7).all()
        assert (storage[-margin:] == 7).all()


def test_an_empty_batch_gives_empty_results() -> None:
    x, kernels, grad = (t[:0] for t in LAYOUT.tensors())
    got = products(x, kernels, grad, LAYOUT.geometry)
    assert [t.shape for t in got] == [grad.shape, x.shape, kernels.shape]


# What is refused, and where it runs --------------------------------------------------


def test_groups_are_refused() -> None:
    x, kernels, grad = LAYOUT.tensors()
    geometry = LAYOUT.geometry._replace(groups=2)
    for call in (
        lambda: triton_conv.conv(x, kernels, geometry),
        lambda: triton_conv.conv_input_grad(grad, kernels, geometry, (5, 4)),
        lambda: triton_conv.conv_kernel_grad(x, grad, kernels.shape, geometry),
    ):
        with pytest.raises(ValueError, match=r"^groups 2: the Triton kernels need groups 1$"):
            call()


def test_other_dtypes_and_mixed_dtypes_are_refused() -> None:
    x, kernels, _ = LAYOUT.tensors()
    with pytest.raises(ValueError, match=r"^torch.float64 with torch.float64: both must be the "):
        triton_conv.conv(x.double(), kernels.double(), LAYOUT.geometry)
    with pytest.raises(ValueError, match=r"^torch.float32 with torch.float16: both must be the "):
        triton_conv.conv(x, kernels.half(), LAYOUT.geometry)


def test_kernels_of_another_shape_are_refused() -> None:
    x, kernels, _ = LAYOUT.tensors()
    message = r"^kernels of \(2, 3, 2, 2, 2, 3\): 2 samples with kernels of \(4, 6, 2, 2\) need "
    with pytest.raises(ValueError, match=message):
        triton_conv.conv(x, kernels[:, :3], LAYOUT.geometry)


def test_a_gradient_of_another_shape_is_refused() -> None:
    _, kernels, grad = LAYOUT.tensors()
    message = r"^a gradient of \(2, 4, 2, 3\): inputs of \(5, 4\) positions need \(2, 4, 3, 3\)$"
    with pytest.raises(ValueError, match=message):
        triton_conv.conv_input_grad(grad[:, :, :2], kernels, LAYOUT.geometry, (5, 4))


def test_a_sample_beyond_32_bits_is_refused() -> None:
    x = torch.empty(1, 2**16, 2**15 + 1, device="meta")
    kernels = torch.empty(1, 1, 1, 1, 1, 2**16, device="meta")
    geometry = ConvGeometry((1, 2**16, 1), (1,), (0,), (1,), 1)
    with pytest.raises(ValueError, match=r"^a sample of 2,147,549,184 elements: the limit is "):
        triton_conv.conv(x, kernels, geometry)


def test_float32_is_multiplied_as_torch_multiplies_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []

    def launch(*_: object, **arguments: Any) -> None:
        used.append(arguments["PRECISION"])

    monkeypatch.setattr(triton_conv, "launch", launch)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for matmul.allow_tf32 in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                products(*CASES["1x1"].tensors(dtype), CASES["1x1"].geometry)
    finally:
        matmul.allow_tf32 = before
    assert used == ["ieee"] * 6 + ["tf32"] * 3 + ["ieee"] * 3


def test_the_kernels_are_available_on_a_gpu_and_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_conv.available(torch.device("cuda"))
    assert not triton_conv.available(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_conv.available(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not triton_conv.available(torch.device("cuda"))


def test_triton_is_imported_by_the_first_call_only() -> None:
    code = (
        "import sys, torch, kwlayers.ops.triton_conv as module\n"
        "module.available(torch.device('cuda'))\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "False\n", done.stderr
