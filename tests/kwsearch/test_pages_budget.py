"""kwsearch budget --plot: what is drawn is what is counted."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from kwlayers.methods import find
from kwlayers.sharing import Settings
from kwsearch import cli
from kwsearch.budget import Target, meet
from kwsearch.networks import trace_model
from kwsearch.pages import budget as pages
from kwsearch.pages.curve import Curve, Point, curve_of
from kwsearch.pages.figure import Axis, Box, Figure
from tests.kwsearch.pages import SVG, Page, areas, loads_nothing, marks, scale
from tests.zoo import ANYWHERE

ROOT = Path(__file__).parents[2]
ORACLES = {
    entry["config"]: entry
    for entry in json.loads((ROOT / "tests/data/kernel_warehouse.json").read_text())
}
# The published ratios of ResNet18, and what the official code counts there.
RESNET18 = {
    ratio: ORACLES[f"kw{name}x_resnet18"]
    for ratio, name in ((0.25, "1d4"), (0.5, "1d2"), (1, "1"), (2, "2"), (4, "4"))
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kwsearch", *args])
        code = cli.run(list(args))
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def curve() -> Curve:
    return curve_of(trace_model("resnet18"), Settings(), "resnet18")


def figures_of(path: str) -> list[Element]:
    """Parameters and MACs of a file."""
    root = fromstring(Path(path).read_text())
    return root.findall(f"{SVG}svg")


def test_points_begin_at_the_smallest_plan_and_end_at_4(curve: Curve) -> None:
    first, last = curve.points[0], curve.points[-1]
    # One cell in each of four warehouses of 56, 47, 47 and 27 mixtures.
    assert first.at == 4 / (56 + 47 + 47 + 27)
    assert sum(first.params.values()) == 973_770
    assert last.at == 4
    assert 25 <= len(curve.points) <= 40
    ats = [point.at for point in curve.points]
    assert ats == sorted(set(ats))
    assert {1, 2, 4} <= set(ats)


def test_the_smallest_plan_is_there_where_no_common_ratio_comes_to_it() -> None:
    curve = curve_of(trace_model("convnext_tiny"), Settings(sharing="layer"), "convnext_tiny")
    # At this ratio the 18 depthwise layers of 7x7 would have 3 cells each, as one of 49 mixtures.
    first = curve.points[0]
    assert {group.num_cells for group in first.plan.warehouses} == {1}
    assert int(49 * first.at) == 3


@pytest.mark.parametrize("ratio", [1, 2, 4])  # those that have the cells of the default
def test_points_at_published_ratios_are_the_published_plans(curve: Curve, ratio: float) -> None:
    (point,) = (point for point in curve.points if point.at == ratio)
    counted = RESNET18[ratio]
    assert sum(point.params.values()) == counted["params"]
    assert point.params["attention"] == counted["attention_params"]
    assert sum(point.macs.values()) == counted["macs_224"]
    assert point.macs["mixing"] == counted["mixing_macs"]


@pytest.mark.parametrize("name", ANYWHERE)
def test_parts_of_every_point_add_up_to_the_plan_by_every_method(name: str) -> None:
    curve = curve_of(trace_model("resnet20"), find(name).settings(), "resnet20")
    assert len(curve.points) >= 8
    sizes = []
    for point in curve.all:
        cost = point.plan.cost()
        assert sum(point.params.values()) == cost.deployed
        assert sum(point.macs.values()) == cost.macs.total
        sizes.append(sum(group.size for group in point.plan.groups))
    assert sizes == sorted(sizes)
    for figure in pages.figures(curve):
        fromstring(figure.svg(alone=True))


def test_methods_of_k_kernels_have_whole_numbers_up_to_the_published() -> None:
    network = trace_model("resnet18")
    curve = curve_of(network, find("odconv").settings(), "resnet18")
    assert [point.at for point in curve.points] == list(range(1, 9))
    totals = [sum(point.params.values()) for point in curve.points]
    assert (totals[0], totals[3]) == (11_943_944, 44_901_640)  # as published, 1x and 4x
    assert [(mark.at, mark.name) for mark in curve.published] == [(1, "ODConv as published")]
    assert not curve.scale.title.startswith("convolutional")


def test_budgets_that_are_larger_make_the_axis_longer(curve: Curve) -> None:
    network = trace_model("resnet18")
    chosen = Point.of(meet(network, Target(ratio=20)).plan, "asked", "asked")
    assert curve_of(network, Settings(), "resnet18", chosen).points[-1].at == 32


def test_the_areas_of_a_file_are_the_counts_by_the_ticks_of_its_axes(run: Run) -> None:
    code, _, err = run("budget", "resnet18", "--plot", "b.svg")
    assert (code, err) == (0, "wrote b.svg\n")
    params, macs = figures_of("b.svg")
    one = RESNET18[1]
    for figure, total, stack in (
        (params, one["params"], ("p5", "p1", "p0")),
        (macs, one["macs_224"], ("p0", "p5", "p1", "p2")),
    ):
        found = areas(figure)
        assert tuple(found) == stack  # what changes least is lowest, each above the other
        half = len(found["p0"]) // 2
        tops = [corners[half:][::-1] for corners in found.values()]
        floors = [corners[:half] for corners in found.values()]
        assert floors[1:] == tops[:-1]
        at_y = scale(figure, "y")
        (bottom,) = {y for _, y in floors[0]}
        assert bottom == pytest.approx(at_y(0), abs=0.1)
        # On a logarithmic axis 1 is halfway from 1/4 to 4.
        at_x = scale_log(figure)
        (place,) = (i for i, (x, _) in enumerate(tops[-1]) if abs(x - at_x(1)) < 0.06)
        assert tops[-1][place][1] == pytest.approx(at_y(total), abs=0.11)
        assert floors[0][0][0] == pytest.approx(at_x(4 / 177), abs=0.11)
    (edge,) = {y for _, y in areas(params)["p5"][len(areas(params)["p5"]) // 2 :]}
    assert edge == pytest.approx(scale(params, "y")(532_008), abs=0.11)  # at every budget


def scale_log(figure: Element) -> Callable[[float], float]:
    """Pixels of values on a logarithmic axis, by the ticks at 1/4 and 4."""
    at = {text.text: float(text.get("x") or 0) for text in figure.iter(f"{SVG}text")}
    left, right = at["1/4"], at["4"]
    return lambda value: left + math.log2(4 * value) / 4 * (right - left)


def test_published_settings_are_marked_where_they_were_published(run: Run) -> None:
    run("budget", "resnet18", "--plot", "b.svg")
    for figure, key in zip(figures_of("b.svg"), ("params", "macs_224"), strict=True):
        at_x, at_y = scale_log(figure), scale(figure, "y")
        expected = [(at_x(ratio), at_y(entry[key])) for ratio, entry in RESNET18.items()]
        found = marks(figure, "published")
        assert len(found) == 5
        for place, wanted in zip(found, expected, strict=True):
            assert place == pytest.approx(wanted, abs=0.11)
        texts = [text.text for text in figure.iter(f"{SVG}text")]
        assert {"1/4x", "1/2x", "1x", "2x", "4x"} <= set(texts)
        said = [title.text or "" for title in figure.iter(f"{SVG}title")]
        assert any("ResNet18 1/2x: " in text and f"{RESNET18[0.5][key]:,}" in text for text in said)


def test_the_static_network_and_the_target_have_rules(run: Run) -> None:
    code, out, err = run("budget", "resnet50", "--ratio", "0.5", "--plot", "b.svg", "--json")
    assert (code, err) == (0, "wrote b.svg\n")
    assert json.loads(out)["params"]["total"] == 17_638_264
    params, macs = figures_of("b.svg")
    for figure, static, total in (
        (params, 25_557_032, 17_638_264),
        (macs, 4_089_184_256, 8_167_645_248),
    ):
        at_y = scale(figure, "y")
        rules = [
            [float(number) for number in re.findall(r"[\d.]+", path.get("d") or "")]
            for path in figure.iter(f"{SVG}path")
            if path.get("class") == "rule"
        ]
        ((_, y, _, same),) = (rule for rule in rules if rule[1] == rule[3])
        assert y == same == pytest.approx(at_y(static), abs=0.11)
        (star,) = marks(figure, "best")
        assert star[1] == pytest.approx(at_y(total), abs=0.11)
        ((x, _, _, _),) = (rule for rule in rules if rule[0] == rule[2])
        assert x == star[0] == pytest.approx(scale_log(figure)(0.5), abs=0.11)
        texts = [text.text for text in figure.iter(f"{SVG}text")]
        assert "asked: b = 0.5" in texts
        assert not any(text == "1/2x" for text in texts)  # that is what was asked for
        assert len(marks(figure, "published")) == 2  # 1x and 4x


def test_the_page_has_every_point_with_exact_counts(run: Run) -> None:
    code, _, err = run("budget", "resnet18", "--params", "8M", "--plot", "b.html", "-o", "r.yaml")
    assert code == 0
    assert err.splitlines() == ["wrote r.yaml", "wrote b.html"]
    text = Path("b.html").read_text()
    page = Page(text)
    assert loads_nothing(text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    for ratio, name in ((0.25, "1/4"), (0.5, "1/2"), (1, "1"), (4, "4")):
        total, kernels, attention, rest, macs, *_ = page.row("points", f"ResNet18 {name}x")[-9:]
        entry = RESNET18[ratio]
        assert (total, attention, macs) == (
            entry["params"],
            entry["attention_params"],
            entry["macs_224"],
        )
        assert kernels + attention + rest == total
    numbers = page.row("points", "at most 8,000,000 parameters (asked for)")
    assert 7_960_000 < numbers[0] <= 8_000_000
    assert "kwsearch budget resnet18 --params 8M --plot b.html -o r.yaml" in page.text
    assert "torch " in page.text
    assert len(page.tables["points"]) > 25


def test_every_plot_is_told_in_words(curve: Curve) -> None:
    page = Page(pages.page(curve, "resnet18", "", "kwsearch", {}))
    figures = pages.figures(curve)
    assert page.opened.count("figure") == len(figures) == 2
    for figure, key in zip(figures, ("params", "macs_224"), strict=True):
        root = figure.element()
        title, said = root.find("title"), root.find("desc")
        assert title is not None
        assert said is not None
        assert f"ResNet18 4x at b = 4 has {RESNET18[4][key]:,}" in (said.text or "")
        assert f"{title.text}. {said.text}" in page.text  # for all to read, too
        named = (root.get("aria-labelledby") or "").split()
        assert named == [title.get("id"), said.get("id")]
        assert set(named) <= set(page.ids)
        assert root.get("role") == "img"


def test_names_are_text_wherever_they_stand(curve: Curve) -> None:
    name = "<script>alert('1')</script>&\"]]>"
    chosen = Point.of(curve.points[3].plan, name, name)
    named = Curve(curve.network, curve.scale, curve.points, curve.floor, (), chosen)
    text = pages.page(named, name, name, f"kwsearch {name}", {name: name})
    assert "<script>alert" not in text
    page = Page(text)
    assert page.opened.count("script") == 1  # its own
    assert page.text.count(name) >= 5
    svg = pages.svg(named, name, name, name)
    assert not [tag for tag in fromstring(svg).iter() if "script" in tag.tag]
    assert loads_nothing(text)


@pytest.mark.parametrize(
    "args",
    [
        ("resnet20", "--method", "odconv", "--set", "num_kernels=2"),
        ("resnet20", "--method", "dcd", "--params", "400k"),
        ("resnet20", "--method", "condconv", "--ratio", "3"),
        ("resnet20", "--cell-ratio", "0.5", "--sharing", "layer"),
        ("resnet20", "--ratio", "0.001"),
        (str(ROOT / "recipes/quickstart.yaml"),),
        (str(ROOT / "recipes/kw_mobilenetv2_100_0.5x.yaml"),),
        (str(ROOT / "recipes/kernel_dna_resnet18.yaml"),),
    ],
)
def test_every_kind_of_request_can_be_drawn(run: Run, args: tuple[str, ...]) -> None:
    code, out, err = run("budget", *args, "--plot", "b.SVG")
    assert code == 0, err
    drawn = [len(marks(figure, "best")) for figure in figures_of("b.SVG")]
    targeted = not any("layer" in arg for arg in args)
    assert drawn == [targeted, targeted]
    text = Path("b.SVG").read_text()
    assert loads_nothing(text)
    ids = [tag.get("id") for tag in fromstring(text).iter() if tag.get("id")]
    assert len(ids) == len(set(ids))
    assert out


def test_a_recipes_plan_is_on_a_curve_of_its_own_groups(run: Run) -> None:
    path = ROOT / "recipes/kw_mobilenetv2_100_0.5x.yaml"
    run("budget", str(path), "--plot", "b.html")
    page = Page(Path("b.html").read_text())
    total, kernels, attention, rest, macs, *_ = page.row("points", "the recipe's plan (asked for)")
    counted = ORACLES["kw1d2x_mobilenetv2_100"]
    assert (total, attention, macs) == (
        counted["params"],
        counted["attention_params"],
        counted["macs_224"],
    )
    # Between its neighbours by size, part by part.
    rows = [[int(v) for _, v in row[2:] if v and "." not in v] for row in page.tables["points"]]
    at = rows.index([total, kernels, attention, rest, macs, *_])
    below, above = rows[at - 1], rows[at + 1]
    assert below[1] < kernels < above[1]
    assert below[2] <= attention <= above[2]
    assert below[3] == rest == above[3]


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("b.png", "--plot b.png: its name ends in .svg or .html"),
        ("svg", "--plot svg: its name ends in .svg or .html"),
        ("nowhere/b.svg", "--plot nowhere/b.svg: there is no folder nowhere"),
        (".", "is a directory"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, plot: str, message: str
) -> None:
    monkeypatch.setattr("kwsearch.networks.trace_model", lambda *args: pytest.fail("worked"))
    code, out, err = run("budget", "resnet18", "--ratio", "1", "--plot", plot)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_target_out_of_reach_draws_nothing(run: Run) -> None:
    code, _, err = run("budget", "resnet18", "--params", "1k", "--plot", "b.svg")
    assert code == 3
    assert "below the floor" in err
    assert not list(Path().iterdir())


def test_an_area_has_the_corners_of_its_values() -> None:
    axis = Axis("", 0, 10, ((0, "0"), (10, "10")))
    figure = Figure("f", "", "", axis, axis, (294, 266))
    figure.area([(0, 0), (10, 1)], [(0, 5), (10, 10)], 0)
    drawn = fromstring(figure.svg(alone=True))
    (corners,) = areas(drawn).values()
    expected = [(0, 0), (10, 1), (10, 10), (0, 5)]  # along the lower edge, and back
    at_x, at_y = scale(drawn, "x"), scale(drawn, "y")
    assert at_y(0) > at_y(10)  # upwards
    for corner, (x, y) in zip(corners, expected, strict=True):
        assert corner == pytest.approx((at_x(x), at_y(y)), abs=0.06)


def test_texts_go_where_no_mark_is() -> None:
    axis = Axis("", 0, 10, ((0, "0"), (10, "10")))
    for places, expected in (([], "end"), ([(9.5, 5.0)], "start"), ([(9.5, 5), (0.5, 5)], "end")):
        figure = Figure("f", "", "", axis, axis)
        for place in places:
            figure.mark(*place, "trial")
        figure.rule(y=5, text="static")
        (said,) = (
            text
            for text in fromstring(figure.svg(alone=True)).iter(f"{SVG}text")
            if text.get("class") == "said"
        )
        assert said.get("text-anchor", "start") == expected
    # A rule between two marks has its text below.
    assert figure.taken[-1].top > figure.taken[0].top
    assert not any(figure.taken[-1].covers(other) for other in figure.taken[:-1])
    assert Box(0, 0, 2, 2).covers(Box(1, 1, 3, 3))
    assert not Box(0, 0, 2, 2).covers(Box(2, 0, 3, 3))
