"""The static network to compare with: the same architecture, as wide as a budget allows.

Only networks of the zoo have a width; another is compared with as it is, if the budget allows it.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwsearch.networks import InputSize, build_model, source, trace_model

if TYPE_CHECKING:
    from torch import nn

# Widths tried are multiples of 1 / 8192, which finds every network of the zoo: c channels change
# at odd multiples of 1 / 2c, so c and d change together or at least 1 / 2 lcm(c, d) apart. The
# worst pair are MobileNetV2's 96 and 1280: 1 / 7680.
_STEPS = 8192


class NoTwin(ValueError):
    """No static network of the model meets the budget. Says why."""


@dataclass(frozen=True)
class Twin:
    """A static network by its width, with its exact parameters and MACs of one image.

    trust: whether it may be the user's own code. latency_ms: of a forward pass, if it is known.
    """

    model: str
    width: float
    params: int
    macs: int
    input_size: InputSize
    num_classes: int | None
    trust: bool = False
    latency_ms: float | None = None

    def create(self) -> nn.Module:
        """The network with fresh weights, on the current device."""
        return build_model(self.model, self.input_size, self.num_classes, self.width, self.trust)


def static_twin(
    model: str,
    params: int,
    input_size: InputSize,
    num_classes: int | None,
    trust: bool = False,
) -> Twin:
    """The widest `model` of at most `params` parameters in total.

    Raises zoo.UnknownModelError, and NoTwin if even the narrowest has more.
    """
    import torch

    from kwlayers.sites import trace

    if not source(model, trust).scalable:
        network = trace_model(model, input_size, num_classes, trust)
        if network.params > params:
            raise NoTwin(
                f"params {params:,}: below those of {model}, {network.params:,}, and only "
                "networks of the zoo can be made narrower"
            )
        return Twin(model, 1.0, network.params, network.macs, input_size, num_classes, trust)

    def count(step: int) -> int:
        return _params(model, step / _STEPS, input_size, num_classes)

    if (floor := count(1)) > params:
        raise NoTwin(
            f"params {params:,}: below the narrowest static {model}, which has {floor:,} "
            f"(input {'x'.join(map(str, input_size))}, {num_classes} classes)"
        )
    high = _STEPS
    while count(high) <= params:
        high *= 2
    above = bisect.bisect_right(range(high), params, lo=1, key=count)
    first = bisect.bisect_left(range(above), count(above - 1), lo=1, key=count)
    # The roundest of the widths that build this network: 1 for the network as published.
    width = max(range(first, above), key=lambda step: step & -step) / _STEPS
    with torch.device("meta"):
        network = trace(build_model(model, input_size, num_classes, width), input_size)
    return Twin(model, width, network.params, network.macs, input_size, num_classes)


@functools.cache
def _params(model: str, width: float, input_size: InputSize, num_classes: int | None) -> int:
    import torch

    with torch.device("meta"):
        network = build_model(model, input_size, num_classes, width)
    return sum(parameter.numel() for parameter in network.parameters())
