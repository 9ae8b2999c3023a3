"""Warehouses in an architecture: its operators against the plan's counts and the built network."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from kwlayers import convert_
from kwlayers.plan import Plan
from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.expected import needed
from kwsearch.micronas.peak_memory import peak_bytes
from kwsearch.micronas.space import Architecture, Space, operators
from kwsearch.micronas.supernet import extract
from kwsearch.micronas.warehouses import Warehoused, network_of, plan_of
from tests.kwsearch.micronas.spaces import UCI_HAR, some_cycles


def some(space: Space, seed: int, ratio: float) -> Warehoused:
    architecture = space.random(Random(seed))
    return Warehoused(space, architecture, plan_of(network_of(space, architecture), ratio))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_operators_add_up_to_the_plan(seed: int, ratio: float) -> None:
    one = some(UCI_HAR, seed, ratio)
    assert one.plan.warehouses
    assert sum(part.key.macs for part in one.operators) == one.macs
    # Weights and biases by the network that is built.
    model = convert_(extract(UCI_HAR, one.architecture), one.plan)
    names = {name: tensor.numel() for name, tensor in model.named_parameters()}
    assert sum(names.values()) == one.params
    assert one.flash == sum(n * (4 if name.endswith("bias") else 1) for name, n in names.items())


def test_without_converted_layers_it_is_the_network_itself() -> None:
    architecture = UCI_HAR.random(Random(0))
    plan = Plan(network_of(UCI_HAR, architecture), ())
    one = Warehoused(UCI_HAR, architecture, plan)
    plain = operators(UCI_HAR, architecture)
    assert one.operators == plain
    assert one.bytes() == peak_bytes(plain)
    assert one.flash == sum(part.key.flash for part in plain)


def test_a_kernel_is_in_memory_while_it_is_made_and_used() -> None:
    # One time cell of 8 steps and 2 sensors; by hand.
    space = Space(8, 2, 2, (4,), (8,), plain_cells=0)
    architecture = Architecture.from_dict(
        {
            "time": [{"kernel": 3, "channels": 4}],
            "fusion": [
                {"bottleneck": 8, "channels": 8, "branches": [7], "residual": False, "keep": True}
            ],
        }
    )
    one = Warehoused(space, architecture, plan_of(network_of(space, architecture), 1.0))
    found = {part.name: part for part in one.operators}
    branch = found["fusion1.branch7"]
    assert branch.inputs == ("fusion1.bottleneck", "fusion1.branch7.mix")
    assert math.prod(found["fusion1.branch7.mix"].key.output) == 7 * 8 * 8
    # While it is made: the bottleneck's 4 x 1 x 8, 7 mixtures of 7 cells, the kernel.
    assert one.bytes() == 32 + 7 * 7 + 7 * 8 * 8
    assert [part.name.split(".")[-1] for part in one.operators][:2] != ["gap", "fc1"]  # the stem


def test_latency_has_the_attention_and_the_mixing() -> None:
    one = some(UCI_HAR, 1, 1.0)
    table = CycleTable("a board", 1.0, some_cycles(needed(UCI_HAR)))
    plain = table.latency(operators(UCI_HAR, one.architecture))
    found = one.latency(table)
    added = [part for part in one.timed if part.name not in {p.name for p in plain_of(one)}]
    assert found.cycles == pytest.approx(
        plain.cycles + sum(table.cycles(part.key).number for part in added)
    )
    assert set(found.fitted) >= {part.name for part in added if part.name.endswith("mix")}


def plain_of(one: Warehoused) -> tuple[object, ...]:
    return operators(UCI_HAR, one.architecture)


def test_a_network_with_warehouses_trains() -> None:
    torch.manual_seed(0)
    one = some(UCI_HAR, 2, 0.5)
    model = convert_(extract(UCI_HAR, one.architecture), one.plan)
    x = torch.randn(4, 1, 128, 9)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    warehouses = [p for name, p in model.named_parameters() if "cells" in name]
    assert warehouses
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in warehouses)
