"""Continuous sign language recognition: a 2-D network per frame, convolutions over time, a BiLSTM.

The pipeline and its modules' names are VAC's: Min et al., "Visual Alignment Constraint for
Continuous Sign Language Recognition", ICCV 2021, arXiv:2104.02330, with the normalised classifier
of its code. From T frames it makes T' = ((T - 4) // 2 - 4) // 2 rows of logits; each sees 16
frames, 4 after those of the row before.

With `dcac` a `kwlayers.dcac.DCAC` follows each of the last two 2-D stages. [recon] Their place is
our choice: that of the paper (Liu et al., DESign, arXiv:2507.03339) is not known to us. So are the
taps for `kwlayers.sr_ctc` below the temporal convolutions: a stage's mean over positions, pooled
over the 16 frames that a row of logits sees.

On purpose different from VAC's code:

- Videos are (B, C, T, H, W), in any order of lengths. There the first must be the longest.
- Norms after temporal convolutions are trained on valid frames. There padding counts, too.
- No hook replaces gradients that are not a number by zeros.
- Dynamic convolutions over time, which `kwlayers.convert_` makes of static ones, pool their
  attention over a video's own frames, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.attention import pooling_over
from kwlayers.dcac import DCAC, normed, valid_frames
from kwlayers.sr_ctc import NormLinear
from kwsearch.zoo import resnet
from kwsearch.zoo.width import scaled

__all__ = ["SignFeatures", "SignNet", "sign_resnet18", "sign_resnet34"]

_KERNEL = 5  # of both temporal convolutions, in frames
_POOL = 2  # after each of them
# Of a row of logits: two convolutions and poolings, seen from the frames.
_STRIDE = _POOL * _POOL
_WINDOW = (_KERNEL + _POOL - 1) * _POOL + _KERNEL - 1
_DROPOUT = 0.3  # between the layers of the BiLSTM
_STAGES = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}  # channels
_HIDDEN = 512  # of the BiLSTM, per direction


class SignFeatures(NamedTuple):
    """What `kwlayers.sr_ctc.SRCTCLoss` takes.

    logits: (T', B, V)  lengths: (B,)  taps: (T', B, d) by name  tap_lengths: (B,) by name
    """

    logits: Tensor
    lengths: Tensor
    taps: dict[str, Tensor]
    tap_lengths: dict[str, Tensor]


class _Frames:
    """The frames of a batch of videos that belong to it, as one batch of images, and back."""

    def __init__(self, videos: Tensor, lengths: Tensor | None) -> None:
        self.batch, self.count = videos.shape[0], videos.shape[2]
        self.valid = None
        if lengths is not None:
            self.valid = valid_frames(lengths.to(videos.device), self.batch, self.count)

    def images(self, videos: Tensor) -> Tensor:
        """videos: (B, C, T, *S)  out: (frames that belong, C, *S)."""
        frames = videos.transpose(1, 2)
        return frames.flatten(0, 1) if self.valid is None else frames[self.valid]

    def videos(self, images: Tensor) -> Tensor:
        """images: (frames that belong, C, *S)  out: (B, C, T, *S), zeros elsewhere."""
        size = (self.batch, self.count)
        if self.valid is None:
            frames = images.view(*size, *images.shape[1:])
        else:
            blank = images.new_zeros(*size, *images.shape[1:])
            frames = blank.index_put((self.valid,), images)
        return frames.transpose(1, 2)


class TemporalConv(nn.Module):
    """Twice: a convolution over 5 frames without padding, norm, ReLU, the maximum of 2.

    x: (B, C, T)  lengths: (B,) of valid frames  out: (B, channels, T')
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (in_channels, channels):
            conv = nn.Conv1d(inputs, channels, _KERNEL)
            layers += [conv, nn.BatchNorm1d(channels), nn.ReLU(), nn.MaxPool1d(_POOL)]
        self.temporal_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        layers = list(self.temporal_conv)
        for conv, norm, relu, pool in (layers[:4], layers[4:]):
            with pooling_over(lengths):
                x = conv(x)
            valid = None
            if lengths is not None:
                lengths = lengths - (_KERNEL - 1)
                valid = valid_frames(lengths.to(x.device), x.shape[0], x.shape[2])
                lengths = lengths // _POOL
            x = pool(relu(normed(norm, x, valid)))
        return x


class BiLSTM(nn.Module):
    """Two layers in both directions. x: (T, B, C)  lengths: (B,)  out: (T, B, 2 * hidden)"""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(channels, hidden, 2, dropout=_DROPOUT, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        out: Tensor
        if lengths is None:
            out, _ = self.rnn(x)
            return out
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=x.shape[0])
        return out


class SignNet(nn.Module):
    """x: (B, in_channels, T, H, W)  lengths: (B,) of frames  out: (T', B, num_classes)

    trunk: it loses its classifier. Class 0 is CTC's blank. With lengths, frames past a video's own
    are left out. `tap_widths`: the features of what can be a tap, by name.
    """

    def __init__(
        self, trunk: resnet.ResNet, num_classes: int, width: float = 1.0, dcac: bool = False
    ) -> None:
        super().__init__()
        stages = {name: scaled(channels, width) for name, channels in _STAGES.items()}
        hidden = scaled(_HIDDEN, width)
        self.conv2d = trunk
        del self.conv2d.fc
        placed = ("layer3", "layer4") if dcac else ()
        self.dcac = nn.ModuleDict({name: DCAC(stages[name]) for name in placed})
        self.conv1d = TemporalConv(stages["layer4"], 2 * hidden)
        self.temporal_model = BiLSTM(2 * hidden, hidden)
        self.classifier = NormLinear(2 * hidden, num_classes)
        self.tap_widths = {**stages, "conv1d": 2 * hidden}

    @staticmethod
    def output_lengths(lengths: Tensor) -> Tensor:
        """T' for T frames."""
        return (lengths - _WINDOW) // _STRIDE + 1

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        rows, _ = self._run(x, lengths)
        logits: Tensor = self.classifier(rows)
        return logits

    def features(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        taps: Iterable[str] = ("conv1d", "layer4"),
    ) -> SignFeatures:
        """The logits and the taps, for training with `SRCTCLoss`. [recon]"""
        taps = tuple(taps)
        unknown = [name for name in taps if name not in self.tap_widths]
        if unknown:
            raise ValueError(f"taps {unknown}: allowed are {', '.join(self.tap_widths)}")
        rows, found = self._run(x, lengths, taps)
        if lengths is None:
            lengths = torch.full((x.shape[0],), x.shape[2])
        frames = self.output_lengths(lengths)
        tapped = {name: found[name] for name in taps}
        return SignFeatures(self.classifier(rows), frames, tapped, dict.fromkeys(taps, frames))

    def _run(
        self, x: Tensor, lengths: Tensor | None, taps: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The classifier's input (T', B, C), and the taps."""
        _check(x, lengths)
        found = {}
        frames, trunk = _Frames(x, lengths), self.conv2d
        images = F.relu(trunk.bn1(trunk.conv1(frames.images(x))), inplace=True)
        images = F.max_pool2d(images, 3, stride=2, padding=1)
        for name in _STAGES:
            images = trunk.get_submodule(name)(images)
            if name in self.dcac:
                images = frames.images(self.dcac[name](frames.videos(images), lengths))
            if name in taps:
                means = frames.videos(images.mean((2, 3)))
                found[name] = F.avg_pool1d(means, _WINDOW, _STRIDE).permute(2, 0, 1)
        rows = self.conv1d(frames.videos(images.mean((2, 3))), lengths).permute(2, 0, 1)
        found["conv1d"] = rows
        lengths = None if lengths is None else self.output_lengths(lengths)
        return self.temporal_model(rows, lengths), found


def _check(x: Tensor, lengths: Tensor | None) -> None:
    if x.dim() != 5:
        raise ValueError(f"input of shape {tuple(x.shape)}: expected videos (B, C, T, H, W)")
    if x.shape[2] < _WINDOW:
        raise ValueError(f"{x.shape[2]} frames: at least {_WINDOW}, which one row of logits sees")
    if lengths is not None and bool((lengths < _WINDOW).any()):
        raise ValueError(
            f"lengths {lengths.tolist()}: at least {_WINDOW} frames each, which one row of logits "
            "sees"
        )


def sign_resnet18(
    num_classes: int = 1296, in_channels: int = 3, width: float = 1.0, dcac: bool = False
) -> SignNet:
    return SignNet(resnet.resnet18(1, in_channels, width), num_classes, width, dcac)


def sign_resnet34(
    num_classes: int = 1296, in_channels: int = 3, width: float = 1.0, dcac: bool = False
) -> SignNet:
    return SignNet(resnet.resnet34(1, in_channels, width), num_classes, width, dcac)
