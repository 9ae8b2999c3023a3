"""What training code does with a model, it does with a converted one: every test has a twin
without the wrapper, on the published form's autograd instead of ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from kwlayers import (
    TemperatureSchedule,
    convert_,
    parameter_groups,
    plan_model,
    set_temperature_,
)
from kwlayers.conv import _KWLayer

WORLD = 2
SIZE = (3, 8, 6)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.b(self.a(x).relu())
        return out


class Net(nn.Module):
    """Two blocks whose layers share one warehouse, and a head with one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one = Block(8)
        self.two = Block(8)
        self.head = nn.Linear(8, 5)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (self.one, self.two):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def make(backend: str | None, dtype: torch.dtype = torch.float64) -> Any:
    """Converted, half warm; attention with layer norm, so that samples are apart."""
    torch.manual_seed(0)
    model = Net().double()
    sharing = {"blocks": ["one.*", "two.*"], "head": ["head"]}
    plan = plan_model(model, SIZE, ratio=0.5, sharing=sharing, norm="layer")
    return set_temperature_(convert_(model, plan, backend=backend), 0.5).to(dtype)


def ours(dtype: torch.dtype = torch.float64) -> Any:
    """On a fast path, whose autograd is our own."""
    return make("gemm", dtype)


def plain(dtype: torch.dtype = torch.float64) -> Any:
    """The same on torch's autograd."""
    return make("published", dtype)


def batch(count: int = 2 * WORLD) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *SIZE, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (count,), generator=generator)


def backward(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 2) -> Any:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, *batch())
        optimizer.step()
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return found  # type: ignore[return-value]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


# FSDP2: two processes, each with half of the batch and half of every parameter ----------


def shard_root(model: Any) -> None:
    fully_shard(model)


def shard_blocks(model: Any) -> None:
    for block in (model.one, model.two):
        fully_shard(block)
    fully_shard(model)


def shard_layers(model: Any) -> None:
    for module in list(model.modules()):
        if isinstance(module, _KWLayer):
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)


def shard_users_with_their_warehouse(model: Any) -> None:
    fully_shard([model.kw_warehouses["blocks"], model.one, model.two])
    fully_shard(model)


def shard_recomputed_blocks(model: Any) -> None:
    model.recompute = True
    shard_blocks(model)


SHARDINGS: dict[str, Callable[[Any], None]] = {
    "root": shard_root,
    "blocks": shard_blocks,
    "layers": shard_layers,
    "users with their warehouse": shard_users_with_their_warehouse,
    "recomputed blocks": shard_recomputed_blocks,
}


def gathered(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def sharded_work(rank: int, folder: str) -> None:
    """One of the processes; saves what came of each sharding."""
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    x, y = (part.chunk(WORLD)[rank] for part in batch())
    results: dict[str, Any] = {}
    for name, shard in SHARDINGS.items():
        model = ours()
        shard(model)
        optimizer = sgd(model)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        kept = sum(p.to_local().numel() for p in model.parameters())
        results[name] = (
            gathered(gradients(model)),
            gathered(model.state_dict()),
            norm.full_tensor(),
            kept,
        )

    alone = ours()
    fully_shard(alone.kw_warehouses["blocks"])
    fully_shard(alone)
    try:
        alone(x)
    except ValueError as error:
        results["warehouse alone"] = str(error)

    with torch.device("meta"):
        empty = ours()
    shard_blocks(empty)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*empty.parameters(), *empty.buffers()]:
            tensor.fill_(-77)
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    results["from meta"] = gathered(empty.state_dict())

    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the processes found; a process that fails ends the others and this fixture."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(sharded_work, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_sharded_model_trains_as_one_process_with_the_whole_batch(
    name: str, sharded: Any
) -> None:
    model = plain()
    train(model, sgd(model))
    grads, state, norm, kept = sharded[name]
    assert float(gradients(model)["kw_warehouses.blocks.cells"].abs().max()) > 1e-3
    assert_same(grads, gradients(model))
    assert_same(state, model.state_dict())
    squares = sum(float(grad.square().sum()) for grad in gradients(model).values())
    assert float(norm) == pytest.approx(math.sqrt(squares), rel=1e-12)
    # Halves, the first process's rounded up.
    total = sum(p.numel() for p in model.parameters())
    assert total / 2 <= kept < 0.55 * total
    assert plain().load_state_dict(state) == ([], [])


def test_a_warehouse_sharded_by_itself_is_refused_with_what_to_do(sharded: Any) -> None:
    assert sharded["warehouse alone"].startswith(
        "the cells are a DTensor and x is not: the warehouse was sharded by itself, and nothing "
        "gathers it; give fully_shard the model that holds the warehouses"
    )


def test_a_sharded_model_made_on_meta_is_filled_by_reset_parameters(sharded: Any) -> None:
    state = sharded["from meta"]
    expected = ours().state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.shape == expected[name].shape, name
        assert not (tensor == -77).any(), name
    # 18 cells of 8x8x1x1 as one kernel: fan out 18 * 8; 1,152 draws, three standard errors.
    spread = float(state["kw_warehouses.blocks.cells"].std())
    assert spread == pytest.approx(math.sqrt(2 / (18 * 8)), rel=3 / math.sqrt(2 * 1152))


# Copies and files ----------------------------------------------------------------------


def averaged(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The moving average of parameters by hand, and the last of what is not averaged."""
    names = dict(plain().named_parameters())
    mean = dict(states[0])
    for state in states[1:]:
        for name, tensor in state.items():
            mean[name] = decay * mean[name] + (1 - decay) * tensor if name in names else tensor
    return mean


def states_of(model: Any, update: Callable[[], None]) -> list[dict[str, Tensor]]:
    """Four steps of training, `update` after each: the states that it saw."""
    optimizer, seen = sgd(model), []
    for _ in range(4):
        train(model, optimizer, steps=1)
        update()
        seen.append(copy.deepcopy(model.state_dict()))
    return seen


def check_average(model: Any, copied: Any, expected: dict[str, Tensor]) -> None:
    """The copy has this state, and computes with it."""
    for name, layer in copied.named_modules():
        if isinstance(layer, _KWLayer):
            assert any(layer.warehouse is w for w in copied.kw_warehouses.values())
            assert layer.warehouse is not model.get_submodule(name).warehouse
    assert_same(copied.state_dict(), expected)
    fresh = plain()
    fresh.load_state_dict(expected)
    x, _ = batch()
    found = copied.eval()(x)
    torch.testing.assert_close(found, fresh.eval()(x), rtol=0, atol=1e-12)
    assert (found - model.eval()(x)).abs().max() > 1e-4


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
def test_a_moving_average_mixes_from_its_own_cells(use_buffers: bool) -> None:
    model = ours()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    states = states_of(model, lambda: ema.update_parameters(model))
    check_average(model, ema.module, averaged(states, 0.5))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_timms_moving_average_mixes_from_its_own_cells(timm: ModuleType) -> None:
    from timm.utils import ModelEmaV3

    model = ours()
    start = copy.deepcopy(model.state_dict())
    ema = ModelEmaV3(model, decay=0.5)
    states = states_of(model, lambda: ema.update(model))
    check_average(model, ema.module, averaged([start, *states], 0.5))


def test_safetensors_stores_each_tensor_once_and_gives_it_back(tmp_path: Path) -> None:
    reason = "safetensors is not installed"
    store: Any = pytest.importorskip("safetensors.torch", reason=reason)
    model = train(*(lambda m: (m, sgd(m)))(ours()))
    store.save_file(model.state_dict(), tmp_path / "state.safetensors")
    store.save_model(model, str(tmp_path / "model.safetensors"))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("state", "model"):
        path = tmp_path / f"{name}.safetensors"
        assert_same(store.load_file(path), expected, atol=0)
        fresh = ours()
        assert store.load_model(fresh, str(path)) == (set(), [])
        assert_same(fresh.state_dict(), expected, atol=0)


# Steps of training ---------------------------------------------------------------------

LR, DECAY = 0.05, 0.1


def by_sgd(p: Tensor, grad: Tensor, decay: float) -> Tensor:
    return p - LR * (grad + decay * p)


def by_adamw(p: Tensor, grad: Tensor, decay: float) -> Tensor:
    """The first step: both moments, corrected, are the gradient and its square."""
    return p * (1 - LR * decay) - LR * grad / (grad.abs() + 1e-8)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_an_optimizer_with_groups_makes_its_step(kind: str, how: dict[str, bool]) -> None:
    model, twin = ours(), plain()
    backward(twin, *batch())
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer = getattr(torch.optim, kind)(parameter_groups(model, DECAY), lr=LR, **how)
    train(model, optimizer, steps=1)
    rule = by_sgd if kind == "SGD" else by_adamw
    expected = {
        name: rule(p, gradients(twin)[name], DECAY if p.dim() > 1 else 0.0)
        for name, p in before.items()
    }
    # AdamW divides a gradient by its size: where that is near the rounding error, by noise.
    clear = {name: gradients(twin)[name].abs() > 1e-9 for name in expected}
    for name, found in model.named_parameters():
        got, wanted = found.detach()[clear[name]], expected[name][clear[name]]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9, msg=name)
    assert sum(int(mask.sum()) for mask in clear.values()) > 1000


def test_the_norm_that_gradients_are_clipped_by_counts_cells_once() -> None:
    model, twin = ours(), plain()
    for one in (model, twin):
        backward(one, *batch())
    squares = sum(float(grad.square().sum()) for grad in gradients(twin).values())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(norm) == pytest.approx(math.sqrt(squares), rel=1e-12)
    scale = 0.01 / (math.sqrt(squares) + 1e-6)
    assert scale < 0.5
    assert_same(gradients(model), {n: g * scale for n, g in gradients(twin).items()})


def autocast_gradients(model: Any) -> dict[str, Tensor]:
    x, y = batch(16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x.float()), y)
    loss.backward()
    return gradients(model)


def test_autocast_costs_gradients_no_more_than_it_does_by_the_definition() -> None:
    exact = plain()
    backward(exact, *batch(16))
    errors = []
    for backend in ("gemm", "reference"):
        found = autocast_gradients(make(backend, torch.float32))
        assert {grad.dtype for grad in found.values()} == {torch.float32}
        differences = [(found[n].double() - g).flatten() for n, g in gradients(exact).items()]
        errors.append(float(torch.cat(differences).norm()))
    size = float(torch.cat([g.flatten() for g in gradients(exact).values()]).norm())
    # bfloat16 rounds to 8 bits; other roundings in another order, the same in size.
    assert 2**-9 * size < errors[0] < 2 * errors[1] < 2**-3 * size


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
def test_recomputing_blocks_that_share_a_warehouse_changes_no_gradient(autocast: bool) -> None:
    models = [ours(torch.float32 if autocast else torch.float64) for _ in range(2)]
    models[0].recompute = True
    if autocast:
        found, expected = (autocast_gradients(model) for model in models)
        assert_same(found, expected, atol=1e-6)
    else:
        for model in (models[0], twin := plain()):
            backward(model, *batch())
        assert_same(gradients(models[0]), gradients(twin))


def test_channels_last_trains_to_the_same_parameters() -> None:
    twin = plain()
    train(twin, sgd(twin))
    model = ours().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    x, y = batch()
    last = x.to(memory_format=torch.channels_last)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, last, y)
        optimizer.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.slow  # compiles
def test_a_compiled_model_trains_through_the_warm_up_without_compiling_again() -> None:
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    model, twin = ours(), plain()
    for one in (model, twin):
        run = torch.compile(one, fullgraph=True, backend="aot_eager") if one is model else one
        schedule, optimizer = TemperatureSchedule(one, 1, 4), sgd(one)
        for _ in range(5):
            schedule.step()
            train(run, optimizer, steps=1)
        assert schedule.temperature == 0
    assert counts["unique_graphs"] == 1
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
