"""The audio front end: against Kaldi, a slow one in numpy, and numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kwsearch.data import DataError
from kwsearch.data.mel import LogMel, frames, mel_filters

SILENCE = (math.log(1e-5) + 4.5) / 5  # -1.4026


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(hertz: float, samples: int) -> Tensor:
    return torch.sin(2 * math.pi * hertz / 32_000 * torch.arange(samples, dtype=torch.float64))


def slow(x: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """x: (samples,) float64  out: (n_mels, frames): one frame at a time, in float64."""
    y = np.array([x[t + 1] - 0.97 * x[t] for t in range(len(x) - 1)])
    y = np.concatenate([y[512:0:-1], y, y[-2:-514:-1]])
    window = np.zeros(1024)
    window[112:912] = [0.5 - 0.5 * math.cos(2 * math.pi * t / 799) for t in range(800)]
    columns = []
    for start in range(0, len(y) - 1023, 320):
        power = np.abs(np.fft.rfft(y[start : start + 1024] * window)) ** 2
        columns.append((np.log(filters @ power + 1e-5) + 4.5) / 5)
    return np.stack(columns, axis=1)


# --- frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "count"),
    # 10, 5 and 1 seconds; then around a whole number of hops.
    [(320_000, 1000), (160_000, 500), (32_000, 100), (640, 2), (641, 3), (514, 2), (1601, 6)],
)
def test_a_second_has_100_frames(samples: int, count: int) -> None:
    assert frames(samples) == math.ceil(samples / 320) == count
    assert LogMel().eval()(noise(samples)).shape == (1, 128, count)


# --- filters ---------------------------------------------------------------------------------


def test_a_bin_is_shared_by_two_filters_as_by_hand() -> None:
    """1 kHz is 1000 mel (1127 ln(1 + 10 / 7) = 999.99), and 15 kHz is 3505.34: of 129 steps of
    27.173 it lies after 36.80.
    """
    filters = mel_filters()
    mel = 1127 * math.log(1 + 1000 / 700)
    step = 1127 * math.log(1 + 15_000 / 700) / 129
    assert (round(mel, 2), round(step, 3)) == (999.99, 27.173)
    assert filters.shape == (128, 513)
    assert filters[:, 32].nonzero().flatten().tolist() == [35, 36]  # bin 32 is 1 kHz
    assert filters[35, 32].item() == pytest.approx(37 - mel / step, abs=1e-6)
    assert filters[36, 32].item() == pytest.approx(mel / step - 36, abs=1e-6)
    assert round(filters[36, 32].item(), 2) == 0.80


def test_filters_share_each_bin_between_the_first_and_the_last_centre() -> None:
    filters = mel_filters(64, 100.0, 14_000.0)
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (100, 14_000))
    corners = np.linspace(low, high, 66)
    inner = 700 * (np.exp(corners[[1, -2]] / 1127) - 1) / 31.25
    sums = filters.sum(dim=0)
    between = slice(math.ceil(inner[0]), math.floor(inner[1]) + 1)
    assert torch.allclose(sums[between], torch.ones(1), atol=1e-6)
    assert not sums[: math.floor(100 / 31.25) + 1].any()
    assert not sums[math.ceil(14_000 / 31.25) :].any()


def test_no_filter_sees_the_nyquist_frequency() -> None:
    filters = mel_filters(8, 0.0, 17_000.0)
    assert filters[-1, 511] > 0
    assert not filters[:, 512].any()


def test_no_filter_of_128_is_empty_wherever_training_moves_them() -> None:
    for fmin in (0, 9):
        for fmax in (14_001, 15_000, 16_000):
            assert mel_filters(128, fmin, fmax).any(dim=1).all()
    assert mel_filters(141).any(dim=1).all()
    assert not mel_filters(142).any(dim=1).all()


@pytest.mark.parametrize("ends", [(0.0, 15_000.0), (9.0, 14_001.0), (3.0, 16_000.0)])
def test_filters_are_kaldis(ends: tuple[float, float]) -> None:
    kaldi: Any = pytest.importorskip(
        "kaldi_native_fbank", reason="kaldi-native-fbank is not installed"
    )
    options = kaldi.FbankOptions()
    frame = options.frame_opts
    frame.samp_freq, frame.frame_length_ms, frame.frame_shift_ms = 32_000, 32, 32
    frame.dither = frame.preemph_coeff = 0
    frame.remove_dc_offset, frame.window_type = False, "rectangular"
    mels = options.mel_opts
    mels.num_bins, mels.low_freq, mels.high_freq = 128, *ends
    options.use_energy = options.use_log_fbank = False
    online = kaldi.OnlineFbank(options)
    x = noise(20 * 1024)
    online.accept_waveform(32_000, x.tolist())
    online.input_finished()
    assert online.num_frames_ready == 20
    published = np.stack([online.get_frame(i) for i in range(20)])
    power = torch.fft.rfft(x.double().view(20, 1024)).abs().square()
    ours = power @ mel_filters(128, *ends).double().T
    np.testing.assert_allclose(ours.numpy(), published, rtol=1e-4)


# --- log-mels --------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [514, 2_000, 3_201])
def test_log_mels_are_the_slow_ones(samples: int) -> None:
    x = noise(2, samples)
    got = LogMel().eval()(x)
    filters = mel_filters().double().numpy()
    for clip, made in zip(x, got[:, 0], strict=True):
        np.testing.assert_allclose(made.numpy(), slow(clip.double().numpy(), filters), atol=2e-5)


@pytest.mark.parametrize("hertz", [200, 1_000, 4_321, 12_000])
def test_a_tone_is_loudest_in_the_band_around_it(hertz: float) -> None:
    step = 1127 * math.log(1 + 15_000 / 700) / 129
    band = round(1127 * math.log(1 + hertz / 700) / step) - 1
    got = LogMel().eval()(sine(hertz, 6_400))[0]
    assert got[:, 5:15].argmax(dim=0).unique().tolist() == [band]


def test_a_tone_has_the_energy_of_the_closed_form() -> None:
    """A sine of amplitude a on bin 384, 12 kHz, has a power of (a / 2)^2 |1 - 0.97 e^-iw|^2 |W_k|^2
    in the bin k away, W the transform of the window; a band adds those it sees, by its weights.
    """
    away = np.arange(-8, 9)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 799)
    leak = np.abs(np.fft.fft(window, 1024)[np.abs(away)]) ** 2
    gain = 1 + 0.97**2 - 2 * 0.97 * math.cos(2 * math.pi * 12_000 / 32_000)
    filters = mel_filters(16)
    energy = filters[:, 384 + away].double().numpy() @ (0.25**2 * gain * leak)
    band = int(energy.argmax())
    got = LogMel(16).eval()(0.5 * sine(12_000, 6_400))[0, band, 10].item()
    assert got == pytest.approx((math.log(energy[band] + 1e-5) + 4.5) / 5, abs=1e-4)


def test_silence_is_the_floor() -> None:
    got = LogMel().eval()(torch.zeros(3_200))
    assert torch.allclose(got, torch.tensor(SILENCE))
    assert round(SILENCE, 4) == -1.4026


def test_a_batch_is_its_clips() -> None:
    x, to_mels = noise(3, 2_000), LogMel().eval()
    assert torch.allclose(to_mels(x), torch.stack([to_mels(clip) for clip in x]), atol=1e-5)


def test_autocast_and_half_precision_leave_it_in_float32() -> None:
    x, to_mels = noise(2, 2_000), LogMel().eval()
    exact = to_mels(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_mels(x), exact)
    assert to_mels(x.double()).dtype == torch.float32
    half = x.half()
    assert torch.equal(to_mels(half), to_mels(half.float()))


def test_it_has_no_weights_and_can_be_built_without_memory() -> None:
    assert not LogMel().state_dict()
    with torch.device("meta"):
        assert LogMel().filters.shape == (128, 513)


# --- training --------------------------------------------------------------------------------


def test_training_draws_one_range_of_filters_a_batch() -> None:
    x, to_mels = noise(2, 2_000), LogMel()
    torch.manual_seed(3)
    got = to_mels(x)
    torch.manual_seed(3)
    fmin = torch.randint(10, (1,)).item()
    fmax = 16_000 - torch.randint(2_000, (1,)).item()
    filters = mel_filters(128, fmin, fmax).double().numpy()
    for clip, made in zip(x, got[:, 0], strict=True):
        np.testing.assert_allclose(made.numpy(), slow(clip.double().numpy(), filters), atol=2e-5)
    assert not torch.equal(to_mels(x), got)


def test_without_jitter_and_in_evaluation_nothing_is_drawn() -> None:
    x = noise(2, 2_000)
    evaluated = LogMel(freq_mask=8, time_mask=8).eval()
    before = torch.get_rng_state()
    assert torch.equal(evaluated(x), LogMel(jitter=False)(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("axis", ["freq_mask", "time_mask"])
def test_masks_are_one_span_of_each_clip_at_a_log_power_of_0(axis: str) -> None:
    torch.manual_seed(0)
    x, plain = noise(64, 6_400), LogMel(jitter=False)
    masked = LogMel(jitter=False, **{axis: 12})(x)[:, 0]
    dim = -1 if axis == "freq_mask" else -2
    gone = (masked == 0.9).all(dim=dim)
    kept = ~gone.unsqueeze(dim).expand_as(masked)
    assert torch.equal(masked[kept], plain(x)[:, 0][kept])
    widths = gone.sum(dim=1)
    assert set(widths.tolist()) == set(range(12))
    starts = gone.int().argmax(dim=1)
    assert len(starts.unique()) > 8
    for row, start, width in zip(gone, starts, widths, strict=True):
        assert row[start : start + width].all()


def test_a_mask_may_be_wider_than_the_clip() -> None:
    torch.manual_seed(0)
    x = noise(64, 1_600)  # 5 frames
    gone = (LogMel(jitter=False, time_mask=192)(x) == 0.9).all(dim=-2).sum(dim=-1)
    assert set(gone.flatten().tolist()) == {0, 1, 2, 3, 4}


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 1, 640), r"float32 of shape \(2, 1, 640\); allowed floats in -1..1 of"),
        (torch.tensor(0.0), r"float32 of shape \(\)"),
        (torch.zeros(640, dtype=torch.int16), r"int16 of shape \(640,\).* try x / 32768"),
        (torch.zeros(2, 513), "a clip of 513 samples; allowed 514 or more, 2 frames"),
    ],
)
def test_what_are_no_samples_is_refused(x: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        LogMel()(x)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_mels": 0}, "0 mel bands; allowed 1 to 512, as published 128"),
        ({"n_mels": 513}, "513 mel bands"),
        ({"freq_mask": -1}, "freq_mask -1 is negative; allowed 0, for none, or more"),
        ({"time_mask": -2}, "time_mask -2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        LogMel(**settings)
