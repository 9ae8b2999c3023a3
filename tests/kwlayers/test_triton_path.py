"""The Triton path behind kw_conv: kernels mixed into the layout that its products read.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kwlayers.ops import ConvGeometry, choose, kw_conv, triton_conv

# conftest.py has imported it already, with its interpreter where there is no GPU.
pytest.importorskip("triton", reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def tensors(
    batch: int, geometry: ConvGeometry, cell: tuple[int, ...], size: tuple[int, ...]
) -> list[Tensor]:
    torch.manual_seed(0)
    mixtures = 1
    for whole, part in zip(geometry.kernel, cell, strict=True):
        mixtures *= whole // part
    attention = torch.randn(batch, mixtures, 4)
    return [
        torch.randn(batch, geometry.kernel[1], *size).to(DEVICE),
        (attention / attention.abs().sum(-1, keepdim=True)).to(DEVICE),
        torch.randn(4, *cell).to(DEVICE),
    ]


def run(inputs: list[Tensor], geometry: ConvGeometry, backend: str, mb: float) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = kw_conv(*leaves, geometry, backend, mb)
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * slope).sum(), leaves)]


@pytest.mark.parametrize("workspace_mb", [16, 0.001], ids=["one block", "many blocks"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_path_equals_the_reference_in_output_and_every_gradient(
    last: bool, workspace_mb: float
) -> None:
    geometry = ConvGeometry((10, 6, 3, 2), (2, 1), (1, 0), (1, 2), 1)
    inputs = tensors(3, geometry, (5, 3, 1, 1), (7, 5))
    if last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    found = run(inputs, geometry, "triton", workspace_mb)
    expected = run([t.double() for t in inputs], geometry, "reference", 16)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= 1e-5


def test_it_says_what_it_cannot_do() -> None:
    geometry = ConvGeometry((4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    inputs = tensors(2, geometry, (4, 2, 3, 3), (5, 5))
    with pytest.raises(ValueError, match=r"'triton' cannot do this layer: it needs cells of one"):
        kw_conv(*inputs, geometry, "triton")
    inputs = tensors(2, geometry, (4, 2, 1, 1), (5, 5))
    with pytest.raises(ValueError, match="float64"):
        kw_conv(*(t.double() for t in inputs), geometry, "triton")


@pytest.mark.skipif(CUDA, reason="about a machine without a GPU")
def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    geometry = ConvGeometry((4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    inputs = tensors(2, geometry, (4, 2, 1, 1), (5, 5))
    assert not triton_conv.available(inputs[0].device)
    with pytest.raises(ValueError, match="needs a CUDA device and the triton package"):
        kw_conv(*inputs, geometry, "triton")


def test_it_is_chosen_on_a_gpu_for_kernels_of_several_positions() -> None:
    geometry = ConvGeometry((512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    cell = (512, 512, 1, 1)
    for dtype, size, expected in (
        (torch.bfloat16, 7, "triton"),
        (torch.float64, 7, "grouped"),
        (torch.bfloat16, 56, "grouped"),
    ):
        chosen = choose("cuda", dtype, 256, (size, size), geometry, cell, 27)
        assert set(chosen) == {expected}
