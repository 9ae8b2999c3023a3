"""Tables of micronas' operators: of a microcontroller, imported; of this machine, measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kwsearch import architectures
from kwsearch.cli import cli
from kwsearch.cli import run as run_cli
from kwsearch.latency import circumstances, operators
from kwsearch.latency.table import Entry, Table, TableError
from kwsearch.micronas import space as spaces
from kwsearch.micronas.cycles import CycleTable, load_csv
from kwsearch.micronas.expected import needed
from kwsearch.micronas.space import Key, Space
from kwsearch.recipe import parse_recipe
from tests.kwsearch.micronas.spaces import TINY, UCI_HAR, some_cycles

RECIPE = """
format: 1
model: {name: micronas, num_classes: 2}
input: [1, 6, 3]
micronas: {time_channels: [2, 4], fusion_channels: [4, 8], plain_cells: 1}
"""


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def records(path: Path, entries: dict[Key, int]) -> Path:
    """As lines of CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "input", "output", "filter", "strides", "cycles"])
        for key, count in entries.items():
            read = "+".join(map(by, key.inputs))
            writer.writerow(
                [key.kind, read, by(key.output), by(key.kernel), by(key.strides), count]
            )
    return path


@pytest.mark.parametrize("space", [TINY, UCI_HAR], ids=["tiny", "uci_har"])
def test_an_operator_is_read_as_it_is_written(space: Space) -> None:
    keys = needed(space)
    assert {Key.parse(str(key)) for key in keys} == keys
    with pytest.raises(ValueError, match="not an operator: 'conv2d 3'"):
        Key.parse("conv2d 3")


@pytest.mark.parametrize("clock", [64.0, 80.0, 180.0, 48.0])
def test_an_imported_table_has_the_cycles_to_the_last_one(tmp_path: Path, clock: float) -> None:
    entries = some_cycles(needed(UCI_HAR))
    made = CycleTable("a board", clock, entries)
    operators.table_of(made).save(tmp_path / "a.lut.yaml")
    found = operators.load(tmp_path / "a.lut.yaml")
    assert (found.entries, found.clock_mhz, found.device) == (entries, clock, "a board")


def test_the_command_imports_shows_and_merges(tmp_path: Path) -> None:
    entries = some_cycles(needed(TINY))
    half = dict([*entries.items()][::2])
    rest = {key: count for key, count in entries.items() if key not in half}
    for name, part in (("a", half), ("b", rest)):
        path = records(tmp_path / f"{name}.csv", part)
        out = ["-o", str(tmp_path / f"{name}.lut.yaml")]
        shown = CliRunner().invoke(
            cli, ["lut", "import", str(path), "--device", "NiclaSense", *out]
        )
        assert shown.exit_code == 0, shown.output
        assert f"{len(part)} operators of NiclaSense" in shown.output
    files = [str(tmp_path / f"{name}.lut.yaml") for name in "ab"]
    shown = CliRunner().invoke(cli, ["lut", "merge", *files, "-o", str(tmp_path / "c.lut.yaml")])
    assert shown.exit_code == 0, shown.output
    assert operators.load(tmp_path / "c.lut.yaml").entries == entries
    shown = CliRunner().invoke(cli, ["lut", "show", str(tmp_path / "c.lut.yaml")])
    assert "device: mcu" in shown.output
    assert "clock: 64 MHz" in shown.output
    # The two lists differ from a fit of the published form by what the loader itself would say.
    fits = load_csv(records(tmp_path / "c.csv", entries), "NiclaSense").fits
    for kind, fit in fits.items():
        assert f"fit of {kind}: {fit.entries} operators, mean error {fit.error:.1%}" in shown.output


def test_what_is_to_be_counted_is_listed_as_the_import_reads_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "format: 1\nmodel: {name: micronas, num_classes: 3}\ninput: [1, 20, 4]\n"
        "micronas: {time_channels: [2, 4], fusion_channels: [4, 8], plain_cells: 1}\n"
    )
    ops, lut = tmp_path / "ops.csv", tmp_path / "board.lut.yaml"
    made = CliRunner().invoke(cli, ["lut", "needed", str(recipe), "-o", str(ops)])
    assert made.exit_code == 0, made.output
    space = Space(20, 4, 3, (2, 4), (4, 8), plain_cells=1)
    lines = ops.read_text().splitlines()
    assert len(lines) == 1 + len(needed(space))
    # As it is written nobody has counted anything.
    board = ["--device", "board", "--clock", "64", "-o", str(lut)]
    for records, message in (
        (ops, "ops.csv: no operator has cycles: count them on the board, and write them into"),
        (tmp_path / "none.json", "none.json: no such file"),
    ):
        empty = CliRunner().invoke(cli, ["lut", "import", str(records), *board])
        assert empty.exit_code == 2
        assert message in empty.output
        assert not lut.exists()
    # Half of them are counted: as many cycles as the line's number.
    half = [f"{line}{i}" if i % 2 else line for i, line in enumerate(lines)]
    ops.write_text("\n".join(half))
    found = CliRunner().invoke(cli, ["lut", "import", str(ops), *board])
    assert found.exit_code == 0, found.output
    assert "not counted" in found.output
    assert len(operators.load(lut).entries) == len(lines) // 2
    rest = CliRunner().invoke(cli, ["lut", "needed", str(recipe), f"search.space.limits.lut={lut}"])
    assert rest.exit_code == 0, rest.output
    assert len(rest.output.splitlines()) == 1 + len(needed(space)) - len(lines) // 2
    # A recipe with a limit on latency names the table that is to be made.
    limits = f"search.space.limits={{latency_ms: 25, lut: {tmp_path / 'new.lut.yaml'}}}"
    whole = CliRunner().invoke(cli, ["lut", "needed", str(recipe), limits])
    assert whole.exit_code == 0, whole.output
    assert "new.lut.yaml: not there yet, so that everything is listed" in whole.stderr
    assert len(whole.stdout.splitlines()) == 1 + len(needed(space))
    # Of one that is decided, its own.
    decided = tmp_path / "best.yaml"
    least = space.minimum()
    chosen = {"architecture": least.to_dict(), "time_channels": [2, 4], "fusion_channels": [4, 8]}
    text = recipe.read_text().splitlines()[:-1]
    text.append(f"micronas: {json.dumps({**chosen, 'plain_cells': 1})}")
    decided.write_text("\n".join(text) + "\n")
    own = CliRunner().invoke(cli, ["lut", "needed", str(decided)])
    assert own.exit_code == 0, own.output
    assert len(own.output.splitlines()) == 1 + len(
        {one.key for one in spaces.operators(space, least)}
    )
    refused = CliRunner().invoke(cli, ["lut", "needed", "recipes/quickstart.yaml"])
    assert refused.exit_code == 2


def test_failures_are_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    some = [*some_cycles(needed(TINY)).items()][:2]
    records(path, {some[0][0]: some[0][1], some[1][0]: 50_000_000_000})
    out = str(tmp_path / "r.lut.yaml")
    shown = CliRunner().invoke(
        cli, ["lut", "import", str(path), "--device", "x", "--clock", "10", "-o", out]
    )
    assert shown.exit_code == 0
    assert "left out: " in shown.output
    assert "50000000000 cycles, which stand for a failure" in shown.output
    assert "1 operator of x" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.csv", "--device", "x", "-o", "t.yaml"], "device 'x': its clock is not known"),
        (
            ["r.csv", "r.csv", "--device", "NiclaSense", "-o", "t.yaml"],
            "one .csv, or several .json",
        ),
        (["r.csv", "--device", "NiclaSense", "-o", "r.csv"], "the file exists; --force replaces"),
        (["no.json", "--device", "NiclaSense", "-o", "t.yaml"], "no.json"),
    ],
)
def test_what_cannot_be_imported_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    records(tmp_path / "r.csv", some_cycles(needed(TINY)))
    assert run_cli(["lut", "import", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.yaml").exists()


def test_a_profile_of_a_recipe_measures_every_operator_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    arguments = ["profile", "r.yaml", "--threads", "1", "-o", "here.lut.yaml"]
    measured = operators.profile

    def stops(table: Table, keys: list[Key]) -> object:
        for told in measured(table, keys):
            yield told
            raise KeyboardInterrupt

    monkeypatch.setattr(operators, "profile", stops)
    assert CliRunner().invoke(cli, arguments).exit_code == 130
    begun = len(Table.load(Path("here.lut.yaml")).entries)
    assert 0 < begun < len(needed(TINY))
    monkeypatch.setattr(operators, "profile", measured)
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    found = operators.load(Path("here.lut.yaml"))
    assert found.entries.keys() == needed(TINY)
    assert all(100 < ns < 10**8 for ns in found.entries.values())
    # What there is, is not measured again, but where the machine was slow.
    before = Table.load(Path("here.lut.yaml"))
    slow = set(operators.missing(before, [*needed(TINY)]))
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    after = dict(operators._operators(Table.load(Path("here.lut.yaml"))))
    assert len(slow) < len(after)
    for key, entry in operators._operators(before):
        assert key in slow or after[key] == entry


def test_a_limit_on_latency_is_that_of_the_table(tmp_path: Path) -> None:
    table = CycleTable("a board", 1.0, some_cycles(needed(TINY)))
    operators.table_of(table).save(tmp_path / "a.lut.yaml")
    recipe = parse_recipe(
        RECIPE,
        overrides=[
            f"search.space.limits.lut={tmp_path / 'a.lut.yaml'}",
            "search.space.limits.latency_ms=30",
        ],
    )
    feasible = architectures.feasible_of(recipe)
    found = feasible.largest
    assert found.broken == ()
    costs = architectures.facts(feasible, found.architecture)
    network = spaces.operators(TINY, found.architecture)
    assert costs["latency_ms"] == sum(table.entries[one.key] for one in network) / 1000 <= 30
    tight = parse_recipe(
        RECIPE,
        overrides=[
            f"search.space.limits.lut={tmp_path / 'a.lut.yaml'}",
            "search.space.limits.latency_ms=0.5",
        ],
    )
    (why,) = architectures.feasible_of(tight).largest.broken
    assert why.startswith("latency limit 0.5 ms: below ")


def test_a_table_of_networks_or_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.lut.yaml"
    networks = Table(circumstances.here())
    networks.add([Entry("conv forward", "conv", 0, (1, 1, 1, 1), 1, 2, 3, 7, 100)])
    networks.save(path)
    with pytest.raises(TableError, match="none of micronas' operators: `kwsearch lut import`"):
        operators.load(path)
    other = Table({**circumstances.here(), "cpu": "another one"})
    keys = sorted(needed(TINY))
    for _ in operators.profile(other, keys[:3]):
        pass
    other.save(path)
    with pytest.raises(TableError, match=r"not of this machine: cpu another one, not .*lut_force"):
        operators.load(path)
    assert len(operators.load(path, force=True).entries) == 3


def test_what_was_measured_on_a_slow_machine_is_steadied_and_measured_again() -> None:
    keys = sorted(needed(TINY))[:8]
    table = Table(circumstances.here())
    for i, key in enumerate(keys):
        slow = 2 if i == 5 else 1
        table.add([operators._entry(key, (900 * slow, 1000 * slow, 1100 * slow, 7, 50 * slow))])
    assert operators.missing(table, keys) == [keys[5]]
    found = [*operators.profile(table, [keys[5]])]
    assert found[0] == (1, 1)


def test_a_slow_machine_is_divided_out(tmp_path: Path) -> None:
    keys = sorted(needed(TINY))[:8]
    table = Table(circumstances.here())
    for i, key in enumerate(keys):
        slow = 2 if i == 5 else 1
        table.add([operators._entry(key, (900 * slow, 1000 * slow, 1100 * slow, 7, 50 * slow))])
    table.save(tmp_path / "a.lut.yaml")
    assert set(operators.load(tmp_path / "a.lut.yaml").entries.values()) == {1000}


def test_a_table_of_a_gpu_or_a_board_is_none_of_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.lut.yaml"
    table = Table({**circumstances.here(), "device": "cuda:7", "gpu": "one of another machine"})
    table.add([operators._entry(sorted(needed(TINY))[0], (1, 2, 3, 7, 50))])
    table.save(path)
    with pytest.raises(TableError, match=r"not of this machine: gpu one of another machine, not"):
        operators.load(path)
    assert len(operators.load(path, force=True).entries) == 1
    board = tmp_path / "b.lut.yaml"
    operators.table_of(CycleTable("a board", 1.0, some_cycles(needed(TINY)))).save(board)
    assert run_cli(["lut", "check", str(board)]) == 2
    assert "is of a microcontroller: what runs there cannot be" in capsys.readouterr().err


def test_options_of_networks_are_none_of_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    for option in (["--dtype", "float16"], ["--ratio", "2"], ["--input", "1x8x8"]):
        assert run_cli(["profile", "r.yaml", "-o", "a.lut.yaml", *option]) == 2
        assert f"{option[0]}: of networks" in capsys.readouterr().err
    assert run_cli(["profile", "r.yaml", "-o", "none/a.lut.yaml"]) == 2
    assert "there is no folder none" in capsys.readouterr().err


def test_an_operator_is_timed_on_what_the_network_runs() -> None:
    torch.manual_seed(0)
    conv = next(key for key in sorted(needed(TINY)) if key.kind == "conv2d")
    timed = operators._Runs(conv, "cpu")
    out = timed._run()
    assert tuple(out.shape) == (1, conv.output[-1], *conv.output[:-1])
    assert float(out.detach().min()) >= 0
    assert timed.seconds() > 0
