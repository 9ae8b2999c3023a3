"""CondConv: the published counts, its routers, and what it reduces to."""

from __future__ import annotations

import copy
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kwlayers import Plan, PlanError, Rule, convert_, plan_network, trace
from kwlayers.methods.condconv import CondConv2d, Router
from tests.kwlayers.methods.reference import (
    built_counts,
    converted,
    images,
    oracle,
    plan_of,
    published,
    settings,
    small,
    to_build,
    to_count,
)

_STATIC = (Rule(["blocks.*.conv_dw", "blocks.[1-6].*.conv_pw"], static=True),)
_FINAL = (Rule(["conv_head", "classifier"], dynamic=True),)
_MIXED = "combine_kernel=True"
PUBLISHED = [
    ("resnet18", f"resnet18_condconv_shared(num_experts=4, {_MIXED})", {"num_kernels": 4}),
    (
        "resnet18",
        f"resnet18_condconv_independent(num_experts=8, {_MIXED})",
        {"sharing": "layer"},
    ),
    ("resnet50", f"resnet50_condconv_shared(num_experts=8, {_MIXED})", {}),
    (
        "resnet50",
        f"resnet50_condconv_independent(num_experts=8, {_MIXED})",
        {"sharing": "layer"},
    ),
    (
        "mobilenetv2_1.0",
        f"mobilenetv2_condconv_pointwise(scale=1.0, num_experts=4, {_MIXED})",
        {"num_kernels": 4, "rules": _STATIC},
    ),
    (
        "mobilenetv2_0.5",
        f"mobilenetv2_condconv_shared(scale=0.5, num_experts=8, {_MIXED})",
        {},
    ),
]
# From the specification's digest, which the published code was run for, too.
DIGEST = [
    ("resnet18", {}, 88_599_656, 1_901_968_896),
    ("mobilenetv2_1.0", {}, 15_969_808, 315_018_368),
]
CASES = [(name, own, *oracle("CondConv", made)) for name, made, own in PUBLISHED] + DIGEST


@pytest.mark.parametrize(("name", "own", "params", "macs"), to_count(CASES))
def test_counts_are_those_of_the_published_code(
    name: str, own: dict[str, object], params: int, macs: int
) -> None:
    plan = published(name, settings("condconv", **own))
    cost = plan.cost()
    assert (cost.params.total, cost.macs.total) == (params, macs)


@pytest.mark.parametrize(("name", "own", "params", "macs"), to_build(CASES))
def test_so_are_those_of_the_built_network(
    name: str, own: dict[str, object], params: int, macs: int
) -> None:
    plan = published(name, settings("condconv", **own))
    assert built_counts(name, plan) == (params, macs)


LAST = [
    (
        f"mobilenetv2_{scale}",
        *oracle(
            "CondConv",
            f"mobilenetv2_condconv_shared(scale={scale}, num_experts=8, {_MIXED}, "
            "final_condconv=True, fc_condconv=True)",
        ),
    )
    for scale in ("1.0", "0.5")
]


@pytest.mark.parametrize(("name", "params", "macs"), LAST)
def test_the_last_layers_may_be_dynamic_too(name: str, params: int, macs: int) -> None:
    plan = published(name, settings("condconv", rules=_FINAL))
    cost = plan.cost()
    # The published classifier has no bias; ours mixes those of 8 kernels.
    assert cost.params.total == params + 8 * 1000
    assert cost.macs.total == macs


APART = [
    (
        sharing,
        *oracle("CondConv", f"resnet18_condconv_{word}(num_experts=8, combine_kernel=False)"),
    )
    for sharing, word in (("block", "shared"), ("layer", "independent"))
]


@pytest.mark.parametrize(("sharing", "params", "macs"), APART)
def test_convolving_with_every_expert_costs_so_many_times_more(
    sharing: str, params: int, macs: int
) -> None:
    """The published code's other way, which mixes features: the same result, E times the MACs."""
    plan = published("resnet18", settings("condconv", sharing=sharing))
    assert plan.cost().params.total == params
    layers = [plan.network[name] for group in plan.groups for name in group.layers]
    apart = 7 * sum(site.macs for site in layers)
    cost = plan.cost().macs
    assert cost.total - cost.mixing + apart == macs


# By the specification: the convolutions of the last three stages (of 112, 192 and 320 channels),
# without squeeze-and-excitation, have 2,673,600 weights.
@pytest.mark.parametrize(("kernels", "params"), [(4, 13_314_116), (8, 24_013_284)])
def test_efficientnet_has_the_parameters_of_its_readme(
    torchvision_models: ModuleType, kernels: int, params: int
) -> None:
    with torch.device("meta"):
        model = torchvision_models.efficientnet_b0()
    last = Rule(["features.[567].*.block.[013].0"], dynamic=True)
    rules = (Rule(["*"], static=True), last)
    found = trace(model, (3, 224, 224))
    plan = plan_network(found, settings("condconv", num_kernels=kernels, rules=rules))
    layers = [found[name] for group in plan.groups for name in group.layers]
    assert sum(site.weights for site in layers) == 2_673_600
    assert plan.cost().params.total == params


def test_it_is_the_definition_sample_by_sample() -> None:
    torch.manual_seed(0)
    layer = CondConv2d(8, 6, 3, 2, groups=2, num_kernels=3, dtype=torch.float64)
    nn.init.normal_(layer.biases)
    x = torch.randn(3, 8, 7, 7, dtype=torch.float64)
    routing = torch.sigmoid(x.mean((2, 3)) @ layer.router.fc.weight.T + layer.router.fc.bias)
    for b in range(3):
        weight = (routing[b].view(3, 1, 1, 1, 1) * layer.kernels).sum(0)
        bias = (routing[b].view(3, 1) * layer.biases).sum(0)
        expected = F.conv2d(x[b : b + 1], weight, bias, 2, groups=2)
        torch.testing.assert_close(layer(x)[b : b + 1], expected, rtol=1e-12, atol=1e-12)


def test_the_router_of_a_block_sees_the_block_s_input() -> None:
    model = converted(small(), settings("condconv")).eval()
    block = model.blocks[1]
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    router = model.kw_warehouses["blocks_1"]
    expected = torch.sigmoid(x.mean((2, 3)) @ router.fc.weight.T + router.fc.bias)
    # All layers of the block mix by it.
    seen: dict[str, torch.Tensor] = {}
    block.conv3.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    block(x)
    weight = (expected[0].view(8, 1, 1, 1, 1) * block.conv3.kernels).sum(0)
    bias = expected[0] @ block.conv3.biases
    torch.testing.assert_close(seen["out"][:1], F.conv2d(seen["x"][:1], weight, bias, groups=4))
    block(x=x)  # by keyword, too
    assert router.routing is None
    with pytest.raises(RuntimeError, match="call the block"):
        block.conv3(seen["x"])


def test_a_part_of_a_block_still_has_the_block_s_router() -> None:
    rules = Rule(["*.conv1", "*.conv2"], static=True)
    plan = plan_of(small(), settings("condconv", rules=rules))
    group = plan.groups[1]
    assert (group.name, group.layers) == ("blocks_1_conv3", ("blocks.1.conv3",))
    assert (group.block, group.router_channels) == ("blocks.1", 16)


def test_each_kernel_starts_as_a_layer_s_own() -> None:
    torch.manual_seed(0)
    layer = CondConv2d(64, 128, 3, num_kernels=8)
    assert layer.kernels.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.01)


def test_experts_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    router = Router(4, 1000, dropout=0.3)
    x = torch.ones(1, 4)
    assert (router.eval()(x) > 0).all()
    dropped = router.train()(x)
    assert 0.2 < (dropped == 0).double().mean() < 0.4
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], (router.eval()(x) / 0.7)[kept])


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="sharing 'stage': allowed is 'block' or 'layer'"):
        settings("condconv", sharing="stage")
    with pytest.raises(PlanError, match="num_kernels 0"):
        settings("condconv", num_kernels=0)
    with pytest.raises(PlanError, match=r"dropout 1\.5"):
        settings("condconv", dropout=1.5)
    with pytest.raises(PlanError, match="one ratio for all"):
        plan_of(small(), settings("condconv", rules=Rule(["*.conv1"], ratio=2)))


def test_two_models_do_not_share_their_routing() -> None:
    first = converted(small(), settings("condconv")).eval()
    x, y = images(2), images(4)[2:]
    expected = first(x)
    other = convert_(small(), plan_of(small(), settings("condconv"))).eval()
    other(y)
    assert torch.equal(first(x), expected)


class _Tokens(nn.Module):
    """x: (B, H, W, C), whose first layer sees windows of it, as Swin's do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        seen = self.qkv(windows).unflatten(0, (len(x), -1)).mean((1, 2))
        out: Tensor = x + self.fc2(torch.relu(self.fc1(x))) + seen[:, None, None]
        return out


class _Halves(nn.Module):
    """x: (B, C, H, W), half of which is convolved, as ShuffleNetV2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat((second, self.conv2(torch.relu(self.conv1(first)))), dim=1)


class _Listed(nn.Module):
    """features: a list of (B, C, H, W), as DenseNet's layers take."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 4, 1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [*features, self.conv2(self.conv1(features[-1]))]


class _Unlike(nn.Module):
    """Blocks of all three kinds, each twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.halves = nn.Sequential(_Halves(), _Halves())
        self.listed = nn.ModuleList([_Listed(), _Listed()])
        self.tokens = nn.Sequential(_Tokens(), _Tokens())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.halves(self.stem(x))]
        for block in self.listed:
            features = block(features)
        tokens = self.tokens(sum(features[1:], features[0]).movedim(1, -1))
        out: Tensor = self.head(tokens.mean((1, 2)))
        return out


def test_layers_whose_block_s_input_they_do_not_share_have_routers_of_their_own() -> None:
    torch.manual_seed(0)
    model = _Unlike().double()
    plan = plan_of(model, settings("condconv", num_kernels=2), (3, 4, 4))
    found = {group.layers: (group.block, group.router_channels) for group in plan.groups}
    own = {
        (f"{block}.{i}.{conv}",): ("", channels)
        for block, convs in (
            ("halves", {"conv1": 4, "conv2": 4}),
            ("listed", {"conv1": 8, "conv2": 4}),
        )
        for i in range(2)
        for conv, channels in convs.items()
    }
    windows = {(f"tokens.{i}.qkv",): ("", 8) for i in range(2)}
    rest = {(f"tokens.{i}.fc1", f"tokens.{i}.fc2"): (f"tokens.{i}", 8) for i in range(2)}
    assert found == own | windows | rest
    made = convert_(model, plan).eval()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    alone = torch.cat([made(one[None]) for one in x])
    torch.testing.assert_close(made(x), alone, rtol=1e-10, atol=1e-10)


def test_a_router_of_tokens_sees_their_mean() -> None:
    torch.manual_seed(0)
    model = _Unlike().double()
    made = convert_(model, plan_of(model, settings("condconv"), (3, 4, 4))).eval()
    router, seen = made.kw_warehouses["tokens_0"], []
    made.tokens[0].fc1.register_forward_hook(lambda *_: seen.append(router.routing))
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    made.tokens[0](x)
    torch.testing.assert_close(seen[0], torch.sigmoid(router.fc(x.mean((1, 2)))))


@pytest.mark.parametrize("given", [(), (3,), ([1],), (torch.zeros(2, 8, 6, 6),), (torch.ones(16),)])
def test_a_block_called_with_something_else_says_what_its_router_sees(given: Any) -> None:
    block = converted(small(double=False), settings("condconv")).blocks[1]
    with pytest.raises(ValueError, match=r"its router sees 16 channels of a tensor \(B, 16, …\)"):
        block(*given)


def test_after_an_exception_no_routing_is_left() -> None:
    model = converted(small(double=False), settings("condconv"))
    broken = model.blocks[0].bn1
    broken.forward = lambda x: 1 / 0
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        model(images(double=False))
    assert model.kw_warehouses["blocks_0"].routing is None
    copy.deepcopy(model)


def test_blocks_may_be_run_again_in_backward_but_not_their_forward_alone() -> None:
    model = converted(small(double=False), settings("condconv")).eval()
    x = images(double=False)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    again = copy.deepcopy(model)
    again.zero_grad()
    plain = nn.Sequential.forward

    def run(blocks: nn.Sequential, y: Tensor) -> Tensor:
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        return y

    again.blocks.forward = lambda y: run(again.blocks, y)
    again(x).square().sum().backward()
    for one, other in zip(again.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, other)
    assert all(router.routing is None for router in again.kw_warehouses.values())
    again.blocks.forward = lambda y: plain(again.blocks, y)
    for block in again.blocks:
        block.forward = lambda y, f=block.forward: checkpoint(f, y, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"checkpoint\(block, x\), not block\.forward"):
        again(x).sum().backward()


def test_a_group_of_a_block_that_does_not_hold_its_layers_is_refused() -> None:
    plan = plan_of(small(), settings("condconv"))
    for other in ("blocks.0", "blocks.9", "nowhere"):
        groups = [{**group, "block": other} for group in plan.groups_to_list()[1:]]
        with pytest.raises(PlanError, match=rf"blocks\.1\.conv1 is not in the block '{other}'"):
            Plan.from_groups(plan.network, groups)


def test_a_conversion_that_fails_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    plan = plan_of(model, settings("condconv"))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("kwlayers.convert.replace_", fail)
    with pytest.raises(MemoryError):
        convert_(model, plan)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert trace(model, (3, 12, 12)) == plan.network
