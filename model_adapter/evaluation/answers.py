"""Exact match and F1 of answers, as SQuAD's own evaluation computes them; and right answers.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, 6.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """Lower case, without punctuation, articles, and white space beyond one space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of those that are accepted, normalized; else 0."""
    return float(any(normalized(answer) == normalized(other) for other in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the words that an answer shares with the
    accepted one that it is nearest to, 0 to 1."""
    return max(_f1(normalized(answer).split(), normalized(other).split()) for other in accepted)


def holds(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer stands in the answer, word for word, both normalized; else 0."""
    said = normalized(answer)
    found = (normalized(other) for other in accepted)
    # An accepted answer of articles alone is nothing when normalized, and stands everywhere.
    return float(any(f" {other} " in f" {said} " if other else said == "" for other in found))


def _f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))
