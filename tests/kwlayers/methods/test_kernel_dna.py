"""KernelDNA: the published counts and sharing, its definition, and what it reduces to."""

from __future__ import annotations

import copy
import itertools
import json
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kwlayers import Plan, PlanError, Rule, convert_, trace
from kwlayers.methods.kernel_dna import (
    KernelDNAConv1d,
    KernelDNAConv2d,
    KernelDNAConv3d,
    KernelDNAGroup,
)
from kwlayers.plan import Network, Site
from kwlayers.planner import BudgetError, plan_network
from kwsearch.zoo.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from tests.kwlayers.methods.reference import (
    backbone,
    built_counts,
    converted,
    images,
    network,
    oracle,
    plan_of,
    published,
    settings,
)

RESNET18 = "resnet18() with ['layer3', 'layer4'] = NewLayer(..., rd_ratio=16)"
PUBLISHED: list[tuple[str, dict[str, Any], int, int]] = [
    ("resnet18", {"reduction": 1 / 16}, *oracle("KernelDNA", RESNET18)),
    ("resnet50", {}, *oracle("KernelDNA", "get_resnet50(customize=True)")),
    ("mobilenetv2_1.0", {}, *oracle("KernelDNA", "get_mobilenet_v2(customize=True)")),
]
# From the specification's digest, which the published code was run for, too.
DIGEST: list[tuple[str, dict[str, Any], int, int]] = [
    ("resnet18", {}, 9_240_798, 2_276_986_880),
    ("mobilenetv2_0.5", {}, 1_878_232, 97_170_368),
]
STATIC = (11_689_512, 1_814_073_344)  # ResNet18


@pytest.mark.parametrize(("name", "own", "params", "macs"), [*PUBLISHED, *DIGEST])
def test_counts_are_those_of_the_published_code(
    name: str, own: dict[str, Any], params: int, macs: int
) -> None:
    plan = published(name, settings("kernel_dna", **own))
    cost = plan.cost()
    assert cost.params.total == params
    # Gates on feature maps are no matrix products, which nobody counts.
    assert cost.macs.total - cost.macs.modulation == macs
    assert built_counts(name, plan) == (params, macs)


def test_a_tight_budget_keeps_what_reductions_say_of_each_other() -> None:
    """Of MobileNetV2's children: by default 1/4 and 1/24, here alike."""
    traced = network("mobilenetv2_1.0")
    own = settings("kernel_dna", reduction=1 / 8, project_reduction=1 / 8)
    whole = published("mobilenetv2_1.0", own)
    plan = plan_network(traced, own, params=whole.cost().params.total - 200_000)
    for group, first in zip(plan.groups, whole.groups, strict=True):
        (site, *_) = plan.of(group)
        assert group.width <= first.width
        assert group.width == pytest.approx(0.5 * site.in_channels / 8, rel=0.7)


FIVE = oracle("KernelDNA", "resnet50() with layer3=NewLayer3(256, n=2), layer4=NewLayer4(512, 1)")


def test_five_blocks_are_two_pairs_without_an_added_block() -> None:
    """The published bottlenecks with n=2 in layer3: a ResNet50 of one block less there."""
    with torch.device("meta"):
        model = ResNet(Bottleneck, (3, 4, 5, 3))
    plan = plan_of(model, settings("kernel_dna"), (3, 224, 224))
    cost = plan.cost()
    assert (cost.params.total, cost.macs.total - cost.macs.modulation) == FIVE
    assert [group.added for group in plan.groups] == [()] * 3


@pytest.mark.parametrize("reduction", [4, 16])
@pytest.mark.parametrize("deepen", [True, False])
def test_stages_of_resnet18_change_by_the_closed_form(reduction: int, deepen: bool) -> None:
    """The specification's with a third block; by hand without one, and two children."""
    params, macs = STATIC
    for channels, positions in ((256, 196), (512, 49)):
        width, kernel = channels // reduction, 9 * channels**2
        gate = 2 * channels * width + 2 * width + channels
        children = 3 if deepen else 2
        params += children * (gate + channels + 9) - (1 if deepen else 2) * kernel
        params += 4 * channels if deepen else 0  # norms of the third block
        macs += children * 2 * channels * width + (2 * kernel * positions if deepen else 0)
    own = settings("kernel_dna", reduction=1 / reduction, deepen=deepen)
    plan = published("resnet18", own)
    cost = plan.cost()
    assert (cost.params.total, cost.macs.total - cost.macs.modulation) == (params, macs)
    assert built_counts("resnet18", plan) == (params, macs)


def test_parts_of_a_parent_and_a_child_are_counted_by_hand() -> None:
    """256 -> 256, 3x3 at 14 px, r = 64; and 384 -> 64, 1x1 at 14 px, r = 16, of MobileNetV2."""
    layers = {
        row.name: row for row in published("resnet18", settings("kernel_dna")).cost_by_layer()
    }
    parent, child = layers["layer3.2.conv2"], layers["layer3.2.conv1"]
    assert (parent.kernel_params, parent.attention_params) == (589_824, 0)
    assert (parent.conv_macs, parent.attention_macs) == (589_824 * 196, 0)
    gate = 2 * 256 * 64 + 2 * 64 + 256
    assert (child.kernel_params, child.attention_params) == (0, gate + 256 + 9)
    assert (child.conv_macs, child.attention_macs) == (589_824 * 196, 2 * 256 * 64)
    assert (child.modulation_macs, child.mixing_macs) == (256 * 196, 0)
    plan = published("mobilenetv2_1.0", settings("kernel_dna"))
    child = next(row for row in plan.cost_by_layer() if row.name == "blocks.3.1.conv_pwl")
    assert child.attention_params == 2 * 384 * 16 + 2 * 16 + 384 + 64
    assert child.modulation_macs == 384 * 196


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "expected"),
    [(960, 160, 1, 40), (160, 960, 1, 40), (64, 64, 1, 16), (96, 24, 3, 24), (3, 3, 3, 1)],
)
def test_the_published_widths_are_those_found_by_hand(
    channels: int, outputs: int, size: int, expected: int
) -> None:
    site = Site("a", "conv2d", channels, outputs, (size, size))
    own = settings("kernel_dna")
    group = own.group(Network((), 0, 0, ()), "a", [site, site], own)
    assert group.width == group.unit([site, site]) == expected
    assert group.resized(2).unit([site, site]) == expected


def families(plan: Plan) -> list[tuple[tuple[str, ...], str, int, str]]:
    """Children, parent, r and added blocks of each group."""
    groups: Any = plan.groups
    return [
        (tuple(name for name in group.layers if name != group.parent), *own)
        for group in groups
        for own in [(group.parent, group.width, group.blocks)]
    ]


RESNET18_FAMILIES = [
    (("layer3.0.conv2", "layer3.1.conv1"), "layer3.1.conv2", 64, ""),
    (("layer3.2.conv1",), "layer3.2.conv2", 64, "layer3.2"),
    (("layer4.0.conv2", "layer4.1.conv1"), "layer4.1.conv2", 128, ""),
    (("layer4.2.conv1",), "layer4.2.conv2", 128, "layer4.2"),
]
RESNET50_FAMILIES = [
    (("layer3.1.conv2",), "layer3.2.conv2", 64, ""),
    (("layer3.3.conv2",), "layer3.4.conv2", 64, ""),
    (("layer3.5.conv2",), "layer3.6.conv2", 64, "layer3.6"),
    (("layer4.1.conv2",), "layer4.2.conv2", 128, ""),
]
RESNET34_FAMILIES = [
    ((f"layer{stage}.{child}.{conv}",), f"layer{stage}.{child + 1}.{conv}", width, "")
    for stage, child, width in ((3, 1, 64), (3, 3, 64), (4, 1, 128))
    for conv in ("conv1", "conv2")
]
# Children, the parent's block, r: of expansions C / 4, of projections 6C / 24.
_MOBILENET = [(2, (1,), 2, 8), (3, (1, 2), 3, 16), (4, (1,), 2, 24), (5, (1,), 2, 40)]
MOBILENET_FAMILIES = [
    (tuple(f"blocks.{g}.{child}.{conv}" for child in children), f"blocks.{g}.{last}.{conv}", r, "")
    for g, children, last, r in _MOBILENET
    for conv in ("conv_pw", "conv_pwl")
]


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("resnet18", {}, RESNET18_FAMILIES),
        ("resnet18", {"deepen": False}, RESNET18_FAMILIES[::2]),
        ("resnet18", {"stages": 1}, RESNET18_FAMILIES[2:]),
        ("resnet34", {}, RESNET34_FAMILIES),
        ("resnet50", {}, RESNET50_FAMILIES),
        ("resnet50", {"deepen": False}, [RESNET50_FAMILIES[i] for i in (0, 1, 3)]),
        ("mobilenetv2_1.0", {}, MOBILENET_FAMILIES),
        ("mobilenetv2_1.0", {"stages": 1}, MOBILENET_FAMILIES[-2:]),
    ],
)
def test_who_uses_whose_kernel_is_as_published(
    name: str, own: dict[str, Any], expected: Any
) -> None:
    assert families(published(name, settings("kernel_dna", **own))) == expected


def test_a_cifar_resnet_shares_in_pairs_of_its_last_two_stages() -> None:
    with torch.device("meta"):
        model = CifarResNet(3)
    plan = plan_of(model, settings("kernel_dna"), (3, 32, 32))
    assert families(plan) == [
        ((f"layer{stage}.1.{conv}",), f"layer{stage}.2.{conv}", width, "")
        for stage, width in ((2, 8), (3, 16))
        for conv in ("conv1", "conv2")
    ]
    more = plan_of(model, settings("kernel_dna", stages=3), (3, 32, 32))
    assert [group.parent for group in more.groups][:2] == ["layer1.2.conv1", "layer1.2.conv2"]


def test_torchvisions_names_give_the_same(torchvision_models: ModuleType) -> None:
    with torch.device("meta"):
        model = torchvision_models.mobilenet_v2()
    plan = plan_of(model, settings("kernel_dna"), (3, 224, 224))
    first, *others = families(plan)
    assert first == (("features.5.conv.0.0",), "features.6.conv.0.0", 8, "")
    widths = [width for _, _, width, _ in (first, *others)]
    assert widths == [width for _, _, width, _ in MOBILENET_FAMILIES]
    assert plan.cost().params.total == 3_136_840


class _Block(nn.Module):
    """1x1, depthwise, 1x1 and a 3x3 that is not in all."""

    def __init__(self, channels: int, odd: bool = False) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.filter = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, channels, 1)
        size = 5 if odd else 3
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(torch.relu(self.filter(torch.relu(self.expand(x)))))
        return torch.relu(x + self.norm(self.conv(y)))


class _Net(nn.Module):
    """Of no known family: four blocks, of which the second and the third may share."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(_Block(8), _Block(8), _Block(8, odd), _Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def net(double: bool = True, odd: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = restless(_Net(odd))
    return model.double() if double else model


def restless(model: Any) -> Any:
    """With norms that are not the identity, and adapters that are not zero."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        for name in ("filter", "position"):
            if isinstance(adapter := getattr(module, name, None), nn.Parameter):
                nn.init.normal_(adapter, std=0.3)
    return model


def shared(double: bool = True) -> Any:
    return restless(converted(net(double), settings("kernel_dna"))).eval()


def test_an_unknown_network_shares_in_pairs_what_is_alike() -> None:
    """The last block is left over. r = C / 4, and 24 / 24 of the layer that narrows."""
    assert families(plan_of(net(), settings("kernel_dna"))) == [
        (("blocks.1.expand.0",), "blocks.2.expand.0", 2, ""),
        (("blocks.1.project",), "blocks.2.project", 1, ""),
        (("blocks.1.conv",), "blocks.2.conv", 2, ""),
    ]
    # A 5x5 cannot use a 3x3's kernel.
    parents = [group.parent for group in plan_of(net(odd=True), settings("kernel_dna")).groups]
    assert parents == ["blocks.2.expand.0", "blocks.2.project"]


def test_blocks_with_nothing_to_share_are_said() -> None:
    with pytest.raises(PlanError, match=r"no layer can be converted: .*conv1 stays static: the st"):
        published("resnet10", settings("kernel_dna"))
    with pytest.raises(PlanError, match=r"layer1\.0\.conv1 and 7 more stay static: no other layer"):
        published("resnet10", settings("kernel_dna"))


def test_a_third_block_is_built_like_the_one_before() -> None:
    plan = published("resnet18", settings("kernel_dna"))
    assert plan.notes[-1].startswith("2 blocks added, as published: layer3.2, layer4.2; deepen=F")
    model: Any = backbone("resnet18")
    parents = [model.layer3[1].conv2, model.layer4[1].conv2]
    convert_(model, plan)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [
        2, 2, 3, 3
    ]  # fmt: skip
    for stage, parent in zip((model.layer3, model.layer4), parents, strict=True):
        assert stage[1].conv2 is parent
        assert stage[0].conv2.parent is stage[1].conv1.parent is parent
        assert stage[2].conv1.parent is stage[2].conv2
        assert type(stage[2].conv2) is nn.Conv2d
        assert type(stage[0].conv1) is nn.Conv2d
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "layer3.1" in n]
    assert names == [
        *(f"layer3.1.conv1.{name}" for name in ("filter", "position", "gate.fc1.weight")),
        *(f"layer3.1.conv1.gate.{name}" for name in ("norm.weight", "norm.bias")),
        *(f"layer3.1.conv1.gate.fc2.{name}" for name in ("weight", "bias")),
        *(f"layer3.1.{name}" for name in ("bn1.weight", "bn1.bias", "conv2.weight")),
        *(f"layer3.1.bn2.{name}" for name in ("weight", "bias")),
    ]


def tiny(double: bool = False) -> Any:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=5, width=1 / 16)
    return model.double() if double else model


def test_the_added_block_trains_with_weights_of_its_own() -> None:
    model = tiny()
    made = convert_(model, plan_of(model, settings("kernel_dna"), (3, 64, 64))).train()
    before, added = made.layer3[1].conv2.weight, made.layer3[2].conv2.weight
    assert not torch.equal(before, added)
    optimizer = torch.optim.SGD(made.parameters(), 0.05)
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8) % 5
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(made(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in made.parameters())
    assert losses[-1] < losses[0]


def test_a_warm_start_keeps_parents_and_says_how_far_children_are() -> None:
    model = tiny(double=True)
    static = copy.deepcopy(model)
    plan = plan_of(model, settings("kernel_dna"), (3, 64, 64))
    made = convert_(model, plan, warm_start=True).eval()
    errors = made.kw_warehouses.warm_start.errors
    assert set(errors) == {layer for group in plan.groups for layer in group.layers}
    stage, before = made.layer3, static.layer3
    assert torch.equal(stage[1].conv2.weight, before[1].conv2.weight)
    # The third block is a copy of the second.
    assert torch.equal(stage[2].conv2.weight, before[1].conv2.weight)
    parent = before[1].conv2.weight
    for name, child in (
        ("layer3.0.conv2", before[0].conv2.weight),
        ("layer3.1.conv1", before[1].conv1.weight),
        ("layer3.2.conv1", before[1].conv1.weight),
    ):
        expected = ((child - parent).square().sum() / child.square().sum()).sqrt().item()
        assert errors[name] == pytest.approx(expected)
        assert expected > 1
    assert errors["layer3.1.conv2"] == errors["layer4.2.conv2"] == 0
    assert torch.equal(stage[0].conv2.kernel(), parent)


def open_gate(layer: Any) -> None:
    """All of it at nearly 1."""
    nn.init.zeros_(layer.gate.fc2.weight)
    nn.init.constant_(layer.gate.fc2.bias, 60)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_zero_modulation_is_a_plain_convolution_with_the_parents_kernel(
    size: int, groups: int
) -> None:
    torch.manual_seed(0)
    parent = nn.Conv2d(8, 8, size, padding=1, groups=groups, dtype=torch.float64)
    layer = KernelDNAConv2d(
        8, 8, size, 2, 1, groups=groups, parent=parent, width=3, dtype=torch.float64
    ).eval()
    nn.init.normal_(layer.bias)
    open_gate(layer)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    expected = F.conv2d(x, parent.weight, layer.bias, 2, 1, groups=groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_it_is_the_definition_sample_by_sample(size: int, groups: int, training: bool) -> None:
    torch.manual_seed(0)
    to: Any = {"dtype": torch.float64}
    parent = nn.Conv2d(4, 6, size, groups=groups, **to)
    layer = restless(
        KernelDNAConv2d(4, 6, size, 2, 1, groups=groups, parent=parent, width=3, **to)
    ).train(training)
    nn.init.normal_(layer.bias)
    gate, norm = layer.gate, layer.gate.norm
    x = torch.randn(3, 4, 7, 5, **to)
    z = x.mean((2, 3)) @ gate.fc1.weight.T
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        mean, var = z.mean(0), z.var(0, unbiased=False)
    out = layer(x)
    for b in range(3):
        hidden = ((z[b] - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)
        seen = 1 / (1 + (-(gate.fc2.weight @ hidden + gate.fc2.bias)).exp())
        weight = torch.empty_like(parent.weight)
        for o, i, j in itertools.product(range(6), range(size), range(size)):
            place = 1 if layer.position is None else 1 + layer.position[0, 0, i, j]
            scale = (1 + layer.filter[o, 0, 0, 0]) * place
            weight.data[o, :, i, j] = parent.weight[o, :, i, j] * scale
        gated = x[b : b + 1] * seen.view(-1, 1, 1)
        expected = F.conv2d(gated, weight, layer.bias, 2, 1, groups=groups)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "plain", "shape"),
    [
        (KernelDNAConv1d, nn.Conv1d, (2, 4, 9)),
        (KernelDNAConv2d, nn.Conv2d, (2, 4, 9, 5)),
        (KernelDNAConv3d, nn.Conv3d, (2, 4, 9, 5, 4)),
    ],
)
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"dilation": 2, "padding": "same"},
    ],
    ids=str,
)
def test_other_ranks_and_paddings_are_torchs(
    kind: Any, plain: Any, shape: tuple[int, ...], geometry: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    to: Any = {"dtype": torch.float64}
    parent = plain(4, 4, 3, **to)
    layer = kind(4, 4, 3, **geometry, parent=parent, **to).eval()
    open_gate(layer)
    static = plain(4, 4, 3, **geometry, **to)
    with torch.no_grad():
        static.weight.copy_(parent.weight)
        static.bias.copy_(layer.bias)
    x = torch.randn(shape, **to)
    torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


def test_gates_start_as_documented_and_adapters_at_zero() -> None:
    torch.manual_seed(0)
    layer: Any = KernelDNAConv2d(512, 512, 3, parent=nn.Conv2d(512, 512, 3))
    assert layer.gate.fc1.weight.shape == (128, 512)  # C / 4 by default
    assert layer.gate.fc1.weight.var().item() == pytest.approx(2 / 128, rel=0.05)
    assert layer.gate.fc2.weight.var().item() == pytest.approx(2 / 512, rel=0.05)
    assert not any(p.any() for p in (layer.gate.fc2.bias, layer.filter, layer.position))
    assert torch.equal(layer.kernel(), layer.parent.weight)
    restless(layer).reset_parameters()
    assert not any(p.any() for p in (layer.filter, layer.position, layer.gate.norm.running_mean))
    assert KernelDNAConv2d(4, 4, 1, parent=nn.Conv2d(4, 4, 1)).position is None


def test_gradients_reach_the_parent_from_all_uses_of_its_kernel() -> None:
    torch.manual_seed(0)
    to: Any = {"dtype": torch.float64}
    parent = nn.Conv2d(3, 3, 3, padding=1, **to)
    child = KernelDNAConv2d(3, 3, 3, padding=1, parent=parent, width=2, **to)
    both = restless(nn.Sequential(child, parent)).eval()
    names = ("1.weight", "0.filter", "0.position", "0.gate.fc1.weight")
    given = [both.get_parameter(name).detach().requires_grad_() for name in names]

    def run(x: Tensor, *tensors: Tensor) -> Any:
        return functional_call(both, dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(2, 3, 4, 4, **to).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *given))


def test_a_deep_copy_has_parents_of_its_own() -> None:
    made = shared()
    x = images()
    before = made(x)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), before)
    assert twin.blocks[1].conv.parent is twin.blocks[2].conv
    with torch.no_grad():
        twin.blocks[2].conv.weight.mul_(1.5)
    assert torch.equal(made(x), before)
    assert not torch.allclose(twin.blocks[1].conv.kernel(), made.blocks[1].conv.kernel())


def test_the_state_dict_has_a_kernel_once_and_restores_the_model() -> None:
    made = shared()
    state = made.state_dict()
    assert "blocks.2.conv.weight" in state
    assert "blocks.1.conv.weight" not in state
    assert not any("parent" in key or "borrowed" in key for key in state)
    torch.manual_seed(5)
    other = converted(net(), settings("kernel_dna")).eval()
    other.load_state_dict(state)
    assert torch.equal(other(images()), made(images()))


def test_an_empty_batch_stays_one() -> None:
    assert shared()(images()[:0]).shape == (0, 5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2_0.5"])
def test_a_plan_with_added_blocks_is_plain_data_and_back(name: str) -> None:
    plan = published(name, settings("kernel_dna"))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.cost() == plan.cost()


def test_layers_of_a_group_may_be_patterns_over_added_blocks() -> None:
    data = {"method": "kernel_dna", "name": "a", "parent": "layer3.2.conv2", "width": 4}
    groups = [{**data, "layers": ["layer3.2.conv?"], "blocks": "layer3.2"}]
    plan = Plan.from_groups(network("resnet18"), groups)
    assert families(plan) == [(("layer3.2.conv1",), "layer3.2.conv2", 4, "layer3.2")]
    groups = [{**data, "layers": ["layer3.[23].conv?"], "blocks": "layer3.2, layer3.3"}]
    plan = Plan.from_groups(network("resnet18"), groups)
    assert plan.groups[0].added == ("layer3.2", "layer3.3")
    params, _ = built_counts("resnet18", plan)
    gate = 2 * 256 * 4 + 2 * 4 + 256 + 256 + 9
    assert params == plan.cost().params.total == STATIC[0] + 589_824 + 3 * gate + 8 * 256


GOOD = {"name": "a", "layers": ("layer3.1.conv1", "layer3.1.conv2"), "parent": "layer3.1.conv2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width is 0; an integer >= 1"),
        ({"parent": 3}, "parent 3: allowed is a text"),
        ({"parent": "layer3.0.conv2"}, r"parent 'layer3\.0\.conv2': expected one of layer3\.1\.co"),
        ({"layers": ("layer3.1.conv2",)}, r"layer3\.1\.conv2 has no children"),
        (
            {"layers": ("layer3.0.conv1", "layer3.1.conv2")},
            r"layer3\.0\.conv1 cannot use the kernel of layer3\.1\.conv2: conv2d 256x128x3x3, not",
        ),
        ({"layers": ("fc", "layer3.1.conv2")}, "module order"),
        (
            {"layers": ("layer3.1.conv2", "fc"), "parent": "fc"},
            "fc: kernel_dna takes no linear lay",
        ),
        ({"blocks": ("layer3.2",)}, r"blocks \('layer3\.2',\): allowed is a text"),
        ({"blocks": "layer3.1"}, r"'layer3\.1' cannot be added: it is there already"),
        ({"blocks": "layer3.9"}, r"'layer3\.9' cannot be added: there is no 'layer3\.8' to follow"),
        ({"blocks": "layer3"}, "'layer3' cannot be added: expected a name that ends in a number"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    good = Plan(network("resnet18"), (KernelDNAGroup(**GOOD, width=2),))
    assert good.groups[0].describe() == "r = 2"
    with pytest.raises(PlanError, match=message):
        Plan(network("resnet18"), (KernelDNAGroup(**{**GOOD, "width": 2, **changes}),))


def test_a_block_that_changes_its_input_s_shape_is_not_repeated() -> None:
    layers = ("layer4.0.conv2", "layer4.1.conv2")
    group = KernelDNAGroup("a", layers, "layer4.0.conv2", 2, "layer4.1")
    with pytest.raises(PlanError, match=r"'layer4\.1' cannot be added: layer4\.0 changes its inp"):
        Plan(network("resnet10"), (group,))


def test_a_model_whose_blocks_are_not_last_is_left_as_it_was() -> None:
    plan = published("resnet18", settings("kernel_dna"))
    model: Any = backbone("resnet18")
    model.layer3.add_module("tail", nn.Identity())
    with pytest.raises(PlanError, match=r"'layer3\.2' cannot be added: layer3 has 3 modules"):
        convert_(model, plan)
    assert [len(stage) for stage in (model.layer3, model.layer4)] == [3, 2]
    assert type(model.layer3[0].conv2) is nn.Conv2d


def rules_of(*rules: Rule, **own: Any) -> list[tuple[tuple[str, ...], str, int, str]]:
    return families(published("resnet18", settings("kernel_dna", rules=rules, **own)))


def test_a_layer_that_a_rule_keeps_static_is_in_no_group() -> None:
    first, second, *layer4 = RESNET18_FAMILIES
    fewer = (("layer3.1.conv1",), *first[1:])
    assert rules_of(Rule("layer3.0.*", static=True)) == [fewer, second, *layer4]
    # Without its parent a group is none, and neither without its last child.
    assert rules_of(Rule("layer3.1.conv2", static=True)) == [second, *layer4]
    assert rules_of(Rule("layer3.2.conv1", static=True)) == [first, *layer4]
    assert rules_of(Rule("layer3.*", static=True)) == layer4
    kept = settings("kernel_dna").lay_out(network("resnet18"), frozenset({"layer3.1.conv2"}))
    assert families(kept.as_laid_out()) == [second, *layer4]


def test_a_rule_sets_the_reduction_of_a_group() -> None:
    first, *others = RESNET18_FAMILIES
    rule = Rule(["layer3.0.conv2", "layer3.1.conv1"], reduction=1 / 8)
    assert rules_of(rule) == [(*first[:2], 32, ""), *others]
    plan = published(
        "mobilenetv2_1.0", settings("kernel_dna", rules=Rule("blocks.5.*.conv_pwl", reduction=0.01))
    )
    assert [group.size for group in plan.groups][-2:] == [40, 9]
    wide = published("mobilenetv2_1.0", settings("kernel_dna", project_reduction=1 / 12))
    assert [group.size for group in wide.groups][-2:] == [40, 80]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("layer1.*", dynamic=True), r"rule 1 \(layer1\.\*\): by kernel_dna layers share noth"),
        (Rule("layer1.*", share="one"), "by kernel_dna layers share nothing but what its models"),
        (Rule("layer1.*", ratio=2), "ratio: of another method; by kernel_dna there is reduction"),
        (Rule("layer1.*", reduction=0.5), "the layers are static; by kernel_dna no rule changes"),
        (Rule("layer3.0.*", reduction=0.5), r"all of them, layer3\.1\.conv1 too"),
        (Rule("layer9.*", static=True), r"no convolution or linear layer is named 'layer9\.\*'"),
    ],
)
def test_rules_that_cannot_be_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        rules_of(rule)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match=r"reduction 0: allowed is a number above 0 and at most 1"):
        settings("kernel_dna", reduction=0)
    with pytest.raises(PlanError, match="project_reduction 2: allowed is a number"):
        settings("kernel_dna", project_reduction=2)
    with pytest.raises(PlanError, match="stages -1: allowed is a whole number at least 0"):
        settings("kernel_dna", stages=-1)
    with pytest.raises(PlanError, match="deepen 'no': allowed is true or false"):
        settings("kernel_dna", deepen="no")
    with pytest.raises(PlanError, match="sharing by stage: by kernel_dna"):
        settings("kernel_dna").lay_out(network("resnet18"), stage_sharing={3: "stage"})


def test_why_a_layer_stays_static_is_said() -> None:
    rule = Rule("layer3.1.conv2", static=True)
    found = settings("kernel_dna", rules=rule).why_static(network("resnet18"))
    assert found["conv1"] == "the stem stays static"
    assert found["layer2.0.downsample.0"] == "the shortcut stays static"
    assert found["fc"] == "kernel_dna takes no linear layers"
    assert found["layer2.1.conv2"] == "only the last 2 stages of those that can share kernels"
    assert found["layer3.0.conv1"] == "no other layer of its stage is to have its kernel"
    assert found["layer3.1.conv2"] == "a rule keeps it static (layer3.1.conv2)"
    assert found["layer3.1.conv1"] == "no layer is left to share its kernel with"
    assert found["layer4.1.conv2"] == ""
    found = settings("kernel_dna").why_static(network("mobilenetv2_0.5"))
    assert found["blocks.3.1.conv_dw"] == "depthwise and grouped layers stay static"
    # Also of a plan's network with the blocks that it adds.
    own = settings("kernel_dna", rules=Rule("layer3.2.conv1", reduction=0.5))
    plan = published("resnet18", own)
    assert own.why_static(plan.extended)["layer3.0.conv1"] != ""


def test_layers_that_cannot_be_are_refused() -> None:
    parent = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"parent: a layer is needed that has a kernel of shape"):
        KernelDNAConv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"parent: its kernel is \(8, 8, 3, 3\) in 1 group; expe"):
        KernelDNAConv2d(8, 8, 1, parent=parent)
    with pytest.raises(ValueError, match=r"expected \(8, 4, 3, 3\) in 2 groups"):
        KernelDNAConv2d(8, 8, 3, groups=2, parent=parent)
    with pytest.raises(ValueError, match="width 0: at least 1"):
        KernelDNAConv2d(8, 8, 3, parent=parent, width=0)


def test_a_budget_narrows_all_gates_alike() -> None:
    traced, own = network("resnet18"), settings("kernel_dna")
    # More than was published would be idle.
    assert plan_network(traced, own, params=50_000_000) == published("resnet18", own)
    less = plan_network(traced, own, params=9_000_000)
    assert 8_990_000 < less.cost().params.total <= 9_000_000
    shares = [group.size / group.unit(less.of(group)) for group in less.groups]
    assert max(shares) - min(shares) < 0.05
    assert max(shares) < 1


def test_what_a_budget_cannot_be_is_said() -> None:
    traced, own = network("resnet18"), settings("kernel_dna")
    with pytest.raises(PlanError, match=r"ratio 0\.5: kernel_dna has no ratio.* or total_ratio"):
        plan_network(traced, own, ratio=0.5)
    with pytest.raises(BudgetError, match="gates of width 1 and one kernel a group") as error:
        plan_network(traced, own, params=8_000_000)
    # The settings that go lower do.
    floor = error.value.floor.cost().params.total
    lower = [own.changed(**changes) for changes in own.lower()]
    assert [one.changed(deepen=True, stages=0) for one in lower] == [own, own]
    for one in lower:
        assert one.lay_out(traced).floor().cost().params.total < floor


def test_a_network_without_blocks_has_nothing_to_share() -> None:
    traced = trace(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), (3, 9, 9)
    )
    assert isinstance(traced, Network)
    with pytest.raises(PlanError, match="no layer can be converted"):
        settings("kernel_dna").lay_out(traced)
