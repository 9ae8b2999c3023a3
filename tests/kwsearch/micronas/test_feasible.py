"""The most probable architecture within limits: against all there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.expected import needed
from kwsearch.micronas.feasible import Feasible, Limits
from kwsearch.micronas.mixture import Mixture, one_hot
from kwsearch.micronas.peak_memory import peak_bytes
from kwsearch.micronas.space import Architecture, Space, SpaceError, macs, operators
from kwsearch.micronas.supernet import extract
from tests.kwsearch.micronas.spaces import (
    TINY,
    UCI_HAR,
    every,
    random_mixture,
    some_cycles,
)

SMALL = Space(6, 3, 2, (2, 4), (4, 6, 8), plain_cells=0)
TABLE = CycleTable("a board", 1.0, some_cycles(needed(SMALL)))


def all_of(mixture: Mixture) -> list[tuple[float, float, int, Architecture]]:
    """Chance, milliseconds, bytes of every architecture, the most probable first."""
    found = []
    for chance, chosen in every(SMALL, mixture):
        try:
            one = SMALL.architecture(chosen)
        except SpaceError:
            continue
        network = operators(SMALL, one)
        found.append((chance, TABLE.latency(network).milliseconds, peak_bytes(network), one))
    assert len(found) == SMALL.architectures == 6 * 9 * 15
    return sorted(found, key=lambda row: -row[0])


@pytest.mark.parametrize("seed", range(3))
def test_under_limits_on_memory_it_is_the_best_of_all(seed: int) -> None:
    mixture = random_mixture(SMALL, seed)
    rows = all_of(mixture)
    assert Feasible(SMALL, Limits()).best(mixture) == (rows[0][3], ())
    sizes = sorted({row[2] for row in rows})
    for limit in sizes:
        best = next(row for row in rows if row[2] <= limit)
        assert Feasible(SMALL, Limits(bytes=limit)).best(mixture) == (best[3], ())


@pytest.mark.parametrize("seed", range(3))
def test_under_limits_on_latency_it_is_the_best_of_all(seed: int) -> None:
    mixture = random_mixture(SMALL, seed)
    rows = all_of(mixture)
    times = sorted({row[1] for row in rows})
    for limit in times[:: len(times) // 25]:
        best = next(row for row in rows if row[1] <= limit)
        assert Feasible(SMALL, Limits(limit), TABLE).best(mixture) == (best[3], ())


@pytest.mark.parametrize("seed", range(2))
def test_under_both_limits_with_cells_to_leave_out_it_is_the_best_of_all(seed: int) -> None:
    mixture = random_mixture(TINY, seed)
    one = torch.tensor([0.0, 1.0])
    # Fewer to enumerate: what has no chance is never the best.
    certain = {"time1.kernel": torch.tensor([0.0, 0.0, 1.0]), "fusion1.branch3": one}
    mixture |= certain | {"fusion1.branch5": one.flip(0), "fusion2.residual": one}
    table = CycleTable("a board", 1.0, some_cycles(needed(TINY)))
    rows = []
    for chance, chosen in every(TINY, mixture):
        architecture = TINY.architecture(chosen)
        network = operators(TINY, architecture)
        took, held = table.latency(network).milliseconds, peak_bytes(network)
        rows.append((chance, took, held, architecture))
    rows.sort(key=lambda row: -row[0])
    small = [row for row in rows if row[2] <= sorted({row[2] for row in rows})[2]]
    times = sorted(row[1] for row in small)
    kept = set()
    for limit in times[:: len(times) // 10]:
        best = next(row for row in small if row[1] <= limit)
        limits = Limits(limit, max(row[2] for row in small))
        assert Feasible(TINY, limits, table).best(mixture) == (best[3], ())
        kept.add(best[3].fusion[1].keep)
    assert False in kept  # also of those that leave the cell out


def test_both_limits_are_kept() -> None:
    mixture = random_mixture(SMALL, 7)
    rows = all_of(mixture)
    limits = Limits(sorted(row[1] for row in rows)[80], sorted(row[2] for row in rows)[150])
    assert limits.milliseconds is not None
    assert limits.bytes is not None
    found = Feasible(SMALL, limits, TABLE)
    one, broken = found.best(mixture)
    assert not broken
    assert not found.broken(one)
    assert found.milliseconds(one) <= limits.milliseconds  # type: ignore[operator]
    assert found.bytes(one) <= limits.bytes
    assert found.broken(found.preferred(mixture))


def test_what_cannot_be_kept_is_said_with_the_least_there_is() -> None:
    mixture = random_mixture(SMALL, 1)
    rows = all_of(mixture)
    least_ms, least_bytes = min(row[1] for row in rows), min(row[2] for row in rows)
    one, (why,) = Feasible(SMALL, Limits(milliseconds=1), TABLE).best(mixture)
    assert why == (
        f"latency limit 1 ms: below {least_ms:.3f} ms, the least that any architecture takes; "
        "allow more, or a space with fewer channels"
    )
    assert TABLE.latency(operators(SMALL, one)).milliseconds == least_ms
    one, (why,) = Feasible(SMALL, Limits(1.0, 9), TABLE).best(mixture)
    assert why == (
        f"memory limit 9 bytes: below {least_bytes} bytes, the least that any architecture needs; "
        "allow more, or a space with fewer channels"
    )
    assert peak_bytes(operators(SMALL, one)) == least_bytes
    small = min(row[1] for row in rows if row[2] <= least_bytes)
    assert small > least_ms
    _, (why,) = Feasible(SMALL, Limits(least_ms, least_bytes), TABLE).best(mixture)
    assert f"below {small:.3f} ms, the least that any architecture takes with at most" in why


def test_the_least_memory_leaves_out_what_it_can() -> None:
    # One width everywhere. Time cell 18 + 9; fusion 9 + 48, and 48 + 48 if kept; logits 48 + 12.
    space = Space(6, 3, 2, (1,), (8,), plain_cells=1)
    found, (why,) = Feasible(space, Limits(bytes=59)).best(random_mixture(space, 0))
    assert why.startswith("memory limit 59 bytes: below 60 bytes, the least")
    assert not found.fusion[1].keep


def test_logits_have_to_fit_as_well() -> None:
    # From 3x2 positions of 4 or 8 channels to 40 classes: 24 + 240, or 48 + 240.
    space = Space(6, 3, 40, (2, 4), (4, 8), plain_cells=0)
    mixture = random_mixture(space, 0)
    mixture["fusion1.channels"] = torch.tensor([0.1, 0.9])
    for limit, width in ((290, 8), (287, 4), (280, 4)):  # softmax after pooling: 240 + 40
        found, broken = Feasible(space, Limits(bytes=limit)).best(mixture)
        assert not broken
        assert found.fusion[0].channels == width
        assert peak_bytes(operators(space, found)) <= limit


def test_which_limits_are_broken_is_said_with_values() -> None:
    found = Feasible(SMALL, Limits(0.5, 20), TABLE)
    one = SMALL.maximum()
    took, held = found.milliseconds(one), found.bytes(one)
    assert took is not None
    assert found.broken(one) == (
        f"latency {took:.3f} ms: above the limit of 0.5 ms",
        f"memory {held:,} bytes: above the limit of 20 bytes",
    )


def test_a_cell_without_output_takes_the_most_probable_part() -> None:
    mixture = {name: one.clone() for name, one in one_hot(TINY, TINY.maximum()).items()}
    for part, p in (("branch3", 0.1), ("branch5", 0.3), ("branch7", 0.2), ("residual", 0.25)):
        mixture[f"fusion1.{part}"] = torch.tensor([1 - p, p])
    cell = Feasible(TINY, Limits()).best(mixture).architecture.fusion[0]
    assert (cell.branches, cell.residual) == ((5,), False)


def test_a_cell_that_is_left_out_keeps_its_most_probable_choices() -> None:
    mixture = random_mixture(UCI_HAR, 3)
    mixture["fusion2.keep"] = torch.tensor([0.9, 0.1])
    one = Feasible(UCI_HAR, Limits()).preferred(mixture)
    assert not one.fusion[1].keep
    widest = mixture["fusion2.channels"].argmax()
    assert one.fusion[1].channels == UCI_HAR.fusion_channels[int(widest)]


def test_limits_are_positive_and_milliseconds_need_a_table() -> None:
    for bad in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^limit of milliseconds .*: must be a positive num"):
            Limits(milliseconds=bad)
    with pytest.raises(ValueError, match=r"^limit of bytes 0: must be a positive number, or None"):
        Limits(bytes=0)
    with pytest.raises(ValueError, match=r"^a limit of 3 ms without a table of cycles: nothing"):
        Feasible(SMALL, Limits(milliseconds=3))


@pytest.mark.parametrize("seed", range(3))
def test_under_limits_on_flash_it_is_the_best_of_all(seed: int) -> None:
    mixture = random_mixture(SMALL, seed)
    rows = [(chance, flash_of(one), one) for chance, _, _, one in all_of(mixture)]
    sizes = sorted({row[1] for row in rows})
    for limit in sizes[:: len(sizes) // 25]:
        best = next(row for row in rows if row[1] <= limit)
        assert Feasible(SMALL, Limits(flash=limit)).best(mixture) == (best[2], ())
    found = Feasible(SMALL, Limits(flash=sizes[0] - 1)).best(mixture)
    assert flash_of(found.architecture) == sizes[0]
    (why,) = found.broken
    assert why.startswith(
        f"flash limit {sizes[0] - 1:,} bytes: below {sizes[0]:,} bytes, the least"
    )


@pytest.mark.parametrize("seed", range(2))
def test_under_all_limits_what_is_found_keeps_them_and_is_near_the_best(seed: int) -> None:
    mixture = random_mixture(SMALL, seed)
    rows = [(c, ms, held, flash_of(one), one) for c, ms, held, one in all_of(mixture)]
    quantiles = [sorted(row[i] for row in rows) for i in (1, 2, 3)]
    some = [column[len(column) // 6 :: len(column) // 3] for column in quantiles]
    exact = 0
    for ms, held, flash in itertools.product(*some):
        within = [row for row in rows if row[1] <= ms and row[2] <= held and row[3] <= flash]
        feasible = Feasible(SMALL, Limits(ms, held, flash), TABLE)
        found = feasible.best(mixture)
        assert (found.broken == ()) == bool(within), found
        if within:
            assert feasible.broken(found.architecture) == ()
            chance = next(row[0] for row in rows if row[4] == found.architecture)
            assert chance >= within[0][0] / 2
            exact += found.architecture == within[0][4]
        else:
            assert found.broken
    assert exact >= 0.9 * len([*itertools.product(*some)]) / 2


def test_the_largest_within_limits_has_the_most_macs() -> None:
    rows = [(flash_of(one), peak_bytes(operators(SMALL, one)), one) for *_, one in all_of(even())]
    for held, flash in itertools.product(*(sorted({row[i] for row in rows})[::40] for i in (1, 0))):
        within = [body(one) for kept, peak, one in rows if kept <= flash and peak <= held]
        found = Feasible(SMALL, Limits(bytes=held, flash=flash)).largest
        assert (found.broken == ()) == bool(within)
        if within:
            assert body(found.architecture) == max(within)


def flash_of(architecture: Architecture) -> int:
    """Bytes of int8 weights and int32 biases, by the network that is trained."""
    convs = [m for m in extract(SMALL, architecture).modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    return sum(conv.weight.numel() + 4 * conv.out_channels for conv in convs)


def body(architecture: Architecture) -> int:
    """MACs without the head's."""
    return macs([one for one in operators(SMALL, architecture) if one.cell != "head"])


def even() -> Mixture:
    return {one.name: torch.ones(len(one.options)) / len(one.options) for one in SMALL.decisions}
