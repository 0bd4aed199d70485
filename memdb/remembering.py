"""From cold to warm: the memories of references that have none are written and stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memdb.codecs import CODECS, Codec, decode_memory, encode_memory
from memdb.errors import InvalidInputError
from memdb.layout import DocumentEntry
from memdb.parts import Parts
from memdb.protocols import Progress
from memdb.records import ExplicitMemory, MemoryShape, Reference
from memdb.store import Store
from memdb.transaction import Transaction

#: References whose memories are written between two commits: what an interruption can cost.
_BATCH = 8


class Rememberer:
    """Writes, encodes and decodes the memories of one open database."""

    def __init__(self, store: Store, parts: Parts, shape: MemoryShape, codec: Codec) -> None:
        self._store = store
        self._parts = parts
        self._shape = shape
        self._codec = codec

    @property
    def can_write(self) -> bool:
        """Whether there is a writer."""
        return self._parts.has_writer

    def require_writer(self) -> None:
        """Load the writer if it was not; `MismatchError` if it is not the one recorded."""
        self._parts.writer()

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        """The memories of texts, by the database's writer."""
        return self._parts.writer().write(texts)

    def encode(self, memories: Sequence[ExplicitMemory], count: int) -> list[bytes]:
        """The memories of one document's references, of which there must be `count`, as stored."""
        if len(memories) != count:
            raise InvalidInputError(
                f"{len(memories)} memories for a text of {count} references; `split` shows them"
            )
        return [encode_memory(memory, self._shape, self._codec) for memory in memories]

    def decode(self, payload: bytes | memoryview) -> ExplicitMemory:
        """A stored memory, whichever codec wrote it."""
        return decode_memory(payload, self._shape, CODECS)

    def read(self, transaction: Transaction, number: int) -> ExplicitMemory | None:
        """The memory of a reference; None if it is cold."""
        memory: ExplicitMemory | None = transaction.memory(number, self.decode)
        return memory

    def remember(self, references: Sequence[Reference]) -> dict[int, ExplicitMemory]:
        """Write and store the memories of cold references.

        Returns:
            By reference id, as they read back from the store: cold and warm start are the same.
        """
        if not references:
            return {}
        memories = self.write([reference.content for reference in references])
        encoded = self.encode(memories, len(references))
        with self._store.write() as transaction:
            for reference, payload in zip(references, encoded, strict=True):
                # Meanwhile another writer may have deleted it, or been faster.
                if transaction.has_reference(reference.id) and not transaction.is_warm(
                    reference.id
                ):
                    transaction.put_memory(reference, payload)
        return {
            reference.id: self.decode(payload)
            for reference, payload in zip(references, encoded, strict=True)
        }

    def warm(self, cold: Sequence[int], progress: Progress) -> int:
        """Write the memories of these references, batch by batch; how many were written."""
        if cold:
            self.require_writer()
        written = 0
        for start in range(0, len(cold), _BATCH):
            progress("writing memories", start, len(cold))
            with self._store.read() as transaction:
                batch = [
                    transaction.reference(number)
                    for number in cold[start : start + _BATCH]
                    if transaction.has_reference(number) and not transaction.is_warm(number)
                ]
            written += len(self.remember(batch))
        progress("writing memories", len(cold), len(cold))
        return written


def cold_references(transaction: Transaction, entries: Iterable[DocumentEntry]) -> list[int]:
    """Ids of the documents' references without a memory, the longest first: batches of one length
    need no padding."""
    cold = [
        (transaction.reference(number).tokens, number)
        for entry in entries
        for number in entry.references
        if not transaction.is_warm(number)
    ]
    return [number for _, number in sorted(cold, key=lambda item: (-item[0], item[1]))]
