"""From cold to warm: the memories of references that have none are written and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from memdb.batch import MemoryBatch
from memdb.cache import MemoryCache
from memdb.canonical import json_payload, read_json
from memdb.codecs import Codec, Coded, encode_batch, encode_memory, read_payload, require_whole
from memdb.coding import Coding
from memdb.errors import InvalidInputError, MismatchError
from memdb.layout import MEMORIES, SETTINGS, DocumentEntry, integer_key, seal, unseal
from memdb.parts import Parts
from memdb.protocols import Progress
from memdb.records import ExplicitMemory, MemoryShape, Reference
from memdb.store import Store
from memdb.transaction import Transaction, decoded

#: References whose memories are written between two commits: what an interruption can cost.
_BATCH = 8


_T = TypeVar("_T")


class StoredMemory:
    """A memory as it came from the store; checked, and decoded, when it is first asked for."""

    __slots__ = ("_memory", "_number", "_record", "_rememberer")

    def __init__(
        self,
        rememberer: Rememberer,
        number: int,
        record: bytes,
        memory: ExplicitMemory | None = None,
    ) -> None:
        self._rememberer = rememberer
        self._number = number
        self._record = record
        self._memory = memory

    @property
    def payload(self) -> memoryview:
        """Its bytes (storage_format.md), checked; `CorruptRecordError` if they are damaged."""
        return unseal(MEMORIES, integer_key(self._number), memoryview(self._record))[1]

    @property
    def memory(self) -> ExplicitMemory:
        """It, decoded."""
        if self._memory is None:
            payload = self.payload
            self.keep(self._read(payload, self._rememberer.decode))
        assert self._memory is not None
        return self._memory

    @property
    def decoded(self) -> ExplicitMemory | None:
        """It, if it has been decoded already; several that have not are decoded faster together
        (`memdb.pack`)."""
        return self._memory

    def coded(self) -> Coded:
        """Its sections, checked as `payload` is."""
        return self._read(self.payload, self._rememberer.read)

    @property
    def is_kept(self) -> bool:
        """Whether there is a cache for it once it is decoded."""
        return self._rememberer.cache.capacity > 0

    def keep(self, memory: ExplicitMemory) -> None:
        """Remember it decoded, here and in the cache."""
        self._memory = memory
        self._rememberer.cache.put((self._number, self._record[:16]), memory)

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """What it may be decoded with."""
        return self._rememberer.coding.codecs

    def _read(self, payload: memoryview, read: Callable[[memoryview], _T]) -> _T:
        key = integer_key(self._number)
        found: _T = decoded(MEMORIES, key, (1, payload), lambda _, p: read(p))
        return found


class Rememberer:
    """Writes, encodes and decodes the memories of one open database."""

    def __init__(
        self, store: Store, parts: Parts, shape: MemoryShape, coding: Coding, cache: MemoryCache
    ) -> None:
        self.coding = coding
        self.cache = cache
        self._store = store
        self._parts = parts
        self._shape = shape
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
        codec = self.coding.codec
        return [encode_memory(memory, self._shape, codec) for memory in memories]

    def encode_all(
        self, memories: MemoryBatch | Sequence[ExplicitMemory | bytes | None] | None, count: int
    ) -> Sequence[bytes | None]:
        """The memories of `count` references, as stored; None for those that stay cold. Those that
        come as stored are checked."""
        if memories is None:
            return [None] * count
        if len(memories) != count:
            raise InvalidInputError(f"{len(memories)} memories for {count} references")
        codec = self.coding.codec
        if isinstance(memories, MemoryBatch):
            return encode_batch(memories, self._shape, codec)
        return [
            self._checked(memory)
            if isinstance(memory, bytes)
            else (None if memory is None else encode_memory(memory, self._shape, codec))
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
        return self.coding.decode(payload)

    def read(self, payload: bytes | memoryview) -> Coded:
        """The sections of a stored memory."""
        return read_payload(payload, self._shape)

    def stored(self, transaction: Transaction, number: int) -> StoredMemory | None:
        """The memory of a reference; None if it is cold, or was written for another shape."""
        view = transaction.record(MEMORIES, integer_key(number))
        return None if view is None else self.wrapped(number, bytes(view))

    def wrapped(self, number: int, record: bytes) -> StoredMemory | None:
        """A record of the table `memories`, unchecked; None if it is another shape's."""
        at = 17 + record[16] if len(record) > 16 else 0
        if record[at : at + 8] != self._fingerprint:
            unseal(MEMORIES, integer_key(number), memoryview(record))  # or is it damaged?
            return None
        return StoredMemory(self, number, record, self.cache.get((number, record[:16])))

    def is_warm(self, transaction: Transaction, number: int) -> bool:
        """Whether a reference has a memory of this database's shape."""
        key = integer_key(number)
        record = transaction.record(MEMORIES, key)
        return record is not None and self._is_ours(bytes(record[16:64]))

    def _is_ours(self, head: bytes) -> bool:
        """Whether a memory that begins so is of this database's shape; if not it stays unread."""
        at = 1 + head[0] if head else 0
        return head[at : at + 8] == self._fingerprint

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
        self.coding.fit_if_due()
        return {
            reference.id: StoredMemory(
                self, reference.id, seal(MEMORIES, integer_key(reference.id), 1, payload)
            )
            for reference, payload in zip(references, encoded, strict=True)
        }

    def require_shape(self, transaction: Transaction) -> None:
        """Raise `MismatchError` if the database has taken another shape since it was opened; take
        over a codec that was fitted meanwhile."""
        stored = transaction.payload(SETTINGS, b"shape")
        known = stored == self._shape_as_stored
        if not known and MemoryShape.from_json(read_json(stored)) != self._shape:
            raise MismatchError(
                "the database was rewritten for another model while it was open; open it again"
            )
        self.coding.refresh(transaction)

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
