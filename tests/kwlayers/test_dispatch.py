"""Which path is chosen: a function of numbers only, and never one that cannot do the layer."""

from __future__ import annotations

import itertools

import pytest
import torch

from kwlayers.ops import BACKENDS, ConvGeometry, choose, kw_conv
from kwlayers.ops.dispatch import PUBLISHED, Choice
from kwlayers.ops.geometry import Blocks
from kwlayers.ops.kernels import block_size
from kwlayers.ops.paths import PATHS, paths_of


def layer(c_out: int, c_in: int, kernel: int, stride: int = 1, groups: int = 1) -> ConvGeometry:
    """A 2-D layer as networks have them."""
    return ConvGeometry(
        (c_out, c_in // groups, kernel, kernel), (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
    )


# The layers of KernelWarehouse ResNet18 and MobileNetV2 at b = 1 whose path is beyond doubt in
# the measurements: (layer, cell, n, input size, batch) -> forward and backward.
MEASURED = {
    "whole kernels for one position are never worth mixing": (
        (layer(512, 512, 3), (512, 512, 1, 1), 27, 1, 16),
        Choice("mix_inputs", "mix_inputs"),
    ),
    "one input cell for few positions: mix what the cells give": (
        (layer(512, 256, 1, 2), (256, 256, 1, 1), 47, 2, 16),
        Choice("mix_outputs", "mix_outputs"),
    ),
    "few positions, large kernels": (
        (layer(512, 512, 3), (512, 512, 1, 1), 27, 7, 16),
        Choice("gemm", "gemm"),
    ),
    "more positions, large kernels": (
        (layer(256, 256, 3), (256, 256, 1, 1), 47, 14, 16),
        Choice("loop", "loop"),
    ),
    "large maps, small kernels": (
        (layer(64, 64, 3), (64, 64, 1, 1), 56, 56, 16),
        Choice("loop", "loop"),
    ),
    "large depthwise maps": (
        (layer(96, 96, 3, 2, 96), (32, 1, 1, 1), 36, 112, 16),
        Choice("loop", "loop"),
    ),
    "small kernels and maps": ((layer(384, 64, 1), (32, 64, 1, 1), 102, 14, 16), PUBLISHED),
    "small depthwise maps": ((layer(960, 960, 3, 1, 960), (960, 1, 1, 1), 27, 7, 16), PUBLISHED),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_layer_gets_the_path_that_was_fastest(name: str) -> None:
    (geometry, cell, n, size, batch), expected = MEASURED[name]
    chosen = choose("cpu", torch.float32, batch, (size, size), geometry, cell, n)
    assert chosen == expected


def test_every_choice_can_do_its_layer() -> None:
    seen = set()
    cases = itertools.product(
        ("cpu", "cuda"),
        (torch.float32, torch.bfloat16),
        (1, 4, 64),
        (1, 2, 7, 28, 56),
        ((8, 8, 1, 1), (64, 64, 3, 1), (64, 64, 1, 64), (64, 64, 3, 4), (512, 512, 3, 1)),
        (1, 2),
        (1, 30, 400),
    )
    for device, dtype, batch, size, (c_out, c_in, k, groups), parts, n in cases:
        geometry = layer(c_out, c_in, k, 1, groups)
        cell = (c_out // parts, geometry.kernel[1], 1, 1)
        chosen = choose(device, dtype, batch, (size, size), geometry, cell, n)
        assert set(chosen) <= set(BACKENDS)
        if "published" in chosen:
            assert chosen == PUBLISHED
        else:
            paths_of(chosen, geometry, cell)  # raises where one refuses
        seen |= set(chosen)
    assert seen >= {"published", "loop", "gemm", "grouped", "mix_inputs", "mix_outputs"}


def test_what_is_not_a_cpu_or_a_cuda_device_and_an_empty_batch_get_the_published_form() -> None:
    geometry = layer(512, 512, 3)
    for device, batch in (("mps", 16), ("meta", 16), ("cpu", 0)):
        chosen = choose(device, torch.float32, batch, (7, 7), geometry, (512, 512, 1, 1), 27)
        assert chosen == PUBLISHED


def test_the_published_form_keeps_no_more_than_the_maps_or_a_little() -> None:
    found = 0
    for batch, size, channels in itertools.product(
        (1, 8, 64, 512), (7, 14, 28, 56), (16, 64, 256, 512)
    ):
        geometry = layer(channels, channels, 3)
        cell = (channels, channels, 1, 1)
        chosen = choose("cpu", torch.float32, batch, (size, size), geometry, cell, 40)
        if chosen == PUBLISHED:
            found += 1
            kernels = 4 * batch * channels * channels * 9
            maps = 4 * batch * 2 * channels * size * size
            assert kernels <= max(8 * 2**20, min(maps, 32 * 2**20))
    assert found


@pytest.mark.parametrize("backward", [name for name in PATHS if name not in ("gemm", "triton")])
def test_forward_and_backward_may_take_different_paths(
    backward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kwlayers.ops as ops

    geometry = ConvGeometry((6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    torch.manual_seed(0)
    shapes = ((3, 4, 5, 4), (3, 36, 4), (4, 3, 2, 1, 1))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected = kw_conv(*leaves, geometry, "reference")
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    monkeypatch.setattr(ops, "choose_for", lambda *_: Choice("gemm", backward))
    out = kw_conv(*leaves, geometry)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for got, want in zip(torch.autograd.grad(out.square().sum(), leaves), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("source", [0, 5_000, 400_000])
@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("mixing", [0.1, 3.0])
def test_blocks_fit_their_share_of_the_workspace_unless_they_are_the_smallest(
    copied: bool, source: int, splits: bool, mixing: float
) -> None:
    capacity = 4 * 2**20
    checked = 0
    for batch, co, ci, out, inn, spatial, positions in itertools.product(
        (1, 3, 16, 256), (8, 33, 512), (8, 256), (1, 4), (1, 2), (1, 9), (4, 196)
    ):
        blocks = Blocks((spatial, 1), out, inn, (co, ci, 1, 1))
        samples, width = block_size(
            batch, blocks, source, positions, capacity, copied, splits, mixing
        )
        assert 1 <= samples <= batch
        assert 1 <= width <= co
        assert width == co or (splits and width % 16 == 0)
        kernels = samples * width * blocks.mixtures * blocks.row
        smallest = samples == 1 or (splits and width <= 32 and samples * blocks.mixtures <= 96)
        if not smallest:
            checked += 1
            assert kernels * (2 if copied else 1) <= 1.5 * capacity
            assert samples * source <= capacity
    assert checked > 50


def test_much_mixing_gets_more_samples_and_fewer_channels() -> None:
    # 512 x 512, 3 x 3 in 9 cells: 64 channels of 4 samples are 36 rows, 32 of 8 are 72.
    blocks = Blocks((3, 3), 1, 1, (512, 512, 1, 1))
    sizes = [
        block_size(16, blocks, 49 * 4608, 49, 4 * 2**20, True, True, mixing)
        for mixing in (0.5, 1.0)
    ]
    assert sizes == [(4, 64), (8, 32)]
