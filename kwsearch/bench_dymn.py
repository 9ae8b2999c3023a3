"""DyMN by the published form of its parts and by ours: equal first, then timed in turns.

Published: the kernels of a batch are mixed and kept, and a Dy-ReLU makes all pieces as one tensor.
Between the two: our convolutions with the published Dy-ReLU, which tells what either is worth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kwlayers import context
from kwlayers.mixed import MixedLayer
from kwlayers.ops.dy_relu import dy_relu
from kwsearch import timing, zoo
from kwsearch.bench import BenchFailed

KINDS = ("published", "published Dy-ReLU", "ours")
# float64 through 15 blocks.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """frames: of 128 mel bands. step: forward or train."""

    model: str
    batch: int
    frames: int
    step: str

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.frames} frames, {self.step}"


def published_dy_relu(
    x: Tensor, slopes: Tensor, offsets: Tensor, gates: Sequence[Tensor] = ()
) -> Tensor:
    """As the published code computes it: shapes as `dy_relu` has them."""
    maps = (1,) * (x.dim() - 2)
    slopes, offsets = (c.view(*c.shape[:2], *maps, -1) for c in (slopes, offsets))
    pieces = x.unsqueeze(-1) * slopes + offsets
    out = torch.maximum(pieces[..., 0], pieces[..., 1])
    for gate in gates:
        out = out * gate
    return out


@contextlib.contextmanager
def _form(model: nn.Module, kind: str) -> Iterator[None]:
    """The model computes by that kind of parts."""
    for layer in model.modules():
        if isinstance(layer, MixedLayer):
            layer.backend = "published" if kind == "published" else None
    function = dy_relu if kind == "ours" else published_dy_relu
    with mock.patch.object(context, "dy_relu", function):
        yield


def check(model: str) -> None:
    """Raise BenchFailed unless outputs and gradients of all kinds are equal in float64."""
    torch.manual_seed(0)
    made = zoo.create(model, num_classes=5).double().eval()
    x = torch.randn(2, 1, 32, 45, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        with _form(made, kind):
            out = made(x)
        found[kind] = [out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))]
    for kind in KINDS[1:]:
        for one, other in zip(found["published"], found[kind], strict=True):
            error = float((one - other).detach().abs().max() / one.detach().abs().max())
            if not error <= _TOLERANCE:
                raise BenchFailed(f"{model}: {kind} differs from the published form by {error:.1g}")


def measure(case: Case, seconds: float = 10, rounds: int | None = None) -> dict[str, Any]:
    """Times and peak memory of a step of each kind, as plain data; ratios by round.

    seconds, rounds: as `timing.interleave` takes them.
    """
    torch.manual_seed(0)
    model = zoo.create(case.model).train(case.step == "train")
    x = torch.randn(case.batch, 1, 128, case.frames)
    labels = torch.arange(case.batch) % 2

    def step_of(kind: str) -> timing.Step:
        def step() -> None:
            with _form(model, kind):
                if case.step == "forward":
                    with torch.no_grad():
                        model(x)
                    return
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()  # type: ignore[no-untyped-call]

        return step

    steps = {kind: step_of(kind) for kind in KINDS}
    peaks = {}
    for kind, step in steps.items():
        step()
        model.zero_grad(set_to_none=True)
        peaks[kind] = timing.peak_bytes(step)
    times = timing.interleave(steps, seconds, rounds)
    result: dict[str, Any] = {**vars(case), "rounds": len(times["ours"].wall)}
    for kind in KINDS:
        first, median, third = timing.quartiles(times[kind].wall)
        pairs = zip(times[kind].wall, times["ours"].wall, strict=True)
        low, ratio, high = timing.quartiles([one / other for one, other in pairs])
        result[kind] = {
            "seconds": median,
            "quartiles": [first, third],
            "over_ours": ratio,
            "over_ours_quartiles": [low, high],
            "peak_bytes": peaks[kind],
        }
    return result
