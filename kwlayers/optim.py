"""Parameter groups for optimizers: what weight decay is for, and what it is not."""

from __future__ import annotations

from typing import Any

from torch import nn

from kwlayers.dynamic import DynamicLayer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, for any optimizer of torch.optim.

    Kernels, cells and matrices decay; biases, mixed ones among them, factors of channels and
    positions (KernelDNA's adapters), norms (the attention's, too) and what the model lists in its
    `no_weight_decay()`, as timm's models do, do not. Every parameter is in one group, once. Raises
    ValueError for a negative weight_decay.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay {weight_decay}: at least 0")
    listed = getattr(model, "no_weight_decay", None)
    spared = set(listed()) if callable(listed) else set()
    layers = [module for module in model.modules() if isinstance(module, DynamicLayer)]
    like_biases = {id(getattr(layer, name)) for layer in layers for name in layer.undecayed}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.dim() <= 1 or name in spared or id(parameter) in like_biases
            (keep if bare else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": float(weight_decay)},
        {"params": keep, "weight_decay": 0.0},
    ]
