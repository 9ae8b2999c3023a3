"""The repeated blocks of a model: residual, inverted, dense, transformer blocks."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module, layers: list[str]) -> dict[str, str]:
    """The name of the innermost block that holds each of `layers`; empty where none does.

    A block holds two of them or more. It is one of several of its class that are numbered
    children of one module, three at least if that is no container, or the only child of a
    container.
    """
    held = Counter(parent for layer in layers for parent in _parents(layer))
    numbered = {
        name: {
            path: child
            for path, child in _children(name, module)
            if re.search(r"\d$", path) and held[path] > 1 and not isinstance(child, _CONTAINERS)
        }
        for name, module in model.named_modules()
    }
    # Modules of one class are built alike, though some have a single block.
    most: Counter[tuple[type, type]] = Counter()
    for name, module in model.named_modules():
        for kind, count in Counter(map(type, numbered[name].values())).items():
            most[type(module), kind] = max(count, most[type(module), kind])
    blocks = set()
    for name, module in model.named_modules():
        classes = Counter(map(type, numbered[name].values()))
        for path, child in numbered[name].items():
            if isinstance(module, _CONTAINERS):
                repeated = classes[type(child)] > 1 or len(module._modules) == 1
            else:
                repeated = most[type(module), type(child)] > 2
            if repeated:
                blocks.add(path)
    return {
        layer: next((parent for parent in _parents(layer) if parent in blocks), "")
        for layer in layers
    }


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{child}" if name else child, m) for child, m in module.named_children()]


def _parents(name: str) -> list[str]:
    """The modules that a name passes through, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
