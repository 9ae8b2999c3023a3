"""Word error rates against an edit distance of our own, and greedy decoding by hand."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from torch import Tensor

from kwsearch.wer import WordErrors, greedy_decode, word_errors


def edits(reference: list[int], hypothesis: list[int]) -> int:
    """Levenshtein's distance, by its table."""
    table = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        before, table[0] = table[0], i
        for j, given in enumerate(hypothesis, 1):
            before, table[j] = (
                table[j],
                min(table[j] + 1, table[j - 1] + 1, before + (wanted != given)),
            )
    return table[-1]


def test_errors_of_all_sentences_are_added_before_the_division() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    found = word_errors(["WETTER MORGEN REGEN", "SONNE"], ["WETTER REGEN", "SONNE WIND"])
    assert found == WordErrors(substitutions=0, deletions=1, insertions=1, words=4)
    assert found.rate == 0.5
    assert word_errors(["A B"], ["A C"]) == WordErrors(1, 0, 0, 2)
    assert word_errors(["A"], ["B C D"]).rate == 3


def test_the_rate_is_that_of_an_edit_distance() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    draw = random.Random(0)

    def sentences() -> list[list[int]]:
        return [[draw.randrange(4) for _ in range(draw.randrange(9))] for _ in range(60)]

    references, hypotheses = sentences(), sentences()
    assert [] in references
    assert [] in hypotheses
    found = word_errors(references, hypotheses)
    errors = sum(map(edits, references, hypotheses))
    words = sum(map(len, references))
    assert found.words == words
    assert found.rate == errors / words
    assert errors > 100


def test_words_numbers_and_text_are_one() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    expected = WordErrors(1, 0, 0, 2)
    assert word_errors([" 1  2 "], ["1 3"]) == expected
    assert word_errors([["1", "2"]], [[1, 3]]) == expected


def test_without_jiwer_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(
        ValueError, match="package jiwer, which is not installed: pip install 'kwsearch"
    ):
        word_errors(["A"], ["A"])


def test_sentences_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references and 1 hypotheses: one for each"):
        word_errors(["A", "B"], ["A"])
    with pytest.raises(ValueError, match="lists of sentences, not one sentence"):
        word_errors("A B", ["A", "B", "C"])
    with pytest.raises(ValueError, match="the references have no words"):
        word_errors(["", []], ["A", "B"])
    with pytest.raises(ValueError, match="word 'A B': a word has no blanks"):
        word_errors([["A B"]], [["A"]])
    with pytest.raises(ValueError, match="word '': a word has no blanks and is not empty"):
        word_errors(["A"], [[""]])


def paths(*rows: list[int], classes: int = 3) -> Tensor:
    """Logits (T, B, V) whose likeliest classes are these."""
    return torch.nn.functional.one_hot(torch.tensor(rows), classes).transpose(0, 1).float()


def test_repeats_collapse_and_blanks_drop() -> None:
    logits = paths([0, 1, 1, 0, 1, 2, 2], [2, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0])
    assert greedy_decode(logits) == [[1, 1, 2], [2], []]
    assert greedy_decode(logits, blank=2) == [[0, 1, 0, 1], [], [0]]


def test_frames_past_a_length_are_not_read() -> None:
    logits = paths([1, 2, 1], [1, 2, 1], [1, 2, 1])
    assert greedy_decode(logits, torch.tensor([3, 1, 0])) == [[1, 2, 1], [1], []]


def test_logits_and_lengths_that_do_not_fit_are_refused() -> None:
    logits = paths([1, 2, 1])
    with pytest.raises(ValueError, match=r"lengths \[4\]: 1 of them, each from 0 to 3"):
        greedy_decode(logits, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"shape \(3, 1, 3\) with blank 3: expected"):
        greedy_decode(logits, blank=3)
