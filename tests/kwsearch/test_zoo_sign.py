"""The sign language networks: VAC's parts and counts, padded batches, and free supervision."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kwlayers import Rule, convert_, methods, plan_model, plan_network, trace
from kwlayers.conv import KWConv1d, KWConv2d
from kwlayers.sr_ctc import SRCTCLoss, Tap
from kwsearch import zoo
from kwsearch.networks import build_model
from kwsearch.recount import recount_plan
from kwsearch.zoo import resnet, sign

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BUILDERS = {"sign_resnet18": sign.sign_resnet18, "sign_resnet34": sign.sign_resnet34}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(dcac: bool = False, num_classes: int = 7) -> sign.SignNet:
    """Of a sixteenth of the width, in double precision, no parameter or statistic at its start."""
    torch.manual_seed(0)
    model = sign.sign_resnet18(num_classes, width=1 / 16, dcac=dcac).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.add_(0.2 * torch.randn_like(module.weight))
                module.bias.add_(0.2 * torch.randn_like(module.bias))
        for name, parameter in model.dcac.named_parameters():
            if ".modulation." in name:
                parameter.normal_(std=0.2)
    return model


def videos(*size: int, frames: int = 24, side: int = 32) -> Tensor:
    return torch.randn(*(size or (2,)), 3, frames, side, side, dtype=torch.float64)


def rows_of(frames: int) -> int:
    """The length map, step by step."""
    return ((frames - 4) // 2 - 4) // 2


# What the networks are


@pytest.mark.parametrize(
    ("name", "trunk"), [("sign_resnet18", 11_176_512), ("sign_resnet34", 21_284_672)]
)
def test_parts_have_the_parameters_of_vacs_modules(name: str, trunk: int) -> None:
    with torch.device("meta"):
        model = BUILDERS[name]()
    parts = (model.conv2d, model.conv1d, model.temporal_model, model.classifier)
    assert [count(part) for part in parts] == [trunk, 7_870_464, 12_599_296, 1_327_104]
    assert count(model) == trunk + 7_870_464 + 12_599_296 + 1_327_104


def test_dcac_adds_its_two_blocks() -> None:
    with torch.device("meta"):
        plain, dynamic = sign.sign_resnet18(), sign.sign_resnet18(dcac=True)
    # C = 512 as in the specification; C = 256 by the same formula.
    assert count(dynamic) - count(plain) == 792_960 + 199_872


def test_the_trunk_is_the_zoos_resnet_without_its_classifier() -> None:
    with torch.device("meta"):
        ours = sign.sign_resnet34().conv2d.state_dict()
        whole = resnet.resnet34().state_dict()
    assert [*ours] == [key for key in whole if not key.startswith("fc.")]


@pytest.mark.parametrize("frames", [16, 17, 18, 19, 20, 27])
def test_rows_of_logits_are_as_many_as_the_length_map_says(frames: int) -> None:
    model = small()
    with torch.no_grad():
        out = model(videos(1, frames=frames))
    assert out.shape == (rows_of(frames), 1, 7)
    assert model.output_lengths(torch.tensor(frames)) == rows_of(frames)


def test_160_frames_make_37_rows() -> None:
    lengths = torch.arange(16, 400)
    expected = [rows_of(frames) for frames in lengths.tolist()]
    assert sign.SignNet.output_lengths(lengths).tolist() == expected
    assert expected[160 - 16] == 37


def test_channels_classes_and_width_are_free() -> None:
    model = sign.sign_resnet34(num_classes=9, in_channels=1, width=0.1)
    assert model(torch.randn(2, 1, 16, 32, 32)).shape == (1, 2, 9)
    assert model.tap_widths == {
        "layer1": 6, "layer2": 13, "layer3": 26, "layer4": 51, "conv1d": 102
    }  # fmt: skip


def test_outputs_are_those_of_the_same_layers_of_torchvision_and_torch(
    torchvision_models: ModuleType,
) -> None:
    torch.manual_seed(0)
    model = sign.sign_resnet18(num_classes=11).double().eval()
    frames = torchvision_models.resnet18(weights=None)
    frames.fc = nn.Identity()
    frames.double().eval().load_state_dict(model.conv2d.state_dict())
    temporal = nn.Sequential(
        nn.Conv1d(512, 1024, 5), nn.BatchNorm1d(1024), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(1024, 1024, 5), nn.BatchNorm1d(1024), nn.ReLU(), nn.MaxPool1d(2),
    )  # fmt: skip
    temporal.double().eval().load_state_dict(model.conv1d.temporal_conv.state_dict())
    recurrent = nn.LSTM(1024, 512, 2, bidirectional=True).double()
    recurrent.load_state_dict(model.temporal_model.rnn.state_dict())
    assert {key.split(".")[0] for key in model.state_dict()} == {
        "conv2d", "conv1d", "temporal_model", "classifier"
    }  # fmt: skip

    x = videos(1, frames=21)
    with torch.no_grad():
        rows = temporal(frames(x[0].transpose(0, 1)).T[None]).permute(2, 0, 1)
        matrix = model.classifier.weight
        expected = recurrent(rows)[0] @ (matrix / matrix.square().sum(0).sqrt())
        actual = model(x)
    assert actual.shape == (rows_of(21), 1, 11)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_a_new_network_with_dcac_is_the_one_without() -> None:
    torch.manual_seed(0)
    plain = sign.sign_resnet18(7, width=1 / 16).double().eval()
    dynamic = sign.sign_resnet18(7, width=1 / 16, dcac=True).double().eval()
    missing = dynamic.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("dcac.layer") for key in missing.missing_keys)
    x, lengths = videos(), torch.tensor([24, 17])
    with torch.no_grad():
        torch.testing.assert_close(dynamic(x, lengths), plain(x, lengths), **EXACT)


# Batches of videos of different lengths


@pytest.mark.parametrize("dcac", [False, True])
def test_a_padded_batch_gives_every_video_what_it_gets_alone(dcac: bool) -> None:
    model = small(dcac)
    lengths = torch.tensor([17, 24, 20])  # the longest is not the first
    x = videos(3)
    for video, length in zip(x, lengths, strict=True):
        video[:, length:] = torch.nan
    taps = ("layer3", "layer4", "conv1d")
    with torch.no_grad():
        together = model.features(x, lengths, taps)
        assert together.lengths.tolist() == [1, 3, 2]
        torch.testing.assert_close(model(x, lengths), together.logits)
        for b, length in enumerate(lengths.tolist()):
            alone = model.features(x[b : b + 1, :, :length], None, taps)
            rows = int(alone.lengths)
            pairs = [(together.logits, alone.logits)]
            pairs += [(together.taps[name], alone.taps[name]) for name in taps]
            for joint, single in pairs:
                torch.testing.assert_close(joint[:rows, b : b + 1], single, **EXACT)


@pytest.mark.parametrize("method", ["kernel_warehouse", "dyconv", "odconv", "dcd"])
def test_so_it_does_where_convolutions_over_time_are_dynamic(method: str) -> None:
    model = small()
    rules, wanted = (Rule(["conv2d.*"], static=True),), {"ratio": 1.0}
    settings: dict[str, Any] = {}
    if method == "dcd":  # by itself it takes none of them, and no ratio; four means a channel
        rules, wanted = (*rules, Rule(["conv1d.*"], dynamic=True)), {}
        settings = {"variant": "mobilenet"}
    plan = plan_network(
        trace(model, (3, 24, 32, 32)),
        methods.find(method).settings(rules=rules, **settings),
        **wanted,
    )
    assert all("conv1d" in name for group in plan.groups for name in group.layers)
    torch.manual_seed(1)
    convert_(model, plan).eval()
    lengths = torch.tensor([17, 24, 20])
    x = videos(3)
    with torch.no_grad():
        together = model(x, lengths)
        for b, length in enumerate(lengths.tolist()):
            alone = model(x[b : b + 1, :, :length])
            torch.testing.assert_close(together[: len(alone), b : b + 1], alone, **EXACT)
        assert not torch.allclose(together[:1], model(x)[:1])  # padding would be pooled


@pytest.mark.parametrize("dcac", [False, True])
def test_norms_in_training_do_not_see_padding(dcac: bool) -> None:
    states = []
    for padding in (0, 5):
        model = small(dcac).train()
        model.temporal_model.rnn.dropout = 0.0
        torch.manual_seed(1)
        x = nn.functional.pad(videos(), (0, 0, 0, 0, 0, padding), value=3.0)
        out = model(x, torch.tensor([24, 20]))
        states.append((out[: rows_of(24)], model.state_dict()))
    torch.testing.assert_close(states[0], states[1], **EXACT)


# Taps


@pytest.mark.parametrize("dcac", [False, True])
def test_a_row_of_every_tap_sees_the_same_16_frames(dcac: bool) -> None:
    model = small(dcac)
    if dcac:  # which sees further, but by this
        for name, parameter in model.dcac.named_parameters():
            if ".norm." in name:
                nn.init.zeros_(parameter)
    x = videos(1, frames=40)
    other = x.clone()
    other[:, :, 20] += 1
    taps = ("layer1", "layer4", "conv1d")
    with torch.no_grad():
        before, after = model.features(x, taps=taps), model.features(other, taps=taps)
    assert set(before.taps) == set(before.tap_lengths) == set(taps)
    for name in taps:
        assert before.taps[name].shape == (rows_of(40), 1, model.tap_widths[name])
        assert before.tap_lengths[name].tolist() == [rows_of(40)]
        changed = (before.taps[name] != after.taps[name]).any(2)[:, 0].nonzero()[:, 0]
        # Row t sees frames 4t to 4t + 15.
        assert changed.tolist() == [2, 3, 4, 5]


def test_a_tap_of_a_stage_is_its_mean_over_positions_and_16_frames() -> None:
    model = small()
    maps: list[Tensor] = []
    model.conv2d.layer4.register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.no_grad():
        tap = model.features(videos(1, frames=22), taps=["layer4"]).taps["layer4"]
    (frames,) = maps
    assert frames.shape[0] == 22
    for row in range(2):
        expected = frames[4 * row : 4 * row + 16].mean((0, 2, 3))
        torch.testing.assert_close(tap[row, 0], expected, **EXACT)


def loss_of(model: sign.SignNet) -> SRCTCLoss:
    widths = model.tap_widths
    taps = {
        "conv1d": Tap(widths["conv1d"], distillation=10.0),
        "layer4": Tap(widths["layer4"], 0.5, 0.0),
    }
    return SRCTCLoss(taps, features=widths["conv1d"])


def test_a_step_of_training_reaches_every_parameter() -> None:
    model = small(dcac=True).train()
    loss = loss_of(model).double()
    found = model.features(videos(), torch.tensor([24, 20]))
    targets, target_lengths = torch.tensor([[1, 2], [6, 0]]), torch.tensor([2, 1])
    total, parts = loss(*found, model.classifier, targets, target_lengths)
    assert set(parts) == {"ctc", "ctc/conv1d", "kl/conv1d", "ctc/layer4"}
    total.backward()
    named = [*model.named_parameters(), *loss.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.isfinite().all()] == []
    assert math.isfinite(total.item())


class Operators(TorchDispatchMode):
    """The names of everything that torch runs, and the shapes that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(out.shape) if isinstance(out, Tensor) else None))
        return out


def test_supervision_of_taps_leaves_inference_as_it_was() -> None:
    def inference(model: sign.SignNet) -> tuple[int, list[str], list[tuple[str, Any]]]:
        with torch.no_grad(), Operators() as operators:
            model.eval()(x)
        return count(model), [*model.state_dict()], operators.seen

    x = videos(1, frames=20)
    model = small()
    before = inference(model)
    assert len(before[2]) > 60
    loss = loss_of(model).double()
    total, _ = loss(
        *model.train().features(x), model.classifier, torch.tensor([[1]]), torch.tensor([1])
    )
    total.backward()
    assert inference(model) == before
    with torch.no_grad(), Operators() as operators:
        model.features(x, taps=["layer4"])
    pools = [
        [name for name, _ in seen if "avg_pool" in name] for seen in (before[2], operators.seen)
    ]
    assert list(map(len, pools)) == [0, 1]  # only a tap is pooled over time


# Planning


def test_tracing_counts_the_multiply_adds_of_every_part() -> None:
    with torch.device("meta"):
        model = sign.sign_resnet18()
    network = trace(model, (3, 32, 64, 64))
    # The trunk at 224x224 as published, without its classifier; at 64x64 by the positions.
    trunk = 32 * (1_814_073_344 - 512_000) * 64**2 // 224**2
    temporal = 28 * 512 * 1024 * 5 + 10 * 1024 * 1024 * 5
    recurrent = 2 * 2 * 5 * 4 * 512 * (1024 + 512)  # layers, directions, rows: 4h(d + h) each
    assert network.macs == trunk + temporal + recurrent + 5 * 1024 * 1296
    assert network.params == 11_176_512 + 7_870_464 + 12_599_296 + 1_327_104
    assert len(network.sites) == 20 + 2
    assert {other.name for other in network.others} == {"temporal_model.rnn", "classifier"}


@pytest.mark.parametrize("dcac", [False, True])
def test_kernel_warehouse_shares_one_budget_over_images_and_time(dcac: bool) -> None:
    torch.manual_seed(0)
    model = sign.sign_resnet18(7, width=1 / 8, dcac=dcac)
    budget = 2 * count(model)
    sharing = {
        "images": ["conv2d.layer*.conv*"],
        "time": ["conv1d.temporal_conv.*"],
    }
    plan = plan_model(model, (3, 32, 64, 64), params=budget, sharing=sharing, cell_ratio=(0.5, 0.5))
    assert {group.name: len(group.layers) for group in plan.groups} == {"images": 16, "time": 2}
    assert 0.99 * budget < plan.cost().params.total <= budget
    convert_(model, plan)
    assert count(model) == plan.cost().params.total
    assert sum(isinstance(module, KWConv2d) for module in model.modules()) == 16
    assert sum(isinstance(module, KWConv1d) for module in model.modules()) == 2

    x = torch.randn(2, 3, 20, 32, 32)
    loss = loss_of(model)
    found = model.train().features(x, torch.tensor([20, 16]))
    total, _ = loss(*found, model.classifier, torch.tensor([1, 2]), torch.tensor([1, 1]))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_by_default_all_but_the_stem_is_dynamic_as_the_head_is_no_convolution() -> None:
    with torch.device("meta"):
        model = sign.sign_resnet18(dcac=True)
    plan = plan_model(model, (3, 32, 64, 64), ratio=1)
    converted = {layer for group in plan.groups for layer in group.layers}
    static = {site.name for site in plan.network.sites} - converted
    # What makes DCAC's kernels stays as it is.
    assert {name for name in static if not name.startswith("dcac.")} == {"conv2d.conv1"}
    assert not any(name.startswith("dcac.") for name in converted)


def test_the_zoo_knows_them() -> None:
    for name in BUILDERS:
        entry = zoo.get(name)
        with torch.device("meta"):
            model = zoo.create(name, dcac=True)
        assert isinstance(model, sign.SignNet)
        assert set(model.dcac) == {"layer3", "layer4"}
        assert (entry.input_size, entry.num_classes) == ((3, 160, 224, 224), 1296)
        assert model.classifier.out_features == entry.num_classes


@pytest.mark.slow
def test_other_counters_differ_by_the_recurrent_layers_only() -> None:
    size = (3, 20, 32, 32)
    model = build_model("sign_resnet18", size, 7)
    plan = plan_model(model, size, ratio=0.25)
    found = recount_plan("sign_resnet18", plan, size, 7)
    assert all(recount.explained for recount in found)
    # By hand: 2 rows, 2 directions of 2 layers, 4 * 512 (1024 + 512) multiply-adds each.
    reasons = dict(found[1].reasons)
    missed = [amount for why, amount in reasons.items() if "recurrent" in why]
    assert missed == [-2 * 2 * 2 * 4 * 512 * (1024 + 512)]


# Wrong input


def test_videos_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\): expected videos \(B, C, T, H, W\)"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="15 frames: at least 16, which one row of logits sees"):
        model(torch.zeros(1, 3, 15, 32, 32))
    x = videos()
    with pytest.raises(ValueError, match=r"lengths \[24, 12\]: at least 16 frames each"):
        model(x, torch.tensor([24, 12]))
    with pytest.raises(ValueError, match=r"lengths \[24, 25\]: each from 1 to the 24 frames"):
        model(x, torch.tensor([24, 25]))
    with pytest.raises(ValueError, match=r"taps \['layer5'\]: allowed are layer1, .*, conv1d"):
        model.features(x, taps=["layer5"])
