"""What every method must do: count what it builds, train, start warm, be saved and compiled."""

from __future__ import annotations

import copy
import io
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
    plan_network,
    prepare_,
    set_temperature_,
    trace,
)
from kwlayers.dynamic import DynamicLayer
from kwlayers.schedule import Tempered
from tests.kwlayers.methods.reference import converted, for_small, images, plan_of, small

ALONE = [name for name in methods.NAMES if name != "kernel_warehouse"]


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


@pytest.mark.parametrize("name", ALONE)
def test_it_compiles_into_one_graph_with_the_same_gradients(name: str) -> None:
    torch._dynamo.reset()
    made = converted(small(name, double=False), for_small(name)).eval()
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(double=False)
    expected, found = made(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (key, one), other in zip(made.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ALONE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    set_temperature_(made, 0.1)
    x = images(2).requires_grad_()
    made(x).square().sum().backward()
    generator = torch.Generator().manual_seed(3)
    for tensor in (x, *made.parameters()):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        with torch.no_grad():
            step = 1e-7 * direction
            tensor += step
            above = made(x).square().sum()
            tensor -= 2 * step
            below = made(x).square().sum()
            tensor += step
        assert tensor.grad is not None
        expected = (above - below) / 2e-7
        found = (tensor.grad * direction).sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_layers_that_are_called_twice_and_frozen_kernels_have_their_gradients(name: str) -> None:
    made = converted(small(name), for_small(name)).eval()
    layer: Any = next(iter(dynamic(made).values()))
    x = torch.randn(2, layer.in_channels, 6, 6, dtype=torch.float64)
    if name != "condconv":  # whose router belongs to a block
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


@pytest.mark.parametrize("name", [n for n in ALONE if "ratio" in methods.find(n).settings.own])
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
    assert found["stem.0"] == "the stem stays static"
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
    expected = [0.75, 0.5, 0.25, 0.0, 0.0]
    assert [schedule.step() for _ in range(5)] == expected
    set_temperature_(made, 0.5)
    for module in made.modules():
        if isinstance(module, Tempered):
            assert module.state_dict()["temperature"] == 0.5


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
