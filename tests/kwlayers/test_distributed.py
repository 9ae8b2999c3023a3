"""Two processes with half a batch each compute the gradients of one with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kwlayers import convert_, plan_model, set_temperature_
from kwlayers.methods.pad_net_partition import deploy_, partition_
from tests.kwlayers.methods.reference import converted, settings, small

WORLD = 2
# CondConv's routers are in hooks of their blocks. PAD-Net has masks, and an order once deployed.
NAMES = ("no basis", "basis", "condconv", "pad_net", "deployed")


def make(name: str) -> Any:
    """Converted, float64, half warm; no norm sees a batch, so that samples are apart."""
    torch.manual_seed(0)
    if "basis" in name:
        return set_temperature_(warehouses(1.0 if name == "no basis" else 0.25), 0.5)
    method = "condconv" if name == "condconv" else "pad_net"
    model = set_temperature_(converted(small(), settings(method)).eval(), 0.5)
    if method == "pad_net":
        partition_(model, scores="magnitude")
    if name == "deployed":
        deploy_(model)
    return model


def warehouses(basis_ratio: float) -> nn.Module:
    """Attention with layer norm."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()
    plan = plan_model(
        model, (3, 8, 6), ratio=0.5, sharing=[["2", "4"]], basis_ratio=basis_ratio, norm="layer"
    )
    return convert_(model, plan)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * WORLD, 3, 8, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (2 * WORLD,), generator=generator)


def work(rank: int, folder: str) -> None:
    """One of the processes: a step on its half; saves gradients and stepped parameters."""
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for name in NAMES:
        model = make(name)
        if rank:  # The first process's parameters and buffers must win.
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor.zero_()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        x, y = (part.chunk(WORLD)[rank] for part in batch())
        nn.functional.cross_entropy(wrapped(x), y).backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        optimizer.step()
        torch.save((grads, model.state_dict()), Path(folder) / f"{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the results of all processes: starting them takes the time."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(
    name: str, folder: Path
) -> None:
    results = [torch.load(folder / f"{name}{r}.pt", weights_only=True) for r in range(WORLD)]

    model = make(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    optimizer.step()
    kernels = [grad for key, grad in expected.items() if key.endswith(("cells", "kernels"))]
    assert kernels
    assert all(float(grad.abs().max()) > 1e-4 for grad in kernels)
    for grads, state in results:
        assert grads.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-10, msg=key)
        assert state.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-10, msg=key)
