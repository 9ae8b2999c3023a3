"""Latency tables: whole or refused, of one device, growing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kwsearch.latency.calls import Call
from kwsearch.latency.measure import Times
from kwsearch.latency.table import MUST_AGREE, Check, Entry, Table, TableError, Whole

HERE: dict[str, Any] = {
    "cpu": "a processor", "gpu": None, "device": "cpu", "threads": 1, "dtype": "float32",
    "torch": "2.13.0", "malloc": "default", "kwsearch": "0.1.0",
}  # fmt: skip
CALL = Call("mixing gemm training", "mixing gemm 64x64x1x1 s1 p0 d1 g1", 27, (10**12, 25, 1))


def table() -> Table:
    found = Table(dict(HERE))
    plain = Call("conv2d inference", "conv2d 2x3x8x8 8x3x3x3*' inference", 0, (10**6, 10**3))
    found.add([Entry.of(CALL, Times(0.1, 0.2, 0.3, 7, 1e-3))])
    found.add([Entry.of(plain, Times(1e-6, 1.5e-6, 2e-6, 40, 1e-3))])
    found.add_wholes([Whole("net at 3x8x8", 2, True, (900, 0, 0, 0), 990, 1000, 1010, 7, 10**6)])
    found.add_checks([Check("other at 3x8x8", 2, True, 5.0, 5.5, 5.0, 6.0)])
    return found


def test_a_file_gives_the_table_back(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lut.yaml"
    table().save(path)
    assert Table.load(path) == table()
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.lut.yaml"]
    text = path.read_text()
    assert text.startswith("# Times of calls on one device")
    assert '"mixing gemm 64x64x1x1 s1 p0 d1 g1", 27' in text


def test_an_entry_is_found_by_its_call() -> None:
    found = table()
    entry = found.entries[CALL.key]
    assert (entry.first_ns, entry.median_ns, entry.third_ns) == (10**8, 2 * 10**8, 3 * 10**8)
    other = Call(CALL.kind, CALL.family, 28, CALL.work)
    assert other.key not in found.entries


def test_a_later_measurement_replaces_an_earlier_one() -> None:
    found = table()
    found.add([Entry.of(CALL, Times(1.0, 2.0, 3.0, 9, 1e-3))])
    assert len(found.entries) == 2
    assert found.entries[CALL.key].median_ns == 2 * 10**9


@pytest.mark.parametrize("name", MUST_AGREE)
def test_another_device_dtype_or_version_is_told_apart(name: str) -> None:
    other = {**HERE, name: "another"}
    assert table().differences(other) == [f"{name} {HERE[name]}, not another"]
    with pytest.raises(TableError, match=f"^tables of different circumstances: {name} another"):
        table().merge(Table(other))


def test_other_versions_of_ours_are_no_other_device() -> None:
    assert table().differences({**HERE, "kwsearch": "0.2.0"}) == []


def test_tables_of_one_device_are_merged() -> None:
    first, second = table(), Table(dict(HERE))
    more = Call("relu inference", "relu 2x8 inference", 0, (64,))
    second.add([Entry.of(more, Times(1.0, 1.0, 1.0, 5, 1e-3))])
    second.add_wholes([Whole("net at 3x8x8", 2, False, (400, 0, 0, 0), 390, 400, 410, 7, 10**6)])
    first.merge(second)
    assert (len(first.entries), len(first.wholes)) == (3, 2)
    assert first.checks == []  # which were of the table as it was


def test_what_was_measured_while_the_machine_was_slow_is_told() -> None:
    found = table()
    more = Call("relu inference", "relu 2x8 inference", 0, (64,))
    found.add([Entry.of(more, Times(1.0, 1.0, 1.0, 5, 1.11e-3))])
    assert found.drifted() == {more.key}  # a tenth is allowed


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.99])
def test_half_a_table_never_loads(part: float, tmp_path: Path) -> None:
    path = tmp_path / "cpu.lut.yaml"
    table().save(path)
    text = path.read_text()
    path.write_text(text[: int(part * len(text))])
    with pytest.raises(TableError, match=r"cpu\.lut\.yaml: "):
        Table.load(path)


def test_a_table_without_its_last_line_never_loads(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lut.yaml"
    table().save(path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(TableError, match="its checksum is not that of its content"):
        Table.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a latency table; `kwsearch profile -o` writes one"),
        (b"model: resnet18\n", "not a latency table; `kwsearch profile -o` writes one"),
        (b"\xff\xfe\x00", "not a latency table, nor any text"),
        (b"a: [1, 2\nb: }", "not a latency table, or half of one: "),
        (b"format: 1\nchecksum: x\nentries: []\n", "of format 1, and this kwsearch reads 3"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(TableError) as caught:
        Table.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lut.yaml"
    table().save(path)
    path.write_text(path.read_text().replace("1500,", "1400,"))
    with pytest.raises(TableError, match="its checksum is not that of its content"):
        Table.load(path)
