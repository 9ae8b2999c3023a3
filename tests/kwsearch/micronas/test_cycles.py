"""Latency tables: what is read and refused, sums, expectations, and what gaps are filled with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kwsearch.micronas.cycles import CycleError, CycleTable, kind_of, load_csv, load_records
from kwsearch.micronas.expected import ExpectedCycles, needed
from kwsearch.micronas.mixture import equal, one_hot
from kwsearch.micronas.space import Key, Space, operators
from tests.kwsearch.micronas.spaces import (
    SKODA_R,
    TINY,
    UCI_HAR,
    alike,
    every,
    random_mixture,
    some_cycles,
)

STEM = Key("conv2d", ((128, 9, 1),), (64, 9, 4), (3, 1), (2, 1))
ADD = Key("add", ((16, 5, 8), (16, 5, 8)), (16, 5, 8))


def table(entries: dict[Key, int], device: str = "a board", mhz: float = 100) -> CycleTable:
    return CycleTable(device, mhz, entries)


@pytest.mark.parametrize(("space", "entries"), [(UCI_HAR, 510), (SKODA_R, 918)])
def test_as_many_entries_are_needed_as_were_measured(space: Space, entries: int) -> None:
    assert len(needed(space)) == entries


def test_latency_is_the_sum_of_the_operators() -> None:
    network = operators(TINY, alike(TINY, 5, 2, 4, 8, (3, 7), True, keep=False))
    amounts = [70, 60, 50, 40, 30, 20, 30, 9, 8, 7]
    found = table({one.key: n for one, n in zip(network, amounts, strict=True)}).latency(network)
    assert (found.cycles, found.operators, found.fitted) == (sum(amounts), 10, ())
    assert found.milliseconds == pytest.approx(sum(amounts) / 100_000)


@pytest.mark.parametrize("seed", range(4))
def test_the_expectation_of_one_architecture_is_its_sum(seed: int) -> None:
    space = UCI_HAR if seed else TINY
    lookup = table(some_cycles(needed(space)))
    expected = ExpectedCycles(space, lookup)
    assert expected.operators == needed(space)
    rng = random.Random(seed)
    for _ in range(60):
        one = space.random(rng)
        found = lookup.latency(operators(space, one))
        assert float(expected(one_hot(space, one))) == pytest.approx(found.cycles, rel=1e-12)
    assert float(expected.milliseconds(one_hot(space, one))) == pytest.approx(found.milliseconds)


def test_the_expectation_of_a_mixture_is_that_over_all_architectures() -> None:
    mixture = random_mixture(TINY, 5)
    yes = torch.tensor([0.0, 1.0]).double()
    # Where branch 3 or 5 is certainly on, the published form is exact.
    mixture |= {"fusion1.branch3": yes, "fusion2.branch5": yes, "fusion2.branch7": yes}
    mixture |= {"fusion1.branch5": yes.flip(0), "time1.kernel": yes.new_tensor([0.2, 0, 0.8])}
    lookup = table(some_cycles(needed(TINY)))
    total = 0.0
    for chance, chosen in every(TINY, mixture):
        network = operators(TINY, TINY.architecture(chosen))
        total += chance * lookup.latency(network).cycles
    assert float(ExpectedCycles(TINY, lookup)(mixture)) == pytest.approx(total, rel=1e-12)


def test_a_fusion_cell_is_the_published_form() -> None:
    # With equal entries of 1 for all operators, p of the branches, r and keep:
    amounts = dict.fromkeys(needed(TINY), 1)
    mixture = equal(TINY)
    for name, p in (("branch3", 0.2), ("branch5", 0.6), ("branch7", 0.5), ("residual", 0.7)):
        for cell in ("fusion1", "fusion2"):
            mixture[f"{cell}.{name}"] = torch.tensor([1 - p, p], dtype=torch.float64)
    mixture["fusion2.keep"] = torch.tensor([0.75, 0.25]).double()
    branches = 0.2 + 0.6 + 0.5 + (0.6 * 0.2 + 0.5 * 0.6)
    some = 1 - 0.8 * 0.4 * 0.5
    cell = (1 + branches) * some + 0.7 + 0.7 * some
    total = 1 + cell + 0.25 * cell + 3
    assert float(ExpectedCycles(TINY, table(amounts))(mixture)) == pytest.approx(total, rel=1e-12)


def test_every_decision_has_a_gradient() -> None:
    expected = ExpectedCycles(SKODA_R, table(some_cycles(needed(SKODA_R))))
    mixture = random_mixture(SKODA_R, 0)
    leaves = [one.requires_grad_() for one in mixture.values()]
    grads = torch.autograd.grad(expected(mixture), leaves)
    assert all(grad.max() - grad.min() > 1e-6 for grad in grads)


# --- gaps ---


def lawful(key: Key) -> int:
    """Cycles that the model has: 3 for a product, 7 for a copy, 50 an output, 200 a pixel, 900."""
    if key.kind != "conv2d":
        h, w, c = key.output
        return 120 * h * w * c + 2000
    (h, w, out), (kh, kw), into = key.output, key.kernel, key.inputs[0][-1]
    each = 3 * kh * kw * into * out + 7 * kh * kw * into + 50 * out + 200
    return h * w * each + 900


def test_a_gap_is_filled_by_the_law_of_the_others() -> None:
    keys = [key for key in needed(UCI_HAR) if key.kind in ("conv2d", "add")]
    entries = {key: lawful(key) for key in keys if key not in (STEM, ADD)}
    lookup = table(entries)
    assert kind_of(STEM) == "conv2d of other channels"
    for key in (STEM, ADD):
        found = lookup.cycles(key)
        assert found.fitted
        assert found.number == pytest.approx(lawful(key), rel=0.02)
    fits = lookup.fits
    assert fits["conv2d of multiples of 4"].weights == pytest.approx((3, 7, 50, 200, 900), rel=0.1)
    assert max(fit.error for fit in fits.values()) < 0.02
    assert sum(fit.entries for fit in fits.values()) == len(entries)


def test_aligned_channels_are_fitted_by_themselves() -> None:
    kind = "conv2d of multiples of 4"
    aligned = {key: lawful(key) for key in needed(UCI_HAR) if kind_of(key) == kind}
    others = {
        key.at(3, channels): 5 * lawful(key.at(3, channels))
        for key in aligned
        for channels in (5, 6, 7)
    }
    lookup = table(aligned | others)
    key = Key("conv2d", ((20, 5, 8),), (20, 5, 8), (3, 1), (1, 1))
    assert lookup.cycles(key).number == pytest.approx(lawful(key), rel=0.05)
    odd = key.at(3, 8)
    assert lookup.cycles(odd).number == pytest.approx(5 * lawful(odd), rel=0.05)


def test_a_latency_says_which_operators_were_fitted() -> None:
    entries = {key: 1000 for key in needed(UCI_HAR) if key != STEM}
    lookup = table(entries)
    assert lookup.latency(operators(UCI_HAR, UCI_HAR.minimum())).fitted == ("time1.conv",)
    assert lookup.latency(operators(UCI_HAR, UCI_HAR.maximum())).fitted == ()
    assert ExpectedCycles(UCI_HAR, lookup).fitted == {STEM}


def test_the_error_of_a_fit_is_of_entries_that_it_was_not_fitted_to() -> None:
    # Additions of one size that take 100 or 300: predicted from the others, each is off.
    keys = [Key("add", ((1, 1, c), (1, 1, c)), (1, 1, c)) for c in range(1, 21)]
    lookup = table({key: 100 if key.output[-1] % 2 else 300 for key in keys})
    assert lookup.fits["add"].error > 0.4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (STEM, "conv2d 128x9x1 to 64x9x4, 3x1 by 2x1: not in the table of a board, nor to be "
               "fitted by its 0 entries of the kind conv2d of other channels: 10 are needed"),
        (ADD, r"add 16x5x8 \+ 16x5x8 to 16x5x8: not in the table of a board, nor to be fitted by "
              "its 3 entries of the kind add: 4 are needed; measure more"),
        (Key("gap2d", ((16, 5, 6),), (6,)),
         "gap2d 16x5x6 to 6: not in the table of a board, and gap2d is never fitted; measure it$"),
    ],
)  # fmt: skip
def test_too_few_entries_are_not_fitted(key: Key, message: str) -> None:
    lookup = table({ADD.at(c, c): 100 * c for c in (16, 24, 32)})
    with pytest.raises(CycleError, match=f"^{message}"):
        lookup.cycles(key)
    with pytest.raises(CycleError, match="not in the table of a board"):
        ExpectedCycles(UCI_HAR, lookup)


# --- records ---


def record(name: str = "conv2d_17", **changes: Any) -> dict[str, Any]:
    """As published, without what is not read."""
    config = {
        "name": name,
        "input_shape": [1, 128, 9, 1],
        "output_shape": [1, 64, 9, 4],
        "kernel_size": [3, 1],
        "strides": [2, 1],
        "padding": "same",
        "activation": "relu",
    }
    timing = [{"cpuCycles": n, "millis": n / 64e3, "type": 1} for n in (900, 800, 700)]
    found = {"modelConfig": config, "timing": timing, "memory": {"kTensorAreaUsed": "3540"}}
    for key, value in changes.items():
        (found if key in ("timing", "error", "errorText") else config)[key] = value
    return found


def loaded(tmp_path: Path, *records: Any) -> CycleTable:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return load_records(path, "NiclaSense")


def test_records_are_read_as_published(tmp_path: Path) -> None:
    add = {"input_shape": [[1, 16, 5, 8], [1, 16, 5, 8]], "output_shape": [1, 16, 5, 8]}
    gap = {"input_shape": [1, 16, 5, 6], "output_shape": [1, 6]}
    softmax = {"input_shape": [1, 6], "output_shape": [1, 6], "activation": "softmax"}
    found = loaded(
        tmp_path,
        record(),
        record("add_3", activation=None, **add),
        record("global_average_pooling2d", activation=None, **gap),
        record("softmax_1", **softmax),
    )
    assert found.entries == {
        STEM: 700,
        ADD: 700,
        Key("gap2d", ((16, 5, 6),), (6,)): 700,
        Key("softmax", ((6,),), (6,)): 700,
    }
    assert (found.clock_mhz, found.refused) == (64, ())
    assert found.milliseconds(64_000) == 1


def test_an_operator_of_several_kernels_is_their_sum(tmp_path: Path) -> None:
    timing = [{"cpuCycles": n} for n in (900, 800, 300, 200)]
    assert loaded(tmp_path, record(timing=timing)).entries == {STEM: 500}


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        (record(error="FLASHERROR"), "FLASHERROR"),
        (record(error="RUNTIMEERROR", errorText="Error Allocation"), "RUNTIMEERROR Error Alloc"),
        (record(timing=[{"cpuCycles": 5 * 10**10}] * 3), "50000000000 cycles, which stand for a"),
        (record(timing=[{"cpuCycles": 0}] * 3), "0 cycles, which stand for a failure"),
        (record(timing=[]), "0 timings with cpuCycles, where the third is the operator's"),
        (record(timing=[{"cpuCycles": 7}, {"cpuCycles": 7}, {}]), "2 timings with cpuCycles"),
        (record(timing=None), "0 timings with cpuCycles"),
        (record(padding="valid"), "padding valid, where the space has only same"),
        (record(activation="sigmoid"), "activation sigmoid, where the space has only relu"),
        (record("dense_2"), "operator 'dense_2': must be one of conv2d, add"),
        (record("add_2"), "add: 1 inputs"),
        (record(kernel_size=[]), "conv2d: filter and strides must be as 3x1"),
        (record(output_shape=[1, 64, 9, 0]), "conv2d: sizes must be positive integers"),
    ],
)
def test_what_is_no_measurement_is_refused_and_listed(
    failed: dict[str, Any], why: str, tmp_path: Path
) -> None:
    found = loaded(tmp_path, failed)
    assert found.entries == {}
    (refused,) = found.refused
    assert refused.source == f"{tmp_path / 'records.json'}: record 1"
    assert refused.why.startswith(why)


def test_a_failure_that_was_measured_later_is_an_entry(tmp_path: Path) -> None:
    found = loaded(tmp_path, record(), record(error="FLASHERROR"))
    assert found.entries == {STEM: 700}
    again = record(timing=[{"cpuCycles": 710}] * 3)
    assert loaded(tmp_path, record(error="FLASHERROR"), record(), again).entries == {STEM: 710}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("{}", "not a list of records"),
        ("[3]", "record 1: not a record: TypeError"),
        ('[{"modelConfig": {}}]', "record 1: not a record: KeyError 'input_shape'; it needs mod"),
    ],
)
def test_other_files_are_no_records(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CycleError) as caught:
        load_records([path], "NiclaSense")
    assert str(caught.value).startswith(f"{path}: {message}")


def test_an_unknown_board_needs_a_clock(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(CycleError, match="device 'mine': its clock is not known; give clock_mhz"):
        load_records(path, "mine")
    assert load_records(path, "mine", clock_mhz=48).clock_mhz == 48
    with pytest.raises(CycleError, match="clock 0 MHz: must be a positive number"):
        load_records(path, "mine", clock_mhz=0)


# --- CSV ---

CSV = """name,input,output,filter,strides,cycles
conv2d,128x9x1,64x9x4,3x1,2x1,700
add,16x5x8+16x5x8,16x5x8,,,300
softmax,6,6,,,90
conv2d,64x9x4,32x9x4,3x1,2x1,50000000000
"""


def test_csv_gives_the_same_entries(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(CSV)
    found = load_csv(path, "NUCLEOF446RE")
    assert found.entries == {STEM: 700, ADD: 300, Key("softmax", ((6,),), (6,)): 90}
    assert [one.source for one in found.refused] == [f"{path}:5"]
    assert found.clock_mhz == 180


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("128x9x1", "128x9xc", ":2: '128x9xc': must be sizes as 64x9x4"),
        ("3x1", "3", ":2: conv2d: filter and strides must be as 3x1"),
        ("700", "fast", ":2: cycles 'fast': must be an integer"),
        ("softmax", "tanh", ":4: operator 'tanh': must be one of conv2d"),
        ("cycles", "ms", ": no column cycles: the first line must name name, input, output"),
        (",3x1,2x1,700", "", ":2: not as many values as columns"),
        ("700", "700,8", ":2: not as many values as columns"),
    ],
)
def test_csv_errors_name_the_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(CSV.replace(old, new, 1))
    with pytest.raises(CycleError) as caught:
        load_csv(path, "NUCLEOF446RE")
    assert str(caught.value).startswith(f"{path}{message}")


def test_csv_of_a_spreadsheet_is_read_and_other_encodings_are_said(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(CSV, encoding="utf-8-sig")
    assert load_csv(path, "NUCLEOF446RE").entries[STEM] == 700
    path.write_bytes(CSV.replace("softmax", "s\xf6ftmax").encode("latin-1"))
    with pytest.raises(CycleError, match=r"x\.csv: not UTF-8"):
        load_csv(path, "NUCLEOF446RE")


def test_timings_that_are_none_are_refused(tmp_path: Path) -> None:
    found = loaded(tmp_path, record(timing=[900, 800, 700]))
    assert [one.why for one in found.refused] == [
        "0 timings with cpuCycles, where the third is the operator's"
    ]
