"""Cells, mixtures and assignments: hand-worked sizes, and the two rules stated again here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwlayers import geometry

few = settings(max_examples=300, deadline=None, derandomize=True)
mixture_lists = st.lists(st.integers(1, 40), min_size=1, max_size=6)


# Cells


def test_a_cell_spans_the_common_channels_of_all_kernels() -> None:
    kernels = [(64, 64, 3, 3), (256, 64, 1, 1), (128, 256, 1, 1)]
    assert geometry.cell_shape(kernels, (1, 1), True) == ((64, 64, 1, 1), ())


def test_the_cell_ratio_is_given_as_output_then_input() -> None:
    cell, notes = geometry.cell_shape([(480, 80, 1, 1)], (0.25, 0.5), True)
    assert cell == (120, 40, 1, 1)
    assert notes == ()


def test_the_input_channels_of_a_depthwise_kernel_make_cells_of_one_input_channel() -> None:
    assert geometry.cell_shape([(96, 1, 3, 3), (144, 1, 3, 3)], (0.5, 0.5), True)[0] == (
        24,
        1,
        1,
        1,
    )


def test_a_linear_classifier_is_cut_like_a_1d_convolution() -> None:
    assert geometry.cell_shape([(1000, 1280, 1)], (1, 0.025), True)[0] == (1000, 32, 1)


def test_a_cell_keeps_at_least_one_channel_of_each_side() -> None:
    assert geometry.cell_shape([(3, 2, 5)], (0.01, 0.01), True) == ((1, 1, 1), ())


def test_a_size_that_does_not_divide_is_rounded_down_and_said_so() -> None:
    cell, notes = geometry.cell_shape([(64, 32, 3, 3)], (0.3, 0.4), True)
    # int(64 * 0.3) = 19 -> 16; int(32 * 0.4) = 12 -> 8.
    assert cell == (16, 8, 1, 1)
    assert notes == (
        "cell ratio 0.3 of 64 output channels is 19, which does not divide 64: rounded down to 16",
        "cell ratio 0.4 of 32 input channels is 12, which does not divide 32: rounded down to 8",
    )


def test_without_spatial_partition_a_cell_spans_the_kernel() -> None:
    kernels = [(8, 4, 3, 5, 7), (16, 8, 3, 5, 7)]
    assert geometry.cell_shape(kernels, (1, 0.5), False)[0] == (8, 2, 3, 5, 7)


def test_without_spatial_partition_different_kernel_sizes_are_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"one size, got 1x1, 3x3$"):
        geometry.cell_shape([(8, 8, 3, 3), (8, 8, 1, 1)], (1, 1), False)


@few
@given(st.integers(1, 400), st.integers(1, 400))
def test_the_largest_divisor_is_the_one_a_full_search_finds(number: int, limit: int) -> None:
    divisors = [d for d in range(1, number + 1) if number % d == 0 and d <= limit]
    assert geometry.largest_divisor(number, limit) == max(divisors)


@few
@given(
    st.lists(st.tuples(st.integers(1, 96), st.integers(1, 96)), min_size=1, max_size=4),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
)
def test_every_cell_tiles_every_kernel_it_was_cut_for(
    channels: list[tuple[int, int]], ratio: tuple[float, float]
) -> None:
    kernels = [(out, in_, 3) for out, in_ in channels]
    cell, _ = geometry.cell_shape(kernels, ratio, True)
    for out, in_, _ in kernels:
        assert out % cell[0] == in_ % cell[1] == 0
        assert geometry.num_mixtures((out, in_, 3), cell) == out * in_ * 3 // (cell[0] * cell[1])


# Mixtures, cells of a warehouse, widths


def test_mixtures_count_cells_along_every_axis() -> None:
    assert geometry.num_mixtures((128, 64, 3, 3), (64, 64, 1, 1)) == 2 * 1 * 9
    assert geometry.num_mixtures((128, 64, 3, 3), (32, 16, 3, 3)) == 4 * 4
    assert geometry.num_mixtures((96, 1, 7), (96, 1, 1)) == 7
    assert geometry.num_mixtures((4, 2, 3, 3, 3), (2, 1, 1, 1, 1)) == 2 * 2 * 27


@pytest.mark.parametrize(
    "cell",
    [
        (5, 4, 1, 1),
        (8, 3, 1, 1),
        (8, 4, 2, 1),
        (8, 4, 1),
        (16, 4, 1, 1),
        (0, 4, 1, 1),
        (-8, 4, 1, 1),
    ],
)
def test_a_cell_that_does_not_tile_a_kernel_is_an_error_with_both_shapes(
    cell: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match="do not tile") as error:
        geometry.num_mixtures((8, 4, 3, 3), cell)
    assert str(error.value) == f"cells of shape {cell} do not tile a kernel of shape (8, 4, 3, 3)"


def test_the_number_of_cells_is_truncated_in_double_precision() -> None:
    # As the published code: 100 * 0.29 is 28.999999999999996 in doubles.
    assert geometry.cells_for_ratio(100, 0.29) == 28
    assert geometry.cells_for_ratio(47, 0.5) == 23
    assert geometry.cells_for_ratio(47, 4) == 188
    assert geometry.cells_for_ratio(3, 0.05) == 1


def test_the_hidden_width_has_a_floor_of_16() -> None:
    assert geometry.hidden_width(64, 1 / 16) == 16
    assert geometry.hidden_width(272, 1 / 16) == 17
    assert geometry.hidden_width(1280, 1 / 32) == 40
    assert geometry.hidden_width(543, 1 / 32) == 16


def test_the_nonlocal_basis_has_a_floor_of_16_columns_even_for_fewer_cells() -> None:
    # m = 9 of M = 348, b = 1/2: int(4.5) own cells of 174, 170 others, 170/16 = 10.6 -> 16.
    assert geometry.basis(9, 174, 348, 0.5, 1 / 16) == geometry.Basis(4, 16, 170)
    # Alone in its warehouse: nothing to span, and the 16 columns are still there.
    assert geometry.basis(20, 10, 20, 0.5, 1 / 16) == geometry.Basis(10, 16, 0)


def test_the_nonlocal_basis_spans_a_share_of_the_other_layers_cells() -> None:
    # int(0.5 * 36) = 18 own cells of 2000, 1982 others, 1982/16 = 123.9.
    assert geometry.basis(36, 2000, 4000, 0.5, 1 / 16) == geometry.Basis(18, 123, 1982)


def test_where_the_number_of_cells_was_solved_the_own_share_is_proportional() -> None:
    # 7 * 100 // 30 = 23, whatever ratio 100/30 would have been written as.
    assert geometry.basis(7, 100, 30, None, 0.5) == geometry.Basis(23, 38, 77)


# Assignments. `zero` stands for the zero cell, which is written as num_cells.


def dealt(num_cells: int, mixtures: list[int], ratio: float | None = None) -> list[list[int]]:
    return [list(layer.cells) for layer in geometry.assign(num_cells, mixtures, ratio)]


def runs(num_cells: int, mixtures: list[int], ratio: float | None = None) -> list[tuple[int, int]]:
    return [(layer.start, layer.length) for layer in geometry.assign(num_cells, mixtures, ratio)]


def published_rule(
    num_cells: int, mixtures: list[int], b: int = 1, r: int = 1
) -> tuple[list, list]:
    """The published text, cell by cell: at ratio b whole, or 1/r."""
    cells, owned, start = [], [], 0
    for m in mixtures:
        if r == 1:
            cells.append([start + i * b for i in range(m)])
            owned.append((start, m * b))
            start += m * b
            continue
        mine, begin = [], start
        for i in range(m):
            if i % r == (i // r) % r:
                mine.append(start)
                start += 1
            else:
                mine.append(num_cells)
        cells.append(mine)
        owned.append((begin, start - begin))
    return cells, owned


def even_rule(num_cells: int, mixtures: list[int]) -> list[list[int]]:
    """Mixture g starts on floor(g * n / M), or on the zero cell if g - 1 started there."""
    total = sum(mixtures)
    starts = []
    for g in range(total):
        cell = g * num_cells // total
        started = {g_before * num_cells // total for g_before in range(g)}
        starts.append(num_cells if cell in started else cell)
    split, first = [], 0
    for m in mixtures:
        split.append(starts[first : first + m])
        first += m
    return split


def test_at_ratio_1_every_mixture_starts_on_its_own_cell() -> None:
    assert dealt(5, [2, 3], 1.0) == [[0, 1], [2, 3, 4]]
    assert runs(5, [2, 3], 1.0) == [(0, 2), (2, 3)]


def test_at_ratio_2_every_mixture_starts_on_the_first_of_its_two_cells() -> None:
    assert dealt(10, [2, 3], 2.0) == [[0, 2], [4, 6, 8]]
    assert runs(10, [2, 3], 2.0) == [(0, 4), (4, 6)]


def test_at_ratio_one_half_the_cells_are_dealt_along_a_diagonal() -> None:
    zero = 4
    assert dealt(4, [4, 4], 0.5) == [[0, zero, zero, 1], [2, zero, zero, 3]]
    assert runs(4, [4, 4], 0.5) == [(0, 2), (2, 2)]


def test_where_the_diagonal_deals_too_many_the_cells_are_spread_evenly() -> None:
    # Three layers of one mixture would be dealt one cell each: 3, where there is 1.
    assert dealt(1, [1, 1, 1], 0.5) == [[0], [1], [1]]
    assert runs(1, [1, 1, 1], 0.5) == [(0, 1), (0, 0), (0, 0)]


def test_a_run_begins_on_the_first_cell_that_no_layer_before_has_reached() -> None:
    # n = 2 of M = 3: mixtures start on 0, zero, 1; the third is the second layer's.
    assert dealt(2, [2, 1]) == [[0, 2], [1]]
    assert runs(2, [2, 1]) == [(0, 1), (1, 1)]


@few
@given(mixture_lists, st.integers(1, 6))
def test_whole_ratios_follow_the_published_rule(mixtures: list[int], b: int) -> None:
    n = sum(mixtures) * b
    cells, owned = published_rule(n, mixtures, b=b)
    assert dealt(n, mixtures, float(b)) == cells
    assert runs(n, mixtures, float(b)) == owned
    assert dealt(n, mixtures) == cells  # solved, not given: the same


@few
@given(mixture_lists, st.integers(2, 6))
def test_inverse_ratios_follow_the_published_rule_wherever_it_deals_every_cell(
    mixtures: list[int], r: int
) -> None:
    # A layer of a multiple of r * r mixtures is dealt exactly m / r cells.
    mixtures = [m * r * r for m in mixtures]
    n = sum(mixtures) // r
    cells, owned = published_rule(n, mixtures, r=r)
    assert dealt(n, mixtures, 1 / r) == cells
    assert runs(n, mixtures, 1 / r) == owned


@few
@given(mixture_lists, st.integers(2, 6))
def test_inverse_ratios_are_spread_evenly_wherever_the_published_rule_fails(
    mixtures: list[int], r: int
) -> None:
    n = max(int(sum(mixtures) / r), 1)
    cells, owned = published_rule(n, mixtures, r=r)
    handed_out = sum(length for _, length in owned)
    expected = cells if handed_out == n else even_rule(n, mixtures)
    # 1 / r is not exact: int(1 / (1 / r)) must still be r.
    assert dealt(n, mixtures, 1 / r) == expected


def test_the_sweep_over_inverse_ratios_meets_both_rules() -> None:
    agree = []
    for mixtures in ([4, 4], [9], [1, 1, 1], [9, 9], [5, 3]):
        for r in (2, 3):
            n = max(int(sum(mixtures) / r), 1)
            _, owned = published_rule(n, mixtures, r=r)
            agree.append(sum(length for _, length in owned) == n)
    assert len(set(agree)) == 2


@few
@given(mixture_lists, st.data())
def test_any_other_number_of_cells_follows_the_even_rule(
    mixtures: list[int], data: st.DataObject
) -> None:
    total = sum(mixtures)
    n = data.draw(st.integers(1, 4 * total))
    even = geometry._even_assignment(n, mixtures)
    assert [list(layer.cells) for layer in even] == even_rule(n, mixtures)
    r = total // n if n < total else 1
    _, owned = published_rule(n, mixtures, b=n // total, r=r)
    handed_out = sum(length for _, length in owned)
    if (n > total and n % total) or (n < total and handed_out != n):
        assert dealt(n, mixtures) == even_rule(n, mixtures)


@few
@given(mixture_lists, st.data())
def test_every_assignment_is_a_fair_deal(mixtures: list[int], data: st.DataObject) -> None:
    total = sum(mixtures)
    if data.draw(st.booleans()):
        ratio = data.draw(st.floats(0.02, 6))
        n = geometry.cells_for_ratio(total, ratio)
    else:
        ratio = None
        n = data.draw(st.integers(1, 5 * total))
    layers = geometry.assign(n, mixtures, ratio)
    assert [len(layer.cells) for layer in layers] == mixtures
    starts = [cell for layer in layers for cell in layer.cells if cell != n]
    # In order, none twice, all of them where there are enough mixtures.
    assert starts == sorted(set(starts))
    assert set(starts) <= set(range(n))
    if n <= total:
        assert starts == list(range(n))
    else:
        assert len(starts) == total
    # Runs: one after the other, each with the cells that its own layer starts on.
    owned = [range(layer.start, layer.start + layer.length) for layer in layers]
    together = [cell for run in owned for cell in run]
    assert together == list(range(n))
    for layer, run in zip(layers, owned, strict=True):
        mine = [cell for cell in layer.cells if cell != n]
        assert set(mine) <= set(run)
        if n >= total:
            assert run[0] == layer.cells[0]
        else:
            assert mine == list(run)


@few
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 39), st.integers(1, 20))
def test_past_the_announced_mixtures_the_cells_come_round_again(
    n: int, total: int, first: int, count: int
) -> None:
    once = geometry.even_assignment(n, total, first, count)
    again = geometry.even_assignment(n, total, first + total, count)
    if n <= total or first + count <= total:
        assert again.cells == once.cells
    assert 0 <= again.start < n
    assert again.start + again.length <= n
