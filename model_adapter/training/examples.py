"""Examples: what is read behind a memory, and which of its tokens are learned from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame
from model_adapter.prompts.overlap import overlap
from model_adapter.training.cloze import Clozes
from model_adapter.training.corpus import Corpus, Question, Reference

_RUNNING = 64  # tokens of text that goes on
_LONGEST_PROMPT, _LONGEST_ANSWER = 64, 40
_FOLLOWING, _SAYING = 0.5, 0.2  # how often there is such an example: they teach to recite
_OVERLAP = 0.9  # of text that goes on with what is remembered (paper, training)


@dataclass(frozen=True)
class Example:
    """A prompt and how it goes on; or, with an empty prompt, text that goes on behind a reference.

    Attributes:
        prompt: what is asked, as it stands in a frame.
        answer: how it goes on.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Row:
    """An example in a frame, behind memories or behind the references' text.

    Attributes:
        tokens: ids of prompt, template and answer.
        answer: how many of them, at the end, are the answer.
    """

    tokens: tuple[int, ...]
    answer: int


def asked(question: str, framing: str) -> str:
    """A question as a prompt."""
    return f"Question: {question}\nAnswer:" if framing == "plain" else question


class Framed:
    """Examples as tokens, for one framing.

    Args:
        model: whose tokens.
        frame: the framing.
    """

    def __init__(self, model: LanguageModel, frame: Frame) -> None:
        self._model = model
        self.frame = frame

    def tokens(self, text: str) -> list[int]:
        """A text as tokens."""
        return self._model.tokens(text)

    def row(self, example: Example) -> Row | None:
        """What stands behind memories or text; None if it is too long."""
        if not example.prompt:
            gap = self.frame.behind_memories("x").content
            gap = gap[: len(gap) - len(self._model.tokens("x"))]
            answer = self._model.tokens(example.answer)[:_RUNNING]
            return Row((*gap, *answer), len(answer)) if answer else None
        prompt = self.frame.behind_memories(asked(example.prompt, self.frame.framing))
        return self._joined([*prompt.content, *prompt.tail], example.answer)

    def alone(self, example: Example) -> Row | None:
        """The same for a model that has neither; None if it is too long."""
        if not example.prompt:
            answer = self._model.tokens(example.answer)[:_RUNNING]
            head = self.frame.alone("x").content
            head = head[: len(head) - len(self._model.tokens("x"))]
            return Row((*head, *answer), len(answer)) if answer else None
        prompt = self.frame.alone(asked(example.prompt, self.frame.framing))
        return self._joined([*prompt.content, *prompt.tail], example.answer)

    def text(self, references: Sequence[Reference]) -> list[int]:
        """The prefix and the references as text: what the teacher reads before a row."""
        text = self._model.tokens("\n\n".join(reference.text for reference in references))
        return [*self.frame.prefix, *text]

    def _joined(self, prompt: list[int], answer: str) -> Row | None:
        given = self._model.tokens(self.frame.before_answer + answer)
        if not given or len(given) > _LONGEST_ANSWER or len(prompt) > _LONGEST_PROMPT:
            return None
        return Row((*prompt, *given), len(given))


class Examples:
    """What can be asked about passages of a corpus.

    Args:
        corpus: the passages.
        clozes: makes questions.
        made: by the model itself, about references.
    """

    def __init__(
        self,
        corpus: Corpus,
        clozes: Clozes,
        made: Mapping[tuple[int, int], Sequence[Question]],
    ) -> None:
        self._corpus = corpus
        self._clozes = clozes
        self._made = made

    def about(self, passage: Sequence[Reference], rng: random.Random, most: int) -> list[Example]:
        """Up to so many different examples about consecutive references of a document: now and then
        running text, questions of people and of the model, now and then what the text says, and
        clozes. About a part of a reference only the last two: it may not answer the others."""
        found: list[Example] = []
        known: list[Question] = []
        if not any(reference.part for reference in passage):
            following = self._following(passage)
            if following is not None and rng.random() < _FOLLOWING:
                found.append(Example("", following))
            known += self._corpus.questions.get(passage[0].document, ())
            for reference in passage:
                known += self._made.get((reference.document, reference.ordinal), ())
        rng.shuffle(known)
        found += [Example(q.text, q.answer) for q in known[: max(1, most // 2)]]
        text = "\n\n".join(reference.text for reference in passage)
        saying = self._clozes.saying(text, rng) if rng.random() < _SAYING else None
        if saying is not None:
            found.append(Example(saying.text, saying.answer))
        # More than are needed: some are too long.
        found += [Example(q.text, q.answer) for q in self._clozes.about(text, rng, 2 * most)]
        return found

    def _following(self, passage: Sequence[Reference]) -> str | None:
        """The text behind a passage, unless the passage says the same."""
        last = passage[-1]
        behind = [
            reference
            for reference in self._corpus.documents[last.document]
            if reference.ordinal == last.ordinal + 1
        ]
        if not behind:
            return None
        tokens = behind[0].tokens[:_RUNNING]
        said = [token for reference in passage for token in reference.tokens]
        return None if overlap(said, tokens) >= _OVERLAP else behind[0].text
