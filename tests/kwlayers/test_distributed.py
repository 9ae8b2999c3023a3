"""Two processes with half a batch each compute the gradients of one with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kwlayers import convert_, plan_model, set_temperature_

WORLD = 2


def make(basis_ratio: float) -> Any:
    """Converted, float64, half warm; attention with layer norm, so that samples are apart."""
    torch.manual_seed(0)
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
    return set_temperature_(convert_(model, plan), 0.5)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * WORLD, 3, 8, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (2 * WORLD,), generator=generator)


def work(rank: int, folder: str, basis_ratio: float) -> None:
    """One of the processes: a step on its half; saves gradients and stepped parameters."""
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    model = make(basis_ratio)
    if rank:  # The first process's parameters and buffers must win.
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.zero_()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    x, y = (part.chunk(WORLD)[rank] for part in batch())
    nn.functional.cross_entropy(wrapped(x), y).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    torch.save((grads, model.state_dict()), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "basis_ratio",
    [pytest.param(1.0, id="no basis", marks=pytest.mark.slow), pytest.param(0.25, id="basis")],
)
def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(
    tmp_path: Path, basis_ratio: float
) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path), basis_ratio), nprocs=WORLD)
    results = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]

    model = make(basis_ratio)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    assert float(expected["kw_warehouses.group0.cells"].abs().max()) > 1e-3
    for grads, state in results:
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-10, msg=name)
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-10, msg=name)
