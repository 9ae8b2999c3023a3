"""Studies as text: the trials, the verdict, how far rungs and scores can be trusted, the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kwlayers.plan import counted, group_from
from kwsearch import verdict
from kwsearch.recipe import Search
from kwsearch.results import ACCURACY, Metric
from kwsearch.terminal import new_table
from kwsearch.trials import (
    FLASH,
    LARGEST,
    LATENCY,
    NAMES,
    PEAK,
    REASON,
    STATIC,
    accuracy_of,
    baseline,
    budget_of,
    by_budget,
    complete_plans,
    front,
    rung_pairs,
    score_pairs,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.table import Table

    from kwsearch.results import Found, Result


# Of architectures, the peak of their activations.
_MEMORY = "memory, bytes"


def trials_table(trials: Sequence[FrozenTrial], metric: Metric = ACCURACY) -> Table:
    """One line per trial, by budget, the best first."""
    sweep = len(by_budget(trials)) > 1
    timed = any(LATENCY in trial.user_attrs for trial in trials)
    held = any(PEAK in trial.user_attrs for trial in trials)
    groups = {t.number: [group_from(g) for g in t.user_attrs.get("groups", ())] for t in trials}
    methods = {group.method for own in groups.values() for group in own}
    apart = len(methods) > 1
    table = new_table(
        (*(["budget"] if sweep else []), "trial", "result", *(["method"] if apart else [])),
        (
            *(metric.title, "parameters", "MACs"),
            *([_MEMORY] if held else []),
            *(["ms"] if timed else []),
            "seconds",
        ),
        () if held else ("n of warehouses" if methods <= {"kernel_warehouse"} else "sizes",),
    )
    for trial in sorted(trials, key=_by_result):
        attrs = trial.user_attrs
        own = groups[trial.number]
        cells = [str(group.size) for group in own]
        shown = " ".join(cells) if len(cells) <= 8 else f"{' '.join(cells[:6])} … {cells[-1]}"
        table.add_row(
            *([f"{budget_of(trial):.12g}" if budget_of(trial) else ""] if sweep else []),
            str(trial.number) if (name := baseline(trial)) is None else f"{trial.number} ({name})",
            result_of(trial),
            *([own[0].method if own else ""] if apart else []),
            "" if (accuracy := accuracy_of(trial)) is None else f"{accuracy:.2%}",
            f"{attrs['params']:,}" if "params" in attrs else "",
            f"{attrs['macs']:,}" if "macs" in attrs else "",
            *([f"{attrs[PEAK]:,}" if PEAK in attrs else ""] if held else []),
            *([f"{attrs[LATENCY]:.3g}" if LATENCY in attrs else ""] if timed else []),
            f"{attrs['seconds']:.0f}" if "seconds" in attrs else "",
            *([] if held else [shown]),
        )
    return table


def _by_result(trial: FrozenTrial) -> tuple[float, bool, float, int]:
    """By budget; finished trials first, by accuracy; then those that stopped early."""
    accuracy = accuracy_of(trial)
    return (budget_of(trial) or 0, accuracy is None, -(accuracy or 0.0), trial.number)


def result_lines(result: Result) -> list[str]:
    """What was found under each budget, how much of it may be chance, and what was written."""
    lines = best_lines(result) + trust_lines(result)
    for found in result.budgets:
        if found.best_path is not None:
            lines.append(f"wrote {found.best_path}")
    return lines


def best_lines(result: Result) -> list[str]:
    """The best plan of each budget against the baselines; what follows on one is indented."""
    lines = [f"warning: {warning}" for warning in result.warnings]
    for found in result.budgets:
        lines += _verdict_lines(result, found, _head(result, found))
    return lines


def _head(result: Result, found: Found) -> str:
    """Which budget a line is about, in a sweep."""
    return f"budget {found.budget:.12g}: " if len(result.budgets) > 1 else ""


def _verdict_lines(result: Result, found: Found, head: str) -> list[str]:
    """The best plan against the baselines."""
    best = found.best
    if best is None:
        return [f"{head}no trial finished: nothing to choose"]
    images = f"{result.held_out} held-out examples" if result.held_out else "held-out examples"
    what = "" if result.metric.is_share else " of 1 - WER"
    lines = [f"{head}best: trial {best.number}, {best.values[0]:.2%}{what} on {images}"]
    if found.finals is not None and found.finals.verdict is not None:
        text = verdict.sentence(found.finals.verdict, is_share=result.metric.is_share)
        first, *others = text.split("; ")
        lines.append(f"    verdict on {found.finals.split} examples: {first}")
        lines += [f"    {other}" for other in others]
    else:
        lines += _single_seed_lines(result, found, best)
    return lines


def _single_seed_lines(result: Result, found: Found, best: FrozenTrial) -> list[str]:
    lines = []
    score, images = best.values[0], result.held_out
    if (own := baseline(best)) is not None:
        others = "did better" if len(complete_plans(found.trials)) > 1 else "has finished"
        what = "architecture" if own == LARGEST else "plan"
        lines.append(f"    the {NAMES[own]}: no other {what} {others}")
    for kind, name in {**NAMES, STATIC: "static network within the budget"}.items():
        other = found.baseline(kind)
        theirs = None if other is None else accuracy_of(other)
        if other is None or theirs is None or other.number == best.number or not images:
            continue
        gap = score - theirs
        line = f"    {gap * 100:+.2f} points against the {name}; "
        if result.metric.is_share:
            error = ((score * (1 - score) + theirs * (1 - theirs)) / images) ** 0.5
            reach = "within" if abs(gap) <= 2 * error else "beyond"
            line += f"{reach} two standard errors ({2 * error * 100:.2f} points) of so few examples"
            lines.append(f"{line} and one seed")
        else:
            lines.append(f"{line}how much of it is chance is not known of one seed")
    if len(found.trials) > 2:
        lines.append(f"    the best of {len(found.trials)} trials is in part the luckiest")
    return lines


def trust_lines(result: Result) -> list[str]:
    """How well each rung and each score ranked the trials that were trained in full."""
    ranked = verdict.trust(rankings(result))
    return [verdict.trust_sentence(name, trust) for name, trust in ranked.items()]


def rankings(result: Result) -> dict[str, list[tuple[float, float]]]:
    """By rung and score, in words: it and the accuracy of each plan that was trained in full."""
    known: dict[str, list[tuple[float, float]]] = {}
    last = result.rungs[-1].step if result.rungs else 0
    shared = (result.recipe.search or Search()).strategy == "differentiable"
    for found in result.budgets:
        pairs = {}
        for rung in result.rungs[:-1]:
            if rung.step:
                name = "supernet" if shared else f"rung of {rung.step} epochs"
                pairs[name] = rung_pairs(found.trials, rung.step, last)
        pairs.update({f"score {k}": v for k, v in score_pairs(found.trials).items()})
        head = _head(result, found)
        known |= {head + name: values for name, values in pairs.items() if values}
    return known


def front_table(result: Result) -> Table:
    """The trials that no other beats in accuracy and all costs at once."""
    timed = any(LATENCY in trial.user_attrs for trial in result.trials)
    sweep = len(result.budgets) > 1
    tested = _test_means(result)
    held = any(PEAK in trial.user_attrs for trial in result.trials)
    accuracies = (result.metric.title, *(["test, mean"] if tested else []))
    costs = ("parameters", "MACs", *([_MEMORY] if held else []), *(["ms"] if timed else []))
    table = new_table(
        ("front: trial", *(["budget"] if sweep else [])),
        (*accuracies, *costs),
        spare=("ms", _MEMORY, "MACs"),
    )
    for trial in front(result.trials):
        ms = trial.user_attrs.get(LATENCY)
        name = baseline(trial)
        test = tested.get(trial.number)
        table.add_row(
            f"{trial.number} ({name})" if name else str(trial.number),
            *([f"{budget_of(trial):.12g}"] if sweep else []),
            f"{trial.values[0]:.2%}",
            *(["" if test is None else f"{test:.2%}"] if tested else []),
            f"{trial.user_attrs['params']:,}",
            f"{trial.user_attrs['macs']:,}",
            *([f"{trial.user_attrs[PEAK]:,}" if PEAK in trial.user_attrs else ""] if held else []),
            *(["" if ms is None else f"{ms:.3g}"] if timed else []),
        )
    return table


def _test_means(result: Result) -> Mapping[int, float]:
    """Mean accuracy on test images by trial, of the finalists."""
    from kwsearch.finals import name_of

    means = {}
    for found in result.budgets:
        if found.finals is None or found.finals.split != "test":
            continue
        for trial in found.trials:
            runs = found.finals.accuracies.get(name_of(trial))
            if runs:
                means[trial.number] = sum(runs.values()) / len(runs)
    return means


def result_json(result: Result) -> dict[str, Any]:
    """A finished study for `--json`. best, best_recipe, verdict: of a study of one budget."""
    budgets = [
        {
            "budget": found.budget,
            "best": found.best.number if found.best else None,
            "best_recipe": str(found.best_path) if found.best_path else None,
            "verdict": _verdict_json(found, result.metric),
        }
        for found in result.budgets
    ]
    alone = {key: value for key, value in budgets[0].items() if key != "budget"}
    return {
        **(alone if len(budgets) == 1 else {}),
        "budgets": budgets,
        "front": [
            {
                "trial": trial.number,
                "accuracy": trial.values[0],
                "params": trial.user_attrs["params"],
                "macs": trial.user_attrs["macs"],
                **{k: trial.user_attrs[k] for k in (LATENCY, PEAK, FLASH) if k in trial.user_attrs},
            }
            for trial in front(result.trials)
        ],
        "held_out": result.held_out,
        **({"warnings": list(result.warnings)} if result.warnings else {}),
        "trials": [trial_json(trial) for trial in result.trials],
    }


def _verdict_json(found: Found, metric: Metric) -> dict[str, Any] | None:
    finals = found.finals
    if finals is None or finals.verdict is None:
        return None
    return {
        "sentence": verdict.sentence(finals.verdict, is_share=metric.is_share),
        "winner": finals.verdict.winner,
        "images": finals.split,
        "accuracies": finals.accuracies,
    }


def trial_json(trial: FrozenTrial) -> dict[str, Any]:
    """A trial for `--json`."""
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "score": accuracy_of(trial),
        "epochs": trial.intermediate_values,
        "choices": trial.params,
        **trial.user_attrs,
    }


def trial_lines(trial: FrozenTrial) -> list[str]:
    """What one trial is, how it went and what was chosen for it."""
    attrs = trial.user_attrs
    name = baseline(trial)
    lines = [f"trial {trial.number}{f' ({name})' if name else ''}: {result_of(trial)}"]
    accuracy = accuracy_of(trial)
    if accuracy is not None:
        lines[0] += f", {accuracy:.2%}"
    if "params" in attrs:
        latency = f", {attrs[LATENCY]:.3g} ms" if LATENCY in attrs else ""
        if PEAK in attrs:
            latency += f", {attrs[PEAK]:,} bytes of memory, {attrs[FLASH]:,} of flash"
        lines.append(f"{attrs['params']:,} parameters, {attrs['macs']:,} MACs{latency}")
    if "seconds" in attrs:
        lines.append(f"{attrs['seconds']:,.1f} s, attempt {attrs['lease']['attempt']}")
    accuracies = {step: value for step, value in trial.intermediate_values.items() if step}
    if accuracies:
        values = (f"{step}: {value:.2%}" for step, value in accuracies.items())
        lines.append(f"accuracy by epoch  {'  '.join(values)}")
    for key, value in {**attrs.get("scores", {}), **trial.params}.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"    {key} = {shown}")
    for group in attrs.get("groups", ()):
        lines.append(f"    {_group_line(group)}")
    return lines


def _group_line(data: Mapping[str, Any]) -> str:
    layers = counted(len(data["layers"]), "layer")
    if data["method"] == "kernel_warehouse":
        cell = "x".join(map(str, data["cell"]))
        return f"{data['name']}: n = {data['num_cells']} cells of {cell}, {layers}"
    return f"{data['name']}: {data['method']}, {group_from(data).describe()}, {layers}"


def result_of(trial: FrozenTrial) -> str:
    """Complete, or why it is not."""
    found: str = trial.user_attrs.get(REASON, trial.state.name.lower())
    return found
