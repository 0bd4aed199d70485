"""Ingest: a corpus file into the store, idempotent and resumable.

First the whole file is checked and compared with the store; nothing is written. Then new and
changed documents are written cold, a batch to a transaction; last, unless the caller wants them
cold, their memories. Whatever is interrupted goes on at the next call, since what is there already
is recognised by its content hash.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from memdb.errors import InvalidInputError
from memdb.ingest.chunking import Chunker, Piece
from memdb.ingest.corpus import read_corpus
from memdb.ingest.recording import delete, embedded, put, put_metadata
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Embedder, Progress
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.store import Store
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
        deleted: documents that the file does not have (`prune`).
    """

    inserted: int
    updated: int
    unchanged: int
    references: int
    memories: int
    deleted: int = 0


def ingest(
    path: Path,
    *,
    name: str | None,
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
        path: the corpus.
        name: what to call it in errors.
        store: where to.
        chunker: cuts documents into references.
        embedder: embeds them.
        memory_store: writes their memories.
        cold: whether they stay without.
        prune: whether to delete the documents that the corpus does not have.
        progress: told of the work.
    """
    _check_file(path, name or str(path))
    names, total = _survey(path, name, store, chunker, progress)
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
                if _change(old, item.document) is not None:  # else another process was faster
                    put(transaction, item)
                    inserted += old is None
                    updated += old is not None
        references += sum(len(pieces) for _, _, pieces in batch)
        batch.clear()

    for _, key, document in read_corpus(path, name):
        with store.read() as transaction:
            change = _change(transaction.document(key), document)
        if change == "metadata":
            with store.write() as transaction:
                put_metadata(transaction, key, document)
            updated += 1
        elif change == "text":
            pieces = chunker.split(document.text)
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
    deleted = _prune(store, set(names), progress) if prune else 0
    return IngestReport(inserted, updated, unchanged, references, memories, deleted)


def _prune(store: Store, names: set[str], progress: Progress) -> int:
    """Delete the documents of other names; returns how many there were."""
    with store.read() as transaction:
        others = [name for name, _ in transaction.documents() if name not in names]
    for start in range(0, len(others), _DELETED):
        progress("deleting", start, len(others))
        with store.write() as transaction:
            for name in others[start : start + _DELETED]:
                entry = transaction.document(name)
                if entry is not None:
                    delete(transaction, name, entry)
    progress("deleting", len(others), len(others))
    return len(others)


def _check_file(path: Path, name: str) -> None:
    """Refuse what cannot be read twice, before anything else is done."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidInputError(f"there is no file '{name}'") from error
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot read '{name}': {reason}") from error
    if stat.S_ISDIR(mode):
        raise InvalidInputError(f"there is no file '{name}': it is a folder")
    if not stat.S_ISREG(mode):
        raise InvalidInputError(f"'{name}' is no regular file, and a corpus is read twice")


def _survey(
    path: Path, name: str | None, store: Store, chunker: Chunker, progress: Progress
) -> tuple[list[str], int]:
    """Check the whole file. Returns its documents' ids, and how many references are to write."""
    names = []
    total = 0
    for number, key, document in read_corpus(path, name):
        names.append(key)
        with store.read() as transaction:
            change = _change(transaction.document(key), document)
        if change == "text":
            total += len(chunker.split(document.text))
        if number % 1000 == 0:
            progress("reading", number, 0)
    if not names:
        raise InvalidInputError(f"'{name or path}' holds no documents")
    return names, total


def _change(old: DocumentEntry | None, document: Document) -> str | None:
    """What a document brings that the store does not have: `text`, `metadata`, or nothing."""
    if old is None or old.text_hash != text_hash(document.text):
        return "text"
    return None if old.content_hash == content_hash(document) else "metadata"
