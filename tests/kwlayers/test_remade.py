"""Kernels that are made anew for the backward, against autograd, which keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.remade import conv_remade

GEOMETRY = ConvGeometry((6, 2, 3, 3), (2, 1), (1, 0), (1, 2), 2)
NAMES = ("x", "weights", "factors", "kernels", "shift")


def make(weights: Tensor, factors: Tensor, kernels: Tensor, shift: Tensor) -> Tensor:
    """weights: (B, K)  factors: (B, C_out)  kernels: (K, *kernel)  shift: (C_out,)."""
    mixed = (weights @ kernels.flatten(1)).view(-1, *kernels.shape[1:])
    return mixed * factors[:, :, None, None, None] + shift[:, None, None, None]


def tensors(*frozen: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = ((5, 4, 7, 9), (5, 3), (5, 6), (3, 6, 2, 3, 3), (6,))
    return {
        name: torch.randn(shape, dtype=dtype).requires_grad_(name not in frozen)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def remade(given: dict[str, Tensor], nbytes: int | None = None) -> Tensor:
    x, weights, factors, *shared = given.values()
    return conv_remade(make, x, GEOMETRY, [weights, factors], shared, nbytes)


def kept(given: dict[str, Tensor]) -> Tensor:
    """Sample by sample, as autograd does it."""
    x, *parts = given.values()
    arguments = GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation, GEOMETRY.groups
    rows = [
        torch.nn.functional.conv2d(one[None], kernel, None, *arguments)
        for one, kernel in zip(x, make(*parts), strict=True)
    ]
    return torch.cat(rows)


def check(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: Any) -> None:
    for name in NAMES:
        assert (
            (one[name].grad is None) == (other[name].grad is None) == (not one[name].requires_grad)
        ), name
        if other[name].grad is not None:
            torch.testing.assert_close(one[name].grad, other[name].grad, **tolerance, msg=name)


# One sample at a time, two and the rest, all.
@pytest.mark.parametrize("nbytes", [1, 2 * 3 * 8 * 108, None])
@pytest.mark.parametrize(
    "frozen", [(), *((name,) for name in NAMES), NAMES[1:], NAMES[:3]], ids=str
)
def test_gradients_are_autograd_s_whatever_is_frozen(
    frozen: tuple[str, ...], nbytes: int | None
) -> None:
    ours, theirs = tensors(*frozen), tensors(*frozen)
    found, expected = remade(ours, nbytes), kept(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    check(ours, theirs, rtol=1e-11, atol=1e-11)


def test_few_bytes_make_few_kernels_at_a_time() -> None:
    made: list[int] = []

    def watched(*parts: Tensor) -> Tensor:
        made.append(len(parts[0]))
        return make(*parts)

    x, weights, factors, *shared = tensors().values()
    conv_remade(watched, x, GEOMETRY, [weights, factors], shared, 2 * 3 * 8 * 108).sum().backward()
    assert made == [2, 2, 1] * 2
    with torch.no_grad():
        assert torch.equal(remade(tensors(), 1), remade(tensors(), 1))


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_under_autocast_the_backward_makes_what_the_forward_did(inside: bool) -> None:
    """Kernels in float32, convolved in bfloat16, also where backward runs under autocast."""
    ours, theirs = (tensors(dtype=torch.float32) for _ in range(2))
    dtypes = set()

    def watched(*parts: Tensor) -> Tensor:
        kernels = make(*parts)
        dtypes.add(kernels.dtype)
        return kernels

    x, weights, factors, *shared = ours.values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv_remade(watched, x, GEOMETRY, [weights, factors], shared, 1)
        assert out.dtype == torch.bfloat16
        if inside:
            out.backward(torch.ones_like(out))
    if not inside:
        out.backward(torch.ones_like(out))
    assert dtypes == {torch.float32}
    kept(theirs).sum().backward()
    # bfloat16 has 8 bits; what is added up is of about 1, up to 200 of it.
    check(ours, theirs, rtol=0.05, atol=0.5)


def test_an_empty_batch_has_an_empty_result_and_gradients() -> None:
    given = {
        name: (t[:0] if name in NAMES[:3] else t).detach().requires_grad_()
        for name, t in tensors().items()
    }
    out = remade(given)
    assert out.shape == kept(tensors())[:0].shape
    out.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in given.values())
