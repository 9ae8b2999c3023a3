"""`convert_` changes what the plan says, once, and nothing else; or it changes nothing."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    Network,
    Plan,
    PlanError,
    Warehouse,
    convert_,
    plan_model,
    set_temperature_,
)
from kwlayers.conv import _KWLayer
from kwsearch import zoo


class Block(nn.Module):
    def __init__(self, width: int, conv2: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = conv2 or nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.norm(self.conv1(x)).relu())
        return out


class Net(nn.Module):
    """Images (3, 8, 6). Two blocks, a grouped and a strided convolution, biases here and there."""

    def __init__(self, classes: int = 5, groups: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.down = nn.Conv2d(8, 16, 2, stride=2, groups=groups, bias=bias)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.blocks(self.stem(x).relu()))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def shared_net() -> Net:
    """Both blocks hold one and the same conv2."""
    net = Net()
    net.blocks[1].conv2 = net.blocks[0].conv2
    return net


def signal_net() -> nn.Module:
    last = nn.Conv1d(8, 8, 4, stride=2, padding=3, dilation=2, padding_mode="reflect")
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), last, nn.Flatten(), nn.Linear(40, 3))


def volume_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 8, 2), nn.Flatten(), nn.Linear(8, 3)
    )


def token_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 8))


def depthwise_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.Conv2d(12, 12, 3, groups=12, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 24, 1),
        nn.Conv2d(24, 24, 3, groups=24),
    )


IMAGE = (3, 8, 6)
Builder = Callable[[], nn.Module]
MODELS: dict[str, tuple[Builder, tuple[int, ...], dict[str, Any]]] = {
    "net, one cell per mixture": (Net, IMAGE, {"sharing": "layer", "ratio": 1}),
    "net, few cells": (Net, IMAGE, {"sharing": "layer", "ratio": 0.3}),
    "net, shared": (Net, IMAGE, {"sharing": {"b": ["blocks.*"], "d": ["down"]}, "ratio": 2}),
    "net, basis": (Net, IMAGE, {"sharing": [["blocks.*"]], "ratio": 1, "basis_ratio": 0.25}),
    "net, layer norm": (Net, IMAGE, {"sharing": "layer", "ratio": 1, "norm": "layer"}),
    "net, whole kernels": (
        Net,
        IMAGE,
        {"sharing": "layer", "ratio": 1, "spatial_partition": False},
    ),
    "net, solved": (Net, IMAGE, {"sharing": [["blocks.*"]], "params": 6000}),
    "net, solved with basis": (
        Net,
        IMAGE,
        {"sharing": [["blocks.*"]], "params": 9000, "basis_ratio": 0.25},
    ),
    "one layer under two parents": (shared_net, IMAGE, {"sharing": [["blocks.*"]], "ratio": 1}),
    "1-D": (signal_net, (2, 12), {"sharing": "layer", "ratio": 1}),
    "3-D": (volume_net, (1, 4, 4, 4), {"sharing": "layer", "ratio": 0.5}),
    "linear": (token_net, (7, 8), {"sharing": "layer", "ratio": 1, "cell_ratio": (0.5, 0.25)}),
    "depthwise": (depthwise_net, (3, 5, 5), {"sharing": [["1", "4"], ["3"]], "ratio": 1}),
    "resnet20": (lambda: zoo.create("resnet20"), (3, 32, 32), {"ratio": 0.5}),
    "resnet20, solved": (lambda: zoo.create("resnet20"), (3, 32, 32), {"params": 400_000}),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net_plan(model: nn.Module, **settings: Any) -> Plan:
    settings = {"sharing": {"b": ["blocks.*"], "d": ["down"]}, "ratio": 1} | settings
    return plan_model(model, IMAGE, **settings)


def converted(model: nn.Module | None = None, **settings: Any) -> Any:
    model = model or Net()
    return convert_(model, net_plan(model, **settings))


def kw_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _KWLayer)}


# What is built -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_has_the_planned_parameters_layers_and_warehouses(name: str) -> None:
    build, size, settings = MODELS[name]
    model = build()
    plan = plan_model(model, size, **settings)
    static = {name: m for name, m in model.named_modules() if plan_group(plan, name)}
    before = dict(model.named_parameters())
    assert convert_(model, plan) is model

    assert sum(p.numel() for p in model.parameters()) == plan.cost().params.total
    by_warehouse = sum(p.numel() for p in model.kw_warehouses.parameters())
    by_attention = sum(
        p.numel() for layer in kw_layers(model).values() for p in layer.attention.parameters()
    )
    kept = sum(p.numel() for p in model.parameters() if any(p is q for q in before.values()))
    assert by_warehouse == plan.cost().params.warehouses
    assert by_attention == plan.cost().params.attention
    assert kept == plan.cost().params.unchanged

    assert list(kw_layers(model)) == list(static)
    for layer_name, layer in kw_layers(model).items():
        group = plan_group(plan, layer_name)
        assert layer.warehouse is model.kw_warehouses[group.name]
        assert layer.extra_repr() == static[layer_name].extra_repr()
    x = torch.randn(3, *size)
    out = model(x)
    assert out.shape == build()(x).shape
    assert out.isfinite().all()


def plan_group(plan: Plan, layer: str) -> Any:
    return next((group for group in plan.groups if layer in group.layers), None)


@pytest.mark.parametrize("name", MODELS)
def test_each_warehouse_is_registered_once_at_the_root(name: str) -> None:
    build, size, settings = MODELS[name]
    model = build()
    plan = plan_model(model, size, **settings)
    convert_(model, plan)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    cells = [name for name in names if name.endswith("cells")]
    assert cells == [f"kw_warehouses.{group.name}.cells" for group in plan.groups]
    assert sum(isinstance(m, Warehouse) for m in model.modules()) == len(plan.groups)
    for group in plan.groups:
        expected = (group.num_cells, *group.cell)
        assert tuple(model.kw_warehouses[group.name].cells.shape) == expected


def test_the_layers_become_their_kernel_warehouse_kinds() -> None:
    kinds = {
        "1-D": KWConv1d,
        "net, shared": KWConv2d,
        "3-D": KWConv3d,
        "linear": KWLinear,
    }
    for name, kind in kinds.items():
        build, size, settings = MODELS[name]
        model = build()
        convert_(model, plan_model(model, size, **settings))
        assert kw_layers(model)
        assert all(type(layer) is kind for layer in kw_layers(model).values())


def test_at_temperature_one_each_layer_uses_its_own_cells_in_module_order() -> None:
    model = converted()
    dealt = [layer.attention.assignment.tolist() for layer in kw_layers(model).values()]
    assert list(kw_layers(model))[:4] == [f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    # Cells are 8x8x1x1: nine in a 3x3 kernel, one in a 1x1.
    assert dealt[:4] == [list(range(9)), [9], list(range(10, 19)), [19]]


def test_with_half_the_cells_they_are_dealt_by_the_published_rule() -> None:
    # Mixture i gets the next cell when i % 2 == (i // 2) % 2, otherwise the zero cell (2 of 2).
    model = converted(sharing=[["down"]], ratio=0.5)
    assert model.down.attention.assignment.tolist() == [0, 2, 2, 1]


def test_a_layer_under_two_parents_stays_one_layer() -> None:
    model = shared_net()
    convert_(model, net_plan(model))
    assert isinstance(model.blocks[0].conv2, KWConv2d)
    assert model.blocks[0].conv2 is model.blocks[1].conv2
    assert model.blocks[0].conv1 is not model.blocks[1].conv1


def test_bias_parameters_are_kept_and_every_other_module_too() -> None:
    model = Net()
    biases = {name: m.bias for name, m in model.named_modules() if hasattr(m, "bias")}
    others = {name: m for name, m in model.named_modules() if not isinstance(m, nn.Conv2d)}
    stem = model.stem
    converted(model)
    for name, bias in biases.items():
        assert model.get_submodule(name).bias is bias
    for name, module in others.items():
        assert model.get_submodule(name) is module
    assert model.stem is stem
    assert biases["down"] is not None
    assert biases["blocks.0.conv1"] is None


def test_every_layer_keeps_its_mode() -> None:
    model = Net()
    model.blocks.eval()
    converted(model)
    assert [layer.training for layer in kw_layers(model).values()] == [False] * 4 + [True]
    assert not model.blocks[0].conv1.attention.norm.training
    assert model.down.attention.norm.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = converted(Net().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, *IMAGE, dtype=dtype)).dtype == dtype


def test_a_model_on_meta_is_converted_there_and_loads_a_real_state() -> None:
    with torch.device("meta"):
        model = Net()
    plan = net_plan(model)
    convert_(model, plan)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"meta"}
    real = convert_(Net(), plan).eval()
    set_temperature_(real, 0.5)
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(model.eval()(x), real(x))


def test_a_root_that_is_a_sequential_still_runs() -> None:
    model = token_net()
    convert_(model, plan_model(model, (7, 8), sharing="layer", ratio=1))
    assert isinstance(model[2], KWLinear)
    x = torch.randn(2, 7, 8)
    by_hand = model[3](model[2](model[1](model[0](x))))
    assert torch.equal(model(x), by_hand)
    assert model.kw_warehouses(x) is x


def test_warehouses_print_what_was_changed() -> None:
    model = converted()
    text = repr(model.kw_warehouses)
    assert text.startswith("Warehouses(\n  5 layers share 2 warehouses\n")
    assert "(b): Warehouse(num_cells=20, cell=(8, 8, 1, 1), num_mixtures=20)" in text
    assert "(d): Warehouse(num_cells=4, cell=(16, 4, 1, 1), num_mixtures=4)" in text
    assert model.kw_warehouses.layers == {
        "b": ("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"),
        "d": ("down",),
    }


def test_one_layer_in_one_warehouse_prints_as_one() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    convert_(model, plan_model(model, (8, 4, 4), ratio=1, sharing=[["0"]]))
    assert repr(model.kw_warehouses).startswith("Warehouses(\n  1 layer shares 1 warehouse\n")


# What is refused ---------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a refusal must leave as it was."""
    modules = [(name, m, sorted(m.__dict__)) for name, m in model.named_modules()]
    tensors = [(name, t, t._version) for name, t in model.state_dict(keep_vars=True).items()]
    return [[(n, id(m), keys) for n, m, keys in modules], [(n, id(t), v) for n, t, v in tensors]]


def refuse(model: nn.Module, plan: Plan, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(PlanError, match=re.escape(message)):
        convert_(model, plan)
    assert snapshot(model) == before


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_converted_model_is_refused() -> None:
    model = Net()
    plan = net_plan(model)
    convert_(model, plan)
    refuse(model, plan, "the model is already converted: it has dynamic layers")
    with pytest.raises(PlanError, match="the model is already converted: it has dynamic layers"):
        net_plan(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model: expected an nn.Module, got NoneType"),
        (Net, "model: expected an nn.Module, got the class Net"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        convert_(model, net_plan(Net()))
    assert str(error.value) == message


def test_a_model_with_one_hand_made_layer_counts_as_converted() -> None:
    model = Net()
    plan = net_plan(model)
    model.blocks[0].cells = Warehouse(4, (8, 8, 1, 1))
    refuse(model, plan, "the model is already converted: it has dynamic layers")


@pytest.mark.usefixtures("process_group")
def test_a_model_wrapped_for_distributed_training_is_refused() -> None:
    wrapped = nn.parallel.DistributedDataParallel(Net())
    message = "the model is wrapped in DistributedDataParallel: plan and convert it before wrapping"
    refuse(wrapped, net_plan(Net()), message)
    with pytest.raises(PlanError, match=message):
        net_plan(wrapped)


def test_a_model_wrapped_in_data_parallel_is_refused() -> None:
    message = "the model is wrapped in DataParallel: plan and convert it before wrapping"
    refuse(nn.DataParallel(Net()), net_plan(Net()), message)


def test_a_compiled_model_is_refused() -> None:
    model = torch.compile(Net(), backend="eager")
    assert isinstance(model, nn.Module)
    message = "the model is wrapped in OptimizedModule: plan and convert it before wrapping"
    refuse(model, net_plan(Net()), message)


def test_a_plan_without_groups_is_refused() -> None:
    plan = replace(net_plan(Net()), groups=())
    refuse(Net(), plan, "the plan has no groups: nothing to convert")


def test_a_model_with_an_attribute_of_our_name_is_refused() -> None:
    model = Net()
    model.kw_warehouses = 3
    refuse(model, net_plan(model), "the model has an attribute 'kw_warehouses' already")


def test_a_model_without_a_planned_layer_is_refused() -> None:
    model = Net()
    del model.blocks[1]
    message = "the model has no layer 'blocks.1.conv1': was the plan made for it?"
    refuse(model, net_plan(Net()), message)


def test_a_layer_of_another_kind_is_refused() -> None:
    model = Net()
    model.down = nn.Linear(8, 16)
    refuse(model, net_plan(Net()), "down: planned as conv2d, but the model has Linear")


def test_a_subclass_of_a_layer_is_refused() -> None:
    class Scaled(nn.Conv2d):
        pass

    model = Net()
    model.down = Scaled(8, 16, 2, stride=2, groups=2)
    refuse(model, net_plan(Net()), "down: planned as conv2d, but the model has Scaled")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Conv2d(8, 16, 3, groups=2),
            "down: planned for a kernel (16, 4, 2, 2) in 2 groups with bias=True, but the model "
            "has (16, 4, 3, 3) in 2 groups with bias=True: plan again for this model",
        ),
        (
            nn.Conv2d(8, 16, 2, groups=2, bias=False),
            "down: planned for a kernel (16, 4, 2, 2) in 2 groups with bias=True, but the model "
            "has (16, 4, 2, 2) in 2 groups with bias=False: plan again for this model",
        ),
        (
            nn.Conv2d(4, 16, 2),
            "down: planned for a kernel (16, 4, 2, 2) in 2 groups with bias=True, but the model "
            "has (16, 4, 2, 2) in 1 group with bias=True: plan again for this model",
        ),
    ],
    ids=["kernel", "bias", "groups"],
)
def test_a_layer_of_another_shape_is_refused(layer: nn.Module, message: str) -> None:
    model = Net()
    model.down = layer
    refuse(model, net_plan(Net()), message)


def test_a_model_that_differs_elsewhere_is_refused() -> None:
    # By hand: stem 224, blocks 2 * (576 + 16 + 72), down 272, head 16 * 5 + 5 or 16 * 12 + 12.
    message = (
        "the plan was made for a model of 1,909 parameters, this one has 2,028: "
        "plan again for this model"
    )
    refuse(Net(classes=12), net_plan(Net()), message)


def test_a_convolution_as_the_model_itself_is_refused() -> None:
    model = nn.Conv2d(8, 8, 1)
    with pytest.raises(PlanError) as info:
        plan_model(model, (8, 4, 4), ratio=1, sharing="layer")
    assert str(info.value) == (
        "no layer can be converted: the model itself stays static: it has no parent to be swapped "
        "in: wrap it in nn.Sequential"
    )
    network = plan_model(nn.Sequential(model, model), (8, 4, 4), ratio=1, sharing=[["0"]]).network
    renamed = Network(
        (replace(network.sites[0], name=""),), network.params, network.macs, network.input_size
    )
    group = replace(net_plan(Net()).groups[0], cell=(8, 8, 1, 1), num_cells=1, layers=("",))
    message = "the model itself cannot be converted: it has no parent to be swapped in: wrap it in"
    refuse(model, Plan(renamed, (group,)), message)


def hook(*_: Any) -> None:
    return None


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(hook),
    "forward pre": lambda m: m.register_forward_pre_hook(hook),
    "backward": lambda m: m.register_full_backward_hook(hook),
    "backward pre": lambda m: m.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_layer_with_hooks_is_refused_when_planned_and_when_converted(kind: str) -> None:
    model = Net()
    plan = net_plan(model)
    HOOKS[kind](model.down)
    message = "group 'd': down cannot be converted: it carries hooks"
    with pytest.raises(PlanError, match=message):
        net_plan(model)
    refuse(model, plan, "down cannot be converted: it carries hooks")


def test_a_layer_with_tied_weights_is_refused_when_planned_and_when_converted() -> None:
    model = Net()
    plan = net_plan(model)
    model.blocks[1].conv1.weight = model.blocks[0].conv1.weight
    message = "group 'b': blocks.0.conv1 cannot be converted: its weight is tied to another layer's"
    with pytest.raises(PlanError, match=message):
        net_plan(model)
    message = message.removeprefix("group 'b': ")
    refuse(model, plan, message)


@pytest.mark.parametrize("name", ["keys", "layers", "forward", "type", "training"])
def test_a_warehouse_cannot_take_the_name_of_an_attribute_of_its_container(name: str) -> None:
    model = Net()
    plan = net_plan(model, sharing={name: ["down"]})
    message = f"group {name!r}: a container of modules has an attribute of that name"
    refuse(model, plan, message)


# What a converted model can do -------------------------------------------------------


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.randn(4, *IMAGE)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("basis_ratio", [1.0, 0.25])
def test_the_gradient_reaches_every_parameter(basis_ratio: float) -> None:
    model = converted(basis_ratio=basis_ratio)
    model(torch.randn(4, *IMAGE)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if parameter.numel():
            assert parameter.grad.abs().max() > 0, name


def test_a_deep_copy_has_its_own_warehouses() -> None:
    model = converted()
    twin = copy.deepcopy(model)
    for name, layer in kw_layers(twin).items():
        original = model.get_submodule(name)
        assert layer.warehouse is not original.warehouse
        assert any(layer.warehouse is w for w in twin.kw_warehouses.values())
    x = torch.randn(2, *IMAGE)
    assert torch.equal(twin.eval()(x), model.eval()(x))

    before = {name: t.clone() for name, t in model.state_dict().items()}
    train_a_step(twin.train())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    changed = dict(twin.named_parameters())
    for name in ("kw_warehouses.b.cells", "kw_warehouses.d.cells", "down.attention.fc2.weight"):
        assert not torch.equal(changed[name], before[name]), name
    twin_out = twin.eval()(x)
    assert not torch.equal(twin_out, model(x))


def test_saved_weights_give_a_freshly_converted_model_the_same_function(tmp_path: Path) -> None:
    model = Net()
    plan = net_plan(model)
    convert_(model, plan)
    train_a_step(model)
    set_temperature_(model, 0.625)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    torch.manual_seed(1)
    fresh = convert_(Net(), plan)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert fresh.load_state_dict(state, strict=True) == ([], [])
    x = torch.randn(2, *IMAGE)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    for layer in kw_layers(fresh).values():
        assert float(layer.attention.temperature) == 0.625


def test_temperature_and_assignment_are_in_the_state_of_every_layer() -> None:
    model = converted()
    state = model.state_dict()
    for name, layer in kw_layers(model).items():
        assert torch.equal(state[f"{name}.attention.assignment"], layer.attention.assignment)
        assert float(state[f"{name}.attention.temperature"]) == 0.0
    state["down.attention.assignment"] = torch.tensor([3, 2, 1, 4])
    model.load_state_dict(state)
    assert model.down.attention.assignment.tolist() == [3, 2, 1, 4]
    del state["down.attention.temperature"]
    with pytest.raises(RuntimeError, match=r"Missing key.*down\.attention\.temperature"):
        model.load_state_dict(state)


def test_a_whole_model_can_be_pickled() -> None:
    model = converted().eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.down.warehouse is loaded.kw_warehouses["d"]
    x = torch.randn(2, *IMAGE)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Five converted layers in a row with about a dozen roundings each, which do not line up.
    [(torch.float64, 1e-5), (torch.float16, 60 * 2**-11), (torch.bfloat16, 60 * 2**-8)],
    ids=str,
)
def test_a_converted_model_can_be_moved_to_another_dtype(
    dtype: torch.dtype, tolerance: float
) -> None:
    model = converted().eval()
    x = torch.randn(2, *IMAGE)
    expected = model(x).detach().double()
    out = model.to(dtype)(x.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()
    model.train()(x.to(dtype)).sum().backward()


def test_autocast_trains_a_converted_model_with_parameters_in_float32() -> None:
    model = converted(norm="layer").eval()
    x = torch.randn(4, *IMAGE)
    expected = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    # Seven layers in a row, some eight roundings each, which do not line up.
    assert (out.float() - expected).abs().max() < 28 * 2**-8 * expected.abs().max()
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_channels_last_changes_no_value_of_a_converted_model() -> None:
    model = converted(Net().double())
    x = torch.randn(2, *IMAGE, dtype=torch.float64)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)


def test_training_fits_a_batch() -> None:
    model = converted()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(8, *IMAGE), torch.randint(5, (8,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


def test_backend_and_workspace_are_those_of_every_layer() -> None:
    model = Net()
    plan = plan_model(model, (3, 8, 6), ratio=1, sharing="layer")
    with pytest.raises(ValueError, match="backend 'cudnn': allowed are"):
        convert_(model, plan, backend="cudnn")
    with pytest.raises(ValueError, match="workspace_mb -1: it must be above 0"):
        convert_(model, plan, workspace_mb=-1)
    convert_(model, plan, backend="published", workspace_mb=2)
    layers = [m for m in model.modules() if hasattr(m, "workspace_mb")]
    assert len(layers) == sum(len(group.layers) for group in plan.groups)
    assert {(m.backend, m.workspace_mb) for m in layers} == {("published", 2)}
