"""Bulk loading: documents whose embeddings and memories are computed already, at the disk's speed.

What makes it fast: a batch's memories are coded together, a transaction holds about 64 MiB, ids
ascend so that LMDB appends, and the next batch is prepared while the one before is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.ingest.chunking import Chunker, Piece
from memdb.ingest.recording import Prepared, prepared, put, unit_vectors
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types.checks import checked
from memdb.types.document import Document
from memdb.types.memory import ExplicitMemory
from memdb.types.memory_batch import MemoryBatch

_BYTES = 64 << 20  # of a transaction


@dataclass(frozen=True)
class DocumentBatch:
    """Some documents with what was computed for them.

    Attributes:
        documents: at least one.
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


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        inserted: new documents.
        updated: documents that were there with other content.
        unchanged: documents that were there already.
        references: references written.
        memories: memories written.
    """

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    references: int = 0
    memories: int = 0

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
    coming = _transactions(_prepared(batches, chunker, memory_store, dimension))
    with ThreadPoolExecutor(1, "memdb-load") as thread:
        documents = next(coming, None)
        while documents is not None:
            with store.write() as transaction:
                memory_store.require_shape(transaction)
                total += _write(transaction, documents)
                # LMDB leaves the interpreter to others with every put: the next documents are
                # prepared while it waits for the disk, and not before.
                following = thread.submit(next, coming, None)
            done += sum(len(document.pieces) for document in documents)
            progress("loading", done, 0)
            memory_store.codec_choice.written(memory_store.codec_choice.codec.name)
            documents = following.result()
    return total


def _transactions(documents: Iterator[Prepared]) -> Iterator[list[Prepared]]:
    """Documents by transaction; none holds an id twice."""
    found: list[Prepared] = []
    ids: set[str] = set()
    size = 0
    for document in documents:
        if found and (size + document.size > _BYTES or document.id in ids):
            yield found
            found, ids, size = [], set(), 0
        found.append(document)
        ids.add(document.id)
        size += document.size
    if found:
        yield found


def _prepared(
    batches: Iterable[DocumentBatch], chunker: Chunker, memory_store: MemoryStore, dimension: int
) -> Iterator[Prepared]:
    for batch in batches:
        named = [checked(document) for document in batch.documents]
        pieces = batch.pieces
        if pieces is None:
            pieces = [chunker.split(document.text) for _, document in named]
        else:
            _check_pieces(named, pieces, chunker)
        references = sum(map(len, pieces))
        vectors = unit_vectors(batch.embeddings, references, dimension)
        memories = memory_store.encode_all(batch.memories, references)
        versions = [1] * len(named) if batch.versions is None else batch.versions
        at = 0
        for (name, document), parts, version in zip(named, pieces, versions, strict=True):
            end = at + len(parts)
            yield prepared(name, document, parts, vectors[at:end], memories[at:end], version)
            at = end


def _check_pieces(
    named: Sequence[tuple[str, Document]], pieces: Sequence[Sequence[Piece]], chunker: Chunker
) -> None:
    if len(pieces) != len(named):
        raise InvalidInputError(f"pieces of {len(pieces)} documents for {len(named)} documents")
    for (name, document), parts in zip(named, pieces, strict=True):
        if not parts or "".join(part.text for part in parts) != document.text:
            raise InvalidInputError(
                f"document '{name}': its pieces, joined, are not its text; leave them out to have "
                "it cut here"
            )
        for part in parts:
            if not chunker.may_have(part):
                raise InvalidInputError(
                    f"document '{name}': a piece of {part.tokens} tokens; here they have at most "
                    f"{chunker.max_tokens}, and none where there is no tokenizer"
                )


def _write(transaction: Transaction, documents: list[Prepared]) -> LoadReport:
    """Write those that are new or have other content."""
    there = {item.id: transaction.document(item.id) for item in documents}
    new = []
    for item in documents:
        old = there[item.id]
        if old is None or old.content_hash != item.content_hash:
            new.append(item)
    put(transaction, *new)
    inserted = sum(there[item.id] is None for item in new)
    return LoadReport(
        inserted,
        len(new) - inserted,
        len(documents) - len(new),
        sum(len(item.pieces) for item in new),
        sum(memory is not None for item in new for memory in item.memories),
    )
