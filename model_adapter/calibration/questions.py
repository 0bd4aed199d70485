"""Questions about a database's text that the model asks itself, those that the text answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memdb import Progress
from model_adapter.calibration.losses import BATCH, losses
from model_adapter.evaluation.folder import Results, digest
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame
from model_adapter.training.asking import Asking
from model_adapter.training.corpus import Corpus, Question, Reference
from model_adapter.training.examples import Example, Framed, asked

_ROUND = 16  # references that are asked about before it is looked whether that is enough
_GAIN = 0.2  # nats a token by which the text has to make the answer likelier
_SHARE = 0.25  # of the answer's words, those of the question left out, that stand in the text


@dataclass(frozen=True)
class Kept:
    """A question that a reference answers.

    Attributes:
        name: differs where reference, question or answer do.
        prompt: the question, as it stands in the frame.
        before: it as tokens behind memories.
        answer: the answer's.
        alone: NLL of the answer without anything, the mean over its tokens, in nats.
        text: likewise behind the reference as text.
    """

    name: str
    prompt: str
    before: list[int]
    answer: list[int]
    alone: float
    text: float


@dataclass(frozen=True)
class _Candidate:
    """A question and its answer as tokens: behind memories, alone, and behind the text."""

    name: str
    prompt: str
    before: list[int]
    answer: list[int]
    alone: list[int]
    text: list[int]


def _is_told(text: str, question: Question) -> bool:
    """Whether some of what the answer says that the question does not say stands in the text. (More
    is not asked for: a small model says few things that are true, and how likely it is to say the
    others depends on the text as well.)"""
    new = _words(question.answer) - _words(question.text)
    return bool(new) and len(new & _words(text)) >= _SHARE * len(new)


def _words(text: str) -> set[str]:
    """Numbers, and words of more than three letters: those of less are in any text."""
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3 or word.isdigit()}


class Questions:
    """Makes them.

    Args:
        model: that asks and answers.
        frame: of the database.
        corpus: references, each of a document of its own.
        asking: about these.
        results: keeps what was measured.
    """

    def __init__(
        self, model: LanguageModel, frame: Frame, corpus: Corpus, asking: Asking, results: Results
    ) -> None:
        self._model = model
        self._framed = Framed(model, frame)
        self._corpus = corpus
        self._asking = asking
        self._results = results

    def kept(self, wanted: int, progress: Progress) -> list[Kept]:
        """So many questions, fewer where the references give no more.

        Kept are those whose answer has a quarter of its words from the text, and is made likelier
        by it, by more than 0.2 nats a token: what the model makes up, or answers as well without
        the text, tells nothing of memories.
        """
        there = len(self._corpus.references)
        found: list[Kept] = []
        for most in range(_ROUND, there + _ROUND, _ROUND):
            made = self._asking.questions(
                min(most, there), lambda stage, done, _: progress(stage, done, there)
            )
            usable = [
                (reference, Example(question.text, question.answer))
                for (number, _), questions in made.items()
                for reference in self._corpus.documents[number]
                for question in questions
                if _is_told(reference.text, question)
            ]
            measured = [
                kept
                for start in range(0, len(usable), BATCH)
                for kept in self._measured(usable[start : start + BATCH])
                if kept.alone - kept.text > _GAIN
            ]
            # Two processes that ask at once have each written the same.
            found = list({kept.name: kept for kept in measured}.values())
            if len(found) >= wanted:
                break
        progress("asking", there, there)
        return found[:wanted]

    def _measured(self, batch: Sequence[tuple[Reference, Example]]) -> list[Kept]:
        made = [self._candidate(reference, example) for reference, example in batch]
        candidates = [one for one in made if one is not None]
        missing = [one for one in candidates if self._results.get(one.name) is None]
        if missing:
            answers = [one.answer for one in missing]
            alone = losses(self._model, [one.alone for one in missing], answers)
            text = losses(self._model, [one.text for one in missing], answers)
            self._results.add(
                {
                    one.name: {"alone": nll, "text": nll_text}
                    for one, nll, nll_text in zip(missing, alone, text, strict=True)
                }
            )
        kept = []
        for one in candidates:
            measured = self._results.get(one.name)
            assert measured is not None
            nlls = measured["alone"], measured["text"]
            kept.append(Kept(one.name, one.prompt, one.before, one.answer, *nlls))
        return kept

    def _candidate(self, reference: Reference, example: Example) -> _Candidate | None:
        """None where question or answer are too long."""
        row, alone = self._framed.row(example), self._framed.alone(example)
        if row is None or alone is None:
            return None
        before, answer = list(row.tokens[: -row.answer]), list(row.tokens[-row.answer :])
        where = [self._corpus.names[reference.document], reference.ordinal]
        return _Candidate(
            digest([*where, example.prompt, example.answer]),
            asked(example.prompt, self._framed.frame.framing),
            before,
            answer,
            list(alone.tokens[: -alone.answer]),
            [*self._framed.text([reference]), *before],
        )
