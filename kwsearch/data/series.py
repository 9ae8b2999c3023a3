"""Time series of sensors as one value: labelled windows, cut from recordings, padded at their end.

Windows that overlap share samples. Where a part of them is held out at random, a score on it says
how well windows next to known ones are told apart, which is more than a new recording's would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kwsearch.data.errors import DataError
from kwsearch.data.images import Images

_GAPS = "allowed finite numbers; where one is missing, try interpolating between its neighbours"


@dataclass(frozen=True, eq=False)
class Series(Images):
    """x: (N, 1, T, S) float32, windows of T samples of S sensors   all else as of images."""

    def __post_init__(self) -> None:
        shape = self.x.shape
        if len(shape) != 4 or self.x.dtype != torch.float32 or 0 in shape or shape[1] != 1:
            raise DataError(
                f"{self.name}: windows are {str(self.x.dtype).removeprefix('torch.')} of shape "
                f"{tuple(shape)}; allowed float32 of shape (N, 1, samples, sensors); windows "
                "cannot be resized, try loading them at that size"
            )
        if self.y.dtype != torch.int64 or self.y.shape != shape[:1]:
            raise DataError(
                f"{self.name}: labels are {str(self.y.dtype).removeprefix('torch.')} of shape "
                f"{tuple(self.y.shape)}; allowed int64 of shape ({shape[0]},), one per window"
            )
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{self.name}: label {low if low < 0 else high} is out of range; "
                f"allowed 0..{self.num_classes - 1} ({self.num_classes} classes)"
            )

    @staticmethod
    def reach(size: tuple[int, int]) -> tuple[int, int]:
        """An eighth of a window, in time only: the sensors keep their places."""
        return size[0] // 8, 0

    @staticmethod
    def floats(x: Tensor) -> Tensor:
        """Some of `x` as they are, in the sensors' units."""
        return x

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each sensor, (1, 1, 1, S), to train on.

        The zeros that short windows are padded with count: a window does not know its length.
        """
        deviation = self.x.std(dim=(0, 1, 2), keepdim=True).clamp(min=1e-3)
        return self.x.mean(dim=(0, 1, 2), keepdim=True), deviation


def windows(
    recording: np.ndarray, labels: np.ndarray, length: int, step: int, name: str = "recording"
) -> tuple[np.ndarray, np.ndarray]:
    """recording: (T, S)  labels: (T,) whole numbers  out: (N, length, S) float32, (N,) int64

    A window starts every `step` samples, N = (T - length) // step + 1; what is left at the end is
    dropped. Its label is the commonest of its samples', of equally common ones the smallest. name:
    what errors call the recording. Raises DataError.
    """
    for what, value in (("length", length), ("step", step)):
        if type(value) is not int or value < 1:
            raise DataError(f"{what} {value!r} of windows; allowed a whole number, at least 1")
    if recording.ndim != 2 or recording.shape[1] < 1 or recording.dtype.kind not in "fiu":
        raise DataError(
            f"{name} is {recording.dtype} of shape {recording.shape}; "
            "allowed numbers of shape (samples, sensors)"
        )
    if labels.shape != recording.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{name} has {len(recording):,} samples but labels are {labels.dtype} of shape "
            f"{labels.shape}; allowed a whole number for each sample"
        )
    if len(recording) < length:
        raise DataError(
            f"{name} has {len(recording):,} samples; allowed {length:,} or more, one window; "
            "try shorter windows"
        )
    values = finite(name, recording)
    starts = range(0, len(values) - length + 1, step)
    x = np.stack([values[start : start + length] for start in starts])
    y = [_commonest(labels[start : start + length]) for start in starts]
    return x, np.array(y, dtype=np.int64)


def fitted(x: np.ndarray, size: tuple[int, int] | None, name: str) -> Tensor:
    """x: (N, T, S)  out: (N, 1, size[0], S), zeros at the end of each window; T samples if None.

    Raises DataError for longer windows and for another number of sensors than size[1].
    """
    _, samples, sensors = x.shape
    length, width = (samples, sensors) if size is None else size
    if length < samples or width != sensors:
        raise DataError(
            f"{name}: windows of {samples} samples of {sensors} sensors do not fit "
            f"{length}x{width}; allowed {samples} samples or more of {sensors} sensors, "
            f"input: [1, {samples}, {sensors}] and no resolution, which is of images"
        )
    padded = np.zeros((len(x), 1, length, sensors), np.float32)
    padded[:, 0, :samples] = x
    return torch.from_numpy(padded)


def finite(name: str, x: np.ndarray) -> np.ndarray:
    """`x` as float32. Raises DataError, with the place, for what is no finite number there."""
    with np.errstate(over="ignore"):  # a float64 may be too large for 32 bits
        values = x.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise DataError(f"{name}[{', '.join(map(str, place))}] is {x[place]:g}; {_GAPS}")
    return values


def numbers(where: str, tokens: Sequence[str]) -> np.ndarray:
    """out: (len(tokens),) float32. Raises DataError, with `where`, for what is no finite number."""
    try:
        with np.errstate(over="ignore"):
            values = np.array([float(token) for token in tokens], np.float32)
        wrong = np.flatnonzero(~np.isfinite(values)).tolist()
    except ValueError:
        wrong = [i for i, token in enumerate(tokens) if not _is_number(token)]
    if wrong:
        raise DataError(f"{where}: value {wrong[0] + 1} is {tokens[wrong[0]].strip()!r}; {_GAPS}")
    return values


def _commonest(labels: np.ndarray) -> int:
    values, counts = np.unique(labels, return_counts=True)
    return int(values[counts.argmax()])


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True
