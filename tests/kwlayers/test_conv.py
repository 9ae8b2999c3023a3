"""The layers read, refuse and compute like the torch.nn layers that they replace."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse, set_temperature_

KW: dict[int, Any] = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}
STATIC: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = {1: (9,), 2: (7, 5), 3: (5, 4, 6)}

# The paths differ in the order of some hundred additions of numbers about 1.
EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-12}


def static_kernel(layer: Any, shape: tuple[int, ...]) -> Tensor:
    """The kernel at temperature 1: each mixture is its assigned cell, or zero."""
    cells = layer.warehouse.cells.detach()
    cell = tuple(cells.shape[1:])
    blocks = [range(size // part) for size, part in zip(shape, cell, strict=True)]
    weight = torch.full(shape, torch.nan, dtype=cells.dtype)
    mixtures = itertools.product(*blocks[2:], blocks[0], blocks[1])
    for index, (*spatial, o, c) in zip(layer.attention.assignment.tolist(), mixtures, strict=True):
        corner = (o, c, *spatial)
        place = tuple(slice(i * p, (i + 1) * p) for i, p in zip(corner, cell, strict=True))
        weight[place] = cells[index] if index < len(cells) else 0.0
    return weight


def pair(
    static: Any, cell: tuple[int, ...], cells_per_mixture: float = 1, **settings: Any
) -> tuple[Any, Any]:
    """A KernelWarehouse layer at temperature 1 and `static` with the same kernel and bias."""
    shape = tuple(static.weight.shape)
    shape += (1,) if isinstance(static, nn.Linear) else ()
    mixtures = 1
    for size, part in zip(shape, cell, strict=True):
        mixtures *= size // part
    warehouse = Warehouse(int(mixtures * cells_per_mixture), cell, mixtures, dtype=torch.float64)
    settings |= {"warehouse": warehouse, "dtype": torch.float64, "bias": static.bias is not None}
    if isinstance(static, nn.Linear):
        layer = KWLinear(static.in_features, static.out_features, **settings)
    else:
        layer = KW[len(shape) - 2](
            static.in_channels,
            static.out_channels,
            static.kernel_size,
            static.stride,
            static.padding,
            static.dilation,
            static.groups,
            padding_mode=static.padding_mode,
            **settings,
        )
    set_temperature_(layer, 1.0)
    static.double()
    with torch.no_grad():
        static.weight.copy_(static_kernel(layer, shape).reshape(static.weight.shape))
        if static.bias is not None:
            layer.bias.copy_(static.bias)
    return layer, static


def image(batch: int, channels: int, rank: int) -> Tensor:
    return torch.randn(batch, channels, *SIZE[rank], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# At temperature 1 a layer is its static counterpart ----------------------------------

CONVOLUTIONS: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    # Axes, cell, and what torch.nn's layer is given.
    (1, (3, 2, 1), {"in": 4, "out": 6, "k": 3}),
    (1, (3, 2, 3), {"in": 4, "out": 6, "k": 3, "stride": 2, "padding": 1}),
    (1, (3, 1, 1), {"in": 4, "out": 6, "k": 2, "groups": 2, "dilation": 3}),
    (2, (3, 2, 1, 1), {"in": 4, "out": 6, "k": 3, "padding": 1}),
    (2, (3, 2, 1, 1), {"in": 4, "out": 6, "k": (3, 1), "padding": (1, 0), "bias": False}),
    (2, (3, 2, 3, 1), {"in": 4, "out": 6, "k": 3, "stride": 2, "padding": 1}),
    (2, (2, 1, 1, 1), {"in": 4, "out": 6, "k": 3, "groups": 2, "stride": (1, 2)}),
    (2, (4, 1, 1, 1), {"in": 4, "out": 4, "k": 3, "groups": 4, "padding": (2, 1)}),
    (2, (11, 33, 1, 1), {"in": 33, "out": 33, "k": 1, "stride": 2}),
    (2, (3, 2, 1, 2), {"in": 4, "out": 6, "k": (3, 2), "dilation": (2, 3), "padding": 2}),
    (3, (3, 2, 1, 1, 1), {"in": 4, "out": 6, "k": (3, 1, 2), "padding": (1, 0, 1)}),
    (3, (3, 1, 3, 3, 3), {"in": 4, "out": 6, "k": 3, "groups": 2, "stride": 2, "padding": 1}),
]


@pytest.mark.parametrize("cells_per_mixture", [1, 3])
@pytest.mark.parametrize(("rank", "cell", "settings"), CONVOLUTIONS, ids=str)
def test_at_temperature_one_a_layer_is_the_convolution_of_its_assembled_cells(
    rank: int, cell: tuple[int, ...], settings: dict[str, Any], cells_per_mixture: int
) -> None:
    settings = settings | {"bias": settings.get("bias", True)}
    channels, out, kernel = (settings.pop(name) for name in ("in", "out", "k"))
    layer, static = pair(STATIC[rank](channels, out, kernel, **settings), cell, cells_per_mixture)
    for batch in (1, 3):
        x = image(batch, channels, rank)
        torch.testing.assert_close(layer(x), static(x), **EXACT)


def test_with_few_cells_the_mixtures_of_the_zero_cell_are_zero_in_the_kernel() -> None:
    layer, static = pair(nn.Conv2d(4, 6, 3, padding=1), (3, 2, 1, 1), 0.25)
    assert layer.attention.assignment.eq(9).sum() == 36 - 9
    assert static.weight.eq(0).sum() == (36 - 9) * 6
    x = image(3, 4, 2)
    torch.testing.assert_close(layer(x), static(x), **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"),
    [
        (3, 1, 0),
        (3, 1, 1),
        (3, 1, (2, 1)),
        (3, 1, "same"),
        (4, 1, "same"),
        (2, 3, "same"),
        ((2, 3), (1, 2), "same"),
        (3, 1, "valid"),
        (2, 2, "valid"),
    ],
)
def test_padding_pads_as_in_torch(kernel: Any, dilation: Any, padding: Any, mode: str) -> None:
    static = nn.Conv2d(4, 6, kernel, padding=padding, dilation=dilation, padding_mode=mode)
    layer, static = pair(static, (3, 2, 1, 1))
    x = image(2, 4, 2)
    torch.testing.assert_close(layer(x), static(x), **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("rank", [1, 3])
def test_padding_pads_as_in_torch_on_one_and_three_axes(
    rank: int, padding: int | str, mode: str
) -> None:
    kernel = (4, 3, 2)[:rank]
    static = STATIC[rank](2, 3, kernel, padding=padding, padding_mode=mode)
    layer, static = pair(static, (3, 2, *(1,) * rank))
    x = image(2, 2, rank)
    torch.testing.assert_close(layer(x), static(x), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cells_per_mixture", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (1, 6), (2, 7, 6), (2, 3, 5, 6), (2, 1, 6)])
def test_a_linear_layer_is_torchs_on_any_number_of_axes(
    shape: tuple[int, ...], cells_per_mixture: int, bias: bool
) -> None:
    layer, static = pair(nn.Linear(6, 8, bias=bias), (4, 3, 1), cells_per_mixture)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x), **EXACT)


def test_gradients_at_temperature_one_are_those_of_the_static_layer() -> None:
    layer, static = pair(nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 2, 1, 1))
    x = image(3, 4, 2)
    grads = []
    for module in (layer, static):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], **EXACT)
    torch.testing.assert_close(layer.bias.grad, static.bias.grad, **EXACT)
    # 36 mixtures of 36 cells, one each: the kernel's gradient, cut like the kernel.
    cut = torch.empty_like(layer.warehouse.cells)
    positions = itertools.product(range(3), range(3), range(2), range(2))
    for index, (i, j, o, c) in enumerate(positions):
        block = static.weight.grad[o * 3 : o * 3 + 3, c * 2 : c * 2 + 2, i, j]
        cut[index] = block[:, :, None, None]
    torch.testing.assert_close(layer.warehouse.cells.grad, cut, **EXACT)


# At other temperatures ---------------------------------------------------------------


def make(rank: int, **settings: Any) -> Any:
    warehouse = Warehouse(5, (3, 2, *(1,) * rank), dtype=settings.get("dtype"))
    settings = {"padding": 1, "norm": "layer", "warehouse": warehouse} | settings
    return KW[rank](4, 6, 3, **settings)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_image_is_convolved_with_the_kernel_of_its_own_attention(rank: int) -> None:
    layer = make(rank, dtype=torch.float64)
    x = image(3, 4, rank)
    alpha = layer.attention(x)
    out = layer(x)
    static = STATIC[rank](4, 6, 3, padding=1).double()
    shape = tuple(static.weight.shape)
    order = list(itertools.product(*[range(3)] * rank, range(2), range(2)))
    for sample in range(3):
        with torch.no_grad():
            static.bias.copy_(layer.bias)
            for i, (*spatial, o, c) in enumerate(order):
                place = (slice(o * 3, o * 3 + 3), slice(c * 2, c * 2 + 2))
                mixed = torch.tensordot(alpha[sample, i], layer.warehouse.cells, dims=1)
                static.weight[(*place, *spatial)] = mixed.reshape(3, 2)
        assert tuple(static.weight.shape) == shape
        torch.testing.assert_close(out[sample], static(x[sample]), **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_unbatched_input_is_a_batch_of_one(rank: int, norm: str) -> None:
    layer = make(rank, norm=norm, dtype=torch.float64)
    x = image(1, 4, rank)
    assert layer(x[0]).shape == (6, *SIZE[rank])
    assert torch.equal(layer(x[0]), layer(x)[0])


def test_linear_tokens_share_one_kernel_from_their_mean() -> None:
    warehouse = Warehouse(8, (4, 3, 1), dtype=torch.float64)
    layer = KWLinear(6, 8, warehouse=warehouse, norm="layer", dtype=torch.float64)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    got = layer(x)
    alpha = layer.attention(x.mean(dim=(1, 2)))
    for sample in range(2):
        rows = []
        for o in range(2):
            mixed = [
                torch.tensordot(alpha[sample, o * 2 + c], warehouse.cells, dims=1)[..., 0]
                for c in range(2)
            ]
            rows.append(torch.cat(mixed, dim=1))
        expected = x[sample] @ torch.cat(rows).T + layer.bias
        torch.testing.assert_close(got[sample], expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "published"])
def test_a_layer_can_be_forced_to_a_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kwlayers import ops

    called = []
    real = ops.BACKENDS[backend]

    def spy(*args: Any) -> Tensor:
        called.append(backend)
        return real(*args)

    monkeypatch.setitem(ops.BACKENDS, backend, spy)
    layer = make(2, backend=backend, dtype=torch.float64)
    x = image(2, 4, 2)
    out = layer(x)
    assert called == [backend]
    layer.backend = None
    torch.testing.assert_close(layer(x), out, **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_layer_works_as_soon_as_it_is_constructed(rank: int) -> None:
    layer = KW[rank](4, 6, 3, warehouse=Warehouse(5, (3, 2, *(1,) * rank)))
    x = torch.randn(2, 4, *SIZE[rank])
    out = layer(x)
    assert out.shape == (2, 6, *(size - 2 for size in SIZE[rank]))
    assert out.isfinite().all()
    assert out.abs().max() > 0
    linear = KWLinear(4, 6, warehouse=Warehouse(5, (3, 2, 1)))
    assert linear(torch.randn(2, 4)).isfinite().all()


@pytest.mark.parametrize("kind", [1, 2, 3, "linear"])
def test_an_empty_batch_gives_an_empty_output_and_no_missing_gradient(kind: Any) -> None:
    if kind == "linear":
        layer: Any = KWLinear(4, 6, warehouse=Warehouse(5, (3, 2, 1)))
        x, shape = torch.randn(0, 7, 4), (0, 7, 6)
    else:
        layer = make(kind)
        x, shape = torch.randn(0, 4, *SIZE[kind]), (0, 6, *SIZE[kind])
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    for name, parameter in [*layer.named_parameters(), ("cells", layer.warehouse.cells)]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("basis_ratio", [1.0, 1 / 2])
def test_the_gradient_reaches_cells_bias_and_every_attention_parameter(
    norm: str, basis_ratio: float
) -> None:
    warehouse = Warehouse(24, (3, 2, 1, 1), 72)
    layer = KWConv2d(4, 6, 3, padding=1, warehouse=warehouse, norm=norm, basis_ratio=basis_ratio)
    layer(torch.randn(3, 4, 7, 5)).square().sum().backward()
    names = dict(layer.named_parameters()) | {"cells": warehouse.cells}
    assert {"attention.fc1.weight", "attention.fc2.weight", "bias", "cells"} <= set(names)
    assert ("attention.fc3.weight" in names) == (basis_ratio < 1)
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# Precision and memory ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2, 3, "linear"])
def test_autocast_computes_in_bfloat16_and_stays_close(kind: Any) -> None:
    if kind == "linear":
        layer: Any = KWLinear(16, 12, warehouse=Warehouse(8, (3, 4, 1)))
        x = torch.randn(3, 7, 16)
    else:
        layer, x = make(kind), torch.randn(3, 4, *SIZE[kind])
    layer.eval()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # Eight roundings to 8 bits one after the other: x, both linear layers' weights and
    # outputs, cells, kernels, the result.
    error = (out.float() - expected).abs().max() / expected.abs().max()
    assert 0 < error < 8 * 2**-8
    out.float().square().sum().backward()
    assert layer.warehouse.cells.grad.dtype == torch.float32
    assert layer.attention.fc1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # As under autocast, with parameters and pooling rounded, too: a dozen roundings.
    [(torch.float16, 12 * 2**-11), (torch.bfloat16, 12 * 2**-8), (torch.float64, 1e-5)],
    ids=str,
)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_layer_moved_to_another_dtype_keeps_working(
    dtype: torch.dtype, tolerance: float, norm: str
) -> None:
    layer = make(2, norm=norm).eval()
    set_temperature_(layer, 0.25)
    x = torch.randn(3, 4, 7, 5)
    expected = layer(x).detach()
    layer.to(dtype)
    layer.warehouse.to(dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected.double()).abs().max() < tolerance * expected.abs().max()
    layer.train()(x.to(dtype)).sum().backward()
    assert layer.attention.assignment.dtype == torch.int64


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_input_and_layer_change_no_value(rank: int) -> None:
    memory = {2: torch.channels_last, 3: torch.channels_last_3d}[rank]
    layer = make(rank, dtype=torch.float64)
    x = image(3, 4, rank)
    expected = layer(x)
    last = x.contiguous(memory_format=memory)
    assert not last.is_contiguous()
    torch.testing.assert_close(layer(last), expected, **EXACT)
    layer.warehouse.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(layer(last), expected, **EXACT)


# Reading -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"groups": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular", "bias": False},
    ],
    ids=str,
)
def test_a_convolution_prints_what_torchs_prints(rank: int, settings: dict[str, Any]) -> None:
    warehouse = Warehouse(5, (3, 2, *(1,) * rank))
    layer = KW[rank](4, 6, 3, **settings, warehouse=warehouse)
    static = STATIC[rank](4, 6, 3, **settings)
    assert layer.extra_repr() == static.extra_repr()
    assert repr(layer).startswith(f"KWConv{rank}d(\n  {static.extra_repr()}\n  (attention): ")


def test_a_linear_layer_prints_what_torchs_prints() -> None:
    layer = KWLinear(4, 6, bias=False, warehouse=Warehouse(5, (3, 2, 1)))
    assert layer.extra_repr() == nn.Linear(4, 6, bias=False).extra_repr()
    assert repr(layer).startswith("KWLinear(\n  in_features=4, out_features=6, bias=False\n")


def test_a_layer_has_the_attributes_of_torchs() -> None:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    settings: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"}
    layer, static = make(2, **settings), nn.Conv2d(4, 6, 3, **settings)
    for name in (*names, "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(static, name), name


def test_bias_starts_at_zero_and_can_be_left_out() -> None:
    assert make(2).bias.tolist() == [0.0] * 6
    layer = make(2, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()


# Refusing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "groups 3 must divide in_channels 4 and out_channels 6"),
        ({"groups": 4}, "groups 4 must divide in_channels 4 and out_channels 6"),
        ({"groups": 0}, "groups 0 must divide in_channels 4 and out_channels 6"),
        ({"padding": "full"}, "padding 'full': a size, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs stride 1"),
        ({"padding": -1}, "padding -1: one size, or 2 of them"),
        ({"padding": (1, 1, 1)}, "padding (1, 1, 1): one size, or 2 of them"),
        ({"stride": 0}, "stride 0: one size, or 2 of them"),
        ({"dilation": (1,)}, "dilation (1,): one size, or 2 of them"),
        (
            {"padding_mode": "mirror"},
            "padding_mode 'mirror': allowed are ('zeros', 'reflect', 'replicate', 'circular')",
        ),
        ({"norm": "group"}, "norm 'group': allowed are 'batch' and 'layer'"),
        ({"backend": "cudnn"}, "backend 'cudnn': allowed are reference, published"),
        ({"reduction": 0.0}, "reduction 0.0: it must be above 0"),
        ({"basis_ratio": -1.0}, "basis_ratio -1.0: it must be above 0"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(2, **settings)


@pytest.mark.parametrize(
    ("cell", "kernel"),
    [
        ((4, 2, 1, 1), (6, 4, 3, 3)),
        ((3, 3, 1, 1), (6, 4, 3, 3)),
        ((3, 2, 2, 1), (6, 4, 3, 3)),
        ((3, 2, 1), (6, 4, 3, 3)),
    ],
)
def test_cells_that_do_not_tile_the_kernel_are_refused(
    cell: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    message = f"cells of shape {cell} do not tile a kernel of shape {kernel}"
    with pytest.raises(ValueError, match=re.escape(message)):
        KWConv2d(4, 6, 3, warehouse=Warehouse(5, cell))


def test_cells_of_a_convolution_do_not_tile_a_linear_layer() -> None:
    message = "cells of shape (3, 2, 1, 1) do not tile a kernel of shape (6, 4, 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        KWLinear(4, 6, warehouse=Warehouse(5, (3, 2, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 7, 5), (7, 5), (1, 2, 4, 7, 5), ()])
def test_a_convolution_refuses_an_input_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    message = f"input of shape {shape}: expected (B, 4, …) with 4 axes, or 3 without batch"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(2)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 7, 5), ()])
def test_a_linear_layer_refuses_an_input_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    layer = KWLinear(4, 6, warehouse=Warehouse(5, (3, 2, 1)))
    message = f"input of shape {shape}: expected 4 on the last axis"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.zeros(shape))
