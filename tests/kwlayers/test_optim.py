"""Parameter groups: weight decay where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kwlayers import convert_, parameter_groups, plan_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(8, 2)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.norm(self.stem(x))).mean((2, 3))
        return self.head(x + self.token[0])


@pytest.mark.parametrize("basis_ratio", [1.0, 0.5])
def test_kernels_cells_and_matrices_decay_and_nothing_else(basis_ratio: float) -> None:
    model = Net()
    plan = plan_model(model, (3, 8, 8), ratio=1, sharing="layer", basis_ratio=basis_ratio)
    convert_(model, plan)
    model.stem.weight.requires_grad = False
    decay, keep = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    attention = {"conv.attention.fc1.weight", "conv.attention.fc2.weight"}
    if basis_ratio < 1:
        attention.add("conv.attention.fc3.weight")
    assert {names[id(p)] for p in decay["params"]} == attention | {
        "kw_warehouses.conv.cells",
        "head.weight",
    }
    assert decay["weight_decay"] == 0.1
    assert keep["weight_decay"] == 0.0
    listed = [id(p) for group in (decay, keep) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_tied_parameter_is_listed_once() -> None:
    layer = nn.Linear(4, 4)
    decay, keep = parameter_groups(nn.Sequential(layer, layer), 0.1)
    assert len(decay["params"]) == len(keep["params"]) == 1


def test_a_negative_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay -1: at least 0"):
        parameter_groups(nn.Linear(2, 2), -1)
