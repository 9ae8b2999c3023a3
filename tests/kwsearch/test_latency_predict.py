"""Times of calls and steps from a table, by hand arithmetic."""

from __future__ import annotations

import math
import random

import pytest

from kwsearch.latency.calls import Call
from kwsearch.latency.fitted import Fitted
from kwsearch.latency.predict import Predictor
from kwsearch.latency.table import Entry, Table, TableError, Whole


def entry(kind: str, family: str, cells: int, work: tuple[int, ...], ns: int) -> Entry:
    return Entry(kind, family, cells, work, ns, ns, ns, 7, 1000)


def whole(
    measured: float, *calls: int, batch: int = 1, training: bool = False, name: str = ""
) -> Whole:
    """calls: nanoseconds of products, other functions, attention, mixing."""
    sums = (*calls, 0, 0, 0)[:4]
    ns = round(measured)
    return Whole(f"{name} {measured} {calls}", batch, training, sums, ns, ns, ns, 7, 1000)


def table(*entries: Entry, wholes: tuple[Whole, ...] = ()) -> Table:
    found = Table({"device": "cpu", "dtype": "float32"})
    found.add(entries)
    found.add_wholes(wholes)
    return found


# Fits ---------------------------------------------------------------------------------------


def test_a_sum_of_parts_in_proportion_to_the_work_is_found() -> None:
    work = [(a, b) for a in (10, 300, 9000, 10**5) for b in (7, 200, 5000, 10**6)]
    fitted = Fitted(work, [100 + 2 * a + 3 * b for a, b in work])
    for a, b in [(50, 50), (4000, 900), (10**4, 10**4)]:
        ns, error = fitted.ns((a, b))
        assert ns == pytest.approx(100 + 2 * a + 3 * b, rel=0.01)
        assert error < 0.01


def test_near_calls_it_follows_what_was_measured_and_far_away_the_line() -> None:
    def took(work: int) -> float:  # twice the line's up to 10,000
        return work * (2 if work < 10**4 else 1)

    work = [round(10 ** (1 + i / 8)) for i in range(57)]
    fitted = Fitted([(one,) for one in work], [round(took(one)) for one in work])
    for one in (30, 900, 10**6, 5 * 10**7):
        assert fitted.ns((one,))[0] == pytest.approx(took(one), rel=0.05)
    near, far = fitted.ns((900,))[1], fitted.ns((10**12,))[1]
    assert near < 0.1 < far


def test_errors_are_about_as_large_as_it_says() -> None:
    """Noise of 10 % either way, which the work does not explain."""
    work = [round(10 ** (2 + i / 10)) for i in range(60)]
    signs = random.Random(0)
    noise = [signs.choice((-0.1, 0.1)) for _ in work]
    fitted = Fitted(
        [(one,) for one in work],
        [round(one * math.exp(e)) for one, e in zip(work, noise, strict=True)],
    )
    assert 0.08 < fitted.ns((12345,))[1] < 0.2


def test_of_few_calls_the_line_is_all_and_the_error_large() -> None:
    ns, error = Fitted([(100,), (200,)], [1000, 2000]).ns((400,))
    assert ns == pytest.approx(4000, rel=0.01)
    assert error > 0.5


def test_nothing_takes_less_than_nothing() -> None:
    fitted = Fitted([(0,), (10**6,), (2 * 10**6,), (5 * 10**6,), (10**7,)], [50, 40, 60, 55, 45])
    assert fitted.ns((10**12,))[0] > 0


# Calls --------------------------------------------------------------------------------------

RELU = entry("relu inference", "relu 8 inference", 0, (0, 32, 0, 32), 500)
CONV = entry("conv2d inference", "conv2d 8 inference", 0, (10**6, 32, 64, 32), 9000)


def test_calls_that_were_measured_are_added_up_and_scaled() -> None:
    wholes = [whole(1.2 * (a + b), a, b) for a, b in ((10_000, 500), (20_000, 900), (700, 7000))]
    made = table(RELU, CONV, wholes=tuple(wholes))
    calls = {
        Call(RELU.kind, RELU.family, 0, RELU.work): 4,
        Call(CONV.kind, CONV.family, 0, CONV.work): 2,
    }
    found = Predictor(made).step(calls, 1, False)
    assert found.ms == pytest.approx(1e-6 * 1.2 * (4 * 500 + 2 * 9000))
    assert found.measured == 1
    # Quartiles that are alike have no error, nor steps that are alike to their calls.
    assert found.high / found.ms == found.ms / found.low == pytest.approx(1)


def test_whole_steps_tell_what_kind_of_call_takes_longer_in_them() -> None:
    """Products as long as by themselves, other functions twice."""
    sizes = [(10_000, 500), (20_000, 9000), (700, 7000), (5000, 5000), (100, 9000), (8000, 100)]
    wholes = [whole(a + 2 * b, a, b, name=str(i)) for i in range(9) for a, b in sizes]
    made = table(RELU, CONV, wholes=tuple(wholes))
    step = Predictor(made).step
    assert step({Call(CONV.kind, CONV.family, 0, CONV.work): 1}, 1, False).ms == pytest.approx(
        9000e-6, rel=0.03
    )
    assert step({Call(RELU.kind, RELU.family, 0, RELU.work): 1}, 1, False).ms == pytest.approx(
        2 * 500e-6, rel=0.03
    )


def test_the_interval_is_as_wide_as_whole_steps_vary() -> None:
    """Half of them take 1.1 times their calls, half 1 / 1.1: the error of any is 1.1 or so."""
    ratios = [1.1, 1 / 1.1] * 10
    wholes = tuple(whole(10_000 * r, 10_000, name=str(i)) for i, r in enumerate(ratios))
    found = Predictor(table(CONV, wholes=wholes)).step(
        {Call(CONV.kind, CONV.family, 0, CONV.work): 1}, 1, False
    )
    # 1.73 standard errors of Student's t of 19 degrees of freedom; leaving one out adds a little.
    assert found.high / found.ms == pytest.approx(1.1**1.73, rel=0.02)


def test_networks_are_left_out_with_all_of_their_plans() -> None:
    """Two take 1.1 times their calls, two 1 / 1.1. By the other three, least squares say
    sum(1 / r) / sum(1 / r^2) of those: 0.958 and 1.019, which is wrong by 0.139 and 0.114.
    """
    ratios = enumerate([1.1, 1.1, 1 / 1.1, 1 / 1.1])
    wholes = [
        whole(10_000 * r, 10_000, name=f"{i} b = {b} at 3x8x8") for i, r in ratios for b in range(9)
    ]
    found = Predictor(table(CONV, wholes=tuple(wholes))).step(
        {Call(CONV.kind, CONV.family, 0, CONV.work): 1}, 1, False
    )
    error = math.sqrt((0.139**2 + 0.114**2) / 2)
    # 2.353 standard errors of Student's t of 3 degrees of freedom.
    assert found.high / found.ms == pytest.approx(math.exp(2.353 * error), rel=0.01)


def test_few_whole_steps_say_little() -> None:
    made = table(RELU, wholes=(whole(11_000, 0, 10_000),))
    found = Predictor(made).step({Call(RELU.kind, RELU.family, 0, RELU.work): 1}, 1, False)
    assert found.ms == pytest.approx(1.1 * 500e-6)
    assert found.high / found.ms == pytest.approx(math.exp(0.2))


def test_factors_are_those_of_the_batch_else_of_any() -> None:
    wholes = (whole(20, 0, 10), whole(30, 0, 10, batch=16), whole(50, 0, 10, training=True))
    predictor = Predictor(table(RELU, wholes=wholes))
    calls = {Call(RELU.kind, RELU.family, 0, RELU.work): 1}
    assert predictor.step(calls, 1, False).ms == pytest.approx(2 * 500e-6)
    assert predictor.step(calls, 16, False).ms == pytest.approx(3 * 500e-6)
    assert 2 * 500e-6 < predictor.step(calls, 4, False).ms < 3 * 500e-6
    assert predictor.step(calls, 4, True).ms == pytest.approx(5 * 500e-6)


def test_a_table_without_training_does_not_speak_of_it() -> None:
    predictor = Predictor(table(RELU, wholes=(whole(20, 10),)))
    with pytest.raises(TableError, match=r"has no training: `kwsearch profile --train -o`"):
        predictor.step({Call(RELU.kind, RELU.family, 0, RELU.work): 1}, 1, True)


@pytest.mark.parametrize(
    ("cells", "ns"),
    [
        (10, 1500),  # between 5 and 20: 1000 + 5 * 100
        (30, 3500),  # between 20 and 40: 2500 + 10 * 100
        (80, 8500),  # beyond 40: 4500 + 40 * 100
        (1, 600),  # below 5: 1000 - 4 * 100
    ],
)
def test_the_number_of_cells_is_interpolated_within_a_family(cells: int, ns: int) -> None:
    known = {5: 1000, 20: 2500, 40: 4500}
    made = table(*(entry("mixing gemm inference", "a", n, (1, n), t) for n, t in known.items()))
    got, error, source = Predictor(made).call(Call("mixing gemm inference", "a", cells, (1, cells)))
    assert (round(got), source) == (ns, "lines")
    inside = 5 <= cells <= 40
    assert (error <= 0.03) == inside


def test_one_number_of_cells_is_not_enough_to_draw_a_line() -> None:
    made = table(entry("mixing gemm inference", "a", 5, (1, 5), 1000))
    found = Predictor(made).call(Call("mixing gemm inference", "a", 10, (1, 10)))
    assert found[2] == "fitted"


def test_another_elementwise_function_is_guessed_and_says_so() -> None:
    predictor = Predictor(table(RELU, wholes=(whole(10, 10),)))
    ns, error, source = predictor.call(Call("silu inference", "silu 8 inference", 0, RELU.work))
    assert (round(ns), source) == (500, "guessed")
    assert error > 0.5
    with pytest.raises(TableError, match="the latency table has no conv2d inference: `kwsearch"):
        predictor.call(Call("conv2d inference", "conv2d 9", 0, CONV.work))
    with pytest.raises(TableError, match="the latency table has no silu training"):
        predictor.call(Call("silu training", "silu 8 training", 0, RELU.work))
