"""`kwsearch validate` and `kwsearch schema`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kwlayers.plan import PlanError
from kwsearch import cli
from kwsearch.cli import schema, validate
from kwsearch.recipe import json_schema

RECIPE = """\
format: 1
model: resnet50
budget: {ratio: 0.5}
plan:
  groups:
    - {name: a, cell: [64, 64, 1, 1], num_cells: 1, layers: [layer1.0.conv2]}
    - {name: b, cell: [64, 64, 3, 3], num_cells: 1, layers: [layer1.1.conv2]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def run(*args: str) -> Result:
    return CliRunner().invoke(validate.command, args)


def test_a_right_recipe_is_summed_up_on_stdout(recipe: str) -> None:
    result = run(recipe)
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "recipe.yaml: ok (resnet50, ratio 0.5, 2 groups)\n",
        "",
    )


@pytest.mark.parametrize(
    ("overrides", "summary"),
    [
        (["budget={params: 12.8M}", "plan=null"], "resnet50, params 12,800,000"),
        (["budget={total_ratio: 2x}", "model=resnet101"], "resnet101, total_ratio 2, 2 groups"),
        (
            ["plan.groups=[{name: a, cell: [4, 4, 1, 1], num_cells: 1, layers: [layer3.*]}]"],
            "resnet50, ratio 0.5, 1 group",
        ),
    ],
)
def test_overrides_count_in_the_summary(recipe: str, overrides: list[str], summary: str) -> None:
    result = run(recipe, *overrides)
    assert (result.exit_code, result.stdout) == (0, f"recipe.yaml: ok ({summary})\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=resnet[50]", "unknown model 'resnet[50]': did you mean resnet50"),
        ("plan.groups.0.layers=[layer1.0.conv9]", "did you mean 'layer1.0.conv3'?"),
        ("plan.groups.0.cell=[5, 5, 1, 1]", "do not tile a kernel of shape (64, 64, 3, 3)"),
        ("plan.groups=[]", "plan: it has no groups; delete the section to plan by the budget"),
        ("budget={params: 1M}", "parameters, over the budget of 1,000,000"),
    ],
)
def test_what_only_the_model_can_tell_is_told(recipe: str, override: str, message: str) -> None:
    result = run(recipe, override)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith(f"override '{override}': ")
    assert message in str(result.exception)


PLANNED = """\
format: 1
model: resnet18
method:
  sharing: {early: [layer1.*], late: [layer4.*]}
  rules:
    - {layers: [layer1.0.conv1], static: true}
    - {layers: [layer4.1.*], static: true}
budget: {ratio: 0.5}
"""
ROWS = [
    ("layer4.1.*", "nothing.*", 2, "7:7: rule 2 (nothing.*): no convolution or linear layer is"),
    ("late: [layer4.*]", "late: [layer1.0.*]", 2, "4:13: layer1.0.conv1 matches group 'early'"),
    ("early: [layer1.*]", "early: [layer9.*]", 2, "4:13: group 'early': no convolution or"),
    ("], static: true}\nb", "]}\nb", 2, "7:7: rule for layer4.1.*: either static, or dynamic"),
    ("18", "19", 2, "2:1: unknown model 'resnet19': did you mean resnet18"),
    ("ratio: 0.5", "ratio: 5000", 2, "8:1: ratio 5000.0: it must be a number above 0, at most"),
    ("ratio: 0.5", "params: 1000", 3, "8:1: params 1,000: below the floor of "),
    ("ratio: 0.5", "total_ratio: 0.001", 3, "8:1: params 11,689: below the floor of "),
]


@pytest.mark.parametrize(("old", "new", "code", "message"), ROWS, ids=[row[1] for row in ROWS])
def test_what_does_not_go_with_the_model_has_a_line_too(
    old: str,
    new: str,
    code: int,
    message: str,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert old in PLANNED
    Path(recipe).write_text(PLANNED.replace(old, new, 1))
    for command in (["validate"], ["export", "--to", "official.json"], ["optimize", "--dry-run"]):
        assert cli.run([*command, recipe]) == code
        assert f"recipe.yaml:{message}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_plan_over_its_own_budget_is_refused_by_every_command(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from kwsearch.recipe import load_recipe

    # Half of the 25,557,032 parameters of the static network.
    Path(recipe).write_text(RECIPE.replace("{ratio", "{total_ratio"))
    for command in (["validate"], ["budget"], ["inspect"], ["export", "--to", "train.py"]):
        assert cli.run([*command, recipe]) == 2
        shown = capsys.readouterr()
        assert not shown.out
        assert re.fullmatch(
            r"Error: recipe\.yaml:3:1: plan: [\d,]+ parameters, over the budget of 12,778,516: "
            r"raise the budget, or delete it to take the plan as it stands\n",
            shown.err,
        )
    asked = load_recipe(recipe)
    with pytest.raises(PlanError, match=r"does not fit this ResNet: recipe\.yaml:3:1: plan: "):
        asked.plan_for(asked.create_model())
    assert cli.run(["validate", recipe, "budget=null"]) == 0


def test_every_problem_goes_to_stderr_and_the_exit_code_is_2(recipe: str) -> None:
    result = run(recipe, "plan.groups.0.num_cells=0", "search.trials=0")
    assert (result.exit_code, result.stdout, result.stderr) == (
        2,
        "",
        "override 'plan.groups.0.num_cells=0': plan.groups.0.num_cells: too small (got 0; "
        "allowed a whole number >= 1)\n"
        "override 'search.trials=0': search.trials: too small (got 0; "
        "allowed a whole number >= 1)\n",
    )


def test_a_second_file_is_refused(recipe: str) -> None:
    result = run(recipe, "other.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (
        2,
        "",
        "override 'other.yaml': not KEY=VALUE (allowed e.g. proxy.epochs=3)\n",
    )


def test_a_file_that_does_not_exist_is_named(recipe: str) -> None:
    result = run("other.yaml")
    assert (result.exit_code, result.stderr) == (2, "other.yaml: no such file\n")


def test_the_help_shows_how_it_is_called() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "RECIPE [KEY=VALUE]..." in result.stdout


def test_the_schema_is_printed_as_json() -> None:
    result = CliRunner().invoke(schema.command, [])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json_schema()
    assert result.stdout.startswith('{\n  "$schema": "https://json-schema.org/')


def test_the_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from kwsearch.cli import schema, validate; "
        "sys.exit(bool({'torch', 'pydantic', 'yaml', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OWN = """
    from torch import nn

    def make(in_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        )
"""


def test_own_code_is_imported_with_trust_given_on_the_command_line_only(
    own_code: Callable[[str], str],
) -> None:
    module = own_code(OWN)
    text = f"format: 1\nmodel: {module}:make\ninput: 1x8x8\nbudget: {{ratio: 1}}\n"
    Path("own.yaml").write_text(text)
    refused = run("own.yaml")
    assert isinstance(refused.exception, PlanError)
    assert str(refused.exception).startswith(f"own.yaml:2:1: {module}:make: it is code of your ")
    assert module not in sys.modules
    for trust in ("--trust", "trust=true"):
        result = run("own.yaml", trust)
        assert (result.exit_code, result.stdout) == (0, f"own.yaml: ok ({module}:make, ratio 1)\n")
    for unknown in ("trust=false", "trust=True"):
        result = run("own.yaml", unknown)
        assert (result.exit_code, "trust: unknown key" in result.stderr) == (2, True)
    Path("own.yaml").write_text(text + "trust: true\n")
    result = run("own.yaml", "--trust")
    assert result.exit_code == 2
    assert result.stderr.startswith("own.yaml:5:1: trust: unknown key (allowed format, model, ")
