"""A trained model for other runtimes: ONNX and torch.export, for batches of any size."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kwlayers.dynamic import DynamicLayer
from kwsearch.export.errors import ExportError, ExportFailed

_LIMIT = 2**31 - 2**26  # of an ONNX file, less what a graph takes


def export_onnx(model: nn.Module, input_size: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Write `model`, evaluated, as an ONNX model: `input` (batch, *input_size) to `output`.

    input_size: of one input, (C, H, W). The batch is free, from 1 on (an empty one, which torch
    takes, fails when it runs), and every operator is of ONNX's own set. The file is as large as the
    parameters, each of which it holds once, plus some 200 bytes per operator. Layers are computed
    by the "portable" backend of `kwlayers.ops.kw_conv`. The model is not changed. Raises
    ExportError for missing packages (onnx, onnxscript) and for a model that cannot be exported.
    """
    _need("ONNX", ["onnx", "onnxscript"])
    target = _writable(path)
    nbytes = sum(p.nbytes for p in model.parameters())
    if nbytes > _LIMIT:
        raise ExportError(
            f"parameters of {nbytes / 1e9:.1f} GB: an ONNX file holds at most 2, one of "
            "export_program any number"
        )
    program = _program(model, input_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its private functions
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: "batch"},),
            )
    except Exception as error:
        raise ExportFailed(f"the model cannot be written as ONNX: {_reason(error)}") from error
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, larger than small models
    made.save(target, external_data=False)


def export_program(
    model: nn.Module, input_size: Sequence[int], path: str | os.PathLike[str]
) -> None:
    """Write `model`, evaluated, for `torch.export.load(path).module()`, which needs torch alone.

    input_size: of one input, (C, H, W). The batch is free. Otherwise as `export_onnx`.
    """
    target = _writable(path)
    content = io.BytesIO()  # torch does not survive a file that it cannot write
    torch.export.save(_program(model, input_size), content)
    target.write_bytes(content.getbuffer())


def _program(model: nn.Module, input_size: Sequence[int]) -> ExportedProgram:
    """A copy of the model as a graph of torch's own operators, for a batch of any size."""
    size = tuple(input_size)
    if not size or not all(isinstance(s, int) and s > 0 for s in size):
        raise ExportError(f"input_size {size}: positive sizes (C, H, W), without batch")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ExportError(
            f"the model is wrapped in {type(model).__name__}: export the model inside "
            "(model._orig_mod of a compiled one, model.module of a distributed one)"
        )
    twin = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, DynamicLayer) and hasattr(module, "backend"):
            module.backend = "portable"  # type: ignore[assignment]
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    # Two of them: torch.export takes an axis of 1 for one that never grows.
    x = torch.zeros(2, *size, dtype=dtype)
    try:
        with torch.no_grad():
            twin(x)
            batch = torch.export.Dim("batch")
            program = torch.export.export(twin, (x,), dynamic_shapes=({0: batch},))
    except Exception as error:
        shown = "x".join(map(str, size))
        raise ExportFailed(
            f"the model cannot be exported for inputs of {shown} in batches of any size: "
            f"{_reason(error)}"
        ) from error
    _leave_out_temperatures(program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _leave_out_temperatures(program: ExportedProgram) -> None:
    """At temperature 0 attention is what was learned: nothing to interpolate."""
    buffers = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.lerp.Tensor:
            continue
        weight: Any = node.args[2]
        while weight.all_input_nodes:
            weight = weight.all_input_nodes[0]
        name = buffers.get(weight.name, "")
        if name.endswith("attention.temperature") and program.state_dict[name] == 0:
            node.replace_all_uses_with(node.args[0])
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _need(what: str, packages: list[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportFailed(
            f"{what} needs {' and '.join(missing)}, not installed here: "
            f"`pip install {' '.join(missing)}`"
        )


def _writable(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target}: a directory; give the name of a file")
    if not target.parent.is_dir():
        raise ExportError(f"{target}: there is no directory {target.parent}")
    return target


def _reason(error: BaseException) -> str:
    """`TypeError: first line`, of what was wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
