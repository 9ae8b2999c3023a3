"""Log-mels as DyMN and EfficientAT take them: 32 kHz samples to 128 bands, 100 frames a second.

Front end of https://github.com/fschmid56/EfficientAT, of the recipe of arXiv 2310.15648. For S
samples:

    pre-emphasis    y_t = x_t+1 - 0.97 x_t                          (S - 1)
    power spectrum  FFT of 1024, Hann window of 800, hop 320, reflected at both ends
    filters         triangles, even in mel = 1127 ln(1 + f / 700), Kaldi's
    out             (ln(power + 1e-5) + 4.5) / 5                    (128, 1 + (S - 1) // 320)

so 320,000 samples, 10 s, give 1000 frames. In training one draw a batch moves the filters' range,
0..15 kHz, to start at 0..9 Hz and end at 14,001..16,000 Hz. On purpose different from there:

- All of it is float32 outside autocast, there only the filters' product. Pre-emphasis is a
  subtraction, not a convolution, which torch lets CUDA round to TF32.
- Filters of the fixed range are made once, not at each call; evaluation draws no random numbers.
- Unbatched samples are taken too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kwsearch.data.errors import DataError

SAMPLE_RATE = 32_000
SILENCE = (math.log(1e-5) + 4.5) / 5
HOP = 320
MELS = 128
_FFT, _WINDOW = 1024, 800
_BINS = _FFT // 2
_FMIN, _FMAX = 0.0, 15_000.0
_FMIN_DRAWS, _FMAX_DRAWS = 10, 2_000  # whole numbers of Hz
_MIN_SAMPLES = _FFT // 2 + 2  # to reflect half a window


def frames(samples: int) -> int:
    """Frames of so many samples, ceil(samples / 320)."""
    return 1 + (samples - 1) // HOP


def mel_filters(n_mels: int = MELS, fmin: float = _FMIN, fmax: float = _FMAX) -> Tensor:
    """out: (n_mels, 513) float32, the weight of each FFT bin in each band.

    With corners c_0..c_n+1 spread evenly from mel(fmin) to mel(fmax), band j rises from c_j to 1
    at c_j+1 and falls to c_j+2. Kaldi has no weight at 16 kHz, the last bin. From 142 bands of
    0..15 kHz on, the narrowest lie between two bins and are empty.
    """
    low, high = _mel(torch.tensor([fmin, fmax], dtype=torch.float64))
    corners = low + (high - low) * torch.arange(n_mels + 2) / (n_mels + 1)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = _mel(torch.arange(_BINS + 1, dtype=torch.float64) * (SAMPLE_RATE / _FFT))
    rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)
    filters = torch.minimum(rise, fall).clamp_(min=0)
    filters[:, -1] = 0
    return filters.float()


class LogMel(nn.Module):
    """x: (B, samples) or (samples,), in -1..1 at 32 kHz  out: (B, 1, n_mels, frames) or without B.

    jitter: whether training moves the filters' range. freq_mask, time_mask: in training, one span
    of fewer bands and one of fewer frames than these are set in each clip to a log power of 0,
    which is 0.9 in the output; 0 is none, as in the published commands. Raises DataError.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self, n_mels: int = MELS, *, jitter: bool = True, freq_mask: int = 0, time_mask: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= n_mels <= _BINS:
            raise DataError(f"{n_mels} mel bands; allowed 1 to {_BINS}, as published {MELS}")
        for name, width in (("freq_mask", freq_mask), ("time_mask", time_mask)):
            if width < 0:
                raise DataError(f"{name} {width} is negative; allowed 0, for none, or more")
        self.n_mels, self.jitter = n_mels, jitter
        self.freq_mask, self.time_mask = freq_mask, time_mask
        window = torch.hann_window(_WINDOW, periodic=False)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", mel_filters(n_mels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _check(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            x = x[..., 1:] - 0.97 * x[..., :-1]
            spectrum = torch.stft(
                x, _FFT, HOP, _WINDOW, self.window.float(), center=True, return_complex=True
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            mels = (self._filters(power) @ power + 1e-5).log()
        if self.training:
            mels = _masked(mels, self.freq_mask, -2)
            mels = _masked(mels, self.time_mask, -1)
        return ((mels + 4.5) / 5).unsqueeze(-3)

    def _filters(self, power: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return self.filters.float()
        fmin = _FMIN + int(torch.randint(_FMIN_DRAWS, (1,)))
        fmax = _FMAX + _FMAX_DRAWS // 2 - int(torch.randint(_FMAX_DRAWS, (1,)))
        return mel_filters(self.n_mels, fmin, fmax).to(power.device)


def _mel(hertz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hertz / 700)


def _masked(x: Tensor, width: int, dim: int) -> Tensor:
    """x: (*, F, T), with a span of 0 to width - 1 along `dim` set to 0, each clip's its own."""
    if width == 0:
        return x
    size = x.shape[dim]
    length = torch.rand(x.shape[:-2], device=x.device) * min(width, size)
    start = (torch.rand(x.shape[:-2], device=x.device) * (size - length)).long()
    stop = start + length.long()
    at = torch.arange(size, device=x.device)
    inside = (at >= start[..., None]) & (at < stop[..., None])
    return x.masked_fill(inside.unsqueeze(-1 if dim == -2 else -2), 0.0)


def _check(x: Tensor) -> None:
    if x.ndim not in (1, 2) or not x.is_floating_point():
        raise DataError(
            f"samples are {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}; "
            "allowed floats in -1..1 of shape (B, samples) or (samples,); "
            "16-bit integers try x / 32768"
        )
    if x.shape[-1] < _MIN_SAMPLES:
        raise DataError(
            f"a clip of {x.shape[-1]} samples; allowed {_MIN_SAMPLES} or more, "
            f"{frames(_MIN_SAMPLES)} frames; try padding it"
        )
