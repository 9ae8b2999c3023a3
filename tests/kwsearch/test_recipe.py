"""Recipes: what is accepted, what is said about what is not, and writing."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kwlayers.fields import allowed_of
from kwlayers.methods import NAMES, find
from kwsearch.recipe import (
    Budget,
    Method,
    ModelChoice,
    Proxy,
    Recipe,
    RecipeError,
    RecipeGroup,
    Search,
    Space,
    Training,
    dump_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    write_recipe,
)
from kwsearch.recipe.tree import override_, read_yaml

HEAD = "format: 1\nmodel: resnet50\nbudget: {ratio: 0.5}\n"

FULL = """\
format: 1
model: {name: resnet50, num_classes: 10}
input: [3, 224, 224]
method:
  name: kernel_warehouse
  cell_ratio: [1, 0.5]
  sharing: {early: [layer1.*, "0"], late: ["layer[34].*"]}
  reduction: 0.125
  basis_ratio: 0.5
  spatial_partition: false
  norm: layer
budget: {params: 12.8M}
plan:
  groups:
    - {method: kernel_warehouse, name: stage0_conv, cell: [32, 32, 1, 1], num_cells: 174,
       ratio: 0.5, reduction: 0.0625, basis_ratio: 0.0625, norm: batch,
       layers: [layer1.0.conv2, "layer1.[12].*"]}
    - {name: fc, cell: [8, 8, 1], num_cells: 1, ratio: null, layers: [fc]}
search:
  trials: 7
  timeout: 1.5e3
  seed: 3
  sampler: random
  pruner: halving
  space: {split: 1, tolerance: 0.02, cell_ratio: [[1, 1], 0.5], sharing: [stage, layer],
          sharing_by_stage: true, reduction: [0.0625], basis_ratio: [1],
          spatial_partition: [true, false], keep_static: [[], ["layer4.*", fc]],
          temperature_epochs: [0, 3], limits: {macs: 1.8G}}
proxy: {data: ./images, resolution: 4, epochs: 3, subset: 100, holdout: 0.5, batch_size: 1,
        optimizer: adamw, lr: 1e-3, momentum: 0, weight_decay: 0, temperature_epochs: 3,
        augment: flip, threads: 2, device: cpu}
training: {epochs: 100, temperature_epochs: 0, batch_size: 256, optimizer: lamb, lr: 0.1,
           weight_decay: 2e-5, note: "as published"}
provenance: {found_by: [kwsearch, {version: 0.1}], date: 2024-01-01, accuracy: 1.0, notes: null}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "r.yaml", overrides)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return list(raised.value.problems)


def test_keys_of_an_unknown_method_are_not_judged_by_those_of_another() -> None:
    """Only the name is wrong: what else it may have, nobody knows."""
    for section in (
        "method: {name: odcov, num_kernels: 4}\nbudget: {ratio: 4}\n",
        "plan: {groups: [{method: odcov, name: a, num_kernels: 4, layers: [layer1.0.conv1]}]}\n",
    ):
        (one,) = problems("format: 1\nmodel: resnet20\n" + section)
        assert "unknown value, did you mean 'odconv'? (got 'odcov'; allowed " in one


# What is accepted


def test_every_key_is_read_as_written() -> None:
    recipe = parse_recipe(FULL)
    assert recipe == Recipe(
        format=1,
        model=ModelChoice(name="resnet50", num_classes=10),
        input=(3, 224, 224),
        method=Method(
            cell_ratio=(1, 0.5),
            sharing={"early": ("layer1.*", "0"), "late": ("layer[34].*",)},
            reduction=0.125,
            basis_ratio=0.5,
            spatial_partition=False,
            norm="layer",
        ),
        budget=Budget(params=12_800_000),
        plan={  # type: ignore[arg-type]
            "groups": (
                RecipeGroup(
                    name="stage0_conv",
                    cell=(32, 32, 1, 1),
                    num_cells=174,
                    ratio=0.5,
                    basis_ratio=0.0625,
                    layers=("layer1.0.conv2", "layer1.[12].*"),
                ),
                RecipeGroup(name="fc", cell=(8, 8, 1), num_cells=1, layers=("fc",)),
            )
        },
        search=Search(
            trials=7,
            timeout=1500,
            seed=3,
            sampler="random",
            pruner="halving",
            space=Space(
                split=1,
                tolerance=0.02,
                cell_ratio=((1, 1), (0.5, 0.5)),
                sharing=("stage", "layer"),
                sharing_by_stage=True,
                reduction=(0.0625,),
                basis_ratio=(1,),
                spatial_partition=(True, False),
                keep_static=((), ("layer4.*", "fc")),
                temperature_epochs=(0, 3),
                limits={"macs": 1_800_000_000},
            ),
        ),
        proxy=Proxy(
            data="./images",
            resolution=4,
            epochs=3,
            subset=100,
            holdout=0.5,
            batch_size=1,
            optimizer="adamw",
            lr=0.001,
            momentum=0,
            weight_decay=0,
            temperature_epochs=3,
            augment="flip",
            threads=2,
            device="cpu",
        ),
        training=Training(
            epochs=100,
            temperature_epochs=0,
            batch_size=256,
            optimizer="lamb",
            lr=0.1,
            weight_decay=2e-5,
            note="as published",
        ),
        provenance={
            "found_by": ["kwsearch", {"version": 0.1}],
            "date": "2024-01-01",
            "accuracy": 1.0,
            "notes": None,
        },
    )


def test_what_is_left_out_has_the_documented_default() -> None:
    recipe = parse_recipe(HEAD + "search: {}\nproxy: {}\ntraining: {}\n")
    assert recipe.model_dump() == {
        "format": 1,
        "model": {"name": "resnet50", "num_classes": None},
        "input": None,
        "method": {
            "name": "kernel_warehouse",
            "cell_ratio": (1.0, 1.0),
            "sharing": "stage",
            "reduction": 0.0625,
            "basis_ratio": 1.0,
            "spatial_partition": True,
            "norm": "auto",
            "rules": (),
        },
        "budget": {"ratio": 0.5, "params": None, "total_ratio": None},
        "plan": None,
        "micronas": None,
        "search": {
            "trials": 40,
            "budgets": (),
            "timeout": None,
            "seed": 0,
            "strategy": "sampler",
            # As published: section 3.4 of the specification.
            "supernet": {
                "epochs": 100,
                "batch_size": 64,
                "lr": 1e-3,
                "logit_lr": 0.36,
                "last_logit_lr": 8e-4,
                "clip": 5.0,
                "temperature": 1.0,
                "decay": 0.995,
                "last_temperature": 1e-5,
                "above": 4.0,
                "below": 0.002,
            },
            "sampler": "tpe",
            "startup": 8,
            "pruner": "halving",
            "eta": 3,
            "rungs": (),
            "calibration": 6,
            "rung_tau": 0.3,
            "zero_cost": None,
            "repeat": False,
            "finalists": 3,
            "seeds": 3,
            "workers": 1,
            "executor": "local",
            "resources": {"cpus": None, "gpus": None},
            "checkpoints": None,
            "deterministic": False,
            "space": {
                "split": 2.0,
                "tolerance": 0.01,
                "cell_ratio": (),
                "sharing": (),
                "sharing_by_stage": False,
                "reduction": (),
                "basis_ratio": (),
                "spatial_partition": (),
                "method": (),
                "methods": {},
                "keep_static": (),
                "temperature_epochs": (),
                "limits": {
                    "macs": None,
                    "train_memory": None,
                    "latency_ms": None,
                    "lut": None,
                    "peak_memory": None,
                    "flash": None,
                    "latency_batch": 1,
                    "lut_force": False,
                },
            },
        },
        "proxy": {
            "data": "digits",
            "resolution": None,
            "fold": None,
            "epochs": 5,
            "subset": None,
            "holdout": 0.2,
            "batch_size": 64,
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0005,
            "temperature_epochs": 1,
            "augment": "none",
            "mixup": None,
            "threads": None,
            "device": "auto",
            "init": "scratch",
            "init_epochs": None,
            "taps": {"conv1d": {"weight": 1.0, "final_weight": None, "distillation": 0.0}},
            "teacher": None,
            "teacher_weight": 0.9,
        },
        "training": {
            "epochs": 300,
            "temperature_epochs": None,
            "batch_size": None,
            "optimizer": None,
            "lr": None,
            "weight_decay": None,
            "note": None,
        },
        "provenance": {},
    }


def test_sections_that_are_absent_or_null_are_none() -> None:
    recipe = parse_recipe(HEAD + "search:\nproxy: null\n")
    assert (recipe.plan, recipe.search, recipe.proxy, recipe.training) == (None,) * 4


def test_a_plan_can_stand_without_a_budget() -> None:
    recipe = parse_recipe("format: 1\nmodel: m\nplan: {groups: []}\n")
    assert recipe.budget is None
    assert recipe.plan is not None
    assert recipe.plan.groups == ()


# What is written, and what the parsed recipe's attribute is.
SHORTHANDS = [
    ("model: timm:resnet50", "model.name", "timm:resnet50"),
    ("input: 3x32x48", "input", (3, 32, 48)),
    ("input: 32", "input", (3, 32, 32)),
    ("method: {cell_ratio: 0.5}", "method.cell_ratio", (0.5, 0.5)),
    ("method: {cell_ratio: [0.5, 1]}", "method.cell_ratio", (0.5, 1.0)),
    ("method: {sharing: position}", "method.sharing", "position"),
    ("budget: {params: 12.8M}", "budget.params", 12_800_000),
    ("budget: {params: 12_800_000}", "budget.params", 12_800_000),
    ("budget: {params: 1e6}", "budget.params", 1_000_000),
    ("budget: {params: '12,800,000'}", "budget.params", 12_800_000),
    ("budget: {total_ratio: 0.5x}", "budget.total_ratio", 0.5),
    ("budget: {total_ratio: 1/2}", "budget.total_ratio", 0.5),
    ("budget: {ratio: 2}", "budget.ratio", 2.0),
    ("budget: {ratio: null, params: 3}", "budget.params", 3),
    ("proxy: {lr: 1e-3}", "proxy.lr", 0.001),
    ("proxy: {epochs: 1e1}", "proxy.epochs", 10),
    ("proxy: {threads: 0x10}", "proxy.threads", 16),
    ("proxy: {threads: 0o10}", "proxy.threads", 8),
    ("proxy: {threads: 010}", "proxy.threads", 10),
    ("proxy: {lr: +.5}", "proxy.lr", 0.5),
    ("training: {note: no}", "training.note", "no"),
    ("training: {note: 12:30}", "training.note", "12:30"),
    ("training: {note: 2024-01-01}", "training.note", "2024-01-01"),
    ("training: {note: !!str 5}", "training.note", "5"),
    ("format: 1.0", "format", 1),
]


@pytest.mark.parametrize(("line", "path", "value"), SHORTHANDS)
def test_shorthands_and_yaml_1_2_scalars_mean_what_they_say(
    line: str, path: str, value: Any
) -> None:
    found: Any = parse_recipe(with_line(line))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def with_line(line: str) -> str:
    """HEAD with `line` in the place of what it replaces."""
    key = line.partition(":")[0]
    kept = [one for one in HEAD.splitlines() if not one.startswith(f"{key}:")]
    return "\n".join([*kept, line, ""])


def test_characters_that_json_writes_as_two_escapes_are_one() -> None:
    text = 'format: 1\nmodel: "\\ud83d\\ude00"\nbudget: {ratio: 1}\nprovenance: {"\\u00e9": é}\n'
    recipe = parse_recipe(text)
    assert recipe.model.name == "\U0001f600"
    assert recipe.provenance == {"é": "é"}


def test_anchors_are_plain_data() -> None:
    text = HEAD + "provenance: {a: &x [1, {b: 2}], c: *x}\n"
    recipe = parse_recipe(text, overrides=["provenance.c.1.b=3"])
    assert recipe.provenance == {"a": [1, {"b": 2}], "c": [1, {"b": 3}]}


# Problems: one line each, at the place of the value


# A line put at line 4 of a recipe, and all that is wrong with it.
WRONG_VALUES = [
    # missing, unknown
    (
        "proxxy: {}",
        "r.yaml:4:1: proxxy: unknown key, did you mean 'proxy'? (allowed format, model, input, "
        "method, budget, plan, micronas, search, proxy, training, provenance)",
    ),
    (
        "search: {space: {splitt: 2}}",
        "r.yaml:4:18: search.space.splitt: unknown key, did you mean 'split'? "
        "(allowed split, tolerance, cell_ratio, sharing, sharing_by_stage, reduction, "
        "basis_ratio, spatial_partition, method, methods, keep_static, temperature_epochs, "
        "limits)",
    ),
    (
        "plan: {}",
        "r.yaml:4:7: plan.groups: missing (the warehouses, "
     "or what else becomes dynamic together; allowed a list of a mapping with keys "
        "method, name, cell, num_cells, ratio, reduction, basis_ratio, norm, layers)",
    ),
    (
        "plan: {groups: [{name: a, cell: [1, 1, 1], layers: [b]}]}",
        "r.yaml:4:17: plan.groups.0.num_cells: missing (cells in the warehouse; "
        "allowed a whole number >= 1)",
    ),
    # kinds
    ("method: null", "r.yaml:4:9: method: not a mapping (got null; allowed a mapping with keys "
     "name, cell_ratio, sharing, reduction, basis_ratio, spatial_partition, norm, rules)"),
    ("provenance: [1]", "r.yaml:4:13: provenance: not a mapping (got [1]; allowed a mapping of "
     "names to finite numbers and text)"),
    ("training: {note: 5}", "r.yaml:4:18: training.note: not text, put it in quotes (got 5; "
     "allowed text, or null)"),
    ("training: {note: [5]}", "r.yaml:4:18: training.note: not text (got [5]; "
     "allowed text, or null)"),
    ("method: {spatial_partition: yes}", "r.yaml:4:29: method.spatial_partition: not true or false "
     "(got 'yes'; allowed true or false)"),
    ("method: {spatial_partition: 1}", "r.yaml:4:29: method.spatial_partition: not true or false "
     "(got 1; allowed true or false)"),
    # numbers
    ("method: {reduction: 0}", "r.yaml:4:21: method.reduction: too small (got 0; "
     "allowed a number > 0 and <= 1)"),
    ("method: {basis_ratio: 1.5}", "r.yaml:4:23: method.basis_ratio: too large (got 1.5; "
     "allowed a number > 0 and <= 1)"),
    ("method: {reduction: true}", "r.yaml:4:21: method.reduction: not a number (got true; "
     "allowed a number > 0 and <= 1)"),
    ("method: {reduction: '0.5'}", "r.yaml:4:21: method.reduction: not a number (got '0.5'; "
     "allowed a number > 0 and <= 1)"),
    ("method: {reduction: .nan}", "r.yaml:4:21: method.reduction: not a finite number (got NaN; "
     "allowed a number > 0 and <= 1)"),
    ("search: {timeout: 1e999}", "r.yaml:4:19: search.timeout: not a finite number (got Infinity; "
     "allowed a number > 0, or null)"),
    ("search: {timeout: 0}", "r.yaml:4:19: search.timeout: too small (got 0; "
     "allowed a number > 0, or null)"),
    ("search: {trials: 0}", "r.yaml:4:18: search.trials: too small (got 0; "
     "allowed a whole number >= 1)"),
    ("search: {trials: true}", "r.yaml:4:18: search.trials: not a whole number (got true; "
     "allowed a whole number >= 1)"),
    ("search: {trials: '7'}", "r.yaml:4:18: search.trials: not a whole number (got '7'; "
     "allowed a whole number >= 1)"),
    ("search: {trials: 7.5}", "r.yaml:4:18: search.trials: not a whole number (got 7.5; "
     "allowed a whole number >= 1)"),
    ("search: {trials: null}", "r.yaml:4:18: search.trials: not a whole number (got null; "
     "allowed a whole number >= 1)"),
    ("search: {seed: 4294967296}", "r.yaml:4:16: search.seed: too large (got 4294967296; "
     "allowed a whole number >= 0 and <= 4294967295)"),
    ("search: {space: {split: 0.5}}", "r.yaml:4:25: search.space.split: too small (got 0.5; "
     "allowed a number >= 1)"),
    ("proxy: {resolution: 3}", "r.yaml:4:21: proxy.resolution: too small (got 3; "
     "allowed a whole number >= 4, or null)"),
    ("proxy: {holdout: 1}", "r.yaml:4:18: proxy.holdout: too large (got 1; "
     "allowed a number > 0 and < 1)"),
    ("proxy: {momentum: -0.1}", "r.yaml:4:19: proxy.momentum: too small (got -0.1; "
     "allowed a number >= 0 and < 1)"),
    ("proxy: {lr: 0}", "r.yaml:4:13: proxy.lr: too small (got 0; allowed a number > 0)"),
    ("proxy: {epochs: 0x}", "r.yaml:4:17: proxy.epochs: not a whole number (got '0x'; "
     "allowed a whole number >= 1)"),
    # words
    ("search: {sampler: tpee}", "r.yaml:4:19: search.sampler: unknown value, did you mean 'tpe'? "
     "(got 'tpee'; allowed tpe, gp, nsgaii or random)"),
    ("search: {pruner: null}", "r.yaml:4:18: search.pruner: unknown value (got null; "
     "allowed halving, median or none)"),
    ("proxy: {device: gpu}", "r.yaml:4:17: proxy.device: unknown value, did you mean 'cpu'? "
     "(got 'gpu'; allowed auto, cpu or cuda)"),
    ("method: {name: condcov}", "r.yaml:4:16: method.name: unknown value, did you mean 'condconv'? "
     f"(got 'condcov'; allowed {', or '.join(NAMES)})"),
    ("method: {name: dyconv, num_kernels: 0}", "r.yaml:4:37: method.num_kernels: too small "
     "(got 0; allowed a whole number >= 1)"),
    ("method: {name: dyconv, cell_ratio: 1}", "r.yaml:4:24: method.cell_ratio: unknown key "
     "(allowed name, num_kernels, reduction, max_temperature, rules)"),
    ("proxy: {data: ''}", "r.yaml:4:15: proxy.data: empty (got ''; "
     "allowed text that is not empty)"),
    # cell ratios
    ("method: {cell_ratio: 2}", "r.yaml:4:22: method.cell_ratio: too large (got 2; "
     "allowed a number > 0 and <= 1, or a list of 2 numbers > 0 and <= 1)"),
    ("method: {cell_ratio: [1, 2]}", "r.yaml:4:26: method.cell_ratio.1: too large (got 2; "
     "allowed a number > 0 and <= 1)"),
    ("method: {cell_ratio: [1]}", "r.yaml:4:22: method.cell_ratio: not a number or a pair of "
     "numbers (got [1]; allowed a number > 0 and <= 1, or a list of 2 numbers > 0 and <= 1)"),
    ("search: {space: {cell_ratio: [1, [1, 1]]}}", "r.yaml:4:34: search.space.cell_ratio.1: given "
     "twice (got [1, 1]; allowed a number > 0 and <= 1, or a list of 2 numbers > 0 and <= 1)"),
    ("search: {space: {reduction: 0.5}}", "r.yaml:4:29: search.space.reduction: not a list "
     "(got 0.5; allowed a list of numbers > 0 and <= 1)"),
    # sharing
    ("method: {sharing: stages}", "r.yaml:4:19: method.sharing: unknown value, did you mean "
     "'stage'? (got 'stages'; allowed stage, position or layer, or a mapping of names to "
     "a list of 1 or more text that is not empty)"),
    ("method: {sharing: {a b: [x]}}", "r.yaml:4:20: method.sharing.a b: not a name (got 'a b'; "
     "allowed letters, digits and underscores)"),
    ("method: {sharing: {a: []}}", "r.yaml:4:23: method.sharing.a: too few values (got []; "
     "allowed a list of 1 or more text that is not empty)"),
    ("method: {sharing: {a: x}}", "r.yaml:4:23: method.sharing.a: not a list (got 'x'; "
     "allowed a list of 1 or more text that is not empty)"),
    ("method: {sharing: {a: [x, 0]}}", "r.yaml:4:27: method.sharing.a.1: not text, put it in "
     "quotes (got 0; allowed text that is not empty)"),
    ("search: {space: {sharing: [{a: [x]}]}}", "r.yaml:4:28: search.space.sharing.0: unknown value "
     "(got {\"a\": [\"x\"]}; allowed stage, position or layer)"),
    ("search: {space: {keep_static: [fc]}}", "r.yaml:4:32: search.space.keep_static.0: not a list "
     "(got 'fc'; allowed a list of text that is not empty)"),
    ("search: {space: {tolerance: 1}}", "r.yaml:4:29: search.space.tolerance: too large (got 1; "
     "allowed a number > 0 and < 1)"),
    ("search: {space: {limits: {macs: 0}}}", "r.yaml:4:33: search.space.limits.macs: not a count "
     "(got 0; allowed a whole number, at least 1, that may end in k, M, G or B, e.g. 12.8M)"),
    ("search: {space: {sharing: [layer, stage, layer]}}", "r.yaml:4:42: search.space.sharing.2: "
     "given twice (got 'layer'; allowed stage, position or layer)"),
    # what the values have to do with each other
    ("proxy: {epochs: 2, temperature_epochs: 3}", "r.yaml:4:40: proxy.temperature_epochs: more "
     "than there are epochs (got 3; allowed 0 to 2, all the epochs)"),
    ("training: {epochs: 10, temperature_epochs: 20}", "r.yaml:4:44: training.temperature_epochs: "
     "more than there are epochs (got 20; allowed 0 to 10, all the epochs)"),
    # units
    ("input: 3x", "r.yaml:4:8: input: not an input size (got '3x'; allowed channels and one to "
     "three sizes, each at least 1, e.g. 3x224x224, [3, 224, 224] or 224, 1x16000, 3x16x112x112)"),
    # groups
    ("plan: {groups: [{name: a.b, cell: [1, 1, 1], num_cells: 1, layers: [b]}]}",
     "r.yaml:4:24: plan.groups.0.name: not a name (got 'a.b'; "
     "allowed letters, digits and underscores)"),
    ("plan: {groups: [{name: a, cell: [1, 1], num_cells: 1, layers: [b]}]}",
     "r.yaml:4:33: plan.groups.0.cell: too few values (got [1, 1]; "
     "allowed a list of 3 to 5 whole numbers >= 1)"),
    ("plan: {groups: [{name: a, cell: [1, 1, 1, 1, 1, 1], num_cells: 1, layers: [b]}]}",
     "r.yaml:4:33: plan.groups.0.cell: too many values (got [1, 1, 1, 1, 1, 1]; "
     "allowed a list of 3 to 5 whole numbers >= 1)"),
    ("plan: {groups: [{name: a, cell: [1, 0, 1], num_cells: 1, layers: [b]}]}",
     "r.yaml:4:37: plan.groups.0.cell.1: too small (got 0; allowed a whole number >= 1)"),
    ("plan: {groups: [{name: a, cell: [1, 1, 1], num_cells: 1, norm: auto, layers: [b]}]}",
     "r.yaml:4:64: plan.groups.0.norm: unknown value (got 'auto'; allowed batch or layer)"),
    ("plan: {groups: [{name: a, cell: [1, 1, 1], num_cells: 1, layers: []}]}",
     "r.yaml:4:66: plan.groups.0.layers: too few values (got []; "
     "allowed a list of 1 or more text that is not empty)"),
    ("plan: {groups: [{name: a, cell: [1, 1, 1], num_cells: 1, layers: ['']}]}",
     "r.yaml:4:67: plan.groups.0.layers.0: empty (got ''; allowed text that is not empty)"),
    ("plan: {groups: [{name: a, cell: [1, 1, 1], num_cells: 1, layers: [b]}, "
     "{name: a, cell: [1, 1, 1], num_cells: 1, layers: [c]}]}",
     "r.yaml:4:79: plan.groups.1.name: the name of another group (got 'a'; "
     "allowed letters, digits and underscores)"),
    # plain data
    ("provenance: {a: {b: [1, .inf]}}", "r.yaml:4:25: provenance.a.b.1: not a finite number "
     "(got Infinity; allowed finite numbers and text)"),
    ("training: {note: !!python/name:os.system x}", "r.yaml:4:18: training.note: not plain data "
     "(got the tag '!!python/name:os.system'; allowed text, numbers, true, false, null, lists and "
     "mappings)"),
    ("plan: !!python/object/apply:os.system [ls]", "r.yaml:4:7: plan: not plain data (got the tag "
     "'!!python/object/apply:os.system'; allowed text, numbers, true, false, null, lists and "
     "mappings)"),
    ("provenance: {a: !!binary aGk=}", "r.yaml:4:17: provenance.a: not plain data (got the tag "
     "'!!binary'; allowed text, numbers, true, false, null, lists and mappings)"),
    ("provenance: {a: !!int x}", "r.yaml:4:17: provenance.a: not a YAML !!int (got 'x')"),
    ("provenance: {1: x}", "r.yaml:4:14: provenance: a key is not text (got '1' without quotes; "
     "put it in quotes)"),
    ("provenance: {[1]: x}", "r.yaml:4:14: provenance: a key is not text "
     "(got a list or a mapping)"),
    ("proxy: {lr: 1, epochs: 5, lr: 2}", "r.yaml:4:27: proxy.lr: key given twice "
     "(first at line 4)"),
    (f"search: {{trials: {'9' * 1001}}}", "r.yaml:4:18: search.trials: a number of 1001 digits "
     "(allowed at most 1000)"),
    ('training: {note: "\\ud83d"}', "r.yaml:4:18: training.note: not Unicode text (got '\\ud83d')"),
    ('provenance: {"\\ude00": 1}', "r.yaml:4:14: provenance: a key is not Unicode text "
     "(got '\\ude00')"),
    ("provenance: {a: &a {b: *a}}", "r.yaml:4:17: not valid YAML (contains itself)"),
    ("search: {workers: many}", "r.yaml:4:19: search.workers: not a whole number or auto "
     "(got 'many'; allowed a whole number >= 1, or auto)"),
    ("search: {workers: 0}", "r.yaml:4:19: search.workers: not a whole number or auto "
     "(got 0; allowed a whole number >= 1, or auto)"),
    ("search: {budgets: [1, half]}", "r.yaml:4:23: search.budgets.1: not a budget (got 'half'; "
     "allowed a ratio, e.g. 0.5 or 0.5x, or a count, e.g. 12.8M)"),
    ("search: {budgets: [0.5, 1/2]}", "r.yaml:4:25: search.budgets.1: given twice (got '1/2'; "
     "allowed a number > 0, or text like 0.5x, or text like 12.8M)"),
    ("search: {zero_cost: synflo}", "r.yaml:4:21: search.zero_cost: unknown value, did you mean "
     "'synflow'? (got 'synflo'; allowed grad_norm, synflow or jacob_cov, or null)"),
    ("search: {space: {limits: {train_memory: 12G}}}", "r.yaml:4:41: "
     "search.space.limits.train_memory: not an amount of memory (got '12G'; allowed whole bytes "
     "or a number with kB, MB, GB, KiB, MiB or GiB, e.g. 500MB)"),
    ('"a\\nb": 1', "r.yaml:4:1: a\\nb: unknown key (allowed format, model, input, method, budget, "
     "plan, micronas, search, proxy, training, provenance)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), WRONG_VALUES, ids=[w[0][:60] for w in WRONG_VALUES])
def test_a_wrong_value_is_named_with_its_place_and_what_is_allowed(
    line: str, expected: str
) -> None:
    assert problems(HEAD + line + "\n") == [expected]


# Lines that replace one of HEAD; with_line puts it at line 3.
WRONG_NEEDED = [
    ("format: 2", "r.yaml:3:9: format: unknown value (got 2; allowed 1)"),
    ("format: true", "r.yaml:3:9: format: unknown value (got true; allowed 1)"),
    ("model: 3", "r.yaml:3:8: model: not a mapping (got 3; allowed text that is not empty, "
     "or a mapping with keys name, num_classes)"),
    ("model: ''", "r.yaml:3:8: model: empty (got ''; allowed text that is not empty, "
     "or a mapping with keys name, num_classes)"),
    ("model: {}", "r.yaml:3:8: model.name: missing (name of the network, e.g. resnet50, "
     "timm:NAME, torchvision:NAME or your own package.module:function; allowed text that is not "
     "empty)"),
    ("model: {name: a, num_classes: 0}", "r.yaml:3:31: model.num_classes: too small (got 0; "
     "allowed a whole number >= 1, or null)"),
    ("budget: null", "r.yaml:1:1: no budget and no plan (allowed either or both, "
     "e.g. budget: {ratio: 0.5})"),
    ("budget: {}", "r.yaml:3:9: budget: not one target (got none; allowed exactly one of ratio, "
     "params, total_ratio, e.g. ratio: 0.5)"),
    ("budget: {ratio: 1, total_ratio: 2}", "r.yaml:3:9: budget: not one target (got ratio and "
     "total_ratio; allowed exactly one of ratio, params, total_ratio, e.g. ratio: 0.5)"),
    ("budget: {ratio: 0}", "r.yaml:3:17: budget.ratio: not a ratio (got 0; allowed a finite number "
     "above 0 or a fraction, e.g. 0.5, 0.5x or 1/2)"),
    ("budget: {total_ratio: half}", "r.yaml:3:23: budget.total_ratio: not a ratio (got 'half'; "
     "allowed a finite number above 0 or a fraction, e.g. 0.5, 0.5x or 1/2)"),
    ("budget: {params: 1.5}", "r.yaml:3:18: budget.params: not a count (got 1.5; allowed a whole "
     "number, at least 1, that may end in k, M, G or B, e.g. 12.8M)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), WRONG_NEEDED, ids=[w[0] for w in WRONG_NEEDED])
def test_a_wrong_value_of_what_every_recipe_needs_is_named(line: str, expected: str) -> None:
    assert problems(with_line(line)) == [expected]


def test_a_recipe_of_nothing_is_told_everything_it_needs() -> None:
    assert problems("# header\n\n  {}\n") == [
        "r.yaml:3:3: format: missing (version of the recipe format; allowed 1)",
        "r.yaml:3:3: model: missing (the network: a name, or {name, num_classes}; "
        "allowed text that is not empty, or a mapping with keys name, num_classes)",
        "r.yaml:3:3: no budget and no plan (allowed either or both, e.g. budget: {ratio: 0.5})",
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file_with_overrides_last() -> None:
    text = """\
format: 1
model: resnet50
proxy:
  epoch: 3
  lr: !!python/tuple [1]
  lr: 2
search:
  trials: 0
  space:
    reduction: [0.5, 2]
budget:
  ratio: -1
  params: 3
"""
    found = problems(text, "search.seed=-1", "nonsense", "proxy.subset=0")
    assert [line.partition(" (")[0] for line in found] == [
        "r.yaml:4:3: proxy.epoch: unknown key, did you mean 'epochs'?",
        "r.yaml:5:7: proxy.lr: not plain data",
        "r.yaml:6:3: proxy.lr: key given twice",
        "r.yaml:8:11: search.trials: too small",
        "r.yaml:10:22: search.space.reduction.1: too large",
        "r.yaml:12:3: budget: not one target",
        "r.yaml:12:10: budget.ratio: not a ratio",
        "override 'nonsense': not KEY=VALUE",
        "override 'search.seed=-1': search.seed: too small",
        "override 'proxy.subset=0': proxy.subset: too small",
    ]


def test_a_recipe_error_survives_pickling() -> None:
    error = RecipeError(["a: b", "c: d", "a: b"])
    assert error.problems == ("a: b", "c: d")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems) == ("a: b\nc: d", ("a: b", "c: d"))


def test_long_values_are_shortened() -> None:
    found = problems(HEAD + f"proxy: {{device: {'x' * 500}}}\n")
    assert found == [
        f"r.yaml:4:17: proxy.device: unknown value (got '{'x' * 56}...; allowed auto, cpu or cuda)"
    ]


# Text that is no recipe at all


NO_RECIPE = [
    ("", "r.yaml: empty; a recipe has at least format, model, and a budget or a plan"),
    ("# only words\n", "r.yaml: empty; a recipe has at least format, model, and a budget or a "
     "plan"),
    ("---\nnull\n", "r.yaml: empty; a recipe has at least format, model, and a budget or a plan"),
    ("\n- 1\n", "r.yaml:2:1: not a mapping (got a list); a recipe has at least format, model, and "
     "a budget or a plan"),
    ("resnet50", "r.yaml:1:1: not a mapping (got 'resnet50'); a recipe has at least format, model, "
     "and a budget or a plan"),
    ("!!python/dict {}", "r.yaml:1:1: not plain data (got the tag '!!python/dict'; allowed text, "
     "numbers, true, false, null, lists and mappings)"),
    ("a: [1\nb: 2\n", "r.yaml:2:2: not valid YAML (while parsing a flow sequence, expected ',' or "
     "']', but got ':')"),
    ("a: 1\n\tb: 2\n", "r.yaml:2:1: not valid YAML (while scanning for the next token, found "
     "character '\\t' that cannot start any token)"),
    ("a: 1\n--- \nb: 2\n", "r.yaml:2:1: not valid YAML (expected a single document in the stream, "
     "but found another document)"),
    ("a: *b\n", "r.yaml:1:4: not valid YAML (found undefined alias 'b')"),
    ("a: 1\nb: \x01\n", "r.yaml:2:4: not valid YAML (the character '\\x01' is not allowed)"),
    ("[" * 600, "r.yaml:1:1: nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NO_RECIPE, ids=[w[1][:50] for w in NO_RECIPE])
def test_what_is_no_recipe_gets_one_clear_line(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_aliases_of_aliases_do_not_grow_without_end() -> None:
    levels = [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    ]
    (found,) = problems("\n".join(["a: &a [1]", *levels]))
    assert found.endswith("not valid YAML (too many values)")


def test_a_file_that_cannot_be_read_gets_one_clear_line(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"format: 1\nnote: caf\xe9\n")
    cases = {
        missing: f"{missing}: no such file",
        tmp_path: f"{tmp_path}: a directory, not a recipe file",
        latin / "x": f"{latin / 'x'}: cannot be read (Not a directory)",
        latin: f"{latin}:2:10: not UTF-8 text (got the byte 0xe9)",
        Path("a\0b"): "a\0b: cannot be read (embedded null byte)",
    }
    for path, expected in cases.items():
        with pytest.raises(RecipeError) as raised:
            load_recipe(path)
        assert raised.value.problems == (expected,)


def test_a_file_is_named_in_its_problems_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("\ufeff" + HEAD + "proxy: {lr: 0}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(path))
    assert raised.value.problems == (
        f"{path}:4:13: proxy.lr: too small (got 0; allowed a number > 0)",
    )
    assert load_recipe(path, ["proxy.lr=1"]).model.name == "resnet50"


# Overrides


def test_overrides_replace_create_and_index() -> None:
    recipe = parse_recipe(
        FULL,
        overrides=[
            "proxy.epochs=4",
            "search.space.split=1.5",
            "model=resnet18",
            "model={name: resnet18}",
            "model.num_classes=5",
            "plan.groups.1.num_cells=3",
            "plan.groups.0.layers.1=conv1",
            "training=",
            "training.note=a=b",
            "provenance.by.whom=[me, 1e-3]",
            "budget.params=null",
            "budget.total_ratio=1/4",
        ],
    )
    assert recipe.proxy is not None
    assert recipe.proxy.epochs == 4
    assert recipe.search is not None
    assert recipe.search.space.split == 1.5
    assert recipe.model == ModelChoice(name="resnet18", num_classes=5)
    assert recipe.plan is not None
    assert recipe.plan.groups[1].num_cells == 3
    assert recipe.plan.groups[0].layers == ("layer1.0.conv2", "conv1")
    assert recipe.training == Training(note="a=b")
    assert recipe.provenance["by"] == {"whom": ["me", 0.001]}
    assert recipe.budget == Budget(total_ratio=0.25)


def test_a_field_of_the_model_is_overridden_where_only_its_name_is_written() -> None:
    short = "format: 1\nmodel: resnet18\nbudget: {ratio: 1}\n"
    recipe = parse_recipe(short, overrides=["model.num_classes=10"])
    assert recipe.model == ModelChoice(name="resnet18", num_classes=10)
    assert parse_recipe(short, overrides=["model.name=a"]).model == ModelChoice(name="a")
    unnamed = short.replace("resnet18", "''")
    assert problems(unnamed, "model.num_classes=10") == [
        "r.yaml:2:8: model.name: empty (got ''; allowed text that is not empty)",
    ]
    assert problems(short, "model.classes=10")[0].startswith(
        "override 'model.classes=10': model.classes: unknown key"
    )


def test_a_recipe_knows_where_it_was_written() -> None:
    text = """\
format: 1
model: resnet18
method:
  rules:
    - {layers: [a], static: true}
    - layers: [b]
      static: true
plan:
  groups: [{name: a, cell: [1, 1, 1], num_cells: 1, layers: [c]}]
"""
    recipe = parse_recipe(text, "r.yaml", ["plan.groups.0.num_cells=2", "budget.ratio=1"])
    assert recipe.place("model") == "r.yaml:2:1"
    assert recipe.place("method", "rules", 0) == "r.yaml:5:7"
    assert recipe.place("method", "rules", 1) == "r.yaml:6:7"
    assert recipe.place("plan", "groups", 0) == "override 'plan.groups.0.num_cells=2'"
    assert recipe.place("budget") == "override 'budget.ratio=1'"
    # As far as it is written.
    assert recipe.place("method", "rules", 2) == "r.yaml:4:3"
    assert recipe.place("method", "sharing", "x") == "r.yaml:3:1"
    assert recipe.place("search") == "r.yaml"
    # Which is no part of what it says.
    again = Recipe.model_validate(recipe.to_dict())
    assert (again, again.place("model")) == (recipe, "")
    assert pickle.loads(pickle.dumps(recipe)).place("model") == "r.yaml:2:1"


def test_overrides_create_sections_that_are_absent_or_null() -> None:
    recipe = parse_recipe(
        HEAD + "proxy: null\n", overrides=["proxy.epochs=2", "search.space.split=1"]
    )
    assert recipe.proxy == Proxy(epochs=2)
    assert recipe.search == Search(space=Space(split=1))


WRONG_OVERRIDES = [
    ("proxy.epochs=x", "proxy.epochs: not a whole number (got 'x'; allowed a whole number >= 1)"),
    ("proxy.epoch=3", "proxy.epoch: unknown key, did you mean 'epochs'? (allowed data, resolution, "
     "fold, epochs, subset, holdout, batch_size, optimizer, lr, momentum, weight_decay, "
     "temperature_epochs, augment, mixup, threads, device, init, init_epochs, taps, teacher, "
     "teacher_weight)"),
    ("proxy.epochs", "not KEY=VALUE (allowed e.g. proxy.epochs=3)"),
    ("=3", "not KEY=VALUE (allowed e.g. proxy.epochs=3)"),
    ("proxy..epochs=3", "not KEY=VALUE (allowed e.g. proxy.epochs=3)"),
    ("", "not KEY=VALUE (allowed e.g. proxy.epochs=3)"),
    ("plan.groups.2.num_cells=3", "plan.groups: not an index of the list (got '2'; "
     "allowed 0 to 1)"),
    ("plan.groups.-1.num_cells=3", "plan.groups: not an index of the list (got '-1'; "
     "allowed 0 to 1)"),
    ("plan.groups.1.layers.one=3", "plan.groups.1.layers: not an index of the list (got 'one'; "
     "allowed 0 to 0)"),
    ("search.space.basis_ratio.0.x=3", "search.space.basis_ratio.0: not a mapping, has no 'x' "
     "(got 1; override all of it, as in search.space.basis_ratio.0={x: ...})"),
    ("proxy.data=[1", "proxy.data: not valid YAML (while parsing a flow sequence, expected ',' or "
     "']', but got '<stream end>')"),
    ("proxy={lr: 1, lr: 2}", "proxy.lr: key given twice"),
    ("proxy.data=!!python/name:os.system", "proxy.data: not plain data (got the tag "
     "'!!python/name:os.system'; allowed text, numbers, true, false, null, lists and mappings)"),
    ("proxy.data=\x01", "proxy.data: not valid YAML (the character '\\x01' is not allowed)"),
    ("budget.ratio=0.5", "budget: not one target (got ratio and params; allowed exactly one of "
     "ratio, params, total_ratio, e.g. ratio: 0.5)"),
    ("proxy.temperature_epochs=4", "proxy.temperature_epochs: more than there are epochs (got 4; "
     "allowed 0 to 3, all the epochs)"),
    ("input.0=0", "input: not an input size (got [0, 224, 224]; allowed channels and one to "
     "three sizes, each at least 1, e.g. 3x224x224, [3, 224, 224] or 224, 1x16000, 3x16x112x112)"),
    ("plan.groups.0={}", "plan.groups.0.name: missing (name of the warehouse: letters, digits, "
     "underscores; allowed letters, digits and underscores)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "expected"), WRONG_OVERRIDES, ids=[w[0] for w in WRONG_OVERRIDES]
)
def test_a_wrong_override_is_named_instead_of_a_line(override: str, expected: str) -> None:
    assert problems(FULL, override)[0] == f"override {override!r}: {expected}"


def test_an_override_that_contradicts_the_file_is_named() -> None:
    text = HEAD + "proxy: {epochs: 5, batch_size: 8}\n"
    assert problems(text, "proxy.temperature_epochs=6") == [
        "override 'proxy.temperature_epochs=6': proxy.temperature_epochs: more than there are "
        "epochs (got 6; allowed 0 to 5, all the epochs)"
    ]


def test_what_an_override_repairs_is_no_problem() -> None:
    assert (
        parse_recipe("format: 3\n", overrides=["format=1", "model=m", "budget.ratio=1"]).format == 1
    )


# Writing


def test_a_recipe_is_written_for_people() -> None:
    assert (
        dump_recipe(parse_recipe(FULL), ["A recipe.", "", "kwsearch optimize r.yaml\nby \x07 me"])
        == """\
# A recipe.
#
# kwsearch optimize r.yaml
# by \\x07 me
format: 1
model:
  name: resnet50
  num_classes: 10
input: [3, 224, 224]
method:
  name: kernel_warehouse
  cell_ratio: [1, 0.5]
  sharing:
    early: [layer1.*, '0']
    late: ['layer[34].*']
  reduction: 0.125
  basis_ratio: 0.5
  spatial_partition: false
  norm: layer
budget:
  params: 12800000
plan:
  groups:
    - method: kernel_warehouse
      name: stage0_conv
      cell: [32, 32, 1, 1]
      num_cells: 174
      ratio: 0.5
      reduction: 0.0625
      basis_ratio: 0.0625
      norm: batch
      layers: [layer1.0.conv2, 'layer1.[12].*']
    - name: fc
      cell: [8, 8, 1]
      num_cells: 1
      layers: [fc]
search:
  trials: 7
  timeout: 1500
  seed: 3
  sampler: random
  pruner: halving
  space:
    split: 1
    tolerance: 0.02
    cell_ratio: [[1, 1], [0.5, 0.5]]
    sharing: [stage, layer]
    sharing_by_stage: true
    reduction: [0.0625]
    basis_ratio: [1]
    spatial_partition: [true, false]
    keep_static: [[], [layer4.*, fc]]
    temperature_epochs: [0, 3]
    limits:
      macs: 1800000000
proxy:
  data: ./images
  resolution: 4
  epochs: 3
  subset: 100
  holdout: 0.5
  batch_size: 1
  optimizer: adamw
  lr: 0.001
  momentum: 0
  weight_decay: 0
  temperature_epochs: 3
  augment: flip
  threads: 2
  device: cpu
training:
  epochs: 100
  temperature_epochs: 0
  batch_size: 256
  optimizer: lamb
  lr: 0.1
  weight_decay: 2.0e-05
  note: as published
provenance:
  found_by:
    - kwsearch
    - version: 0.1
  date: '2024-01-01'
  accuracy: 1.0
  notes: null
"""
    )


def test_only_what_was_set_is_written() -> None:
    recipe = parse_recipe(HEAD + "search: {}\nmethod: {reduction: 0.0625}\ninput: 3x4x5\nproxy:\n")
    assert recipe.to_dict() == {
        "format": 1,
        "model": "resnet50",
        "input": [3, 4, 5],
        "method": {"reduction": 0.0625},
        "budget": {"ratio": 0.5},
        "search": {},
    }
    assert list(recipe.to_dict())[:3] == ["format", "model", "input"]
    changed = recipe.model_copy(update={"training": Training(epochs=100)})
    assert changed.to_dict()["training"] == {"epochs": 100}


def test_long_lists_of_layers_are_wrapped_near_100_columns() -> None:
    layers = [f"layer{i}.{j}.conv2" for i in range(9) for j in range(9)]
    plan = {"groups": [{"name": "a", "cell": [1, 1, 1], "num_cells": 1, "layers": layers}]}
    recipe = Recipe.model_validate({"format": 1, "model": "m", "plan": plan})
    lines = dump_recipe(recipe).splitlines()
    wrapped = [line for line in lines if "conv2" in line]
    # 14 characters and a comma each: 5 fit between columns 15 and 94, then 8 and 87.
    assert len(wrapped) == 1 + 15 + 1
    assert [len(line) for line in wrapped[:3]] == [94, 87, 87]
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_what_is_written_reads_the_same_in_yaml_1_1() -> None:
    words = ["yes", "1e3", "0o7", "12:30", "2024-01-01", "null", "1_000", "=", "<<", "~", ".5", ""]
    recipe = Recipe.model_validate(
        {"format": 1, "model": "m", "budget": {"ratio": 1e-5}, "provenance": {"words": words}}
    )
    read = yaml.safe_load(dump_recipe(recipe))
    assert read["provenance"]["words"] == words
    assert read["budget"] == {"ratio": 1e-5}


def test_notes_of_several_lines_are_written_as_lines() -> None:
    recipe = parse_recipe(HEAD, overrides=['training.note="first\\n  second: #\\n"'])
    assert dump_recipe(recipe).endswith("  note: |\n    first\n      second: #\n")
    assert parse_recipe(dump_recipe(recipe)) == recipe


@settings(max_examples=200, deadline=None)
@given(st.text(" \n\t\r\x85\u2028\ufeff\x07\u00a0a#:-'\"\\\U0001f600", max_size=12))
def test_text_of_awkward_characters_reads_back_the_same(text: str) -> None:
    recipe = Recipe.model_validate(
        {"format": 1, "model": "m", "budget": {"ratio": 1}, "training": {"note": text}}
        | {"provenance": {text: [text, {text: text}]}}
    )
    assert parse_recipe(dump_recipe(recipe, [text])) == recipe


def test_provenance_is_copied_not_shared() -> None:
    recipe = parse_recipe(HEAD + "provenance: {a: [1]}\n")
    recipe.to_dict()["provenance"]["a"].append(2)
    assert recipe.provenance == {"a": [1]}


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "r.yaml", tmp_path / "link.yaml"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    recipe = parse_recipe(FULL)
    write_recipe(recipe, link, ["made by a test"])
    assert path.read_text(encoding="utf-8") == dump_recipe(recipe, ["made by a test"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert load_recipe(link) == recipe
    assert sorted(os.listdir(tmp_path)) == ["link.yaml", "r.yaml"]


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_recipe(parse_recipe(HEAD), tmp_path / "r.yaml")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("old")

    def fail(source: object, target: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_recipe(parse_recipe(FULL), path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_recipe_is_a_frozen_value() -> None:
    recipe = parse_recipe(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.format = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.method.norm = "batch"


# Generated recipes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
PORTION = st.floats(0, 1, exclude_min=True)
CELL_RATIO = PORTION | st.tuples(PORTION, PORTION).map(list)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
COUNT = st.integers(1, 10**12)
NAME = st.text("abcXYZ019_", min_size=1, max_size=6)
TEXT = st.text(min_size=1, max_size=15)
LAYERS = st.lists(TEXT, min_size=1, max_size=12)


def keys(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


def pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value, value)


METHOD = keys(
    name=st.just("kernel_warehouse"),
    cell_ratio=CELL_RATIO,
    sharing=st.sampled_from(["stage", "position", "layer"])
    | st.dictionaries(NAME, LAYERS, min_size=1, max_size=2),
    reduction=PORTION,
    basis_ratio=PORTION,
    spatial_partition=st.booleans(),
    norm=st.sampled_from(["auto", "batch", "layer"]),
)
BUDGET = (
    st.fixed_dictionaries({"ratio": POSITIVE})
    | st.fixed_dictionaries({"params": COUNT | COUNT.map("{:,}".format)})
    | st.fixed_dictionaries({"total_ratio": POSITIVE | st.sampled_from(["0.5x", "1/3"])})
)
GROUP = st.fixed_dictionaries(
    {"name": NAME, "cell": st.lists(COUNT, min_size=3, max_size=5), "num_cells": COUNT}
    | {"layers": LAYERS},
    optional={
        "method": st.just("kernel_warehouse"),
        "ratio": st.none() | POSITIVE,
        "reduction": PORTION,
        "basis_ratio": PORTION,
        "norm": st.sampled_from(["batch", "layer"]),
    },
)
PLAN = st.fixed_dictionaries(
    {"groups": st.lists(GROUP, max_size=3, unique_by=lambda group: str(group["name"]))}
)
SEARCH = keys(
    trials=COUNT,
    timeout=st.none() | POSITIVE,
    seed=st.integers(0, 2**32 - 1),
    sampler=st.sampled_from(["tpe", "random"]),
    pruner=st.sampled_from(["median", "halving", "none"]),
    space=keys(
        split=st.floats(1, allow_infinity=False),
        cell_ratio=st.lists(CELL_RATIO, max_size=3, unique_by=pair),
        sharing=st.lists(st.sampled_from(["stage", "position", "layer"]), unique=True),
        reduction=st.lists(PORTION, max_size=3, unique=True),
        basis_ratio=st.lists(PORTION, max_size=3, unique=True),
        tolerance=st.floats(0, 1, exclude_min=True, exclude_max=True),
        sharing_by_stage=st.booleans(),
        spatial_partition=st.lists(st.booleans(), unique=True),
        keep_static=st.lists(st.lists(TEXT, max_size=2), max_size=2, unique_by=str),
        temperature_epochs=st.lists(st.integers(0, 9), max_size=3, unique=True),
        limits=keys(macs=st.none() | COUNT),
    ),
)
PROXY = keys(
    data=TEXT,
    resolution=st.none() | st.integers(4),
    epochs=COUNT,
    subset=st.none() | COUNT,
    holdout=st.floats(0, 1, exclude_min=True, exclude_max=True),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lr=POSITIVE,
    temperature_epochs=st.integers(0, 1),
    threads=st.none() | COUNT,
)
TRAINING = keys(
    epochs=st.integers(20), batch_size=st.none() | COUNT, note=st.none() | st.text(max_size=200)
)
RECIPE = st.fixed_dictionaries(
    {
        "format": st.just(1),
        "model": TEXT | st.fixed_dictionaries({"name": TEXT}, optional={"num_classes": COUNT}),
        "budget": BUDGET,
    },
    optional={
        "input": st.sampled_from(["3x8x9", 8, [1, 2, 3]]),
        "method": METHOD,
        "plan": st.none() | PLAN,
        "search": st.none() | SEARCH,
        "proxy": st.none() | PROXY,
        "training": st.none() | TRAINING,
        "provenance": st.dictionaries(st.text(max_size=9), JSON, max_size=3),
    },
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
CHECKER = jsonschema.Draft202012Validator(json_schema())


@QUICK
@given(RECIPE)
def test_a_recipe_that_is_written_and_read_is_the_same(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    assert parse_recipe(dump_recipe(recipe, ["header"])) == recipe
    assert parse_recipe(json.dumps(recipe.to_dict())) == recipe
    assert dump_recipe(parse_recipe(dump_recipe(recipe))) == dump_recipe(recipe)
    CHECKER.validate(data)
    CHECKER.validate(recipe.to_dict())


def problems_or_none(text: str, *overrides: str) -> list[str] | None:
    try:
        parse_recipe(text, overrides=overrides)
    except RecipeError as error:
        return list(error.problems)
    return None


@QUICK
@given(st.text(max_size=60) | st.text("ab:[]{}&*!- \n\"'#|>?%@1.", max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error_of_single_lines(text: str) -> None:
    found = problems_or_none(text)
    assert found != []
    assert all(re.match(r"<string>(:\d+:\d+)?: ", line) for line in found or ())
    assert all(line.isprintable() for line in found or ())


@QUICK
@given(st.text("abe.=0129[]{}: ", max_size=20), JSON)
def test_any_override_is_taken_or_a_recipe_error_of_single_lines(path: str, value: Any) -> None:
    override = f"{path}={json.dumps(value)}"
    found = problems_or_none(FULL, path, override)
    assert all(line.startswith("override ") and line.isprintable() for line in found or ())


# The JSON Schema


def paths_of(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    below = [one for key, item in items for one in paths_of(item, (*path, str(key)))]
    return [path, *below] if path else below


ODD = ["null", "true", "0", "1", "-1", "2", "0.5", "1.0", "1e3", "1e999", "x", "''", "'1'", "[]"]
ODD += ["{}", "[1]", "[x]", "[1, 1]", "{a: [x]}", "12.8M", "1/2", "3x4x5", "stage"]


def test_the_schema_accepts_whatever_the_loader_accepts() -> None:
    seen = {True: 0, False: 0}
    full = parse_recipe(FULL).to_dict()
    places = paths_of(full)
    for path in places:
        # Only the section in question: reading YAML is what takes the time here.
        text = json.dumps({k: full[k] for k in ("format", "model", "budget", path[0])})
        for odd in ODD:
            override = f"{'.'.join(path)}={odd}"
            found = problems_or_none(text, override)
            seen[found is None] += 1
            if found is None:
                assert_in_schema(text, override)
            for line in found or ():
                # A value of the file may be the one that the override leaves no room for.
                clash = re.search("given twice|name of another|more than there are epochs", line)
                assert line.startswith("override ") or clash, f"{override}: {line}"
                assert "allowed )" not in line, override
    assert len(places) > 70
    assert seen[True] > 300
    assert seen[False] > 700


def assert_in_schema(text: str, *overrides: str) -> None:
    root = read_yaml(text, "r.yaml", [])
    assert root is not None
    for override in overrides:
        override_(root, override, [])
    assert [error.message for error in CHECKER.iter_errors(root.plain())] == [], overrides


@pytest.mark.parametrize("line", [line for line, _, _ in SHORTHANDS])
def test_the_schema_accepts_shorthands(line: str) -> None:
    assert_in_schema(with_line(line))


def test_the_schema_refuses_what_an_editor_should_underline() -> None:
    good = {"format": 1, "model": "m", "budget": {"ratio": 0.5}}
    CHECKER.validate(good)
    bad: list[dict[str, Any]] = [
        {"format": 2},
        {"model": ""},
        {"model": {}},
        {"budget": {}},
        {"budget": {"ratio": 1, "params": 1}},
        {"budget": None},
        {"budget": {"params": "12.8Q"}},
        {"budget": {"total_ratio": "half"}},
        {"input": "3x"},
        {"input": [224]},
        {"method": {"cell_ratio": 2}},
        {"method": {"cell_ratio": [1]}},
        {"method": {"sharing": "stages"}},
        {"search": {"space": {"sharing": ["stage", "stage"]}}},
        {"proxy": {"epochs": 0}},
        {"proxy": {"resolution": 3}},
        {"plan": {"groups": [{"name": "a"}]}},
        {"colour": "red"},
    ]
    for change in bad:
        assert not CHECKER.is_valid({**good, **change}), change


def test_the_schema_is_valid_and_describes_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    seen, pending = 0, [schema]
    while pending:
        section = pending.pop()
        if isinstance(section, list):
            pending += section
        elif isinstance(section, dict):
            pending += [v for k, v in section.items() if k != "json_schema_extra"]
            if section.get("type") == "object":
                for key, field in section.get("properties", {}).items():
                    assert field.get("description"), f"{section['title']}.{key}"
                    seen += 1
    others = [find(name) for name in NAMES if name != "kernel_warehouse"]
    by_method = sum(len(allowed_of(m.settings)) + len(allowed_of(m.group)) for m in others)
    named = len(others) * (2 + 3)  # name and rules; method, name and layers
    own = 11 + 2 + 9 + 8 + 3 + 1 + 9 + 23 + 2 + 3 + 13 + 2 + 6 + 21 + 7
    own += 3  # taps
    own += 10 + 2 + 2 + 5 + 11  # micronas, its architecture and cells, the supernet
    assert seen == own + by_method + named


def test_recipes_need_no_torch() -> None:
    code = "import sys, kwsearch.recipe, kwsearch.units; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
