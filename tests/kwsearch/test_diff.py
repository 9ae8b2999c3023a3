"""kwsearch diff: what differs between two recipes and their plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kwsearch import cli
from kwsearch.diff import REST, Count, Side, diff, value_text
from kwsearch.networks import trace_model
from kwsearch.pages import diff as pages
from kwsearch.recipe import parse_recipe
from kwsearch.resolve import outcome_of
from tests.kwsearch.pages import Page, loads_nothing

RECIPES = Path(__file__).parents[2] / "recipes"
WHOLE, HALF = (str(RECIPES / f"kw_resnet18_{b}x.yaml") for b in ("1", "0.5"))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kwsearch", *args])
        code = cli.run(list(args))
        return code, *capsys.readouterr()

    return call


def found(run: Run, *args: str) -> dict[str, Any]:
    code, out, _ = run("diff", *args, "--json")
    assert code == 0
    data: dict[str, Any] = json.loads(out)
    return data


def side(text: str, name: str = "r.yaml") -> Side:
    recipe = parse_recipe(f"format: 1\n{text}")
    network = trace_model(recipe.model.name, recipe.input, recipe.model.num_classes)
    return Side(name, recipe, outcome_of(recipe, network).plan)


def test_totals_of_published_recipes_are_those_of_the_official_code(run: Run) -> None:
    data = found(run, WHOLE, HALF)
    assert data["same_plan"] is False
    assert data["note"] == ""
    assert data["params"]["total"] == {
        "a": 11_932_148,
        "b": 7_431_044,
        "difference": 7_431_044 - 11_932_148,
        "ratio": 7_431_044 / 11_932_148,
    }
    attention = data["params"]["attention"]
    assert (attention["a"], attention["b"]) == (242_636, 1_320_284)
    assert (data["macs"]["total"]["a"], data["macs"]["total"]["b"]) == (
        2_199_216_128,
        2_585_144_576,
    )
    mixing = data["macs"]["mixing"]
    assert (mixing["difference"], mixing["ratio"]) == (769_818_624 - 384_909_312, 2)


def test_totals_are_what_budget_counts_of_each(run: Run) -> None:
    data = found(run, WHOLE, HALF)
    for key, path in (("a", WHOLE), ("b", HALF)):
        counted = json.loads(run("budget", path, "--json")[1])
        params = counted["params"] | {"kernels": counted["params"]["warehouses"]}
        assert {name: one[key] for name, one in data["params"].items()}.items() <= params.items()
        assert {name: one[key] for name, one in data["macs"].items()} == counted["macs"]


def test_the_stages_add_up_to_the_totals(run: Run) -> None:
    for other in (HALF, str(RECIPES / "odconv_resnet50_4x.yaml")):
        data = found(run, WHOLE, other)
        assert [row["stage"] for row in data["stages"]][-1] == REST
        for of in ("params", "macs"):
            for key in ("a", "b", "difference"):
                total = sum(row[of][key] for row in data["stages"])
                assert total == data[of]["total"][key]
    first, *_, rest = found(run, WHOLE, HALF)["stages"]
    assert first["groups"] == {"a": "56 of 64x64", "b": "112 of 32x32"}
    assert rest["params"] == {"a": 532_008, "b": 532_008, "difference": 0, "ratio": 1}


def test_parameters_are_as_deployed_everywhere(run: Run) -> None:
    padded, whole = (
        str(RECIPES / name) for name in ("pad_net_resnet50_0.3.yaml", "odconv_resnet50_4x.yaml")
    )
    data = found(run, padded, whole, "--html", "d.html")
    # By the specification 47,902,918; weights are whole.
    assert data["params"]["total"]["a"] == 47_902_917
    assert sum(row["params"]["a"] for row in data["stages"]) == 47_902_917
    spared = data["stages"][-1]
    assert (spared["stage"], spared["params"]["b"]) == ("less what is only there for training", 0)
    assert spared["params"]["a"] == 47_902_917 - 120_583_980  # as it is trained
    text = Path("d.html").read_text()
    assert "120,583,980" not in text
    assert text.count("47,902,917") > 1


def test_settings_and_groups_that_differ_are_named(run: Run) -> None:
    data = found(run, WHOLE, HALF)
    assert data["settings"] == [
        {"path": "method.cell_ratio", "a": [1, 1], "b": [0.5, 0.5]},
        {"path": "budget.ratio", "a": 1, "b": 0.5},
    ]
    assert [group["name"] for group in data["groups"]] == [f"stage{i}_conv" for i in range(4)]
    last = data["groups"][-1]
    assert (last["a"], last["b"]) == ("27 of 512x512, 3 layers", "54 of 256x256, 3 layers")
    assert last["fields"] == [
        {"path": "cell", "a": [512, 512, 1, 1], "b": [256, 256, 1, 1]},
        {"path": "num_cells", "a": 27, "b": 54},
        {"path": "ratio", "a": 1, "b": 0.5},
    ]
    assert data["dynamic_in_a_only"] == data["dynamic_in_b_only"] == []


def test_a_recipe_and_itself_are_the_same(run: Run) -> None:
    code, out, err = run("diff", WHOLE, WHOLE)
    assert (code, err) == (0, "")
    assert out.splitlines()[2:] == [
        "the same plan, and the same settings: 11,932,148 parameters, 2,199,216,128 MACs"
    ]
    data = found(run, WHOLE, WHOLE)
    assert data["same_plan"] is True
    assert data["settings"] == data["groups"] == []


def test_a_recipe_without_a_plan_is_planned(run: Run) -> None:
    Path("r.yaml").write_text("format: 1\nmodel: resnet18\nbudget: {ratio: 1}\n")
    code, out, _ = run("diff", WHOLE, "r.yaml")
    assert code == 0
    assert "the same plan: 11,932,148 parameters" in out
    assert "training.epochs" in out  # which only one of them says
    # What is by default is the same, said or not.
    paths = [change["path"] for change in found(run, WHOLE, "r.yaml")["settings"]]
    assert paths == ["training.epochs", "training.temperature_epochs"]


def test_where_a_recipe_comes_from_does_not_count() -> None:
    text = "model: resnet20\nbudget: {ratio: 1}\n"
    a, b = side(text), side(f"{text}provenance: {{command: another}}\n")
    assert diff(a, b).settings == ()
    assert diff(a, b).same_plan


def test_layers_that_are_dynamic_in_one_only() -> None:
    text = "model: resnet20\nbudget: {ratio: 1}\nmethod: {rules: [%s]}\n"
    a = side(text.replace("method: {rules: [%s]}\n", ""))
    b = side(text % '{layers: ["layer1.0.*"], static: true}')
    one = diff(a, b)
    assert one.dynamic_a == ("layer1.0.conv1", "layer1.0.conv2")
    assert one.dynamic_b == ()
    assert diff(b, a).dynamic_b == one.dynamic_a
    (group,) = one.groups
    assert (group.only_a, group.only_b) == (one.dynamic_a, ())
    assert [(c.path, c.a, c.b) for c in one.settings] == [
        ("method.rules", [], None),
        ("method.rules.0.layers", None, ["layer1.0.*"]),
        ("method.rules.0.static", None, True),
        ("method.rules.0.dynamic", None, False),
    ]


def test_sections_that_one_of_them_has_are_as_they_were_written() -> None:
    text = "model: resnet20\nbudget: {ratio: 1}\n"
    changes = diff(side(text), side(f"{text}search: {{trials: 7}}\n")).settings
    assert [(c.path, c.a, c.b) for c in changes] == [("search.trials", None, 7)]
    both = diff(side(f"{text}search: {{trials: 7}}\n"), side(f"{text}search: {{seed: 1}}\n"))
    assert [(c.path, c.a, c.b) for c in both.settings] == [
        ("search.trials", 7, 40),
        ("search.seed", 0, 1),
    ]


def test_budgets_of_other_kinds_differ_by_path() -> None:
    a = side("model: resnet20\nbudget: {ratio: 1}\n")
    b = side("model: resnet20\nbudget: {params: 200k}\ninput: [3, 32, 32]\n")
    assert [(c.path, c.a, c.b) for c in diff(a, b).settings] == [
        ("budget.ratio", 1, None),
        ("budget.params", None, 200_000),
    ]
    assert diff(a, b).params[-1].b <= 200_000


def test_the_same_groups_on_another_input_are_another_plan() -> None:
    a = side("model: resnet20\nbudget: {ratio: 1}\n")
    b = side("model: resnet20\nbudget: {ratio: 1}\ninput: [3, 16, 16]\n")
    one = diff(a, b)
    assert not one.same_plan
    assert one.note == ""
    assert one.groups == ()
    assert [c.path for c in one.settings] == ["input"]
    conv = {count.name: count for count in one.macs}["conv"]
    assert conv.a == 4 * conv.b


def test_of_different_networks_layers_of_one_name_are_compared(run: Run) -> None:
    data = found(run, WHOLE, str(RECIPES / "odconv_resnet50_4x.yaml"))
    # 21 layers of ResNet18, all of which ResNet50 has by name, and its 54.
    assert data["layers_in_common"] == 21
    assert data["note"] == (
        "The networks have different layers (21 and 54), which are compared where their names are "
        "the same: 21."
    )
    assert (data["params"]["total"]["a"], data["params"]["total"]["b"]) == (11_932_148, 90_670_888)
    assert data["dynamic_in_a_only"] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert data["dynamic_in_b_only"] == []
    assert data["settings"][0] == {"path": "model.name", "a": "resnet18", "b": "resnet50"}
    code, out, _ = run("diff", WHOLE, str(RECIPES / "odconv_resnet50_4x.yaml"))
    assert code == 0
    assert "and 32 groups more, which --json and --html have" in out


def test_the_tables_show_both_and_the_difference(run: Run) -> None:
    _, out, _ = run("diff", WHOLE, HALF)
    lines = [line.split() for line in out.splitlines()]
    assert ["parameters", "11,932,148", "7,431,044", "-4,501,104", "0.62"] in lines
    assert ["MACs", "2,199,216,128", "2,585,144,576", "+385,928,448", "1.18"] in lines
    assert ["unchanged", "532,008", "532,008", "0", "1.00"] in lines
    assert ["method.cell_ratio", "[1,", "1]", "[0.5,", "0.5]"] in lines
    assert "the plans differ" in out


def test_the_page_has_all_of_it(run: Run) -> None:
    code, _, err = run("diff", WHOLE, HALF, "--html", "d.html")
    assert (code, err) == (0, "wrote d.html\n")
    text = Path("d.html").read_text()
    page = Page(text)
    assert loads_nothing(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.row("totals", "total parameters") == [11_932_148, 7_431_044, -4_501_104]
    assert page.row("totals", "mixing MACs")[:2] == [384_909_312, 769_818_624]
    assert page.row("stages", "stage 3")[:3] == [7_152_180, 3_784_308, 3_784_308 - 7_152_180]
    assert [row[0][0] for row in page.tables["settings"]] == ["method.cell_ratio", "budget.ratio"]
    assert [shown for shown, _ in page.tables["groups"][0]] == [
        "stage0_conv",
        "56 of 64x64, 6 layers",
        "112 of 32x32, 6 layers",
        "cell [64, 64, 1, 1] to [32, 32, 1, 1]; num_cells 56 to 112; ratio 1 to 0.5",
    ]
    assert page.opened.count("figure") == 2
    assert "static network 11,689,512; A 11,932,148; B 7,431,044." in page.text
    assert f"kwsearch diff {WHOLE} {HALF} --html d.html" in page.text


def test_names_are_text_wherever_they_stand() -> None:
    name = "<script>alert('1')</script>&\"]]>"
    a = side("model: resnet20\nbudget: {ratio: 1}\n", name)
    b = side(
        f"model: resnet20\nbudget: {{ratio: 2}}\ntraining: {{note: {json.dumps(name)}}}\n", name
    )
    text = pages.page(diff(a, b), name, {name: name})
    assert "<script>alert" not in text
    page = Page(text)
    assert page.opened.count("script") == 1  # its own
    assert page.text.count(name) == 6  # A, B, the note, the command, a package and its version


OWN = "format: 1\nmodel: my.nets:make\ninput: 1x8x8\nbudget: {ratio: 1}\n"
WRONG = [
    (("missing.yaml", WHOLE), 2, "Error: missing.yaml: no such file\n"),
    ((WHOLE, "resnet18"), 2, "Error: resnet18: no such file\n"),
    ((WHOLE, "text.yaml"), 2, "Error: text.yaml:1:1: not a mapping (got 'words'); a recipe has "),
    ((WHOLE, "own.yaml"), 2, "Error: own.yaml:2:1: my.nets:make: it is code of your own: "),
    ((WHOLE, "low.yaml"), 3, "Error: low.yaml:3:1: params 1,000: below the floor of 973,770"),
    ((WHOLE, HALF, "--html", "d.txt"), 2, "--html d.txt: its name ends in .html"),
    ((WHOLE, HALF, "--html", "no/d.html"), 2, "--html no/d.html: there is no folder no"),
    ((WHOLE,), 2, "Missing argument 'B.yaml'"),
]


@pytest.mark.parametrize(("args", "code", "message"), WRONG, ids=[row[2][:30] for row in WRONG])
def test_wrong_input_is_one_message(
    run: Run, args: tuple[str, ...], code: int, message: str
) -> None:
    Path("own.yaml").write_text(OWN)
    Path("text.yaml").write_text("words\n")
    Path("low.yaml").write_text("format: 1\nmodel: resnet18\nbudget: {params: 1k}\n")
    ran, out, err = run("diff", *args)
    assert (ran, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not Path("d.html").exists()


def test_own_code_is_compared_with_trust(run: Run, own_code: Callable[[str], str]) -> None:
    module = own_code("""
        from torch import nn

        def make(in_channels):
            return nn.Sequential(
                nn.Conv2d(in_channels, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
            )
    """)
    for name, ratio in (("a.yaml", 1), ("b.yaml", 2)):
        text = f"format: 1\nmodel: {module}:make\ninput: 1x8x8\nbudget: {{ratio: {ratio}}}\n"
        Path(name).write_text(text)
    assert run("diff", "a.yaml", "b.yaml")[0] == 2
    data = found(run, "a.yaml", "b.yaml", "--trust")
    # 8x8x3x3 of the second convolution once more; what is static is the same.
    assert data["params"]["kernels"]["difference"] == 8 * 8 * 9
    assert data["params"]["unchanged"]["difference"] == 0


def test_values_are_written_as_in_a_recipe() -> None:
    assert [value_text(v) for v in (True, None, 0.5, 1.0, 3, "stage", [0.5, 1], {"a": [1]})] == [
        "true", "null", "0.5", "1", "3", "stage", "[0.5, 1]", "{a: [1]}",
    ]  # fmt: skip


def test_a_ratio_needs_something_to_compare_with() -> None:
    assert Count("modulation", 0, 3).ratio is None
    assert Count("modulation", 2, 3).ratio == 1.5
