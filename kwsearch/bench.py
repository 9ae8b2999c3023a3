"""The static network, the published form and ours: one step of each, timed in turns and weighed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.conv import KWLinear
from kwlayers.convert import convert_
from kwlayers.ops import BACKENDS, Choice, ConvGeometry, choose
from kwlayers.ops.geometry import Blocks
from kwlayers.ops.paths import PATHS
from kwlayers.ops.workspace import Workspace
from kwlayers.plan import Network, PlanError
from kwlayers.schedule import set_temperature_
from kwsearch import timing
from kwsearch.budget import Outcome, Target, meet
from kwsearch.networks import build_model, source, trace_model

Run = TypeVar("Run")

KINDS = ("static", "published", "ours")
SETTLE_BATCH = 4


class BenchError(ValueError):
    """A case that cannot be, for a reason that the user can mend."""


class BenchFailed(Exception):
    """A case that could not be measured."""


@dataclass(frozen=True)
class Case:
    """One step of one network. size: of square images. step: "forward" or "train".

    dtype: bfloat16 and float16 are autocast over parameters of float32. backend: of ours, None
    for the fastest path of each layer. trust: whether the model may be the user's own code.
    """

    model: str
    ratio: float
    batch: int
    size: int
    step: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"
    channels_last: bool = False
    backend: str | None = None
    trust: bool = False

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return _input_size(self.model, self.size)

    @property
    def training(self) -> bool:
        """Whether the step is one of training."""
        return self.step == "train"

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return torch.device(self.device).type

    @property
    def compute_dtype(self) -> torch.dtype:
        """That convolutions run in."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def autocast(self) -> torch.autocast:
        """Around the forward pass."""
        enabled = self.dtype in ("bfloat16", "float16")
        dtype = self.compute_dtype if enabled else None
        return torch.autocast(self.device_type, dtype=dtype, enabled=enabled)

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return (
            f"{self.model} b={self.ratio:g}, batch {self.batch}, {self.size} px, {self.dtype}"
            f"{layout}, {self.step}"
        )


class Call(NamedTuple):
    """What one layer is given. size: of its input, without batch (B) and channels.

    needs_grad: whether training needs the gradient of its input.
    """

    geometry: ConvGeometry
    cell: tuple[int, ...]
    num_cells: int
    batch: int
    size: tuple[int, ...]
    linear: bool
    needs_grad: bool

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.geometry.kernel[1] * self.geometry.groups

    @property
    def mixtures(self) -> int:
        """m."""
        return Blocks.of(self.geometry.kernel, self.cell).mixtures


def check_device(device: str) -> None:
    """Raise BenchError for a device that this torch cannot use."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BenchError(f"device {device!r}: allowed are cpu, cuda and cuda:NUMBER")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"device {device}: torch {torch.__version__} finds no CUDA device")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BenchError(f"device {device}: torch finds {torch.cuda.device_count()}, from cuda:0")


def outcome_of(case: Case) -> Outcome:
    """The plan that `kwsearch budget` makes for the case's ratio.

    Raises BenchError where the model does not take images of that size, and what planning raises.
    """
    return _outcome(case.model, case.ratio, case.size, case.trust)


def _input_size(model: str, size: int) -> tuple[int, int, int]:
    """Square images, with the channels that the model has by default; 3 of own code."""
    default = source(model).input_size or (3, size, size)
    if len(default) != 3:
        raise BenchError(f"{model}: it takes videos, and bench has images only")
    return (default[0], size, size)


@functools.cache
def _outcome(model: str, ratio: float, size: int, trust: bool) -> Outcome:
    return meet(_network(model, size, trust), Target(ratio), None, model)


@functools.cache
def _network(model: str, size: int, trust: bool) -> Network:
    try:
        return trace_model(model, _input_size(model, size), trust=trust)
    except PlanError as error:
        reason = str(error).removeprefix(f"{model}: ")
        raise BenchError(f"{model} at {size} px: {reason}") from None


def networks(
    case: Case, kinds: Sequence[str] = KINDS, temperature: float = 0
) -> dict[str, nn.Module]:
    """The networks of a case by kind; "published" and "ours" have equal states.

    temperature: 0 as at the end of training. Batch norms hold the statistics of a few random
    images, as they would after training: with fresh ones signals die out over the layers.
    """
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {}
    for kind in kinds:
        with torch.device(case.device):
            model = build_model(case.model, case.input_size, trust=case.trust)
            if kind != "static":
                backend = "published" if kind == "published" else case.backend
                convert_(model, outcome_of(case).plan, backend=backend)
        if case.dtype == "float64":
            model.double()
        if case.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        set_temperature_(model, temperature)
        if kind == "ours":
            model.load_state_dict(made["published"].state_dict())
        else:
            _settle_(model, images(replace(case, batch=SETTLE_BATCH)))
        made[kind] = model.train(case.training)
    return made


def _settle_(model: nn.Module, x: Tensor) -> nn.Module:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model


def images(case: Case) -> Tensor:
    """Random images (B, C, H, W) in the layout of the case; under autocast, float32."""
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    x = torch.randn(case.batch, *case.input_size, dtype=dtype, device=case.device)
    return x.to(memory_format=torch.channels_last) if case.channels_last else x


def step_of(model: nn.Module, case: Case, x: Tensor) -> timing.Step:
    """One step of `model` on images x (B, C, H, W).

    "forward" is without gradients. "train" is gradients set to None, forward, cross-entropy and
    backward, without an optimizer; in float16 without a gradient scaler.
    """
    classes = source(case.model).num_classes or 1  # Of own code, the first alone.
    labels = torch.arange(case.batch, device=case.device) % classes

    def forward() -> None:
        with torch.no_grad(), case.autocast:
            model(x)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with case.autocast:
            loss = F.cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    return train if case.training else forward


@functools.lru_cache(maxsize=16)
def calls(case: Case) -> dict[str, Call]:
    """What each converted layer is given in one step of the case, by running it on `meta`.

    Raises BenchError where it does not run: a batch of one that batch norms cannot train on.
    """
    plan = outcome_of(case).plan
    with torch.device("meta"):
        model = build_model(case.model, case.input_size, trust=case.trust)
        convert_(model, plan, backend="published")
    found: dict[str, Call] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            linear = isinstance(layer, KWLinear)
            (x,) = args
            size = (math.prod(x.shape[1:-1]),) if linear else tuple(x.shape[2:])
            cell, num_cells = layer.warehouse.cell, layer.warehouse.num_cells
            batch, needs_grad = x.shape[0], x.requires_grad
            found[name] = Call(layer.geometry, cell, num_cells, batch, size, linear, needs_grad)

        return hook

    for group in plan.groups:
        for name in group.layers:
            model.get_submodule(name).register_forward_pre_hook(record(name))
    try:
        model.train(case.training)(torch.empty(case.batch, *case.input_size, device="meta"))
    except ValueError as error:
        raise BenchError(f"{case}: {error}; try a larger --batch or --size") from None
    return found


def choices(case: Case) -> dict[str, Choice]:
    """The paths that ours takes in each layer. Raises BenchError where a layer has no such path."""
    if case.backend is None:
        return {name: choice_of(call, case) for name, call in calls(case).items()}
    if case.backend not in BACKENDS:
        raise BenchError(f"backend {case.backend!r}: allowed are {', '.join(BACKENDS)}")
    path = PATHS.get(case.backend)
    for name, call in calls(case).items():
        reason = None if path is None else path.refuses(call.geometry, call.cell)
        if reason is not None:
            raise BenchError(f"backend {case.backend!r} cannot do {case.model}'s {name}: {reason}")
    return dict.fromkeys(calls(case), Choice(case.backend, case.backend))


def choice_of(call: Call, case: Case) -> Choice:
    """The paths that backend=None takes."""
    return choose(
        case.device_type,
        case.compute_dtype,
        call.batch,
        call.size,
        call.geometry,
        call.cell,
        call.num_cells,
    )


def measure(case: Case, seconds: float = 10, rounds: int | None = None) -> dict[str, Any]:
    """Times and peak memory of the three networks, as plain data.

    seconds, rounds: as `timing.interleave` takes them. Memory is that of one step of its own,
    without gradients or workspace left from an earlier one: gradients, and the buffers that ours
    keeps from then on, are in it, parameters are not. On a GPU what libraries keep (cuBLAS) is
    allocated before. Raises BenchFailed where torch cannot run the step.
    """
    made = try_once(lambda: networks(case), str(case))
    x = images(case)
    steps = {kind: step_of(model, case, x) for kind, model in made.items()}
    peaks = {}
    with cudnn_benchmark(case):
        for kind, step in steps.items():
            try_once(step, f"{case}: {kind}")
            made[kind].zero_grad(set_to_none=True)
            Workspace.clear()
            peaks[kind] = timing.peak_bytes(step, case.device)
        times = timing.interleave(steps, seconds, rounds, case.device)
    seconds_of = {kind: timing.quartiles(times[kind].wall) for kind in KINDS}
    outcome = outcome_of(case)
    published = outcome.published
    result: dict[str, Any] = {
        **circumstances(case),
        "plan": f"published setting {published.name}" if published else "default settings",
        "paths": dict(Counter(str(choice) for choice in choices(case).values())),
        "rounds": len(times["ours"].wall),
    }
    for kind, (first, median, third) in seconds_of.items():
        result[f"{kind}_s"] = median
        result[f"{kind}_s_quartiles"] = [first, third]
    for over, under in (("published", "ours"), ("ours", "static")):
        ratios = [a / b for a, b in zip(times[over].wall, times[under].wall, strict=True)]
        first, _, third = timing.quartiles(ratios)
        result[f"{over}_over_{under}"] = seconds_of[over][1] / seconds_of[under][1]
        result[f"{over}_over_{under}_quartiles"] = [first, third]
    result["cpu_s"] = {kind: timing.quartiles(times[kind].cpu)[1] for kind in KINDS}
    result["peak_bytes"] = peaks
    return result


def circumstances(case: Case) -> dict[str, Any]:
    """What a time is to be read with."""
    return {**vars(case), "threads": torch.get_num_threads(), "malloc": timing.malloc()}


def try_once(run: Callable[[], Run], what: str) -> Run:
    """What may turn out to be more than torch or the machine can do."""
    try:
        return run()
    except RuntimeError as error:
        raise BenchFailed(f"{what} cannot run: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def cudnn_benchmark(case: Case) -> Iterator[None]:
    """cuDNN looks for its fastest convolution, for all three alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = case.device_type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
