"""The context of a block: the generator's formula, Dy-ReLU, and the lean form of both products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kwlayers.context import ContextGenerator, DyReLUB
from kwlayers.ops.dy_relu import dy_relu, dy_relu_ref

Op = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]


def by_hand(x: Tensor, slopes: Tensor, offsets: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """All pieces in one tensor, as published."""
    maps = (1,) * (x.dim() - 2)
    a, b = (c.view(*c.shape[:2], *maps, -1) for c in (slopes, offsets))
    out = (x[..., None] * a + b).max(-1).values
    for gate in gates:
        out = out * gate
    return out


def inputs(size: tuple[int, ...], pieces: int, gated: bool) -> list[Tensor]:
    torch.manual_seed(0)
    batch, channels, *maps = size
    shapes = [size, (batch, channels, pieces), (batch, channels, pieces)]
    if gated:
        shapes += [(batch, channels, maps[0], 1), (batch, channels, 1, maps[1])]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


SIZES = [(1, 1, 1, 1), (3, 33, 7, 5), (5, 2, 300, 200)]  # the last is worked on in parts


@pytest.mark.parametrize("op", [dy_relu, dy_relu_ref])
@pytest.mark.parametrize(
    ("size", "pieces", "gated"), list(itertools.product(SIZES, (1, 2, 3), (False, True)))
)
def test_values_and_gradients_are_those_of_all_pieces(
    op: Op, size: tuple[int, ...], pieces: int, gated: bool
) -> None:
    expected, found = ([*inputs(size, pieces, gated)] for _ in range(2))
    weight = torch.randn(size, dtype=torch.float64)
    results = []
    for function, tensors in ((by_hand, expected), (op, found)):
        x, slopes, offsets, *gates = tensors
        out = function(x, slopes, offsets, gates)
        (out * weight).sum().backward()
        results.append(out)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_only_the_input_and_small_tensors_are_kept_for_backward() -> None:
    x, slopes, offsets, *gates = inputs((2, 8, 16, 12), 2, True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dy_relu(x, slopes, offsets, gates)
    assert sum(kept) == sum(t.numel() for t in (x, slopes, offsets, *gates))
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dy_relu_ref(x, slopes, offsets, gates)
    assert sum(n == x.numel() for n in kept) > 3


def test_other_memory_formats_and_dtypes_give_the_same() -> None:
    x, slopes, offsets, *gates = (t.detach() for t in inputs((2, 8, 6, 5), 2, True))
    expected = dy_relu(x, slopes, offsets, gates)
    turned = dy_relu(x.contiguous(memory_format=torch.channels_last), slopes, offsets, gates)
    torch.testing.assert_close(turned, expected)
    low = dy_relu(*(t.bfloat16() for t in (x, slopes, offsets)), [g.bfloat16() for g in gates])
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.1)


def test_where_pieces_are_equal_the_first_has_the_gradient() -> None:
    slopes = torch.tensor([[[2.0, 3.0]]], requires_grad=True)
    x = torch.zeros(1, 1, 1, requires_grad=True)
    dy_relu(x, slopes, torch.zeros(1, 1, 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == 2.0


def test_torch_func_and_compilers_see_plain_operators() -> None:
    x, slopes, offsets, *gates = (t.detach() for t in inputs((2, 3, 4, 5), 2, True))

    def total(x: Tensor) -> Tensor:
        return dy_relu(x, slopes, offsets, gates).square().sum()

    wanted = x.clone().requires_grad_()
    total(wanted).backward()
    torch.testing.assert_close(torch.func.grad(total)(x), wanted.grad)
    compiled = torch.compile(dy_relu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, slopes, offsets, gates), dy_relu(x, slopes, offsets, gates)
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 2), (2, 3, 1), (2, 3, 4, 1)), r"slopes \(2, 3, 2\) and offsets \(2, 3, 1\)"),
        (((1, 3, 2), (1, 3, 2), (2, 3, 4, 1)), r"both \(B, C, pieces\) for an input \(2, 3, 4, 5"),
        (((2, 3, 2), (2, 3, 2), (2, 3, 2, 1)), r"a gate \(2, 3, 2, 1\) for an input"),
        (((2, 3, 2), (2, 3, 2), (2, 3, 4)), r"a gate \(2, 3, 4\) for an input"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    slopes, offsets, gate = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        dy_relu(torch.zeros(2, 3, 4, 5), slopes, offsets, [gate])


# Modules


def test_coefficients_start_near_those_of_a_relu() -> None:
    made = DyReLUB(4, 3)
    torch.nn.init.zeros_(made.coef_net[0].weight)
    torch.nn.init.zeros_(made.coef_net[0].bias)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(made(x, torch.randn(2, 3)), torch.relu(x))


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_coefficients_are_those_of_the_formula(pieces: int) -> None:
    torch.manual_seed(0)
    made = DyReLUB(4, 3, pieces).double()
    x, h = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    theta = 2 * torch.sigmoid(F.linear(h, made.coef_net[0].weight, made.coef_net[0].bias)) - 1
    theta = theta.view(2, 4, 2 * pieces)
    slopes = theta[..., :pieces].clone()
    slopes[..., 0] += 1
    expected = by_hand(x, slopes, theta[..., pieces:] / 2, ())
    torch.testing.assert_close(made(x, h), expected, rtol=1e-12, atol=1e-12)
    # 2M * C (H + 1) parameters, 4M numbers that are constants.
    assert sum(p.numel() for p in made.parameters()) == 2 * pieces * 4 * 4
    assert sum(b.numel() for b in made.buffers()) == 4 * pieces


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 9), (7, 4), (1, 1)])
def test_the_context_is_that_of_the_formula(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    made = ContextGenerator(3, 8, 5, stride).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    bands, frames = size
    weight = made.joint_conv.weight[:, :, 0, 0]

    def means(along: int) -> Tensor:
        s = x.mean(along).transpose(1, 2)  # (B, L, C)
        normed = F.batch_norm(
            (s @ weight.T).transpose(1, 2),
            made.joint_norm.running_mean,
            made.joint_norm.running_var,
            made.joint_norm.weight,
            made.joint_norm.bias,
        )
        return normed * (normed + 3).clamp(0, 6) / 6

    def gate(u: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        length = u.shape[-1]
        if stride > 1:  # a third of a window's three numbers, those beside the ends zeros
            padded = F.pad(u, (1, 1))
            starts = range(0, length, stride)
            u = torch.stack([padded[..., i : i + 3].sum(-1) / 3 for i in starts], -1)
        return torch.sigmoid(
            torch.einsum("oh,bhl->bol", conv.weight[:, :, 0, 0], u) + conv.bias.view(-1, 1)
        )

    u_f, u_t = means(3), means(2)
    found = made(x)
    torch.testing.assert_close(found.vector, (u_f.sum(-1) + u_t.sum(-1)) / (bands + frames))
    torch.testing.assert_close(found.gates[0], gate(u_f, made.conv_f)[..., None])
    torch.testing.assert_close(found.gates[1], gate(u_t, made.conv_t)[:, :, None])


def test_no_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces 0: at least 1"):
        DyReLUB(4, 3, 0)
