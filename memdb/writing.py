"""The write path: document -> references -> (embedding, memory) -> codec -> one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memdb.chunking import Piece
from memdb.documents import content_hash, text_hash
from memdb.errors import ConflictError, InvalidInputError
from memdb.layout import DocumentEntry
from memdb.protocols import Embedder
from memdb.records import Document, Reference
from memdb.transaction import Transaction

_ROUNDING = 1e-6  # by which the length of a vector of length 1 may differ, in float32


@dataclass(frozen=True)
class Prepared:
    """A document with all that its transaction writes, computed before the transaction begins.

    Attributes:
        id: the document's id.
        document: what the user gave.
        pieces: its references' texts and lengths.
        embeddings: (pieces, dimension) float32, each of length 1.
        memories: one encoded memory for each piece, or None: they stay cold.
    """

    id: str
    document: Document
    pieces: list[Piece]
    embeddings: NDArray[np.float32]
    memories: list[bytes] | None = None


def prepare(
    documents: Sequence[tuple[str, Document, list[Piece]]], embedder: Embedder
) -> list[Prepared]:
    """Embed documents that were split, all their references in one batch."""
    texts = [piece.text.strip() for _, _, pieces in documents for piece in pieces]
    vectors = unit_vectors(embedder.embed(texts), len(texts), embedder.dimension)
    prepared = []
    at = 0
    for name, document, pieces in documents:
        prepared.append(Prepared(name, document, pieces, vectors[at : at + len(pieces)]))
        at += len(pieces)
    return prepared


def put(transaction: Transaction, prepared: Prepared, old: DocumentEntry | None) -> None:
    """Write a document; what it replaces, if anything, goes in the same transaction."""
    version = 1 if old is None else old.version + 1
    if old is not None:
        transaction.delete_document(prepared.id, old)
    numbers = transaction.next_references(len(prepared.pieces))
    for ordinal, (number, piece) in enumerate(zip(numbers, prepared.pieces, strict=True)):
        transaction.put_reference(
            Reference(number, version, prepared.id, ordinal, piece.tokens, piece.text),
            prepared.embeddings[ordinal],
            None if prepared.memories is None else prepared.memories[ordinal],
        )
    _put_entry(transaction, prepared.id, prepared.document, version, tuple(numbers))


def put_metadata(transaction: Transaction, name: str, document: Document) -> None:
    """Write new metadata; the references stay with their ids, embeddings and memories.

    Raises:
        ConflictError: the stored text is no longer that of `document`.
    """
    old = transaction.document(name)
    if old is None or old.text_hash != text_hash(document.text):
        raise ConflictError(
            f"another writer changed document '{name}' while its metadata was updated; run it again"
        )
    transaction.withdraw_document(name, old)
    _put_entry(transaction, name, document, old.version + 1, old.references)


def _put_entry(
    transaction: Transaction,
    name: str,
    document: Document,
    version: int,
    references: tuple[int, ...],
) -> None:
    entry = DocumentEntry(version, content_hash(document), text_hash(document.text), references)
    transaction.put_document(name, entry, dict(document.metadata))


def unit_vectors(vectors: NDArray[np.float32], count: int, dimension: int) -> NDArray[np.float32]:
    """The vectors scaled to length 1, (count, dimension) float32.

    Raises:
        InvalidInputError: another shape, or a vector that is zero or not finite.
    """
    vectors = np.asarray(vectors, np.float32)
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
