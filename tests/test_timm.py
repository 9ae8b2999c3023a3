"""A converted model in timm's training: the lines of the README, against a loop without timm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kwlayers

EPOCHS = 3
WARMUP = 20  # as in the README


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    y = torch.randint(10, (4,), generator=generator)
    return list(zip(x.split(2), y.split(2), strict=True))


def lines() -> str:
    """The README's, as they stand there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = next(part for part in readme.split("```python\n")[1:] if "create_optimizer_v2" in part)
    return code.split("```")[0]


def make(timm: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    return kwlayers.convert_(model, kwlayers.plan_model(model, (3, 224, 224), ratio=0.5))


def assert_same(found: nn.Module, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_timms_training_is_that_of_a_plain_loop(timm: ModuleType) -> None:
    torch.manual_seed(0)
    variables: dict[str, Any] = {"loader": batches(), "epochs": EPOCHS}
    exec(compile(lines(), "README.md", "exec"), variables)

    model = make(timm)
    mean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(kwlayers.parameter_groups(model, 0.05), lr=1e-3)
    it = 0
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for x, y in batches():
            it += 1
            kwlayers.set_temperature_(model, 1 - it / (WARMUP * len(batches())))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            for name, tensor in model.state_dict().items():
                if name.endswith("temperature") or not tensor.is_floating_point():
                    mean[name] = tensor.clone()
                else:
                    mean[name] = 0.9998 * mean[name] + 0.0002 * tensor
    assert it == 6
    assert_same(variables["model"], model.state_dict())
    assert_same(variables["ema"].module, mean)
    cells = "kw_warehouses.stage3_conv.cells"
    assert not torch.equal(mean[cells], make(timm).state_dict()[cells])
    assert all(
        float(t) == pytest.approx(1 - 6 / 40) for n, t in mean.items() if n.endswith("temperature")
    )


def test_timms_gradient_checkpointing_changes_no_gradient(timm: ModuleType) -> None:
    x, y = batches()[0]
    found = []
    for recompute in (False, True):
        model = make(timm)
        model.set_grad_checkpointing(recompute)
        nn.functional.cross_entropy(model(x), y).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-7, msg=name)
