"""A latency table: how long calls took on one device, in a file that never loads by halves."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kwlayers.plan import PlanError
from kwsearch.files import alone, write_whole
from kwsearch.latency.calls import Call
from kwsearch.latency.measure import Times

FORMAT = 3
# How much slower than usual the machine may be: a part of the anchor's time.
DRIFT = 0.1
# What a time is of: tables that differ in one of these have nothing in common.
MUST_AGREE = ("cpu", "gpu", "device", "threads", "dtype", "torch", "malloc")
LISTS = ("entries", "wholes", "checks")


class TableError(PlanError):
    """A table that cannot be read, or is not of this device."""


@dataclass(frozen=True)
class Entry:
    """One call, measured: the median over `rounds` and the quartiles, in nanoseconds.

    kind, family, cells, work: of the `Call`. anchor_ns: what a fixed piece of work took then.
    """

    kind: str
    family: str
    cells: int
    work: tuple[int, ...]
    first_ns: int
    median_ns: int
    third_ns: int
    rounds: int
    anchor_ns: int

    @classmethod
    def of(cls, call: Call, times: Times) -> Entry:
        """Of what measuring a call gave."""
        return cls(call.kind, call.family, call.cells, call.work, *times.in_ns())

    @property
    def key(self) -> str:
        """`Call.key`."""
        return f"{self.family} n={self.cells}" if self.cells else self.family


@dataclass(frozen=True)
class Whole:
    """A whole step, measured, and the sums of its calls by the table, in nanoseconds.

    name: of the network and its plan. calls_ns: by `predict.GROUPS`. The rest as in `Entry`.
    """

    name: str
    batch: int
    training: bool
    calls_ns: tuple[int, ...]
    first_ns: int
    measured_ns: int
    third_ns: int
    rounds: int
    anchor_ns: int

    @property
    def key(self) -> str:
        """In a table."""
        return f"{self.name} {self.batch} {self.training}"

    @property
    def network(self) -> str:
        """Its name without plan and input."""
        return re.split(" b = | plan | at ", self.name)[0]


Measured = TypeVar("Measured", bound=Entry | Whole)


@dataclass(frozen=True)
class Check:
    """A whole step that the table had no part in, measured against the prediction."""

    name: str
    batch: int
    training: bool
    measured_ms: float
    predicted_ms: float
    low_ms: float
    high_ms: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass
class Table:
    """What was measured, by key, and in what circumstances: `MUST_AGREE` and versions.

    checks: of `kwsearch lut check`, which say how good it is.
    """

    circumstances: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    wholes: list[Whole] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def anchor(self) -> float:
        """The usual nanoseconds of the anchor: lower quartile, for the machine at its best."""
        found = sorted(one.anchor_ns for one in self.measured())
        return float(found[len(found) // 4]) if found else 0.0

    def steadied(self) -> Table:
        """The same times as if the anchor had taken its usual time in all of them."""
        usual = self.anchor()
        entries = (_steadied(entry, usual / max(entry.anchor_ns, 1)) for entry in self.measured())
        found = Table(self.circumstances, checks=self.checks)
        for one in entries:
            found.add([one]) if isinstance(one, Entry) else found.wholes.append(one)
        return found

    def drifted(self) -> set[str]:
        """Keys of calls and whole steps that were measured while the machine was slower."""
        most = (1 + DRIFT) * self.anchor()
        return {one.key for one in self.measured() if one.anchor_ns > most}

    def measured(self, keys: Container[str] | None = None) -> list[Entry | Whole]:
        """Calls and whole steps; those of some keys."""
        found: list[Entry | Whole] = [*self.entries.values(), *self.wholes]
        return found if keys is None else [one for one in found if one.key in keys]

    def keep_shorter(self, others: Iterable[Entry | Whole]) -> None:
        """Those that took less than what the table has under their keys."""
        known = {whole.key: whole for whole in self.wholes}
        for one in others:
            if isinstance(one, Entry):
                if one.median_ns < self.entries[one.key].median_ns:
                    self.add([one])
            elif one.measured_ns < known[one.key].measured_ns:
                self.add_wholes([one])

    def add(self, entries: Iterable[Entry]) -> None:
        """Later ones replace earlier ones."""
        self.entries |= {entry.key: entry for entry in entries}

    def add_checks(self, checks: Iterable[Check]) -> None:
        """Later ones replace earlier ones."""
        all_ = (*self.checks, *checks)
        self.checks = list({(one.name, one.batch, one.training): one for one in all_}.values())

    def add_wholes(self, wholes: Iterable[Whole]) -> None:
        """Later ones replace earlier ones."""
        self.wholes = list({one.key: one for one in (*self.wholes, *wholes)}.values())

    def differences(
        self, circumstances: Mapping[str, Any], names: Sequence[str] = MUST_AGREE
    ) -> list[str]:
        """Why times of this table are none of those circumstances; nothing if they are."""
        mine = self.circumstances
        return [
            f"{name} {mine.get(name)}, not {circumstances.get(name)}"
            for name in names
            if mine.get(name) != circumstances.get(name)
        ]

    def merge(self, other: Table) -> None:
        """Take over another table's entries. Raises TableError for one of another device."""
        if found := other.differences(self.circumstances):
            raise TableError(f"tables of different circumstances: {'; '.join(found)}")
        self.add(other.entries.values())
        self.add_wholes(other.wholes)
        self.checks = []  # were of another table

    def save(self, path: Path) -> None:
        """All of it or nothing, with a checksum."""
        plain = self._plain()
        lines = [
            "# Times of calls on one device, in nanoseconds: kwsearch profile wrote it.",
            f"format: {FORMAT}",
            f"checksum: {_checksum(plain)}",
            f"circumstances: {json.dumps(plain['circumstances'])}",
        ]
        for name in LISTS:
            lines += [f"{name}:", *(f"- {json.dumps(row)}" for row in plain[name])]
        write_whole(path, "\n".join(lines) + "\n")

    def _plain(self) -> dict[str, Any]:
        listed = {"entries": self.entries.values(), "wholes": self.wholes, "checks": self.checks}
        plain = {name: [list(vars(row).values()) for row in listed[name]] for name in LISTS}
        return {"circumstances": self.circumstances, **plain}

    @classmethod
    def load(cls, path: Path) -> Table:
        """Raises TableError for anything but a whole table."""
        try:
            data = _parsed(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise TableError(f"{path}: not a latency table, nor any text") from None
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise TableError(f"{path}: not a latency table, or half of one: {problem}") from None
        if not isinstance(data, dict) or "entries" not in data or "checksum" not in data:
            raise TableError(f"{path}: not a latency table; `kwsearch profile -o` writes one")
        if data.get("format") != FORMAT:
            raise TableError(
                f"{path}: of format {data.get('format')!r}, and this kwsearch reads {FORMAT}; "
                "measure it again"
            )
        kept: dict[str, Any] = {name: data.get(name) or [] for name in ("circumstances", *LISTS)}
        if data["checksum"] != _checksum(kept):
            raise TableError(
                f"{path}: its checksum is not that of its content: it was cut short or changed by "
                "hand; measure it again, or take a copy that is whole"
            )
        table = cls(kept["circumstances"])
        for kind, family, cells, work, *times in kept["entries"]:
            table.add([Entry(kind, family, cells, tuple(work), *times)])
        for name, batch, training, calls, *times in kept["wholes"]:
            table.wholes.append(Whole(name, batch, training, tuple(calls), *times))
        table.checks = [Check(*row) for row in kept["checks"]]
        return table


def _steadied(one: Measured, factor: float) -> Measured:
    """As if the anchor had taken that many times as long."""
    took = "median_ns" if isinstance(one, Entry) else "measured_ns"
    names = ("first_ns", took, "third_ns", "anchor_ns")
    return replace(one, **{name: round(factor * getattr(one, name)) for name in names})


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Refuse a second process that would write the same table. Raises TableError."""
    lock = path.with_name(f".{path.name}.lock")
    with alone(lock, TableError(f"{path}: another kwsearch is measuring for it")):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _parsed(text: str) -> Any:
    """YAML. Rows as `save` writes them are JSON, which is read ten times as fast."""
    data: dict[str, Any] = {}
    head: list[str] = []
    rows: list[Any] | None = None
    for line in text.splitlines():
        if rows is not None and line.startswith("- ["):
            try:
                rows.append(json.loads(line[2:]))
            except ValueError:
                raise yaml.YAMLError(f"a row that is none: {line[:60]}") from None
        elif line.removesuffix(":") in LISTS:
            rows = data[line.removesuffix(":")] = []
        else:
            head.append(line)
    found = yaml.safe_load("\n".join(head))
    return {**found, **data} if isinstance(found, dict) else found


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
