"""What a question sees: its documents, others beside them, or what is retrieved for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb import MemDB, PackedMemories, Retrieval, StoredMemory, pack
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
            found = self._found(questions, SEEN)
            return [tuple(hit.reference.content for hit in one.hits) for one in found]
        return [self._plan.texts(question) for question in questions]

    def nearest(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Of each question the reference that is nearest to it, as text."""
        found = self._found(questions, 1)
        return [tuple(hit.reference.content for hit in one.hits) for one in found]

    def memories(self, questions: Sequence[Question]) -> list[PackedMemories]:
        """See `arms.Memories`."""
        if self._retrieved:
            found = self._found(questions, SEEN, memories=True)
            return self._packed([list(one.stored) for one in found])
        return self._packed(self._stored([self._plan.seen(question) for question in questions]))

    def others(self, questions: Sequence[Question]) -> list[PackedMemories]:
        """Memories that say nothing of the answers: for each question those of a document of
        another article."""
        return self._packed(self._stored([self._plan.other(question) for question in questions]))

    def found(self, questions: Sequence[Question]) -> list[list[str]]:
        """For each question the documents of the references that are nearest to it, best first."""
        found = self._found(questions, SEEN)
        return [[hit.reference.document_id for hit in one.hits] for one in found]

    def _found(
        self, questions: Sequence[Question], most: int, *, memories: bool = False
    ) -> list[Retrieval]:
        texts = [question.text for question in questions]
        return self._database.retrieve_batch(texts, most, memories=memories)

    def _stored(self, seen: Sequence[tuple[str, ...]]) -> list[list[StoredMemory]]:
        """For each question the memories of the documents that it sees; one list for those that see
        the same."""
        read = {
            keys: [
                memory
                for key in keys
                for _, memory in self._database.memories(key)
                if memory is not None
            ]
            for keys in dict.fromkeys(seen)
        }
        return [read[keys] for keys in seen]

    def _packed(self, stored: Sequence[list[StoredMemory]]) -> list[PackedMemories]:
        """For each question its memories as attention reads them; those that are one list are
        decoded once."""
        shape = self._database.shape
        different = {id(memories): memories for memories in stored}
        packed = {key: pack(memories, shape) for key, memories in different.items()}
        return [packed[id(memories)] for memories in stored]


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
