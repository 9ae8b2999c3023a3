"""A converted network starts as the trained static one, or as close to it as its cells allow."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import Plan, PlanError, convert_, plan_model, set_temperature_
from kwlayers.conv import _KWLayer
from kwlayers.ops.reference import assemble_ref
from kwlayers.warm_start import WarmStart, _cut
from kwsearch import zoo

MODES = (True, "cells")


class Net(nn.Module):
    """Images (3, 8, 6). A pair of equal layers, a 1x1, a grouped and strided one, a linear one."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 16, 2, stride=2, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(self.stem(x).relu())).relu()
        x = self.down(self.c(self.b(x).relu()).relu())
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = self.first
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x).relu()).relu())
        return out


def signal_net() -> nn.Module:
    last = nn.Conv1d(8, 8, 4, stride=2, padding=3, dilation=2, padding_mode="reflect")
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), last, nn.Flatten(), nn.Linear(40, 3))


def volume_net() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 8, 2), nn.Flatten())


def token_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(16, 8))


def depthwise_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.Conv2d(12, 12, 3, groups=12, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 24, 1),
        nn.Conv2d(24, 24, 3, groups=24),
    )


IMAGE = (3, 8, 6)
PAIR = {"pair": ["a", "b", "c"], "down": ["down"]}
Builder = Callable[[], nn.Module]
# A cell for every mixture.
ENOUGH: dict[str, tuple[Builder, tuple[int, ...], dict[str, Any]]] = {
    "shared": (Net, IMAGE, {"sharing": PAIR, "ratio": 1}),
    "twice the cells": (Net, IMAGE, {"sharing": PAIR, "ratio": 2}),
    "half as many again": (Net, IMAGE, {"sharing": PAIR, "ratio": 1.5}),
    "small cells": (Net, IMAGE, {"sharing": PAIR, "ratio": 1, "cell_ratio": (0.5, 0.5)}),
    "whole kernels": (Net, IMAGE, {"sharing": "layer", "ratio": 1, "spatial_partition": False}),
    "basis": (Net, IMAGE, {"sharing": PAIR, "ratio": 1, "basis_ratio": 0.25}),
    "layer norm": (Net, IMAGE, {"sharing": PAIR, "ratio": 1, "norm": "layer"}),
    "solved": (Net, IMAGE, {"sharing": PAIR, "params": 30_000}),
    "two names": (Twice, (8, 4, 5), {"sharing": [["first", "last"]], "ratio": 1}),
    "1-D": (signal_net, (2, 12), {"sharing": [["0", "2"], ["4"]], "ratio": 1}),
    "3-D": (volume_net, (1, 4, 4, 4), {"sharing": [["0", "2"]], "ratio": 1}),
    "linear": (token_net, (7, 8), {"sharing": [["*"]], "ratio": 1, "cell_ratio": (0.5, 0.25)}),
    "depthwise": (depthwise_net, (3, 5, 5), {"sharing": [["1", "4"], ["0", "3"]], "ratio": 1}),
    "resnet20": (lambda: zoo.create("resnet20"), (3, 32, 32), {"ratio": 1}),
    "resnet20, half cells": (
        lambda: zoo.create("resnet20"),
        (3, 32, 32),
        {"ratio": 1, "cell_ratio": (0.5, 0.5)},
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lively(model: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """The model with parameters and statistics that a training might have given it."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter.detach(), 1.0, 0.2)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, *size))
    return model.eval()


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, size: tuple[int, ...]) -> float:
    """The largest difference of outputs, over their scale where that is above 1."""
    x = torch.randn(2, *size)
    expected = other(x)
    scale = float(expected.abs().max())
    assert scale > 1e-2, "an output of zeros is no evidence"
    return float((one(x) - expected).abs().max()) / max(scale, 1.0)


def warm(model: nn.Module, plan: Plan, mode: Any = True) -> Any:
    """A converted copy."""
    return convert_(copy.deepcopy(model), plan, warm_start=mode)


def kw_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _KWLayer)}


# A cell for every mixture ----------------------------------------------------------------


def test_pieces_of_kernels_with_more_entries_than_float32_counts_are_in_place() -> None:
    # 4112 x 4096 > 2**24. Pieces of half the outputs and half the inputs, the inputs last fastest.
    weight = torch.arange(4112 * 4096, dtype=torch.int32).view(torch.float32).view(4112, 4096)
    pieces = _cut(weight, (2056, 2048, 1))
    for index, (rows, columns) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        block = weight[2056 * rows :, 2048 * columns :][:2056, :2048].view(torch.int32)
        assert torch.equal(pieces[index].view(2056, 2048).view(torch.int32), block)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENOUGH)
def test_with_a_cell_for_every_mixture_the_function_is_the_static_one(name: str, mode: Any) -> None:
    build, size, settings = ENOUGH[name]
    model = lively(build(), size)
    plan = plan_model(model, size, **settings)
    assert all(group.num_cells >= sum(group.mixtures(plan.of(group))) for group in plan.groups)
    converted = warm(model, plan, mode)
    assert difference(converted, model, size) < 1e-5
    report = converted.kw_warehouses.warm_start
    assert report == WarmStart(dict.fromkeys(report.errors, 0.0), 1.0 if mode == "cells" else 0.0)
    assert set(report.errors) == {name for group in plan.groups for name in group.layers}
    for layer in kw_layers(converted).values():
        assert float(layer.attention.temperature) == report.temperature


ZOO = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2_050", "mobilenetv2_100")
ZOO += ("convnext_tiny", "deit_tiny")
TIMM = (
    "vgg11_bn",
    "densenet121",
    "efficientnet_b0",
    "regnety_004",
    "mobilenetv3_small_100",
    "convnextv2_atto",
    "mixer_s32_224",
    "swin_tiny_patch4_window7_224",
    "repvgg_a0",
    "ghostnet_100",
    "maxvit_rmlp_pico_rw_256",
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoos_models_start_as_the_static_ones(name: str, mode: Any) -> None:
    size = zoo.get(name).input_size
    model = lively(zoo.create(name), size)
    converted = warm(model, plan_model(model, size, ratio=1), mode)
    assert difference(converted, model, size) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TIMM)
def test_timms_models_start_as_the_static_ones(name: str, mode: Any, timm: ModuleType) -> None:
    model = timm.create_model(name)
    size = model.default_cfg["input_size"]
    model = lively(model, size)
    converted = warm(model, plan_model(model, size, ratio=1, sharing="layer"), mode)
    assert difference(converted, model, size) < 1e-5


def test_a_checkpoint_of_timm_gives_its_logits_after_load_and_convert(timm: ModuleType) -> None:
    theirs = lively(timm.create_model("mobilenetv2_050", num_classes=10), (3, 64, 64))
    ours = zoo.load_weights(zoo.create("mobilenetv2_050", num_classes=10), theirs.state_dict())
    convert_(ours.eval(), plan_model(ours, (3, 64, 64), ratio=1), warm_start=True)
    assert kw_layers(ours)
    assert difference(ours, theirs, (3, 64, 64)) < 1e-5


def test_the_attention_holds_the_function_at_every_temperature() -> None:
    # Of all kernels at temperature t: (1 + e) (t + (1 - t) / (1 + e)), with e at most 1e-3.
    build, size, settings = ENOUGH["shared"]
    model = lively(build(), size)
    converted = warm(model, plan_model(model, size, **settings))
    for temperature in (0.0, 0.5, 1.0):
        set_temperature_(converted, temperature)
        kernels = {name: kernel_of(layer) for name, layer in kw_layers(converted).items()}
        for name, kernel in kernels.items():
            static = model.get_submodule(name).weight
            torch.testing.assert_close(kernel / static, torch.ones_like(kernel), rtol=0, atol=1e-3)


def kernel_of(layer: Any, seed: int = 0) -> Tensor:
    """The layer's kernel for a random input, by the definition."""
    x = torch.randn(1, layer.attention.in_channels, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cells = layer.warehouse.cells.detach()
        x = x.to(cells.dtype)
        return assemble_ref(layer.attention.eval()(x)[0], cells, layer.geometry.kernel)


def test_with_cells_only_the_function_is_left_as_the_temperature_falls() -> None:
    build, size, settings = ENOUGH["shared"]
    model = lively(build(), size)
    converted = warm(model, plan_model(model, size, **settings), "cells")
    assert difference(set_temperature_(converted, 0.5), model, size) > 0.1
    layer = converted.a
    assert not torch.allclose(kernel_of(layer, 0), kernel_of(layer, 1))


def test_cells_that_no_mixture_needs_start_as_published() -> None:
    model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=2)
    torch.manual_seed(3)
    cold: Any = convert_(copy.deepcopy(model), plan)
    torch.manual_seed(3)
    started = warm(model, plan)
    for name, warehouse in started.kw_warehouses.items():
        same = [
            bool(torch.equal(a, b))
            for a, b in zip(warehouse.cells, cold.kw_warehouses[name].cells, strict=True)
        ]
        # Mixture i starts on cell 2 i.
        assert same == [False, True] * (len(same) // 2)


# Fewer cells than mixtures ---------------------------------------------------------------


def by_hand(weight: Tensor) -> Tensor:
    """The mixtures of a (16, 8, 3, 3) kernel of 8x8 cells, as rows: by position, then output."""
    kernel = weight.detach()
    blocks = [kernel[o : o + 8, :, i, j] for i in range(3) for j in range(3) for o in (0, 8)]
    return torch.stack([block.flatten() for block in blocks])


def one_layer(cells: int) -> tuple[Any, Plan]:
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    plan = plan_model(model, (8, 5, 5), ratio=1, sharing=[["0"]], cell_ratio=(0.5, 1))
    assert plan.groups[0].cell == (8, 8, 1, 1)
    return model, replace(plan, groups=(replace(plan.groups[0], num_cells=cells, ratio=None),))


@pytest.mark.parametrize("cells", [1, 5, 12, 17])
def test_the_error_is_the_least_that_so_many_cells_allow(cells: int) -> None:
    model, plan = one_layer(cells)
    squares = torch.linalg.svdvals(by_hand(model[0].weight).double()).square()
    expected = float((squares[cells:].sum() / squares.sum()).sqrt())
    converted = warm(model, plan)
    assert converted.kw_warehouses.warm_start.errors == {"0": pytest.approx(expected, abs=1e-6)}
    weight = model[0].weight.detach()
    found = (kernel_of(converted[0]) - weight).norm() / weight.norm()
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cells", [1, 5, 12, 17])
def test_with_cells_only_the_largest_pieces_are_kept(cells: int) -> None:
    model, plan = one_layer(cells)
    converted = warm(model, plan, "cells")
    pieces = by_hand(model[0].weight)
    norms = pieces.norm(dim=1)
    kept = norms >= norms.sort(descending=True).values[cells - 1]
    assert int(kept.sum()) == cells
    torch.testing.assert_close(by_hand(kernel_of(converted[0])), pieces * kept[:, None])
    expected = float(norms[~kept].norm() / norms.norm())
    assert converted.kw_warehouses.warm_start.errors == {"0": pytest.approx(expected, abs=1e-6)}


def test_cells_of_few_numbers_give_every_kernel_exactly() -> None:
    # Pieces of 2x2 numbers have rank 4 at most: 8 cells are enough for 72 of them.
    model = lively(nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3)), (4, 7, 7))
    plan = plan_model(model, (4, 7, 7), ratio=0.0625, sharing=[["0", "2"]], cell_ratio=(1, 0.5))
    (group,) = plan.groups
    assert (group.cell, group.num_cells, sum(group.mixtures(plan.of(group)))) == (
        (2, 2, 1, 1),
        13,
        216,
    )
    converted = warm(model, plan)
    assert difference(converted, model, (4, 7, 7)) < 1e-5
    assert max(converted.kw_warehouses.warm_start.errors.values()) < 1e-6


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.05])
@pytest.mark.parametrize("mode", MODES)
def test_the_reported_errors_are_those_of_the_kernels(mode: Any, ratio: float) -> None:
    model = Net()
    converted = warm(model, plan_model(model, IMAGE, sharing=PAIR, ratio=ratio), mode)
    errors = converted.kw_warehouses.warm_start.errors
    assert max(errors.values()) > 0.2
    for name, layer in kw_layers(converted).items():
        weight = model.get_submodule(name).weight.detach()
        found = (kernel_of(layer) - weight).norm() / weight.norm()
        assert float(found) == pytest.approx(errors[name], abs=1e-5)


def test_no_layer_is_given_up_for_the_scale_of_its_weights() -> None:
    model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=0.5)
    errors = warm(model, plan).kw_warehouses.warm_start.errors
    with torch.no_grad():
        model.a.weight *= 1e-3
        model.c.weight *= 1e3
    scaled = warm(model, plan).kw_warehouses.warm_start.errors
    assert scaled == pytest.approx(errors, abs=1e-6)
    assert max(errors.values()) < 0.8


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.1])
def test_layers_that_share_cells_have_the_least_errors_in_sum(ratio: float) -> None:
    # Over pieces: every layer counts as often as it has some.
    model = Net()
    plan = plan_model(model, IMAGE, sharing=[["a", "b", "c"]], ratio=ratio)
    (group,) = plan.groups
    errors = warm(model, plan).kw_warehouses.warm_start.errors
    pieces = []
    for name in ("a", "b", "c"):
        blocks = model.get_submodule(name).weight.detach().unfold(0, 8, 8).unfold(1, 8, 8)
        rows = blocks.reshape(-1, 64)
        pieces.append(rows / rows.square().sum(dim=1).mean().sqrt())
    squares = torch.linalg.svdvals(torch.cat(pieces)).square()
    expected = float(squares[group.num_cells :].sum())
    found = sum(len(rows) * errors[name] ** 2 for name, rows in zip("abc", pieces, strict=True))
    assert found == pytest.approx(expected, rel=1e-5)


def test_above_temperature_zero_the_fitted_kernels_shrink() -> None:
    model = Net()
    converted = warm(model, plan_model(model, IMAGE, sharing=PAIR, ratio=0.5))
    whole = kernel_of(converted.b)
    set_temperature_(converted, 0.75)
    torch.testing.assert_close(kernel_of(converted.b), 0.25 * whole)


@pytest.mark.parametrize("basis_ratio", [1.0, 0.25])
@pytest.mark.parametrize("ratio", [1, 0.5])
def test_training_makes_the_attention_depend_on_the_input(ratio: float, basis_ratio: float) -> None:
    model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=ratio, basis_ratio=basis_ratio)
    converted = warm(model, plan).train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.5)
    for layer in kw_layers(converted).values():
        assert torch.equal(kernel_of(layer, 0), kernel_of(layer, 1))
    for _ in range(2):
        optimizer.zero_grad()
        converted.train()(torch.randn(8, *IMAGE)).square().sum().backward()
        optimizer.step()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.numel() or parameter.grad.abs().max() > 0, name
    for layer in kw_layers(converted).values():
        assert not torch.equal(kernel_of(layer, 0), kernel_of(layer, 1))


# What weights may be ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [1, 0.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float16, 2**-9), (torch.bfloat16, 2**-6)],
    ids=str,
)
def test_weights_of_every_dtype_start(
    dtype: torch.dtype, tolerance: float, ratio: float, mode: Any
) -> None:
    model = Net().to(dtype)
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=ratio)
    converted = warm(model, plan, mode)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    for name, error in converted.kw_warehouses.warm_start.errors.items():
        layer = converted.get_submodule(name)
        weight = model.get_submodule(name).weight.detach().double()
        found = float((kernel_of(layer).double() - weight).norm() / weight.norm())
        assert found == pytest.approx(error, abs=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [1, 0.5])
def test_a_layer_of_zeros_starts_as_one(ratio: float, mode: Any) -> None:
    model = Net()
    nn.init.zeros_(model.down.weight)
    nn.init.zeros_(model.a.weight)
    converted = warm(model, plan_model(model, IMAGE, sharing=PAIR, ratio=ratio), mode)
    errors = converted.kw_warehouses.warm_start.errors
    assert errors["down"] == errors["a"] == 0
    assert not kernel_of(converted.down).any()
    assert not kernel_of(converted.a).any()
    assert all(parameter.isfinite().all() for parameter in converted.parameters())


def test_cells_are_frozen_if_all_their_weights_were() -> None:
    model = Net()
    for frozen in (model.a, model.down):
        frozen.weight.requires_grad_(False)
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=1)
    with torch.no_grad():
        converted = warm(model, plan)
    assert converted.kw_warehouses["pair"].cells.requires_grad
    assert not converted.kw_warehouses["down"].cells.requires_grad
    assert all(parameter.requires_grad for parameter in converted.down.attention.parameters())


def test_a_saved_state_loads_into_a_model_that_was_converted_without_warm_start() -> None:
    model = lively(Net(), IMAGE)
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=0.5)
    for mode in MODES:
        converted = warm(model, plan, mode)
        fresh = convert_(Net(), plan).eval()
        fresh.load_state_dict(converted.state_dict())
        x = torch.randn(2, *IMAGE)
        assert torch.equal(fresh(x), converted(x))


def test_one_static_state_starts_every_plan() -> None:
    trained = lively(Net(), IMAGE).state_dict()
    outputs = []
    x = torch.randn(2, *IMAGE)
    for ratio in (1, 2, 4):
        model = Net().eval()
        model.load_state_dict(trained)
        plan = plan_model(model, IMAGE, sharing="layer", ratio=ratio)
        outputs.append(convert_(model, plan, warm_start=True)(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)


# The report ------------------------------------------------------------------------------


def test_without_a_warm_start_there_is_no_report() -> None:
    model: Any = convert_(Net(), plan_model(Net(), IMAGE, sharing=PAIR, ratio=1))
    assert model.kw_warehouses.warm_start is None


def test_the_report_is_a_value_that_copies_pickles_and_logs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    with caplog.at_level(logging.INFO, logger="kwlayers"):
        converted = warm(model, plan_model(model, IMAGE, sharing=PAIR, ratio=0.5))
    report = converted.kw_warehouses.warm_start
    worst = max(report.errors[name] for name in "abc")
    assert f"pair: warm start, relative errors to {worst:.2g}" in caplog.messages
    assert copy.deepcopy(converted).kw_warehouses.warm_start == report
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(AttributeError):
        report.temperature = 1.0


# What is refused -------------------------------------------------------------------------


def refuse(model: nn.Module, plan: Plan, message: str, mode: Any = True) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(PlanError, match=re.escape(message)):
        convert_(model, plan, warm_start=mode)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("mode", ["attention", "static", None, 1, 2])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=1)
    refuse(model, plan, f"warm_start {mode!r}: allowed are False, True and 'cells'", mode)


def test_weights_given_as_a_mode_are_not_printed_whole() -> None:
    model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=1)
    with pytest.raises(PlanError, match=r"^warm_start \{'a': tensor") as caught:
        convert_(model, plan, warm_start={"a": torch.zeros(1000)})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_meta_has_nothing_to_start_from(mode: Any) -> None:
    with torch.device("meta"):
        model = Net()
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=1)
    message = "a is on the meta device and has no weights to start from: load them first, or leave"
    refuse(model, plan, message, mode)
    convert_(model, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = Net()
    model.c.weight.data[0, 0] = value
    plan = plan_model(model, IMAGE, sharing=PAIR, ratio=1)
    refuse(model, plan, "c: its weights are not all finite, nothing can start from them")
    convert_(model, plan)


def test_a_warehouse_cannot_be_called_warm_start() -> None:
    plan = plan_model(Net(), IMAGE, sharing={"warm_start": ["a"]}, ratio=1)
    refuse(Net(), plan, "group 'warm_start': a container of modules has an attribute of that name")
