"""The attention branch against the published formula, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import Attention
from kwlayers.geometry import Assignment


def make(
    channels: int,
    mixtures: int,
    cells: int,
    beta: tuple[int, ...] | None = None,
    *,
    start: int = 0,
    total: int | None = None,
    **settings: float | str | None,
) -> Attention:
    """float64, every parameter and running statistic random."""
    torch.manual_seed(0)
    chosen = beta if beta is not None else tuple(i % (cells + 1) for i in range(mixtures))
    attention = Attention(
        channels,
        mixtures,
        cells,
        Assignment(chosen, start, len(chosen)),
        total_mixtures=mixtures if total is None else total,
        dtype=torch.float64,
        **settings,  # type: ignore[arg-type]
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    if isinstance(attention.norm, nn.BatchNorm1d):
        nn.init.normal_(attention.norm.running_mean)
        nn.init.uniform_(attention.norm.running_var, 0.5, 2.0)
    return attention


def one_hot(beta: tuple[int, ...], cells: int) -> Tensor:
    """Rows of `beta`; index `cells` is the zero cell, a row of zeros."""
    rows = [[float(column == cell) for column in range(cells)] for cell in beta]
    return torch.tensor(rows, dtype=torch.float64)


# The formula -------------------------------------------------------------------------


def test_two_cells_and_two_channels_give_what_a_hand_calculation_gives() -> None:
    attention = make(2, 1, 2, beta=(1,)).eval()
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        attention.fc1.weight[0] = torch.tensor([1.0, 0.0])
        attention.fc1.weight[1] = torch.tensor([0.0, 1.0])
        nn.init.ones_(attention.norm.weight)
        attention.norm.running_mean.zero_()
        attention.norm.running_var.fill_(1 - attention.norm.eps)
        attention.fc2.weight[:, 0] = torch.tensor([1.0, -1.0, 0.0])
        attention.fc2.weight[:, 1] = 100.0
        attention.fc2.bias.copy_(torch.tensor([1.0, 1.0, 0.5]))
        attention.temperature.fill_(0.25)
    x = torch.tensor([[[1.0, 3.0], [-4.0, 2.0]]], dtype=torch.float64)
    # Means 2 and -1; the rectifier leaves 2 and 0; z = (2 + 1, -2 + 1, 0.5), of L1 norm 4.5.
    expected = [[[0.75 * 3 / 4.501, 0.75 * -1 / 4.501 + 0.25]]]
    torch.testing.assert_close(
        attention(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_attention_follows_the_formula(norm: str, training: bool, size: tuple[int, ...]) -> None:
    mixtures, cells, tau = 4, 3, 0.3
    beta = (0, 3, 1, 2)
    attention = make(5, mixtures, cells, beta, norm=norm).train(training)
    attention.temperature.fill_(tau)
    x = torch.randn(6, 5, *size, dtype=torch.float64)
    weights = {name: p.detach().clone() for name, p in attention.state_dict().items()}

    pooled = torch.stack([image.reshape(5, -1).sum(1) / math.prod(size) for image in x])
    u = pooled @ weights["fc1.weight"].T + weights.get("fc1.bias", torch.zeros(()))
    if norm == "layer":
        mean, variance = u.mean(1, keepdim=True), u.var(1, correction=0, keepdim=True)
    elif training:
        mean, variance = u.mean(0), u.var(0, correction=0)
    else:
        mean, variance = weights["norm.running_mean"], weights["norm.running_var"]
    u = (u - mean) / (variance + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]
    z = u.clamp(min=0) @ weights["fc2.weight"].T + weights["fc2.bias"]
    z = z.reshape(6, mixtures, cells + 1)
    expected = torch.empty(6, mixtures, cells, dtype=torch.float64)
    for b in range(6):
        for i in range(mixtures):
            norm1 = sum(abs(float(z[b, i, j])) for j in range(cells + 1)) + 1e-3
            for j in range(cells):
                assigned = 1.0 if beta[i] == j else 0.0
                expected[b, i, j] = (1 - tau) * float(z[b, i, j]) / norm1 + tau * assigned

    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_batch_norm_in_training_updates_its_running_statistics() -> None:
    attention = make(5, 2, 3)
    reference = nn.BatchNorm1d(16, dtype=torch.float64)
    reference.load_state_dict(attention.norm.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64)
    attention(x)
    reference(attention.fc1(x))
    assert int(attention.norm.num_batches_tracked) == 1
    torch.testing.assert_close(attention.norm.running_mean, reference.running_mean)
    torch.testing.assert_close(attention.norm.running_var, reference.running_var)


def test_only_batch_norm_leaves_the_first_layer_without_bias() -> None:
    assert make(5, 2, 3, norm="batch").fc1.bias is None
    assert make(5, 2, 3, norm="layer").fc1.bias is not None


def test_a_norm_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"norm 'group': allowed are 'batch' and 'layer'"):
        make(5, 2, 3, norm="group")


def test_repr_gives_channels_mixtures_and_cells() -> None:
    assert repr(make(5, 2, 3)).startswith("Attention(\n  5, num_mixtures=2, num_cells=3\n")


def test_attention_is_signed_and_its_rows_stay_below_one_in_l1_norm() -> None:
    alpha = make(5, 8, 7)(torch.randn(16, 5, 3, dtype=torch.float64))
    assert alpha.min() < -0.1
    assert alpha.max() > 0.1
    assert alpha.abs().sum(-1).max() < 1


# Temperature -------------------------------------------------------------------------


def test_at_temperature_one_attention_is_exactly_the_assignment_and_the_zero_cell_is_zero() -> None:
    beta = (2, 3, 0, 3, 2)
    attention = make(5, 5, 3, beta)
    attention.temperature.fill_(1.0)
    alpha = attention(torch.randn(2, 5, 4, dtype=torch.float64))
    assert torch.equal(alpha, one_hot(beta, 3).expand(2, 5, 3))
    assert not alpha[:, [1, 3]].any()


def test_temperature_mixes_linearly_between_learned_and_assigned() -> None:
    beta = (2, 3, 0)
    attention = make(5, 3, 3, beta).eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    learned = attention(x)
    attention.temperature.fill_(0.75)
    expected = 0.25 * learned + 0.75 * one_hot(beta, 3)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_temperature_starts_at_zero_and_is_saved_with_the_assignment() -> None:
    state = make(5, 3, 3, (2, 3, 0)).state_dict()
    assert float(state["temperature"]) == 0
    assert state["assignment"].tolist() == [2, 3, 0]


# A batch of one ----------------------------------------------------------------------


def test_a_batch_of_one_trains_on_running_statistics_and_leaves_them_as_they_were() -> None:
    attention = make(5, 2, 3)
    before = {name: b.clone() for name, b in attention.norm.named_buffers()}
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    alpha = attention(x)
    alpha.square().sum().backward()
    for name, buffer in attention.norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert torch.equal(alpha, attention.eval()(x))


def test_a_batch_of_two_trains_on_its_own_statistics() -> None:
    attention = make(5, 2, 3)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert not torch.allclose(attention(x), attention.eval()(x))


# The nonlocal basis ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixtures", "cells", "total", "ratio", "start", "local", "width"),
    [
        # n_local = m * n // M where n was solved for, int(b * m) where b was given.
        (4, 12, 12, None, 0, 4, 16),
        (4, 12, 12, None, 4, 4, 16),
        (4, 12, 12, None, 8, 4, 16),
        (3, 40, 12, None, 10, 10, 16),
        (4, 6, 12, 0.5, 2, 2, 16),
        (5, 6, 12, 0.5, 3, 2, 16),
        (2, 80, 40, 2.0, 8, 4, 19),  # int(76 / 4)
        (4, 4, 4, 1.0, 0, 4, 16),  # no other layer: nothing to expand, the basis stays
        (1, 3, 12, 0.25, 2, 0, 16),  # no cell of its own
    ],
)
def test_basis_columns_come_back_in_warehouse_order(
    mixtures: int,
    cells: int,
    total: int,
    ratio: float | None,
    start: int,
    local: int,
    width: int,
) -> None:
    attention = make(
        5, mixtures, cells, start=start, total=total, ratio=ratio, basis_ratio=1 / 4
    ).eval()
    nonlocal_cells = cells - local
    assert attention.fc2.weight.shape == (mixtures * (local + width + 1), 16)
    assert attention.fc2.bias is None
    assert attention.fc3.weight.shape == (nonlocal_cells, width)
    assert attention.fc3.bias is None
    assert attention.bias.shape == (mixtures * (cells + 1),)

    x = torch.randn(2, 5, dtype=torch.float64)
    with torch.no_grad():
        got = attention(x)
        hidden = F.relu(attention.norm(attention.fc1(x)))
        z = (hidden @ attention.fc2.weight.T).reshape(2, mixtures, local + width + 1)
        expand, bias = attention.fc3.weight, attention.bias.reshape(mixtures, cells + 1)
        expected = torch.empty(2, mixtures, cells + 1, dtype=torch.float64)
        for b in range(2):
            for i in range(mixtures):
                own, shared = list(z[b, i, :local]), z[b, i, local : local + width]
                others = [expand[j] @ shared for j in range(nonlocal_cells)]
                for j in range(cells):
                    mine = start <= j < start + local
                    expected[b, i, j] = (own if mine else others).pop(0) + bias[i, j]
                expected[b, i, cells] = z[b, i, -1] + bias[i, cells]
        expected /= expected.abs().sum(-1, keepdim=True) + 1e-3
    torch.testing.assert_close(got, expected[..., :-1], rtol=0, atol=1e-12)


def test_the_bias_of_a_basis_starts_at_zero() -> None:
    torch.manual_seed(0)
    attention = Attention(5, 2, 8, Assignment((0, 1), 0, 2), total_mixtures=8, basis_ratio=1 / 4)
    assert not attention.bias.any()


# Counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(
    ("channels", "mixtures", "cells", "reduction", "hidden"),
    [
        (3, 1, 1, 1 / 16, 16),
        (33, 7, 5, 1 / 16, 16),
        (64, 9, 4, 1 / 2, 32),
        (515, 2, 50, 1 / 16, 32),
    ],
)
def test_parameters_without_basis_follow_the_closed_form(
    channels: int, mixtures: int, cells: int, reduction: float, hidden: int, norm: str
) -> None:
    attention = make(channels, mixtures, cells, reduction=reduction, norm=norm)
    expected = channels * hidden + (hidden if norm == "layer" else 0) + 2 * hidden
    expected += hidden * (cells + 1) * mixtures + (cells + 1) * mixtures
    assert sum(p.numel() for p in attention.parameters()) == expected


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(
    ("mixtures", "cells", "total", "ratio", "basis_ratio", "local", "basis"),
    [
        (9, 100, 100, 1.0, 1 / 2, 9, 45),  # int(91 / 2)
        (9, 50, 100, 0.5, 1 / 16, 4, 16),  # int(4.5) local, at least 16 for the other 46
        (9, 50, 100, None, 1 / 16, 4, 16),
        (4, 4, 4, 1.0, 1 / 2, 4, 16),
    ],
)
def test_parameters_with_basis_follow_the_closed_form(
    mixtures: int,
    cells: int,
    total: int,
    ratio: float | None,
    basis_ratio: float,
    local: int,
    basis: int,
    norm: str,
) -> None:
    attention = make(
        33, mixtures, cells, total=total, ratio=ratio, basis_ratio=basis_ratio, norm=norm
    )
    expected = 33 * 16 + (16 if norm == "layer" else 0) + 2 * 16
    expected += 16 * (local + basis + 1) * mixtures + basis * (cells - local)
    expected += (cells + 1) * mixtures
    assert sum(p.numel() for p in attention.parameters()) == expected


# Initialisation ----------------------------------------------------------------------


@pytest.mark.parametrize("basis_ratio", [1.0, 1 / 2])
def test_linear_layers_start_kaiming_normal_in_fan_out_with_zero_bias(basis_ratio: float) -> None:
    torch.manual_seed(0)
    attention = Attention(
        512,
        16,
        64,
        Assignment(tuple(range(16)), 0, 16),
        total_mixtures=64,
        basis_ratio=basis_ratio,
        norm="layer",
    )
    linears = [m for m in attention.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == (2 if basis_ratio == 1 else 3)
    for linear in linears:
        # 768 numbers or more: the deviation's own deviation is below 2.6 %, 10 % is four times.
        expected = math.sqrt(2 / linear.out_features)
        assert linear.weight.numel() >= 768
        assert float(linear.weight.detach().std()) == pytest.approx(expected, rel=0.1)
        assert linear.bias is None or not linear.bias.any()
    assert attention.norm.weight.eq(1).all()
    assert not attention.norm.bias.any()


def test_reset_parameters_brings_everything_back_after_to_empty() -> None:
    attention = make(5, 3, 8, beta=(2, 8, 0), total=8, basis_ratio=1 / 4)
    attention.to(device="meta").to_empty(device="cpu")
    attention.temperature.fill_(0.5)
    attention.assignment.fill_(-1)
    attention.reset_parameters()
    assert attention.assignment.tolist() == [2, 8, 0]
    assert float(attention.temperature) == 0.0
    assert attention(torch.randn(4, 5, dtype=torch.float64)).isfinite().all()


def test_reset_parameters_starts_again() -> None:
    attention = make(5, 2, 8, total=8, basis_ratio=1 / 4, norm="layer")
    before = attention.fc2.weight.detach().clone()
    attention.reset_parameters()
    assert not torch.equal(attention.fc2.weight, before)
    assert not attention.bias.any()
    assert not attention.fc1.bias.any()
    assert attention.norm.weight.eq(1).all()
