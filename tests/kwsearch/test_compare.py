"""kwsearch compare: one budget, every method, exactly counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kwlayers import Plan, PlanError, trace
from kwsearch import cli, compare, zoo
from kwsearch.budget import Target
from kwsearch.memory import Memory
from kwsearch.recipe import parse_recipe
from kwsearch.resolve import network_of, outcome_of
from tests.zoo import ANYWHERE


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.run(["compare", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def found(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *args, "--json")
    assert code == 0
    data: dict[str, Any] = json.loads(out)
    return data


# As counted in the published implementations (see tests/data/dynamic_convs.json).
AS_PUBLISHED = {
    "condconv": 88_599_656,
    "dyconv": 45_239_348,
    "odconv": 11_943_944,
    "dcd": 14_703_332,
}


def test_without_a_target_each_method_is_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    data = found(capsys, "resnet18")
    totals = {entry["method"]: entry["params"]["total"] for entry in data["methods"]}
    assert list(totals) == list(ANYWHERE)
    assert totals["kernel_warehouse"] == 11_932_148  # ResNet18 1x of its paper
    assert AS_PUBLISHED.items() <= totals.items()
    assert data["unreachable"] == []
    assert data["target"] is None
    assert data["static"]["params"] == 11_689_512


def test_all_that_is_shown_adds_up_and_is_under_the_target(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = found(capsys, "resnet18", "--params", "12M")
    assert data["target"] == {"params": 12_000_000}
    reached = [entry["method"] for entry in data["methods"]]
    assert {"kernel_warehouse", "condconv", "dyconv", "odconv"} <= set(reached)
    for entry in data["methods"]:
        for parts in (entry["params"], entry["macs"]):
            assert sum(v for k, v in parts.items() if k != "total") == parts["total"]
        assert entry["deployed"] <= 12_000_000
        assert entry["deployed"] <= entry["params"]["total"]
        assert entry["deployed"] == entry["params"]["total"] or entry["method"] == "pad_net"
    others = {entry["method"]: entry["reason"] for entry in data["unreachable"]}
    assert set(reached) | set(others) == set(ANYWHERE)
    assert "below the floor of" in others["dcd"]


def test_a_method_is_offered_where_the_network_is_its_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = found(capsys, "dymn04")
    totals = {entry["method"]: entry["params"]["total"] for entry in data["methods"]}
    assert set(totals) == {*ANYWHERE, "dymn"}
    assert totals["dymn"] == 1_961_239  # as published
    _, out, _ = run(capsys, "resnet18", "--methods", "dymn,odconv")
    assert "DyMN: no layer can be converted" in out
    assert "dymn needs a block with a context" in out


def test_settings_are_without_the_sizes_that_the_budget_decides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = "odconv,fdconv,pad_net,kernel_dna"
    published = found(capsys, "resnet18", "--methods", names)
    under = found(capsys, "resnet18", "--params", "13M", "--methods", names)
    decided = {
        "odconv": {"num_kernels"},
        "fdconv": {"reduction"},
        "pad_net": {"dynamic_fraction"},
        "kernel_dna": set(),  # it has no use for so many
    }
    for one, other in zip(published["methods"], under["methods"], strict=True):
        assert set(one["settings"]) - set(other["settings"]) == decided[one["method"]]
        for entry in (one, other):
            said = {"format": 1, "model": "resnet18", "plan": {"groups": entry["groups"]}}
            recipe = parse_recipe(yaml.safe_dump(said))
            assert outcome_of(recipe, network_of(recipe)).plan.cost().deployed == entry["deployed"]


def test_a_method_that_cannot_use_the_budget_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        "resnet20",
        "--input",
        "1x28x28",
        "--total-ratio",
        "2",
        "--methods",
        "kernel_dna,odconv",
    )
    _, out, _ = run(capsys, *args)
    assert "KernelDNA: has use for 185,662 of the 544,372 parameters only" in out
    assert "ODConv: has use" not in out


def test_a_ratio_is_kernels_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    data = found(capsys, "resnet18", "--ratio", "4", "--methods", "odconv,dyconv,dcd")
    assert {e["method"]: e["params"]["total"] for e in data["methods"]} == {
        "odconv": 44_901_640,  # the published 4x
        "dyconv": 45_239_348,
    }
    (other,) = data["unreachable"]
    assert other["method"] == "dcd"
    assert "--params" in other["reason"] or "params" in other["reason"]


def test_the_table_has_a_line_for_each_method_and_says_what_is_out_of_reach(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "resnet20", "--total-ratio", "0.5")
    assert code == 0
    assert out.startswith("resnet20 at 3x32x32, at most 0.5 x the static parameters\n")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    (ours,) = (line for line in lines if line[0] == "KernelWarehouse")
    (static,) = (line for line in lines if line[0] == "static")
    assert static[1] == "272,474"
    assert int(ours[5].replace(",", "")) <= 136_237
    assert any(line[0] == "CondConv:" and "floor" in line for line in lines)


def test_nothing_that_meets_the_target_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "resnet20", "--params", "1000", "--methods", "odconv")
    assert code == 3
    assert "ODConv: params 1,000: below the floor" in out
    assert err == "Error: no method meets the target\n"


def test_the_memory_of_a_training_step_is_shown_with_a_batch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ("resnet20", "--total-ratio", "2", "--methods", "kernel_warehouse")
    data = found(capsys, *args, "--batch", "8")
    assert data["static"]["train_memory"] > 4 * 3 * 272_474  # weights, gradients, momentum
    for entry in data["methods"]:
        assert entry["train_memory"] > data["static"]["train_memory"]
    code, out, _ = run(capsys, *args[:-1], "odconv", "--batch", "2")
    assert code == 0
    assert "memory" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("resnet18", "--methods", "odcon"), "'odcon' is not one of"),
        (("resnet19",), "unknown model 'resnet19'"),
        (("resnet18", "--ratio", "1", "--params", "1M"), "one target at a time"),
        (("resnet18", "--latency", "8ms"), "--latency: a limit of `kwsearch budget`"),
        (("resnet18", "--memory", "1GB"), "--memory: a limit of `kwsearch budget`"),
        (("resnet18", "--batch", "8", "--inference"), "memory is that of training"),
    ],
)
def test_wrong_input_is_one_message(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_recipe_gives_the_model_and_the_budget(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("format: 1\nmodel: resnet20\ninput: [1, 28, 28]\nbudget: {params: 400k}\n")
    data = found(capsys, str(path), "--methods", "kernel_warehouse,odconv")
    assert data["input"] == [1, 28, 28]
    assert data["target"] == {"params": 400_000}
    assert len(data["methods"]) == 2


def test_sizes_are_told_in_words() -> None:
    with torch.device("meta"):
        network = trace(zoo.create("resnet20"), (3, 32, 32))
    entries = compare.compare(network, Target(total_ratio=1.5), ["kernel_warehouse", "odconv"])
    assert entries[0].sizes.endswith(" cells")
    assert entries[1].sizes.startswith("K = 1 to ")


def test_a_method_whose_step_cannot_run_leaves_the_others() -> None:
    with torch.device("meta"):
        network = trace(zoo.create("resnet20"), (3, 32, 32))

    def memory(plan: Plan) -> Memory:
        if plan.groups[0].method == "dyconv":
            raise PlanError("a step of 1 images cannot run: why")
        return Memory(1, 2, 3, 4, 5, 6, 7, 8)

    entries = compare.compare(network, Target(), ["dyconv", "odconv"], memory=memory)
    assert [entry.memory is None for entry in entries] == [True, False]
    why = ["DY-Conv: no memory: a step of 1 images cannot run: why"]
    assert compare.reasons(entries) == why
    static = Memory(1, 2, 3, 4, 5, 6, 7, 8)
    table, said = compare.table(entries, network, static)
    assert (table.row_count, said) == (3, why)
    assert [e["train_memory"] for e in compare.to_json(entries)["methods"]] == [None, 36]


def test_of_a_recipe_only_the_model_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its own plan could not be made anew: its groups have ratios of their own."""
    recipe = Path(__file__).parents[2] / "recipes" / "kw_mobilenetv2_100_0.5x.yaml"
    args = ("--total-ratio", "2", "--methods", "odconv", "--json")
    code, out, _ = run(capsys, str(recipe), *args)
    assert code == 0
    _, plain, _ = run(capsys, "mobilenetv2_100", *args)
    assert json.loads(out)["methods"] == json.loads(plain)["methods"]
