"""DCAC: the specification's figures, its definition written out, and padded batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kwlayers.dcac import DCAC, dcac_macs, dcac_params, valid_frames

# Double precision; the sums are of at most some hundred terms.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
SHAPES = [(), (3, 2)]


def trained(channels: int = 6, **settings: int) -> DCAC:
    """As after some training: no parameter or statistic at its start."""
    torch.manual_seed(0)
    layer = DCAC(channels, **settings, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in (layer.context_norm, layer.norm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return layer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "groups", "params"),
    [(512, None, 792_960), (512, 64, 504_000), (1024, None, 3_158_784), (1024, 128, 2_007_424)],
)
def test_parameters_are_those_of_the_specification(
    channels: int, groups: int | None, params: int
) -> None:
    layer = DCAC(channels, groups=groups, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == params
    assert dcac_params(channels, groups=groups) == params


@pytest.mark.parametrize(("kernel_size", "reduction", "groups"), [(3, 2, 8), (4, 64, 1)])
def test_the_closed_form_holds_for_other_settings(
    kernel_size: int, reduction: int, groups: int
) -> None:
    layer = DCAC(40, kernel_size, reduction, groups)
    assert sum(p.numel() for p in layer.parameters()) == dcac_params(
        40, kernel_size, reduction, groups
    )


def test_macs_are_those_of_the_operators_and_one_a_tap() -> None:
    layer = DCAC(24, 3, 1, 8).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, 24, 7, 3, 2))
    taps = 24 * 7 * 3 * 2 * 3
    assert dcac_macs(24, 7, 3 * 2, 3, 1, 8) == counter.get_total_flops() // 2 + taps
    # T * (6*C*h + h*G*k) + C*h + k*C*T, by hand for C = 512, T = 2 and the defaults.
    assert dcac_macs(512, 2) == 2 * (393_216 + 327_680) + 65_536 + 5_120


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_block_is_the_identity(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    layer = DCAC(6).train(training)
    x = torch.randn(2, 6, 7, *shape)
    assert torch.equal(layer(x), x)
    assert layer.weight.tolist() == [[0, 0, 1, 0, 0]] * 6


@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"kernel_size": 4, "reduction": 1}])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition_frame_by_frame(
    settings: dict[str, int], shape: tuple[int, ...]
) -> None:
    layer = trained(**settings)
    k, groups = layer.kernel_size, layer.groups
    x = random(2, 6, 5, *shape)
    out = layer(x).reshape(2, 6, 5, -1)

    for b, video in enumerate(x.reshape(2, 6, 5, -1)):
        d = video.mean(2)
        m = torch.stack([d[:, t] - d[:, max(t - 1, 0)] for t in range(5)], 1)
        cues = torch.cat([d, m])
        whole = layer.global_context.weight @ d.mean(1) + layer.global_context.bias
        for t in range(5):
            local = sum(
                layer.local_context.weight[:, :, i] @ cues[:, t + i - 1]
                for i in range(3)
                if 0 <= t + i - 1 < 5
            )
            a = torch.relu(layer.context_norm(local[None])[0] + whole)
            assert layer.modulation.bias is not None
            D = layer.modulation.weight[:, :, 0] @ a + layer.modulation.bias
            y = torch.zeros_like(video[:, 0])
            for c in range(6):
                group = c * groups // 6
                for j in range(k):
                    source = t + j - k // 2
                    if 0 <= source < 5:
                        kernel = layer.weight[c, j] * (1 + D[group * k + j])
                        y[c] += kernel * video[c, source]
            y = layer.norm(y[None, :, :, None])[0, :, :, 0]
            torch.testing.assert_close(out[b, :, t], video[:, t] + y, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_padded_batch_gives_every_sequence_what_it_gets_alone(shape: tuple[int, ...]) -> None:
    layer = trained(groups=3)
    lengths = torch.tensor([9, 1, 4])
    x = random(3, 6, 9, *shape)
    for video, length in zip(x, lengths, strict=True):
        video[:, length:] = torch.nan
    x.requires_grad_()
    out = layer(x, lengths)
    for video, single, length in zip(x, out, lengths, strict=True):
        alone = layer(video[None, :, :length])[0]
        torch.testing.assert_close(single[:, :length], alone, **EXACT)
        assert not single[:, length:].any()
    out.sum().backward()
    assert x.grad is not None
    for gradient, length in zip(x.grad, lengths, strict=True):
        assert gradient[:, :length].abs().min() > 0
        assert not gradient[:, length:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_in_training_see_valid_frames_only(shape: tuple[int, ...]) -> None:
    alone, padded = trained().train(), trained().train()
    x = random(1, 6, 8, *shape)
    expected = alone(x[:, :, :5])
    out = padded(x, torch.tensor([5]))
    torch.testing.assert_close(out[:, :, :5], expected, **EXACT)
    assert not out[:, :, 5:].any()
    assert alone.norm.running_mean is not None
    assert not torch.equal(alone.norm.running_mean, trained().norm.running_mean)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[key], value, **EXACT)


def test_backward_keeps_few_copies_of_the_input_and_not_one_a_tap() -> None:
    layer = DCAC(8, kernel_size=9)
    x = torch.randn(1, 8, 32, 16, 16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    # The padded input and the norm's, of nine taps.
    assert 2 < sum(kept.values()) / x.untyped_storage().nbytes() < 2.6


def test_groups_that_do_not_divide_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="groups 4 must divide channels 6"):
        DCAC(6, groups=4)
    with pytest.raises(ValueError, match="kernel_size 0: at least 1"):
        DCAC(6, kernel_size=0)


def test_inputs_and_lengths_that_do_not_fit_are_refused() -> None:
    layer = DCAC(6)
    with pytest.raises(ValueError, match=r"\(2, 6, 5, 4\): expected \(B, 6, T\) or \(B, 6, T, H,"):
        layer(torch.zeros(2, 6, 5, 4))
    with pytest.raises(ValueError, match=r"\(2, 5, 6\): expected \(B, 6, T\)"):
        layer(torch.zeros(2, 5, 6))
    x = torch.zeros(2, 6, 5)
    with pytest.raises(ValueError, match=r"lengths \[5, 6\]: each from 1 to the 5 frames given"):
        layer(x, torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=r"lengths \[0, 5\]: each from 1"):
        layer(x, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"shape \(3,\) .* whole numbers \(2,\)"):
        layer(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"type torch.float32: expected whole"):
        layer(x, torch.tensor([1.0, 2.0]))


def test_valid_frames_are_the_first_of_each_sequence() -> None:
    assert valid_frames(torch.tensor([1, 3]), 2, 3).tolist() == [[1, 0, 0], [1, 1, 1]]
