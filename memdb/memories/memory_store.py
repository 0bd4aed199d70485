"""From cold to warm: the memories of references that have none are written and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar, cast

from memdb.codecs import Codec, Coded, encode_batch, encode_memory, read_payload, require_whole
from memdb.errors import BusyError, InvalidInputError, MismatchError, MissingPartError
from memdb.memories.attached import Attached
from memdb.memories.cache import Key, MemoryCache
from memdb.memories.codec_choice import CodecChoice
from memdb.memories.placing import Placing
from memdb.protocols import Progress
from memdb.storage.record_layout import MEMORIES, SETTINGS, DocumentEntry, integer_key, seal, unseal
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction, decoded
from memdb.types import arguments
from memdb.types.canonical import json_payload, read_json
from memdb.types.document import Reference
from memdb.types.memory import ExplicitMemory
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape

#: References whose memories are written between two commits, where the writer does not say.
_BATCH = 8
#: Seconds that a retrieval waits for another writer, to store what it wrote.
_PATIENCE = 1.0

_T = TypeVar("_T")


class StoredMemory:
    """A memory as it came from the store; checked, and decoded, when it is first asked for."""

    __slots__ = ("_memory", "_number", "_record", "_source")

    def __init__(
        self,
        source: MemoryStore | MemoryShape,  # what it came from; pickled, that one's shape alone
        number: int,
        record: bytes,
        memory: ExplicitMemory | None = None,
    ) -> None:
        self._source = source
        self._number = number
        self._record = record
        self._memory = memory

    def __repr__(self) -> str:
        return f"StoredMemory(of reference {self._number}, {len(self._record)} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it goes there may be no database, so it goes decoded.
        return StoredMemory, (self.shape, self._number, self._record, self.memory)

    @property
    def payload(self) -> memoryview:
        """Its bytes (storage_format.md), checked; `CorruptRecordError` if they are damaged."""
        return unseal(MEMORIES, integer_key(self._number), memoryview(self._record))[1]

    @property
    def memory(self) -> ExplicitMemory:
        """It, decoded."""
        if self._memory is None:
            payload = self.payload
            self._memory = memory = self._read(payload, self._of.decode)
            if self.is_wanted(memory.nbytes):
                self.keep(memory)
        return self._memory

    @property
    def decoded(self) -> ExplicitMemory | None:
        """It, if it has been decoded already; several that have not are decoded faster together
        (`memdb.pack`)."""
        return self._memory

    def coded(self) -> Coded:
        """Its sections, checked as `payload` is."""
        return self._read(self.payload, self._of.read)

    @property
    def is_kept(self) -> bool:
        """Whether there is a cache for it once it is decoded."""
        return isinstance(self._source, MemoryStore) and self._source.cache.capacity > 0

    def is_wanted(self, size: int) -> bool:
        """Whether the cache wants it, decoded, which takes so many bytes."""
        return self.is_kept and self._of.cache.wants(self._key, size)

    def keep(self, memory: ExplicitMemory) -> None:
        """Remember it decoded, here and in the cache."""
        self._memory = memory
        if isinstance(self._source, MemoryStore):
            self._source.cache.put(self._key, memory)

    @property
    def _key(self) -> Key:
        """What the cache knows it by."""
        return self._number, self._record[:16]

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """What it may be decoded with."""
        return self._of.codec_choice.codecs

    @property
    def shape(self) -> MemoryShape:
        """Of its database."""
        return self._source._shape if isinstance(self._source, MemoryStore) else self._source

    @property
    def _of(self) -> MemoryStore:
        """The open database that it came from."""
        if not isinstance(self._source, MemoryStore):
            raise MissingPartError(
                "a memory that was pickled is away from its database's codecs; it is decoded: "
                "`memory` has it"
            )
        return self._source

    def _read(self, payload: memoryview, read: Callable[[memoryview], _T]) -> _T:
        key = integer_key(self._number)
        found: _T = decoded(MEMORIES, key, (1, payload), lambda _, p: read(p))
        return found


class MemoryStore:
    """Writes, encodes and decodes the memories of one open database."""

    def __init__(
        self,
        store: Store,
        attached: Attached,
        shape: MemoryShape,
        codec_choice: CodecChoice,
        cache: MemoryCache,
        placing: Placing,
    ) -> None:
        self.codec_choice = codec_choice
        self.placing = placing
        self.cache = cache
        self._store = store
        self._attached = attached
        self.shape = self._shape = shape
        self._shape_as_stored = json_payload(shape.to_json())
        self._fingerprint = shape.fingerprint.to_bytes(8, "little")

    @property
    def can_write(self) -> bool:
        """Whether there is a writer."""
        return self._attached.has_writer

    def writers_are_kept_out(self) -> bool:
        """Whether nothing can be stored for now, and for longer than a write takes."""
        return self._store.writers_are_kept_out()

    def require_writer(self) -> None:
        """Load the writer if it was not; `MismatchError` if it is not the one recorded."""
        self._attached.writer()

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        """The memories of texts, their places included, by the database's writer."""
        return self._attached.writer().write(texts)

    def encode(self, memories: Sequence[ExplicitMemory], count: int) -> list[bytes]:
        """The memories of one document's references, of which there must be `count`, as stored."""
        memories = list(arguments.some(memories, "memories", "ExplicitMemory"))
        if len(memories) != count:
            raise InvalidInputError(
                f"{len(memories)} memories for a text of {count} references: pass one for each; "
                "`split` shows them"
            )
        for memory in memories:
            arguments.a(ExplicitMemory, memory, "each of the memories")
        batch = MemoryBatch.of(memories, self._shape)
        # None would stand for a cold one, and there is none among them.
        return cast(list[bytes], encode_batch(batch, self._shape, self.codec_choice.codec))

    def encode_all(
        self, memories: MemoryBatch | Sequence[ExplicitMemory | bytes | None] | None, count: int
    ) -> Sequence[bytes | None]:
        """The memories of `count` references, as stored; None for those that stay cold. Those that
        come as stored are checked."""
        if memories is None:
            return [None] * count
        if isinstance(memories, MemoryBatch):
            memories.require_arrays()
        else:
            memories = list(arguments.some(memories, "memories", "ExplicitMemory, bytes or None"))
        if len(memories) != count:
            raise InvalidInputError(
                f"{len(memories)} memories for {count} references: pass one for each, None where "
                "it stays cold"
            )
        codec = self.codec_choice.codec
        if isinstance(memories, MemoryBatch):
            return encode_batch(memories, self._shape, codec)
        return [
            self._checked(memory)
            if isinstance(memory, bytes)
            else None
            if memory is None
            else encode_memory(
                arguments.a(ExplicitMemory, memory, "each of the memories"), self._shape, codec
            )
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
        return self.codec_choice.decode(payload)

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
        """Write and store the memories of cold references. Where another writer is not done soon
        they are not stored, and the next retrieval writes them again.

        Returns:
            By reference id, as they read back from the store: cold and warm start are the same.

        Raises:
            MismatchError: the database was rewritten for another model since it was opened.
        """
        if not references:
            return {}
        with self._store.read() as transaction:
            contents = self.placing.contents(transaction, references)
        memories = self.write(contents)
        codec = self.codec_choice.codec.name
        encoded = self.encode(memories, len(references))
        with suppress(BusyError):
            self._keep(references, encoded, _PATIENCE)
            self.codec_choice.written(codec)
        return {
            reference.id: StoredMemory(
                self, reference.id, seal(MEMORIES, integer_key(reference.id), 1, payload)
            )
            for reference, payload in zip(references, encoded, strict=True)
        }

    def _keep(
        self,
        references: Sequence[Reference],
        encoded: Sequence[bytes],
        busy_timeout: float | None = None,
    ) -> int:
        """Store memories; returns how many. Meanwhile another writer may have deleted a reference,
        or been faster."""
        kept = 0
        with self._store.write(busy_timeout) as transaction:
            self.require_shape(transaction)
            for reference, payload in zip(references, encoded, strict=True):
                number = reference.id
                if transaction.has_reference(number) and not self.is_warm(transaction, number):
                    transaction.put_memory(reference, payload)
                    kept += 1
        return kept

    def require_shape(self, transaction: Transaction) -> None:
        """Raise `MismatchError` if the database has taken another shape since it was opened; take
        over a codec that was fitted meanwhile."""
        stored = transaction.payload(SETTINGS, b"shape")
        known = stored == self._shape_as_stored
        if not known and MemoryShape.from_json(read_json(stored)) != self._shape:
            raise MismatchError(
                "the database was rewritten for another model while it was open; open it again"
            )
        self.codec_choice.refresh(transaction)

    def warm(self, cold: Sequence[int], progress: Progress) -> int:
        """Write the memories of these references, batch by batch; how many were written. The codec
        takes over meanwhile, once enough are there."""
        if cold:
            self.require_writer()
        progress("writing memories", 0, len(cold))
        size = self._batch if cold else 1
        return self.warm_batches(
            (cold[start : start + size] for start in range(0, len(cold), size)),
            lambda done: progress("writing memories", done, len(cold)),
            fit=True,
        )

    def warm_batches(
        self, batches: Iterable[Sequence[int]], done: Callable[[int], None], *, fit: bool
    ) -> int:
        """Write the memories of the cold among these references; how many were written.

        A batch is one call of the writer and one transaction. While the model writes one, the
        batch before it is encoded and stored in a thread of its own, so the model waits neither
        for codec nor disk; batches are stored in their order. Whatever ends it early, that one is
        stored first, and the one that the model was at is lost.

        Args:
            batches: reference ids; taken one by one, each when the model is ready for it.
            done: told how many references are stored, or are not to be, after each batch.
            fit: whether the codec may take over meanwhile, once enough memories are there.
        """
        total = written = 0
        storing: tuple[int, Future[int]] | None = None

        def finish() -> None:
            nonlocal total, written
            if storing is not None:
                total += storing[0]
                written += storing[1].result()
                done(total)

        with ThreadPoolExecutor(1, "memdb-warm") as thread:
            for numbers in batches:
                with self._store.read() as transaction:
                    cold = [
                        transaction.reference(number)
                        for number in numbers
                        if transaction.has_reference(number)
                        and not self.is_warm(transaction, number)
                    ]
                    contents = self.placing.contents(transaction, cold)
                memories = self.write(contents) if cold else []
                finish()
                storing = len(numbers), thread.submit(self._encode_and_keep, cold, memories, fit)
            finish()
        return written

    def _encode_and_keep(
        self, references: Sequence[Reference], memories: Sequence[ExplicitMemory], fit: bool
    ) -> int:
        if not references:
            return 0
        codec = self.codec_choice.codec.name
        kept = self._keep(references, self.encode(memories, len(references)))
        if fit:
            self.codec_choice.written(codec)
        return kept

    @property
    def _batch(self) -> int:
        return max(1, int(getattr(self._attached.writer(), "batch", _BATCH)))

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
