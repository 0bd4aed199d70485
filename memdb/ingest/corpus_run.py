"""Ingest: documents into the store, idempotent and resumable.

First all are checked and compared with the store; nothing is written. Then new and
changed documents are written cold, a batch to a transaction; last, unless the caller wants them
cold, their memories. Whatever is interrupted goes on at the next call, since what is there already
is recognised by its content hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from memdb.cutting.places import title_of
from memdb.errors import CorruptRecordError
from memdb.ingest.chunking import Chunker, Piece
from memdb.ingest.corpus import Entry
from memdb.ingest.recording import delete, embedded, put, put_metadata
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Embedder, Progress
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types.checks import content_hash, text_hash
from memdb.types.document import Document

_BATCH = 64  # references to a transaction, and to a call of the embedder
_DELETED = 1000  # documents to a transaction


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Attributes:
        inserted: new documents.
        updated: documents whose text or metadata changed.
        unchanged: documents that were there already.
        references: references written.
        memories: memories written.
        deleted: documents that the files do not have (`prune`).
        kinds: how many documents the files hold, by kind of file (`memdb.FORMATS`).
        passed_over: how many files gave no document, by the reason.
        blank_rows: rows of tables without text, which gave none.
        notes: what to know, and names: an encoding that was guessed, a file that was passed over
            though it looked like one to read.
    """

    inserted: int
    updated: int
    unchanged: int
    references: int
    memories: int
    deleted: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict, compare=False)
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)
    blank_rows: int = field(default=0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


class Corpus(Protocol):
    """What is brought in; it is gone through twice."""

    def entries(self) -> Iterator[Entry]:
        """Documents with their ids, checked.

        Raises:
            CorpusError: one is wrong.
        """

    def require_some(self, count: int) -> None:
        """Raise `InvalidInputError` if so many documents are none."""

    def require_own(self, entry: Entry, old: Mapping[str, Any]) -> None:
        """Raise `InvalidInputError` if a document may not replace the one with this metadata."""

    def goes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a document with this metadata, which is not among these, is deleted by
        `prune`."""


def ingest(
    corpus: Corpus,
    *,
    store: Store,
    chunker: Chunker,
    embedder: Embedder,
    memory_store: MemoryStore,
    cold: bool,
    prune: bool,
    progress: Progress,
) -> IngestReport:
    """See `MemDB.ingest`.

    Args:
        corpus: what to bring in.
        store: where to.
        chunker: cuts documents into references.
        embedder: embeds them.
        memory_store: writes their memories.
        cold: whether they stay without.
        prune: whether to delete the documents that went from where the corpus is.
        progress: told of the work.
    """
    names, total = _survey(corpus, store, chunker, progress)
    if total and not cold:
        memory_store.require_writer()  # loaded, or refused, before anything is written
    batch: list[tuple[str, Document, list[Piece]]] = []
    inserted = updated = references = 0

    def flush() -> None:
        nonlocal inserted, updated, references
        progress("embedding", references, total)
        ready = embedded(batch, embedder)
        with store.write() as transaction:
            memory_store.require_shape(transaction)
            for item in ready:
                old = transaction.document(item.id)
                # Else another process was faster.
                if _change(transaction, item.id, item.document, chunker) is not None:
                    put(transaction, item)
                    inserted += old is None
                    updated += old is not None
        references += sum(len(pieces) for _, _, pieces in batch)
        batch.clear()

    for key, document, _ in corpus.entries():
        with store.read() as transaction:
            change = _change(transaction, key, document, chunker)
        if change == "metadata":
            with store.write() as transaction:
                put_metadata(transaction, key, document)
            updated += 1
        elif change == "text":
            pieces = chunker.split(document.text, id=key, title=title_of(document.metadata))
            if batch and sum(len(other) for _, _, other in batch) + len(pieces) > _BATCH:
                flush()
            batch.append((key, document, pieces))
    if batch:
        flush()
    if total:
        progress("embedding", references, total)
    memories = 0
    if not cold:
        with store.read() as transaction:
            entries = map(transaction.document, names)  # None: deleted meanwhile
            missing = memory_store.cold(transaction, filter(None, entries))
        memories = memory_store.warm(missing, progress)
    unchanged = len(names) - inserted - updated
    deleted = _prune(corpus, store, set(names), progress) if prune else 0
    return IngestReport(inserted, updated, unchanged, references, memories, deleted)


def _prune(corpus: Corpus, store: Store, names: set[str], progress: Progress) -> int:
    """Delete the documents of other names that went; returns how many there were."""
    with store.read() as transaction:
        others = [
            name
            for name, entry in transaction.documents()
            if name not in names and corpus.goes(_metadata(transaction, name, entry))
        ]
    for start in range(0, len(others), _DELETED):
        progress("deleting", start, len(others))
        with store.write() as transaction:
            for name in others[start : start + _DELETED]:
                entry = transaction.document(name)
                if entry is not None:
                    delete(transaction, name, entry)
    progress("deleting", len(others), len(others))
    return len(others)


def _metadata(transaction: Transaction, name: str, entry: DocumentEntry) -> dict[str, Any]:
    """A document's metadata; none where they are damaged."""
    try:
        return transaction.metadata(name, entry.version)
    except CorruptRecordError:
        return {}


def _survey(
    corpus: Corpus, store: Store, chunker: Chunker, progress: Progress
) -> tuple[list[str], int]:
    """Check the whole corpus. Returns its documents' ids, and how many references are to write."""
    names = []
    total = 0
    for entry in corpus.entries():
        key, document, by_path = entry
        names.append(key)
        with store.read() as transaction:
            old = transaction.document(key)
            change = _change(transaction, key, document, chunker)
            if by_path and old is not None and change is not None:
                corpus.require_own(entry, _metadata(transaction, key, old))
        if change == "text":
            total += len(chunker.split(document.text, id=key, title=title_of(document.metadata)))
        if len(names) % 1000 == 0:
            progress("reading", len(names), 0)
    corpus.require_some(len(names))
    return names, total


def _change(
    transaction: Transaction, name: str, document: Document, chunker: Chunker
) -> str | None:
    """What a document brings that the store does not have: `text`, `metadata`, or nothing. Where
    references have places, a new title is a new text to them."""
    old = transaction.document(name)
    if old is None or old.text_hash != text_hash(document.text):
        return "text"
    if old.content_hash == content_hash(document):
        return None
    if not chunker.cutting.place:
        return "metadata"
    titled_alike = title_of(transaction.metadata(name)) == title_of(document.metadata)
    return "metadata" if titled_alike else "text"
