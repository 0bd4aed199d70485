"""What a question sees: its document, its article, or what is retrieved for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb import MemDB, PackedMemories, pack
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.settings import SEEN
from model_adapter.questions import Question


class Sights:
    """Texts and memories that questions see.

    Args:
        database: the corpus with its memories.
        plan: which documents.
        retrieved: or whatever references are found for each question.
    """

    def __init__(self, database: MemDB, plan: Plan, retrieved: bool) -> None:
        self._database = database
        self._plan = plan
        self._retrieved = retrieved

    def texts(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """See `arms.Texts`."""
        if self._retrieved:
            found = self._database.retrieve_batch(
                [question.text for question in questions], SEEN, memories=False
            )
            return [tuple(hit.reference.content for hit in one.hits) for one in found]
        return [self._plan.texts(question) for question in questions]

    def memories(self, questions: Sequence[Question]) -> list[PackedMemories]:
        """See `arms.Memories`."""
        shape = self._database.shape
        if self._retrieved:
            found = self._database.retrieve_batch([question.text for question in questions], SEEN)
            return [pack(one.stored, shape) for one in found]
        packed: dict[tuple[str, ...], PackedMemories] = {}
        for question in questions:
            seen = self._plan.seen(question)
            if seen not in packed:
                references = [pair for key in seen for pair in self._database.memories(key)]
                packed[seen] = pack([m for _, m in references if m is not None], shape)
        return [packed[self._plan.seen(question)] for question in questions]

    def ranks(self, questions: Sequence[Question]) -> list[int]:
        """For each question the place, from 1, of its document among the references that are
        retrieved for it; 0: it is not there."""
        found = self._database.retrieve_batch(
            [question.text for question in questions], SEEN, memories=False
        )
        ranks = []
        for question, one in zip(questions, found, strict=True):
            documents = [hit.reference.document_id for hit in one.hits]
            own = question.document
            ranks.append(documents.index(own) + 1 if own in documents else 0)
        return ranks


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
