"""From cold to warm: the memories of references that have none are written and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from memdb.batch import MemoryBatch
from memdb.cache import Key, MemoryCache
from memdb.canonical import json_payload, read_json
from memdb.codecs import (
    CODECS,
    Codec,
    decode_memory,
    encode_batch,
    encode_memory,
    require_whole,
)
from memdb.errors import InvalidInputError, MismatchError
from memdb.layout import MEMORIES, SETTINGS, DocumentEntry, integer_key, unseal
from memdb.parts import Parts
from memdb.protocols import Progress
from memdb.records import ExplicitMemory, MemoryShape, Reference
from memdb.store import Store
from memdb.transaction import Transaction, decoded

#: References whose memories are written between two commits: what an interruption can cost.
_BATCH = 8


class StoredMemory:
    """A memory as it came from the store: checked, and decoded when it is first asked for.

    Attributes:
        payload: its bytes (storage_format.md); None if its decoded form was in the cache.
    """

    __slots__ = ("_decode", "_memory", "payload")

    def __init__(
        self,
        payload: bytes | None,
        decode: Callable[[bytes], ExplicitMemory],
        memory: ExplicitMemory | None = None,
    ) -> None:
        self.payload = payload
        self._decode = decode
        self._memory = memory

    @property
    def memory(self) -> ExplicitMemory:
        """It, decoded."""
        if self._memory is None:
            assert self.payload is not None
            self._memory = self._decode(self.payload)
        return self._memory


class Rememberer:
    """Writes, encodes and decodes the memories of one open database."""

    def __init__(
        self, store: Store, parts: Parts, shape: MemoryShape, codec: Codec, cache: MemoryCache
    ) -> None:
        self._store = store
        self._parts = parts
        self._shape = shape
        self._codec = codec
        self._cache = cache
        self._shape_as_stored = json_payload(shape.to_json())
        self._fingerprint = shape.fingerprint.to_bytes(8, "little")

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

    def encode_all(
        self, memories: MemoryBatch | Sequence[ExplicitMemory | bytes | None] | None, count: int
    ) -> Sequence[bytes | None]:
        """The memories of `count` references, as stored; None for those that stay cold. Those that
        come as stored are checked."""
        if memories is None:
            return [None] * count
        if len(memories) != count:
            raise InvalidInputError(f"{len(memories)} memories for {count} references")
        if isinstance(memories, MemoryBatch):
            return encode_batch(memories, self._shape, self._codec)
        return [
            self._checked(memory)
            if isinstance(memory, bytes)
            else (None if memory is None else encode_memory(memory, self._shape, self._codec))
            for memory in memories
        ]

    def _checked(self, payload: bytes) -> bytes:
        """A memory as stored, if it is a whole one of this database's shape."""
        try:
            memory = self.decode(payload)
        except ValueError as error:
            raise InvalidInputError(f"a stored memory does not decode: {error}") from error
        require_whole(memory, self._shape)
        return payload

    def decode(self, payload: bytes | memoryview) -> ExplicitMemory:
        """A stored memory, whichever codec wrote it."""
        return decode_memory(payload, self._shape, CODECS)

    def stored(self, transaction: Transaction, number: int) -> StoredMemory | None:
        """The memory of a reference; None if it is cold, or was written for another shape."""
        key = integer_key(number)
        record = transaction.record(MEMORIES, key)
        if record is None:
            return None
        known: Key = (number, bytes(record[:16]))  # its seal
        memory = self._cache.get(known)
        if memory is not None:
            return StoredMemory(None, self.decode, memory)
        version, view = unseal(MEMORIES, key, record)
        payload = bytes(view)
        if not self._is_ours(payload):
            return None

        def decode(payload: bytes) -> ExplicitMemory:
            memory: ExplicitMemory = decoded(
                MEMORIES, key, (version, payload), lambda _, p: self.decode(p)
            )
            self._cache.put(known, memory)
            return memory

        return StoredMemory(payload, decode)

    def is_warm(self, transaction: Transaction, number: int) -> bool:
        """Whether a reference has a memory of this database's shape."""
        key = integer_key(number)
        record = transaction.record(MEMORIES, key)
        return record is not None and self._is_ours(record[16:])

    def _is_ours(self, payload: bytes | memoryview) -> bool:
        """Whether a memory is of this database's shape; one that is not stays unread."""
        at = 1 + payload[0] if len(payload) else 0
        return payload[at : at + 8] == self._fingerprint

    def remember(self, references: Sequence[Reference]) -> dict[int, StoredMemory]:
        """Write and store the memories of cold references.

        Returns:
            By reference id, as they read back from the store: cold and warm start are the same.

        Raises:
            MismatchError: the database was rewritten for another model since it was opened.
        """
        if not references:
            return {}
        memories = self.write([reference.content for reference in references])
        encoded = self.encode(memories, len(references))
        with self._store.write() as transaction:
            self.require_shape(transaction)
            for reference, payload in zip(references, encoded, strict=True):
                # Meanwhile another writer may have deleted it, or been faster.
                if transaction.has_reference(reference.id) and not self.is_warm(
                    transaction, reference.id
                ):
                    transaction.put_memory(reference, payload)
        return {
            reference.id: StoredMemory(payload, self.decode)
            for reference, payload in zip(references, encoded, strict=True)
        }

    def require_shape(self, transaction: Transaction) -> None:
        """Raise `MismatchError` if the database has taken another shape since it was opened."""
        stored = transaction.payload(SETTINGS, b"shape")
        known = stored == self._shape_as_stored
        if not known and MemoryShape.from_json(read_json(stored)) != self._shape:
            raise MismatchError(
                "the database was rewritten for another model while it was open; open it again"
            )

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
                    if transaction.has_reference(number) and not self.is_warm(transaction, number)
                ]
            written += len(self.remember(batch))
        progress("writing memories", len(cold), len(cold))
        return written

    def cold(self, transaction: Transaction, entries: Iterable[DocumentEntry]) -> list[int]:
        """Ids of the documents' references without a memory, the longest first: batches of one
        length need no padding."""
        cold = [
            (transaction.tokens(number), number)
            for entry in entries
            for number in entry.references
            if not self.is_warm(transaction, number)
        ]
        return [number for _, number in sorted(cold, key=lambda item: (-item[0], item[1]))]
