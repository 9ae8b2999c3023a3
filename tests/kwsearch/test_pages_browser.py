"""The page of a study as a browser shows it: what it draws, and what it does when used."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kwsearch import cli
from kwsearch.pages.study import page
from kwsearch.recipe import load_recipe
from kwsearch.snapshot import Snapshot
from tests.kwsearch import test_pages_study
from tests.kwsearch.test_pages_budget import RESNET18
from tests.kwsearch.test_pages_study import EVIL, evil_study, study_of

searched, swept = test_pages_study.searched, test_pages_study.swept

# Texts of axes that are cut, or of which two cover more than a tenth of one.
CROWDED = """
() => [...document.querySelectorAll("svg.figure")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll(".axes text")]
    .map((text) => [text.textContent, text.getBoundingClientRect()])
    .filter(([, box]) => box.width > 0);
  const cut = texts.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => [svg.id, text]);
  const over = (a, b) => Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left))
    * Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
  const area = (a) => a.width * a.height;
  const pairs = texts.flatMap(([text, a], i) => texts.slice(i + 1)
    .filter(([, b]) => over(a, b) > 0.1 * Math.min(area(a), area(b)))
    .map(([other]) => [svg.id, text, other]));
  return [...cut, ...pairs];
})
"""
# Texts whose colour is too close to what is behind them: WCAG's ratio, and the text.
FAINT = """
() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    const clear = colour.endsWith(", 0)") && element.parentElement;
    return clear ? behind(element.parentElement) : colour;
  };
  const texts = "p, li, dt, dd, td, th, caption, figcaption, a, .figure text";
  return [...document.querySelectorAll(texts)].filter((element) => element.textContent.trim())
    .map((element) => {
      const style = getComputedStyle(element);
      const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
      const [low, high] = [light(colour), light(behind(element))].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), element.textContent.slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);
}
"""
# The first mark of a kind that no other covers: its link, and where it is.
MARK = """
(kind) => {
  for (const link of document.querySelectorAll(`#over-params .mark.${kind} a`)) {
    const box = link.getBoundingClientRect();
    const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
    const found = document.elementFromPoint(x, y);
    if (found && found.closest("a") === link) return [link.getAttribute("href"), x, y];
  }
}
"""


# What stands under the middle of each bar: its part, what it says, and how wide it is.
BARS = """
(id) => [...document.querySelectorAll(`#${id} rect.part`)].map((bar) => {
  bar.scrollIntoView({ block: "center" });
  const box = bar.getBoundingClientRect();
  const found = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
  return [bar.parentNode.textContent, found.parentNode.textContent, box.width];
}).filter(([, , width]) => width > 2)
"""
# Pages of other commands.
RECIPES = Path(__file__).parents[2] / "recipes"
COMMANDS = {
    "budget": ["budget", "resnet18", "--ratio", "0.5", "--plot"],
    "compare": ["compare", "resnet18", "--params", "12M", "--html"],
    "diff": [
        "diff",
        str(RECIPES / "kw_resnet18_1x.yaml"),
        str(RECIPES / "kw_resnet18_0.5x.yaml"),
        "--html",
    ],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    reason = 'playwright is not installed: pip install "kwsearch[browser]"'
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium, or the like")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(
    searched: Snapshot, swept: Snapshot, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Files of pages, by name."""
    folder = tmp_path_factory.mktemp("pages")
    studies = {
        "searched": searched,
        "swept": swept,
        "evil": evil_study(searched),
        "empty": study_of(folder / "empty"),
    }
    found = {}
    for name, study in studies.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(page(study), encoding="utf-8")
    found["watched"] = folder / "watched.html"
    found["watched"].write_text(page(searched, refresh=1), encoding="utf-8")
    for name, args in COMMANDS.items():
        found[name] = folder / f"{name}.html"
        assert cli.run([*args, str(found[name])]) == 0
    return found


class View:
    """A tab, and what went wrong in it."""

    def __init__(self, browser: Any, pages: dict[str, Path]) -> None:
        self.pages = pages
        self.tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", self._dialog)
        self.tab.on("request", lambda request: self.requests.append(request.url))

    def _dialog(self, dialog: Any) -> None:
        self.wrong.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, name: str = "searched", width: int = 1280) -> Any:
        """The page, in a window so wide."""
        self.requests.clear()
        self.tab.set_viewport_size({"width": width, "height": 900})
        self.tab.emulate_media(color_scheme="light", media="screen")
        self.tab.goto(self.pages[name].as_uri())
        return self.tab

    def cells(self, title: str) -> list[str]:
        """A column of the trials that are shown."""
        found: list[str] = self.tab.evaluate(
            """(title) => {
              const heads = [...document.querySelectorAll("#trials thead th")];
              const place = heads.findIndex((head) => head.textContent.trim() === title);
              return [...document.querySelectorAll("#trials tbody tr")].filter((row) => !row.hidden)
                .map((row) => row.cells[place].textContent.trim());
            }""",
            title,
        )
        return found


@pytest.fixture(scope="module")
def one_view(browser: Any, pages: dict[str, Path]) -> View:
    return View(browser, pages)


@pytest.fixture
def view(one_view: View) -> Iterator[View]:
    """A tab in which nothing goes wrong and that asks for nothing but its file."""
    yield one_view
    assert one_view.wrong == []
    assert [url for url in one_view.requests if not url.startswith("file:")] == []
    assert len(set(one_view.requests)) == 1


def value(text: str) -> float:
    return float(text.replace(",", "").removesuffix(" %"))


# What it looks like -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["searched", "swept", *COMMANDS])
def test_every_plot_is_drawn_and_its_texts_are_apart(view: View, name: str, width: int) -> None:
    tab = view.open(name, width)
    boxes = tab.eval_on_selector_all(
        "svg.figure", "all => all.map(s => [s.id, s.clientWidth, s.clientHeight])"
    )
    assert len(boxes) > 8 if name not in COMMANDS else len(boxes) == 2
    assert [box for box in boxes if box[1] < 250 or box[2] < 60] == []
    assert tab.evaluate(CROWDED) == []


@pytest.mark.parametrize("name", ["searched", "swept", "evil", "empty", *COMMANDS])
def test_a_narrow_page_does_not_scroll_sideways(view: View, name: str) -> None:
    tab = view.open(name, 390)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("name", ["searched", *COMMANDS])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(view: View, scheme: str, name: str) -> None:
    tab = view.open(name)
    tab.emulate_media(color_scheme=scheme)
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert tab.evaluate(FAINT) == []


def test_paper_is_white_and_has_no_tools(view: View) -> None:
    tab = view.open()
    tab.emulate_media(color_scheme="dark", media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate(FAINT) == []
    for selector in (".tools", "nav", "#trials td button"):
        assert not tab.locator(selector).first.is_visible()
    assert tab.locator("#over-params").is_visible()
    assert len(tab.pdf()) > 10_000


def test_names_are_text_and_run_nothing(view: View) -> None:
    tab = view.open("evil")
    assert EVIL in tab.locator("h1").inner_text()
    assert EVIL in tab.locator("#s-choices").inner_text()
    assert tab.locator("b").count() == 0


# What it does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trial", "front", "stopped", "static"])
def test_a_mark_says_what_its_row_says(view: View, kind: str) -> None:
    tab = view.open()
    tab.locator("#over-params").evaluate("plot => plot.scrollIntoView({ block: 'center' })")
    href, x, y = tab.evaluate(MARK, kind)
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    tab.mouse.move(x, y)
    assert tip.is_visible()
    row = {head: view.cells(head) for head in ("trial", "accuracy", "parameters", "MACs", "kind")}
    place = row["trial"].index(href.removeprefix("#t"))
    lines = [f"{head} {cells[place]}" for head, cells in row.items() if cells[place]]
    more = tab.locator(href).get_attribute("data-tip")
    assert (more is not None) == (kind == "stopped")
    assert sorted(tip.inner_text().split("\n")) == sorted([*lines, *([more] if more else [])])
    tab.mouse.move(1, 1)
    assert not tip.is_visible()


def test_a_mark_of_a_curve_says_what_its_row_says(view: View) -> None:
    tab = view.open("budget")
    mark = tab.locator("svg.figure a:has(.mark.published)").first
    mark.hover()
    params, macs = (f"{RESNET18[0.25][key]:,}" for key in ("params", "macs_224"))
    told = f"ResNet18 1/4x: {params} parameters, {macs} MACs"
    assert tab.locator("#tip").inner_text() == told
    row = tab.locator(mark.get_attribute("href")).locator("td").all_inner_texts()
    assert {params, macs} <= set(row)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("compare", "11,689,512 unchanged"),
        ("diff", f"{RESNET18[0.5]['attention_params']:,} attention"),
    ],
)
def test_a_bar_says_its_part_exactly(view: View, name: str, said: str) -> None:
    tab = view.open(name)
    for plot in ("params", "macs"):
        found = tab.evaluate(BARS, plot)
        assert len(found) > 4
        assert all(told and told == under for told, under, _ in found)
    texts = [told for told, _, _ in tab.evaluate(BARS, "params")]
    assert any(text.startswith(said) for text in texts)


def test_a_click_on_a_mark_goes_to_its_row(view: View) -> None:
    tab = view.open()
    tab.locator("#over-params").evaluate("plot => plot.scrollIntoView({ block: 'center' })")
    href, x, y = tab.evaluate(MARK, "trial")
    tab.mouse.click(x, y)
    row = tab.locator(f"{href}:target")
    top = row.bounding_box()["y"]
    assert 0 <= top <= 900


def test_a_link_to_a_row_that_a_filter_hides_ends_the_filter(view: View) -> None:
    tab = view.open()
    every = len(view.cells("trial"))
    tab.locator("#s-trials .tools input").fill("complete")
    tab.locator("#s-trials .tools select").select_option("complete")
    link = tab.locator("#s-failures a").first
    row = tab.locator(f"#trials {link.get_attribute('href')}")
    assert not row.is_visible()
    link.click()
    assert row.is_visible()
    assert len(view.cells("trial")) == every
    assert tab.locator("#s-trials .tools output").inner_text() == f"{every} of {every}"


def test_a_page_that_is_watched_looks_as_it_did_when_it_is_loaded_again(
    view: View, searched: Snapshot
) -> None:
    tab = view.open("watched")
    before = view.pages["watched"].read_text(encoding="utf-8")
    field = tab.locator("#s-trials .tools input")
    field.fill("layer")
    view.pages["watched"].write_text(before.replace("<title>", "<title>newer "), encoding="utf-8")
    tab.wait_for_timeout(1500)
    assert not tab.title().startswith("newer")  # somebody is typing
    button = tab.locator("#trials th button", has_text=re.compile("^accuracy$"))
    button.click()
    button.click()
    tab.locator("summary").click()
    tab.locator("h1").click()
    shown = view.cells("trial")
    for _ in range(100):
        if tab.title().startswith("newer"):
            break
        tab.wait_for_timeout(50)
    assert tab.title().startswith("newer")
    assert view.cells("trial") == shown
    assert field.input_value() == "layer"
    assert tab.locator("#trials th[aria-sort=descending]").inner_text().startswith("accuracy")
    assert tab.locator("details").get_attribute("open") is not None
    tab.locator("#again").uncheck()
    view.pages["watched"].write_text(before.replace("<title>", "<title>later "), encoding="utf-8")
    tab.wait_for_timeout(1500)
    assert tab.title().startswith("newer")


@pytest.mark.parametrize("title", ["accuracy", "parameters", "MACs", "trial"])
def test_a_heading_sorts_by_number_both_ways(view: View, title: str) -> None:
    tab = view.open()
    if title == "parameters":  # as text, a million is before a hundred thousand
        tab.evaluate(
            """() => {
              const cells = [...document.querySelectorAll("#trials tbody td")]
                .filter((cell) => cell.textContent.trim().match(/^13\\d,\\d{3}$/));
              ["98,765", "1,234,567"].forEach((text, i) => { cells[i].textContent = text; });
            }"""
        )
    before = view.cells(title)
    known = sorted((value(text) for text in before if text), reverse=False)
    button = tab.locator("#trials th button", has_text=re.compile(f"^{title}$"))
    for expected, said in ((known, "ascending"), (known[::-1], "descending")):
        button.click()
        found = view.cells(title)
        assert [value(text) for text in found[: len(known)]] == expected
        assert found[len(known) :] == [""] * (len(before) - len(known))  # unknown is last
        assert button.locator("..").get_attribute("aria-sort") == said
        assert tab.locator("#trials th[aria-sort]").count() == 1
    assert [text for text in found if text] != [text for text in before if text]


def test_the_keyboard_comes_to_the_table_without_a_stop_at_every_mark(view: View) -> None:
    tab = view.open()
    stops = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        stops.append(tab.evaluate("() => document.activeElement.closest('svg, thead')?.tagName"))
        if stops[-1] == "THEAD":
            break
    assert stops[-1] == "THEAD"
    assert "svg" not in stops


def test_the_keyboard_sorts_and_scrolls(view: View) -> None:
    tab = view.open(width=390)
    tab.locator("#trials th button", has_text="accuracy").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#trials th[aria-sort=ascending]").inner_text().startswith("accuracy")
    frame = tab.locator("#s-trials .wide")
    assert frame.get_attribute("tabindex") == "0"  # which some browsers need
    frame.focus()
    frame.evaluate("frame => { frame.scrollLeft = 0; }")
    tab.keyboard.press("ArrowRight")
    for _ in range(50):
        tab.wait_for_timeout(50)
        if frame.evaluate("frame => frame.scrollLeft") > 0:
            return
    pytest.fail("it does not scroll")


def test_the_filter_keeps_what_has_all_words_and_the_state(view: View) -> None:
    tab = view.open()
    every = len(view.cells("trial"))
    texts = tab.eval_on_selector_all(
        "#trials tbody tr",
        "rows => rows.map(row => [row.dataset.state, row.textContent.toLowerCase()])",
    )

    def expected(words: str, state: str = "") -> int:
        return sum(
            all(word in text for word in words.split()) and state in ("", own)
            for own, text in texts
        )

    tab.locator(".tools input").fill("Layer complete")
    assert 0 < len(view.cells("trial")) == expected("layer complete") < every
    assert set(view.cells("sharing")) == {"layer"}
    assert tab.locator(".tools output").inner_text() == f"{expected('layer complete')} of {every}"
    tab.locator(".tools input").fill("")
    tab.locator(".tools select").select_option("stopped")
    assert 0 < len(view.cells("trial")) == expected("", "stopped") < every
    assert all(text.startswith("stopped") for text in view.cells("result"))


def test_copy_puts_a_recipe_on_the_clipboard_that_loads(
    view: View, tmp_path: Path, searched: Snapshot
) -> None:
    tab = view.open()
    best = tab.locator("#plans tbody a").first.inner_text()
    button = tab.locator(f"#t{best} button")
    assert button.inner_text() == "copy"
    button.click()
    tab.locator("#tip", has_text="copied").wait_for()
    path = tmp_path / "pasted.yaml"
    path.write_text(pasted(tab))
    recipe = load_recipe(path)
    assert recipe.plan is not None
    groups = [group.model_dump(mode="json") for group in recipe.plan.groups]
    known = searched.trials[int(best)].user_attrs["groups"]
    assert [(g["name"], g["num_cells"]) for g in groups] == [
        (g["name"], g["num_cells"]) for g in known
    ]
    # The static network has no plan; the command that made the study can be copied, too.
    assert tab.locator("#t1 button").count() == 0
    tab.locator("#tip").wait_for(state="hidden")  # what it said of the first copy
    tab.locator("#s-origin button").click()
    tab.locator("#tip", has_text="copied").wait_for()
    assert pasted(tab) == searched.recipe.provenance["command"]


def test_a_recipe_without_room_is_a_command(view: View, pages: dict[str, Path]) -> None:
    text = pages["searched"].read_text(encoding="utf-8")
    kept = re.search(r'data-kept="([\d ]*)"', text)
    assert kept is not None
    first, second, *_ = kept[1].split()
    view.pages = {**pages, "fewer": pages["searched"].with_name("fewer.html")}
    view.pages["fewer"].write_text(text.replace(kept[0], f'data-kept="{first}"'), encoding="utf-8")
    tab = view.open("fewer")
    assert tab.locator(f"#t{first} button").inner_text() == "copy"
    assert tab.locator(f"#t{second} button").inner_text() == "copy command"
    tab.locator(f"#t{second} button").click()
    tab.locator("#tip", has_text="copied").wait_for()
    command = str(tab.locator("#trials").get_attribute("data-command"))
    assert pasted(tab) == command.replace("{}", second)


def pasted(tab: Any) -> str:
    """What is on the clipboard, by the keyboard."""
    tab.evaluate(
        """() => {
          const area = document.createElement("textarea");
          area.id = "pasted";
          document.body.append(area);
          area.focus();
        }"""
    )
    tab.keyboard.press("Control+V")
    found: str = tab.locator("#pasted").input_value()
    tab.locator("#pasted").evaluate("area => area.remove()")
    return found


def test_without_scripts_everything_is_there_to_read(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(pages["searched"].as_uri())
    assert tab.locator("#trials tbody tr").count() == 24
    assert tab.locator("#over-params").is_visible()
    context.close()
