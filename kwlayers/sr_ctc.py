"""SR-CTC: CTC on parts of a network, through its own classifier, while it is trained. [recon]

The paper (Liu et al., DESign, arXiv 2507.03339) has no public code, and its equations were not at
hand: this is our reconstruction from the abstract. A tap is what a prefix of the network gives,
f_i (T_i, B, d_i). A projection A_i brings it to the D features of the classifier W, which the
network's own logits z share:

    L = CTC(z) + sum_i lambda_i CTC(W A_i f_i) + sum_i mu_i KL_i
    KL_i = t^2 KL(softmax(z / t) || softmax(W A_i f_i / t))     mean over frames; z detached; t = 8;
                                                                without the blank
    parameters  sum of d_i*D + D over taps with d_i != D, in training; none in inference

With one tap of D features after the temporal convolutions, lambda = 1 and mu = 10 or 25 these are
the losses of VAC (Min et al., ICCV 2021, arXiv 2104.02330). On purpose different from its code:

- Distillation takes frames within a sequence's length only; there it takes padding, too.
- A sequence with fewer frames than its target needs is an error. There its loss is infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.dcac import valid_frames

_FEATURES = 1024


class NormLinear(nn.Module):
    """Logits by a matrix of unit columns, without bias: VAC's normalised classifier.

    x: (..., in_features)  out: (..., out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"in_features": in_features, "out_features": out_features}.items():
            if size < 1:
                raise ValueError(f"{name} {size}: at least 1")
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(
            torch.empty(in_features, out_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with ReLU's gain."""
        nn.init.xavier_uniform_(self.weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor) -> Tensor:
        return x @ F.normalize(self.weight, dim=0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Tap:
    """A part of the network under supervision. [recon]

    width: its features, d. weight: lambda at the start of training. final_weight: lambda at its
    end, which it moves to in a straight line; None for a constant. distillation: mu.
    """

    width: int
    weight: float = 1.0
    final_weight: float | None = None
    distillation: float = 0.0


class SRCTC(NamedTuple):
    """A loss and its weighted parts, which add up to it: ctc, and ctc/NAME and kl/NAME of taps."""

    total: Tensor
    parts: dict[str, Tensor]


def sr_ctc_params(widths: Iterable[int], features: int = _FEATURES) -> int:
    """Parameters of an `SRCTCLoss` over taps of these widths. [recon]"""
    return sum((width + 1) * features for width in widths if width != features)


class SRCTCLoss(nn.Module):
    """CTC of a network and of its taps, by one classifier that the network keeps. [recon]

    taps: by name. features: what the classifier takes, D. blank: the class that is no label.
    temperature: of the distillation. The projections are trained with the network; inference needs
    nothing of this module. `progress` is a buffer: how much of the training is done, in [0, 1].
    """

    progress: Tensor

    def __init__(
        self,
        taps: Mapping[str, Tap],
        features: int = _FEATURES,
        blank: int = 0,
        temperature: float = 8.0,
    ) -> None:
        super().__init__()
        if features < 1 or blank < 0 or not temperature > 0:
            raise ValueError(
                f"features {features}, blank {blank}, temperature {temperature}: at least 1, "
                "at least 0, above 0"
            )
        for name, tap in taps.items():
            _check_tap(name, tap)
        self.taps = dict(taps)
        self.features = features
        self.blank = blank
        self.temperature = temperature
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(tap.width, features)
                for name, tap in taps.items()
                if tap.width != features
            }
        )
        self.register_buffer("progress", torch.zeros(()))

    def set_progress_(self, progress: float) -> SRCTCLoss:
        """Say how much of the training is done, as epoch / epochs: it decides the lambdas."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress {progress}: it must be in [0, 1]")
        self.progress.fill_(progress)
        return self

    def weight(self, name: str) -> Tensor:
        """lambda of a tap now, a scalar."""
        tap = self.taps[name]
        end = tap.weight if tap.final_weight is None else tap.final_weight
        return tap.weight + (end - tap.weight) * self.progress

    def forward(
        self,
        logits: Tensor,
        lengths: Tensor,
        taps: Mapping[str, Tensor],
        tap_lengths: Mapping[str, Tensor],
        classifier: nn.Module,
        targets: Tensor,
        target_lengths: Tensor,
    ) -> SRCTC:
        """The loss, a mean over sequences; as in VAC, a CTC is not divided by its target's length.

        logits: (T, B, V), the network's own  lengths: (B,) frames of them
        taps: (T_i, B, d_i) by name           tap_lengths: (B,) by name, their own
        classifier: (..., D) -> (..., V)
        targets: (B, S) or (sum of target_lengths,)  target_lengths: (B,)
        """
        if set(taps) != set(self.taps) or set(tap_lengths) != set(self.taps):
            raise ValueError(
                f"taps {sorted(taps)} with lengths of {sorted(tap_lengths)}: "
                f"this loss is for {sorted(self.taps)}"
            )
        if logits.dim() != 3 or self.blank >= logits.shape[2]:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}: expected (T, B, V), V above the "
                f"blank {self.blank}"
            )
        logits = _in_float(logits)
        needed = _frames_needed(
            targets, target_lengths, logits.shape[1], logits.shape[2], self.blank
        )

        def ctc(name: str, z: Tensor, frames: Tensor) -> Tensor:
            _check_lengths(name, z, frames, needed)
            log_probs = z.log_softmax(2)
            each = F.ctc_loss(
                log_probs, targets, frames, target_lengths, self.blank, "none", zero_infinity=True
            )
            return each.mean()

        parts = {"ctc": ctc("the network", logits, lengths)}
        for name, tap in self.taps.items():
            z = self._logits(name, taps[name], classifier, logits)
            parts[f"ctc/{name}"] = self.weight(name) * ctc(f"tap {name!r}", z, tap_lengths[name])
            if tap.distillation:
                _check_alike(name, z, tap_lengths[name], logits, lengths)
                parts[f"kl/{name}"] = tap.distillation * self._divergence(z, logits, lengths)
        return SRCTC(torch.stack(list(parts.values())).sum(), parts)

    def _logits(self, name: str, x: Tensor, classifier: nn.Module, main: Tensor) -> Tensor:
        width, batch = self.taps[name].width, main.shape[1]
        if x.dim() != 3 or x.shape[1:] != (batch, width):
            raise ValueError(
                f"tap {name!r} of shape {tuple(x.shape)}: expected (T, {batch}, {width})"
            )
        z = _in_float(classifier(self.projections[name](x) if name in self.projections else x))
        if z.shape[2] != main.shape[2]:
            raise ValueError(
                f"the classifier gives {z.shape[2]} classes for tap {name!r}, the network's "
                f"logits have {main.shape[2]}: both must be of one classifier"
            )
        return z

    def _divergence(self, z: Tensor, main: Tensor, lengths: Tensor) -> Tensor:
        """t^2 KL(main || z), the mean over valid frames, without the blank."""
        student, teacher = (
            (self._labels_only(one) / self.temperature).log_softmax(2) for one in (z, main.detach())
        )
        each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(2)
        valid = valid_frames(lengths.to(z.device), z.shape[1], z.shape[0]).T
        return self.temperature**2 * each[valid].mean()

    def _labels_only(self, z: Tensor) -> Tensor:
        return torch.cat([z[..., : self.blank], z[..., self.blank + 1 :]], 2)

    def extra_repr(self) -> str:
        return f"features={self.features}, blank={self.blank}, temperature={self.temperature}"


def _in_float(z: Tensor) -> Tensor:
    """At least in single precision, which torch's CTC needs."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check_tap(name: str, tap: Tap) -> None:
    if not name or "." in name:
        raise ValueError(f"tap {name!r}: a name without dots, as of a module")
    if tap.width < 1:
        raise ValueError(f"tap {name!r}: width {tap.width}: at least 1")
    weights = {
        "weight": tap.weight, "final_weight": tap.final_weight, "distillation": tap.distillation
    }  # fmt: skip
    for what, weight in weights.items():
        if weight is not None and not weight >= 0:
            raise ValueError(f"tap {name!r}: {what} {weight}: at least 0")


def _frames_needed(
    targets: Tensor, target_lengths: Tensor, batch: int, classes: int, blank: int
) -> list[int]:
    """The fewest frames of each sequence: one a label, and a blank between equal neighbours."""
    counts = target_lengths.tolist()
    if target_lengths.shape != (batch,) or min(counts) < 0:
        raise ValueError(f"target_lengths {counts}: expected {batch} whole numbers from 0")
    if targets.dim() == 1 and len(targets) == sum(counts):
        sequences = torch.split(targets, counts)
    elif targets.dim() == 2 and len(targets) == batch and max(counts) <= targets.shape[1]:
        sequences = tuple(row[:count] for row, count in zip(targets, counts, strict=True))
    else:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} for target_lengths {counts}: expected "
            f"({batch}, {max(counts)}) or more columns, or ({sum(counts)},)"
        )
    labels = torch.cat(sequences)
    if bool(((labels < 0) | (labels >= classes) | (labels == blank)).any()):
        raise ValueError(
            f"targets from {int(labels.min())} to {int(labels.max())}: labels are classes from 0 "
            f"to {classes - 1}, not the blank {blank}"
        )
    return [len(row) + int((row[1:] == row[:-1]).sum()) for row in sequences]


def _check_lengths(name: str, z: Tensor, lengths: Tensor, needed: list[int]) -> None:
    try:
        valid_frames(lengths, z.shape[1], z.shape[0])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for index, (frames, least) in enumerate(zip(lengths.tolist(), needed, strict=True)):
        if frames < least:
            raise ValueError(
                f"{name}: sequence {index} has {frames} frames, its target needs {least} (one a "
                "label, and a blank between equal neighbours): leave the sequence out, or "
                "reduce time less"
            )


def _check_alike(name: str, z: Tensor, lengths: Tensor, main: Tensor, main_lengths: Tensor) -> None:
    if z.shape[0] != main.shape[0] or lengths.tolist() != main_lengths.tolist():
        raise ValueError(
            f"tap {name!r}: {z.shape[0]} frames of lengths {lengths.tolist()}, but distillation "
            f"needs the network's own, {main.shape[0]} of {main_lengths.tolist()}: pool the tap "
            "to them, or set its distillation to 0"
        )
