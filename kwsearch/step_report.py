"""What a step takes: the memory of a plan beside the static network's, under a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kwsearch.memory import Memory, Step, largest_batch, memory_of
from kwsearch.terminal import new_table

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from kwlayers.plan import Plan

PARTS = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "state of the optimizer",
    "images": "images and labels",
    "activations": "activations",
    "mixing": "attention and kernels",
    "workspace": "workspace of mixing",
    "passing": "in passing",
}


class DoesNotFit(ValueError):
    """A step that takes more than it may."""


@dataclass(frozen=True)
class Takes:
    """The memory of a step of a plan and of the static network, and how many images fit.

    limit: bytes that a step may take, None without one. most, static_most: images that fit.
    """

    step: Step
    plan: Memory
    static: Memory
    limit: int | None
    most: int | None
    static_most: int | None

    @classmethod
    def of(
        cls,
        make_model: Callable[[], nn.Module],
        plan: Plan,
        step: Step,
        batch: int | None,
        limit: int | None,
    ) -> Takes:
        """batch: images; None for as many as fit the limit, or one."""
        size = plan.network.input_size

        def memory(planned: Plan | None, images: int) -> Memory:
            return memory_of(make_model, planned, size, replace(step, batch=images))

        most = static_most = None
        if limit is not None:
            most = largest_batch(lambda images: memory(plan, images).total, limit)
            static_most = largest_batch(lambda images: memory(None, images).total, limit)
        images = batch or most or 1
        own, static = memory(plan, images), memory(None, images)
        return cls(replace(step, batch=images), own, static, limit, most, static_most)

    def parts(self) -> list[str | Table]:
        """A headline, the parts, and what the limit means."""
        step = self.step
        how = [step.dtype, f"on {step.device}"]
        if step.training:
            how.append(step.optimizer)
        how += [name for name in ("channels_last", "checkpointing") if getattr(step, name)]
        what = "a training step" if step.training else "a forward pass"
        head = (
            f"memory of {what}, batch {step.batch}, {', '.join(how)}: "
            f"{self.plan.total:,} bytes, {self.plan.total / self.static.total:.2f} x static"
        )
        table = new_table(("bytes at the peak",), ("plan", "static"))
        for part, words in PARTS.items():
            own, static = getattr(self.plan, part), getattr(self.static, part)
            if own or static:
                table.add_row(words, f"{own:,}", f"{static:,}")
        table.add_section()
        table.add_row("total", f"{self.plan.total:,}", f"{self.static.total:,}")
        found: list[str | Table] = [head, table]
        if self.limit is not None:
            found.append(
                f"{self.limit:,} bytes hold steps of up to {self.most:,} images; of the static "
                f"network {self.static_most:,}"
            )
        return found

    def check(self) -> None:
        """Raise DoesNotFit for a step over the limit."""
        if self.limit is None or self.plan.total <= self.limit:
            return
        tries = [f"--batch {self.most}"] if self.most else ["a smaller --input"]
        if self.step.training and not self.step.checkpointing:
            tries.append("--checkpointing")
        if self.step.dtype == "float32":
            tries.append("--dtype bfloat16")
        raise DoesNotFit(
            f"a step of {self.step.batch:,} images takes {self.plan.total:,} bytes, over --memory "
            f"{self.limit:,}; try {' or '.join(tries)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Bytes, and images that fit."""
        return {
            "step": asdict(self.step),
            "plan": {**asdict(self.plan), "total": self.plan.total},
            "static": {**asdict(self.static), "total": self.static.total},
            "limit": self.limit,
            "largest_batch": self.most,
            "static_largest_batch": self.static_most,
        }
