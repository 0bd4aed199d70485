"""Documents as records: the one place that writes and deletes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.cutting.places import title_of
from memdb.errors import ConflictError, InvalidInputError
from memdb.filters.declared import Grouped, declared_keys, withdraw
from memdb.ingest.chunking import Piece
from memdb.protocols import Embedder
from memdb.storage.record_layout import (
    CUTTING,
    DOCUMENTS,
    EMBEDDINGS,
    INSERTED,
    MEMORIES,
    METADATA,
    REFERENCES,
    REMEMBERED,
    DocumentEntry,
    compress,
    integer_key,
    reference_bytes,
)
from memdb.storage.transaction import Transaction
from memdb.types.canonical import json_payload
from memdb.types.checks import content_hash, content_hash_of, text_hash
from memdb.types.cutting import Cutting
from memdb.types.document import Document

#: Rows of one table: key, version, payload.
_Rows = list[tuple[bytes, int, bytes]]

_OVERHEAD = 300  # bytes of a reference's records besides embedding and memory, about
_ROUNDING = 1e-6  # by which the length of a vector of length 1 may differ, in float32


@dataclass(slots=True)  # frozen, it takes two microseconds more to make
class Prepared:
    """A document with all that its transaction writes, computed before the transaction begins:
    what its records lack is ids.

    Attributes:
        id: the document's id.
        document: what the user gave.
        text_hash, content_hash: 32 bytes each.
        metadata: as stored.
        pieces: its references' texts and lengths.
        texts: of each piece, as stored.
        embeddings: of each piece, as stored.
        memories: of each piece, as stored; None: it stays cold.
        version: of a document that is new.
        codec: what its memories are coded by; empty: it does not matter.
    """

    id: str
    document: Document
    text_hash: bytes
    content_hash: bytes
    metadata: bytes
    pieces: Sequence[Piece]
    texts: Sequence[bytes]
    embeddings: Sequence[bytes]
    memories: Sequence[bytes | None]
    version: int = 1
    codec: str = ""

    def with_metadata(self, metadata: dict[str, Any]) -> Prepared:
        """The same with other metadata."""
        document, payload = replace(self.document, metadata=metadata), json_payload(metadata)
        content = content_hash_of(self.text_hash, payload)
        return replace(self, document=document, metadata=payload, content_hash=content)

    @property
    def size(self) -> int:
        """Bytes of its records, about."""
        memories = sum(map(len, filter(None, self.memories)))
        embeddings = len(self.pieces) * (len(self.embeddings[0]) + _OVERHEAD)
        return memories + embeddings + len(self.document.text) + len(self.metadata)


def prepared(
    name: str,
    document: Document,
    pieces: Sequence[Piece],
    embeddings: NDArray[np.float32],
    memories: Sequence[bytes | None] | None = None,
    version: int = 1,
    codec: str = "",
) -> Prepared:
    """A document ready to be written.

    Args:
        name: its id.
        document: what the user gave, checked.
        pieces: what it is cut into.
        embeddings: (pieces, dimension) float32, each of length 1.
        memories: one for each piece, encoded; default: all stay cold.
        version: of a document that is new.
        codec: what the memories are coded by.
    """
    text, metadata = text_hash(document.text), json_payload(dict(document.metadata))
    return Prepared(
        name,
        document,
        text,
        content_hash_of(text, metadata),
        metadata,
        pieces,
        [compress(piece.text.encode()) for piece in pieces],
        [row.tobytes() for row in embeddings.astype("<f4", copy=False)],
        [None] * len(pieces) if memories is None else memories,
        version,
        codec,
    )


def embedded(
    documents: Sequence[tuple[str, Document, list[Piece]]], embedder: Embedder
) -> list[Prepared]:
    """Documents that were split, cold, with all their references embedded in one batch."""
    texts = [piece.placed for _, _, pieces in documents for piece in pieces]
    vectors = unit_vectors(embedder.embed(texts), len(texts), embedder.dimension)
    ready = []
    at = 0
    for name, document, pieces in documents:
        ready.append(prepared(name, document, pieces, vectors[at : at + len(pieces)]))
        at += len(pieces)
    return ready


def put(
    transaction: Transaction,
    *documents: Prepared,
    known: Mapping[str, DocumentEntry | None] = MappingProxyType({}),
) -> None:
    """Write documents, each id once, table by table; what they replace goes in the same
    transaction.

    Args:
        transaction: to write in.
        documents: what to write.
        known: what the document map says of ids that were looked up already.
    """
    if not documents:
        return
    texts: _Rows = []
    vectors: _Rows = []
    memories: _Rows = []
    entries: _Rows = []
    metadata: _Rows = []
    grouped = Grouped(declared_keys(transaction))
    number = transaction.next_references(sum(len(item.pieces) for item in documents)).start
    changes = []
    for item in documents:
        version = item.version
        old = known[item.id] if item.id in known else transaction.document(item.id)
        if old is not None:
            version = old.version + 1
            delete(transaction, item.id, old)
        name = item.id.encode()
        first = number
        for ordinal, piece in enumerate(item.pieces):
            key = integer_key(number)
            text = item.texts[ordinal]
            texts.append((key, version, reference_bytes(ordinal, piece.tokens, name, text)))
            vectors.append((key, version, item.embeddings[ordinal]))
            changes.append((INSERTED, number))
            memory = item.memories[ordinal]
            if memory is not None:
                memories.append((key, version, memory))
                changes.append((REMEMBERED, number))
            number += 1
        ids = tuple(range(first, number))
        entry = DocumentEntry(version, item.content_hash, item.text_hash, ids)
        entries.append((name, version, entry.payload()))
        metadata.append((name, version, item.metadata))
        grouped.add(item.document.metadata, ids)
    transaction.put_all(REFERENCES, texts)
    transaction.put_all(EMBEDDINGS, vectors)
    transaction.put_all(MEMORIES, memories)
    transaction.put_all(DOCUMENTS, entries)
    transaction.put_all(METADATA, metadata)
    grouped.write(transaction)
    transaction.log(changes)


def put_metadata(transaction: Transaction, name: str, document: Document) -> None:
    """Write new metadata; the references stay with their ids, embeddings and memories.

    Raises:
        ConflictError: the stored text is no longer that of `document`, or references have places
            here and stand under another title.
    """
    old = transaction.document(name)
    if (
        old is None
        or old.text_hash != text_hash(document.text)
        or not _is_titled_so(transaction, name, document)
    ):
        raise ConflictError(
            f"another writer changed document '{name}' while its metadata was updated; run it again"
        )
    withdraw(transaction, name, old.references)
    entry = replace(old, version=old.version + 1, content_hash=content_hash(document))
    transaction.put(DOCUMENTS, name.encode(), entry.version, entry.payload())
    payload = json_payload(dict(document.metadata))
    transaction.put(METADATA, name.encode(), entry.version, payload)
    grouped = Grouped(declared_keys(transaction))
    grouped.add(document.metadata, old.references)
    grouped.write(transaction)


def _is_titled_so(transaction: Transaction, name: str, document: Document) -> bool:
    """Whether new metadata leave the places of a document's references as they are."""
    if not Cutting.from_json(transaction.optional_setting(CUTTING)).place:
        return True
    return title_of(transaction.metadata(name)) == title_of(document.metadata)


def delete(transaction: Transaction, name: str, entry: DocumentEntry) -> None:
    """Remove a document with all its references."""
    withdraw(transaction, name, entry.references)
    for table in (DOCUMENTS, METADATA):
        transaction.delete_record(table, name.encode())
    transaction.delete_references(entry.references)


def unit_vectors(vectors: NDArray[np.float32], count: int, dimension: int) -> NDArray[np.float32]:
    """The vectors scaled to length 1, (count, dimension) float32.

    Raises:
        InvalidInputError: another shape, no real numbers, or a vector that is zero or not finite
            (in float32).
    """
    try:
        given = np.asarray(vectors)
    except ValueError as error:
        raise InvalidInputError(f"embeddings are not rows of numbers: {error}") from error
    if given.dtype.kind not in "fiu" and given.size:
        raise InvalidInputError(
            f"embeddings must be real numbers, got {given.dtype} of shape {given.shape}"
        )
    with np.errstate(over="ignore"):  # it is told below
        vectors = given.astype(np.float32, copy=False)
    if vectors.shape != (count, dimension):
        raise InvalidInputError(
            f"embeddings must have shape ({count}, {dimension}), one row for each reference "
            f"(`split` shows them); got {vectors.shape}"
        )
    # In float64, since float32's squares of small or large numbers are 0 or infinite.
    exact = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    wrong = ~((lengths > 0) & (lengths < np.inf))
    if wrong.any():
        raise InvalidInputError(f"embedding {wrong.argmax()} is zero or not finite")
    off = np.abs(lengths - 1) > _ROUNDING
    if not off.any():  # what was scaled before stays bit by bit what it is
        return vectors
    lengths[~off] = 1
    unit: NDArray[np.float32] = (exact / lengths[:, None]).astype(np.float32)
    return unit
