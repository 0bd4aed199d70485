"""Bulk loading: documents whose embeddings and memories are computed already, at the disk's speed.

What makes it fast: a batch's memories are coded together, a transaction holds about 64 MiB, ids
ascend so that LMDB appends, and the next batches are checked and coded, in a thread of their own,
while those before wait for the disk. Batches are drawn in the caller's thread: what gives them may
belong to that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.cutting.places import title_of
from memdb.errors import CorruptRecordError, InvalidInputError
from memdb.ingest.chunking import Chunker, Piece
from memdb.ingest.recording import Prepared, prepared, put, unit_vectors
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress
from memdb.storage.record_layout import EMBEDDINGS, MEMORIES, DocumentEntry, integer_key
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types import arguments
from memdb.types.checks import checked
from memdb.types.document import Document
from memdb.types.memory import ExplicitMemory
from memdb.types.memory_batch import MemoryBatch

_BYTES = 64 << 20  # of a transaction, and of the batches that are drawn ahead of it
_LAST_VERSION = (1 << 32) - 1


@dataclass(frozen=True, repr=False)
class DocumentBatch:
    """Some documents with what was computed for them.

    Attributes:
        documents: any number.
        embeddings: (references, dimension) float32, of all the documents' references in order.
        memories: of the same references; None, or None among them: they stay cold. Bytes are a
            memory as it is stored; they are checked.
        pieces: the references that each document is cut into; default: as `MemDB.split` cuts.
        versions: of the documents, where they are new; default: 1.
    """

    documents: Sequence[Document]
    embeddings: NDArray[np.float32]
    memories: MemoryBatch | Sequence[ExplicitMemory | bytes | None] | None = None
    pieces: Sequence[Sequence[Piece]] | None = None
    versions: Sequence[int] | None = None

    def __repr__(self) -> str:
        return f"DocumentBatch(documents={len(self.documents)}, embeddings={len(self.embeddings)})"


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        inserted: new documents.
        updated: documents that were there with other content.
        unchanged: documents that were there already.
        references: references written.
        memories: memories written.
        renewed: documents that were there with the same content, and got other embeddings or
            memories.
    """

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    references: int = 0
    memories: int = 0
    renewed: int = 0

    def __add__(self, other: LoadReport) -> LoadReport:
        return LoadReport(*(a + b for a, b in zip(_counts(self), _counts(other), strict=True)))


def _counts(report: LoadReport) -> tuple[int, ...]:
    return tuple(vars(report).values())


def load(
    batches: Iterable[DocumentBatch],
    *,
    store: Store,
    chunker: Chunker,
    memory_store: MemoryStore,
    dimension: int,
    progress: Progress,
) -> LoadReport:
    """See `MemDB.load`."""
    total = LoadReport()
    done = 0

    def prepare(batch: DocumentBatch) -> list[Prepared]:
        return list(_prepared(batch, chunker, memory_store, dimension))

    with ThreadPoolExecutor(1, "memdb-load") as thread:
        ahead = _Ahead(prepare, thread)
        for documents in _transactions(ahead.in_order(batches)):
            with store.write() as transaction:
                memory_store.require_shape(transaction)
                total += _write(transaction, documents)
                # The next batch is prepared while this one waits for the disk, and not before: two
                # threads of Python that are both at work take longer than one after the other.
                ahead.prepare_next()
            done += sum(len(document.pieces) for document in documents)
            progress("loading", done, 0)
            for codec in {item.codec for item in documents}:
                memory_store.codec_choice.written(codec)
    return total


class _Ahead:
    """Batches of about one transaction that are drawn ahead of what is written, and prepared by a
    thread of their own."""

    def __init__(
        self, prepare: Callable[[DocumentBatch], list[Prepared]], thread: Executor
    ) -> None:
        self._prepare = prepare
        self._thread = thread
        self._drawn: deque[DocumentBatch] = deque()
        self._coming: deque[Future[list[Prepared]]] = deque()  # before those that are only drawn

    def in_order(self, batches: Iterable[DocumentBatch]) -> Iterator[Prepared]:
        """The documents of all batches. What comes before an error is yielded first."""
        size = 0
        sizes: deque[int] = deque()
        failed: Exception | None = None
        source = iter(arguments.some(batches, "batches", "DocumentBatch"))
        try:
            while failed is None:
                try:
                    batch = arguments.a(DocumentBatch, next(source), "each of the batches")
                except StopIteration:
                    break
                except Exception as error:
                    failed = error
                    break
                self._drawn.append(batch)
                sizes.append(_size(batch))
                size += sizes[-1]
                while len(sizes) > 1 and size > _BYTES:
                    size -= sizes.popleft()
                    yield from self._oldest()
            while sizes:
                sizes.popleft()
                yield from self._oldest()
        finally:
            for future in self._coming:
                future.cancel()
        if failed is not None:
            raise failed

    def prepare_next(self) -> None:
        """Let the thread prepare what is drawn."""
        while self._drawn:
            self._coming.append(self._thread.submit(self._prepare, self._drawn.popleft()))

    def _oldest(self) -> list[Prepared]:
        if not self._coming:
            return self._prepare(self._drawn.popleft())
        return self._coming.popleft().result()


def _size(batch: DocumentBatch) -> int:
    """Bytes of a batch's arrays, about; nothing of it is checked yet."""
    held: list[Any] = [batch.embeddings]
    if isinstance(batch.memories, MemoryBatch):
        held += [batch.memories.positions, batch.memories.keys, batch.memories.values]
    elif isinstance(batch.memories, (list, tuple)):
        held += batch.memories
    return sum(
        len(one) if isinstance(one, bytes) else int(getattr(one, "nbytes", 0)) for one in held
    )


def _transactions(documents: Iterator[Prepared]) -> Iterator[list[Prepared]]:
    """Documents by transaction; none holds an id twice. What comes before an error is yielded
    first."""
    found: list[Prepared] = []
    ids: set[str] = set()
    size = 0
    failed: Exception | None = None
    while failed is None:
        try:
            document = next(documents)
        except StopIteration:
            break
        except Exception as error:
            failed = error
            break
        more = document.size
        if found and (size + more > _BYTES or document.id in ids):
            yield found
            found, ids, size = [], set(), 0
        found.append(document)
        ids.add(document.id)
        size += more
    if found:
        yield found
    if failed is not None:
        raise failed


def _prepared(
    batch: DocumentBatch, chunker: Chunker, memory_store: MemoryStore, dimension: int
) -> Iterator[Prepared]:
    documents = list(arguments.some(batch.documents, "the documents of a batch", "Document"))
    named = [checked(arguments.a(Document, one, "each of the documents")) for one in documents]
    pieces: Sequence[Sequence[Piece]]
    if batch.pieces is None:
        pieces = [
            chunker.split(document.text, id=name, title=title_of(document.metadata))
            for name, document in named
        ]
    else:
        pieces = _checked_pieces(named, batch.pieces, chunker)
    versions = _checked_versions(named, batch.versions)
    references = sum(map(len, pieces))
    vectors = unit_vectors(batch.embeddings, references, dimension)
    codec = memory_store.codec_choice.codec.name
    memories = memory_store.encode_all(batch.memories, references)
    at = 0
    for (name, document), parts, version in zip(named, pieces, versions, strict=True):
        end = at + len(parts)
        yield prepared(name, document, parts, vectors[at:end], memories[at:end], version, codec)
        at = end


def _checked_pieces(
    named: Sequence[tuple[str, Document]], given: object, chunker: Chunker
) -> list[list[Piece]]:
    pieces = [
        [arguments.a(Piece, part, "each of the pieces") for part in arguments.some(*parts)]
        for parts in (
            (one, "the pieces of a document", "Piece")
            for one in arguments.some(given, "pieces", "lists, one for each document")
        )
    ]
    if len(pieces) != len(named):
        raise InvalidInputError(f"pieces of {len(pieces)} documents for {len(named)} documents")
    for (name, document), parts in zip(named, pieces, strict=True):
        for part in parts:
            arguments.whole_number(part.tokens, f"document '{name}': the tokens of a piece", 0)
            if not isinstance(part.text, str) or not part.text.strip():
                raise InvalidInputError(f"document '{name}': a piece is blank, or has no text")
            if not chunker.may_have(part):
                raise InvalidInputError(
                    f"document '{name}': a piece of {part.tokens} tokens; here they have at most "
                    f"{chunker.max_tokens}, and none where there is no tokenizer"
                )
        if not parts or "".join(part.text for part in parts) != document.text:
            raise InvalidInputError(
                f"document '{name}': its pieces, joined, are not its text; leave them out to have "
                "it cut here"
            )
    return pieces


def _checked_versions(named: Sequence[tuple[str, Document]], given: object) -> list[int]:
    if given is None:
        return [1] * len(named)
    versions = list(arguments.some(given, "versions", "numbers, one for each document"))
    if len(versions) != len(named):
        raise InvalidInputError(f"{len(versions)} versions for {len(named)} documents")
    return [
        arguments.whole_number(version, f"document '{name}': its version", 1, _LAST_VERSION)
        for (name, _), version in zip(named, versions, strict=True)
    ]


# --- writing --------------------------------------------------------------------------------------


def _write(transaction: Transaction, documents: list[Prepared]) -> LoadReport:
    """Write those that are new or have other content, and what else is new of the others."""
    whole: list[Prepared] = []
    inserted = updated = renewed = memories = 0
    known = {item.id: transaction.document(item.id) for item in documents}
    for item in documents:
        old = known[item.id]
        if old is None or old.content_hash != item.content_hash:
            whole.append(item)
            inserted += old is None
            updated += old is not None
            continue
        anew, remembered = _what_is_new(transaction, item, old)
        if anew is not None:
            whole.append(anew)
            memories -= _warm(anew) - _warm(item)  # what it keeps is not counted as written
        for number, version, payload in remembered:
            transaction.replace_memory(number, version, payload)
        memories += len(remembered)
        renewed += anew is not None or bool(remembered)
    put(transaction, *whole, known=known)
    return LoadReport(
        inserted,
        updated,
        len(documents) - inserted - updated - renewed,
        sum(len(item.pieces) for item in whole),
        memories + sum(map(_warm, whole)),
        renewed,
    )


def _warm(item: Prepared) -> int:
    return sum(memory is not None for memory in item.memories)


def _what_is_new(
    transaction: Transaction, item: Prepared, old: DocumentEntry
) -> tuple[Prepared | None, list[tuple[int, int, bytes]]]:
    """What a document that is there with the same content was not given before.

    Returns:
        The document to write anew, if it is cut otherwise or an embedding differs: references do
        not change. It keeps the memories of those that come without. Else the memories that differ:
        number and version of their references, and their bytes.
    """
    if not _is_cut_so(transaction, item, old):
        return item, []
    there = [_payload(transaction, MEMORIES, number) for number in old.references]
    if [_payload(transaction, EMBEDDINGS, n) for n in old.references] != [*item.embeddings]:
        kept = [given or stored for given, stored in zip(item.memories, there, strict=True)]
        return replace(item, memories=kept), []
    return None, [
        (number, transaction.reference(number).version, given)
        for number, given, stored in zip(old.references, item.memories, there, strict=True)
        if given is not None and given != stored
    ]


def _is_cut_so(transaction: Transaction, item: Prepared, old: DocumentEntry) -> bool:
    try:
        texts = [transaction.reference(number).text for number in old.references]
    except CorruptRecordError:  # then they are written anew
        return False
    return texts == [piece.text for piece in item.pieces]


def _payload(transaction: Transaction, table: str, number: int) -> bytes | None:
    """What is stored of a reference; None if nothing is, or it is damaged."""
    try:
        return transaction.payload(table, integer_key(number))
    except CorruptRecordError:
        return None
