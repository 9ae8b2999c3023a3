"""What every method must do: count what it builds, train, start warm, be saved and compiled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from kwlayers import (
    Plan,
    PlanError,
    Rule,
    TemperatureSchedule,
    convert_,
    methods,
    parameter_groups,
    plan_network,
    prepare_,
    set_temperature_,
    to_static_,
    trace,
)
from kwlayers.dynamic import DynamicLayer
from kwlayers.methods.condconv import CondConv1d, CondConv3d
from kwlayers.methods.dyconv import DYConv1d, DYConv3d
from kwlayers.methods.odconv import ODConv1d, ODConv3d
from kwlayers.methods.pad_net import PADConv1d, PADConv3d, PADODConv1d, PADODConv3d
from kwlayers.methods.pad_net_partition import partition_
from kwlayers.schedule import Tempered
from kwsearch.zoo.vit import VisionTransformer
from tests.kwlayers.methods.reference import (
    by_hand,
    converted,
    for_small,
    images,
    plan_of,
    restless,
    settings,
    small,
)

ALONE = [name for name in methods.NAMES if name != "kernel_warehouse"]
TEMPERED = ("dyconv", "odconv", "pad_net", "dymn")


def dynamic(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, DynamicLayer)}


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_method_is_registered_under_its_name(name: str) -> None:
    method = methods.find(name)
    assert method.name == method.group.method == method.settings.method == name
    assert method.title
    assert method.paper


@pytest.mark.parametrize("name", ALONE)
def test_what_is_built_has_the_planned_parameters_and_depends_on_its_input(name: str) -> None:
    model = small(name)
    plan = plan_of(model, for_small(name))
    made = converted(model, for_small(name))
    assert sum(p.numel() for p in made.parameters()) == plan.cost().params.total
    parents = {getattr(group, "parent", "") for group in plan.groups}  # which stay as they are
    assert set(dynamic(made)) == {n for group in plan.groups for n in group.layers} - parents
    # Two images at a time are convolved with two kernels: as each alone.
    x = images(3)
    made.eval()
    alone = torch.cat([made(one[None]) for one in x])
    torch.testing.assert_close(made(x), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALONE)
def test_a_plan_is_plain_data_and_back(name: str) -> None:
    plan = plan_of(small(name), for_small(name))
    again = Plan.from_dict(plan.to_dict())
    assert again == plan
    assert {group["method"] for group in plan.groups_to_list()} == {name}


@pytest.mark.parametrize("name", ["dyconv", "odconv", "dcd", "fdconv"])
def test_layers_that_share_nothing_have_groups_of_their_own(name: str) -> None:
    plan = plan_of(small(name), for_small(name))
    first, second, *_ = plan.groups_to_list()
    first["layers"] = [*first["layers"], *second["layers"]]
    with pytest.raises(PlanError, match=f"2 layers: by {name} each has a group of its own"):
        Plan.from_groups(plan.network, [first])


@pytest.mark.parametrize("name", ["odconv", "fdconv"])
def test_a_group_of_layers_that_the_method_does_not_take_is_refused(name: str) -> None:
    plan = plan_of(small(name), for_small(name))
    linear = next(site.name for site in plan.network.sites if site.kind == "linear")
    group = plan.groups_to_list()[0] | {"layers": [linear]}
    with pytest.raises(PlanError, match=f"{linear}: {name} takes no linear layers"):
        Plan.from_groups(plan.network, [group])


@pytest.mark.parametrize("attribute", ["values", "keys", "of"])
def test_a_layer_may_be_called_like_an_attribute_of_the_container(attribute: str) -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 16, 3))
    model.add_module(attribute, nn.Conv2d(16, 16, 3))
    model.add_module("last", nn.Conv2d(16, 16, 3))
    rule = Rule([attribute], dynamic=True)
    plan = plan_network(trace(model, (3, 16, 16)), settings("dyconv", rules=rule))
    made = convert_(model, plan)
    assert isinstance(made.get_submodule(attribute), DynamicLayer)
    assert made(torch.randn(2, 3, 16, 16)).shape == (2, 16, 10, 10)


@pytest.mark.parametrize("name", ALONE)
def test_parts_add_up_over_layers(name: str) -> None:
    plan = plan_of(small(name), for_small(name))
    cost, layers = plan.cost(), plan.cost_by_layer()
    shared = sum(group.shared_params() for group in plan.groups)
    assert cost.deployed <= cost.params.total
    assert sum(layer.kernel_params for layer in layers) + shared == cost.params.kernels
    assert sum(layer.attention_params for layer in layers) == cost.params.attention
    for part in ("mixing", "attention", "modulation"):
        assert sum(getattr(layer, f"{part}_macs") for layer in layers) == getattr(cost.macs, part)


@pytest.mark.parametrize("name", ALONE)
def test_parameters_grow_strictly_with_the_size(name: str) -> None:
    plan = plan_of(small(name), for_small(name))
    for group in plan.groups:
        sites = plan.of(group)
        count = group.params_by_size(sites)
        sizes = [count(size) for size in range(1, 6)]
        assert sizes == sorted(set(sizes))
        assert count(group.size) == group.deployed_params(sites) <= group.params(sites)


@pytest.mark.parametrize("name", ALONE)
def test_every_parameter_is_trained_and_the_loss_falls(name: str) -> None:
    model = converted(small(name, double=False), for_small(name)).train()
    schedule = TemperatureSchedule(model, 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, target = images(16, double=False), torch.arange(16) % 5
    losses = []
    for _ in range(12):
        schedule.step()
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None]
        assert unused == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ALONE)
def test_a_warm_start_computes_what_the_static_model_does(name: str) -> None:
    model = small(name).eval()
    made = converted(model, for_small(name), warm_start=True).eval()
    if (lost := max(made.kw_warehouses.warm_start.errors.values())) > 1e-6:
        pytest.skip(f"layers share kernels, of which they cannot keep their own: {lost:.2g}")
    x = images()
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
    set_temperature_(made, 0.5)
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
    # And it is no dead end: kernels of one layer do not stay equal.
    made.train()
    made(x).square().sum().backward()
    kernels = [getattr(module, "kernels", None) for module in dynamic(made).values()]
    several = [k for k in kernels if k is not None and k.shape[0] > 1]
    moved = [k - 0.1 * k.grad for k in several]
    assert not several or any(not torch.allclose(k[0], k[1]) for k in moved)


@pytest.mark.parametrize("name", ALONE)
def test_the_state_dict_restores_the_model_as_it_was(name: str) -> None:
    made = converted(small(name), for_small(name)).train()
    made(images())  # statistics of norms
    set_temperature_(made, 0.25)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    other = converted(small(name), for_small(name))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images()
    assert torch.equal(other.eval()(x), made.eval()(x))


@pytest.mark.parametrize("name", ALONE)
def test_a_deep_copy_is_a_model_of_its_own(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    x = images()
    before = made(x)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(made(x), before)
    assert not torch.allclose(twin(x), before)


@pytest.mark.parametrize("name", ALONE)
def test_single_images_and_channels_last_give_the_same(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    x = images()
    expected = made(x)
    turned = made.to(memory_format=torch.channels_last)
    found = turned(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    made.train()(x[:1]).sum().backward()  # a batch of one trains


@pytest.mark.parametrize("name", ALONE)
def test_autocast_gives_bfloat16_near_float32(name: str) -> None:
    made = converted(small(name, double=False), for_small(name)).eval()
    x = images(double=False)
    expected = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x)
        found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


# What differs most by default: hooks, one kernel of parts, masks.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("condconv", "odconv", "pad_net") else pytest.mark.slow)
        for n in ALONE
    ],
)
def test_it_compiles_into_one_graph_with_the_same_gradients(name: str) -> None:
    torch._dynamo.reset()
    made = converted(small(name, double=False), for_small(name))
    made.train(name in ("dcd", "odconv"))  # some in each mode: graphs of all in both take long
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(double=False)
    expected, found = made(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (key, one), other in zip(made.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=key)


# PAD-Net makes the kernels of few images, and mixes those of more than K.
@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in ALONE), ("pad_net", 5)])
def test_gradients_are_those_of_finite_differences(name: str, count: int) -> None:
    made = converted(small(name), for_small(name)).eval()
    if name == "pad_net":
        partition_(made, scores="random")
    set_temperature_(made, 0.1)
    x = images(count).requires_grad_()
    loss = made(x).square().sum()
    loss.backward()
    noise = 1e-9 * loss.item()
    generator = torch.Generator().manual_seed(3)
    for tensor in (x, *made.parameters()):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        with torch.no_grad():
            step = 1e-6 * direction
            tensor += step
            above = made(x).square().sum()
            tensor -= 2 * step
            below = made(x).square().sum()
            tensor += step
        assert tensor.grad is not None
        expected = (above - below) / 2e-6
        found = (tensor.grad * direction).sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=noise)
        # What is as small as the noise could be anything.
        assert found.abs() > 100 * noise or not tensor.grad.any()


@pytest.mark.parametrize("name", ALONE)
def test_layers_that_are_called_twice_and_frozen_kernels_have_their_gradients(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    layer: Any = next(iter(dynamic(made).values()))
    x = torch.randn(2, layer.in_channels, 6, 6, dtype=torch.float64)
    if name not in ("condconv", "dymn"):  # whose attention belongs to a block
        layer(layer(x)).sum().backward()
        twice = next(layer.parameters()).grad
        assert twice is not None
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    y = images(2).requires_grad_()
    made(y).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALONE)
def test_rules_change_what_is_dynamic(name: str) -> None:
    model = small(name)
    default = plan_of(model, for_small(name))
    layers = {layer for group in default.groups for layer in group.layers}
    first = min(layers)
    fewer = plan_of(model, for_small(name, rules=Rule([first], static=True)))
    left = {layer for group in fewer.groups for layer in group.layers}
    assert left < layers
    assert first not in left
    assert "stem.0" not in layers
    with pytest.raises(PlanError, match="share"):
        for_small(name, rules=[Rule(["stem.0"], share="one")])
    with pytest.raises(PlanError, match=r"cell_ratio.*another method"):
        for_small(name, rules=[Rule(["stem.0"], cell_ratio=(1, 1))])


@pytest.mark.parametrize(
    "name",
    [n for n in ALONE if "ratio" in methods.find(n).settings.own and n != "dymn"],
)
def test_rules_make_layers_dynamic_that_would_stay_static(name: str) -> None:
    model = small(name)
    layers = {n for group in plan_of(model, for_small(name)).groups for n in group.layers}
    more = plan_of(model, for_small(name, rules=[Rule(["stem.0"], dynamic=True)]))
    assert {layer for group in more.groups for layer in group.layers} == layers | {"stem.0"}
    with pytest.raises(PlanError, match=r"stem\.0.*static; dynamic=True"):
        plan_of(model, for_small(name, rules=[Rule(["stem.0"], ratio=2)]))


@pytest.mark.parametrize("name", ALONE)
def test_why_a_layer_stays_static_is_said(name: str) -> None:
    network = trace(small(name), (3, 12, 12))
    found = for_small(name, rules=[Rule(["*.conv1"], static=True)]).why_static(network)
    outside = "dymn needs a block with a context (DyMN's)"
    assert found["stem.0"] == (outside if name == "dymn" else "the stem stays static")
    assert found["blocks.0.conv1"] == "a rule keeps it static (*.conv1)"
    plan = plan_of(small(name), for_small(name))
    layers = {layer for group in plan.groups for layer in group.layers}
    assert (found["head"] == "") == ("head" in layers)
    with pytest.raises(PlanError, match=r"no layer can be converted: .*a rule keeps it static"):
        for_small(name, rules=[Rule(["*"], static=True)]).lay_out(network)


@pytest.mark.parametrize("name", ALONE)
def test_temperatures_are_buffers_that_the_schedule_moves(name: str) -> None:
    made = converted(small(name), for_small(name))
    schedule = TemperatureSchedule(made, 2, 2)
    buffers = [m.state_dict()["temperature"] for m in made.modules() if isinstance(m, Tempered)]
    assert len(buffers) == (len(dynamic(made)) if name in TEMPERED else 0)
    for expected in (0.75, 0.5, 0.25, 0.0, 0.0):
        assert schedule.step() == expected
        assert all(temperature == expected for temperature in buffers)
    set_temperature_(made, 0.5)
    assert all(temperature == 0.5 for temperature in buffers)


def test_an_unconverted_model_has_no_schedule() -> None:
    with pytest.raises(ValueError, match="no dynamic layer"):
        TemperatureSchedule(small(), 1, 1)


@pytest.mark.parametrize("name", ALONE)
def test_a_converted_model_is_not_planned_again(name: str) -> None:
    made = converted(small(name), for_small(name))
    with pytest.raises(PlanError, match="already converted"):
        trace(made, (3, 12, 12))
    with pytest.raises(PlanError):
        convert_(made, plan_of(small(name), for_small(name)))


@pytest.mark.parametrize("name", methods.NAMES)
@pytest.mark.parametrize("warm", [False, True])
def test_a_model_is_prepared_for_training_whatever_its_method(name: str, warm: bool) -> None:
    own: dict[str, Any] = {"ratio": 1.0} if name == "kernel_warehouse" else {}
    model = small(name, double=False)
    plan = plan_network(trace(model, (3, 12, 12)), for_small(name), **own)
    convert_(model, plan, warm_start=warm)
    state = torch.get_rng_state()
    batches = [(images(4, double=False), torch.arange(4))]
    assert prepare_(model, batches, nn.functional.cross_entropy) is model
    assert torch.equal(torch.get_rng_state(), state)
    masks = [mask for key, mask in model.named_buffers() if key.endswith("mask")]
    if masks:
        (group,) = plan.groups
        assert sum(int(mask.sum()) for mask in masks) == group.size


def test_an_unconverted_model_is_not_prepared() -> None:
    with pytest.raises(PlanError, match="not converted"):
        prepare_(small(), [], nn.functional.cross_entropy)


def test_only_kernelwarehouse_becomes_static_again() -> None:
    for name in ALONE:
        model = converted(small(name, double=False), for_small(name), warm_start=True)
        before = [(key, id(module)) for key, module in model.named_modules()]
        with pytest.raises(
            PlanError, match=f"by {name}.*; only kernel_warehouse has a static equal"
        ):
            to_static_(model)
        assert [(key, id(module)) for key, module in model.named_modules()] == before


def test_only_kernelwarehouse_starts_its_cells_alone() -> None:
    for name in ALONE:
        model = small(name, double=False)
        with pytest.raises(PlanError, match=f"warm_start 'cells': .*{name}.* True"):
            convert_(model, plan_of(model, for_small(name)), warm_start="cells")
        assert not hasattr(model, "kw_warehouses")


LINEAR = [name for name in methods.NAMES if "linear" in methods.find(name).group.kinds]


@pytest.mark.parametrize("name", LINEAR)
def test_vision_transformers_become_dynamic(name: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(24, 2, 2, patch=4, img_size=12, num_classes=5)
    own = {"rules": [Rule(["blocks.*"], dynamic=True)]} if name == "dcd" else {}
    sized: dict[str, Any] = {"ratio": 1.0} if name == "kernel_warehouse" else {}
    plan = plan_network(trace(model, (3, 12, 12)), settings(name, **own), **sized)
    layers = {layer for group in plan.groups for layer in group.layers}
    assert len([layer for layer in layers if layer.startswith("blocks.")]) == 8
    made = convert_(model, plan)
    assert sum(p.numel() for p in made.parameters()) == plan.cost().params.total
    x = torch.randn(3, 3, 12, 12)
    made.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    made.eval()
    alone = torch.cat([made(one[None]) for one in x])
    torch.testing.assert_close(made(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_weight_decay_spares_mixed_biases_and_adapters(name: str) -> None:
    model = converted(small(name), for_small(name))
    decay, _ = parameter_groups(model, 0.1)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    assert decayed
    spared = ("bias", "biases", "filter", "position", "scale", "shift")
    assert not any(key.rpartition(".")[2] in spared for key in decayed)
    kernels = ("kernels", "static", "spectrum")
    assert {k for k in names.values() if k.rpartition(".")[2] in kernels} <= decayed


KINDS = [
    (kind, sizes)
    for sizes, kinds in (
        ((9,), (CondConv1d, DYConv1d, ODConv1d, PADConv1d, PADODConv1d)),
        ((5, 4, 6), (CondConv3d, DYConv3d, ODConv3d, PADConv3d, PADODConv3d)),
    )
    for kind in kinds
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_signals_and_volumes_are_convolved_sample_by_sample(
    kind: Any, sizes: tuple[int, ...], groups: int
) -> None:
    """With 5 samples, and for PAD-Net, which then does otherwise, with 2."""
    torch.manual_seed(0)
    to: Any = {"dtype": torch.float64}
    layer = restless(kind(4, 6, 3, 2, 1, groups=groups, num_kernels=3, **to)).eval()
    if getattr(layer, "mask", None) is not None:
        layer.mask.copy_(torch.rand(layer.mask.shape) < 0.4)
    parameters = list(layer.parameters())
    for count in (5, 2):
        x = torch.randn(count, 4, *sizes, **to).requires_grad_()
        found, expected = layer(x), by_hand(layer, x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(out.square().sum(), (x, *parameters), materialize_grads=True)
            for out in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALONE)
def test_a_pickled_model_is_the_same(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    x = images()
    made(x).sum().backward()
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("name", ALONE)
def test_a_model_without_data_is_reset_into_one_that_works(name: str) -> None:
    model = small(name, double=False)
    made = convert_(model.to("meta"), plan_of(model, for_small(name)))
    made.to_empty(device="cpu")
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 0)
    for module in made.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())
    assert not any(float(v) for k, v in made.state_dict().items() if k.endswith("temperature"))
    made.train()(images(double=False)).sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_a_router_of_a_block_is_in_an_exported_program() -> None:
    made = converted(small(double=False), for_small("condconv")).eval()
    x = images(double=False)
    program = torch.export.export(made, (x,))
    torch.testing.assert_close(program.module()(x), made(x), rtol=1e-4, atol=1e-5)
    assert all(router.routing is None for router in made.kw_warehouses.values())
