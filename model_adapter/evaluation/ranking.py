"""Answers among which the right one is ranked: those of other questions that ask for the same."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from model_adapter.evaluation.answers import normalized
from model_adapter.evaluation.articles import Articles
from model_adapter.evaluation.questions import Question

#: Answers that are ranked together with the right one.
OTHERS = 7

#: What an answer is: yes or no; a number or a date; a name; something else.
Sort = Literal["yes or no", "number", "name", "other"]

_NUMBERS = re.compile(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven|"
    "eigh|nine)teen|(twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|billion|"
    "half|once|twice|first|second|third|january|february|march|april|june|july|august|september|"
    "october|november|december"
)
_SMALL = re.compile("a|an|and|at|by|de|for|from|in|la|of|on|or|the|to|van|von|with")
_WORD = re.compile(r"\w+")


def sort_of(answer: str) -> Sort:
    """What an answer is, by its words."""
    plain = normalized(answer)
    if plain in ("yes", "no"):
        return "yes or no"
    if any(letter.isdigit() for letter in plain) or _NUMBERS.fullmatch(plain.partition(" ")[0]):
        return "number"
    words = [word for word in _WORD.findall(answer) if not _SMALL.fullmatch(word.lower())]
    capitals = sum(word[0].isupper() for word in words)
    return "name" if words and 2 * capitals > len(words) else "other"


class Candidates:
    """For each question seven answers to others: of the same sort, of its article where there are
    as many, else of the corpus; where that has fewer, too, the rest are of any sort. No two of them
    are the same, normalized, and none is accepted. They are always the same for a question of a
    file.

    Args:
        questions: of the whole file.
        articles: of the corpus.
    """

    def __init__(self, questions: Sequence[Question], articles: Articles) -> None:
        self._articles = articles
        self._all: dict[str, str] = {}
        self._sorts: dict[Sort, dict[str, str]] = defaultdict(dict)
        self._own: dict[tuple[Sort, str], dict[str, str]] = defaultdict(dict)
        for question in questions:
            answer = question.answers[0]
            title, sort, name = (
                articles.title(question.document),
                sort_of(answer),
                normalized(answer),
            )
            self._all.setdefault(name, answer)
            self._sorts[sort].setdefault(name, answer)
            if title is not None:
                self._own[sort, title].setdefault(name, answer)

    def of(self, question: Question) -> tuple[str, ...]:
        """Those of a question: its own wrong answers, if it has any; fewer than seven where the
        whole file has fewer."""
        if question.wrong:
            return question.wrong
        name = "\0".join([question.text, *question.documents])
        digits = hashlib.blake2b(name.encode(), digest_size=8).digest()
        random = np.random.default_rng(int.from_bytes(digits))
        accepted = {normalized(answer) for answer in question.answers}
        title, sort = self._articles.title(question.document), sort_of(question.answers[0])
        near = _without(accepted, self._own.get((sort, title), {}) if title is not None else {})
        if len(near) < OTHERS:
            near = _without(accepted, self._sorts[sort])
        chosen = _drawn(random, near, OTHERS)
        if len(chosen) < OTHERS:
            rest = _without({*accepted, *map(normalized, chosen)}, self._all)
            chosen += _drawn(random, rest, OTHERS - len(chosen))
        return tuple(chosen)


def _without(names: set[str], answers: Mapping[str, str]) -> list[str]:
    return [answer for name, answer in answers.items() if name not in names]


def _drawn(random: np.random.Generator, answers: Sequence[str], most: int) -> list[str]:
    places = random.choice(len(answers), min(most, len(answers)), replace=False)
    return [answers[place] for place in places]
