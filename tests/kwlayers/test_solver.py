"""The solver against a full search, and what must hold for any warehouses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kwlayers.solver import Solution, Variable, floor_params, solve

few = settings(max_examples=200, deadline=None, derandomize=True)


def linear(mixtures: int, base: int, step: int, relative: float = 1.0, mixing: int = 0) -> Variable:
    return Variable(mixtures, lambda n: base + step * n, mixing, relative)


def quadratic(mixtures: int, base: int, step: int, curve: int) -> Variable:
    return Variable(mixtures, lambda n: base + step * n + curve * n * n)


def total(variables: Sequence[Variable], cells: Sequence[int]) -> int:
    return sum(variable.params(n) for variable, n in zip(variables, cells, strict=True))


def is_maximal(variables: Sequence[Variable], cells: Sequence[int], target: int) -> bool:
    left = target - total(variables, cells)
    return all(v.params(n + 1) - v.params(n) > left for v, n in zip(variables, cells, strict=True))


def full_search(variables: Sequence[Variable], target: int) -> list[tuple[int, ...]]:
    """Every maximal plan."""
    floor, reach = floor_params(variables), []
    for variable in variables:
        n = 1
        while floor - variable.params(1) + variable.params(n + 1) <= target:
            n += 1
        reach.append(range(1, n + 1))
    return [
        cells
        for cells in itertools.product(*reach)
        if total(variables, cells) <= target and is_maximal(variables, cells, target)
    ]


def common_ratio(variables: Sequence[Variable], target: int) -> float:
    """The ratio at which divisible cells, at least one per warehouse, meet the target."""

    def at(ratio: float) -> float:
        whole = 0.0
        for v in variables:
            share = max(ratio * v.relative * v.mixtures, 1.0)
            n = int(share)
            whole += v.params(n) + (share - n) * (v.params(n + 1) - v.params(n))
        return whole

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    return low


def spread(variables: Sequence[Variable], cells: Sequence[int], ratio: float) -> float:
    """Root mean square distance from the common ratio, over their relative ones."""
    squares = 0.0
    for v, n in zip(variables, cells, strict=True):
        even = max(ratio * v.relative * v.mixtures, 1.0)
        squares += ((n - even) / (v.mixtures * v.relative)) ** 2
    return (squares / len(variables)) ** 0.5


def evenness(variables: Sequence[Variable], target: int) -> tuple[float, float]:
    """The spread of the solver's first plan, and of the most even maximal plan."""
    ratio = common_ratio(variables, target)
    plans = full_search(variables, target)
    best = solve(variables, target)[0]
    assert best.sizes in plans
    found = spread(variables, best.sizes, ratio)
    assert found == pytest.approx(best.spread, abs=1e-6)
    return found, min(spread(variables, cells, ratio) for cells in plans)


tiny = st.builds(
    linear,
    mixtures=st.integers(1, 12),
    base=st.integers(0, 50),
    step=st.integers(1, 40),
    relative=st.sampled_from([0.25, 0.5, 1.0, 1.0, 2.0]),
)
curved = st.builds(
    quadratic,
    mixtures=st.integers(1, 12),
    base=st.integers(0, 50),
    step=st.integers(1, 40),
    curve=st.integers(0, 5),
)
tiny_problems = st.tuples(st.lists(tiny | curved, min_size=2, max_size=3), st.integers(0, 300)).map(
    lambda drawn: (drawn[0], floor_params(drawn[0]) + drawn[1])
)


# By hand


def test_equal_warehouses_get_equal_cells() -> None:
    # 3 * (10 + 5n) <= 99 -> n = 4, 90 used, 9 left: one more cell of 5.
    solution = solve([linear(8, 10, 5)] * 3, 99)[0]
    assert sorted(solution.sizes) == [4, 4, 5]
    assert solution.params == 95


def test_a_target_that_a_common_ratio_meets_exactly_is_met_exactly() -> None:
    # n = M / 2 everywhere: 100 + 7 * 6 + 50 + 11 * 10 + 3 * 30.
    variables = [linear(12, 100, 7), linear(20, 50, 11), linear(60, 0, 3)]
    (best, *_) = solve(variables, 392)
    assert best.sizes == (6, 10, 30)
    assert best.params == 392
    assert best.ratio == pytest.approx(0.5)
    assert best.spread == pytest.approx(0, abs=1e-9)


def test_a_relative_ratio_scales_the_ratio_of_its_warehouse() -> None:
    # Ratios 2 and 1/2 of 10 mixtures each: 20 and 5 cells.
    variables = [linear(10, 0, 1, relative=2.0), linear(10, 0, 1, relative=0.5)]
    assert solve(variables, 25)[0].sizes == (20, 5)


def test_mixing_is_summed_over_cells() -> None:
    variables = [linear(10, 0, 1, mixing=7), linear(10, 0, 1, mixing=100)]
    assert solve(variables, 20)[0].mixing == 10 * 7 + 10 * 100


def test_a_warehouse_keeps_one_cell_where_its_share_is_less() -> None:
    # A ratio of 1/100 of 3 mixtures is no cell at all.
    variables = [linear(3, 0, 1), linear(1000, 0, 1)]
    assert solve(variables, 11)[0].sizes == (1, 10)


def test_the_floor_is_one_cell_per_warehouse_and_below_it_there_is_no_plan() -> None:
    variables = [linear(8, 10, 5), linear(4, 20, 7)]
    assert floor_params(variables) == 15 + 27
    assert solve(variables, 41) == ()
    assert solve(variables, 42)[0].sizes == (1, 1)
    assert solve([], 1000) == ()


def test_far_more_parameters_than_mixtures_ask_for_are_used() -> None:
    assert solve([linear(1, 0, 1)], 10**9)[0].sizes == (10**9,)


# Against the full search


@few
@given(tiny_problems)
@example(([linear(1, 0, 3), linear(2, 0, 5)], 8))
def test_every_plan_fits_the_target_and_is_maximal(problem: tuple[list[Variable], int]) -> None:
    variables, target = problem
    plans = set(full_search(variables, target))
    solutions = solve(variables, target)
    assert solutions
    for solution in solutions:
        assert solution.sizes in plans
        assert solution.params == total(variables, solution.sizes)


def random_problem(random: Random) -> tuple[list[Variable], int]:
    """Two or three warehouses with room for a few dozen cells."""
    variables = []
    for _ in range(random.choice([2, 3])):
        m, base, step = random.randint(1, 12), random.randint(0, 50), random.randint(1, 40)
        if random.random() < 0.3:
            variables.append(quadratic(m, base, step, random.randint(1, 5)))
        else:
            variables.append(linear(m, base, step, random.choice([0.25, 0.5, 1.0, 1.0, 2.0])))
    return variables, floor_params(variables) + random.randint(0, 300)


def test_the_first_plan_is_nearly_always_as_even_as_the_most_even_maximal_plan() -> None:
    # An exchange search is not a full search. Of 900 such problems it found the most even plan
    # in 94 %, one within 1.3 times that spread in 95 %; the worst was 10 times as uneven.
    random = Random(0)
    ratios = []
    for _ in range(300):
        found, best = evenness(*random_problem(random))
        assert found >= best - 1e-9
        ratios.append(found / best if best > 1e-9 else 1.0 if found < 1e-9 else float("inf"))
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 0.9 * len(ratios)
    assert sum(ratio <= 1.3 for ratio in ratios) >= 0.93 * len(ratios)


# For any warehouses


sizes = st.builds(
    quadratic,
    mixtures=st.integers(1, 2000),
    base=st.integers(0, 10**6),
    step=st.integers(1, 10**6),
    curve=st.integers(0, 1000),
)


@few
@given(st.lists(sizes, min_size=1, max_size=12), st.integers(0, 10**8))
def test_any_target_above_the_floor_has_maximal_plans_the_most_even_first(
    variables: list[Variable], above: int
) -> None:
    target = floor_params(variables) + above
    solutions = solve(variables, target)
    assert solutions
    for solution in solutions:
        assert min(solution.sizes) >= 1
        assert solution.params == total(variables, solution.sizes) <= target
        assert is_maximal(variables, solution.sizes, target)
    spreads = [solution.spread for solution in solutions]
    assert spreads == pytest.approx(sorted(spreads), abs=1e-9)
    assert len({solution.sizes for solution in solutions}) == len(solutions)


@few
@given(st.lists(sizes, min_size=1, max_size=8), st.integers(0, 10**8))
def test_the_same_problem_has_the_same_plans(variables: list[Variable], above: int) -> None:
    target = floor_params(variables) + above
    first, second = solve(variables, target), solve(list(variables), target)
    assert first == second
    assert isinstance(first[0], Solution)


def test_58_warehouses_are_sized_within_a_second() -> None:
    # Like one warehouse per layer of a deep network: steps from 64 to 600,000 parameters.
    variables = [
        linear(9 * 2 ** (i % 6), 1000 * i, 64 * (i % 13 + 1) ** 2 * (1 + i)) for i in range(58)
    ]
    targets = [floor_params(variables) * k for k in (1, 2, 5, 20)]
    for target in targets:
        began = time.perf_counter()
        solution = solve(variables, target)[0]
        assert time.perf_counter() - began < 1
        assert is_maximal(variables, solution.sizes, target)
