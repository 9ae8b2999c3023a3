"""Latency on a microcontroller: cycles of single operators, measured, added up.

A table has one entry for each operator at each pair of widths, as a device's counter gave it. Such
counts are deterministic (the published ones of one board, recorded twice, agree to the cycle), so
an architecture's cycles are the exact sum over its operators. What the interpreter does between
operators, some 450 to 700 cycles for each, is not in the published tables, nor in these sums.

Entries come from the published form of records (JSON) or from lines of CSV. A failed record says
nothing of how long the operator takes: it is refused and listed, where the published code takes it
for 5e10 cycles, which poisons every sum and expectation with it; where a device ran out of memory,
a limit on memory is what keeps the search away. Activation does not tell entries apart, as ReLU is
a clamp inside the convolution's kernel.

A gap in a table is filled by what was measured of the same kind: cycles are fitted as a sum, with
no negative weight, in proportion to

    conv2d  MACs; kh kw C_in H_out W_out (im2col); C_out H_out W_out; H_out W_out; 1
    add     elements; 1

with the least relative squares, separately for convolutions whose channels are both multiples of 4
(which CMSIS-NN has quicker code for) and all others. A fit's error is the mean absolute relative
error over five parts, each predicted from the other four.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kwsearch.micronas.space import Key, Operator, Shape

# MHz, of the boards that the paper measured on.
CLOCKS = {"NiclaSense": 64.0, "NUCLEOL552ZEQ": 80.0, "NUCLEOF446RE": 180.0}
# What the published code puts for a failure.
FAILED = 50_000_000_000
# Entries of a class below which nothing is fitted: twice as many as the model has terms.
PER_TERM = 2
FOLDS = 5
COLUMNS = ("name", "input", "output", "filter", "strides", "cycles")
_KINDS = {
    "conv2d": "conv2d",
    "add": "add",
    "gap2d": "gap2d",
    "global_average_pooling2d": "gap2d",
    "softmax": "softmax",
}

NOT_COUNTED = "not counted"  # of a line that nobody filled in


class CycleError(ValueError):
    """A table that cannot be read, or that does not tell what was asked of it."""


class Cycles(NamedTuple):
    """Of one operator. fitted: not measured."""

    number: float
    fitted: bool


class Refused(NamedTuple):
    """A record that is no entry, and why."""

    source: str
    what: str
    why: str


@dataclass(frozen=True)
class Latency:
    """Of one architecture. fitted: operators that were not measured, fitted_ms: theirs together."""

    cycles: float
    milliseconds: float
    operators: int
    fitted: tuple[str, ...]
    fitted_ms: float


@dataclass(frozen=True)
class Fit:
    """weights: cycles for each term. error: mean absolute relative error, cross-validated."""

    weights: tuple[float, ...]
    entries: int
    error: float

    def __call__(self, key: Key) -> float:
        return sum(w * t for w, t in zip(self.weights, _terms(key), strict=True))


@dataclass(frozen=True)
class CycleTable:
    """Cycles by operator, on a device with that clock. Later entries replaced earlier ones."""

    device: str
    clock_mhz: float
    entries: Mapping[Key, int]
    refused: tuple[Refused, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.clock_mhz > 0 or not math.isfinite(self.clock_mhz):
            raise CycleError(f"clock {self.clock_mhz} MHz: must be a positive number")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without what was refused."""
        entries = {str(key): count for key, count in self.entries.items()}
        return {"device": self.device, "clock_mhz": self.clock_mhz, "entries": entries}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CycleTable:
        """The inverse."""
        entries = {Key.parse(text): count for text, count in data["entries"].items()}
        return cls(data["device"], data["clock_mhz"], entries)

    def cycles(self, key: Key) -> Cycles:
        """Measured, or else fitted. Raises CycleError where too little was measured for a fit."""
        if key in self.entries:
            return Cycles(float(self.entries[key]), False)
        if (fit := self.fits.get(kind_of(key))) is None:
            raise CycleError(self._missing(key))
        return Cycles(fit(key), True)

    def milliseconds(self, cycles: float) -> float:
        """At the device's clock."""
        return cycles / (1000 * self.clock_mhz)

    def latency(self, network: Sequence[Operator]) -> Latency:
        """The sum over a network's operators. Raises CycleError."""
        found = [self.cycles(one.key) for one in network]
        total = sum(one.number for one in found)
        fitted = tuple(op.name for op, one in zip(network, found, strict=True) if one.fitted)
        unknown = self.milliseconds(sum(one.number for one in found if one.fitted))
        return Latency(total, self.milliseconds(total), len(network), fitted, unknown)

    @property
    def fit_error(self) -> float:
        """The mean error of fits, the largest of all kinds; 0 without any."""
        return max((fit.error for fit in self.fits.values()), default=0.0)

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """By `kind_of`, of which there are enough entries."""
        classes: dict[str, list[tuple[Key, int]]] = {}
        for key, count in sorted(self.entries.items()):
            classes.setdefault(kind_of(key), []).append((key, count))
        return {kind: _fit(rows) for kind, rows in classes.items() if len(rows) >= _needed(kind)}

    def _missing(self, key: Key) -> str:
        kind = kind_of(key)
        had = sum(kind_of(one) == kind for one in self.entries)
        text = f"{key}: not in the table of {self.device}"
        if _needed(kind) == math.inf:
            return f"{text}, and {kind} is never fitted; measure it"
        return (
            f"{text}, nor to be fitted by its {had} entries of the kind {kind}: {_needed(kind)} "
            "are needed; measure more, or a space whose operators were measured"
        )


def load_records(
    paths: Path | Iterable[Path], device: str, *, clock_mhz: float | None = None
) -> CycleTable:
    """The published form: JSON lists of records with modelConfig and timing, in that order.

    An operator's cycles are those of timing from the third on: before are the call from outside and
    the whole invocation. clock_mhz: needed for other devices than `CLOCKS`. Raises CycleError.
    """
    entries: dict[Key, int] = {}
    refused: list[Refused] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CycleError(f"{path}: not JSON: {error}") from None
        if not isinstance(records, list):
            raise CycleError(f"{path}: not a list of records")
        for number, record in enumerate(records, 1):
            _take(record, f"{path}: record {number}", entries, refused)
    return CycleTable(device, _clock(device, clock_mhz), entries, tuple(refused))


def load_csv(path: Path, device: str, *, clock_mhz: float | None = None) -> CycleTable:
    """Lines with the columns name, input, output, filter, strides, cycles.

    Shapes are written 64x9x4, both inputs of an add 16x5x8+16x5x8; filter and strides 3x1, empty
    for what is no convolution. Raises CycleError.
    """
    entries: dict[Key, int] = {}
    refused: list[Refused] = []
    # A spreadsheet begins its UTF-8 with a mark.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CycleError(f"{path}: not UTF-8 ({error}); try saving it as that") from None
    with io.StringIO(text, newline="") as lines:
        reader = csv.DictReader(lines)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise CycleError(
                f"{path}: no column {', '.join(missing)}: the first line must name "
                f"{', '.join(COLUMNS)}"
            )
        try:
            for row in reader:
                key, count = _of_row(row)
                if count is None:
                    refused.append(Refused(f"{path}:{reader.line_num}", str(key), NOT_COUNTED))
                    continue
                _enter(key, count, f"{path}:{reader.line_num}", entries, refused)
        except (ValueError, csv.Error) as error:
            raise CycleError(f"{path}:{reader.line_num}: {error}") from None
    return CycleTable(device, _clock(device, clock_mhz), entries, tuple(refused))


def csv_of(keys: Iterable[Key]) -> str:
    """The lines that `load_csv` reads, with cycles still to be filled in."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for key in sorted(keys):
        inputs = "+".join(map(_written, key.inputs))
        how = (_written(key.kernel), _written(key.strides))
        lines.writerow((key.kind, inputs, _written(key.output), *how, ""))
    return text.getvalue()


def _written(sizes: Shape) -> str:
    return "x".join(map(str, sizes))


def kind_of(key: Key) -> str:
    """What is fitted together."""
    if key.kind != "conv2d":
        return key.kind
    aligned = key.inputs[0][-1] % 4 == 0 and key.output[-1] % 4 == 0
    return "conv2d of multiples of 4" if aligned else "conv2d of other channels"


def _take(record: Any, where: str, entries: dict[Key, int], refused: list[Refused]) -> None:
    try:
        config = record["modelConfig"]
        inputs = config["input_shape"]
        inputs = inputs if isinstance(inputs[0], list) else [inputs]
        shapes = tuple(tuple(one[1:]) for one in inputs)
        how = (tuple(config.get("kernel_size") or ()), tuple(config.get("strides") or ()))
        key = _key(config["name"], shapes, tuple(config["output_shape"][1:]), *how)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CycleError(
            f"{where}: not a record: {type(error).__name__} {error}; it needs modelConfig with "
            "name, input_shape and output_shape"
        ) from None
    except ValueError as error:
        refused.append(Refused(where, str(config["name"]), str(error)))
        return
    if record.get("error", "NOERROR") != "NOERROR":
        why = " ".join(str(record[part]) for part in ("error", "errorText") if part in record)
    elif key.kind == "conv2d" and config.get("padding", "same") != "same":
        why = f"padding {config['padding']}, where the space has only same"
    elif config.get("activation") not in (None, "linear", "relu", "softmax"):
        why = f"activation {config['activation']}, where the space has only relu"
    elif not (counts := _timings(record)[2:]):
        why = f"{len(_timings(record))} timings with cpuCycles, where the third is the operator's"
    else:
        _enter(key, sum(counts), where, entries, refused)
        return
    refused.append(Refused(where, str(key), why))


def _timings(record: Mapping[str, Any]) -> list[int]:
    rows = record.get("timing") or []
    counts = (row.get("cpuCycles") for row in rows if isinstance(row, Mapping))
    return [count for count in counts if type(count) is int]


def _of_row(row: dict[str, str]) -> tuple[Key, int | None]:
    """None for cycles that are not filled in. Raises ValueError for a line that is no entry."""
    if None in row or None in row.values():
        raise ValueError("not as many values as columns")
    inputs = tuple(_sizes(one) for one in row["input"].split("+"))
    how = (_sizes(row["filter"]), _sizes(row["strides"]))
    key = _key(row["name"], inputs, _sizes(row["output"]), *how)
    if not row["cycles"].strip():
        return key, None
    if not re.fullmatch(r"\s*\d+\s*", row["cycles"]):
        raise ValueError(f"cycles {row['cycles']!r}: must be an integer")
    return key, int(row["cycles"])


def _enter(
    key: Key, count: int, where: str, entries: dict[Key, int], refused: list[Refused]
) -> None:
    if 0 < count < FAILED:
        entries[key] = count
    else:
        refused.append(Refused(where, str(key), f"{count} cycles, which stand for a failure"))


def _key(name: str, inputs: tuple[Shape, ...], output: Shape, kernel: Shape, strides: Shape) -> Key:
    """Raises ValueError for what no operator of a space can be."""
    kind = _KINDS.get(re.sub(r"_\d+$", "", name.strip().lower()))
    if kind is None:
        raise ValueError(f"operator {name!r}: must be one of {', '.join(_KINDS)}")
    numbers = [*output, *kernel, *strides, *(size for shape in inputs for size in shape)]
    if any(type(size) is not int or size < 1 for size in numbers):
        raise ValueError(f"{kind}: sizes must be positive integers")
    if len(inputs) != (2 if kind == "add" else 1):
        raise ValueError(f"{kind}: {len(inputs)} inputs")
    if kind == "conv2d" and not (len(kernel) == len(strides) == 2):
        raise ValueError("conv2d: filter and strides must be as 3x1")
    return Key(kind, inputs, output, *((kernel, strides) if kind == "conv2d" else ()))


def _sizes(text: str) -> Shape:
    text = text.strip()
    try:
        return tuple(int(one) for one in text.split("x")) if text else ()
    except ValueError:
        raise ValueError(f"{text!r}: must be sizes as 64x9x4") from None


def _clock(device: str, clock_mhz: float | None) -> float:
    if clock_mhz is None and device not in CLOCKS:
        raise CycleError(
            f"device {device!r}: its clock is not known; give clock_mhz, or one of "
            f"{', '.join(CLOCKS)}"
        )
    return CLOCKS[device] if clock_mhz is None else clock_mhz


def _terms(key: Key) -> list[float]:
    out = float(math.prod(key.output))
    if key.kind != "conv2d":
        return [out, 1.0]
    pixels = out / key.output[-1]
    im2col = math.prod(key.kernel) * key.inputs[0][-1] * pixels
    return [float(key.macs), im2col, out, pixels, 1.0]


def _needed(kind: str) -> float:
    if kind.startswith("conv2d"):
        return PER_TERM * 5
    return PER_TERM * 2 if kind == "add" else math.inf


def _fit(rows: Sequence[tuple[Key, int]]) -> Fit:
    terms = torch.tensor([_terms(key) for key, _ in rows], dtype=torch.float64)
    took = torch.tensor([count for _, count in rows], dtype=torch.float64)
    errors = []
    for fold in range(min(FOLDS, len(rows))):
        left_out = torch.arange(len(rows)) % FOLDS == fold
        weights = _weights(terms[~left_out], took[~left_out])
        errors.append((terms[left_out] @ weights / took[left_out] - 1).abs())
    error = float(torch.cat(errors).mean())
    return Fit(tuple(_weights(terms, took).tolist()), len(rows), error)


def _weights(terms: Tensor, took: Tensor) -> Tensor:
    """None negative, with the least sum of squared relative errors."""
    from scipy.optimize import nnls

    rows = terms / took[:, None]
    scale = rows.amax(0)
    weights, _ = nnls((rows / scale).numpy(), torch.ones(len(rows), dtype=torch.float64).numpy())
    return torch.from_numpy(weights) / scale
