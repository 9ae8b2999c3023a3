"""Finalists against baselines and rungs against full length: textbook numbers and hand counts."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest

from kwsearch.verdict import (
    Correlation,
    Interval,
    Trust,
    holm,
    interval,
    judge,
    kendall,
    paired,
    pooled_tau,
    sentence,
    top_overlap,
    trust,
    trust_sentence,
)

# Student 1908 ("The probable error of a mean", section IX): hours of sleep gained by ten patients
# under two drugs. As R prints it for its data set `sleep`: mean difference 1.58, t = 4.0621 with 9
# degrees of freedom, p = 0.002833, 95 % interval 0.7001142 to 2.4598858.
DRUG_1 = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
DRUG_2 = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))


# Intervals and the paired test


def test_students_sleep_data_give_the_published_test() -> None:
    found = paired(DRUG_2, DRUG_1)
    assert found.difference.mean == pytest.approx(1.58)
    assert found.difference.low == pytest.approx(0.7001142, abs=5e-8)
    assert found.difference.high == pytest.approx(2.4598858, abs=5e-8)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.seeds == 10
    other = paired(DRUG_1, DRUG_2)
    assert other.difference.mean == pytest.approx(-1.58)
    assert other.p == found.p


def test_two_values_have_the_interval_of_a_cauchy_distribution() -> None:
    # With one degree of freedom the quantile of 0.75 is tan(pi / 4) = 1; s / sqrt(2) is 2.
    found = interval([1.0, 5.0], confidence=0.5)
    assert [found.mean, found.low, found.high] == pytest.approx([3, 1, 5])


def test_one_value_has_a_mean_and_no_interval() -> None:
    assert interval([0.9]) == Interval(0.9, None, None)


def test_only_seeds_that_both_have_count() -> None:
    more = {**DRUG_2, 10: 99.0}
    fewer = {seed: hours for seed, hours in DRUG_1.items() if seed != 4} | {11: -99.0}
    found = paired(more, fewer)
    assert found.seeds == 9
    # Patient 4 had no difference.
    assert found.difference.mean == pytest.approx(15.8 / 9)
    with pytest.raises(ValueError, match="no seed in common: nothing to compare"):
        paired({0: 0.9}, {1: 0.9})


def test_differences_that_are_all_alike_are_no_test() -> None:
    # 0.9 - 0.8 < 0.8 - 0.7 in floating point.
    found = paired({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7})
    assert found.p is None
    assert found.difference.mean == pytest.approx(0.1)
    assert paired({0: 0.9, 1: 0.8}, {0: 0.9, 1: 0.8}).p is None
    assert paired({0: 0.9}, {0: 0.8}).p is None


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04 raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# The verdict


def runs(*accuracies: float) -> dict[int, float]:
    return dict(enumerate(accuracies))


UNIFORM = runs(0.80, 0.82, 0.81, 0.83, 0.79)
# Ahead of uniform by 0.04, 0.05, 0.045, 0.055 and 0.05; of static, half a point less or more.
AHEAD = runs(0.84, 0.87, 0.855, 0.885, 0.84)
STATIC = runs(0.81, 0.83, 0.82, 0.835, 0.80)


def test_what_is_no_share_may_be_below_zero() -> None:
    # 1 less a word error rate. 0.02 -+ 12.7062 * 0.28 / 2
    found = judge({"uniform": runs(0.1, 0.1), "trial 7": runs(0.16, -0.12)}, same_images=False)
    assert "with 2.00% (95 % interval -175.89% to 100.00%)" in sentence(found, is_share=False)
    assert "with 2.00% (95 % interval 0.00% to 100.00%)" in sentence(found)


# Ahead of uniform by 0.06, -0.01, 0.07, 0.0 and 0.01: t = 0.026 / 0.0166 = 1.56.
LUCKY = runs(0.86, 0.81, 0.88, 0.83, 0.80)


def test_the_winner_is_significantly_better_than_every_baseline() -> None:
    found = judge(
        {"uniform": UNIFORM, "trial 7": AHEAD, "static": STATIC, "trial 9": LUCKY},
        same_images=True,
    )
    assert found.winner == found.leader == "trial 7"
    assert found.baselines == ("uniform", "static")
    assert found.comparisons["trial 7", "uniform"].difference.mean == pytest.approx(0.048)
    # Differences of 0.048 +- 0.0057: t = 0.048 / (0.0057009 / sqrt(5)) = 18.83, and t_4 has the
    # tail 1/2 - (1/2) s (1 + (1 - s^2) / 2) with s = t / sqrt(t^2 + 4).
    s = 18.8272 / (18.8272**2 + 4) ** 0.5
    p = 1 - s * (1 + (1 - s**2) / 2)
    assert found.comparisons["trial 7", "uniform"].p == pytest.approx(p, rel=1e-3)
    assert found.p["trial 7", "uniform"] == pytest.approx(4 * p, rel=1e-3)
    line = sentence(found)
    # 0.858 -+ 2.7764 * 0.019558 / sqrt(5)
    assert line.startswith("winner: trial 7 with 85.80% (95 % interval 83.37% to 88.23%)")
    # 0.048 -+ 2.776 * 0.0057009 / sqrt(5)
    assert "; +4.80 points against uniform (+4.09 to +5.51, p < 0.001, 5 seeds); " in line
    assert " points against static (" in line
    assert "; p corrected for 4 comparisons; " in line
    assert line.endswith(
        "; trials were chosen on these same examples, which flatters the best of them"
    )


def test_who_leads_without_significance_does_not_win() -> None:
    found = judge({"uniform": UNIFORM, "trial 9": LUCKY}, same_images=False)
    assert found.winner is None
    assert found.leader == "trial 9"
    # t = 0.026 / (0.036469 / sqrt(5)) = 1.5942; the tail as above.
    s = 1.59416 / (1.59416**2 + 4) ** 0.5
    p = 1 - s * (1 + (1 - s**2) / 2)
    assert found.p == {("trial 9", "uniform"): pytest.approx(p, rel=1e-4)}
    assert sentence(found) == (
        "no significant winner: the best that was searched is trial 9 with 83.60% "
        "(95 % interval 79.43% to 87.77%); "
        f"+2.60 points against uniform (-1.93 to +7.13, p {p:.2g}, 5 seeds): may be chance"
    )


def test_one_baseline_that_is_not_beaten_is_enough() -> None:
    close = {seed: value - 0.001 * (seed % 2) for seed, value in AHEAD.items()}
    found = judge({"uniform": UNIFORM, "static": close, "trial 7": AHEAD}, same_images=False)
    assert found.p["trial 7", "uniform"] < 0.05
    assert found.winner is None


def test_significantly_worse_is_no_winner() -> None:
    found = judge({"uniform": AHEAD, "trial 3": UNIFORM}, same_images=False)
    assert found.p["trial 3", "uniform"] < 0.05
    assert found.winner is None
    assert "; -4.80 points against uniform (-5.51 to -4.09, p < 0.001, 5 seeds)" in sentence(found)


def test_of_several_winners_the_one_with_the_highest_mean_wins() -> None:
    spread = [0.01, 0.012, 0.011, 0.009, 0.01]
    better = {seed: value + spread[seed] for seed, value in AHEAD.items()}
    for names in (("a", "b"), ("b", "a")):
        accuracies = dict(zip(names, (AHEAD, better), strict=True)) | {"uniform": UNIFORM}
        assert judge(accuracies, same_images=False).winner == names[1]


def test_a_steady_candidate_wins_where_the_leader_is_only_lucky() -> None:
    lucky = runs(0.99, 0.82, 0.99, 0.82, 0.80)
    found = judge({"uniform": UNIFORM, "lucky": lucky, "steady": AHEAD}, same_images=False)
    assert found.accuracies["lucky"].mean > found.accuracies["steady"].mean
    assert found.winner == found.leader == "steady"


def test_more_comparisons_ask_for_more() -> None:
    # By 0.01, 0.03, 0.02, 0.01, 0.03: t = 0.02 / (0.01 / sqrt(5)) = 4.47, p = 0.011.
    some = runs(0.81, 0.85, 0.83, 0.84, 0.82)
    assert judge({"uniform": UNIFORM, "a": some}, same_images=False).winner == "a"
    many = {"uniform": UNIFORM, "a": some} | {f"l{number}": LUCKY for number in range(4)}
    found = judge(many, same_images=False)
    assert found.p["a", "uniform"] == pytest.approx(5 * 0.01106, rel=1e-3)
    assert found.winner is None


@pytest.mark.parametrize(
    ("accuracies", "line"),
    [
        ({}, "no significant winner: no candidate was trained"),
        (
            {"uniform": UNIFORM, "trial 7": {}},
            "no significant winner: no candidate was trained",
        ),
        (
            {"uniform": {}, "trial 7": runs(0.9)},
            "no significant winner: no baseline to compare trial 7 with 90.00%",
        ),
        (
            {"uniform": runs(0.8), "trial 7": runs(0.9)},
            "no significant winner: the best that was searched is trial 7 "
            "with 90.00%; +10.00 points against uniform "
            "(1 seed: no test)",
        ),
        (
            {"static": {5: 0.8}, "trial 7": runs(0.9)},
            "no significant winner: the best that was searched is trial 7 "
            "with 90.00%; no seed in common with static",
        ),
        (
            {"uniform": runs(0.8, 0.8), "trial 7": runs(0.9, 0.9)},
            "no significant winner: the best that was searched is trial 7 "
            "with 90.00% (95 % interval 90.00% to 90.00%); "
            "+10.00 points against uniform (the same for each of 2 seeds: no test)",
        ),
    ],
)
def test_what_cannot_be_tested_is_said(accuracies: dict[str, dict[int, float]], line: str) -> None:
    found = judge(accuracies, same_images=False)
    assert found.winner is None
    assert sentence(found) == line


def test_a_baseline_without_common_seeds_is_not_beaten() -> None:
    elsewhere = {seed + 100: value for seed, value in STATIC.items()}
    accuracies = {"uniform": UNIFORM, "static": elsewhere, "trial 7": AHEAD}
    assert judge(accuracies, same_images=False).winner is None
    assert judge(accuracies, same_images=False, baselines=["uniform"]).leader == "trial 7"


def test_without_a_difference_between_plans_winners_are_rare() -> None:
    generator = random.Random(0)
    wins = 0
    for _ in range(400):
        drawn: dict[str, dict[int, float]] = {
            name: runs(*(generator.gauss(0.8, 0.01) for _ in range(4)))
            for name in ("uniform", "static", "a", "b", "c")
        }
        wins += judge(drawn, same_images=False).winner is not None
    # Holm allows 5 % for any wrong rejection, winners need two: 20 of 400 at the very most.
    assert wins <= 20


# Rank correlation


def counted_tau(pairs: list[tuple[float, float]]) -> float:
    """Tau-b by looking at every two pairs (Kendall 1945)."""
    agree = ties_first = ties_second = 0
    every = list(itertools.combinations(pairs, 2))
    for (a, b), (c, d) in every:
        product = (a - c) * (b - d)
        agree += (product > 0) - (product < 0)
        ties_first += a == c
        ties_second += b == d
    return float(agree / ((len(every) - ties_first) * (len(every) - ties_second)) ** 0.5)


@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_tau_counts_pairs_in_order(levels: int) -> None:
    generator = random.Random(levels)
    for count in (3, 8, 25):
        pairs = [(generator.randrange(levels) / 10, generator.random()) for _ in range(count)]
        pairs[0], pairs[1] = (-1.0, 0.5), (-2.0, 0.5)
        found = kendall(pairs)
        assert found.tau == pytest.approx(counted_tau(pairs))
        assert found.count == count


def test_tau_has_the_exact_p_value_of_few_trials() -> None:
    # Of the 4! = 24 orders one has tau 1 and one has -1.
    pairs = [(1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (4.0, 8.0)]
    assert kendall(pairs).tau == pytest.approx(1)
    assert kendall(pairs).p == pytest.approx(2 / 24)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(1.0, 2.0), (2.0, 3.0)],
        [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)],
        [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)],
    ],
)
def test_few_trials_or_one_value_have_no_tau(pairs: list[tuple[float, float]]) -> None:
    assert kendall(pairs) == Correlation(None, None, len(pairs))


def test_the_top_third_is_followed_to_the_end() -> None:
    finals = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5]
    pairs = [(-float(rank), final) for rank, final in enumerate(finals)]
    # On top of the rung: 0.9, 0.1, 0.8; of the end: 0.9, 0.8, 0.7.
    assert top_overlap(pairs) == (2, 3)
    assert top_overlap(pairs, share=5 / 9) == (3, 5)
    assert top_overlap(pairs[:2]) == top_overlap(pairs[:1]) == (1, 1)
    assert top_overlap([]) == (0, 0)


def test_ties_at_the_edge_of_the_top() -> None:
    # At the rung the earlier of equals goes on; at the end both equal the last one on top.
    assert top_overlap([(0.5, 0.7), (0.5, 0.9), (0.1, 0.7)]) == (0, 1)
    assert top_overlap([(0.5, 0.9), (0.1, 0.9), (0.1, 0.1)]) == (1, 1)
    assert top_overlap([(0.1, 0.9), (0.5, 0.9), (0.1, 0.1)]) == (1, 1)


def test_ranks_are_pooled_within_groups_only() -> None:
    # 3 pairs all alike, and 6 of which 5 are alike and 1 is not: (3 + 5 - 1) / 9.
    up = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    mixed = [(0.1, 1.0), (0.2, 3.0), (0.3, 2.0), (0.4, 4.0)]
    assert pooled_tau([up, mixed]) == pytest.approx(7 / 9)
    # Between the groups, accuracy falls with the first value; nobody asks.
    assert pooled_tau([up, [(a - 100, b + 100) for a, b in up]]) == pytest.approx(1.0)
    assert pooled_tau([up[:2], []]) is None


def test_every_rung_says_how_far_to_trust_it() -> None:
    up = [(rank / 100, rank / 100) for rank in range(12)]
    down = [(rank / 100, -rank / 100) for rank in range(12)]
    found = trust({3: up, 9: down, 27: []})
    assert found == {
        3: Trust(kendall(up), (4, 4)),
        9: Trust(kendall(down), (0, 4)),
        27: Trust(Correlation(None, None, 0), (0, 0)),
    }
    assert [trust_sentence(f"rung of {epochs} epochs", one) for epochs, one in found.items()] == [
        "rung of 3 epochs: tau 1.00 over 12 trials: strong; of its top third, 4 of 4 finished in "
        "the final top third",
        "rung of 9 epochs: tau -1.00 over 12 trials: poor; of its top third, 0 of 4 finished in "
        "the final top third",
        "rung of 27 epochs: no rank correlation from 0 trials",
    ]


@pytest.mark.parametrize(
    ("tau", "p", "words"),
    [
        (0.29, 0.001, "tau 0.29 over 40 trials: poor; of"),
        (0.3, 0.001, "tau 0.30 over 40 trials: weak; of"),
        (0.5, 0.001, "tau 0.50 over 40 trials: fair; of"),
        (0.7, 0.001, "tau 0.70 over 40 trials: strong; of"),
        (0.42, 0.0634, "tau 0.42 over 40 trials: weak, may be chance (p 0.063); of"),
    ],
)
def test_words_for_taus(tau: float, p: float, words: str) -> None:
    assert words in trust_sentence("3 epochs", Trust(Correlation(tau, p, 40), (5, 13)))


def test_a_verdict_needs_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, kwsearch.verdict as v; v.paired({0: 1, 1: 2, 2: 4}, {0: 0, 1: 0, 2: 0}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'optuna')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
