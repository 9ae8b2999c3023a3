"""Count a plan again with other people's counters, and say why they differ.

PyTorch's FlopCounterMode counts matrix products and convolutions (forward only: its backward
overcounts grouped convolutions). fvcore traces a real model, not one on `meta`; it adds norms
and pooling, and skips fused attention.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kwlayers.plan import Plan
from kwsearch.networks import InputSize, build_model
from kwsearch.terminal import talk_to_stderr

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
    model: str,
    plan: Plan,
    input_size: InputSize | None,
    num_classes: int | None,
    trust: bool = False,
) -> list[Recount]:
    """Build the planned network (on the CPU, with weights) and count it in three ways.

    trust: whether it may be the user's own code.
    """
    from kwlayers.convert import convert_

    network = build_model(model, input_size, num_classes, trust=trust).eval()
    x_shape = (1, *plan.network.input_size)
    with _single_operators(), talk_to_stderr():
        static, unseen = _fvcore(network, x_shape)
        recurrent = _recurrent(network, x_shape, plan)
        # The published form does the operations that are counted; faster ones do others.
        convert_(network, plan, backend="published")
        counted, _ = _fvcore(network, x_shape)
        flops = _flop_counter(network, x_shape)
    cost = plan.cost()
    built = sum(parameter.numel() for parameter in network.parameters())
    reasons = [
        (f"{_EXTRA.get(name, name)}, which it counts", count)
        for name, count in counted.items()
        if name not in _PRODUCTS
    ]
    if "aten::scaled_dot_product_attention" in unseen:
        seen = sum(count for name, count in static.items() if name in _PRODUCTS)
        reasons.append(("fused attention, which it cannot see", seen - plan.network.macs))
    otherwise: Counter[str] = Counter()
    for group in plan.groups:
        otherwise.update(group.counted_otherwise(plan.of(group)))
    if recurrent:
        otherwise["recurrent layers, which it does not see"] = recurrent
    apart = [(why, more) for why, more in otherwise.items() if more]
    return [
        Recount("parameters of the built network", built, cost.params.total),
        Recount("FlopCounterMode / 2", flops, cost.macs.total, tuple(apart)),
        Recount("fvcore", sum(counted.values()), cost.macs.total, (*reasons, *apart)),
    ]


def _recurrent(network: nn.Module, x_shape: tuple[int, ...], plan: Plan) -> int:
    """What the static network's recurrent layers, which are one operator each, add to a count."""
    from torch import nn

    if not any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return 0
    return _flop_counter(network, x_shape) - plan.network.macs


@contextmanager
def _single_operators() -> Iterator[None]:
    """Attention by products: FlopCounterMode does not know the operators that fuse it on a CPU."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _flop_counter(network: nn.Module, x_shape: tuple[int, ...]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(x_shape))
    return int(counter.get_total_flops()) // 2


# fvcore's names of what we count, too, and words for some of what we do not.
_PRODUCTS = {"conv", "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum"}
_EXTRA = {
    "batch_norm": "batch norms",
    "layer_norm": "layer norms",
    "group_norm": "group norms",
    "adaptive_avg_pool2d": "pooling",
}


def _fvcore(network: nn.Module, x_shape: tuple[int, ...]) -> tuple[dict[str, int], Collection[str]]:
    """MACs by operator, and the operators that it does not count."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        # fvcore uses parts of torch that are on their way out.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, torch.zeros(x_shape))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted = {name: int(count) for name, count in analysis.by_operator().items()}
        return counted, analysis.unsupported_ops().keys()
