"""DyMN's convolution: counts, what it reduces to, and the context that it needs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from kwlayers import PlanError, set_temperature_, trace
from kwlayers.methods.dymn import ContextConv2d, DyMNGroup
from tests.kwlayers.methods.reference import SmallSteered, converted, images, plan_of, settings


def layer(**changes: int) -> ContextConv2d:
    torch.manual_seed(0)
    made = ContextConv2d(6, 8, 3, stride=2, padding=1, groups=2, context_size=5, **changes)
    torch.nn.init.normal_(made.attention.fc.weight)
    return made.double().eval()


def test_kernels_are_mixed_by_a_softmax_of_the_context() -> None:
    made = layer(num_kernels=3)
    x = torch.randn(4, 6, 7, 5, dtype=torch.float64)
    context = torch.randn(4, 5, dtype=torch.float64)
    logits = context @ made.attention.fc.weight.T + made.attention.fc.bias
    for temperature, divisor in ((0.0, 1.0), (1.0, 30.0), (0.5, 15.5)):
        set_temperature_(made, temperature)
        rows = []
        for b in range(4):
            alpha = torch.softmax(logits[b] / divisor, 0)
            weight = (alpha.view(3, 1, 1, 1, 1) * made.kernels).sum(0)
            assert made.biases is not None
            rows.append(F.conv2d(x[b : b + 1], weight, alpha @ made.biases, 2, 1, 1, 2))
        torch.testing.assert_close(made(x, context), torch.cat(rows), rtol=1e-12, atol=1e-12)


def test_a_single_kernel_is_a_static_convolution() -> None:
    made = layer(num_kernels=1)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    expected = F.conv2d(x, made.kernels[0], made.biases[0], 2, 1, 1, 2)  # type: ignore[index]
    found = made(x, torch.randn(2, 5, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_parameters_and_macs_are_those_of_the_formula() -> None:
    # A 3x3 layer 16 -> 16 on 12x12 positions, H = 8, K = 4: by hand.
    plan = plan_of(SmallSteered(), settings("dymn"))
    (first,) = (group for group in plan.groups if group.layers == ("blocks.0.conv1",))
    (cost,) = first.costs(plan.of(first))
    assert cost.kernel_params == 4 * 16 * 16 * 9
    assert cost.attention_params == 8 * 4 + 4
    assert cost.mixing_macs == 4 * 16 * 16 * 9
    assert cost.attention_macs == 8 * 4
    assert cost.conv_macs == 16 * 16 * 9 * 12 * 12


def test_every_convolution_of_blocks_with_a_context_is_dynamic_and_no_other() -> None:
    network = trace(SmallSteered(), (3, 12, 12))
    assert {site.name: site.context for site in network.sites if site.context} == {
        site.name: 8 for site in network.sites if site.name.startswith("blocks.")
    }
    plan = plan_of(SmallSteered(), settings("dymn"))
    dynamic = {name for group in plan.groups for name in group.layers}
    own = {f"blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2, 3)} | {"blocks.1.shortcut"}
    assert dynamic == own


@pytest.mark.parametrize("name", ["blocks.0.context_gen.conv_f", "blocks.0.act.coef_net.0"])
def test_what_steers_a_block_stays_as_it_is(name: str) -> None:
    site = trace(SmallSteered(), (3, 12, 12))[name]
    assert "makes factors or kernels with it" in site.fixed
    with pytest.raises(PlanError, match="makes factors or kernels"):
        plan_of(SmallSteered(), settings("kernel_warehouse")).from_groups(
            trace(SmallSteered(), (3, 12, 12)),
            [{"name": "a", "layers": [name], "num_cells": 1, "cell": [1, 1, 1, 1], "ratio": 1}],
        )


def test_a_layer_outside_blocks_with_a_context_is_refused() -> None:
    network = trace(SmallSteered(), (3, 12, 12))
    group = DyMNGroup("a", ("stem.0",), 4)
    with pytest.raises(ValueError, match=r"stem\.0: dymn needs a block with a context"):
        group.check(network.of(group))


def test_a_layer_without_its_block_says_what_is_missing() -> None:
    made = layer(num_kernels=2)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no context for an input \(2, 6, 7, 5\)"):
        made(x)
    with pytest.raises(ValueError, match=r"a context \(3, 5\) for an input .* expected \(2, 5\)"):
        made(x, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"expected \(B, 6, H, W\)"):
        made(x[:, :5], torch.randn(2, 5))


def test_temperature_is_saved_with_the_model() -> None:
    made = converted(SmallSteered().double(), settings("dymn")).eval()
    set_temperature_(made, 0.5)
    other = copy.deepcopy(made)
    set_temperature_(other, 0.0)
    x = images()
    assert not torch.equal(other(x), made(x))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
