"""Word error rate of recognised sentences, and greedy decoding of CTC's logits.

    WER = (S + D + I) / N    substitutions, deletions, insertions; N words in the references

The errors of all sentences are added before the division: not a mean of rates. The alignment is
jiwer's, an optional package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Sentence = str | Sequence[int | str]  # "A B C", or its words, or their numbers


@dataclass(frozen=True)
class WordErrors:
    """Errors of a set of sentences. words: those of the references."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def rate(self) -> float:
        """The WER, above 1 where there are more insertions than hits."""
        return (self.substitutions + self.deletions + self.insertions) / self.words


def need() -> None:
    """Raise ValueError where jiwer is not installed."""
    if importlib.util.find_spec("jiwer") is None:
        raise ValueError(
            "word error rates need the package jiwer, which is not installed: "
            "pip install 'kwsearch[sign]'"
        )


def word_errors(references: Sequence[Sentence], hypotheses: Sequence[Sentence]) -> WordErrors:
    """The fewest errors between each reference and its hypothesis, summed.

    Raises ValueError without jiwer (`need`), for other counts of sentences, for references without
    a word and for words with blanks.
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("references and hypotheses: lists of sentences, not one sentence")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: one for each"
        )
    wanted, given = ([_words(one) for one in group] for group in (references, hypotheses))
    if not any(wanted):
        raise ValueError("the references have no words: an error rate needs one at least")
    need()
    import jiwer

    found = jiwer.process_words(
        [" ".join(words) for words in wanted], [" ".join(words) for words in given]
    )
    words = sum(map(len, wanted))
    assert found.hits + found.substitutions + found.deletions == words
    return WordErrors(found.substitutions, found.deletions, found.insertions, words)


def greedy_decode(logits: Tensor, lengths: Tensor | None = None, blank: int = 0) -> list[list[int]]:
    """The likeliest class of each frame, repeats collapsed, blanks dropped.

    logits: (T, B, V)  lengths: (B,) frames of each sequence, all T by default
    """
    if logits.dim() != 3 or not 0 <= blank < logits.shape[2]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} with blank {blank}: expected (T, B, V), the "
            "blank one of its V classes"
        )
    steps, batch, _ = logits.shape
    counts = [steps] * batch if lengths is None else lengths.tolist()
    if len(counts) != batch or not all(0 <= count <= steps for count in counts):
        raise ValueError(f"lengths {counts}: {batch} of them, each from 0 to {steps}")
    best = logits.argmax(2).T.tolist()
    return [_collapsed(row[:count], blank) for row, count in zip(best, counts, strict=True)]


def _collapsed(path: Sequence[int], blank: int) -> list[int]:
    before = [blank, *path]
    return [new for old, new in zip(before, path, strict=False) if new not in (old, blank)]


def _words(sentence: Sentence) -> list[str]:
    if isinstance(sentence, str):
        return sentence.split()
    words = [str(word) for word in sentence]
    for word in words:
        if word.split() != [word]:
            raise ValueError(f"word {word!r}: a word has no blanks and is not empty")
    return words
