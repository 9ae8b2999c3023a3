"""How far a study can be trusted: finalists against baselines, rungs against full length."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

ALPHA = 0.05
BASELINES = ("uniform", "static")

Key = TypeVar("Key")


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """By Student's t: mean -+ t s / sqrt(n), for values that are about normal."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Comparison:
    """The first's accuracies less the second's, over `seeds` that both have.

    p: two-sided, that such differences have mean 0; None for one seed, or differences all alike,
    of which a t test can say nothing.
    """

    difference: Interval
    p: float | None
    seeds: int


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Paired t test of accuracies by seed; a seed that only one has does not count.

    Raises ValueError if they have no seed in common; a p value needs 2.
    """
    from scipy.stats import t

    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("no seed in common: nothing to compare")
    # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding alone, which must not become a tiny spread.
    differences = [round(a[seed] - b[seed], 12) for seed in seeds]
    difference = interval(differences)
    if len(set(differences)) == 1:
        return Comparison(difference, None, len(seeds))
    error = statistics.stdev(differences) / len(seeds) ** 0.5
    p = 2 * float(t.sf(abs(difference.mean) / error, len(seeds) - 1))
    return Comparison(difference, p, len(seeds))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): to compare with alpha each, in any order."""
    corrected = [0.0] * len(ps)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = least
    return corrected


@dataclass(frozen=True)
class Verdict:
    """Finalists against baselines.

    winner: the candidate that is better than every baseline, significantly; None without one.
    leader: the winner, otherwise the candidate with the highest mean; None without candidates.
    accuracies: by name. comparisons: by (candidate, baseline); p: theirs after `holm`.
    baselines: those that were trained. same_images: whether trials were chosen on these examples.
    """

    winner: str | None
    leader: str | None
    accuracies: Mapping[str, Interval]
    comparisons: Mapping[tuple[str, str], Comparison]
    p: Mapping[tuple[str, str], float]
    baselines: tuple[str, ...]
    same_images: bool


def judge(
    accuracies: Mapping[str, Mapping[int, float]],
    *,
    same_images: bool,
    baselines: Sequence[str] = BASELINES,
) -> Verdict:
    """Which candidate wins. accuracies: (0 to 1) by name and seed, the baselines among them.

    A winner has a mean paired difference above 0 to every baseline that was trained, each with
    p < ALPHA after Holm's correction for all comparisons of all candidates; of several, the one
    with the highest mean. A comparison without p value counts as one with p = 1.
    """
    trained = {name: runs for name, runs in accuracies.items() if runs}
    present = tuple(name for name in baselines if name in trained)
    means = {name: interval([*runs.values()]) for name, runs in trained.items()}
    order = sorted(trained.keys() - set(baselines), key=lambda name: (-means[name].mean, name))
    comparisons = {
        (name, other): paired(trained[name], trained[other])
        for name in order
        for other in present
        if trained[name].keys() & trained[other].keys()
    }
    ps = holm([1.0 if found.p is None else found.p for found in comparisons.values()])
    p = dict(zip(comparisons, ps, strict=True))

    def beats(name: str, other: str) -> bool:
        pair = (name, other)
        return pair in p and p[pair] < ALPHA and comparisons[pair].difference.mean > 0

    winners = [name for name in order if present and all(beats(name, other) for other in present)]
    winner = winners[0] if winners else None
    leader = winner or (order[0] if order else None)
    return Verdict(winner, leader, means, comparisons, p, present, same_images)


def sentence(verdict: Verdict, *, is_share: bool = True) -> str:
    """One line in plain words: who wins or leads, by how much, and how sure that is.

    is_share: of what is judged, so that no interval goes below 0.
    """
    if verdict.leader is None:
        return "no significant winner: no candidate was trained"
    leads = f"{verdict.leader} with {_share(verdict.accuracies[verdict.leader], is_share)}"
    if not verdict.baselines:
        return f"no significant winner: no baseline to compare {leads}"
    text = (
        f"winner: {leads}"
        if verdict.winner
        else f"no significant winner: the best that was searched is {leads}"
    )
    clauses = [_against(verdict, verdict.leader, other) for other in verdict.baselines]
    text = "; ".join([text, *clauses])
    if len(verdict.p) > 1:
        text += f"; p corrected for {len(verdict.p)} comparisons"
    if verdict.same_images:
        text += "; trials were chosen on these same examples, which flatters the best of them"
    return text


def _share(found: Interval, is_share: bool) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:.2%}"
    low = max(found.low, 0.0) if is_share else found.low
    high = min(found.high, 1.0)
    return f"{found.mean:.2%} (95 % interval {low:.2%} to {high:.2%})"


def _against(verdict: Verdict, name: str, other: str) -> str:
    found = verdict.comparisons.get((name, other))
    if found is None:
        return f"no seed in common with {other}"
    difference = found.difference
    text = f"{difference.mean * 100:+.2f} points against {other}"
    if found.seeds == 1:
        return f"{text} (1 seed: no test)"
    assert difference.low is not None
    assert difference.high is not None
    if found.p is None:
        return f"{text} (the same for each of {found.seeds} seeds: no test)"
    p = verdict.p[name, other]
    shown = f"p {p:.2g}" if p >= 0.001 else "p < 0.001"
    low, high = difference.low * 100, difference.high * 100
    text = f"{text} ({low:+.2f} to {high:+.2f}, {shown}, {found.seeds} seeds)"
    return text if p < ALPHA else f"{text}: may be chance"


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b and its p value over `count` pairs; None where nothing can be said."""

    tau: float | None
    p: float | None
    count: int


def kendall(pairs: Sequence[tuple[float, float]]) -> Correlation:
    """How alike two accuracies rank trials. Under 3 pairs, or all alike: None."""
    from scipy.stats import kendalltau

    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(pairs) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return Correlation(None, None, len(pairs))
    found = kendalltau(first, second)
    return Correlation(float(found.statistic), float(found.pvalue), len(pairs))


def pooled_tau(groups: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """Kendall's tau within groups: each group's, weighted by its pairs of trials.

    Trials of different groups are not compared. None where no group says anything.
    """
    found = [kendall(pairs) for pairs in groups]
    known = [(one.tau, one.count * (one.count - 1) / 2) for one in found if one.tau is not None]
    weight = sum(pairs for _, pairs in known)
    return sum(tau * pairs for tau, pairs in known) / weight if known else None


def top_overlap(pairs: Sequence[tuple[float, float]], share: float = 1 / 3) -> tuple[int, int]:
    """How many of the top `share` by the first value are in that of the second, and of how many.

    Rounded, and at least one. Ties: the earlier pairs are on top by the first value; by the
    second, all that equal the last one on top are.
    """
    size = max(1, round(share * len(pairs)))
    on_top = sorted(pairs, key=lambda pair: -pair[0])[:size]
    last = sorted((final for _, final in pairs), reverse=True)[:size][-1:]
    return sum(final >= last[0] for _, final in on_top), len(on_top)


@dataclass(frozen=True)
class Trust:
    """How well a rung ranks trials: `top` as `top_overlap` gives it, for a third."""

    correlation: Correlation
    top: tuple[int, int]


def trust(rungs: Mapping[Key, Sequence[tuple[float, float]]]) -> dict[Key, Trust]:
    """By rung, from (accuracy at the rung, accuracy at full length) of the trials that have both.

    Trials that a rung stopped are missing: of a study that prunes, it ranks only the survivors.
    """
    return {rung: Trust(kendall(pairs), top_overlap(pairs)) for rung, pairs in rungs.items()}


# Up to which tau a rung's ranking is called so; from the last on, strong.
_WORDS = ((0.3, "poor"), (0.5, "weak"), (0.7, "fair"))


def trust_sentence(rung: str, found: Trust) -> str:
    """One line. rung: in words, such as "rung of 3 epochs"."""
    tau, p, count = found.correlation.tau, found.correlation.p, found.correlation.count
    if tau is None or p is None:
        return f"{rung}: no rank correlation from {count} trials"
    word = next((word for limit, word in _WORDS if tau < limit), "strong")
    if p >= ALPHA:
        word += f", may be chance (p {p:.2g})"
    both, size = found.top
    return (
        f"{rung}: tau {tau:.2f} over {count} trials: {word}; of its top third, {both} of "
        f"{size} finished in the final top third"
    )
