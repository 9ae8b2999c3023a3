"""Count a plan again with other people's counters, and say why they differ.

PyTorch's FlopCounterMode counts matrix products and convolutions (forward only: its backward
overcounts grouped convolutions). fvcore traces a real model, not one on `meta`; it adds norms
and pooling, and skips fused attention.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwlayers.plan import Plan
from kwsearch.networks import InputSize, build_model

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Recount:
    """One counter's MACs (or parameters), ours, and what makes the difference.

    reasons: (what, how much it adds to the counter's number), which must add up.
    """

    counter: str
    counted: int
    ours: int
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def explained(self) -> bool:
        """Whether the reasons account for all of the difference."""
        return self.counted - self.ours == sum(amount for _, amount in self.reasons)


def recount_plan(
    model: str, plan: Plan, input_size: InputSize | None, num_classes: int | None
) -> list[Recount]:
    """Build the planned network (on the CPU, with weights) and count it in three ways."""
    from kwlayers.convert import convert_

    network = build_model(model, input_size, num_classes).eval()
    # The published form does the operations that are counted; faster ones do others.
    convert_(network, plan, backend="published")
    cost = plan.cost()
    x_shape = (1, *plan.network.input_size)
    built = sum(parameter.numel() for parameter in network.parameters())
    return [
        Recount("parameters of the built network", built, cost.params.total),
        Recount("FlopCounterMode / 2", _flop_counter(network, x_shape), cost.macs.total),
        _fvcore(network, x_shape, plan),
    ]


def _flop_counter(network: nn.Module, x_shape: tuple[int, ...]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(x_shape))
    return int(counter.get_total_flops()) // 2


_EXTRA = {
    "batch_norm": "batch norms, which it counts",
    "layer_norm": "layer norms, which it counts",
    "group_norm": "group norms, which it counts",
    "adaptive_avg_pool2d": "pooling, which it counts",
}


def _fvcore(network: nn.Module, x_shape: tuple[int, ...], plan: Plan) -> Recount:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        # fvcore uses parts of torch that are on their way out.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, torch.zeros(x_shape))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted = {name: int(count) for name, count in analysis.by_operator().items()}
        skipped = analysis.unsupported_ops()
    reasons = [(why, counted[name]) for name, why in _EXTRA.items() if name in counted]
    if "aten::scaled_dot_product_attention" in skipped:
        of_layers = sum(s.positions * math.prod(s.kernel) for s in plan.network.sites)
        missing = plan.network.macs - of_layers
        reasons.append(("fused attention, which it cannot see", -missing))
    total = sum(counted.values())
    return Recount("fvcore", total, plan.cost().macs.total, tuple(reasons))
