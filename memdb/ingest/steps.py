"""What a write does to documents, as steps: prepared outside a transaction, run within one, where
each looks again at what it rests on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from memdb.errors import ConflictError, DocumentExistsError, UnknownDocumentError
from memdb.filters.language import Filter
from memdb.ingest import recording
from memdb.ingest.recording import Prepared
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.transaction import Transaction
from memdb.types.canonical import json_payload, read_json
from memdb.types.checks import content_hash, text_hash
from memdb.types.document import Document, StoredDocument

_NAMED = 5  # ids in an error's text


class Step(ABC):
    """One thing that a write does."""

    @abstractmethod
    def check(self, transaction: Transaction) -> None:
        """Raise what forbids it in the state that it is about to change."""

    @abstractmethod
    def run(self, transaction: Transaction) -> int:
        """Do it; how many documents it changed."""


@dataclass(frozen=True)
class Put(Step):
    """Write a document with its text.

    Attributes:
        prepared: the document.
        seen: the one that it replaces, if there was one.
        when: `new`: only where there is none of its id; `unchanged`: only in the place of `seen`;
            `always`.
    """

    prepared: Prepared
    seen: DocumentEntry | None
    when: Literal["new", "unchanged", "always"]

    def check(self, transaction: Transaction) -> None:
        """See `Step`."""
        name = self.prepared.id
        if self.when == "new":
            require_new({name: transaction.document(name)})
        elif self.when == "unchanged":
            now = entry_of(transaction, name)
            if self.seen is None or _content(now) != _content(self.seen):
                raise conflict(name)

    def run(self, transaction: Transaction) -> int:
        """See `Step`."""
        recording.put(transaction, self.prepared)
        return 1

    @property
    def outcome(self) -> StoredDocument:
        """The document as it will be; its references have no ids yet."""
        ready = self.prepared
        return StoredDocument(
            ready.id,
            ready.version if self.seen is None else self.seen.version + 1,
            ready.document.text,
            dict(read_json(ready.metadata)),
            (),
            sum(memory is not None for memory in ready.memories),
        )


@dataclass(frozen=True)
class Describe(Step):
    """Write a document's metadata; its text, references and memories stay.

    Attributes:
        before: the document as it was seen.
        metadata: as given.
        version: only in the place of this version, if one is asked for.
    """

    before: StoredDocument
    metadata: Mapping[str, Any]
    version: int | None = None

    def check(self, transaction: Transaction) -> None:
        """See `Step`."""
        name = self.before.id
        require_version(name, entry_of(transaction, name).version, self.version)

    def run(self, transaction: Transaction) -> int:
        """See `Step`."""
        name = self.before.id
        recording.put_metadata(transaction, name, Document(self.before.text, name, self.metadata))
        return 1

    @property
    def outcome(self) -> StoredDocument:
        """The document as it will be."""
        metadata = dict(read_json(json_payload(dict(self.metadata))))
        return replace(self.before, version=self.before.version + 1, metadata=metadata)


@dataclass(frozen=True)
class Delete(Step):
    """Remove documents.

    Attributes:
        names: their ids.
        version: only if this is the version of each.
        where: only those whose metadata this means; then one that is gone is no error.
    """

    names: Sequence[str]
    version: int | None = None
    where: Filter | None = None

    def check(self, transaction: Transaction) -> None:
        """See `Step`."""
        self._entries(transaction)

    def run(self, transaction: Transaction) -> int:
        """See `Step`."""
        entries = self._entries(transaction)
        for name, entry in entries.items():
            recording.delete(transaction, name, entry)
        return len(entries)

    def _entries(self, transaction: Transaction) -> dict[str, DocumentEntry]:
        """Those to delete."""
        found = {name: transaction.document(name) for name in self.names}
        if self.where is None:
            require_there(found)
        there = {
            name: entry
            for name, entry in found.items()
            if entry is not None
            and (
                self.where is None or self.where.matches(transaction.metadata(name, entry.version))
            )
        }
        for name, entry in there.items():
            require_version(name, entry.version, self.version)
        return there


def run(transaction: Transaction, steps: Sequence[Step]) -> int:
    """Do all steps in their order; how many documents they changed. Documents that are put one
    after the other are written together, table by table."""
    together: dict[str, Prepared] = {}
    changed = 0

    def write() -> None:
        recording.put(transaction, *together.values())
        together.clear()

    for step in steps:
        if not isinstance(step, Put) or step.prepared.id in together:
            write()
        step.check(transaction)
        if isinstance(step, Put):
            together[step.prepared.id] = step.prepared
            changed += 1
        else:
            changed += step.run(transaction)
    write()
    return changed


# --- what a step rests on -------------------------------------------------------------------------


def entry_of(transaction: Transaction, name: str) -> DocumentEntry:
    """The map's entry of a document; `UnknownDocumentError` if it is not there."""
    entry = transaction.document(name)
    if entry is None:
        raise UnknownDocumentError(unknown(name))
    return entry


def entry_for(document: StoredDocument) -> DocumentEntry:
    """The map's entry of a document, made of what a user sees of it."""
    content = content_hash(Document(document.text, document.id, document.metadata))
    return DocumentEntry(document.version, content, text_hash(document.text), document.references)


def require_new(entries: Mapping[str, DocumentEntry | None]) -> None:
    """Raise `DocumentExistsError` if one of these documents is there."""
    there = [name for name, entry in entries.items() if entry is not None]
    if there:
        raise DocumentExistsError(
            f"there is already a document {_listed(there)}; `update` replaces it, `upsert` writes "
            "it whether it is there or not"
        )


def require_there(entries: Mapping[str, DocumentEntry | None]) -> None:
    """Raise `UnknownDocumentError` unless all of these documents are there."""
    missing = [name for name, entry in entries.items() if entry is None]
    if missing:
        raise UnknownDocumentError(unknown(*missing) + "; nothing was deleted")


def require_version(name: str, version: int, wanted: int | None) -> None:
    """Raise `ConflictError` if another version of a document is wanted than there is."""
    if wanted is not None and version != wanted:
        raise ConflictError(f"document '{name}' is at version {version}, not {wanted}")


def conflict(name: str) -> ConflictError:
    """What to raise if a document is no longer what the write was prepared for."""
    return ConflictError(
        f"another writer changed document '{name}' while it was updated; run it again"
    )


def unknown(*names: str) -> str:
    """What to say of ids that are not there."""
    return f"there is no document {_listed(names)}"


def _content(entry: DocumentEntry) -> tuple[int, bytes]:
    return entry.version, entry.content_hash


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return listed if len(names) <= _NAMED else f"{listed} and {len(names) - _NAMED} more"
