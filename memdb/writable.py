"""`Writable`: the writing half of `MemDB`, and of a `transaction`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError
from memdb.filters.language import Filter, Where
from memdb.ingest.corpus import document_of
from memdb.ingest.preparing import Preparer
from memdb.ingest.steps import (
    Delete,
    Describe,
    Put,
    Step,
    entry_for,
    require_new,
    require_version,
)
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress, no_progress
from memdb.readable import known
from memdb.searchable import filter_of
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.transaction import Transaction
from memdb.types import arguments, checks
from memdb.types.document import Document, StoredDocument
from memdb.types.memory import ExplicitMemory


@dataclass(frozen=True)
class Seen:
    """What a write knows of a document that is there: its entry in the map, and how many of its
    references have a memory."""

    entry: DocumentEntry
    warm: int

    @classmethod
    def of(cls, transaction: Transaction, memory_store: MemoryStore, name: str) -> Seen | None:
        """What is there of a document, if it is."""
        entry = transaction.document(name)
        if entry is None:
            return None
        return cls(entry, sum(memory_store.is_warm(transaction, n) for n in entry.references))

    def with_text(self, name: str, text: str) -> StoredDocument:
        """The document, its text being known, without its metadata."""
        entry = self.entry
        return StoredDocument(name, entry.version, text, {}, entry.references, self.warm)


class Writable(ABC):
    """What can be written to a database."""

    _preparer: Preparer

    @abstractmethod
    def get(self, id: str) -> StoredDocument:
        """A document by its id."""

    @abstractmethod
    def _require_writable(self) -> None:
        """Raise what forbids a write now, before anything is prepared."""

    @abstractmethod
    def _look(self, names: Iterable[str]) -> dict[str, Seen | None]:
        """What is there of some documents."""

    @abstractmethod
    def _meant(self, where: Filter) -> list[str]:
        """The documents that a filter means."""

    @abstractmethod
    def _run(
        self, steps: Sequence[Step], outcomes: Sequence[StoredDocument] = ()
    ) -> tuple[int, list[StoredDocument]]:
        """Do all steps, or none.

        Args:
            steps: at least one.
            outcomes: the documents as the steps are to leave them.

        Returns:
            How many documents changed, and `outcomes` as they are then.
        """

    def insert(
        self,
        text: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        cold: bool = False,
        embeddings: NDArray[np.float32] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
    ) -> StoredDocument:
        """Add a document; when this returns, it is on the disk.

            db.insert("The blue heron is a bird.", id="heron", metadata={"year": 2021})

        Args:
            text: split into references of at most `shape.reference_length` tokens.
            id: default: derived from the text.
            metadata: JSON values by name.
            cold: leave its memories to their first use, or to `warm`.
            embeddings: (references, dimension); default: the embedder's. `split` shows the
                references.
            memories: one for each reference; default: the writer's, unless `cold`.

        Raises:
            DocumentExistsError: the id is taken.
            InvalidInputError: naming the argument.
        """
        document = Document(text, id, {} if metadata is None else metadata)
        return self._insert([document], cold, embeddings, memories, no_progress)[0]

    def insert_many(
        self,
        documents: Iterable[Document | Mapping[str, Any] | str],
        *,
        cold: bool = False,
        embeddings: NDArray[np.float32] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
        progress: Progress = no_progress,
    ) -> list[StoredDocument]:
        """Add documents, all or none, in one write: their references are embedded together, and the
        disk is waited for once. All are held in RAM until then; `ingest` and `load` are for more
        than that.

            db.insert_many([{"id": "heron", "text": "The blue heron is a bird."}, "A text alone."])

        Args:
            documents: each a `Document`, a mapping as a line of a corpus (`text`, and if you like
                `id` and `metadata`), or a text alone.
            cold: as `insert`.
            embeddings: (references, dimension), of all documents' references in order.
            memories: of the same references.
            progress: told of the work.

        Returns:
            The documents in the order given.

        Raises:
            DocumentExistsError: naming the ids that are taken. Nothing was written.
            InvalidInputError: naming the document by its place, from 0. Nothing was written.
        """
        return self._insert(documents, cold, embeddings, memories, progress)

    def upsert(
        self,
        text: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        cold: bool = False,
        embeddings: NDArray[np.float32] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
    ) -> StoredDocument:
        """Add a document, or put it in the place of the one that has its id: what is there
        afterwards is what was given. (`update` leaves what it is not given; here metadata that is
        not given is empty.) The same content again changes nothing; where the text is the same, its
        references and memories stay.

        Args: as `insert`.

        Raises:
            ConflictError: another writer changed its text meanwhile, where metadata alone was to
                change.
            InvalidInputError: naming the argument.
        """
        document = Document(text, id, {} if metadata is None else metadata)
        return self._upsert([document], cold, embeddings, memories, no_progress)[0]

    def upsert_many(
        self,
        documents: Iterable[Document | Mapping[str, Any] | str],
        *,
        cold: bool = False,
        progress: Progress = no_progress,
    ) -> list[StoredDocument]:
        """`upsert` of documents, all or none, in one write. Arguments and errors are those of
        `insert_many`; for embeddings and memories that are there already use `load`."""
        return self._upsert(documents, cold, None, None, progress)

    def update(
        self,
        id: str,
        *,
        text: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        cold: bool = False,
        if_version: int | None = None,
        embeddings: NDArray[np.float32] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
    ) -> StoredDocument:
        """Replace a document's text, its metadata, or both; what is None stays.

        A new text has new references. New metadata alone keeps them and their memories (but for a
        new `title` where references have a place, see `create`). The same content again changes
        nothing.

        Args and errors: as `insert`, and

        Args:
            if_version: change it only if this is its version (as `get` returned it).

        Raises:
            UnknownDocumentError: no document has this id.
            ConflictError: it is at another version, or another writer changed it meanwhile.
        """
        self._require_writable()
        _check_version(if_version)
        old = self.get(id)
        require_version(id, old.version, if_version)
        name, document = checks.checked(
            Document(
                old.text if text is None else text,
                id,
                old.metadata if metadata is None else metadata,
            )
        )
        seen = entry_for(old)
        step: Put | Describe
        if (
            document.text != old.text
            or embeddings is not None
            or memories is not None
            or not self._preparer.are_placed_alike(old.metadata, document.metadata)
        ):
            (ready,) = self._preparer.prepare(
                [(name, document)], cold=cold, embeddings=embeddings, memories=memories
            )
            step = Put(ready, seen, "unchanged")
        elif checks.content_hash(document) != seen.content_hash:
            step = Describe(old, document.metadata, if_version)
        else:
            return old
        return self._run([step], [step.outcome])[1][0]

    def delete(self, *ids: str, where: Where | None = None, if_version: int | None = None) -> int:
        """Remove documents with their references and memories, all or none.

            db.delete("heron", "crane")
            db.delete(where={"year": {"$lt": 1990}})

        Args:
            ids: of the documents.
            where: instead of ids: those with this metadata (see `retrieve`).
            if_version: remove them only if this is the version of each.

        Returns:
            How many were deleted.

        Raises:
            UnknownDocumentError: naming the ids that are not there.
            ConflictError: one is at another version.
            InvalidInputError: ids and a filter, or a filter that asks for nothing.
        """
        self._require_writable()
        _check_version(if_version)
        if where is None:
            step = Delete(list(dict.fromkeys(map(known, ids))), if_version)
        elif ids:
            raise InvalidInputError("delete by ids or by `where`, not by both")
        else:
            step = self._deletion(where, if_version)
        return self._run([step])[0] if step.names else 0

    def _deletion(self, where: Where, if_version: int | None) -> Delete:
        chosen = filter_of(where)
        if chosen is None:
            raise InvalidInputError(
                "this filter means every document; to delete all of them, say so: `db.delete(*db)`"
            )
        return Delete(self._meant(chosen), if_version, chosen)

    # --- plumbing ---

    def _insert(
        self,
        documents: Iterable[Document | Mapping[str, Any] | str],
        cold: bool,
        embeddings: NDArray[np.float32] | None,
        memories: Sequence[ExplicitMemory] | None,
        progress: Progress,
    ) -> list[StoredDocument]:
        self._require_writable()
        named = _named(documents)
        seen = self._look(named)
        require_new(_entries(seen))
        ready = self._preparer.prepare(
            list(named.items()),
            cold=cold,
            embeddings=embeddings,
            memories=memories,
            progress=progress,
        )
        steps = [Put(one, None, "new") for one in ready]
        return self._run(steps, [step.outcome for step in steps])[1] if steps else []

    def _upsert(
        self,
        documents: Iterable[Document | Mapping[str, Any] | str],
        cold: bool,
        embeddings: NDArray[np.float32] | None,
        memories: Sequence[ExplicitMemory] | None,
        progress: Progress,
    ) -> list[StoredDocument]:
        self._require_writable()
        named = _named(documents)
        seen = self._look(named)
        given = embeddings is not None or memories is not None
        new = [
            (name, document)
            for name, document in named.items()
            if given or not self._keeps_references(name, seen[name], document)
        ]
        ready = self._preparer.prepare(
            new, cold=cold, embeddings=embeddings, memories=memories, progress=progress
        )
        prepared = {one.id: one for one in ready}
        steps: list[Put | Describe] = []
        outcomes: dict[str, StoredDocument] = {}
        for name, document in named.items():
            one = seen[name]
            if name in prepared:
                steps.append(Put(prepared[name], None if one is None else one.entry, "always"))
                outcomes[name] = steps[-1].outcome
                continue
            assert one is not None
            describe = Describe(one.with_text(name, document.text), document.metadata)
            outcomes[name] = describe.outcome
            if checks.content_hash(document) == one.entry.content_hash:
                outcomes[name] = replace(outcomes[name], version=one.entry.version)
            else:
                steps.append(describe)
        if steps:
            _, written = self._run(steps, [step.outcome for step in steps])
            outcomes.update({document.id: document for document in written})
        return list(outcomes.values())

    def _keeps_references(self, name: str, seen: Seen | None, document: Document) -> bool:
        """Whether a document is there whose references this one would have, too."""
        if seen is None or seen.entry.text_hash != checks.text_hash(document.text):
            return False
        return seen.entry.content_hash == checks.content_hash(document) or (
            self._preparer.are_placed_alike(self.get(name).metadata, document.metadata)
        )


def _check_version(wanted: int | None) -> None:
    if wanted is not None:
        arguments.whole_number(wanted, "if_version", 1)


def _entries(seen: Mapping[str, Seen | None]) -> dict[str, DocumentEntry | None]:
    return {name: None if one is None else one.entry for name, one in seen.items()}


def _named(
    documents: Iterable[Document | Mapping[str, Any] | str],
) -> dict[str, Document]:
    """Documents by id, checked."""
    documents = arguments.some(documents, "documents", "documents (`insert` takes one)")
    named: dict[str, Document] = {}
    several = not isinstance(documents, list) or len(documents) != 1
    for place, given in enumerate(documents):
        try:
            name, document = checks.checked(document_of(given))
            if name in named:
                raise InvalidInputError(f"the id '{name}' is there twice; ids must differ")
        except InvalidInputError as error:
            if not several:
                raise
            raise InvalidInputError(f"document {place}: {error}") from error
        named[name] = document
    return named
