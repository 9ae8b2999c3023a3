"""PAD-Net: the published counts, its definition, the partition, and what is deployed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import floor, prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import Plan, PlanError, Rule, convert_, methods
from kwlayers.methods.dyconv import DYConv2d
from kwlayers.methods.odconv import ODConv2d
from kwlayers.methods.pad_net import (
    PADConv1d,
    PADConv2d,
    PADConv3d,
    PADLayer,
    PADLinear,
    PADNetGroup,
    PADODConv1d,
    PADODConv2d,
    PADODConv3d,
)
from kwlayers.methods.pad_net_partition import deploy_, partition_
from kwlayers.planner import BudgetError, plan_network
from tests.kwlayers.methods.reference import (
    backbone,
    built_counts,
    by_hand,
    converted,
    images,
    network,
    oracle,
    plan_of,
    published,
    settings,
    small,
    to_build,
)

DIGEST = [
    ("resnet18", 56_396_871, 1_814_150_592),
    ("resnet50", 120_583_980, 4_090_428_928),
    ("mobilenetv2_1.0", 12_842_891, 301_356_452),
    ("mobilenetv2_0.5", *oracle("PAD DY-Conv", "Dymobilenetv2_PAD(width_multiplier=0.5)")),
]
# From the specification: a quarter of the mixing, and totals at kappa .1, .3, .5 and .7.
EFFECTIVE = [
    ("resnet18", 11_157_504, (15_114_106, 21_808_609, 28_503_111, 35_197_613)),
    ("resnet50", 23_445_504, (33_835_615, 47_902_918, 61_970_220, 76_037_522)),
    ("mobilenetv2_1.0", 2_188_896, (4_743_976, 6_057_313, 7_370_651, 8_683_989)),
]
SMALL_WEIGHTS = 8176  # 2304 + 144 + 64, 4608 + 288 + 256 + 512
BASES = ("dyconv", "odconv")


@pytest.mark.parametrize(("name", "params", "macs"), DIGEST)
def test_stored_counts_are_those_of_the_published_code(name: str, params: int, macs: int) -> None:
    plan = published(name, settings("pad_net"))
    cost = plan.cost()
    assert cost.params.total == params
    # It sums over kernels without a matrix product, which nobody counts; ours is one.
    assert cost.macs.total - cost.macs.mixing == macs


@pytest.mark.parametrize(("name", "params", "macs"), to_build(DIGEST))
def test_so_are_those_of_the_built_network(name: str, params: int, macs: int) -> None:
    plan = published(name, settings("pad_net"))
    assert built_counts(name, plan) == (params, macs + plan.cost().macs.mixing)


@pytest.mark.parametrize(("name", "weights", "totals"), EFFECTIVE)
def test_deployed_counts_are_those_of_the_specification(
    name: str, weights: int, totals: tuple[int, ...]
) -> None:
    for kappa, total in zip(("0.1", "0.3", "0.5", "0.7"), totals, strict=True):
        plan = published(name, settings("pad_net", dynamic_fraction=float(kappa)))
        (group,) = plan.groups
        exact = Fraction(kappa) * weights
        assert (group.unit(plan.of(group)), group.size) == (weights, floor(exact))
        # There is no part of a weight, each of which is K - 1 parameters more; there they round.
        lost = 3 * (exact - floor(exact))
        assert abs(total - lost - plan.cost().deployed) <= Fraction(1, 2)


def test_parts_of_a_layer_are_counted_by_hand() -> None:
    """64 -> 64, 3x3 at 56 px, K = 4, h = 4."""
    first = published("resnet18", settings("pad_net")).cost_by_layer()[1]
    assert (first.kernel_params, first.attention_params) == (5 * 36_864 + 1, 4 * 64 + 4 * 4 + 4)
    assert (first.mixing_macs, first.attention_macs) == (4 * 36_864, 4 * (64 + 4))


def test_by_odconv_there_are_no_static_attentions() -> None:
    """K = 4 and reduction 1/16: ODConv's total, its weights once more, and a scale of each layer.

    The published layers have attentions of their own for static weights, and cannot be run.
    """
    cost = published("resnet50", settings("pad_net", base="odconv")).cost()
    assert cost.params.total == 90_670_888 + 20_676_608 + 48
    assert cost.macs.total - cost.macs.mixing - cost.macs.modulation == 4_092_221_744


BY_ODCONV = [
    ("resnet10", 1, oracle("PAD ODConv", "od_resnet10_pad(kernel_num=1, Lambda='both')")[0]),
    ("resnet50", 4, oracle("PAD ODConv", "od_resnet50_pad(kernel_num=4, Lambda='both')")[0]),
    ("mobilenetv2_1.0", 4, oracle("PAD ODConv", "od_mobilenetv2_100(kernel_num=4)")[0]),
]


@pytest.mark.parametrize(("name", "kernels", "params"), BY_ODCONV)
def test_static_attentions_are_what_the_published_layers_have_besides(
    name: str, kernels: int, params: int
) -> None:
    """Factors of channels, filters and positions, and a scale of each."""
    own = published(name, settings("odconv", num_kernels=kernels))
    total = own.cost().params.total
    for group in own.groups:
        (site,) = own.of(group)
        positions = prod(site.kernel_size)
        filters = 0 if site.groups == site.in_channels else site.out_channels
        static = site.in_channels + filters + (positions if positions > 1 else 0) + 3
        total += site.weights + 1 + static
    assert total == params


@pytest.mark.parametrize("base", BASES)
def test_the_layers_are_those_of_the_base(base: str) -> None:
    for name in ("resnet18", "mobilenetv2_0.5"):
        (group,) = published(name, settings("pad_net", base=base)).groups
        own = published(name, settings(base)).groups
        assert group.layers == tuple(layer for one in own for layer in one.layers)
        found = settings("pad_net", base=base).why_static(network(name))
        assert found == settings(base).why_static(network(name))


def made(kind: type[Any], *sizes: int, seed: int = 0, **own: Any) -> Any:
    """A layer with a bias, and nothing in it that is neutral."""
    torch.manual_seed(seed)
    layer = kind(*sizes, **own, dtype=torch.float64).eval()
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.4)
    with torch.no_grad():
        layer.scale.fill_(0.7)
        for bias in (layer.bias, layer.biases):
            if bias is not None:
                bias.normal_()
    return layer


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("batch", [0, 2, 7])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", [PADConv2d, PADODConv2d])
def test_it_is_the_definition_sample_by_sample(
    kind: type[Any], size: int, groups: int, batch: int, packed: bool
) -> None:
    layer = made(kind, 8, 8, size, 2, 1, groups=groups, num_kernels=3)
    x = torch.randn(batch, 8, 7, 5, dtype=torch.float64)
    expected = by_hand(layer, x) if batch else torch.zeros(0, 8, *(4, 3) if size == 3 else (5, 4))
    if packed:
        layer.pack_()
    found = layer(x)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_linear_layer_has_a_weight_for_each_entry_of_the_first_axis() -> None:
    layer = made(PADLinear, 6, 4, num_kernels=2)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    alpha = layer.attention(x.transpose(1, 2))
    l_d = 2 * torch.sigmoid(layer.scale)
    mixed = l_d * (alpha @ layer.kernels.flatten(1)).view(5, 4, 6)
    weight = torch.where(layer.mask[..., 0], mixed, (2 - l_d) * layer.static[..., 0])
    expected = torch.einsum("bti,boi->bto", x, weight) + (alpha @ layer.biases)[:, None]
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x[:2]), expected[:2], rtol=1e-12, atol=1e-12)
        if layer.mask is not None:
            layer.pack_()
    assert layer(x[0, 0]).shape == (4,)


@pytest.mark.parametrize(
    ("kind", "plain", "shape"),
    [
        (PADConv1d, F.conv1d, (9,)),
        (PADConv3d, F.conv3d, (5, 4, 6)),
        (PADODConv1d, F.conv1d, (9,)),
        (PADODConv3d, F.conv3d, (5, 4, 6)),
    ],
)
def test_other_ranks_are_static_convolutions_where_all_is_static(
    kind: type[Any], plain: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    layer = made(kind, 4, 6, 3, 2, 1)
    layer.mask.fill_(False)
    x = torch.randn(5, 4, *shape, dtype=torch.float64)
    weight = (2 - 2 * torch.sigmoid(layer.scale)) * layer.static[0]
    if layer.biases is None:  # every attention at nearly 1, for ODConv
        nn.init.zeros_(layer.attention.fc2.weight)
        nn.init.constant_(layer.attention.fc2.bias, 60)
    else:
        layer.biases.detach().copy_(layer.biases[0].expand_as(layer.biases))
    bias = layer.bias if layer.biases is None else layer.biases[0]
    torch.testing.assert_close(layer(x), plain(x, weight, bias, 2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 6])
def test_all_dynamic_is_dyconv_and_all_static_a_convolution(batch: int) -> None:
    torch.manual_seed(0)
    layer = PADConv2d(8, 6, 3, 2, 1, groups=2, dtype=torch.float64)
    assert (layer.num_kernels, bool(layer.mask.all()), layer.scale.item()) == (4, True, 0)
    twin = DYConv2d(8, 6, 3, 2, 1, groups=2, num_kernels=4, dtype=torch.float64)
    missing = twin.load_state_dict(layer.state_dict(), strict=False)
    assert missing.missing_keys == []
    x = torch.randn(batch, 8, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-12, atol=1e-12)
    layer.mask.fill_(False)
    expected = F.conv2d(x, layer.static[0], None, 2, 1, groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("batch", [2, 6])
def test_all_dynamic_is_odconv_and_all_static_is_odconv_of_one_kernel(
    batch: int, size: int
) -> None:
    layer = made(PADODConv2d, 8, 6, size, num_kernels=3)
    nn.init.zeros_(layer.scale)
    layer.mask.fill_(True)
    several = ODConv2d(8, 6, size, num_kernels=3, dtype=torch.float64).eval()
    several.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(batch, 8, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), several(x), rtol=1e-12, atol=1e-12)
    layer.mask.fill_(False)
    one = ODConv2d(8, 6, size, num_kernels=1, dtype=torch.float64).eval()
    state = {**layer.state_dict(), "kernels": layer.static}
    for name in ("attention.fc2.weight", "attention.fc2.bias"):
        state[name] = state[name][:-3]
    one.load_state_dict(state, strict=False)
    torch.testing.assert_close(layer(x), one(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "published", "loop"])
@pytest.mark.parametrize("kind", [PADConv2d, PADODConv2d])
def test_a_backend_is_taken_for_few_samples_too(kind: type[Any], backend: str) -> None:
    layer = made(kind, 8, 8, 1, num_kernels=3, backend=backend)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    called = []
    own = layer.cells
    layer.cells = lambda: called.append(1) or own()
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-12, atol=1e-12)
    assert called


def test_weights_start_as_published_and_are_reset() -> None:
    torch.manual_seed(0)
    layer = PADConv2d(64, 64, 3)
    assert layer.static.var().item() == pytest.approx(2 / (9 * 64), rel=0.1)
    before = layer.static.detach().clone()
    layer.mask.fill_(False)
    nn.init.ones_(layer.scale)
    layer.reset_parameters()
    assert layer.mask.all()
    assert layer.scale == 0
    assert not torch.equal(layer.static, before)


@pytest.mark.parametrize("base", BASES)
def test_a_warm_start_is_exact_for_any_mask(base: str) -> None:
    model = small().eval()
    model.blocks[0].conv1.weight.requires_grad_(False)
    found = converted(model, settings("pad_net", base=base), warm_start=True).eval()
    assert not found.blocks[0].conv1.static.requires_grad
    assert found.blocks[1].conv1.static.requires_grad
    x = images(6)
    partition_(found, scores="random")
    torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=1e-9)
    deploy_(found)
    torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=1e-9)
    assert not found.blocks[0].conv1.static.requires_grad
    assert not found.blocks[0].conv1.kernels.requires_grad


# The partition.


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PADLayer)}


def masks_of(model: nn.Module) -> Tensor:
    """All masks in module order, flat."""
    return torch.cat([layer.mask.flatten() for layer in layers_of(model).values()])


def batches_of(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(5, 3, 12, 12, generator=generator, dtype=torch.float64),
            torch.randint(5, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def test_exactly_as_many_as_planned_are_dynamic_and_the_report_says_where() -> None:
    for base in BASES:
        model = converted(small(), settings("pad_net", base=base))
        plan = plan_of(small(), settings("pad_net", base=base))
        found = partition_(model, batches_of(), F.cross_entropy)
        assert sum(found.positions.values()) == plan.groups[0].size
        assert int(masks_of(model).sum()) == plan.groups[0].size
        assert tuple(found.positions) == plan.groups[0].layers
        for name, layer in layers_of(model).items():
            assert found.positions[name] == int(layer.mask.sum())
            assert found.kappa[name] == found.positions[name] / layer.mask.numel()


def derived(model: nn.Module) -> Tensor:
    """sum over samples of dL/dW * (l_d * sum_k alpha_k W_k - l_s * V), by each sample's dL/dW."""
    layers = layers_of(model)
    total = {name: torch.zeros_like(layer.static[0]) for name, layer in layers.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name, layer in layers.items()
    ]
    for x, target in batches_of():
        loss = F.cross_entropy(model(x), target)
        grads = torch.autograd.grad(loss, [out for _, out in seen.values()])
        for (name, (inputs, _)), grad in zip(seen.items(), grads, strict=True):
            layer = layers[name]
            alpha = layer.attention(inputs)
            l_d = 2 * torch.sigmoid(layer.scale)
            for b in range(len(x)):
                own = torch.nn.grad.conv2d_weight(
                    inputs[b : b + 1], layer.geometry.kernel, grad[b : b + 1], *layer.geometry[1:]
                )
                mixed = (alpha[b].view(-1, 1, 1, 1, 1) * layer.kernels).sum(0)
                total[name] += own * (l_d * mixed - (2 - l_d) * layer.static[0])
    for hook in hooks:
        hook.remove()
    return torch.cat([one.flatten() for one in total.values()])


def uneven(model: nn.Module) -> nn.Module:
    """Scales that are not 1."""
    torch.manual_seed(3)
    for layer in layers_of(model).values():
        nn.init.normal_(layer.scale)
    return model


def test_snip_takes_the_largest_derivatives_by_the_mask() -> None:
    model = uneven(converted(small(), settings("pad_net")))
    dynamic = model.kw_warehouses.pad_net.dynamic
    scores = derived(copy.deepcopy(model).eval()).detach().abs()
    partition_(model.train(), batches_of(), F.cross_entropy)
    expected = torch.zeros(SMALL_WEIGHTS, dtype=torch.bool)
    expected[scores.argsort(descending=True)[:dynamic]] = True
    assert torch.equal(masks_of(model), expected)


def test_derivatives_by_the_mask_are_those_of_finite_differences() -> None:
    model = uneven(converted(small(), settings("pad_net"))).eval()
    scores = derived(model)

    def total() -> float:
        return sum(F.cross_entropy(model(x), target).item() for x, target in batches_of())

    first = 0
    for layer in layers_of(model).values():
        whole = layer.mask
        for place in (0, whole.numel() - 1):
            sides = []
            for step in (1e-6, -1e-6):
                layer.mask = whole.double()
                layer.mask.view(-1)[place] += step
                sides.append(total())
            found = (sides[0] - sides[1]) / 2e-6
            assert found == pytest.approx(scores[first + place].item(), rel=1e-4, abs=1e-8)
        layer.mask = whole
        first += whole.numel()


def scored_at(model: nn.Module, rounds: int, schedule: str) -> list[int]:
    """Dynamic weights in each round's forward."""
    seen: list[int] = []
    for layer in layers_of(model).values():
        layer.register_forward_pre_hook(lambda layer, _: seen.append(int(layer.mask.sum())))
    partition_(model, batches_of(1), F.cross_entropy, rounds=rounds, schedule=schedule)
    count = len(layers_of(model))
    return [sum(seen[start : start + count]) for start in range(0, len(seen), count)]


@pytest.mark.parametrize(
    ("schedule", "rounds", "expected"),
    [
        ("exponential", 1, [8176]),
        ("exponential", 2, [8176, 4088]),  # a half, then a quarter
        ("linear", 2, [8176, 5110]),  # 5/8
        ("linear", 3, [8176, 6132, 4088]),  # 3/4, 1/2
    ],
)
def test_rounds_score_at_the_numbers_found_by_hand(
    schedule: str, rounds: int, expected: list[int]
) -> None:
    model = converted(small(), settings("pad_net", dynamic_fraction=0.25))
    assert scored_at(model, rounds, schedule) == expected
    assert int(masks_of(model).sum()) == 2044


@pytest.mark.parametrize(("schedule", "second"), [("exponential", 2585), ("linear", 4497)])
def test_numbers_between_whole_ones_are_rounded_up(schedule: str, second: int) -> None:
    """A tenth of 8176 is 817: 8176 * (817 / 8176)^(1/2) = 2584.5, (8176 + 817) / 2 = 4496.5."""
    model = converted(small(), settings("pad_net", dynamic_fraction=0.1))
    assert scored_at(model, 2, schedule) == [8176, second]
    assert int(masks_of(model).sum()) == 817


def test_weights_return_to_dynamic_where_a_later_round_wants_them() -> None:
    model = converted(small(), settings("pad_net"))
    for layer in layers_of(model).values():
        layer.mask.fill_(False)
    partition_(model, batches_of(), F.cross_entropy)
    assert int(masks_of(model).sum()) == floor(0.3 * SMALL_WEIGHTS)


def test_of_equal_scores_the_first_in_module_order_are_dynamic() -> None:
    model = converted(small(), settings("pad_net", dynamic_fraction=0.25))
    layers = layers_of(model)
    for layer in layers.values():
        nn.init.ones_(layer.kernels)
    partition_(model, scores="magnitude")
    assert torch.equal(masks_of(model), torch.arange(SMALL_WEIGHTS) < 2044)
    # 512 of the last layer come first, then the first 1532 of the others.
    nn.init.constant_(layers["blocks.1.shortcut"].kernels, -2)
    partition_(model, scores="magnitude")
    found = masks_of(model)
    assert found[:1532].all()
    assert not found[1532:-512].any()
    assert found[-512:].all()


def test_magnitudes_are_means_over_kernels() -> None:
    model = converted(small(), settings("pad_net"))
    kernels = [layer.kernels.abs().mean(0).flatten() for layer in layers_of(model).values()]
    scores = torch.cat(kernels).detach()
    partition_(model, scores="magnitude", rounds=3)
    least, most = scores[masks_of(model)].min(), scores[~masks_of(model)].max()
    assert least > most


def test_random_scores_follow_the_seed_and_are_spread_evenly() -> None:
    model = converted(small(), settings("pad_net"))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(partition_(model, scores="random"))
    assert found[0] == found[1] != found[2]
    assert 0.25 < found[0].kappa["blocks.1.conv1"] < 0.35


class Restless(nn.Module):
    """A part that trains otherwise than it evaluates, and draws random numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(self.dropout(x) + torch.rand_like(x))
        return out


def test_everything_but_the_masks_is_as_before() -> None:
    model = converted(Restless(small()), settings("pad_net")).train()
    model.model.blocks[0].eval()
    frozen = model.model.blocks[1].conv1.kernels.requires_grad_(False)
    head = model.model.head.weight
    head.grad = torch.ones_like(head)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("mask")}
    random = torch.get_rng_state()
    with torch.no_grad():
        partition_(model, batches_of(), F.cross_entropy, rounds=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not frozen.requires_grad
    assert torch.equal(head.grad, torch.ones_like(head))
    assert [p.grad for p in model.parameters() if p is not head] == [None] * (
        len(list(model.parameters())) - 1
    )
    assert {layer.mask.dtype for layer in layers_of(model).values()} == {torch.bool}


def test_masks_stay_where_the_loss_fails_in_a_later_round() -> None:
    model = converted(small(), settings("pad_net")).train()
    before, random = masks_of(model), torch.get_rng_state()
    calls: list[int] = []

    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        partition_(model, batches_of(), failing, rounds=2)
    assert torch.equal(masks_of(model), before)
    assert {layer.mask.dtype for layer in layers_of(model).values()} == {torch.bool}
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_a_layer_that_no_batch_reaches_turns_static() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([small(), small()])
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.models[0](x)
            return out + self.models[1](x) if self.both else out

    model = converted(Two(), settings("pad_net"))
    model.both = False
    found = partition_(model, batches_of(), F.cross_entropy)
    assert all(found.positions[name] == 0 for name in found.positions if "models.1" in name)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 0}, "rounds 0: a whole number of at least 1"),
    ({"rounds": True}, "rounds True"),
    ({"schedule": "cosine"}, "schedule 'cosine': allowed are exponential, linear"),
    ({"scores": "grasp"}, "scores 'grasp': allowed are snip, random, magnitude"),
    ({"loss": None}, "loss: snip needs one"),
    ({"batches": []}, "batches: none"),
    ({"loss": lambda out, _: out}, "loss .*: one number that depends on the model's outputs"),
    ({"loss": lambda out, _: out.sum().item()}, "one number that depends"),
    ({"loss": lambda *_: torch.zeros(())}, "one number that depends"),
    ({"loss": lambda out, _: (0 * out).sum()}, "scores are all zero"),
    ({"loss": lambda out, _: out.sum() * float("inf")}, "scores are not all finite"),
]


@pytest.mark.parametrize(("changes", "message"), ARGUMENTS)
def test_arguments_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    model = converted(small(), settings("pad_net"))
    good: dict[str, Any] = {"batches": batches_of(1), "loss": F.cross_entropy}
    given = {**good, **changes}
    with pytest.raises(ValueError, match=message):
        partition_(model, given.pop("batches"), given.pop("loss"), **given)
    assert masks_of(model).all()


def test_batches_that_are_gone_through_once_are_enough_for_one_round() -> None:
    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches_of(1)

    model = converted(small(), settings("pad_net"))
    partition_(model, once(), F.cross_entropy)
    with pytest.raises(ValueError, match="batches: none; rounds go through them again"):
        partition_(model, once(), F.cross_entropy, rounds=2)


def test_after_a_warm_start_snip_says_that_it_sees_nothing() -> None:
    for double in (True, False):
        model = converted(small(double=double), settings("pad_net", base="odconv"), warm_start=True)
        x, target = batches_of(1)[0]
        given = [(x if double else x.float(), target)]
        with pytest.raises(ValueError, match="after a warm start static and dynamic weights are"):
            partition_(model, given, F.cross_entropy)
        F.cross_entropy(model(given[0][0]), target).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        partition_(model, given, F.cross_entropy)


def test_models_that_cannot_be_partitioned_are_refused() -> None:
    for other in (small(), converted(small(), settings("dyconv"))):
        for verb in (partition_, deploy_):
            with pytest.raises(PlanError, match=r"\(Small\) has no layers of PAD-Net"):
                verb(other)
    with pytest.raises(PlanError, match=r"expected an nn\.Module, got int"):
        partition_(1)  # type: ignore[arg-type]
    model = convert_(backbone("resnet10"), published("resnet10", settings("pad_net")))
    with pytest.raises(PlanError, match=r"layer1\.0\.conv1 is on the meta device"):
        partition_(model, scores="random")


# What is deployed.


def partitioned(base: str = "dyconv", double: bool = True) -> nn.Module:
    model = uneven(converted(small(double=double), settings("pad_net", base=base))).eval()
    torch.manual_seed(4)
    partition_(model, scores="random")
    return model


@pytest.mark.parametrize("base", BASES)
def test_a_deployed_model_computes_the_same_with_the_planned_parameters(base: str) -> None:
    plan = plan_of(small(), settings("pad_net", base=base))
    model = partitioned(base)
    kept = {name: int(layer.mask.sum()) for name, layer in layers_of(model).items()}
    expected = {count: model(images(count)) for count in (2, 6)}
    found = deploy_(model)
    assert (found.before, found.after) == (plan.cost().params.total, plan.cost().deployed)
    assert sum(p.numel() for p in model.parameters()) == plan.cost().deployed
    for name, layer in layers_of(model).items():
        assert layer.kernels.shape == (4, kept[name])
        assert layer.static.shape == (1, plan.network[name].weights - kept[name])
        assert layer.mask is None
    for count, out in expected.items():
        torch.testing.assert_close(model(images(count)), out, rtol=1e-12, atol=1e-12)


def test_the_specification_s_total_is_that_of_a_deployed_mobilenet() -> None:
    plan = published("mobilenetv2_1.0", settings("pad_net", dynamic_fraction=0.5))
    model = convert_(backbone("mobilenetv2_1.0").to_empty(device="cpu"), plan)
    for layer in layers_of(model).values():
        layer.reset_parameters()
    partition_(model, scores="magnitude")
    assert deploy_(model).after == 7_370_651


def test_a_deployed_model_is_saved_and_loaded_by_one_of_the_same_masks() -> None:
    model = partitioned()
    masks = {key: value for key, value in model.state_dict().items() if key.endswith(".mask")}
    deploy_(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    other = converted(small(), settings("pad_net")).eval()
    other.load_state_dict(masks, strict=False)
    deploy_(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images(6)
    assert torch.equal(other(x), model(x))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    others = converted(small(), settings("pad_net", dynamic_fraction=0.9))
    partition_(others, scores="random")
    deploy_(others)
    with pytest.raises(RuntimeError, match="size mismatch"):
        others.load_state_dict(model.state_dict())


def test_a_partitioned_model_s_state_has_its_masks() -> None:
    model = partitioned()
    other = converted(small(), settings("pad_net")).eval()
    other.load_state_dict(model.state_dict())
    x = images(6)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("base", BASES)
def test_a_deployed_model_trains(base: str) -> None:
    model = partitioned(base)
    deploy_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, target = images(8), torch.arange(8) % 5
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_only_what_a_layer_uses_has_gradients() -> None:
    model = partitioned()
    model(images(6)).square().sum().backward()
    for layer in layers_of(model).values():
        hidden = (~layer.mask).expand_as(layer.kernels)
        assert not layer.kernels.grad[hidden].any()
        assert not layer.static.grad[layer.mask].any()
        assert layer.kernels.grad[~hidden].any()
        assert layer.static.grad[~layer.mask].any()


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_and_channels_last_are_near_once_deployed(base: str, count: int) -> None:
    model = partitioned(base, double=False)
    deploy_(model)
    x = images(count, double=False)
    expected = model(x)
    turned = model.to(memory_format=torch.channels_last)
    found = turned(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("base", BASES)
def test_a_deployed_layer_compiles_into_one_graph(base: str) -> None:
    torch._dynamo.reset()
    model = partitioned(base, double=False)
    deploy_(model)
    layer: Any = model.blocks[1].conv1
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 6, 6)
    expected, found = layer(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_deployed_is_refused() -> None:
    model = converted(small(), settings("pad_net"))
    with pytest.raises(PlanError, match="8,176 weights are dynamic, 2,452 are planned"):
        deploy_(model)
    assert masks_of(model).all()
    model = partitioned()
    deploy_(model)
    for verb in (lambda: deploy_(model), lambda: partition_(model, scores="random")):
        with pytest.raises(PlanError, match=r"blocks\.0\.conv1: the model is deployed"):
            verb()


# Plans.


def test_a_budget_is_about_what_is_deployed() -> None:
    """ResNet18: 11,766,855 and three for each dynamic weight."""
    traced = network("resnet18")
    plan = plan_network(traced, settings("pad_net"), params=20_000_000)
    assert plan.groups[0].size == 2_744_381
    assert plan.cost().deployed == 19_999_998
    assert plan.cost().params.total == 56_396_871
    most = plan_network(traced, settings("pad_net"), params=60_000_000)
    assert most.groups[0].size == 11_157_504
    assert most.cost().deployed == 11_766_855 + 3 * 11_157_504
    with pytest.raises(BudgetError, match="static kernels and one dynamic weight"):
        plan_network(traced, settings("pad_net"), params=11_766_857)


def test_the_ratio_is_the_part_that_is_dynamic() -> None:
    traced = network("resnet18")
    plan = plan_network(traced, settings("pad_net"), ratio=0.5)
    assert plan.groups[0].size == 5_578_752
    assert plan.groups[0].describe() == "5,578,752 dynamic of K = 4"
    with pytest.raises(PlanError, match="ratio 2: by pad_net it is the part of the weights"):
        plan_network(traced, settings("pad_net"), ratio=2)
    rule = Rule(["layer*"], ratio=0.25)
    assert (
        plan_network(traced, settings("pad_net", rules=rule), ratio=1).groups[0].size == 2_789_376
    )
    rule = Rule(["layer1.*"], ratio=0.25)
    with pytest.raises(PlanError, match="one threshold for all layers needs one ratio"):
        plan_network(traced, settings("pad_net", rules=rule), ratio=1)
    (note,) = plan_network(traced, settings("pad_net"), ratio=1e-8).notes[-1:]
    assert note == "8.963e-08 of the weights dynamic, not 1e-08: a number of them is"


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, message in (
        ({"base": "dcd"}, "base 'dcd': allowed is 'dyconv' or 'odconv'"),
        ({"num_kernels": 1}, "num_kernels 1: allowed is a whole number at least 2"),
        ({"dynamic_fraction": 0}, "dynamic_fraction 0: allowed is a number above 0 and at most 1"),
        ({"dynamic_fraction": 1.5}, r"dynamic_fraction 1\.5"),
        ({"rules": Rule(["*"], reduction=0.5)}, "reduction: of another method; by pad_net there"),
    ):
        with pytest.raises(PlanError, match=message):
            settings("pad_net", **changes)
    with pytest.raises(ValueError, match="num_kernels 1: at least 2, or nothing is dynamic"):
        PADConv2d(4, 4, 3, num_kernels=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic": 0}, "dynamic is 0"),
        ({"dynamic": 8177}, "dynamic 8,177: the layers have 8,176 weights"),
        ({"num_kernels": 1}, "num_kernels 1: allowed is"),
        ({"base": "condconv"}, "base 'condconv': allowed is"),
        ({"norm": "group"}, "norm 'group': allowed is"),
        ({"layers": ("head",), "base": "odconv"}, "head: odconv takes no linear layers"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    plan = plan_of(small(), settings("pad_net"))
    good = {"name": "pad_net", "layers": plan.groups[0].layers, "dynamic": 8176}
    whole = Plan(plan.network, (PADNetGroup(**good),)).cost()
    # 7 scales, and a kernel more of each layer.
    assert whole.params.total - whole.deployed == 8176
    with pytest.raises(PlanError, match=message):
        Plan(plan.network, (PADNetGroup(**{**good, **changes}),))


def test_two_groups_are_partitioned_each_by_its_own_plan() -> None:
    plan = plan_of(small(), settings("pad_net"))
    layers = plan.groups[0].layers
    groups = (PADNetGroup("a", layers[:3], 100), PADNetGroup("b", layers[3:], 2000, "odconv"))
    two = Plan(plan.network, groups)
    torch.manual_seed(0)
    model = convert_(small(), two)
    found = partition_(model, batches_of(1), F.cross_entropy, rounds=2).positions
    assert sum(found[name] for name in layers[:3]) == 100
    assert sum(found[name] for name in layers[3:]) == 2000
    assert deploy_(model).after == two.cost().deployed


def test_it_is_registered_with_its_paper() -> None:
    assert methods.find("pad_net").paper == "He et al., ACL 2023, arXiv 2211.05528"
