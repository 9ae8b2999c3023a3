"""Peak memory of a step, without running it: what torch would allocate for it is counted.

The step runs on tensors that have shapes and no data (`kwsearch.allocations`), on the paths that
its layers would take on the device. Counted is what torch's allocator would hold at a time; what
libraries take past it is not (a CUDA context and cuDNN's and cuBLAS's workspaces, on a CPU
oneDNN's small scratch), nor is fragmentation.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kwlayers.blocks import blocks_of
from kwlayers.convert import convert_
from kwlayers.dynamic import DynamicLayer
from kwlayers.ops.device import standing_for
from kwlayers.ops.workspace import Workspace
from kwlayers.plan import PlanError
from kwlayers.sites import candidates
from kwsearch.allocations import Allocations, Event, cpu_scratch, no_scratch
from kwsearch.terminal import talk_to_stderr

if TYPE_CHECKING:
    from kwlayers.plan import Plan


@dataclass(frozen=True)
class Step:
    """One step, of training with its optimizer, or forward only.

    batch: images. dtype: bfloat16 and float16 are autocast over parameters of float32. optimizer:
    sgd is with momentum. checkpointing: whether repeated blocks run again in backward instead of
    keeping their activations (`torch.utils.checkpoint`).
    """

    batch: int
    training: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    optimizer: str = "sgd"
    channels_last: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when a step holds most, by part.

    weights: parameters and buffers. optimizer: its state. images: the batch. activations: kept
    for backward, or in use. mixing: attention, kernels of single samples and what else dynamic
    layers keep for backward, but for their results. workspace: what kernels are mixed in. passing:
    results and copies on their way.
    """

    weights: int
    gradients: int
    optimizer: int
    images: int
    activations: int
    mixing: int
    workspace: int
    passing: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(
    make_model: Callable[[], nn.Module],
    plan: Plan | None,
    input_size: Sequence[int],
    step: Step,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Memory:
    """Of one step of the network that `make_model` makes, converted by `plan`; None: as it is.

    input_size: (C, ...) of an image. make_model is best called under `torch.device("meta")`:
    weights are not looked at. make_optimizer: of a model, instead of `step.optimizer`. Raises
    PlanError where the step cannot run: a batch too small for batch norms.
    """
    model = make_model().to("meta")
    if step.checkpointing:
        _checkpoint_(model)
    if plan is not None:
        convert_(model, plan)
    model.train(step.training)
    if step.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with standing_for(step.device), _without_data(model, step) as device:
        x = torch.empty(step.batch, *input_size, device=device)
        if step.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        y = torch.empty(step.batch, dtype=torch.long, device=device)
        try:
            with _FusedAttention():
                return _run(model, x, y, step, make_optimizer or partial(_optimizer, step))
        except (ValueError, RuntimeError) as error:
            raise PlanError(f"a step of {step.batch} images cannot run: {error}") from error


@contextlib.contextmanager
def _without_data(model: nn.Module, step: Step) -> Iterator[str]:
    """Where the model and its tensors are, without data: on `meta`, which autocast does not know,
    or as fake tensors, which are slower.
    """
    if step.dtype == "float32":
        yield "meta"
        return
    with FakeTensorMode():
        made: dict[Tensor, Tensor] = {}
        for module in model.modules():
            both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in both:
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = made.setdefault(tensor, _fake(tensor))
        yield "cpu"


class _FusedAttention(TorchFunctionMode):
    """torch's attention in one operator, as on the devices; on `meta` it would be in several."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            known = {"query", "key", "value", "is_causal", "scale"}
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            fits = all(t.is_meta and t.dim() == 4 and t.stride(3) == 1 for t in tensors)
            if given.keys() <= known and fits:
                fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                return fused(**given)[0]
        return func(*args, **kwargs)


def _fake(tensor: Tensor) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    step: Step,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> Memory:
    params = list(model.parameters())
    held = [*params, *model.buffers()]
    optimizer = make_optimizer(model) if step.training else None
    state = [] if optimizer is None else _state_after_a_step(optimizer)
    counted = Allocations(cpu_scratch if step.device == "cpu" else no_scratch)
    counted.ignore([*held, *state, x, y])
    kept: set[int] | None = None
    autocast = torch.autocast("cpu", getattr(torch, step.dtype), step.dtype != "float32")
    Workspace.clear()
    with talk_to_stderr(), _mixing_labelled(model, counted), counted:
        if optimizer is None:
            with torch.no_grad(), autocast:
                model(x)
        else:
            with autocast:
                loss = step_loss(model(x), y)
            kept = counted.alive()
            with counted.adding_up():
                torch.autograd.backward(loss)
            del loss
            optimizer.step()
    buffers = {counted.number(buffer): buffer.nbytes for buffer in Workspace.kept()}
    Workspace.clear()
    grads = {counted.number(p.grad) for p in params if p.grad is not None}

    def part(number: int) -> str:
        if number in grads:
            return "gradients"
        if number == 0 or not (kept is None or number in kept):
            return "passing"
        return "mixing" if counted.labels[number] == "mixing" else "activations"

    parts = Counter(
        weights=_bytes(held),
        optimizer=_bytes(state),
        images=_bytes([x, y]),
        # From the second step on it is there from the beginning.
        workspace=sum(buffers.values()),
    )
    for event in _until_peak([event for event in counted.events if event.number not in buffers]):
        parts[part(event.number)] += event.nbytes
    return Memory(**{field.name: parts[field.name] for field in fields(Memory)})


def _until_peak(events: list[Event]) -> list[Event]:
    """The events up to the first moment when most is held."""
    sums = list(accumulate((event.nbytes for event in events), initial=0))
    return events[: sums.index(max(sums))]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory, shared memory once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer(step: Step, model: nn.Module) -> torch.optim.Optimizer:
    params = model.parameters()
    foreach = step.device == "cuda"  # torch's default
    if step.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=foreach
        )
    return torch.optim.AdamW(params, foreach=foreach)


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that it keeps; without gradients."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [t for one in optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]


def _checkpoint_(model: nn.Module) -> None:
    """Run the repeated blocks again in backward, instead of keeping what they compute."""
    names = [name for name, _, _ in candidates(model)]
    for name in sorted(set(blocks_of(model, names).values()) - {""}):
        block = model.get_submodule(name)
        block.__class__ = _checkpointed(type(block))


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that is called again in backward, with its hooks."""

    class Checkpointed(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(super().__call__, *args, **again, **kwargs)

    return Checkpointed


@contextlib.contextmanager
def _mixing_labelled(model: nn.Module, counted: Allocations) -> Iterator[None]:
    """Label what dynamic layers allocate, but for their results."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DynamicLayer):
                stack.enter_context(_Labelled(module, counted))
        yield


class _Labelled(contextlib.ExitStack):
    """The label of one layer, while it runs forward."""

    def __init__(self, layer: nn.Module, counted: Allocations) -> None:
        super().__init__()
        self.counted, self.before = counted, ""
        self.callback(layer.register_forward_pre_hook(self._enter).remove)
        self.callback(layer.register_forward_hook(self._leave).remove)

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self.before, self.counted.label = self.counted.label, "mixing"

    def _leave(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.counted.label = self.before
        self.counted.labels[self.counted.number(out)] = self.before


MOST_IMAGES = 2**16


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (B, classes), of videos (T, B, classes)  labels: (B,)"""
    if logits.dim() == 3:
        rows = logits.flatten(0, 1)
        return F.cross_entropy(rows, labels.new_empty(len(rows)))
    return F.cross_entropy(logits, labels)


def largest_batch(total: Callable[[int], int], limit: int) -> int:
    """The most images, up to `MOST_IMAGES`, whose step takes at most `limit` bytes; 0 for none.

    total: bytes of a step of so many images, which grow with them, about in proportion.
    """
    fits, over, guess = 0, MOST_IMAGES + 1, 8
    known: list[tuple[int, int]] = []
    while over - fits > 1:
        known.append((guess, total(guess)))
        if known[-1][1] <= limit:
            fits = guess
        else:
            over = guess
        near = _guess(known, limit) if len(known) < 9 else (fits + over) // 2
        guess = min(max(near, fits + 1), over - 1)
    return fits


def _guess(known: Sequence[tuple[int, int]], limit: int) -> int:
    """Images by a line through the last two sizes."""
    images, nbytes = known[-1]
    before, less = known[-2] if len(known) > 1 else known[-1]
    if nbytes == less:
        return 2 * images if nbytes <= limit else images // 2
    return images + math.floor((limit - nbytes) * (images - before) / (nbytes - less))
