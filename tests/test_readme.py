"""The README is true: its commands, its lines of code, its output, its file tree."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kwsearch import cli, data
from kwsearch.export import train_template

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [body for name, body in fenced if name == language]


def test_it_opens_with_the_two_commands() -> None:
    first, second = blocks("sh")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.strip().endswith("kwsearch budget resnet50 --ratio 0.5")
    assert second.strip().endswith("pytest -n auto")


def test_every_command_shown_is_one_that_exists() -> None:
    shown = re.findall(r"^kwsearch (\w+)", README, re.M)
    assert len(shown) >= 6
    assert set(shown) <= set(cli.COMMANDS)


def test_the_budget_commands_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(
        r"^kwsearch (budget [\w.-]+(?![\w.:/-])(?: --?[\w-]+(?: [\w.=]+)?)*)", README, re.M
    )
    assert len(commands) >= 5
    for command in commands:
        if "--lut" not in command:  # a table has to be measured first
            assert cli.run(command.split()) == 0, command


def test_every_option_named_is_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    helps = ""
    for name in (*cli.COMMANDS, "study copy"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli.run([*name.split(), "--help"])
        helps += out.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        train_template.parse_args(["--help"])
    helps += out.getvalue()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) >= 10
    assert {option for option in named if option not in helps} == set()


def test_the_output_shown_is_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = next(block for block in blocks("") if block.startswith("resnet50 at"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.run(["budget", "resnet50", "--ratio", "0.5"]) == 0
    assert out.getvalue().startswith(shown)


class Loader:
    """Batches of real digits; notes the loss that the training lines left behind."""

    def __init__(self, variables: dict[str, Any]) -> None:
        images = data.subset(data.load("digits", size=(32, 32)), 256, seed=0)
        self.batches = [
            (x.float().expand(-1, 3, -1, -1) / 255, y)
            for x, y in zip(images.x.split(32), images.y.split(32), strict=True)
        ] * 4
        self.variables = variables
        self.losses: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.batches:
            yield batch
            self.losses.append(self.variables["loss"].item())


def test_the_training_lines_run_as_they_stand_and_the_loss_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    code = next(block for block in blocks("python") if "load_recipe" in block)
    torch.manual_seed(0)
    variables: dict[str, Any] = {}
    variables["loader"] = loader = Loader(variables)
    exec(compile(code, "README.md", "exec"), variables)
    assert len(loader.losses) == 32
    assert sum(loader.losses[-8:]) < 0.9 * sum(loader.losses[:8])
    assert hasattr(variables["model"], "kw_warehouses")
    assert variables["temperature"].temperature == pytest.approx(1 - 1 / 20)


def test_the_planning_lines_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    import kwlayers
    from kwsearch import zoo

    code = next(block for block in blocks("python") if "'early'" in block or '"early"' in block)
    with torch.device("meta"):
        model = zoo.create("resnet50")
    variables: dict[str, Any] = {"model": model, "kwlayers": kwlayers}
    exec(compile(code, "README.md", "exec"), variables)
    assert 11_900_000 < variables["plan"].cost().params.total <= 12_000_000
    assert "('early', (64, 64, 1, 1), " in capsys.readouterr().out


def test_the_lines_of_other_methods_run_as_they_stand() -> None:
    from kwlayers import convert_, plan_model
    from kwsearch import zoo

    code = next(block for block in blocks("python") if 'methods.find("odconv")' in block)
    with torch.device("meta"):
        variables: dict[str, Any] = {"model": zoo.create("resnet18")}
    exec(compile(code, "README.md", "exec"), variables)
    # ODConv 4x, as published.
    assert sum(p.numel() for p in variables["model"].parameters()) == 44_901_640

    code = next(block for block in blocks("python") if "partition_" in block)
    model = zoo.create("resnet20", width=0.5)
    plan = plan_model(model, (3, 16, 16), method="pad_net")
    convert_(model, plan)
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    variables = {"torch": torch, "model": model, "images": images, "targets": targets}
    exec(compile(code, "README.md", "exec"), variables)
    assert sum(p.numel() for p in model.parameters()) == plan.cost().deployed


def test_the_comparison_shown_is_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    shown = next(block for block in blocks("") if "at most 12,000,000 parameters" in block)
    assert cli.run(["compare", "resnet18", "--params", "12M"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines():
        start = line.partition(" (…)")[0]
        assert any(other.startswith(start) for other in printed), line


def test_the_lines_of_sound_build_the_network() -> None:
    code = next(block for block in blocks("python") if 'zoo.create("dymn10"' in block)
    scope: dict[str, Any] = {}
    exec(code, scope)
    # Its 527 classes made 50.
    assert sum(p.numel() for p in scope["model"].parameters()) == 10_548_479 - 477 * 1281


def test_the_lines_of_microcontrollers_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    import click
    from click.testing import CliRunner

    from kwsearch.cli import cli
    from kwsearch.micronas.space import Space

    monkeypatch.chdir(ROOT)
    block = next(one for one in blocks("") if "recipes/micronas.yaml" in one)
    commands = [re.split(r" {2,}", line)[0].split() for line in block.splitlines() if line]
    known = cli.list_commands(click.Context(cli))
    assert all(words[0] == "kwsearch" and words[1] in known for words in commands)
    shown = CliRunner().invoke(cli, commands[0][1:])
    assert shown.exit_code == 0
    assert f"{Space(128, 9, 6).architectures:.3g} architectures" in shown.output
    assert "largest within the limits" in shown.output
    planned = CliRunner().invoke(cli, [*commands[1][1:], "--dry-run"])
    assert planned.exit_code == 0, planned.output


def test_the_standalone_lines_run_as_they_stand() -> None:
    import kwlayers

    code = next(block for block in blocks("python") if "KWConv2d" in block)
    variables: dict[str, Any] = {"kwlayers": kwlayers}
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["conv"](torch.randn(2, 64, 8, 8)).shape == (2, 128, 4, 4)


def test_the_file_tree_is_the_one_that_is_there() -> None:
    tree = next(block for block in blocks("") if block.startswith("kwlayers/"))
    folders: list[str] = []
    listed = set()
    for line in tree.splitlines():
        indented, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folders[len(indented) // 2 :] = [name]
        listed.add("".join(folders))
    for path in listed:
        assert (ROOT / path).exists(), path
    present = {
        f"{package}/{path.name}{'/' if path.is_dir() else ''}"
        for package in ("kwlayers", "kwlayers/ops", "kwsearch")
        for path in (ROOT / package).iterdir()
        if not path.name.startswith("__") and path.suffix in ("", ".py")
    }
    assert present <= listed
