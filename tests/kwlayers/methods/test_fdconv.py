"""FDConv: the published counts, its definition sample by sample, and what it starts from."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kwlayers import Plan, PlanError, Rule, convert_, trace
from kwlayers.methods.fdconv import (
    Bins,
    FDConv1d,
    FDConv2d,
    FDConvGroup,
    FrequencyBands,
    frequency_order,
    local_taps,
    low_pass,
)
from kwlayers.plan import Site
from kwlayers.planner import plan_network
from tests.kwlayers.methods.reference import (
    built_counts,
    network,
    oracle,
    plan_of,
    published,
    settings,
)

_RESNET = "ResNet(depth=%s, conv_cfg=<repo config with {'kernel_num': %s}>)"
PUBLISHED: list[tuple[str, dict[str, Any], str]] = [
    ("resnet18", {}, _RESNET % (18, "64")),
    ("resnet50", {"num_kernels": 16}, _RESNET % (50, "16")),
    ("resnet18", {"local": False}, _RESNET % (18, "64, 'use_ksm_local': False")),
    ("resnet18", {"bands": False}, _RESNET % (18, "64, 'use_fbm_if_k_in': []")),
    ("resnet18", {"only_kernel": True}, _RESNET % (18, "64, 'ksm_only_kernel_att': True")),
    ("resnet18", {"param_ratio": 2}, _RESNET % (18, "64, 'param_ratio': 2")),
    # Without effect: there is no layer of another size in its blocks.
    ("resnet18", {}, _RESNET % (18, "64, 'use_fdconv_if_k_in': [3]")),
]
# From the specification's digest, which the published code was run for, too.
DIGEST: list[tuple[str, dict[str, Any], int, int]] = [("resnet50", {}, 27_155_152, 4_252_988_080)]
CASES = [(name, own, *oracle("FDConv", made)) for name, own, made in PUBLISHED] + DIGEST
# The published networks end before it.
LAST = {"resnet18": 512 * 1000, "resnet50": 2048 * 1000}


@pytest.mark.parametrize(("name", "own", "params", "macs"), CASES)
def test_counts_are_those_of_the_published_code(
    name: str, own: dict[str, Any], params: int, macs: int
) -> None:
    plan = published(name, settings("fdconv", **own))
    cost = plan.cost()
    assert cost.params.total == params + LAST[name] + 1000
    # It multiplies element by element, which nobody counts.
    assert cost.macs.total - cost.macs.modulation == macs + LAST[name]
    assert cost.macs.mixing == 0


@pytest.mark.parametrize(
    ("name", "own", "params", "macs"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_so_are_those_of_the_built_network(
    name: str, own: dict[str, Any], params: int, macs: int
) -> None:
    plan = published(name, settings("fdconv", **own))
    assert built_counts(name, plan) == (params + LAST[name] + 1000, macs + LAST[name])


def test_a_rule_makes_a_layer_wider_than_others_under_a_budget_too() -> None:
    rule = Rule(["layer4.0.conv2"], reduction=1 / 4)
    traced = network("resnet18")
    even = plan_network(traced, settings("fdconv"), params=12_500_000)
    ruled = plan_network(traced, settings("fdconv", rules=rule), params=12_500_000)
    widths = [{group.name: group.width for group in plan.groups} for plan in (even, ruled)]
    name = "layer4_0_conv2"
    others = [other for other in widths[0] if other != name]
    # Four times 1/16 of its channels, and the same for all: by rounding nearly so.
    assert widths[1][name] / widths[1]["layer4_1_conv1"] == pytest.approx(4, rel=0.05)
    assert widths[0][name] == pytest.approx(widths[0]["layer4_1_conv1"], rel=0.05)
    assert all(widths[1][other] <= widths[0][other] for other in others)


FROZEN, _ = oracle(
    "FDConv",
    "ResNet(depth=50, conv_cfg=<repo config with kernel_num=64>, frozen_stages=1)  # as in configs",
)


def test_the_published_configs_of_detection_have_as_many_parameters() -> None:
    total = published("resnet50", settings("fdconv")).cost().params.total
    assert total == FROZEN + LAST["resnet50"] + 1000


def test_parts_are_those_of_the_specification() -> None:
    def params(**own: Any) -> Any:
        return published("resnet50", settings("fdconv", **own)).cost().params

    whole = params()
    static = {site.name: site.weights for site in network("resnet50").sites}
    plan = published("resnet50", settings("fdconv"))
    dynamic = sum(static[name] for group in plan.groups for name in group.layers)
    assert whole.kernels - dynamic == 60_416
    assert whole.total - params(local=False).total == 311_296
    assert whole.total - params(bands=False).total == 102_000
    assert params(local=False, bands=False).attention == 3_173_408


@pytest.mark.parametrize(
    ("layer", "products"),
    [
        # 64 channels on 56 x 56: 192 rows of 97 bins; three factors on the kernel; bands.
        ("layer1.0.conv1", 2 * 192 * 97 + 3 * 36_864 + 3 * 64 * 3136),
        # 512 channels on 7 x 7: channels and filters are weighted on maps, which are smaller.
        ("layer4.1.conv1", 2 * 1536 * 769 + 2 * 2_359_296 + 2 * 512 * 49 + 3 * 512 * 49),
        # From 14 x 14 to 7 x 7.
        (
            "layer4.0.conv1",
            2 * 1536 * 385 + 2 * 1_179_648 + 256 * 196 + 512 * 49 + 3 * 256 * 196,
        ),
    ],
)
def test_modulation_is_counted_by_hand(layer: str, products: int) -> None:
    costs = {row.name: row for row in published("resnet18", settings("fdconv")).cost_by_layer()}
    assert costs[layer].modulation_macs == products


class _Products(TorchDispatchMode):
    """Elements of products of two tensors, of which one is larger than `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and all(isinstance(a, Tensor) for a in args):
            self.count += out.numel() if out.numel() > self.least else 0
        return out


@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize(
    "own",
    [{}, {"local": False}, {"bands": False}, {"only_kernel": True}, {"param_ratio": 2}],
    ids=str,
)
def test_modulation_is_what_a_layer_multiplies(own: dict[str, Any], size: int) -> None:
    layer = FDConv2d(32, 24, 3, padding=1, num_kernels=8, **own).eval()
    with torch.no_grad(), _Products(32 * 9) as products:  # channels and positions make one factor
        layer(torch.randn(1, 32, size, size))
    places = size * size
    site = Site(
        "a", "conv2d", 32, 24, (3, 3), positions=places, in_positions=places, out_positions=places
    )
    (cost,) = FDConvGroup("a", ("a",), 16, 8, **own).costs([site])
    assert products.count == cost.modulation_macs


def randomised(layer: Any) -> Any:
    """With no factor near 1, and statistics of norms."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return layer.eval()


def twice(logits: Any) -> Any:
    return 2 / (1 + np.exp(-logits))


def defined_groups(rows: int, columns: int, num_kernels: int) -> Any:
    """(rows, columns // 2 + 1): the group of each bin, 0 with the lowest frequencies."""
    radius = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    order = np.argsort(radius.round(12).ravel(), kind="stable")
    found = np.empty(order.size, dtype=int)
    found[order] = np.arange(order.size) * num_kernels // order.size
    return found.reshape(radius.shape)


def defined_kernel(layer: Any, sample: Any) -> Any:
    """The kernel of one sample (C, *S), in float64, by loops."""
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    outputs, channels, *sizes = layer.geometry.kernel
    high, wide = (1, *sizes)[-2:]
    places = high * wide
    mean = sample.reshape(channels, -1).mean(1)
    hidden = state["attention.fc1.weight"] @ mean
    if "attention.norm.running_mean" in state:
        centre, spread = (state[f"attention.norm.running_{s}"] for s in ("mean", "var"))
    else:
        hidden = hidden + state["attention.fc1.bias"]
        centre, spread = hidden.mean(), hidden.var()
    hidden = (hidden - centre) / np.sqrt(spread + 1e-5)
    hidden = hidden * state["attention.norm.weight"] + state["attention.norm.bias"]
    z = state["attention.scale"] * np.maximum(hidden, 0) ** 2 + state["attention.shift"]
    seen = twice(state["attention.fc2.weight"] @ z + state["attention.fc2.bias"])
    spectra = state["spectrum"]
    copies = len(spectra)
    weighted = copies * layer.num_kernels if copies * layer.num_kernels > 1 else 0
    by_channel, by_filter, by_place = np.ones(channels), np.ones(outputs), np.ones(places)
    if len(seen) > weighted:
        by_channel, by_filter = seen[:channels], seen[channels : channels + outputs]
        by_place = seen[channels + outputs : len(seen) - weighted] if places > 1 else by_place
    by_group = np.ones((copies, layer.num_kernels))
    if weighted:
        by_group = seen[len(seen) - weighted :].reshape(copies, -1)
    groups = defined_groups(outputs * high, channels * wide, layer.num_kernels)
    total = np.zeros(groups.shape, dtype=complex)
    for spectrum, factors in zip(spectra, by_group / copies, strict=True):
        total += (spectrum[..., 0] + 1j * spectrum[..., 1]) * factors[groups]
    total *= min(channels, outputs) // 2
    matrix = np.fft.irfft2(total, s=(outputs * high, channels * wide))
    by_weight = np.ones((outputs, places, channels))
    if "attention.local.weight" in state:
        normed = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
        normed = normed * state["attention.local_norm.weight"] + state["attention.local_norm.bias"]
        taps = state["attention.local.weight"].reshape(outputs, places, -1)
        near = np.pad(normed, taps.shape[-1] // 2)
        windows = [near[c : c + taps.shape[-1]] for c in range(channels)]
        by_weight = twice(np.einsum("opt,ct->opc", taps, np.array(windows)))
    kernel = np.empty((outputs, channels, high, wide))
    for o, c, i, j in np.ndindex(kernel.shape):
        place = i * wide + j
        kernel[o, c, i, j] = matrix[o * high + i, c * wide + j] * by_weight[o, place, c]
        kernel[o, c, i, j] *= by_channel[c] * by_filter[o] * by_place[place]
    return kernel.reshape(layer.geometry.kernel)


def defined_bands(bands: FrequencyBands, x: Tensor) -> Tensor:
    """Weighted octaves, by full transforms."""
    size = x.shape[2:]
    axes = tuple(range(2, x.dim()))
    factors = twice(bands.conv(x).detach().numpy())
    spectrum = np.fft.fftn(x.numpy(), axes=axes)
    cycles = np.meshgrid(*(np.abs(np.fft.fftfreq(n, 1 / n)) / n for n in size), indexing="ij")
    highest = np.maximum.reduce(cycles)
    out, rest = np.zeros(x.shape), x.numpy()
    for number, kept in enumerate((highest < 0.25, highest <= 0.125, highest <= 0.0625)):
        low = np.fft.ifftn(spectrum * kept, axes=axes).real
        out += (rest - low) * factors[:, number : number + 1]
        rest = low
    return torch.from_numpy(out + rest)


DEFINED: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (FDConv2d, (6, 4, 3), {}),
    (FDConv2d, (4, 6, 3), {"param_ratio": 2, "num_kernels": 3}),
    (FDConv2d, (6, 4, 3), {"local": False, "bands": False}),
    (FDConv2d, (6, 4, 3), {"only_kernel": True, "norm": "layer"}),
    (FDConv2d, (6, 4, 1), {"bias": False}),
    (FDConv2d, (6, 4, 1), {"num_kernels": 1, "local": False}),
    (FDConv2d, (5, 4, 3), {"width": 3, "stride": 2, "padding": 1}),
    (FDConv2d, (4, 4, (1, 3)), {"bands": True}),
    (FDConv1d, (6, 4, 3), {}),
]


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize(("kind", "sizes", "own"), DEFINED, ids=str)
def test_it_is_the_definition_sample_by_sample(
    kind: Any, sizes: tuple[int, ...], own: dict[str, Any], size: int
) -> None:
    layer = randomised(kind(*sizes, **{"num_kernels": 4, "dtype": torch.float64, **own}))
    x = torch.randn(3, sizes[0], *(size, 4)[: layer.rank], dtype=torch.float64)
    seen = x if layer.bands is None else defined_bands(layer.bands, x)
    conv = (F.conv1d, F.conv2d)[layer.rank - 1]
    for b in range(3):
        kernel = torch.from_numpy(defined_kernel(layer, x[b].numpy()))
        expected = conv(seen[b : b + 1], kernel, layer.bias, *layer.geometry[1:])
        torch.testing.assert_close(layer(x)[b : b + 1], expected, rtol=1e-10, atol=1e-10)


def test_channels_are_weighted_on_kernels_and_on_maps() -> None:
    """Of the layers above, as the maps are large or small."""
    heads = FDConv2d(6, 4, 3, num_kernels=4).attention.heads
    assert not heads.on_maps((4, 6, 3, 3), 16 * 4, True)
    assert heads.on_maps((4, 6, 3, 3), 5 * 4, True)
    alone = FDConv2d(6, 4, 1, num_kernels=1).attention.heads
    assert alone.on_maps((4, 6, 1, 1), 1, True)
    assert not alone.on_maps((4, 6, 1, 1), 1, False)


@pytest.mark.parametrize(
    ("kernel", "num_kernels"), [((8, 6, 3, 3), 8), ((4, 7, 5), 4), ((16, 12, 1, 1), 7)], ids=str
)
def test_groups_are_disjoint_and_equal_with_the_lowest_frequencies_first(
    kernel: tuple[int, ...], num_kernels: int
) -> None:
    bins = Bins.of(kernel)
    order = frequency_order(bins)
    assert sorted(order.tolist()) == list(range(bins.total))
    groups = order.view(num_kernels, -1)
    radius = np.hypot(np.fft.fftfreq(bins.rows)[:, None], np.fft.rfftfreq(bins.columns)[None])
    sorted_radii = radius.ravel()[groups.numpy()]
    assert (sorted_radii[:-1].max(1) <= sorted_radii[1:].min(1) + 1e-12).all()
    assert order[0] == 0
    # Bins of one radius keep their order: +f before -f.
    later = np.diff(sorted_radii.ravel()) < 1e-12
    assert later.any()
    assert (np.diff(order.numpy())[later] > 0).all()


def test_the_order_is_saved_with_the_weights() -> None:
    layer, other = (FDConv2d(4, 4, 3, num_kernels=4, dtype=torch.float64).eval() for _ in "ab")
    randomised(layer).order.copy_(layer.order.flip(0))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    other.order.copy_(layer.order.flip(0))
    assert not torch.allclose(other(x), layer(x))


def test_masks_are_exact_at_any_size() -> None:
    def kept(*size: int) -> list[int]:
        return [int(low_pass(size, octave).sum()) for octave in (2, 4, 8)]

    assert kept(56, 56) == [378, 120, 28]
    assert kept(14, 14) == [28, 6, 1]
    assert kept(16) == [4, 3, 2]


@pytest.mark.parametrize("size", [(7, 12), (8, 8), (1, 1), (11,)], ids=str)
def test_neutral_bands_add_up_to_the_input(size: Sequence[int]) -> None:
    bands = FrequencyBands(3, len(size), dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(bands(x), x, rtol=1e-4, atol=1e-4)
    bands.neutral_()
    torch.testing.assert_close(bands(x), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("cycles", "band"), [(8, 0), (5, 0), (4, 0), (3, 1), (2, 2), (1, None), (0, None)]
)
def test_a_wave_is_weighted_by_its_octave(cycles: int, band: int | None) -> None:
    """Of 16 positions: 4 cycles are a frequency of 1/4."""
    bands = FrequencyBands(2, 1, dtype=torch.float64)
    bands.neutral_()
    bands.conv.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    wave = torch.cos(2 * math.pi * cycles * torch.arange(16, dtype=torch.float64) / 16)
    factor = 1.0 if band is None else 2 / (1 + math.exp(-1.0 - band))
    x = wave.expand(1, 2, 16)
    torch.testing.assert_close(bands(x), factor * x, rtol=1e-12, atol=1e-12)


def own_kernel(layer: Any) -> Tensor:
    """What the spectrum stands for, the mean of all copies."""
    outputs, channels, *sizes = layer.geometry.kernel
    scale = min(outputs, channels) // 2
    spectrum = torch.view_as_complex(layer.spectrum.detach().mean(0).contiguous()) * scale
    matrix = torch.fft.irfft2(spectrum, s=(outputs * sizes[0], channels * sizes[1]))
    return matrix.view(outputs, sizes[0], channels, sizes[1]).transpose(1, 2)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_it_starts_as_the_plain_convolution(size: int, copies: int) -> None:
    torch.manual_seed(0)
    layer = FDConv2d(48, 64, size, 2, 1, param_ratio=copies, num_kernels=32, dtype=torch.float64)
    x = torch.randn(4, 48, 9, 9, dtype=torch.float64).relu()  # positive, as after an activation
    kernel = own_kernel(layer)
    assert kernel.std() == pytest.approx(math.sqrt(2 / (64 * size * size)), rel=0.05)
    expected = F.conv2d(x, kernel, layer.bias, 2, 1)
    for mode in (True, False):
        error = (layer.train(mode)(x) - expected).norm() / expected.norm()
        assert 0 < error < 1e-4
    layer.neutral_()
    assert (layer(x) - expected).norm() / expected.norm() < 1e-9


class Net(nn.Module):
    """A stem, layers of 24 and 20 channels, a narrow and a grouped one, a head."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24) if norm else nn.Identity()
        self.a = nn.Conv2d(24, 24, 3, 2, 1, bias=False)
        self.b = nn.Conv2d(24, 20, 1)
        self.c = nn.Conv2d(20, 20, 3, padding=1, groups=2)
        self.d = nn.Conv2d(20, 16, 1)
        self.e = nn.Conv2d(16, 20, 5)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for layer in (self.a, self.b, self.c, self.d, self.e):
            x = torch.relu(layer(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def net(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Net(norm).double().eval()


@pytest.mark.parametrize("own", [{}, {"param_ratio": 3}, {"norm": "layer"}], ids=str)
def test_a_warm_start_is_the_static_network_and_no_dead_end(own: dict[str, Any]) -> None:
    model = net()
    model.b.weight.requires_grad_(False)
    plan = plan_of(model, settings("fdconv", **own))
    made: Any = convert_(copy.deepcopy(model), plan, warm_start=True)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    expected = model(x)
    assert (made(x) - expected).norm() / expected.norm() < 1e-9
    assert not made.b.spectrum.requires_grad
    made(x).square().sum().backward()
    for part in (made.a.attention.fc2, made.a.attention.local, made.a.bands.conv):
        assert part.weight.grad.abs().max() > 0
    copies = made.a.spectrum
    assert all(not torch.allclose(copies[0], other) for other in copies[1:])


def test_kernels_that_do_not_divide_become_the_largest_divisor_below() -> None:
    """a has 72 x 37 bins, which 64 does not divide, b 20 x 13."""
    plan = plan_of(net(), settings("fdconv"))
    found = {group.layers[0]: group.num_kernels for group in plan.groups}
    assert found == {"a": 37, "b": 52}
    assert plan.notes[-1] == "num_kernels 64 does not divide the frequencies of a (37), b (52)"
    assert [group.describe() for group in plan.groups] == ["A = 16, K = 37", "A = 16, K = 52"]
    even = plan_of(net(), settings("fdconv", num_kernels=4))
    assert [group.num_kernels for group in even.groups] == [4, 4]
    assert not any("divide" in note for note in even.notes)
    with pytest.raises(ValueError, match=r"num_kernels 64: .* divide the 46,240 .*, as 40 does"):
        FDConv2d(576, 160, 1)
    assert FDConv2d(576, 160, 1, num_kernels=40, device="meta").num_kernels == 40


def test_why_layers_stay_static() -> None:
    found = settings("fdconv").why_static(trace(net(), (3, 12, 12)))
    assert found == {
        "stem": "the stem stays static",
        "a": "",
        "b": "",
        "c": "fdconv takes no grouped convolutions",
        "d": "it has fewer than 17 channels in or out",
        "e": "its kernel is not of size 1 or 3",
        "head": "fdconv takes no linear layers",
    }
    with pytest.raises(PlanError, match="c cannot be converted: fdconv takes no grouped"):
        plan_of(net(), settings("fdconv", rules=Rule("c", dynamic=True)))
    with pytest.raises(ValueError, match="groups 2: fdconv takes no grouped"):
        FDConv2d(4, 4, 3, groups=2)
    cube = Site("a", "conv3d", 32, 32, (3, 3, 3))
    assert settings("fdconv").refuses(cube) == "fdconv takes no conv3d layers"


def test_rules_make_other_layers_dynamic_and_attentions_wider() -> None:
    rules = [Rule(["stem", "d", "e"], dynamic=True), Rule("a", reduction=1.0)]
    plan = plan_of(net(), settings("fdconv", rules=rules))
    found = {group.layers[0]: (group.width, group.bands) for group in plan.groups}
    assert found == {
        "stem": (16, True),
        "a": (24, True),
        "b": (16, False),
        "d": (16, False),
        "e": (16, False),
    }
    made = convert_(net(), plan, warm_start=True)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(made(x), net()(x), rtol=1e-9, atol=1e-9)


def test_layer_norms_have_a_bias_before_them() -> None:
    automatic = plan_of(net(norm=False), settings("fdconv"))
    batch = plan_of(net(norm=False), settings("fdconv", norm="batch"))
    assert {group.norm for group in automatic.groups} == {"layer"}
    assert automatic.cost().params.total - batch.cost().params.total == 16 + 16
    convert_(net(norm=False), automatic)  # which checks the number


def test_a_budget_decides_the_widths() -> None:
    traced = network("resnet18")
    plan = plan_network(traced, settings("fdconv"), params=12_500_000)
    assert 12_499_000 < plan.cost().params.total <= 12_500_000
    usual = published("resnet18", settings("fdconv"))
    assert all(a.width > b.width for a, b in zip(plan.groups, usual.groups, strict=True))
    assert {group.unit(plan.of(group)) for group in plan.groups} == {16, 32}
    with pytest.raises(PlanError, match=r"ratio 0\.5: fdconv has no ratio.*give params"):
        plan_network(traced, settings("fdconv"), ratio=0.5)
    with pytest.raises(PlanError, match="one spectrum a layer"):
        plan_network(traced, settings("fdconv"), params=1_000_000)


def test_a_small_workspace_makes_kernels_one_by_one_with_the_same_gradients() -> None:
    layers = [
        randomised(FDConv2d(6, 4, 3, num_kernels=4, workspace_mb=mb, dtype=torch.float64))
        for mb in (None, 1e-6)
    ]
    x = torch.randn(5, 6, 8, 8, dtype=torch.float64)
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for out in outputs:
        out.square().sum().backward()
    pairs = zip(*(layer.named_parameters() for layer in layers), strict=True)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-10, msg=name)
    with pytest.raises(ValueError, match="workspace_mb 0"):
        FDConv2d(6, 4, 3, num_kernels=4, workspace_mb=0)


def test_an_empty_batch_has_an_empty_result() -> None:
    layer = FDConv2d(6, 4, 3, num_kernels=4)
    out = layer.eval()(torch.zeros(0, 6, 5, 5))
    assert out.shape == (0, 4, 3, 3)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_taps_grow_with_the_channels() -> None:
    assert [local_taps(c) for c in (16, 48, 64, 960, 1024, 2048)] == [3, 3, 5, 5, 7, 7]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_kernels": 0}, "num_kernels 0: allowed is a whole number at least 1"),
        ({"param_ratio": 1.5}, "param_ratio 1.5: allowed is a whole number"),
        ({"reduction": 0}, "reduction 0: allowed is a number above 0"),
        ({"local": 1}, "local 1: allowed is true or false"),
        ({"norm": "group"}, "norm 'group': allowed is 'auto' or 'batch' or 'layer'"),
        ({"only_kernel": True, "num_kernels": 1}, "no head of the attention is left, local or not"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(own: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        settings("fdconv", **own)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"layers": ["b"], "num_kernels": 3}, "num_kernels 3: it must divide the 260 frequencies"),
        ({"layers": ["a", "b"]}, "2 layers: by fdconv each has a group of its own"),
        ({"layers": ["c"]}, "c: fdconv takes no grouped convolutions"),
        ({"layers": ["head"]}, "head: fdconv takes no linear layers"),
        (
            {"layers": ["b"], "num_kernels": 1, "only_kernel": True},
            "no head of the attention is left, local or not",
        ),
        ({"layers": ["b"], "norm": "group"}, "norm 'group'"),
    ],
    ids=str,
)
def test_groups_that_cannot_be(group: dict[str, Any], message: str) -> None:
    data = {"method": "fdconv", "name": "one", "width": 16, "num_kernels": 4, **group}
    with pytest.raises(PlanError, match=message):
        Plan.from_groups(trace(net(), (3, 12, 12)), [data])


def test_a_layer_without_any_attention_left_is_refused() -> None:
    """It has 1 x 2 bins; of one group each, with K = 1."""
    one = Site("a", "conv2d", 1, 1, (1, 1))
    assert "one group only" in settings("fdconv", only_kernel=True).refuses(one)
    assert settings("fdconv").refuses(one) == ""
    assert settings("fdconv", only_kernel=True, param_ratio=2).refuses(one) == ""
