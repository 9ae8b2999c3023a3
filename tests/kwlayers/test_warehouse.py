"""A warehouse owns its cells, starts them layer by layer and hands them out evenly."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import KWConv1d, KWConv2d, Warehouse


def deviation(cells: Tensor) -> float:
    """Of values whose mean is zero."""
    return float(cells.detach().square().mean().sqrt())


# Construction ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_cells", "cell", "num_mixtures", "message"),
    [
        (0, (4, 4, 1), None, "num_cells 0, cell (4, 4, 1): at least one cell of positive sizes"),
        (2, (4, 4), None, "num_cells 2, cell (4, 4): at least one cell of positive sizes"),
        (2, (4, 0, 1), None, "num_cells 2, cell (4, 0, 1): at least one cell of positive sizes"),
        (2, (4, 4, 1), 0, "num_mixtures 0: at least 1"),
    ],
)
def test_a_warehouse_that_cannot_be_is_refused(
    num_cells: int, cell: tuple[int, ...], num_mixtures: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Warehouse(num_cells, cell, num_mixtures)


def test_the_cells_are_the_only_parameter() -> None:
    warehouse = Warehouse(5, (4, 2, 1, 3), 10)
    assert {name: tuple(p.shape) for name, p in warehouse.named_parameters()} == {
        "cells": (5, 4, 2, 1, 3)
    }
    assert list(warehouse.state_dict()) == ["cells"]


def test_a_warehouse_takes_device_and_dtype() -> None:
    cells = Warehouse(5, (4, 2, 1), device="meta", dtype=torch.bfloat16).cells
    assert cells.device.type == "meta"
    assert cells.dtype == torch.bfloat16


def test_repr_gives_cells_shape_and_mixtures() -> None:
    expected = "Warehouse(num_cells=5, cell=(4, 2, 1), num_mixtures=10)"
    assert repr(Warehouse(5, (4, 2, 1), 10)) == expected
    assert repr(Warehouse(5, (4, 2, 1))) == expected.replace("10", "5")


# Starting values ---------------------------------------------------------------------


def test_cells_start_kaiming_normal_in_fan_out_as_one_kernel() -> None:
    torch.manual_seed(0)
    warehouse = Warehouse(64, (16, 8, 1, 3))
    # Fan out 64 * 16 * 3; 24,576 numbers, so 2 % is over four deviations of the deviation.
    expected = math.sqrt(2 / (64 * 16 * 3))
    assert deviation(warehouse.cells) == pytest.approx(expected, rel=0.02)


def test_each_layer_starts_its_own_run_of_cells_as_its_kernel() -> None:
    torch.manual_seed(0)
    warehouse = Warehouse(40, (16, 16, 1, 1), 40)
    KWConv2d(32, 32, 1, warehouse=warehouse)  # 4 mixtures
    KWConv2d(32, 32, 3, warehouse=warehouse)  # 36
    first, second = warehouse.cells[:4], warehouse.cells[4:]
    # Fan outs 4 * 16 and 36 * 16; 1,024 numbers at least, whose deviation deviates 2.2 %.
    assert deviation(first) == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    assert deviation(second) == pytest.approx(math.sqrt(2 / 576), rel=0.05)


def test_a_layer_leaves_the_cells_of_the_others_alone() -> None:
    torch.manual_seed(0)
    warehouse = Warehouse(8, (4, 4, 1, 1), 8)
    KWConv2d(8, 8, 1, warehouse=warehouse)
    before = warehouse.cells.detach().clone()
    KWConv2d(8, 8, 1, warehouse=warehouse)
    assert torch.equal(warehouse.cells[:4], before[:4])
    assert not torch.isclose(warehouse.cells[4:], before[4:]).any()


@pytest.mark.parametrize("memory", [torch.channels_last, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("cell", [(4, 2, 1), (4, 2, 1, 3), (4, 2, 3, 1, 2)])
def test_a_memory_format_is_for_images_and_passes_the_cells_by(
    cell: tuple[int, ...], memory: torch.memory_format
) -> None:
    warehouse = Warehouse(3, cell)
    parameter, before = warehouse.cells, warehouse.cells.detach().clone()
    assert warehouse.to(memory_format=memory) is warehouse
    assert warehouse.cells is parameter
    assert warehouse.cells.is_contiguous()
    assert torch.equal(warehouse.cells, before)


def test_a_warehouse_moves_with_its_gradient() -> None:
    warehouse = Warehouse(3, (4, 2, 1))
    warehouse.cells.sum().backward()
    warehouse.double()
    assert warehouse.cells.dtype == warehouse.cells.grad.dtype == torch.float64
    assert warehouse.cells.shape == warehouse.cells.grad.shape == (3, 4, 2, 1)
    assert warehouse.to_empty(device="meta").cells.shape == (3, 4, 2, 1)


def test_cells_in_another_memory_format_start_again_too() -> None:
    torch.manual_seed(0)
    warehouse = Warehouse(3, (4, 2, 1))
    warehouse.cells.data = warehouse.cells.data.contiguous(memory_format=torch.channels_last)
    assert not warehouse.cells.is_contiguous()
    before = warehouse.cells.detach().clone()
    warehouse.reset_parameters()
    assert not torch.isclose(warehouse.cells, before).any()


# Handing out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_cells", "num_mixtures", "expected"),
    [
        # floor(g * n / M) of three layers with 1, 2 and 3 mixtures; n is the zero cell.
        (6, 6, [(0,), (1, 2), (3, 4, 5)]),
        (12, 6, [(0,), (2, 4), (6, 8, 10)]),
        (9, 6, [(0,), (1, 3), (4, 6, 7)]),
        (2, 6, [(0,), (2, 2), (1, 2, 2)]),
        (4, 6, [(0,), (4, 1), (2, 4, 3)]),
        (1, 6, [(0,), (1, 1), (1, 1, 1)]),
    ],
)
def test_cells_are_handed_out_evenly_in_the_order_of_the_layers(
    num_cells: int, num_mixtures: int, expected: list[tuple[int, ...]]
) -> None:
    warehouse = Warehouse(num_cells, (2, 2, 1), num_mixtures)
    layers = [KWConv1d(2, 2 * m, 1, warehouse=warehouse) for m in (1, 2, 3)]
    assert [tuple(layer.attention.assignment.tolist()) for layer in layers] == expected


def test_past_the_last_mixture_the_cells_come_round_again() -> None:
    warehouse = Warehouse(4, (2, 2, 1))
    layers = [KWConv1d(2, 6, 1, warehouse=warehouse) for _ in range(3)]
    dealt = [layer.attention.assignment.tolist() for layer in layers]
    assert dealt == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding": (1, 1)},
        {"padding_mode": "mirror"},
        {"kernel_size": 0},
        {"groups": 3},
        {"out_channels": 5},
        {"norm": "group"},
        {"backend": "cudnn"},
        {"reduction": 0.0},
        {"basis_ratio": -1.0},
    ],
    ids=str,
)
def test_a_refused_layer_takes_no_cells_and_changes_none(wrong: dict[str, Any]) -> None:
    warehouse = Warehouse(4, (2, 2, 1))
    before = warehouse.cells.detach().clone()
    settings = {"in_channels": 2, "out_channels": 4, "kernel_size": 1} | wrong
    with pytest.raises(ValueError, match=r"\w"):
        KWConv1d(**settings, warehouse=warehouse)
    assert torch.equal(warehouse.cells, before)
    assert KWConv1d(2, 4, 1, warehouse=warehouse).attention.assignment.tolist() == [0, 1]


# Sharing -----------------------------------------------------------------------------


def test_a_layer_refers_to_its_warehouse_without_registering_it() -> None:
    warehouse = Warehouse(4, (2, 2, 1))
    layer = KWConv1d(2, 4, 1, warehouse=warehouse)
    assert layer.warehouse is warehouse
    assert not any(isinstance(module, Warehouse) for module in layer.modules())
    assert not any(p is warehouse.cells for p in layer.parameters())


def test_two_layers_add_up_in_the_gradient_of_their_warehouse() -> None:
    torch.manual_seed(0)
    warehouse = Warehouse(6, (2, 2, 1), dtype=torch.float64)
    layers = [
        KWConv1d(2, 4, 1, warehouse=warehouse, norm="layer", dtype=torch.float64),
        KWConv1d(4, 4, 1, warehouse=warehouse, norm="layer", dtype=torch.float64),
    ]
    inputs = [torch.randn(3, c, 5, dtype=torch.float64) for c in (2, 4)]
    each = [
        torch.autograd.grad(layer(x).square().sum(), warehouse.cells)[0]
        for layer, x in zip(layers, inputs, strict=True)
    ]
    sum(layer(x).square().sum() for layer, x in zip(layers, inputs, strict=True)).backward()
    assert min(float(g.abs().max()) for g in each) > 0
    torch.testing.assert_close(warehouse.cells.grad, each[0] + each[1], rtol=0, atol=1e-12)


def test_a_hand_built_model_registers_the_warehouse_once_beside_its_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = Warehouse(8, (4, 4, 1, 1))
            self.one = KWConv2d(4, 8, 1, warehouse=self.cells)
            self.two = KWConv2d(8, 4, 1, warehouse=self.cells)

    names = [name for name, _ in Net().named_parameters(remove_duplicate=False)]
    assert [name for name in names if name.endswith("cells")] == ["cells.cells"]
    net = Net()
    twin = copy.deepcopy(net)
    assert twin.one.warehouse is twin.two.warehouse is twin.cells
    assert twin.cells is not net.cells
