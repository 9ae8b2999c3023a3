"""Peak memory of a step, counted without running it, against steps that ran."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kwlayers
from kwlayers.methods import find
from kwlayers.ops.workspace import Workspace
from kwsearch.memory import MOST_IMAGES, Memory, Step, largest_batch, memory_of
from kwsearch.networks import build_model, planning_model
from kwsearch.timing import peak_bytes
from tests.zoo import IMAGES

pytestmark = pytest.mark.usefixtures("one_thread")


def plan_of(name: str, size: tuple[int, ...], ratio: float | str | None) -> kwlayers.Plan | None:
    """ratio: of KernelWarehouse, or another method by its name, as published."""
    if ratio is None:
        return None
    if isinstance(ratio, str):
        settings = find(ratio).settings()
        return kwlayers.plan_model(planning_model(name, size), size, method=settings)
    return kwlayers.plan_model(planning_model(name, size), size, ratio=ratio)


def counted(name: str, size: tuple[int, ...], ratio: float | str | None, step: Step) -> Memory:
    return memory_of(partial(planning_model, name, size), plan_of(name, size, ratio), size, step)


def measured(name: str, size: tuple[int, ...], ratio: float | str | None, step: Step) -> int:
    """What the profiler sees in the second step, and what was there before."""
    from kwsearch import memory

    model = build_model(name, size)
    if step.checkpointing:
        memory._checkpoint_(model)
    plan = plan_of(name, size, ratio)
    if plan is not None:
        kwlayers.convert_(model, plan)
    layout = torch.channels_last if step.channels_last else torch.contiguous_format
    model.to(memory_format=layout).train(step.training)  # type: ignore[call-overload]
    x = torch.randn(step.batch, *size).to(memory_format=layout)
    y = torch.zeros(step.batch, dtype=torch.long)
    settings: dict[str, Any] = (
        {"momentum": 0.9, "nesterov": True} if step.optimizer == "sgd" else {}
    )
    kind = torch.optim.SGD if step.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-6, weight_decay=0.1, **settings)
    autocast = torch.autocast("cpu", getattr(torch, step.dtype), step.dtype != "float32")

    def run() -> None:
        if not step.training:
            with torch.no_grad(), autocast:
                model(x)
            return
        with autocast:
            loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    Workspace.clear()
    run()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    state = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
    held = [*model.parameters(), *model.buffers(), *state, *Workspace.kept(), x, y]
    peak = peak_bytes(run)
    Workspace.clear()
    return sum(t.nbytes for t in held) + peak


def check(name: str, side: int, ratio: float | None, step: Step, within: float) -> None:
    size = (3, side, side)
    memory = counted(name, size, ratio, step)
    assert memory.total == pytest.approx(measured(name, size, ratio, step), rel=within)
    assert min(vars(memory).values()) >= 0
    weights = sum(t.nbytes for t in planning_model(name, size).state_dict().values())
    assert ratio is not None or memory.weights == weights


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "side", "ratio"),
    [
        ("resnet20", 32, None),
        ("resnet20", 32, 0.5),
        ("mobilenetv2_050", 32, 1),
        pytest.param("deit_tiny", 32, 1, marks=pytest.mark.slow),
        pytest.param("resnet18", 32, 1, marks=pytest.mark.slow),
    ],
)
def test_it_is_what_the_profiler_sees(
    name: str, side: int, ratio: float | None, training: bool
) -> None:
    check(name, side, ratio, Step(3, training), within=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("ratio", [None, 0.5, 1, 2])
@pytest.mark.parametrize("name", IMAGES)
def test_it_is_what_the_profiler_sees_of_every_model(
    name: str, ratio: float | None, training: bool, batch: int
) -> None:
    check(name, 64, ratio, Step(batch, training), within=0.05)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("mn04", None),
        pytest.param("dymn04", None, marks=pytest.mark.slow),
        pytest.param("dymn04", 1, marks=pytest.mark.slow),
        ("dymn04", "dymn"),
    ],
)
def test_so_it_is_of_networks_for_sound(
    name: str, ratio: float | str | None, training: bool
) -> None:
    size, step = (1, 64, 100), Step(4, training)
    assert counted(name, size, ratio, step).total == pytest.approx(
        measured(name, size, ratio, step), rel=0.05
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        pytest.param({"channels_last": True}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16", "training": False}, marks=pytest.mark.slow),
        {"checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", [1])
def test_so_it_is_in_other_circumstances(ratio: float | None, settings: dict[str, Any]) -> None:
    # What oneDNN takes for itself in bfloat16 is another CPU's choice.
    within = 0.05 if "dtype" in settings else 0.02
    check("resnet20", 32, ratio, Step(8, **settings), within=within)


def two_layers() -> nn.Module:
    layers = nn.Linear(1000, 2000, bias=False), nn.ReLU(), nn.Linear(2000, 10, bias=False)
    return nn.Sequential(*layers)


def test_two_layers_take_what_can_be_added_up_by_hand() -> None:
    weights, images = 4 * (2_000_000 + 20_000), 4 * 100 * 1000 + 8 * 100
    hidden = 4 * 100 * 2000
    memory = memory_of(two_layers, None, (1000,), Step(100, training=False))
    assert (memory.weights, memory.images) == (weights, images)
    assert memory.total == weights + images + 2 * hidden  # before and after the ReLU

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    memory = memory_of(two_layers, None, (1000,), Step(100), plain)
    # When the first weight has its gradient: both gradients, and that of the hidden layer.
    assert memory.gradients == weights
    assert memory.total == pytest.approx(2 * weights + images + hidden, abs=100)
    momentum = memory_of(two_layers, None, (1000,), Step(100))
    assert momentum.optimizer == weights
    # A step of SGD with weight decay and Nesterov's momentum holds two copies of a gradient.
    assert momentum.total == pytest.approx(3 * weights + images + 2 * 4 * 2_000_000, abs=100)


def test_kernels_of_samples_are_kept_where_the_published_form_is_taken() -> None:
    # resnet20 at 32 px takes the published form everywhere: for every image and layer its kernel,
    # in two layouts that backward needs, and the attention before and after its norm.
    size = (3, 32, 32)
    plan = plan_of("resnet20", size, 1)
    assert plan is not None
    kernels = sum(
        4 * s.out_channels * s.in_channels * 9 if s.kernel_size == (3, 3) else 0
        for group in plan.groups
        for s in (plan.network[name] for name in group.layers)
    )
    first, second = (counted("resnet20", size, 1, Step(batch)).mixing for batch in (4, 8))
    assert (second - first) / 4 > kernels


@pytest.mark.slow
def test_checkpointing_and_autocast_need_less() -> None:
    size = (3, 32, 32)
    usual = counted("resnet20", size, 1, Step(32))
    checkpointed = counted("resnet20", size, 1, Step(32, checkpointing=True))
    narrow = counted("resnet20", size, 1, Step(32, dtype="bfloat16"))
    assert checkpointed.total < usual.total
    assert narrow.activations < usual.activations
    assert narrow.weights == usual.weights


def test_a_gpu_is_stood_for_where_there_is_none() -> None:
    size = (3, 32, 32)
    for dtype in ("float32", "bfloat16"):
        memory = counted("resnet20", size, 1, Step(16, device="cuda", dtype=dtype))
        assert memory.workspace == 0  # torch's allocator keeps it there
        assert memory.total > memory.weights + memory.optimizer
    assert not Workspace.kept()


def test_a_batch_that_norms_cannot_train_on_is_refused() -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))

    with pytest.raises(kwlayers.PlanError, match=r"^a step of 1 images cannot run: Expected more"):
        memory_of(make_model, None, (3, 2, 2), Step(1))


@pytest.mark.parametrize("limit", [0, 999, 1000, 1699, 1700, 123_456, 10**9])
def test_the_largest_batch_is_the_last_that_fits(limit: int) -> None:
    asked = []

    def total(batch: int) -> int:
        asked.append(batch)
        return 300 + 700 * batch if batch < 20 else 500 + 690 * batch

    most = max((b for b in range(1, MOST_IMAGES + 1) if total(b) <= limit), default=0)
    asked.clear()
    assert largest_batch(total, limit) == most
    assert len(asked) <= 8


def test_the_largest_batch_ends_where_memory_hardly_grows() -> None:
    assert largest_batch(lambda batch: 100, 99) == 0
    assert largest_batch(lambda batch: 100, 100) == MOST_IMAGES
    assert largest_batch(lambda batch: 2**batch if batch < 64 else 2**64, 2**40) == 40


@pytest.mark.parametrize(("method", "own"), [("condconv", {"num_kernels": 1}), ("kernel_dna", {})])
def test_checkpointed_blocks_are_called_with_their_hooks(method: str, own: dict[str, int]) -> None:
    """And so are the blocks that a method adds."""
    size = (3, 64, 64)
    network = partial(planning_model, "resnet18", size)
    plan = kwlayers.plan_model(network(), size, method=find(method).settings(**own))
    usual, checkpointed = (
        memory_of(network, plan, size, Step(64, checkpointing=again)) for again in (False, True)
    )
    assert checkpointed.total < usual.total
    assert checkpointed.weights == usual.weights
