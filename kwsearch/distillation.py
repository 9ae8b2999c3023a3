"""Offline distillation: a loss of labels and of a teacher's stored logits.

Of EfficientAT's training of DyMN (https://github.com/fschmid56/EfficientAT, arXiv 2310.15648). For
logits z, targets y, the teacher's logits t and its weight w, 0.9 as published:

    several labels each    (1 - w) BCE(sigmoid(z), y) + w BCE(sigmoid(z), sigmoid(t))
    one label each         (1 - w) CE(softmax(z), y)  + w CE(softmax(z), softmax(t))

Both terms are means over the batch, of several labels over the classes too. The second line is
the same idea for labels that exclude each other; nothing of it is published. Both are linear in
the targets: the loss of a mixup with share s is s loss(y, t) + (1 - s) loss(y', t'), as there.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def offline_distillation(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    weight: float = 0.9,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """logits, teacher_logits: (B, classes)  targets: (B, classes) floats in 0..1 of several labels
    each, or (B,) int64, one label each  out: (), with reduction "none" (B,)

    weight: the teacher's. For a teacher of temperature T give teacher_logits / T. No gradient
    reaches the teacher. Raises ValueError.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the teacher's weight is {weight!r}; allowed 0 to 1, as published 0.9")
    if logits.ndim != 2 or teacher_logits.shape != logits.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)}, the teacher's of "
            f"{tuple(teacher_logits.shape)}; allowed (B, classes), the same for both"
        )
    teacher = teacher_logits.detach().to(logits.dtype)
    if targets.is_floating_point() and targets.shape == logits.shape:
        of_labels, of_teacher = (
            F.binary_cross_entropy_with_logits(logits, said, reduction="none").mean(1)
            for said in (targets.to(logits.dtype), teacher.sigmoid())
        )
    elif targets.dtype == torch.int64 and targets.shape == logits.shape[:1]:
        of_labels, of_teacher = (
            F.cross_entropy(logits, said, reduction="none")
            for said in (targets, teacher.softmax(dim=1))
        )
    else:
        raise ValueError(
            f"targets are {str(targets.dtype).removeprefix('torch.')} of shape "
            f"{tuple(targets.shape)}; allowed floats of shape {tuple(logits.shape)}, or int64 "
            f"labels of shape {tuple(logits.shape[:1])}"
        )
    losses = (1 - weight) * of_labels + weight * of_teacher
    return losses if reduction == "none" else losses.mean()
