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

from memdb import layout
from memdb.batch import MemoryBatch
from memdb.canonical import json_payload
from memdb.chunking import Chunker, Piece
from memdb.documents import checked, content_hash_of, text_hash
from memdb.errors import InvalidInputError
from memdb.keys import Grouped
from memdb.layout import DocumentEntry
from memdb.protocols import Progress
from memdb.records import Document, ExplicitMemory
from memdb.remembering import Rememberer
from memdb.store import Store
from memdb.transaction import Transaction
from memdb.writing import unit_vectors

_BYTES = 64 << 20  # of a transaction


@dataclass(frozen=True)
class Batch:
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


@dataclass(slots=True)
class _Ready:
    """A document whose records need nothing but ids; `size` is their bytes, about."""

    id: str
    content_hash: bytes
    text_hash: bytes
    document: Document
    metadata: bytes
    pieces: Sequence[Piece]
    embeddings: list[bytes]
    memories: Sequence[bytes | None]
    version: int
    size: int


def load(
    batches: Iterable[Batch],
    *,
    store: Store,
    chunker: Chunker,
    rememberer: Rememberer,
    dimension: int,
    progress: Progress,
) -> LoadReport:
    """See `MemDB.load`."""
    total = LoadReport()
    done = 0
    coming = _transactions(_prepared(batches, chunker, rememberer, dimension))
    with ThreadPoolExecutor(1, "memdb-load") as thread:
        documents = next(coming, None)
        while documents is not None:
            with store.write() as transaction:
                rememberer.require_shape(transaction)
                total += _write(transaction, documents)
                # LMDB leaves the interpreter to others with every put: the next documents are
                # prepared while it waits for the disk, and not before.
                prepared = thread.submit(next, coming, None)
            done += sum(len(document.pieces) for document in documents)
            progress("loading", done, 0)
            rememberer.coding.fit_if_due(progress)
            documents = prepared.result()
    return total


def _transactions(documents: Iterator[_Ready]) -> Iterator[list[_Ready]]:
    """Documents by transaction; none holds an id twice."""
    found: list[_Ready] = []
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
    batches: Iterable[Batch], chunker: Chunker, rememberer: Rememberer, dimension: int
) -> Iterator[_Ready]:
    for batch in batches:
        named = [checked(document) for document in batch.documents]
        pieces = batch.pieces
        if pieces is None:
            pieces = [chunker.split(document.text) for _, document in named]
        else:
            _check_pieces(named, pieces, chunker)
        references = sum(map(len, pieces))
        vectors = unit_vectors(batch.embeddings, references, dimension).astype("<f4", copy=False)
        memories = rememberer.encode_all(batch.memories, references)
        payloads = [row.tobytes() for row in vectors]
        sizes = [len(memory or b"") + len(payloads[0]) + 300 for memory in memories]
        versions = [1] * len(named) if batch.versions is None else batch.versions
        at = 0
        for (name, document), parts, version in zip(named, pieces, versions, strict=True):
            end = at + len(parts)
            text, metadata = text_hash(document.text), json_payload(dict(document.metadata))
            yield _Ready(
                name,
                content_hash_of(text, metadata),
                text,
                document,
                metadata,
                parts,
                payloads[at:end],
                memories[at:end],
                version,
                sum(sizes[at:end]) + len(document.text) + len(metadata),
            )
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


def _write(transaction: Transaction, documents: list[_Ready]) -> LoadReport:
    new = []
    inserted = updated = 0
    for document in documents:
        old = transaction.document(document.id)
        if old is not None and old.content_hash == document.content_hash:
            continue
        version = document.version
        if old is not None:
            version = old.version + 1
            transaction.delete_document(document.id, old)
            updated += 1
        else:
            inserted += 1
        new.append((version, document))
    references = sum(len(document.pieces) for _, document in new)
    memories = _put(transaction, new, references)
    unchanged = len(documents) - len(new)
    return LoadReport(inserted, updated, unchanged, references, memories)


_Rows = list[tuple[bytes, int, bytes]]  # of a table: key, version, payload


def _put(transaction: Transaction, new: list[tuple[int, _Ready]], references: int) -> int:
    """Write new documents, table by table; returns how many memories there were."""
    texts, vectors, memories, entries, metadata = _Rows(), _Rows(), _Rows(), _Rows(), _Rows()
    grouped = Grouped(transaction.keys)
    number = transaction.next_references(references).start
    changes = []
    for version, ready in new:
        name = ready.id.encode()
        first = number
        for ordinal, piece in enumerate(ready.pieces):
            key = layout.integer_key(number)
            text = layout.reference_bytes(ordinal, piece.tokens, name, piece.text)
            texts.append((key, version, text))
            vectors.append((key, version, ready.embeddings[ordinal]))
            changes.append((layout.INSERTED, number))
            memory = ready.memories[ordinal]
            if memory is not None:
                memories.append((key, version, memory))
                changes.append((layout.REMEMBERED, number))
            number += 1
        ids = tuple(range(first, number))
        entry = DocumentEntry(version, ready.content_hash, ready.text_hash, ids)
        entries.append((name, version, entry.payload()))
        metadata.append((name, version, ready.metadata))
        grouped.add(ready.document.metadata, ids)
    transaction.put_all(layout.REFERENCES, texts)
    transaction.put_all(layout.EMBEDDINGS, vectors)
    transaction.put_all(layout.MEMORIES, memories)
    transaction.put_all(layout.DOCUMENTS, entries)
    transaction.put_all(layout.METADATA, metadata)
    grouped.write(transaction)
    transaction.log(changes)
    return len(memories)
