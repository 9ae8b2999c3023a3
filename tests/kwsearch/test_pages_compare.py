"""kwsearch compare --html: the comparison as a page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from kwsearch import cli, compare
from kwsearch.budget import Target
from kwsearch.networks import trace_model
from kwsearch.pages import compare as pages
from tests.kwsearch.pages import SVG, Page, loads_nothing, scale
from tests.zoo import ANYWHERE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kwsearch", "compare", *args])
        code = cli.run(["compare", *args])
        return code, *capsys.readouterr()

    return call


# Parameters as counted in the published implementations.
AS_PUBLISHED = {
    "KernelWarehouse": 11_932_148,
    "CondConv": 88_599_656,
    "DY-Conv": 45_239_348,
    "ODConv": 11_943_944,
    "DCD": 14_703_332,
}


def test_the_page_has_what_is_printed_and_all_parts(run: Run) -> None:
    code, out, err = run("resnet18", "--json", "--html", "c.html")
    assert (code, err) == (0, "wrote c.html\n")
    text = Path("c.html").read_text()
    page = Page(text)
    assert loads_nothing(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.row("methods", "static network")[:2] == [11_689_512, 0]
    for title, params in AS_PUBLISHED.items():
        assert page.row("methods", title)[0] == params
    methods = json.loads(out)["methods"]
    assert len(methods) == len(ANYWHERE) == len(page.tables["methods"]) - 1
    for entry in methods:
        total, *params = page.row("methods", entry["title"])[:4]
        assert total == sum(params) == entry["deployed"]
        macs = page.row("methods", entry["title"])[4:]
        assert macs[0] == sum(macs[1:]) == entry["macs"]["total"]
        assert entry["paper"] in page.text
    assert "kwsearch compare resnet18 --json --html c.html" in page.text
    assert "56,396,871 parameters while it is trained" in page.text


def test_who_cannot_meet_the_target_is_there_with_the_reason(run: Run) -> None:
    code, _, _ = run("resnet18", "--params", "12M", "--html", "c.html")
    assert code == 0
    page = Page(Path("c.html").read_text())
    assert "at most 12,000,000 parameters" in page.text
    assert "params 12,000,000: below the floor of 13,259,268" in page.text
    assert not [row for row in page.tables["methods"] if row[0][0] == "DCD"]
    assert "the target, at most 12,000,000" in page.text
    # K is what the budget decides, not what was published.
    said = " ".join(page.text.split())
    assert "K = 1 to 3; 16 dynamic layers; sharing block; dropout 0" in said


def test_nothing_that_meets_the_target_is_a_page_too(run: Run) -> None:
    code, _, err = run("resnet20", "--params", "1000", "--methods", "odconv", "--html", "c.html")
    assert code == 3
    assert err == "wrote c.html\nError: no method meets the target\n"
    page = Page(Path("c.html").read_text())
    assert "No method meets the target." in page.text
    assert "below the floor" in page.text
    assert "figure" not in page.opened
    assert page.row("methods", "static network")[0] == 272_474


def test_memory_is_a_column_if_it_is_asked_for(run: Run) -> None:
    args = ("resnet20", "--methods", "odconv", "--batch", "4", "--json", "--html", "c.html")
    _, out, _ = run(*args)
    data = json.loads(out)
    page = Page(Path("c.html").read_text())
    assert page.row("methods", "static network")[-1] == data["static"]["train_memory"]
    assert page.row("methods", "ODConv")[-1] == data["methods"][0]["train_memory"]
    assert page.text.count("MB") >= 2


def test_memory_that_nobody_knows_is_unknown() -> None:
    network = trace_model("resnet20")
    entries = compare.compare(network, Target(), ["odconv"])
    text = pages.page(entries, network, "resnet20", "", None, "", {}, static_memory=1000)
    rows = Page(text).tables["methods"]
    assert [row[-1] for row in rows] == [("1.00kB", "1000"), ("unknown", "")]


def test_milliseconds_are_a_column_and_unknown_where_nobody_knows() -> None:
    network = trace_model("resnet20")
    known, unknown = compare.compare(network, Target(), ["odconv", "dyconv"])
    entries = [replace(known, ms=1.25), replace(unknown, reason="no latency: not in the table")]
    text = pages.page(entries, network, "resnet20", "", None, "", {}, static_ms=0.75)
    rows = Page(text).tables["methods"]
    assert [row[-1] for row in rows] == [("0.75", "0.75"), ("1.25", "1.25"), ("unknown", "")]
    assert "no latency: not in the table" in text


def test_bars_are_as_long_as_the_counts() -> None:
    network = trace_model("resnet18")
    entries = compare.compare(network, Target(), ["odconv", "kernel_warehouse"], "resnet18")
    bars, _ = pages.figures(entries, network, 13_000_000)
    figure = fromstring(bars.svg(alone=True))
    at = scale(figure, "x")
    boxes = [  # without those of the legend
        (float(box.get("x") or 0), float(box.get("width") or 0), box.get("class"))
        for box in figure.iter(f"{SVG}rect")
        if (box.get("class") or "").startswith("part ") and box.get("y") != "2"
    ]
    assert boxes[0] == (
        pytest.approx(at(0), abs=0.06),
        pytest.approx(at(11_689_512) - at(0), abs=0.11),
        "part p5",
    )
    # ODConv 1x, published: kernels, attention, the rest; side by side.
    one = boxes[1:4]
    assert [kind for _, _, kind in one] == ["part p0", "part p1", "part p5"]
    assert one[1][0] == pytest.approx(one[0][0] + one[0][1], abs=0.11)
    assert one[2][0] + one[2][1] == pytest.approx(at(11_943_944), abs=0.2)
    lines = [p.get("d") or "" for p in figure.iter(f"{SVG}path") if p.get("class") == "line second"]
    (line,) = (line for line in lines if "H" not in line)  # the other is in the legend
    (x,) = set(re.findall(r"[ML]([\d.]+),", line))
    assert float(x) == pytest.approx(at(13_000_000), abs=0.11)


def test_names_are_text_wherever_they_stand() -> None:
    name = "<script>alert('1')</script>&\"]]>"
    network = trace_model("resnet20")
    (entry,) = compare.compare(network, Target(), ["odconv"])
    method = replace(entry.method, title=name, paper=name)
    entries = [replace(entry, method=method, reason=name), replace(entry, plan=None, reason=name)]
    text = pages.page(entries, network, name, name, 1000, name, {name: name})
    assert "<script>alert" not in text
    page = Page(text)
    assert page.opened.count("script") == 1  # its own
    assert page.text.count(name) >= 8


@pytest.mark.parametrize(
    ("html", "message"),
    [
        ("c.svg", "--html c.svg: its name ends in .html"),
        ("nowhere/c.html", "--html nowhere/c.html: there is no folder nowhere"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, html: str, message: str
) -> None:
    monkeypatch.setattr("kwsearch.networks.trace_model", lambda *args: pytest.fail("worked"))
    code, out, err = run("resnet18", "--html", html)
    assert (code, out) == (2, "")
    assert message in err
