"""Job scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from kwsearch import cli


def test_a_job_script_is_one_of_bash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.yaml").write_text(
        "format: 1\nmodel: resnet20\nbudget: {ratio: 1}\nsearch: {resources: {cpus: 2.5}}\n"
    )
    storage = "postgresql://me:secret@host/db"
    given = ["slurm", "a b.yaml", "proxy.device=cuda", "--storage", storage, "--workers", "3"]
    assert cli.run([*given, "--sbatch", "--partition=gpu", "--trust"]) == 0
    script = capsys.readouterr().out
    assert "secret" not in script
    assert "storage=postgresql://me@host/db\n" in script
    for line in ("--array=0-2", "--cpus-per-task=3", "--gpus-per-task=1", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert "kwsearch optimize 'a b.yaml' proxy.device=cuda --run-dir 'runs/a b'" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # With commands that only say what they were asked, the first task is driver and worker.
    for name in ("srun", "kwsearch"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> "{tmp_path}/asked"\n')
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for task in ("0", "1"):
        where = {"SLURM_ARRAY_TASK_ID": task, "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path}
        subprocess.run(["bash", "-c", script], env=where, check=True)
    asked = sorted((tmp_path / "asked").read_text().splitlines())
    assert [line.split(" --")[0] for line in asked[:1]] == [
        "kwsearch optimize a b.yaml proxy.device=cuda"
    ]
    assert asked[1:] == ["srun --cpus-per-task=3 kwsearch worker a b --idle 900 --trust"] * 2
    assert "--job-name=kwsearch-a-b\n" in script


def test_a_url_is_quoted_and_one_that_is_none_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe := tmp_path / "r.yaml").write_text("format: 1\nmodel: resnet20\nbudget: {ratio: 1}\n")
    odd = "postgresql://me@host/$(touch hacked)?application_name=`id`"
    assert cli.run(["slurm", str(recipe), "--storage", odd]) == 0
    script = capsys.readouterr().out
    lines = [line for line in script.splitlines() if line.startswith(("storage=", "export KW"))]
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf %s "$KWSEARCH_STORAGE"'])],
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert make_url(shown.stdout) == make_url(odd)
    assert not (tmp_path / "hacked").exists()
    local = "postgresql://me@localhost/db"
    assert cli.run(["slurm", str(recipe), "--storage", local]) == 0
    assert "localhost is another machine on every node" in capsys.readouterr().err
    assert cli.run(["slurm", str(recipe), "--storage", "nonsense"]) == 2
    assert "--storage: no URL; allowed are such as" in capsys.readouterr().err
