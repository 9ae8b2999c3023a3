"""bench dymn: nothing is timed that is not equal, and every form is what its name says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kwlayers import context
from kwlayers.mixed import MixedLayer
from kwlayers.ops.dy_relu import dy_relu
from kwsearch import bench_dymn, zoo
from kwsearch.bench import BenchFailed
from kwsearch.cli.bench import command


def run(*args: str) -> Any:
    return CliRunner().invoke(command, ["dymn", *args], standalone_mode=False)


def test_every_form_is_timed_and_takes_the_memory_that_it_keeps() -> None:
    case = bench_dymn.Case("dymn04", 4, 100, "train")
    row = bench_dymn.measure(case, rounds=2)
    assert set(bench_dymn.KINDS) <= set(row)
    assert row["rounds"] == 2
    for kind in bench_dymn.KINDS:
        low, high = row[kind]["quartiles"]
        assert 0 < low <= row[kind]["seconds"] <= high
    assert row["ours"]["over_ours"] == 1
    # All pieces and products are kept by the published form.
    assert row["published Dy-ReLU"]["peak_bytes"] > 1.2 * row["ours"]["peak_bytes"]


def test_forms_are_swapped_where_the_network_computes_and_put_back() -> None:
    model = zoo.create("dymn04", width=0.5)
    layers = [module for module in model.modules() if isinstance(module, MixedLayer)]
    assert layers
    with bench_dymn._form(model, "published"):
        assert context.dy_relu is bench_dymn.published_dy_relu
        assert {layer.backend for layer in layers} == {"published"}
    with bench_dymn._form(model, "published Dy-ReLU"):
        assert context.dy_relu is bench_dymn.published_dy_relu
        assert {layer.backend for layer in layers} == {None}
    assert context.dy_relu is dy_relu


def test_forms_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_dymn.check("dymn04")

    def wrong(*args: Any) -> torch.Tensor:
        return dy_relu(*args) * 1.001

    monkeypatch.setattr(bench_dymn, "dy_relu", wrong)
    with pytest.raises(BenchFailed, match="dymn04: ours differs from the published form by"):
        bench_dymn.check("dymn04")


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_form() -> None:
    options = ("--model", "dymn04", "--size", "40", "--batch", "1", "--rounds", "2")
    done = run(*options, "--json")
    assert done.exception is None
    data = json.loads(done.stdout)
    (row,) = data["dymn"]
    assert (row["model"], row["frames"], row["step"]) == ("dymn04", 40, "forward")
    shown = run(*options).stdout
    for text in ("published Dy-ReLU", "batch 1, 40 frames", "forward, 2 rounds"):
        assert text in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "resnet18"), "--model resnet18: bench dymn is of DyMNs"),
        (("--backend", "loop", "--dtype", "bfloat16"), "bench dymn takes no --backend, --dtype"),
        (("--ratio", "2"), "bench dymn takes no --ratio"),
    ],
)
def test_what_it_does_not_take_is_refused(args: tuple[str, ...], message: str) -> None:
    assert message in str(run(*args).exception)
