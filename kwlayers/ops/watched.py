"""Whether something looks through an operation: then it must be made of torch's own."""

from __future__ import annotations

import torch


def watched() -> bool:
    """By tracing, or by torch.func, which see torch's operators only."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
