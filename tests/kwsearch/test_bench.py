"""The benchmark: what it compares, what it counts and what it writes; never how long it took."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kwlayers.attention import Attention
from kwlayers.ops import BACKENDS
from kwlayers.ops.published import kw_conv_published
from kwsearch import bench, bench_equality, bench_layers, cli, timing
from kwsearch.bench import Case

SMALL = Case("resnet20", 1.0, 2, 16)
TINY = ("--model", "resnet20", "--batch", "2", "--size", "16", "--rounds", "2")
NAMES = ("static", "published", "ours")


class Ran:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


APART = timing.apart


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are measured here, where a test can change what they call."""
    monkeypatch.setattr(timing, "apart", lambda function, *arguments: function(*arguments))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kwsearch", "bench", *args])
        code = cli.run(["bench", *args])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """Comparisons are kept for the cases of one command; a test may change what they find."""
    bench_equality._check_network.cache_clear()
    bench_equality._check_layer.cache_clear()


# Measuring -----------------------------------------------------------------------------------


def test_every_round_has_all_three_in_turns() -> None:
    rounds = [timing.turns(NAMES, number) for number in range(6)]
    assert all(sorted(order) == sorted(NAMES) for order in rounds)
    assert rounds[:3] == [
        ["static", "published", "ours"],
        ["published", "ours", "static"],
        ["ours", "static", "published"],
    ]
    assert len(set(map(tuple, rounds))) == 6  # every order once
    for place in range(3):
        assert sorted(order[place] for order in rounds) == sorted(NAMES * 2)


def test_rounds_are_counted_without_the_warm_up() -> None:
    seen: list[str] = []
    steps = {name: lambda name=name: seen.append(name) for name in NAMES}
    times = timing.interleave(steps, seconds=1e-9, rounds=4)  # type: ignore[arg-type]
    assert all(len(taken.wall) == len(taken.cpu) == 4 for taken in times.values())
    orders = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert orders[-4:] == [timing.turns(NAMES, number) for number in range(4)]
    assert len(orders) == 5


def test_without_a_number_there_are_at_least_five_rounds() -> None:
    times = timing.interleave({"one": lambda: None, "other": lambda: None}, seconds=1e-9)
    assert len(times["one"].wall) == timing.LEAST_ROUNDS == 5


@pytest.mark.slow  # a process more
def test_apart_is_another_process_with_the_same_threads() -> None:
    assert APART(os.getpid) != os.getpid()
    assert APART(torch.get_num_threads) == 1


@pytest.mark.slow
def test_apart_passes_errors_on_and_notices_a_death() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        APART(int, "seven")
    with pytest.raises(ChildProcessError, match="ended with 3"):
        APART(os._exit, 3)


def test_every_case_has_a_process_of_its_own(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def noted(function: Any, *arguments: Any) -> Any:
        calls.append((function, arguments[0].step))
        return function(*arguments)

    monkeypatch.setattr(timing, "apart", noted)
    assert run(*TINY, "--train").code == 0
    assert calls == [(bench.measure, "forward"), (bench.measure, "train")]


def test_a_case_that_dies_is_one_message(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(timing, "apart", lambda *_: APART(os._exit, 137))
    ran = run(*TINY)
    assert ran.code == 1
    assert "ended with 137; was there enough memory?" in ran.err


def test_quartiles_are_those_of_a_hand_made_list() -> None:
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)
    assert timing.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_peak_memory_of_a_hand_made_step() -> None:
    kept = []

    def step() -> None:
        one = torch.empty(1000, dtype=torch.float32)
        two = torch.empty(2000, dtype=torch.float64)  # 4,000 + 16,000
        del one
        three = torch.empty(500, dtype=torch.float32)  # 18,000
        del two, three
        kept.append(torch.empty(1500, dtype=torch.float32))  # 6,000 that stay

    before = torch.ones(10_000)  # not the step's
    assert timing.peak_bytes(step) == 20_000
    assert timing.peak_bytes(before.clone) == 40_000
    assert timing.peak_bytes(lambda: None) == 0


def test_the_workspace_that_stays_is_in_the_memory_of_ours() -> None:
    case = Case("resnet20", 1.0, 2, 8, backend="gemm")
    peaks = [bench.measure(case, rounds=2)["peak_bytes"] for _ in range(2)]
    for peak in peaks:
        assert peak["static"] < peak["published"] < 2**20
        assert 16 * 2**20 < peak["ours"] < 17 * 2**20


def test_malloc_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(timing.environment()):
        monkeypatch.delenv(name)
    assert timing.malloc() == "default"
    for name, value in timing.TUNED_MALLOC.items():
        monkeypatch.setenv(name, value)
    assert timing.malloc() == "tuned"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert timing.malloc() == "custom"


# Networks ------------------------------------------------------------------------------------


def test_the_three_networks_are_one_model_with_one_state() -> None:
    made = bench.networks(SMALL)
    static, published, ours = (made[kind] for kind in NAMES)
    assert not any(isinstance(m, Attention) for m in static.modules())
    state = published.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], found) for name, found in ours.state_dict().items())
    layers = [m for m in ours.modules() if hasattr(m, "warehouse")]
    assert len(layers) == len(bench.calls(SMALL)) == 20
    assert {layer.backend for layer in layers} == {None}
    assert {m.backend for m in published.modules() if hasattr(m, "warehouse")} == {"published"}
    temperatures = {float(m.temperature) for m in ours.modules() if isinstance(m, Attention)}
    assert temperatures == {0.0}
    assert all(torch.isfinite(m(bench.images(SMALL))).all() for m in made.values())


def test_a_plan_is_the_one_that_budget_makes(run) -> None:  # type: ignore[no-untyped-def]
    assert bench.outcome_of(Case("resnet18", 0.5, 2, 32)).published.name == "ResNet18 1/2x"
    cli.run(["budget", "resnet18", "--ratio", "0.5", "--input", "32", "--json"])
    budget = json.loads(run("--help").out.partition("Usage")[0])
    cells = [w["num_cells"] for w in budget["warehouses"]]
    plan = bench.outcome_of(Case("resnet18", 0.5, 2, 32)).plan
    assert [group.num_cells for group in plan.groups] == cells


def test_a_training_step_leaves_gradients_and_a_forward_step_none() -> None:
    for step, trained in (("train", True), ("forward", False)):
        case = Case("resnet20", 1.0, 2, 16, step)
        model = bench.networks(case)["ours"]
        assert model.training is trained
        bench.step_of(model, case, bench.images(case))()
        assert {p.grad is not None for p in model.parameters()} == {trained}


def test_calls_say_what_a_layer_is_given() -> None:
    call = bench.calls(Case("resnet20", 1.0, 3, 32, "train"))["layer3.0.conv1"]
    assert (call.batch, call.channels, call.size) == (3, 32, (16, 16))
    assert call.geometry.kernel == (64, 32, 3, 3)
    assert call.geometry.stride == (2, 2)
    assert call.needs_grad
    stem = bench.calls(Case("mobilenetv2_050", 0.5, 2, 32))["conv_stem"]
    assert not stem.needs_grad
    tokens = bench.calls(Case("deit_tiny", 1.0, 2, 32))["blocks.0.mlp.fc1"]
    assert tokens.linear
    assert (tokens.batch, tokens.channels, tokens.size) == (2, 192, (5,))


# Equality ------------------------------------------------------------------------------------


def test_equal_paths_pass_and_much_is_compared() -> None:
    (found,) = bench_equality.check(Case("resnet20", 1.0, 2, 16, backend="gemm"))
    parameters = bench.networks(SMALL)["ours"].parameters()
    assert found.compared == 1 + len(list(parameters))
    assert 0 < found.worst < 1e-12
    assert (found.dtype, found.batch, found.size) == ("float64", 2, 16)
    assert "by gemm" in found.what


@pytest.mark.slow
def test_the_paths_of_the_case_are_compared_not_those_of_the_check() -> None:
    large = Case("resnet18", 1.0, 16, 224)
    (found,) = bench_equality.check(large)
    for path in {str(choice) for choice in bench.choices(large).values()}:
        assert path in found.what


class _WrongCells(torch.autograd.Function):
    """The identity, with a gradient that is one part in a million too large."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor) -> Tensor:
        return cells.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-6)


def _wrong_output(x: Tensor, attention: Tensor, cells: Tensor, geometry: Any, _: int) -> Tensor:
    return kw_conv_published(x, attention, cells, geometry) * (1 + 1e-6)


def _wrong_gradient(x: Tensor, attention: Tensor, cells: Tensor, geometry: Any, _: int) -> Tensor:
    return kw_conv_published(x, attention, _WrongCells.apply(cells), geometry)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_wrong_output, r"the output by \d\.\de-0\d"),
        (_wrong_gradient, r"the gradient of kw_warehouses\.\w+\.cells by 1\.0e-06"),
    ],
)
@pytest.mark.parametrize("what", ["model", "layers"])
def test_a_wrong_backend_is_not_timed(
    run, monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str, what: str
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(BACKENDS, "loop", wrong)
    monkeypatch.setattr(timing, "interleave", None)
    forced = ("--backend", "loop") if what == "model" else ()
    ran = run(what, *TINY, *forced, "--json")
    assert ran.code == 1
    if what == "layers":
        message = message.replace(r"kw_warehouses\.\w+\.", "")
    assert re.search(message, ran.err)
    assert "allowed 1e-10" in ran.err
    assert "nothing was timed" in ran.err
    assert json.loads(ran.out)["cases" if what == "model" else "layers"] == []


def test_a_path_without_float64_is_compared_layer_by_layer(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    def narrow(x: Tensor, attention: Tensor, cells: Tensor, geometry: Any, _: int) -> Tensor:
        if x.dtype == torch.float64:
            raise ValueError("no float64 here")
        return kw_conv_published(x, attention, cells, geometry)

    monkeypatch.setitem(BACKENDS, "loop", narrow)
    case = Case("resnet20", 1.0, 2, 16, backend="loop")
    network, layers = bench_equality.check(case)
    assert (network.what, network.worst) == ("resnet20 b=1 by published", 0)
    assert (layers.what, layers.dtype) == ("layers by loop", "float32")
    assert 0 < layers.worst < 1e-5
    assert layers.compared == 4 * len(bench_layers.distinct(case))

    def nowhere(*given: Any) -> Tensor:
        raise ValueError("nothing here")

    bench_equality._check_network.cache_clear()
    bench_equality._check_layer.cache_clear()
    monkeypatch.setitem(BACKENDS, "loop", nowhere)
    ran = run(*TINY, "--backend", "loop")
    assert (ran.code, "nothing here" in ran.err) == (1, True)


def test_errors_are_relative_to_each_tensor() -> None:
    expected = {
        "large": torch.tensor([1.0, -200.0]),
        "zero": torch.zeros(2),
        "still zero": torch.zeros(2),
        "missing": torch.ones(1),
        "nan": torch.ones(1),
        "empty": torch.ones(0),
    }
    found = {
        "large": torch.tensor([2.0, -200.0]),
        "zero": torch.tensor([0.0, 1e-30]),
        "still zero": torch.zeros(2),
        "nan": torch.tensor([math.nan]),
        "empty": torch.ones(0),
    }
    errors = bench_equality.errors(expected, found)
    assert math.isnan(errors.pop("nan"))
    assert errors == {"large": 1 / 200, "zero": math.inf, "still zero": 0, "missing": math.inf}
    with pytest.raises(bench_equality.Unequal, match="missing by inf"):
        bench_equality._equality(errors, "float64", 2, 8, "this")
    with pytest.raises(bench_equality.Unequal, match="nan by nan"):
        bench_equality._equality({"fine": 0.0, "nan": math.nan}, "float64", 2, 8, "this")


# The command ---------------------------------------------------------------------------------


def test_the_json_of_a_case_adds_up(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "bench.json"
    ran = run(*TINY, "--ratio", "1,1/2", "--train", "--json", "-o", str(file))
    assert ran.code == 0
    data = json.loads(ran.out)
    assert json.loads(file.read_text()) == data
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert data["command"].startswith("kwsearch bench --model resnet20")
    assert data["versions"]["torch"] == str(torch.__version__)
    assert data["versions"]["kwsearch"]
    assert data["machine"]["cpu"]
    assert data["machine"]["usable_cores"] >= 1
    assert data["commit"] is None or len(data["commit"]) >= 40
    steps = [(case["ratio"], case["step"]) for case in data["cases"]]
    assert steps == [(1, "forward"), (1, "train"), (0.5, "forward"), (0.5, "train")]
    for case in data["cases"]:
        assert (case["model"], case["batch"], case["size"]) == ("resnet20", 2, 16)
        assert (case["dtype"], case["device"], case["threads"]) == ("float32", "cpu", 1)
        assert (case["rounds"], case["malloc"]) == (2, data["malloc"])
        assert sum(case["paths"].values()) == 20
        assert all(one["worst"] <= 1e-10 for one in case["equality"])
        for kind in NAMES:
            first, third = case[f"{kind}_s_quartiles"]
            assert 0 < first <= case[f"{kind}_s"] <= third
            assert case["cpu_s"][kind] > 0
            assert isinstance(case["peak_bytes"][kind], int)
        for over, under in (("published", "ours"), ("ours", "static")):
            quotient = case[f"{over}_s"] / case[f"{under}_s"]
            assert case[f"{over}_over_{under}"] == pytest.approx(quotient)
            first, third = case[f"{over}_over_{under}_quartiles"]
            assert 0 < first <= third
    forward, train = data["cases"][:2]
    for kind in NAMES:
        # A training step holds the gradients of 4 bytes per parameter at the least.
        assert train["peak_bytes"][kind] > forward["peak_bytes"][kind] + 4 * 250_000


def test_the_table_shows_every_case(run) -> None:  # type: ignore[no-untyped-def]
    ran = run(*TINY, "--dtype", "bfloat16", "--channels-last", "--threads", "1")
    assert ran.code == 0
    for words in ("threads 1", "torch ", "channels_last", "published /", "peak MB"):
        assert words in ran.out
    for kind in NAMES:
        assert kind in ran.out
    assert "equal within" in ran.err


@pytest.mark.slow
def test_layers_are_timed_by_every_backend_that_takes_them(run) -> None:  # type: ignore[no-untyped-def]
    ran = run("layers", *TINY, "--train", "--json")
    rows = json.loads(ran.out)["layers"]
    for step in ("forward", "train"):
        own = [row for row in rows if row["step"] == step]
        names = [name for row in own for name in row["layers"]]
        assert sorted(names) == sorted(bench.calls(SMALL))
        assert sum(row["count"] for row in own) == len(names) == 20
        assert len(own) < 20
    for row in rows:
        assert set(row["backends"]) >= set(BACKENDS) - {"reference"}
        timed = {name: time for name, time in row["backends"].items() if time is not None}
        assert set(timed) >= {"published", "loop", "grouped", "gemm"}
        assert {name for name in row["backends"] if name not in timed} == set(row["refused"])
        assert set(row["equality"]) == set(timed)
        assert timed[row["best"]] == min(timed.values())
        assert row["regret"] == pytest.approx(timed[row["chosen"]] / timed[row["best"]])
        assert row["static_s"] > 0
        assert set(row["quartiles"]) == {"static", *timed}


def test_a_layer_has_the_static_layers_output() -> None:
    for model, size in (("resnet20", 16), ("deit_tiny", 32)):
        case = Case(model, 1.0, 2, size)
        for call in bench_layers.distinct(case):
            layer = bench_layers.Layer(call, case, torch.float32)
            static, mixed = layer.static(), layer.mixed(None)
            assert (static.transpose(1, 2) if call.linear else static).shape == mixed.shape


@pytest.mark.slow
def test_refused_backends_show_as_a_dash(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def nowhere(*given: Any) -> Tensor:
        raise ValueError("nothing here")

    gemm = BACKENDS["gemm"]
    monkeypatch.setitem(
        BACKENDS, "gemm", lambda *given: (nowhere if given[0].shape[1] == 16 else gemm)(*given)
    )
    ran = run("layers", *TINY)
    assert ran.code == 0
    line = next(line for line in ran.out.splitlines() if "6 x layer1.0.conv1" in line)
    assert "-" in line.split()
    assert "*" in line
    assert "all: chosen" in ran.out


def test_an_interrupt_keeps_what_is_finished(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    measure, file = bench.measure, tmp_path / "bench.json"

    def interrupted(case: Case, *given: Any) -> dict[str, Any]:
        if case.step == "train":
            assert len(json.loads(file.read_text())["cases"]) == 1
            raise KeyboardInterrupt
        return measure(case, *given)

    monkeypatch.setattr(bench, "measure", interrupted)
    ran = run(*TINY, "--train", "--json", "-o", str(file))
    assert ran.code == 130
    data = json.loads(ran.out)
    assert [case["step"] for case in data["cases"]] == ["forward"]
    assert data["interrupted"] is True
    assert json.loads(file.read_text()) == data


def test_what_torch_cannot_do_ends_with_what_is_finished(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    step_of = bench.step_of

    def failing(model: Any, case: Case, x: Tensor) -> timing.Step:
        def step() -> None:
            raise RuntimeError("out of memory\nby a lot")

        return step if case.step == "train" else step_of(model, case, x)

    monkeypatch.setattr(bench, "step_of", failing)
    ran = run(*TINY, "--train")
    assert ran.code == 1
    assert "train: static cannot run: out of memory" in ran.err
    assert "by a lot" not in ran.err
    assert "forward, 2 rounds" in ran.out


@pytest.mark.slow  # a process more
def test_the_tuned_environment_reaches_the_same_command() -> None:
    script = (
        "from kwsearch import cli, timing\n"
        "if timing.malloc() == 'tuned':\n"
        "    print('child', timing.environment()['MALLOC_MMAP_MAX_'])\n"
        "else:\n"
        "    print('parent', flush=True)\n"
        "    cli.run(['bench', '--tuned-malloc'])\n"
    )
    if not timing.can_tune_malloc():
        pytest.skip("glibc only")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["parent", "child", "0"], done.stderr


def test_a_tuned_command_says_so_and_does_not_start_again(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(timing, "can_tune_malloc", lambda: False)
    ran = run(*TINY, "--tuned-malloc")
    assert ran.code == 2
    assert "glibc" in ran.err
    for name, value in timing.TUNED_MALLOC.items():
        monkeypatch.setenv(name, value)
    data = json.loads(run(*TINY, "--tuned-malloc", "--json").out)
    assert data["malloc"] == data["cases"][0]["malloc"] == "tuned"
    assert data["environment"]["MALLOC_MMAP_MAX_"] == "0"


WRONG = [
    (("--model", "resnet21"), "did you mean resnet20"),
    (("--model", "resnet20,"), "unknown model ''"),
    (("--model", "resnet20", "--ratio", "1e6"), "at most 1,000"),
    (("--ratio", "0"), "not a ratio (got '0'"),
    (("--batch", "1,0"), "not a count (got '0'"),
    (("--size", "3x32x32"), "not a count (got '3x32x32'"),
    (("--model", "deit_tiny", "--size", "40"), "deit_tiny at 40 px: img_size must be a multiple"),
    (("--model", "convnext_tiny", "--size", "16"), "convnext_tiny at 16 px"),
    (
        ("--model", "resnet18", "--size", "32", "--batch", "1", "--train"),
        "Expected more than 1 value per channel",
    ),
    (("--model", "resnet20", "--backend", "fast"), "backend 'fast': allowed are reference"),
    (
        ("--model", "mobilenetv2_050", "--size", "32", "--backend", "gemm"),
        "cannot do mobilenetv2_050's blocks.0.0.conv_dw: it needs groups 1, not 16",
    ),
    (("--device", "tpu"), "device 'tpu': allowed are cpu, cuda and cuda:NUMBER"),
    (("--dtype", "int8"), "'int8' is not one of"),
    (("--rounds", "1"), "--rounds"),
    (("-o", "/nowhere/bench.json"), "there is no folder /nowhere"),
    (("layers", "--backend", "gemm"), "bench layers times every backend"),
    (("both",), "'both' is not one of 'model', 'layers'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_input_gets_one_message(run, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    ran = run(*arguments)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not ran.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_a_missing_gpu_is_one_message(run) -> None:  # type: ignore[no-untyped-def]
    ran = run("--device", "cuda")
    assert ran.code == 2
    assert f"torch {torch.__version__} finds no CUDA device" in ran.err


@pytest.mark.gpu
def test_a_case_on_a_gpu(run) -> None:  # type: ignore[no-untyped-def]
    ran = run(*TINY, "--device", "cuda", "--train", "--json")
    data = json.loads(ran.out)
    assert ran.code == 0
    assert data["machine"]["gpu"]
    assert all(case["peak_bytes"]["ours"] > 0 for case in data["cases"])


# Networks of other packages, and of one's own -------------------------------------------------


OWN = """
    from torch import nn

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )
"""


def test_own_code_is_timed_with_trust_and_a_size(run, own_code) -> None:
    name = f"{own_code(OWN)}:make"
    options = ("--model", name, "--batch", "2", "--rounds", "2", "--seconds", "0.01")
    refused = run(*options, "--size", "8")
    assert (refused.code, refused.out) == (2, "")
    assert "it is code of your own" in refused.err
    assert "its input size is not known: give --size" in run(*options, "--trust").err
    ran = run(*options, "--size", "8", "--trust", "--train", "--json")
    assert ran.code == 0
    assert [case["step"] for case in json.loads(ran.out)["cases"]] == ["forward", "train"]


def test_a_network_of_timm_has_its_size_and_channels(timm) -> None:
    case = Case("timm:resnet10t", 1.0, 2, 32)
    assert case.input_size == (3, 32, 32)
    assert len(bench.calls(case)) >= 10


def test_videos_are_refused(run, torchvision_models) -> None:
    ran = run("--model", "torchvision:r3d_18", "--batch", "2", "--size", "32")
    assert (ran.code, ran.err) == (
        2,
        "Error: torchvision:r3d_18: it takes videos, and bench has images only\n",
    )
