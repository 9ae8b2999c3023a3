"""`kwsearch budget --batch --memory`: what a step takes, and whether it fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from kwsearch import cli

SMALL = ("budget", "resnet20", "--ratio", "1", "--input", "3x16x16")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kwsearch", *args])
        return cli.run(list(args)), *capsys.readouterr()

    return call


def test_parts_add_up_to_the_total_beside_the_static_network(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run(*SMALL, "--batch", "4")
    assert code == 0
    table = out.partition("memory of a training step, batch 4, float32, on cpu, sgd: ")[2]
    lines = [line.split() for line in table.splitlines() if line.startswith(" ")]
    rows = {
        " ".join(line[:-2]): [int(n.replace(",", "")) for n in line[-2:]]
        for line in lines
        if line and line[-1].replace(",", "").isdigit()
    }
    totals = rows.pop("total")
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == totals
    assert rows["weights and buffers"][0] > 4 * 486_336  # the parameters of that plan
    assert rows["state of the optimizer"] == [4 * 486_336, 4 * 272_474]
    assert f"{totals[0]:,} bytes, {totals[0] / totals[1]:.2f} x static" in out


@pytest.mark.slow
def test_a_limit_says_how_many_images_fit_and_json_says_the_same(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, text, _ = run(*SMALL, "--memory", "12MB", "--json")
    assert code == 0
    found = json.loads(text)["memory"]
    most = found["largest_batch"]
    assert found["step"]["batch"] == most
    assert found["plan"]["total"] <= 12_000_000 == found["limit"]
    # One image more does not fit, which is another exit code, and says what would.
    code, out, err = run(*SMALL, "--memory", "12MB", "--batch", str(most + 1))
    assert code == 3
    assert f"12,000,000 bytes hold steps of up to {most:,} images" in out
    assert f"batch {most + 1}, float32" in out
    assert f"Error: a step of {most + 1} images takes " in err
    assert f"over --memory 12,000,000; try --batch {most} or --checkpointing or --dtype" in err
    assert "bytes at the peak" in out


def test_inference_takes_less_and_has_no_optimizer(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    _, text, _ = run(*SMALL, "--batch", "8", "--json")
    training = json.loads(text)["memory"]
    _, text, _ = run(*SMALL, "--batch", "8", "--inference", "--json")
    inference = json.loads(text)["memory"]
    assert inference["plan"]["total"] < training["plan"]["total"]
    assert inference["plan"]["optimizer"] == inference["plan"]["gradients"] == 0
    _, out, _ = run(*SMALL, "--batch", "8", "--inference")
    assert "memory of a forward pass, batch 8, float32, on cpu: " in out


@pytest.mark.slow
def test_nothing_fits_a_memory_below_the_weights(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = run(*SMALL, "--memory", "1MB")
    assert code == 3
    assert "a step of 1 images takes" in err
    assert "over --memory 1,000,000; try a smaller --input or --checkpointing" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "bfloat16"), "--dtype: of a step; give --batch, --memory or --lut, too"),
        (("--batch", "0"), "Invalid value for '--batch'"),
        (("--memory", "12"), "not an amount of memory (got '12'"),
        (
            ("--batch", "2", "--inference", "--optimizer", "adamw"),
            "--optimizer: of training; leave it or --inference out",
        ),
        (("--batch", "2", "--device", "tpu"), "'tpu' is not one of 'cpu', 'cuda'"),
    ],
)
def test_wrong_options_are_one_message(
    options: tuple[str, ...], message: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run(*SMALL, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_step_needs_a_plan(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("budget", "resnet20", "--batch", "2")
    assert code == 2
    assert "-o, --check, --batch, --memory and --latency need a target: --ratio, --params" in err
