"""`WriteTransaction`: several writes that happen together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Self

from memdb.errors import ConflictError, StorageError, UnknownDocumentError
from memdb.filters.language import Filter
from memdb.filters.matching import matching_documents
from memdb.ingest.preparing import Preparer
from memdb.ingest.steps import (
    Delete,
    Step,
    entry_for,
    entry_of,
    require_there,
    require_version,
    unknown,
)
from memdb.memories.memory_store import MemoryStore
from memdb.readable import known, stored_document
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.store import ReadTransaction
from memdb.storage.transaction import Transaction
from memdb.types.checks import is_id
from memdb.types.document import StoredDocument
from memdb.writable import Seen, Writable

#: The transactions that were begun around what runs now, by thread and by asynchronous task.
_AROUND: ContextVar[tuple[WriteTransaction, ...]] = ContextVar("memdb_transactions", default=())

#: Writes steps to the database, all or none, if its state of then passes a check.
Commit = Callable[[Sequence[Step], Callable[[Transaction], None]], object]


class WriteTransaction(Writable):
    """Several writes that happen together, or not at all: what `MemDB.transaction` gives. It has
    `insert`, `insert_many`, `upsert`, `upsert_many`, `update`, `delete`, `get` and `in`.

        with db.transaction() as t:
            account = t.get("account")
            t.update("account", metadata={"balance": account.metadata["balance"] - 1})
            t.insert("A heron was bought.", metadata={"price": 1})

    It reads the database as it was when the block began, and what the block itself wrote. Texts are
    embedded, and memories are written, by each call; what is ready is held in RAM, and all of it is
    written at the end of the block, in one transaction of the store. So no other writer waits for
    the block, however long it takes. If another one changed a document meanwhile that the block
    read or wrote, nothing is written, and the end of the block raises `ConflictError`: run it
    again. An exception out of the block writes nothing, either. A call that fails, and whose error
    is caught in the block, leaves nothing, and the block goes on.

    A document that the block wrote has no ids of references before the end: they are `()` in what
    its calls return. While it is open LMDB keeps the pages of what is deleted meanwhile. For one
    thread at a time.
    """

    def __init__(
        self,
        owner: object,
        reading: Callable[[], ReadTransaction],
        preparer: Preparer,
        memory_store: MemoryStore,
        commit: Commit,
    ) -> None:
        self.owner = owner  # the open database that it is of
        self._begin = reading
        self._preparer = preparer
        self._memory_store = memory_store
        self._commit = commit
        self._state = "new"
        self._steps: list[Step] = []
        self._outcomes: dict[str, StoredDocument | None] = {}  # of the block's own writes
        self._rests_on: dict[str, DocumentEntry | None] = {}  # what it saw of the database

    def __repr__(self) -> str:
        return f"WriteTransaction({self._state}, {len(self._steps)} steps)"

    # --- the block ---

    @property
    def is_open(self) -> bool:
        """Whether its block has begun and not ended."""
        return self._state == "open"

    def __enter__(self) -> Self:
        if self._state != "new":
            raise StorageError("a transaction is for one `with` block: begin another one")
        self._reading = self._begin()
        self._transaction = self._reading.__enter__()
        self._state = "open"
        _AROUND.set((*(one for one in _AROUND.get() if one.is_open), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state = "over"
        _AROUND.set(tuple(one for one in _AROUND.get() if one.is_open))
        self._reading.__exit__(None, None, None)
        try:
            if error is None and self._steps:
                self._commit(self._steps, self._require_unchanged)
        finally:  # whoever keeps the transaction keeps no documents
            self._steps, self._outcomes, self._rests_on = [], {}, {}

    def _require_unchanged(self, transaction: Transaction) -> None:
        """Raise `ConflictError` if the database is not what the block rests on."""
        for name, seen in self._rests_on.items():
            if transaction.document(name) != seen:
                raise ConflictError(
                    f"another writer changed document '{name}' while the transaction was open; "
                    "nothing of the transaction was written. Run it again"
                )

    # --- read ---

    def get(self, id: str) -> StoredDocument:
        """A document by its id, as the block has made it.

        Raises:
            UnknownDocumentError: no document has this id.
        """
        self._require_writable()
        name = known(id)
        if name in self._outcomes:
            written = self._outcomes[name]
            if written is None:
                raise UnknownDocumentError(unknown(name))
            return written
        self._rests_on[name] = self._transaction.document(name)
        entry = entry_of(self._transaction, name)
        return stored_document(self._transaction, self._memory_store, name, entry)

    def __contains__(self, id: object) -> bool:
        self._require_writable()
        return isinstance(id, str) and is_id(id) and self._look([id])[id] is not None

    # --- plumbing ---

    def _require_writable(self) -> None:
        if not self.is_open:
            raise StorageError(
                "the transaction is over"
                if self._state == "over"
                else "a transaction begins with a block: `with db.transaction() as t:`"
            )
        self._transaction.require_unforked()

    def _look(self, names: Iterable[str]) -> dict[str, Seen | None]:
        found: dict[str, Seen | None] = {}
        for name in names:
            if name in self._outcomes:
                written = self._outcomes[name]
                found[name] = None if written is None else Seen(entry_for(written), written.warm)
                continue
            seen = Seen.of(self._transaction, self._memory_store, name)
            self._rests_on[name] = None if seen is None else seen.entry
            found[name] = seen
        return found

    def _meant(self, where: Filter) -> list[str]:
        there = matching_documents(self._transaction, where)
        written = [
            name
            for name, document in self._outcomes.items()
            if document is not None and where.matches(document.metadata)
        ]
        return [name for name, _ in there if name not in self._outcomes] + written

    def _run(
        self, steps: Sequence[Step], outcomes: Sequence[StoredDocument] = ()
    ) -> tuple[int, list[StoredDocument]]:
        for step in steps:
            if isinstance(step, Delete):
                self._require_deletable(step)
                self._outcomes.update(dict.fromkeys(step.names))
        self._steps += steps
        self._outcomes.update({document.id: document for document in outcomes})
        deleted = sum(len(step.names) for step in steps if isinstance(step, Delete))
        return deleted or len(steps), list(outcomes)

    def _require_deletable(self, step: Delete) -> None:
        seen = self._look(step.names)
        require_there({name: None if one is None else one.entry for name, one in seen.items()})
        for name, one in seen.items():
            if one is not None:
                require_version(name, one.entry.version, step.version)


def require_no_transaction(owner: object) -> None:
    """Raise `StorageError` where a transaction of an open database is open around the caller: what
    the caller writes without it would be no part of it."""
    if any(one.is_open and one.owner is owner for one in _AROUND.get()):
        raise StorageError(
            "a transaction is open here, and this would be no part of it: write through what `with "
            "db.transaction() as t` gives (`t.insert`, `t.update`, ...), or after its block"
        )
