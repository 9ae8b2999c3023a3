"""A job script for SLURM: an array of workers, the first of which starts the driver, too."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Array:
    """What the script asks for. overrides: of the recipe, KEY=VALUE. storage: a URL without its
    password. cpus, gpus: of a worker. hours: after which SLURM ends it. trust: whether networks may
    be own code. options: more of `sbatch`, such as --partition=gpu.
    """

    recipe: str
    overrides: tuple[str, ...]
    run_dir: str
    study: str
    storage: str
    workers: int
    cpus: int
    gpus: int
    hours: int
    trust: bool = False
    options: tuple[str, ...] = ()


def script(array: Array) -> str:
    """To be submitted with `sbatch`, and again after the time limit: it goes on."""
    plain = re.sub(r"[^\w.-]+", "-", array.study)
    trust = " --trust" if array.trust else ""
    wanted = [
        f"--job-name=kwsearch-{plain}",
        f"--array=0-{array.workers - 1}",
        "--ntasks=1",
        f"--cpus-per-task={array.cpus}",
        *([f"--gpus-per-task={array.gpus}"] if array.gpus else []),
        f"--time={array.hours}:00:00",
        "--requeue",
        "--open-mode=append",
        *array.options,
    ]
    recipe = shlex.join([array.recipe, *array.overrides])
    run_dir, study = shlex.quote(array.run_dir), shlex.quote(array.study)
    lines = [
        "#!/bin/bash",
        f"# {array.workers} workers of the study {plain}; its driver is in the first task.",
        *(f"#SBATCH {option}" for option in wanted),
        "",
        'cd "$SLURM_SUBMIT_DIR"',
        "# A password belongs into ~/.pgpass, or into this variable before sbatch.",
        f"storage={shlex.quote(array.storage)}",
        'export KWSEARCH_STORAGE="${KWSEARCH_STORAGE:-$storage}"',
        'if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then',
        "    resume=",
        f"    [ -e {run_dir}/study.storage.json ] && resume=--resume",
        f"    kwsearch optimize {recipe} --run-dir {run_dir} --study {study} --executor queue \\",
        f"        --workers auto --quiet{trust} $resume &",
        "    driver=$!",
        "fi",
        f"srun --cpus-per-task={array.cpus} kwsearch worker {study} --idle 900{trust}",
        '[ -z "$driver" ] || wait "$driver"',
    ]
    return "\n".join(lines) + "\n"
