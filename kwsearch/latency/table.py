"""A latency table: how long calls took on one device, in a file that never loads by halves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kwsearch.files import write_whole
from kwsearch.latency.calls import Call

FORMAT = 1
# What a time is of: tables that differ in one of these have nothing in common.
MUST_AGREE = ("cpu", "gpu", "device", "threads", "dtype", "torch", "malloc")


class TableError(ValueError):
    """A table that cannot be read, or is not of this device."""


@dataclass(frozen=True)
class Entry:
    """One call, measured: the median over `rounds` and the quartiles, in nanoseconds.

    kind, family, cells, work: of the `Call`.
    """

    kind: str
    family: str
    cells: int
    work: tuple[int, ...]
    first_ns: int
    median_ns: int
    third_ns: int
    rounds: int

    @classmethod
    def of(cls, call: Call, quartiles: tuple[float, float, float], rounds: int) -> Entry:
        """quartiles: first, median, third, in seconds."""
        first, median, third = (round(1e9 * seconds) for seconds in quartiles)
        return cls(call.kind, call.family, call.cells, call.work, first, median, third, rounds)

    @property
    def key(self) -> str:
        """`Call.key`."""
        return f"{self.family} n={self.cells}" if self.cells else self.family


@dataclass
class Table:
    """What was measured, by key, and in what circumstances: `MUST_AGREE` and versions.

    anchors: nanoseconds of a fixed piece of work, over and over, by which drift shows.
    """

    circumstances: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    anchors: list[int] = field(default_factory=list)

    def __contains__(self, call: Call) -> bool:
        return call.key in self.entries

    def add(self, entries: Iterable[Entry]) -> None:
        """Later ones replace earlier ones."""
        self.entries |= {entry.key: entry for entry in entries}

    def differences(self, circumstances: Mapping[str, Any]) -> list[str]:
        """Why times of this table are none of those circumstances; nothing if they are."""
        mine = self.circumstances
        return [
            f"{name} {mine.get(name)}, not {circumstances.get(name)}"
            for name in MUST_AGREE
            if mine.get(name) != circumstances.get(name)
        ]

    def merge(self, other: Table) -> None:
        """Take over another table's entries. Raises TableError for one of another device."""
        if found := other.differences(self.circumstances):
            raise TableError(f"tables of different circumstances: {'; '.join(found)}")
        self.add(other.entries.values())
        self.anchors += other.anchors

    def save(self, path: Path) -> None:
        """All of it or nothing, with a checksum."""
        plain = self._plain()
        lines = [
            "# Times of calls on one device, in nanoseconds: kwsearch profile wrote it.",
            f"format: {FORMAT}",
            f"checksum: {_checksum(plain)}",
            f"circumstances: {json.dumps(plain['circumstances'])}",
            f"anchors: {plain['anchors']}",
            "entries:",
            *(f"- {json.dumps(row)}" for row in plain["entries"]),
        ]
        write_whole(path, "\n".join(lines) + "\n")

    def _plain(self) -> dict[str, Any]:
        rows = [list(vars(entry).values()) for entry in self.entries.values()]
        return {"circumstances": self.circumstances, "anchors": self.anchors, "entries": rows}

    @classmethod
    def load(cls, path: Path) -> Table:
        """Raises TableError for anything but a whole table."""
        try:
            text = path.read_text(encoding="utf-8")
            data = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
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
        kept = {name: data.get(name) for name in ("circumstances", "anchors", "entries")}
        if data["checksum"] != _checksum(kept):
            raise TableError(
                f"{path}: its checksum is not that of its content: it was cut short or changed by "
                "hand; measure it again, or take a copy that is whole"
            )
        table = cls(data["circumstances"], anchors=data["anchors"])
        for kind, family, cells, work, *times in data["entries"]:
            table.add([Entry(kind, family, cells, tuple(work), *times)])
        return table


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
