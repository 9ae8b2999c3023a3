"""The fused attention equals the module that defines it, and its gradients.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kwlayers import attention
from kwlayers.attention import Attention
from kwlayers.geometry import Assignment, even_assignment
from kwlayers.ops import triton_attention

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


# Largest error over the largest value of a tensor, against float64 with the same inputs.
TOLERANCE = {
    torch.float64: 1e-12,
    # Some hundred additions, whose errors mostly cancel.
    torch.float32: 1e-5,
    # Only the result is rounded: four units.
    torch.float16: 4 * 2**-10,
    torch.bfloat16: 4 * 2**-7,
}


def make(
    channels: int,
    mixtures: int,
    cells: int,
    norm: str = "batch",
    temperature: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **settings: float,
) -> Attention:
    """For evaluation; every parameter and running statistic random."""
    torch.manual_seed(0)
    beta = tuple((3 * i + 1) % (cells + 1) for i in range(mixtures))
    attention = Attention(
        channels,
        mixtures,
        cells,
        Assignment(beta, 0, mixtures),
        total_mixtures=mixtures,
        norm=norm,
        **settings,
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    if isinstance(attention.norm, nn.BatchNorm1d):
        nn.init.normal_(attention.norm.running_mean)
        nn.init.uniform_(attention.norm.running_var, 0.5, 2.0)
    attention.temperature.fill_(temperature)
    return attention.eval().to(DEVICE, dtype)


def assert_equal(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    error, largest = (got.double() - wanted).abs().max(), wanted.abs().max()
    assert error <= TOLERANCE[dtype] * largest, f"{error:.1e} of {largest:.1e}"


def double(attention: Attention, x: Tensor) -> Tensor:
    """The module in float64."""
    with torch.no_grad():
        out: Tensor = copy.deepcopy(attention).double()(x.double())
    return out


# Inference ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("mixtures", "cells"), [(1, 1), (1, 4), (9, 1), (5, 7), (3, 150)], ids=str)
def test_inference_equals_the_module(
    mixtures: int, cells: int, norm: str, temperature: float
) -> None:
    attention = make(33, mixtures, cells, norm, temperature)
    x = torch.randn(3, 33, 7, 5).to(DEVICE)
    got = triton_attention.attention_eval(attention, x)
    assert_equal(got, double(attention, x), torch.float32)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_inference_of_one_sample_with_many_channels_mixtures_and_positions(norm: str) -> None:
    # 19 hidden units and 40 x 10 columns: more than one tile of everything.
    attention = make(300, 40, 9, norm)
    x = torch.randn(1, 300, 23, 23).to(DEVICE)
    got = triton_attention.attention_eval(attention, x)
    assert_equal(got, double(attention, x), torch.float32)


@pytest.mark.parametrize("size", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_inference_takes_any_number_of_axes(size: tuple[int, ...]) -> None:
    attention = make(6, 4, 3)
    x = torch.randn(3, 6, *size).to(DEVICE)
    got = triton_attention.attention_eval(attention, x)
    assert_equal(got, double(attention, x), torch.float32)


def test_inference_takes_any_strides() -> None:
    attention = make(34, 4, 3)
    x = torch.randn(3, 34, 7, 5).to(DEVICE)
    wanted = double(attention, x)
    views = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "positions swapped": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": x.repeat_interleave(2, dim=3)[..., ::2],
        "samples first": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for view in views.values():
        assert not view.is_contiguous()
        assert_equal(triton_attention.attention_eval(attention, view), wanted, torch.float32)
    expanded = x[:1, :, :1].expand_as(x)
    got = triton_attention.attention_eval(attention, expanded)
    assert_equal(got, double(attention, expanded), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_inference_in_half_the_bits_equals_the_module_up_to_rounding(
    norm: str, dtype: torch.dtype
) -> None:
    attention = make(33, 4, 3, norm, dtype=dtype)
    x = torch.randn(3, 33, 7, 5).to(DEVICE, dtype)
    got = triton_attention.attention_eval(attention, x)
    assert_equal(got, double(attention, x), dtype)


def test_inference_of_a_mean_over_many_equal_halves_does_not_drift() -> None:
    attention = make(6, 4, 3, dtype=torch.float16)
    x = torch.full((1, 6, 90, 90), 0.1, dtype=torch.float16, device=DEVICE)
    got = triton_attention.attention_eval(attention, x)
    assert_equal(got, double(attention, x[..., :1, :1]), torch.float16)


def test_inference_of_an_empty_batch_is_empty() -> None:
    got = triton_attention.attention_eval(make(6, 4, 3), torch.empty(0, 6, 2, device=DEVICE))
    assert got.shape == (0, 4, 3)


def test_inference_reads_the_temperature_at_every_call() -> None:
    attention = make(6, 4, 3, temperature=0.0)
    x = torch.randn(2, 6, 5).to(DEVICE)
    triton_attention.attention_eval(attention, x)
    attention.temperature.fill_(1.0)
    got = triton_attention.attention_eval(attention, x)
    # Cells (3 i + 1) % 4: 1, 0, the zero cell and 2.
    wanted = [[0.0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert got.tolist() == [wanted, wanted]


def test_a_basis_is_refused() -> None:
    attention = make(6, 40, 60, basis_ratio=0.5)
    with pytest.raises(ValueError, match=r"^basis_ratio below 1: the fused attention needs one "):
        triton_attention.attention_eval(attention, torch.zeros(1, 6, 2))


def test_float64_is_refused_for_inference() -> None:
    with pytest.raises(ValueError, match=r"^torch.float64: allowed are torch.float32, torch.bfl"):
        triton_attention.attention_eval(make(6, 4, 3), torch.zeros(1, 6, 2, dtype=torch.float64))


# Training ----------------------------------------------------------------------------


class Gives(nn.Module):
    """In the place of fc2."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, _: Tensor) -> Tensor:
        return self.z.flatten(1)


def by_module(attention: Attention, z: Tensor) -> Tensor:
    """What the module makes of z, whatever its input."""
    attention = copy.deepcopy(attention).to(z.dtype)
    attention.fc2 = Gives(z)  # type: ignore[assignment]
    out: Tensor = attention(torch.zeros(z.shape[0], 6, dtype=z.dtype, device=z.device))
    return out


def with_zeros(batch: int, attention: Attention) -> Tensor:
    """A float64 z with zeros in it: where the absolute value has no derivative, torch says 0."""
    shape = (batch, attention.num_mixtures, attention.num_cells + 1)
    z = torch.randn(shape, dtype=torch.float64)
    z[-1, -1, 0] = 0
    if attention.num_mixtures > 1:
        z[0, 0] = 0
    return z.to(DEVICE)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("mixtures", "cells"), [(1, 1), (1, 4), (9, 1), (5, 7), (9, 150)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_end_and_its_gradient_equal_those_of_the_module(
    mixtures: int, cells: int, batch: int, temperature: float, dtype: torch.dtype
) -> None:
    attention = make(6, mixtures, cells, temperature=temperature, dtype=dtype)
    z = with_zeros(batch, attention).to(dtype)
    slope = torch.randn(batch, mixtures, cells, dtype=torch.float64).to(DEVICE)
    leaves = [z.clone().requires_grad_(), z.double().requires_grad_()]
    got = triton_attention.normalise(leaves[0], attention.temperature, attention.assignment)
    exact = attention.double()
    wanted = by_module(exact, leaves[1])
    assert_equal(got.detach(), wanted.detach(), dtype)
    (got_grad,) = torch.autograd.grad(got, leaves[0], slope.to(dtype))
    (wanted_grad,) = torch.autograd.grad(wanted, leaves[1], slope.to(dtype).double())
    assert_equal(got_grad, wanted_grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_end_in_half_the_bits_equals_the_module_up_to_rounding(dtype: torch.dtype) -> None:
    attention = make(6, 5, 7)
    z = with_zeros(3, attention).to(dtype)
    leaves = [z.clone().requires_grad_(), z.double().requires_grad_()]
    got = triton_attention.normalise(leaves[0], attention.temperature, attention.assignment)
    wanted = by_module(attention.double(), leaves[1])
    assert_equal(got.detach(), wanted.detach(), dtype)
    slope = torch.randn(wanted.shape).to(DEVICE, dtype)
    (got_grad,) = torch.autograd.grad(got, leaves[0], slope)
    (wanted_grad,) = torch.autograd.grad(wanted, leaves[1], slope.double())
    assert_equal(got_grad, wanted_grad, dtype)


def test_the_end_takes_any_strides_of_z_and_of_its_gradient() -> None:
    attention = make(6, 5, 7, dtype=torch.float64)
    z = with_zeros(3, attention)
    view = z.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    leaf = z.clone().requires_grad_()
    got = triton_attention.normalise(view, attention.temperature, attention.assignment)
    wanted = by_module(attention, leaf)
    assert_equal(got.detach(), wanted.detach(), torch.float64)
    slope = torch.randn(7, dtype=torch.float64).to(DEVICE).expand(3, 5, 7)
    (got_grad,) = torch.autograd.grad(got, view, slope)
    (wanted_grad,) = torch.autograd.grad(wanted, leaf, slope)
    assert_equal(got_grad, wanted_grad, torch.float64)


def test_the_end_of_an_empty_batch_is_empty_and_has_an_empty_gradient() -> None:
    attention = make(6, 5, 7)
    z = torch.empty(0, 5, 8, device=DEVICE, requires_grad=True)
    out = triton_attention.normalise(z, attention.temperature, attention.assignment)
    assert out.shape == (0, 5, 7)
    out.sum().backward()
    assert z.grad is not None
    assert z.grad.shape == z.shape


def test_a_second_derivative_of_the_end_is_refused() -> None:
    attention = make(6, 2, 3)
    z = torch.randn(1, 2, 4, device=DEVICE, requires_grad=True)
    out = triton_attention.normalise(z, attention.temperature, attention.assignment)
    (grad,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# In the module -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("basis_ratio", [1, 0.5])
def test_the_module_gives_the_same_where_it_takes_the_fused_kernels(
    basis_ratio: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assignment = even_assignment(6, 12, 0, 4)
    module = Attention(32, 4, 6, assignment, total_mixtures=12, basis_ratio=basis_ratio)
    module = module.to(DEVICE).train(training)
    module.temperature.fill_(0.3)
    x = torch.randn(3, 32, 5, 4, device=DEVICE)
    with torch.no_grad():
        monkeypatch.setattr(attention, "_fuses", lambda _: False)
        expected = module.eval()(x) if not training else module(x)
        monkeypatch.setattr(attention, "_fuses", lambda _: True)
        found = module(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
