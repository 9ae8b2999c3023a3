"""An int8 TensorFlow Lite file of a trained network, what it gets right, and the memory it needs.

litert-torch converts, ai-edge-quantizer calibrates and rounds after training: weights per channel,
activations per tensor, biases int32, input and output int8. The file has the operators of
`kwsearch.micronas.space.operators` in their order, but for the first convolution, which the
converter makes depthwise as its input has one channel: its cycles are not those of a table of
conv2d. The converter leaves transposes and explicit zeros around convolutions of channels first
whose output has several readers, so tensors are (B, T, S, C) here, and padding is the convolution's
own where both ends get as many zeros.

The interpreter does not tell its arena, so sizes are computed from the file (`arena`):

- live_bytes is the largest sum of tensors alive, which no arena goes below.
- arena_bytes is what they take by the plan that is written into the file, which is called
  "OfflineMemoryAllocation" (TensorFlow Lite Micro's memory_management.md): its interpreter follows
  it, others leave it alone.
- greedy_bytes is what its own planner would take without.

The kernels' scratch and what the interpreter keeps for itself come on top.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.micronas import arena, supernet
from kwsearch.micronas.arena import ALIGNMENT, Life
from kwsearch.micronas.peak_memory import peak_bytes
from kwsearch.micronas.space import Operator
from kwsearch.micronas.supernet import Network, same_padding

_PLAN, _VERSION = "OfflineMemoryAllocation", 1
PACKAGES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
_PER_LINE = 12


class TFLiteError(ValueError):
    """A file that cannot be made or checked."""


@dataclass(frozen=True)
class Check:
    """Of one file. predicted_bytes: `peak_bytes` of the network it was made of."""

    accuracy: float
    file_bytes: int
    live_bytes: int
    arena_bytes: int
    greedy_bytes: int
    predicted_bytes: int

    @property
    def ratio(self) -> float:
        """Arena by prediction."""
        return self.arena_bytes / self.predicted_bytes


class _ChannelsLast(nn.Module):
    """A network with its softmax. x: (B, T, S, 1)  out: (B, classes) probabilities"""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        made = {"input": x}
        for one in self.network.operators:
            inputs = [made[name] for name in one.inputs]
            out = supernet.run(one, inputs, self.network.convs, _conv, (1, 2))
            made[one.name] = out = torch.softmax(out, 1) if one.key.kind == "softmax" else out
        return out


def _conv(conv: nn.Module, x: Tensor) -> Tensor:
    """x: (B, H, W, C)  out: (B, H', W', O)"""
    assert isinstance(conv, nn.Conv2d)
    sides = zip(x.shape[1:3], conv.kernel_size, conv.stride, strict=True)
    (top, bottom), (left, right) = (same_padding(*side) for side in sides)
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (0, 0, left, right, top, bottom)), (0, 0)
    out = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, padding)
    return out.permute(0, 2, 3, 1)


def export(model: Network, windows: Tensor, path: Path) -> None:
    """Write a trained network as int8; the ranges of its activations are those over `windows`.

    windows: (N, 1, T, S), some of the training set, normalised as in training. The file takes one
    window (1, T, S, 1). The model is not changed. Raises TFLiteError.
    """
    need()
    _check_windows(model, windows)
    x = windows.detach().float().cpu().permute(0, 2, 3, 1).contiguous()
    training = [part for part in model.modules() if part.training]
    try:
        path.write_bytes(_quantized(_ChannelsLast(model).eval(), x))
    finally:
        for part in training:
            part.training = True


def _quantized(model: nn.Module, x: Tensor) -> bytes:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of torch's and the packages' private functions
        import litert_torch
        from ai_edge_quantizer import quantizer, recipe

        floating = str(Path(folder) / "float.tflite")
        litert_torch.convert(model, (x[:1],)).export(floating)
        made = quantizer.Quantizer(floating, recipe.static_wi8_ai8())
        data = {"serving_default": [{"args_0": one[None].numpy()} for one in x]}
        ranges = made.calibrate(data, num_threads=1)
        found = made.quantize(ranges, enable_progress_report=False).quantized_model
    return with_plan(bytes(found))


def with_plan(content: bytes) -> bytes:
    """The file with offsets of its tensors, as `arena.packed` finds them."""
    import flatbuffers  # type: ignore[import-untyped, unused-ignore]
    from ai_edge_litert import schema_py_generated as schema

    model = _parsed(content)
    lives = _lives(model)
    words = [-1] * len(model.subgraphs[0].tensors)  # of constants, which are in no arena
    for tensor, offset in zip(lives, arena.packed([*lives.values()]), strict=True):
        words[tensor] = offset
    plan = schema.BufferT()
    plan.data = [*struct.pack(f"<{3 + len(words)}i", _VERSION, 0, len(words), *words)]
    entry = schema.MetadataT()
    entry.name, entry.buffer = _PLAN, len(model.buffers)
    model.buffers.append(plan)
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def header(path: Path, name: str, notes: Sequence[str] = ()) -> Path:
    """Write the file beside itself as a C header with the array `name` and `name`_len; its path.

    notes: lines of its comment. Raises TFLiteError for a name that is none in C.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise TFLiteError(
            f"name {name!r}: must be letters, digits and _, and not begin with a digit"
        )
    content = path.read_bytes()
    rows = [content[i : i + _PER_LINE] for i in range(0, len(content), _PER_LINE)]
    numbers = "\n".join(f"    {', '.join(f'0x{byte:02x}' for byte in row)}," for row in rows)
    target = path.with_suffix(".h")
    target.write_text(
        "".join(f"// {note}\n" for note in notes)
        + "#pragma once\n\n#ifndef __cplusplus\n#include <stdalign.h>\n#endif\n\n"
        f"alignas({ALIGNMENT}) static const unsigned char {name}[] = {{\n{numbers}\n}};\n"
        f"static const unsigned int {name}_len = {len(content)};\n",
        encoding="ascii",
    )
    return target


def check(path: Path, network: tuple[Operator, ...], x: Tensor, y: Tensor, **how: bool) -> Check:
    """Run the file in the LiteRT interpreter. x: (N, 1, T, S)  y: (N,) classes

    network: what it was made of. how: as `peak_bytes` takes it. Raises TFLiteError.
    """
    need()
    if len(x) == 0 or x.shape[0] != len(y):
        raise TFLiteError(f"{len(x)} windows and {len(y)} classes: must be as many, at least one")
    right = int((run(path, x).argmax(1) == y.cpu()).sum())
    content = path.read_bytes()
    model = _parsed(content)
    lives, offsets = [*_lives(model).values()], _planned(model)
    return Check(
        right / len(x),
        len(content),
        arena.live(lives),
        arena.extent(lives, offsets),
        arena.extent(lives, arena.greedy(lives)),
        peak_bytes(network, **how),
    )


def run(path: Path, x: Tensor) -> Tensor:
    """x: (N, 1, T, S)  out: (N, classes) probabilities, of int8"""
    need()
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    net = Interpreter(str(path), num_threads=1)
    net.allocate_tensors()
    (read,), (written,) = net.get_input_details(), net.get_output_details()
    if (size := tuple(x[:1].permute(0, 2, 3, 1).shape)) != tuple(read["shape"]):
        raise TFLiteError(f"windows of {size}: {path} takes {tuple(map(int, read['shape']))}")
    (scale, zero), (out_scale, out_zero) = read["quantization"], written["quantization"]
    rows = []
    for one in x.detach().float().cpu().permute(0, 2, 3, 1).numpy():
        whole = np.clip(np.round(one / scale) + zero, -128, 127).astype(np.int8)
        net.set_tensor(read["index"], whole[None])
        net.invoke()
        rows.append(torch.from_numpy(net.get_tensor(written["index"])[0].astype(np.float32)))
    found: Tensor = (torch.stack(rows) - out_zero) * out_scale
    return found


def _parsed(content: bytes) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def _planned(model: Any) -> list[int]:
    """Offsets of its tensors by the plan in the file. Raises TFLiteError where there is none."""
    for entry in model.metadata or []:
        if bytes(entry.name) == _PLAN.encode():
            data = bytes(bytearray(model.buffers[entry.buffer].data))
            words = struct.unpack(f"<{len(data) // 4}i", data)
            return [words[3 + tensor] for tensor in _lives(model)]
    raise TFLiteError(f"no {_PLAN} in the file: it was not written by kwsearch export")


def _lives(model: Any) -> dict[int, Life]:
    """Of the tensors of its operators that are no constants, by number."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    written = {int(one) for op in graph.operators for one in op.outputs}
    spans: dict[int, tuple[int, int]] = {}
    for number, op in enumerate(graph.operators):
        for one in map(int, (*op.inputs, *op.outputs)):
            if one in written or one in graph.inputs:
                spans[one] = (spans.get(one, (number, number))[0], number)
    wide = {schema.TensorType.INT8: 1, schema.TensorType.INT32: 4, schema.TensorType.FLOAT32: 4}
    found = {}
    for one, span in spans.items():
        tensor = graph.tensors[one]
        found[one] = Life(math.prod(map(int, tensor.shape)) * wide[tensor.type], *span)
    return found


def operator_names(content: bytes) -> list[str]:
    """The operators of a file in their order, as TensorFlow Lite calls them."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    model = _parsed(content)
    codes = [one.builtinCode for one in model.operatorCodes]
    return [names[codes[op.opcodeIndex]] for op in model.subgraphs[0].operators]


def _check_windows(model: Network, windows: Tensor) -> None:
    steps, sensors, channels = model.operators[0].key.inputs[0]
    size = (channels, steps, sensors)
    if windows.dim() != 4 or tuple(windows.shape[1:]) != size or not len(windows):
        raise TFLiteError(
            f"windows of shape {tuple(windows.shape)}: must be (N, {', '.join(map(str, size))}), "
            "at least one"
        )
    if not windows.isfinite().all():
        raise TFLiteError("windows: some values are not finite; calibrate with clean ones")


def need() -> None:
    """Raises TFLiteError where a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise TFLiteError(
            f"int8 TensorFlow Lite needs {' and '.join(missing)}, not installed here: "
            '`pip install "kwsearch[mcu]"`'
        )
