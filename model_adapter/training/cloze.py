"""Questions that a text answers, made by rules: a span of a sentence is asked for.

They need not be good questions. What a memory is trained for is that the model goes on as it would
with the text before it, and that takes prompts whose continuation depends on the text.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model_adapter.training.corpus import Question

_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")
_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")
_NAME = re.compile(
    r"[A-Z][\w'’-]+(?:\s+(?:of|the|de|von|van|and)\s+[A-Z][\w'’-]+|\s+[A-Z][\w'’-]+){0,3}"
)
_NUMBER = re.compile(r"\b\d[\d,.]*\d\b|\b\d\b")
_YEAR = re.compile(r"\b(?:1[0-9]|20)\d\d\b")
_COUNTED = re.compile(
    r"\b(\d[\d,.]*|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|"
    r"hundred|thousand)\s+([a-z]{3,}s)\b"
)
_COMMON = frozenset(
    re.split(
        " ",
        "the a an of to in and or is are was were be been by for on with as at from that this these"
        " those it its his her their they he she we you i not no but if which who when where how"
        " what has have had do does did can could may might will would shall should also such than"
        " then there here into about over under between most more some any all each other one many",
    )
)

_BLANK = "____"
_BLANKED = (
    "Fill in the blank: {}",
    "What belongs in the blank? {}",
    "Which words are missing? {}",
    "{}\nWhat does the blank stand for?",
)
_LONGEST = 320  # characters of a sentence
_MOST_WORDS = 4  # of an answer


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    kind: str


def sentences(text: str) -> list[str]:
    """The sentences of a text that are neither very short nor very long."""
    parts = (" ".join(part.split()) for part in _SENTENCE.split(text))
    return [part for part in parts if 20 <= len(part) <= _LONGEST]


class Clozes:
    """Makes questions; knows which words are rare.

    Args:
        texts: of the corpus.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts: Mapping[str, int] = Counter(
            word.group().lower() for text in texts for word in _WORD.finditer(text)
        )

    def about(self, text: str, rng: random.Random, most: int) -> list[Question]:
        """Up to so many different questions that a text answers."""
        found = [(s, span) for s in sentences(text) for span in self._spans(s)]
        rng.shuffle(found)
        made: dict[tuple[str, str], Question] = {}
        for sentence, span in found:
            answer = sentence[span.start : span.end]
            made.setdefault((sentence, answer), _question(sentence, span, rng))
            if len(made) == most:
                break
        return list(made.values())

    def saying(self, text: str, rng: random.Random) -> Question | None:
        """A question for what a text says about something: a sentence is the answer."""
        choices = [(s, span) for s in sentences(text) for span in self._spans(s)]
        choices = [(s, span) for s, span in choices if span.kind in ("name", "rare")]
        if not choices:
            return None
        sentence, span = rng.choice(choices)
        topic = sentence[span.start : span.end]
        asked = rng.choice(
            (
                f"What does the text say about {topic}?",
                f"Tell me about {topic}.",
                f"What do you know about {topic}?",
            )
        )
        return Question(asked, sentence)

    def _spans(self, sentence: str) -> list[_Span]:
        """What can be asked for: names, numbers, rare words."""
        spans = [_Span(*found.span(1), "counted") for found in _COUNTED.finditer(sentence)]
        spans += [_Span(*found.span(), "year") for found in _YEAR.finditer(sentence)]
        spans += [_Span(*found.span(), "number") for found in _NUMBER.finditer(sentence)]
        for found in _NAME.finditer(sentence):
            parts = found.group().split()
            if len(parts) <= _MOST_WORDS and not (len(parts) == 1 and self._is_common(parts[0])):
                spans.append(_Span(*found.span(), "name"))
        words = list(_WORD.finditer(sentence))
        for n, found in enumerate(words):
            if self._is_common(found.group()) or len(found.group()) < 4:
                continue
            end = found.end()
            if n + 1 < len(words) and sentence[end : words[n + 1].start()] == " ":
                longer = words[n + 1]  # "electric tractors": with the noun behind it
                if not self._is_common(longer.group()) and len(longer.group()) > 3:
                    spans.append(_Span(found.start(), longer.end(), "rare"))
            spans.append(_Span(found.start(), end, "rare"))
        # Of those in one place, the kind that was found first.
        return list({(span.start, span.end): span for span in reversed(spans)}.values())

    def _is_common(self, word: str) -> bool:
        word = word.lower()
        return word in _COMMON or self._counts[word] > 0.002 * max(5000, len(self._counts))


def _question(sentence: str, span: _Span, rng: random.Random) -> Question:
    answer = sentence[span.start : span.end]
    before, after = sentence[: span.start], sentence[span.end :]
    blanked = f"{before}{_BLANK}{after}"
    forms = [form.format(blanked) for form in _BLANKED]
    if span.kind == "year":
        plain = before.rstrip()
        forms += [f"In which year: {blanked}", f"When was it? {blanked}"]
        if plain.endswith((" in", " since", "In", "Since")) and after.startswith((",", ".", " ")):
            forms.append(f"When? {_joined(plain.rpartition(' ')[0], after)}")
    elif span.kind == "counted":
        noun = after.split()[0].strip(".,;:")
        forms += [f"How many {noun}? {blanked}", f"How many {noun} are meant in: {blanked}"]
    elif span.kind == "name":
        forms += [f"Who or what is it? {blanked}", f"Which name is missing? {blanked}"]
        if not before.strip() and after.startswith(" "):
            forms += [f"Who or what{after.rstrip('.!')}?"] * 3
    if len(before) > 25 and not after.strip(" .!?"):
        forms += [f"Complete the sentence: {before.rstrip()}"] * 2
    return Question(rng.choice(forms), answer)


def _joined(before: str, after: str) -> str:
    return " ".join(f"{before} {after.lstrip(' ,')}".split())
