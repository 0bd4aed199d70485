"""What a question sees: its documents, others beside them, or what is retrieved for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb import MemDB, PackedMemories, Retrieval
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import Question
from model_adapter.evaluation.settings import SEEN


class Seen:
    """Texts and memories that questions see.

    Args:
        database: the corpus with its memories.
        plan: which documents.
        retrieved: or whatever references are found for each question.
        weighing: how memories count.
    """

    def __init__(self, database: MemDB, plan: Plan, retrieved: bool, weighing: Weighing) -> None:
        self._database = database
        self._weighing = weighing
        self._plan = plan
        self._retrieved = retrieved

    def texts(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """See `arms.Texts`."""
        if self._retrieved:
            found = self._found(questions, SEEN)
            return [tuple(hit.reference.content for hit in one.hits) for one in found]
        return [self._plan.texts(question) for question in questions]

    def nearest(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Of each question the reference that is nearest to it, as text."""
        found = self._found(questions, 1)
        return [tuple(hit.reference.content for hit in one.hits) for one in found]

    def near(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Texts of the retrieved references that are read as memories: those that are not left out
        for their scores."""
        found = [self._weighing.kept(one) for one in self._found(questions, SEEN)]
        return [tuple(hit.reference.content for hit in one.hits) for one in found]

    def memories(self, questions: Sequence[Question]) -> list[PackedMemories]:
        """See `arms.Memories`; each with the biases that its question's scores give."""
        if self._retrieved:
            found = self._found(questions, SEEN, memories=True)
        else:
            found = [self._of(question, self._plan.seen(question)) for question in questions]
        return self._packed(questions, found)

    def others(self, questions: Sequence[Question]) -> list[PackedMemories]:
        """Memories that say nothing of the answers: for each question those of a document of
        another article."""
        found = [self._of(question, self._plan.other(question)) for question in questions]
        return self._packed(questions, found)

    def found(self, questions: Sequence[Question]) -> list[list[str]]:
        """For each question the documents of the references that are nearest to it, best first."""
        found = self._found(questions, SEEN)
        return [[hit.reference.document_id for hit in one.hits] for one in found]

    def _packed(
        self, questions: Sequence[Question], found: Sequence[Retrieval]
    ) -> list[PackedMemories]:
        shape = self._database.shape
        packed = []
        for question, one in zip(questions, found, strict=True):
            weighing = self._weighing.answering(shape.framing, question.text)
            packed.append(weighing.packed(one, shape))
        return packed

    def _found(
        self, questions: Sequence[Question], most: int, *, memories: bool = False
    ) -> list[Retrieval]:
        texts = [question.text for question in questions]
        return self._database.retrieve_batch(texts, most, memories=memories)

    def _of(self, question: Question, documents: Sequence[str]) -> Retrieval:
        """All references of some documents, as hits of the question."""
        number = sum(len(self._database.get(key).references) for key in documents)
        (found,) = self._database.retrieve_batch(
            [question.text],
            number,
            accept=lambda _, reference: reference.document_id in documents,
        )
        return found


@dataclass(frozen=True)
class Size:
    """Bytes of stored memories.

    Attributes:
        reference: a reference's memory, the mean.
        tokens_128: for 128 tokens of text.
        codecs: what they are written with.
    """

    reference: float
    tokens_128: float
    codecs: tuple[str, ...]


def size_of(database: MemDB) -> Size:
    """Of all memories of a database."""
    count = size = tokens = 0
    for document in database.documents():
        for reference, stored in database.memories(document.id):
            if stored is not None:
                count += 1
                size += len(stored.payload)
                tokens += reference.tokens
    codecs = database.stats()["memory_bytes"].get("codecs", {})
    names = sorted({name.partition(":")[0] for name in codecs})
    return Size(size / max(1, count), 128 * size / max(1, tokens), tuple(names))
