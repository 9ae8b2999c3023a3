"""`kwsearch profile`, `lut`, `budget --lut`, limits of latency: on a machine with known times."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kwlayers.plan import Plan
from kwsearch import cli
from kwsearch.budget import Target, meet
from kwsearch.latency import checking, circumstances, profiling
from kwsearch.latency.calls import Call
from kwsearch.latency.measure import Times
from kwsearch.latency.replay import Replay
from kwsearch.latency.subjects import Mode, Subject, of_model
from kwsearch.latency.table import Table, sole_writer
from kwsearch.networks import build_model, trace_model
from tests.kwsearch import test_optimize

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 16, 16)
PROFILE = ("profile", "resnet20", "--input", "3x16x16", "--ratio", "0.5,2", "--threads", "1")
FULL = tuple("0.25,1,4" if arg == "0.5,2" else arg for arg in PROFILE)
BUDGET = ("budget", "resnet20", "--input", "3x16x16", "--ratio", "0.8")
Run = Callable[..., tuple[int, str, str]]


def call_ns(call: Call) -> float:
    """Of the made-up machine: linear in the work, so in the number of cells, too."""
    return 1000 + sum(call.work) / 100


def whole_ms(calls: Mapping[Call, int]) -> float:
    """Whole steps take a quarter more than their calls."""
    return 1.25e-6 * sum(count * call_ns(call) for call, count in calls.items())


def measure(making: Sequence[Any], device: str) -> list[Times]:
    def seconds(made: Any) -> float:
        if made.func is Replay:
            return 1e-9 * call_ns(made.args[0])
        subject: Subject = made.func.__self__
        return 1e-3 * whole_ms(subject.calls(made.args[0]))

    return [Times(s, s, s, 7, 1e-3) for s in map(seconds, making)]


def interrupted(at: int) -> Callable[[Sequence[Any], str], list[Times]]:
    """Stands in for `measure`, until it is asked for the `at`th time."""
    asked = itertools.count(1)

    def measured(making: Sequence[Any], device: str) -> list[Times]:
        if next(asked) == at:
            raise KeyboardInterrupt
        return measure(making, device)

    return measured


def ms_of(plan: Plan | None, name: str = "resnet20", training: bool = False) -> float:
    """What a step takes on that machine."""
    subject = Subject(name, lambda: build_model(name, SIZE), SIZE, plan)
    return whole_ms(subject.calls(Mode(1, training)))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "measure", measure)
    monkeypatch.setattr(checking, "measure", measure)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        given = list(map(str, args))
        monkeypatch.setattr(sys, "argv", ["kwsearch", *given])
        monkeypatch.setenv("COLUMNS", "200")
        return cli.run(given), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of resnet20 at batch 1, inference and training."""
    path = tmp_path_factory.mktemp("tables") / "here.lut.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "measure", measure)
        assert cli.run([*FULL, "--train", "-o", str(path)]) == 0
    return path


@pytest.fixture
def lut(made: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "here.lut.yaml"
    copied.write_text(made.read_text())
    return copied


@pytest.fixture(scope="module")
def plan() -> Plan:
    return meet(trace_model("resnet20", SIZE), Target(0.8)).plan


# profile ------------------------------------------------------------------------------------


def test_a_profile_says_what_it_does_and_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.lut.yaml"
    code, out, err = run(*PROFILE, "-o", path)
    assert code == 0
    assert "to measure: " in err
    assert " and 3 whole steps; " in err
    assert f"wrote {path}: " in out
    assert " and 3 whole steps" in out
    table = Table.load(path)
    assert table.circumstances["threads"] == 1
    code, out, _ = run(*PROFILE, "-o", path)
    assert (code, out) == (0, f"{path} has all of it: {len(table.entries)} calls\n")
    # What a longer command adds, and nothing else.
    code, _, err = run(*PROFILE, "--train", "-o", path)
    assert code == 0
    assert Table.load(path).entries.items() > table.entries.items()


def test_an_interrupted_profile_says_how_it_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.lut.yaml"
    monkeypatch.setattr(profiling, "measure", interrupted(3))
    code, _, err = run(*PROFILE, "-o", path)
    assert code == 130
    assert "left to measure: the same command goes on" in err
    kept = Table.load(path).entries
    assert len(kept) == 2 * profiling._CALLS
    monkeypatch.setattr(profiling, "measure", measure)
    code, _, err = run(*PROFILE, "-o", path)
    assert code == 0
    assert f"has {len(kept)} calls" in err


def test_a_dtype_that_the_device_has_no_kernels_for_is_one_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(making: Sequence[Any], device: str) -> list[Times]:
        raise RuntimeError("not implemented\nfor 'Half'")

    monkeypatch.setattr(profiling, "measure", fails)
    code, _, err = run(*PROFILE, "--dtype", "float16", "-o", tmp_path / "t.lut.yaml")
    assert code == 2
    assert "Error: no step can run on cpu in float16: not implemented for 'Half'" in err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_run_is_left_out_with_a_note(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_at_attention(making: Sequence[Any], device: str) -> list[Times]:
        if any("attention" in getattr(make.args[0], "family", "") for make in making):
            raise RuntimeError("no kernel for it")
        return [Times(1e-3, 1e-3, 1e-3, 7, 1e-3) for _ in making]

    monkeypatch.setattr(profiling, "measure", fails_at_attention)
    path = tmp_path / "t.lut.yaml"
    code, _, err = run(*PROFILE, "-o", path)
    assert code == 0
    assert "measurements left out: no kernel for it" in err
    assert "note: 2 measurements left out: the latency table has no attention inference" in err
    table = Table.load(path)
    families = {entry.family.split()[0] for entry in table.entries.values()}
    assert "conv2d" in families
    assert "attention" not in families
    assert [whole.name for whole in table.wholes] == ["resnet20 at 3x16x16"]


def test_two_profiles_of_one_table_are_refused(run: Run, lut: Path) -> None:
    with sole_writer(lut):
        for command in ((*PROFILE, "-o", lut), ("lut", "check", lut)):
            code, _, err = run(*command)
            assert code == 2
            assert f"{lut}: another kwsearch is measuring for it" in err
    assert [path.name for path in lut.parent.iterdir()] == [lut.name]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("profile", "-o", "t.lut.yaml"), "nothing to profile: give a MODEL, a RECIPE.yaml or"),
        (("profile", "resnet20", "-o", "no/where.yaml"), "there is no folder no"),
        (("profile", "resnet20"), "Missing option '-o'"),
        ((*PROFILE, "--device", "cuda", "-o", "t.yaml"), "finds no CUDA device"),
        (("profile", "resnet21", "-o", "t.yaml"), "unknown model 'resnet21'"),
        ((*PROFILE, "--batch", "0", "-o", "t.yaml"), "not a count"),
        ((*PROFILE, "--size", "32", "-o", "t.yaml"), "--size: of --grid; a MODEL takes --input"),
        (("profile", "--grid", "--ratio", "1", "-o", "t.yaml"), "--ratio: of a MODEL"),
        (("profile", "--grid", "--input", "3x8x8", "-o", "t.yaml"), "--input: of a MODEL"),
    ],
)
def test_wrong_profiles(
    args: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*args)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_another_dtype_or_thread_count_is_not_added_to(run: Run, lut: Path) -> None:
    before = lut.read_text()
    code, _, err = run(*PROFILE[:-1], "2", "-o", lut)
    assert code == 2
    assert f"{lut} is of other circumstances: threads 1, not 2; write to another file" in err
    code, _, err = run(*PROFILE, "--dtype", "bfloat16", "-o", lut)
    assert code == 2
    assert "dtype float32, not bfloat16" in err
    assert lut.read_text() == before


# lut ----------------------------------------------------------------------------------------


def test_a_table_is_shown(run: Run, lut: Path) -> None:
    code, out, _ = run("lut", "show", lut)
    assert code == 0
    assert "threads: 1\n" in out
    assert "not checked: `kwsearch lut check`" in out
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    assert rows["inference, batch 1"][3:] == ["4", "1.25", "1.25", "1.25"]
    code, text, _ = run("lut", "show", lut, "--json")
    found = json.loads(text)
    assert len(found["entries"]) == len(Table.load(lut).entries)
    assert len(found["wholes"]) == 8


def test_tables_are_merged(run: Run, lut: Path, tmp_path: Path) -> None:
    other, both = tmp_path / "other.lut.yaml", tmp_path / "both.lut.yaml"
    assert run(*PROFILE, "--batch", "2", "-o", other)[0] == 0
    code, out, _ = run("lut", "merge", lut, other, "-o", both)
    assert code == 0
    assert " and 11 whole steps" in out
    assert Table.load(both).entries.keys() == (
        Table.load(lut).entries.keys() | Table.load(other).entries.keys()
    )
    code, _, err = run("lut", "merge", lut, other, "-o", both)
    assert code == 2
    assert "the file exists; --force replaces it" in err
    table = Table.load(other)
    table.circumstances["cpu"] = "another"
    table.save(other)
    code, _, err = run("lut", "merge", lut, other, "-o", both, "--force")
    assert code == 2
    assert f"{other}, {lut}: tables of different circumstances: cpu another, not " in err


def test_a_check_states_the_error_and_the_table_keeps_it(run: Run, lut: Path) -> None:
    code, out, _ = run("lut", "check", lut, "resnet20", "--input", "3x16x16", "--ratio", "0.8,2")
    assert code == 0
    # Static is in the table; the two plans, forward and training, are not. The machine is linear.
    assert "checked on 4 whole steps: median error 0.0%, worst " in out
    assert "resnet20 b = 0.8 at 3x16x16" in out
    checks = Table.load(lut).checks
    assert [one.measured_ms for one in checks] == pytest.approx(
        [one.predicted_ms for one in checks], rel=0.02
    )
    assert "checked on 4 whole steps" in run("lut", "show", lut)[1]
    code, _, err = run("lut", "check", lut, "resnet20", "--input", "3x16x16", "--ratio", "1")
    assert code == 2
    assert "there is no step to check that it was not made from: name another MODEL" in err


def test_an_interrupted_check_keeps_what_was_measured(
    run: Run, lut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "measure", interrupted(3))
    code, _, err = run("lut", "check", lut, "resnet20", "--input", "3x16x16", "--ratio", "0.8,2")
    assert code == 130
    assert f"interrupted; 2 checks are in {lut}" in err
    assert len(Table.load(lut).checks) == 2


def test_a_network_that_the_table_cannot_tell_is_left_out_of_a_check(run: Run, lut: Path) -> None:
    models = ("deit_tiny", "--input", "3x16x16", "--ratio", "1")
    code, _, err = run("lut", "check", lut, *models)
    assert code == 2
    assert "note: deit_tiny, inference, batch 1: left out: the latency table has no " in err
    assert "there is no step to check" in err


def test_a_table_of_another_machine_cannot_be_checked_here(run: Run, lut: Path) -> None:
    table = Table.load(lut)
    table.circumstances["torch"] = "1.0"
    table.save(lut)
    code, _, err = run("lut", "check", lut)
    assert code == 2
    assert "cannot be checked here, it is of torch 1.0, not " in err


# budget -------------------------------------------------------------------------------------


def test_a_budget_tells_the_latency_of_a_plan(run: Run, lut: Path, plan: Plan) -> None:
    code, text, _ = run(*BUDGET, "--lut", lut, "--json")
    assert code == 0
    found = json.loads(text)["latency"]
    for name, training in (("inference", False), ("training", True)):
        assert found["plan"][name]["ms"] == pytest.approx(ms_of(plan, training=training), rel=0.01)
        assert found["static"][name]["ms"] == pytest.approx(
            ms_of(None, training=training), rel=1e-4
        )
    own = found["plan"]["inference"]
    assert own["low"] < own["ms"] < own["high"]
    assert own["measured"] + own["lines"] == pytest.approx(1)  # n of 0.8 is not in the table
    assert own["lines"] > 0.3
    code, out, _ = run(*BUDGET, "--lut", lut)
    assert code == 0
    where = f"{circumstances.here()['cpu']}, 1 thread"
    assert f"latency of a forward pass, batch 1, float32 on {where}: " in out
    assert "by the number of cells" in out


@pytest.mark.parametrize("by", ["stage", "layer"])
def test_the_latency_is_a_column_that_adds_up(by: str, run: Run, lut: Path, plan: Plan) -> None:
    code, out, _ = run(*BUDGET, "--lut", lut, "--by", by)
    assert code == 0
    text = out.partition("MACs  ")[2].partition("latency of")[0]
    rows = [line.split() for line in text.splitlines()[2:] if line.strip(" ─")]
    times = {" ".join(row[:-6]): float(row[-1]) for row in rows}
    total = times.pop("total")
    assert total == pytest.approx(ms_of(plan), rel=0.01)
    assert sum(times.values()) == pytest.approx(total, abs=0.001 * len(times))
    if by == "layer":
        subject = Subject("", lambda: build_model("resnet20", SIZE), SIZE, plan)
        calls = subject.calls_by_module(Mode(1, False))
        for name in ("conv1", "layer3.2.conv2"):
            assert times[name] == pytest.approx(whole_ms(calls[name]), rel=0.02, abs=6e-4)
        found = json.loads(run(*BUDGET, "--lut", lut, "--by", by, "--json")[1])["layers"]
        assert {one["name"]: round(one["ms"], 3) for one in found}.items() <= times.items()


def test_settings_have_a_latency_each(run: Run, lut: Path) -> None:
    code, out, _ = run("budget", "resnet20", "--input", "3x16x16", "--lut", lut)
    assert code == 0
    rows = {line[:9].strip(): line.split() for line in out.splitlines() if line.strip()}
    assert float(rows["static"][-1]) == pytest.approx(ms_of(None), rel=0.01)
    plan = meet(trace_model("resnet20", SIZE), Target(2)).plan
    assert float(rows["b = 2"][-1]) == pytest.approx(ms_of(plan), rel=0.02)
    found = json.loads(run("budget", "resnet20", "--input", "3x16x16", "--lut", lut, "--json")[1])
    assert found["static"]["ms"] == pytest.approx(ms_of(None), rel=0.01)
    assert len({one["ms"] for one in found["settings"]}) == 5


def test_a_limit_of_latency_is_kept_by_the_upper_end(run: Run, lut: Path) -> None:
    own = json.loads(run(*BUDGET, "--lut", lut, "--json")[1])["latency"]["plan"]["inference"]
    assert run(*BUDGET, "--lut", lut, "--latency", f"{own['high'] * 1.001}ms")[0] == 0
    code, out, err = run(*BUDGET, "--lut", lut, "--latency", f"{own['high'] * 0.999}ms")
    assert code == 3
    assert "a forward pass may take " in err
    assert "parameters" in out  # the plan is shown all the same
    code, _, err = run(*BUDGET, "--lut", lut, "--latency", f"{1000 * own['low'] * 0.99}us")
    assert code == 3
    assert "a forward pass takes " in err


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_table_of_another_device_is_refused_or_forced(name: str, run: Run, lut: Path) -> None:
    table = Table.load(lut)
    table.circumstances[name] = "another"
    table.save(lut)
    code, _, err = run(*BUDGET, "--lut", lut)
    assert code == 2
    assert f"latencies by {lut} are of {name} another, not " in err
    assert "--force" in err
    code, out, _ = run(*BUDGET, "--lut", lut, "--force")
    assert code == 0
    assert f"warning: latencies by {lut} are of {name} another" in out
    code, text, _ = run(*BUDGET, "--lut", lut, "--force", "--json")
    assert json.loads(text)["latency"]["warning"].startswith("latencies by ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--latency", "8ms"), "--latency: give --lut, a table by `kwsearch profile`, too"),
        (("--force",), "--force: give --lut"),
        (("--lut", "none.yaml"), "none.yaml: no such file; `kwsearch profile … -o none.yaml`"),
        (("--lut", "LUT", "--latency", "fast"), "not a time (got 'fast'; allowed milliseconds"),
        (("--lut", "LUT", "--dtype", "bfloat16"), "are of dtype float32, not bfloat16"),
        (("--lut", "LUT", "--device", "cuda"), "are of device cpu, not cuda"),
        (("--lut", "LUT", "--optimizer", "adamw"), "--optimizer: of the memory of a step; give"),
        (("--lut", "LUT", "--memory", "1GB", "--dtype", "bfloat16"), "ask for one at a time"),
    ],
)
def test_wrong_latencies(args: tuple[str, ...], message: str, run: Run, lut: Path) -> None:
    given = [str(lut) if arg == "LUT" else arg for arg in args]
    code, _, err = run(*BUDGET, *given)
    assert code == 2
    assert message in err


def test_a_table_that_lacks_a_kind_says_what_to_run(run: Run, lut: Path) -> None:
    code, _, err = run("budget", "deit_tiny", "--input", "3x32x32", "--ratio", "1", "--lut", lut)
    assert code == 2
    assert "the latency table has no " in err
    assert "`kwsearch profile MODEL -o` with the same file adds what is missing" in err


# optimize -----------------------------------------------------------------------------------


def limited(directory: Path, lut: Path, *more: str) -> test_optimize.optimize.PlanStudy:
    overrides = ("input=[3, 16, 16]", "budget={ratio: 1}", f"search.space.limits.lut={lut}", *more)
    return test_optimize.study(directory, *overrides)[0]


@pytest.mark.slow
def test_every_plan_of_a_search_keeps_the_limit_of_latency(lut: Path, tmp_path: Path) -> None:
    few = "search.trials=6"
    free = test_optimize.run(limited(tmp_path / "free", lut, few), test_optimize.score)
    times = {t.number: t.user_attrs["latency_ms"] for t in free.trials}
    assert len(set(times.values())) == 6
    by_plan = [t for t in free.trials if "groups" in t.user_attrs]
    network = test_optimize.network(free.recipe.model_dump_json())
    for trial in by_plan[:3]:
        plan = Plan.from_groups(network, trial.user_attrs["groups"])
        assert trial.user_attrs["latency_ms"] == pytest.approx(ms_of(plan), rel=0.02)
    # A limit that some of those plans break: none of the limited search does.
    space = limited(tmp_path / "x", lut)
    space._prepare()
    latency = space.budgets[0].space.latency
    assert latency is not None
    highest = [latency(Plan.from_groups(network, t.user_attrs["groups"])).high for t in by_plan]
    limit = sorted(highest)[len(highest) // 2]
    assert sum(high > limit for high in highest) >= 2
    found = test_optimize.run(
        limited(tmp_path / "limited", lut, f"search.space.limits.latency_ms={limit}", few),
        test_optimize.score,
    )
    plans = [t for t in found.trials if "groups" in t.user_attrs]
    assert len(plans) >= 5
    for trial in plans:
        assert latency(Plan.from_groups(network, trial.user_attrs["groups"])).high <= limit


@pytest.mark.slow
def test_a_dry_run_tells_the_latency(
    run: Run, lut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "format: 1\nmodel: resnet20\ninput: [3, 16, 16]\nbudget: {ratio: 1}\n"
        f"search: {{space: {{split: 1, limits: {{latency_ms: 99, lut: {lut}}}}}}}\n"
        "proxy: {epochs: 1, batch_size: 4, resolution: 8}\n"
    )
    plan = meet(trace_model("resnet20", SIZE), Target(1)).plan
    code, out, _ = run("optimize", recipe, "--dry-run")
    assert code == 0
    assert f"a forward pass of it: {ms_of(plan):.3g} ms, " in out
    assert "; search.space.limits.latency_ms is 99\n" in out
    code, text, _ = run("optimize", recipe, "--dry-run", "--json")
    assert json.loads(text)["latency_ms"][0] == pytest.approx(ms_of(plan), rel=1e-3)


def test_a_limit_that_no_plan_keeps_is_said_before_anything_is_trained(
    lut: Path, tmp_path: Path
) -> None:
    search = limited(tmp_path / "s", lut, "search.space.limits.latency_ms=0.01")
    with pytest.raises(ValueError, match=r"limits\.latency_ms 0\.01: at .* none is found"):
        test_optimize.run(search, test_optimize.score)


def test_a_forced_table_is_warned_of_in_the_result(lut: Path, tmp_path: Path) -> None:
    table = Table.load(lut)
    table.circumstances["cpu"] = "another"
    table.save(lut)
    with pytest.raises(ValueError, match="are of cpu another, not "):
        test_optimize.run(limited(tmp_path / "a", lut, "search.trials=2"), test_optimize.score)
    forced = limited(tmp_path / "b", lut, "search.trials=2", "search.space.limits.lut_force=true")
    result = test_optimize.run(forced, test_optimize.score)
    lines = test_optimize.study_report.result_lines(result)
    assert lines[0].startswith(f"warning: latencies by {lut} are of cpu another")
    assert "are of cpu another" in (tmp_path / "b" / "best.yaml").read_text()


def test_trials_and_the_best_recipe_show_milliseconds(lut: Path, tmp_path: Path) -> None:
    search = limited(tmp_path / "s", lut, "search.trials=3")
    result = test_optimize.run(search, test_optimize.score)
    table = test_optimize.study_report.trials_table(result.trials)
    assert "ms" in [column.header for column in table.columns]
    best = result.budgets[0].best
    assert best is not None
    ms = best.user_attrs["latency_ms"]
    assert f" MACs, {ms:.3g} ms." in (tmp_path / "s" / "best.yaml").read_text()
    assert test_optimize.study_report.result_json(result)["front"][0]["latency_ms"] > 0


def test_subjects_of_the_check_are_small_models_by_default() -> None:
    from kwsearch.cli.lut import CHECKED, CHECKED_SIZE

    names = [one.name for m in CHECKED for one in of_model(m, CHECKED_SIZE, ratios=(1,))]
    assert names == [f"{m}{end}" for m in CHECKED for end in ("", " b = 1")]
