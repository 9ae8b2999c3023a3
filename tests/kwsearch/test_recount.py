"""Counting again with other counters: the parts that differ are named, and add up."""

from __future__ import annotations

from collections.abc import Callable

import kwlayers
from kwsearch import report
from kwsearch.networks import build_model
from kwsearch.recount import recount_plan

# Attention that torch.nn fuses in one operator, a product that is no layer, an upsampling, which
# fvcore counts by the way.
OWN = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=3):
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 2, 2)
            self.norm = nn.GroupNorm(4, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.hidden = nn.Linear(32, 64)
            self.back = nn.Linear(64, 32)
            self.up = nn.Upsample(scale_factor=2)
            self.head = nn.Linear(32, num_classes)

        def forward(self, x):
            x = self.norm(self.stem(x))
            tokens = x.flatten(2).transpose(1, 2)
            tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            tokens = self.back(self.hidden(tokens).relu())
            mixed = tokens @ tokens.transpose(1, 2)
            return self.head((mixed @ tokens).mean(1)) + self.up(x).mean()
"""


def test_what_other_counters_see_otherwise_is_named_and_adds_up(
    own_code: Callable[[str], str],
) -> None:
    name = f"{own_code(OWN)}:Net"
    model = build_model(name, (3, 8, 8), trust=True)
    plan = kwlayers.plan_model(model, (3, 8, 8), ratio=1, sharing="layer")
    assert plan.groups
    parameters, flops, fvcore = recount_plan(name, plan, (3, 8, 8), None, trust=True)
    # 16 tokens of 32 channels: Q K^T and A V of the attention, and the product with itself.
    attention = 2 * 16 * 16 * 32
    assert plan.network.macs == 16 * (12 * 32 + 4 * 32 * 32 + 2 * 32 * 64) + 2 * attention + 96
    assert parameters.counted == parameters.ours == plan.cost().params.total
    assert flops.counted == flops.ours == plan.cost().macs.total
    assert fvcore.explained
    reasons = dict(fvcore.reasons)
    assert reasons["fused attention, which it cannot see"] == -attention
    assert reasons["group norms, which it counts"] > 0
    assert any("upsample" in what for what in reasons)
    assert not any("UNEXPLAINED" in line for line in report.recount_lines([flops, fvcore]))
