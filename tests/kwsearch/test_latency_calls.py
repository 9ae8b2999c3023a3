"""What a step is made of, call by call."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kwlayers
from kwlayers.dynamic import DynamicLayer
from kwlayers.methods import NAMES, find
from kwsearch.latency.calls import MODULE, Call, Spec, calls_of
from kwsearch.networks import planning_model
from tests.zoo import network_for

SIZE = (3, 32, 32)


def converted(name: str, ratio: float, size: tuple[int, ...] = SIZE) -> nn.Module:
    model = planning_model(name, size).to("meta")
    return kwlayers.convert_(model, kwlayers.plan_model(model, size, ratio=ratio))


def by_kind(calls: Counter[Call]) -> Counter[str]:
    found: Counter[str] = Counter()
    for call, count in calls.items():
        found[call.kind] += count
    return found


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def test_functions_are_counted_with_what_their_time_depends_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Residual(), _Residual(), nn.Flatten())
    calls = calls_of(model.to("meta"), 4, (3, 6, 6), training=False)
    kinds = by_kind(calls)
    assert kinds["module"] == 1 + 4 + 2  # the model, its children, and the convolutions within
    assert kinds["conv2d inference"] == 3
    assert kinds["relu inference"] == kinds["__add__ inference"] + kinds["add inference"] == 2
    assert not any(kind in ("sum", "buffer") for kind in kinds)
    # Both residual blocks are alike: one call, twice.
    (same,) = [call for call, count in calls.items() if call.kind[:4] == "conv" and count == 2]
    assert same.key.startswith("conv2d 4x8x4x4 8x8x3x3*' 8*' ")
    assert same.work[0] == 4 * 16 * 8 * 8 * 9  # multiply-adds of an output of 4x4


def test_training_adds_up_gradients_of_what_two_calls_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Residual(), _Residual(), nn.Flatten())
    calls = calls_of(model.to("meta"), 4, (3, 6, 6), training=True)
    # The inputs of both residual blocks; nothing of the images.
    (total,) = [call for call in calls if call.kind == "sum"]
    assert (calls[total], total.work) == (2, (4 * 4 * 8 * 4 * 4,))
    assert by_kind(calls)["cross_entropy training"] == 1


def test_a_value_written_in_place_is_another_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    calls = calls_of(nn.Sequential(model, nn.Flatten()).to("meta"), 2, (3, 6, 6), training=True)
    assert "sum" not in by_kind(calls)


def test_only_what_is_written_over_counts_as_written() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(x.contiguous() + 1).flatten(1)  # contiguous() gives x itself

    calls = calls_of(Net().to("meta"), 2, (3, 6, 6), training=False)
    writes = {call.kind.split()[0]: call.what[3] for call in calls if call.kind != "module"}
    assert writes == {"contiguous": False, "add": False, "relu_": True, "flatten": False}


def test_a_dynamic_layer_is_its_attention_and_its_mixing() -> None:
    plan = kwlayers.plan_model(planning_model("resnet20", SIZE), SIZE, ratio=0.5)
    layers = sum(len(group.layers) for group in plan.groups)
    for training in (False, True):
        calls = calls_of(converted("resnet20", 0.5), 8, SIZE, training)
        kinds = by_kind(calls)
        mode = "training" if training else "inference"
        assert kinds[f"attention {mode}"] == layers
        mixing = [call for call in calls if call.kind.startswith("mixing")]
        assert sum(calls[call] for call in mixing) == layers
        assert {call.cells for call in mixing} == {group.num_cells for group in plan.groups}
        assert kinds["buffer"] == (len(plan.groups) if training else 0)
        # Mixing is n multiply-adds for each weight of each image's kernel: kwlayers.cost.
        total = sum(calls[call] * call.work[0] for call in mixing)
        assert total == 8 * plan.cost().macs.mixing


@pytest.mark.parametrize(
    ("path", "batch", "channels", "side", "kernel", "cell_ratio"),
    [
        ("mix_inputs", 2, (64, 64), 2, 3, (1, 1)),
        ("mix_inputs", 2, (64, 128), 2, 3, (0.5, 0.5)),
        ("mix_outputs", 2, (64, 256), 1, 1, (0.25, 1)),
        ("gemm", 16, (128, 128), 8, 3, (0.5, 0.25)),
        ("published", 2, (32, 32), 16, 3, (0.5, 0.5)),
    ],
)
def test_the_work_of_mixing_is_the_multiply_adds_of_its_path(
    path: str,
    batch: int,
    channels: tuple[int, int],
    side: int,
    kernel: int,
    cell_ratio: tuple[float, float],
) -> None:
    def addbmm(_: Any, one: Any, other: Any, *args: Any, out_shape: Any = None, **how: Any) -> int:
        return 2 * math.prod(one) * other[2]

    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2, bias=False)
    model = nn.Sequential(conv, nn.Flatten())
    size = (channels[0], side, side)
    rule = kwlayers.Rule(["0"], dynamic=True)
    plan = kwlayers.plan_model(
        model, size, ratio=1, cell_ratio=cell_ratio, sharing="layer", rules=rule
    )
    kwlayers.convert_(model, plan)
    x = torch.randn(batch, *size)
    mapping = {torch.ops.aten.addbmm: addbmm}
    with FlopCounterMode(display=False, custom_mapping=mapping) as whole, torch.no_grad():
        model[0](x)
    with FlopCounterMode(display=False) as attention, torch.no_grad():
        model[0].attention(x)
    calls = calls_of(model.to("meta"), batch, size, False)
    (call,) = [one for one in calls if one.kind.startswith("mixing")]
    assert call.kind == f"mixing {path} inference"
    counted = whole.get_total_flops() - attention.get_total_flops()
    assert 2 * (call.work[0] + call.work[1]) == counted


@pytest.mark.parametrize("method", [name for name in NAMES if name != "kernel_warehouse"])
def test_a_layer_of_another_method_is_one_call(method: str) -> None:
    name, size = network_for(method)
    model = planning_model(name, size)
    plan = kwlayers.plan_model(model, size, method=find(method).settings())
    kwlayers.convert_(model.to("meta"), plan)
    layers = [module for module in model.modules() if isinstance(module, DynamicLayer)]
    calls = calls_of(model, 8, size, training=True)
    found = [call for call in calls if call.kind.startswith("layer ")]
    assert sum(calls[call] for call in found) == len(layers) > 0
    # Layers of one shape are one call; every kernel is there.
    assert len(found) < len(layers)
    kernels = {layer.geometry.kernel for layer in layers}
    assert {call.what[0].geometry.kernel for call in found} == kernels
    # What they do inside is no call of its own, but that of static convolutions is.
    inside = {part for layer in layers for part in layer.modules()}
    static = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in inside]
    convs = sum(count for kind, count in by_kind(calls).items() if kind.startswith("conv2d"))
    assert convs == len(static)


def test_a_dy_relu_with_its_gates_is_one_call() -> None:
    name, size = network_for("dymn")
    model = planning_model(name, size).to("meta")
    kinds = by_kind(calls_of(model, 2, size, training=True))
    assert kinds["dy_relu training"] == 15
    assert not any(kind.startswith(("addcmul", "maximum")) for kind in kinds)


def test_tokens_of_a_linear_layer_are_no_calls_of_their_own() -> None:
    """Nor does its input count as read by another call, whose gradient would be added up."""
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Flatten())
    plan = kwlayers.plan_model(model, (5, 12), ratio=1)
    kwlayers.convert_(model.to("meta"), plan)
    kinds = by_kind(calls_of(model, 2, (5, 12), training=True))
    dynamic = sum(len(group.layers) for group in plan.groups)
    assert kinds["attention training"] == dynamic > 0
    names = {kind.split()[0] for kind in kinds}
    assert names == {
        "module",
        "linear",
        "attention",
        "mixing",
        "flatten",
        "buffer",
        "cross_entropy",
    }


def test_padding_of_a_layer_itself_tells_calls_apart() -> None:
    def call(mode: str) -> Call:
        conv = nn.Conv2d(32, 32, 3, padding=1, padding_mode=mode)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), conv, nn.Conv2d(32, 8, 3), nn.Flatten())
        kwlayers.convert_(model.to("meta"), kwlayers.plan_model(model, (3, 9, 9), ratio=1))
        (found,) = [c for c in calls_of(model, 2, (3, 9, 9), False) if c.kind[:6] == "mixing"]
        return found

    assert call("zeros").family != call("reflect").family
    assert call("zeros").work[:3] == call("reflect").work[:3]  # 7x7 positions


def test_cells_are_no_part_of_a_family() -> None:
    found = []
    for ratio in (0.5, 1):
        calls = calls_of(converted("resnet20", ratio), 8, SIZE, False)
        found.append({call.family: call.cells for call in calls if call.cells})
    assert found[0].keys() == found[1].keys()
    assert all(found[0][family] < found[1][family] for family in found[0])


def test_linear_layers_and_signals_have_calls_too() -> None:
    calls = calls_of(converted("deit_tiny", 1, (3, 64, 64)), 2, (3, 64, 64), False)
    assert by_kind(calls)["attention inference"] == 48
    convs = [nn.Conv1d(1, 32, 9), nn.Conv1d(32, 32, 9), nn.Conv1d(32, 8, 9)]
    model = nn.Sequential(*convs, nn.Flatten()).to("meta")
    kwlayers.convert_(model, kwlayers.plan_model(model, (1, 100), ratio=1))
    assert by_kind(calls_of(model, 2, (1, 100), False))["attention inference"] == 1


def test_convolutions_keep_channels_last_as_on_the_device() -> None:
    def strides(device: str) -> list[tuple[int, ...]]:
        model = planning_model("convnext_tiny", SIZE)
        model = model.to_empty(device=device) if device == "cpu" else model.to("meta")
        seen: list[tuple[int, ...]] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, a, out: seen.append(tuple(out.stride())))
        if device == "cpu":
            model.train()(torch.zeros(2, *size))
        else:
            calls_of(model, 2, size, True)
        return seen

    size = (3, 64, 64)  # no map of 1x1, which is in either layout
    assert strides("meta") == strides("cpu")


def test_a_key_shows_layout_dtype_and_gradients() -> None:
    x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert str(Spec.of(x)) == "2x3x4x4/48.1.12.3"
    assert str(Spec.of(nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)))) == "5:bfloat16*'"
    assert str(Spec.of(torch.tensor(3))) == "scalar:int64*"
    assert MODULE.key == "module"


def test_a_step_that_cannot_run_says_why() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)).to("meta")
    with pytest.raises(kwlayers.PlanError, match=r"^a step of 1 images cannot run: Expected more"):
        calls_of(model, 1, (3, 2, 2), True)
