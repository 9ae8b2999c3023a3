"""The scatter plot of terminals: every mark in the cell that arithmetic says."""

from __future__ import annotations

import pytest

from kwsearch.scatter import LEAST, MOST, Axis, Point, scatter, show_count, show_share

X = Axis("parameters", show_count)
Y = Axis("accuracy", show_share, most=1.0)

# 47 columns less 6 of the axis are 41: from 0 to 100, x is in column 0.4 x. 15 lines less 4 around
# are 11: from 0 to 1, y is in row 10 y.
POINTS = [
    Point(0, 0.0),
    Point(25, 0.3, "front"),  # column 10, row 3
    Point(50, 0.5, "uniform"),  # column 20, row 5
    Point(75, 0.62, "static"),  # column 30, row 6.2
    *(Point(x, 0.1) for x in (74.5, 75, 75.9)),  # columns 29.8, 30 and 30.36, row 1
    Point(100, 1.0, "best"),
]


def test_marks_stand_where_arithmetic_says() -> None:
    drawn = scatter(POINTS, x=X, y=Y, width=47, height=15, lines=[90])
    gap = " "
    assert drawn == [
        "accuracy over parameters",
        "100% -" + gap * 36 + "|" + gap * 3 + "*",
        gap * 6 + gap * 36 + "|",
        gap * 6 + gap * 36 + "|",
        gap * 6 + gap * 36 + "|",
        gap * 6 + gap * 30 + "S" + gap * 5 + "|",
        " 50% -" + gap * 20 + "U" + gap * 15 + "|",
        gap * 6 + gap * 36 + "|",
        gap * 6 + gap * 10 + "o" + gap * 25 + "|",
        gap * 6 + gap * 36 + "|",
        gap * 6 + gap * 30 + "3" + gap * 5 + "|",
        "  0% -·" + gap * 35 + "|",
        gap * 6 + "+" + "-" * 19 + "+" + "-" * 19 + "+",
        gap * 6 + "0" + gap * 18 + "50" + gap * 17 + "100",
        "  · trial   2-9 so many trials   o on the front",
        "  U uniform plan   S static network   * best",
        "  | the most that is allowed",
    ]


@pytest.mark.parametrize(
    ("kinds", "mark"),
    [
        (["trial"], "·"),
        (["trial"] * 2, "2"),
        (["trial"] * 9, "9"),
        (["trial"] * 10, "#"),
        (["trial", "front"], "o"),
        (["front", "uniform"], "U"),
        (["static", "uniform", "front"], "S"),
        (["static", "best", "uniform"], "*"),
    ],
)
def test_a_cell_shows_its_most_important_point_or_how_many_there_are(
    kinds: list[str], mark: str
) -> None:
    points = [Point(10, 0.5, kind) for kind in kinds]
    plot = scatter(points, x=X, y=Y)[1:13]
    assert [sign for line in plot for sign in line[6:] if sign != " "] == [mark]


def test_a_crowd_is_explained() -> None:
    legend = scatter([Point(1, 0.5)] * 10, x=X, y=Y)[-1]
    assert legend == "  · trial   # ten or more"


def test_a_mark_hides_the_line_and_not_the_other_way_round() -> None:
    plot = scatter([Point(10, 0.5), Point(20, 0.7, "best")], x=X, y=Y, lines=[20])[1:13]
    assert sum(line.endswith("|") for line in plot) == 11
    assert sum(line.endswith("*") for line in plot) == 1


def test_one_point_stands_in_the_middle_of_a_tenth_of_its_value() -> None:
    # 0.5 -+ 0.025 in 12 rows and at most 4 steps: 46 to 54 % by 2 %, row 0.5 * 11 = 5.5, so 6.
    plot = scatter([Point(1000, 0.5)], x=X, y=Y)
    ticks = [line[:3] for line in plot[1:13] if line[4:5] == "-"]
    assert ticks == ["54%", "52%", "50%", "48%", "46%"]
    assert "·" in plot[12 - 6]
    # 1000 -+ 50 in 75 columns and at most 6 steps: 940 to 1060 by 20, column 37.
    assert plot[12 - 6][5:].index("·") == 37


def test_no_point_is_one_line() -> None:
    assert scatter([], x=X, y=Y, lines=[10]) == ["no accuracy to plot yet"]


@pytest.mark.parametrize(("value", "end"), [(0.0, "0%"), (1.0, "100%")])
def test_a_share_has_no_axis_below_0_or_above_1(value: float, end: str) -> None:
    plot = scatter([Point(10, value)], x=X, y=Y)
    ticks = [line.partition("-")[0].strip() for line in plot[1:13] if "%" in line]
    assert end in (ticks[0], ticks[-1])
    assert all(0 <= float(tick.strip("%")) <= 100 for tick in ticks)


@pytest.mark.parametrize("encoding", ["ascii", "no-such-encoding"])
def test_a_plain_terminal_gets_plain_signs(encoding: str) -> None:
    drawn = "\n".join(scatter(POINTS, x=X, y=Y, lines=[90], encoding=encoding))
    assert drawn.isascii()
    assert ". trial" in drawn


@pytest.mark.parametrize("width", range(LEAST, MOST + 1, 7))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    kinds = ("trial", "trial", "front", "uniform", "static", "best")
    points = [Point(135_900 + 50 * i, 0.6 + 0.01 * i, kind) for i, kind in enumerate(kinds)]
    drawn = scatter(points, x=X, y=Y, width=width, lines=[136_237, 140_000])
    assert max(map(len, drawn)) <= width
    # The title, 12 rows, two lines of the axis, and the legend of so many marks.
    assert len(drawn) in (16, 17)
    assert "| budgets" in drawn[-1]


@pytest.mark.parametrize("height", [1, 7, 30])
def test_it_is_about_as_high_as_asked(height: int) -> None:
    assert len(scatter(POINTS, x=X, y=Y, height=height)) in (max(height, 7), max(height, 7) + 1)


@pytest.mark.parametrize(
    ("value", "step", "shown"),
    [
        (0, 50, "0"),
        (50, 50, "50"),
        (0.5, 0.1, "0.5"),
        (543_900, 100, "543.9k"),
        (136_000, 50, "136.00k"),
        (1_000_000, 100_000, "1.0M"),
        (26_000_000, 2_000_000, "26M"),
        (4_089_184_256, 500_000_000, "4.1G"),
    ],
)
def test_counts_have_the_digits_in_which_ticks_differ(
    value: float, step: float, shown: str
) -> None:
    assert show_count(value, step) == shown


@pytest.mark.parametrize(
    ("value", "step", "shown"),
    [(0.6, 0.2, "60%"), (0.825, 0.005, "82.5%"), (1.0, 0.1, "100%"), (0.5, 0.01, "50%")],
)
def test_shares_are_percents(value: float, step: float, shown: str) -> None:
    assert show_share(value, step) == shown
