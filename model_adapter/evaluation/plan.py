"""Which questions are asked, side by side with which, and what of the corpus each of them sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from memdb import Document, InvalidInputError
from model_adapter.evaluation.arms import prompt_of
from model_adapter.evaluation.articles import Articles
from model_adapter.evaluation.questions import Question, spread
from model_adapter.evaluation.ranking import Candidates
from model_adapter.evaluation.settings import BESIDE, SEEN, Settings
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame


class Plan:
    """The questions of an evaluation.

    Args:
        documents: the corpus.
        questions: of the whole file.
        settings: see `Settings`.

    Attributes:
        questions: that are asked; those of the same documents side by side, so that these are read
            once.

    Raises:
        InvalidInputError: controls are asked for, and a question is about the whole corpus.
    """

    def __init__(
        self,
        documents: Mapping[str, Document],
        questions: Sequence[Question],
        settings: Settings,
    ) -> None:
        chosen = [questions[place] for place in spread(len(questions), settings.limit)]
        order: dict[tuple[str, ...], int] = {}
        for question in chosen:
            order.setdefault(question.documents, len(order))
        self.questions = sorted(chosen, key=lambda question: order[question.documents])
        self._all = questions
        self._documents = documents
        self._settings = settings
        self._articles = Articles(documents)
        if settings.controls:
            self._require_others()

    def seen(self, question: Question) -> tuple[str, ...]:
        """Ids of the documents that a question sees where none are retrieved. All questions of the
        same documents and distractors see the same, whatever other questions there are."""
        own = question.documents
        if self._settings.references != "5":
            return own
        if len(own) > 1:
            most, others = BESIDE, list(question.distractors)
        else:
            most, others = SEEN - len(own), self._articles.beside(question.document)
        if len(others) < most:
            others = [key for key in self._documents if key not in own]
        random = self._random(own)
        most = min(most, len(others))
        chosen = [others[place] for place in random.choice(len(others), most, replace=False)]
        both = [*own, *chosen]
        return tuple(both[place] for place in random.permutation(len(both)))

    def other(self, question: Question) -> tuple[str, ...]:
        """Id of a document of another article; of the corpus, where there is no other article."""
        own = question.documents
        others = self._articles.outside(own) or [key for key in self._documents if key not in own]
        return (others[self._random(("other", *own)).integers(len(others))],)

    def candidates(self, question: Question) -> tuple[str, ...]:
        """Answers to other questions, among which the right one is ranked; none without ranking."""
        return self._candidates.of(question) if self._settings.ranking else ()

    @cached_property
    def _candidates(self) -> Candidates:
        # Of the whole file: a limit changes none of them.
        return Candidates(self._all, self._articles)

    def _random(self, name: Sequence[str]) -> np.random.Generator:
        digits = hashlib.blake2b("\0".join(name).encode(), digest_size=8).digest()
        return np.random.default_rng([self._settings.seed, int.from_bytes(digits)])

    def _require_others(self) -> None:
        for question in self.questions:
            if set(question.documents) == set(self._documents):
                raise InvalidInputError(
                    f"the question '{question.id}' is about all documents of the corpus; the "
                    "controls need another one. Add a document, or leave out `--controls`"
                )

    def texts(self, question: Question) -> tuple[str, ...]:
        """Those documents' texts."""
        return tuple(self._documents[key].text.strip() for key in self.seen(question))

    def tokens(self, model: LanguageModel, reference_length: int) -> list[int]:
        """How many tokens each question sees as text; where they are retrieved, at most."""
        if self._settings.references == "retrieved":
            return [SEEN * (reference_length + 2)] * len(self.questions)
        counts: dict[tuple[str, ...], int] = {}
        for question in self.questions:
            seen = self.seen(question)
            if seen not in counts:
                counts[seen] = len(model.tokens("\n\n".join(self.texts(question))))
        return [counts[self.seen(question)] for question in self.questions]

    def room(self, model: LanguageModel) -> int:
        """Tokens to make room for behind a prompt: of the longest answer."""
        answers = [len(model.tokens(" " + question.answers[0])) for question in self.questions]
        return max(self._settings.new_tokens, *answers) + 1

    def require_room(self, model: LanguageModel, frame: Frame, reference_length: int) -> None:
        """Raise `InvalidInputError` if something is too long for the model, naming it."""
        room = self.room(model)
        counts = self.tokens(model, reference_length)
        for question, tokens in zip(self.questions, counts, strict=True):
            prompt = frame.behind_memories(prompt_of(frame, question))
            before = len(frame.prefix) + max(tokens, reference_length)
            end = before + len(prompt.content) + len(prompt.tail)
            if end + room > model.max_positions:
                raise InvalidInputError(
                    f"the question '{question.id}' with what it sees takes {end} tokens, and an "
                    f"answer up to {room} more; the model '{model.name}' ends at "
                    f"{model.max_positions}. Let it see less (references '1' or 'retrieved'), cut "
                    f"the document '{question.document}', or take a model for longer texts"
                )
