"""`Readable`: the reading half of `MemDB`, and `Snapshot`, which has nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

from memdb.errors import CorruptRecordError, InvalidInputError, UnknownDocumentError
from memdb.filters.language import Filter, Where
from memdb.filters.matching import matching_documents
from memdb.index import Pinned
from memdb.ingest.steps import entry_of, unknown
from memdb.memories.memory_store import MemoryStore, StoredMemory
from memdb.retrieval import Retriever
from memdb.searchable import Searchable, filter_of
from memdb.storage.record_layout import CHANGE_NAMES, CHANGES, DOCUMENTS, DocumentEntry
from memdb.storage.transaction import Transaction
from memdb.types import arguments
from memdb.types.change import Change
from memdb.types.checks import check_id, is_id
from memdb.types.document import Reference, StoredDocument
from memdb.types.shown import shown_value

_PAGE = 256  # documents, or changes, read in one transaction by a walk


class Readable(Searchable):
    """What can be read of a database: its documents and its changes; and `Searchable`."""

    _memory_store: MemoryStore

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Transaction]:
        """A transaction to read documents in."""

    def get(self, id: str) -> StoredDocument:
        """A document by its id.

        Raises:
            UnknownDocumentError: no document has this id.
        """
        with self._reading() as transaction:
            return self._stored(transaction, known(id), entry_of(transaction, known(id)))

    def memories(self, id: str) -> list[tuple[Reference, StoredMemory | None]]:
        """The references of a document, in the order of its text, each with its memory as it is
        stored; None where it is cold. Nothing is written, and none of them counts as used.

        Raises:
            UnknownDocumentError: no document has this id.
            CorruptRecordError: a reference is damaged. A memory is checked when it is first asked
                for what it holds.
        """
        with self._reading() as transaction:
            return [
                (transaction.reference(number), self._memory_store.stored(transaction, number))
                for number in entry_of(transaction, known(id)).references
            ]

    def places(self, id: str) -> list[str]:
        """Where the references of a document stand in it, in order: behind that, on a line of its
        own, each was embedded, and its memory written. Empty for one that has no place.

        Raises:
            UnknownDocumentError: no document has this id.
            CorruptRecordError: a reference is damaged.
        """
        with self._reading() as transaction:
            numbers = entry_of(transaction, known(id)).references
            references = [transaction.reference(number) for number in numbers]
            return self._memory_store.placing.places(transaction, references)

    def get_many(self, ids: Iterable[str]) -> list[StoredDocument]:
        """Documents by their ids, in the order of these, all of one moment.

        Raises:
            UnknownDocumentError: naming the ids that are not there.
        """
        names = [known(id) for id in arguments.some(ids, "ids", "document ids")]
        with self._reading() as transaction:
            entries = {name: transaction.document(name) for name in names}
            missing = [name for name, entry in entries.items() if entry is None]
            if missing:
                raise UnknownDocumentError(unknown(*missing))
            return [
                self._stored(transaction, name, entry)
                for name in names
                if (entry := entries[name]) is not None
            ]

    def documents(
        self, where: Where | None = None, *, after: str | None = None, limit: int | None = None
    ) -> Iterator[StoredDocument]:
        """Documents in the order of their ids' bytes. Each page of the walk sees the database as it
        is then; a `snapshot`'s is of one moment.

            for document in db.documents({"year": {"$gte": 1990}}, limit=100): ...
            more = db.documents(after=document.id, limit=100)

        Args:
            where: those whose metadata it means (see `retrieve`), found by the index where its keys
                are declared; else all metadata is read.
            after: those behind this id; it need not be there.
            limit: at most so many.

        Raises:
            InvalidInputError: naming the argument.
        """
        chosen = filter_of(where)
        if after is not None:
            check_id(after)
        if limit is not None:
            limit = arguments.whole_number(limit, "limit", 0)
        return self._walk(chosen, after or "", limit)

    def _walk(
        self, chosen: Filter | None, after: str, limit: int | None
    ) -> Iterator[StoredDocument]:
        size = _PAGE
        while limit is None or limit > 0:
            if limit is not None:
                size = min(size, limit)
            with self._reading() as transaction:
                page = list(islice(_entries(transaction, chosen, after), size))
                state = transaction.state
            for start in range(0, len(page), _PAGE):
                with self._reading() as transaction:
                    part = page[start : start + _PAGE]
                    if transaction.state != state:  # somebody wrote
                        part = _still_meant(transaction, chosen, part)
                    found = [self._stored(transaction, name, entry) for name, entry in part]
                yield from found
                limit = None if limit is None else limit - len(found)
            if len(page) < size:
                return
            after = page[-1][0]
            # An indexed filter finds all that it means anew for each page: so there are few.
            size *= 2

    def count(self, where: Where | None = None) -> int:
        """How many documents there are; with a filter, how many it means (see `documents`)."""
        chosen = filter_of(where)
        with self._reading() as transaction:
            if chosen is None:
                return transaction.count(DOCUMENTS)
            return sum(1 for _ in matching_documents(transaction, chosen))

    def __len__(self) -> int:
        """How many documents there are."""
        return self.count()

    def __bool__(self) -> bool:
        """True, also without documents: `if db` asks whether there is a database."""
        return True

    def __contains__(self, id: object) -> bool:
        """Whether there is a document of this id."""
        with self._reading() as transaction:
            return isinstance(id, str) and is_id(id) and transaction.document(id) is not None

    def __iter__(self) -> Iterator[str]:
        """The documents' ids in the order of their bytes, as `documents` walks; no text is read."""
        after = ""
        while True:
            with self._reading() as transaction:
                page = [name for name, _ in islice(transaction.documents(after), _PAGE)]
            yield from page
            if not page:
                return
            after = page[-1]

    def changes(self, since: int = 0) -> Iterator[Change]:
        """What happened to references behind change number `since`, oldest first: for who follows a
        database. Metadata that changes alone is not in it.

            with db.snapshot() as s:
                index_all(s.documents())
                seen = s.change
            for change in db.changes(since=seen): ...

        What one write did has one number; a follower has seen a number when it has seen the next
        one, or the end.

        Args:
            since: a number that `Change.number` or `Snapshot.change` said; 0: from the beginning.

        Raises:
            InvalidInputError: changes behind `since` are no longer kept (`compact`, `migrate` and
                `repair` forget them), or `since` is newer than the newest (a backup of before was
                restored): read the documents of a `snapshot`, and go on from its `change`.
        """
        since = arguments.whole_number(since, "since", 0)
        with self._reading() as transaction:
            _require_kept(transaction, since)
        return self._changes(since)

    def _changes(self, since: int) -> Iterator[Change]:
        while True:
            found: list[Change] = []
            with self._reading() as transaction:
                _require_kept(transaction, since)
                pages = list(islice(transaction.changes(since), _PAGE))
                if not pages and since < transaction.last_change():
                    raise CorruptRecordError(CHANGES, str(since + 1), "it is missing")
                for number, changes in enumerate(pages, since + 1):
                    found += [
                        Change(
                            number, CHANGE_NAMES[what], reference, _owner(transaction, reference)
                        )
                        for what, reference in changes.tolist()
                        if what in CHANGE_NAMES  # others are of no reference, or of a later release
                    ]
            if not pages:
                return
            since += len(pages)
            yield from found

    def _stored(self, transaction: Transaction, name: str, entry: DocumentEntry) -> StoredDocument:
        return stored_document(transaction, self._memory_store, name, entry)


class Snapshot(Readable):
    """The database as it was at one moment, whatever is written meanwhile.

    It keeps the disk space of what was deleted or replaced since; end it when it is no longer
    needed. A reference that is cold here is warmed, when it is retrieved, in the database of now.
    For one thread at a time.
    """

    def __init__(self, pinned: Pinned, memory_store: MemoryStore, retriever: Retriever) -> None:
        self._pinned = pinned
        self._memory_store = memory_store
        self._retriever = retriever

    def __repr__(self) -> str:
        return f"Snapshot(change={self.change})"

    @property
    def change(self) -> int:
        """Number of the newest change that it sees; it grows with every change of a reference."""
        return self._pinned.view.change

    def _reading(self) -> AbstractContextManager[Transaction]:
        return nullcontext(self._pinning().__enter__().transaction)

    def _pinning(self) -> AbstractContextManager[Pinned]:
        self._pinned.transaction.require_unforked()
        return nullcontext(self._pinned)


def stored_document(
    transaction: Transaction, memory_store: MemoryStore, name: str, entry: DocumentEntry
) -> StoredDocument:
    """A document that is there, with its text."""
    return StoredDocument(
        id=name,
        version=entry.version,
        text="".join(transaction.reference(number).text for number in entry.references),
        metadata=transaction.metadata(name, entry.version),
        references=entry.references,
        warm=sum(memory_store.is_warm(transaction, n) for n in entry.references),
    )


def known(name: str) -> str:
    """A document id that could be there; one that cannot is unknown, not an LMDB error. What is no
    text is an `InvalidInputError`."""
    arguments.a(str, name, "a document's id")
    try:
        check_id(name)
    except InvalidInputError as error:
        raise UnknownDocumentError(f"no document can have the id {name!r}: {error}") from error
    return name


def _entries(
    transaction: Transaction, chosen: Filter | None, after: str
) -> Iterator[tuple[str, DocumentEntry]]:
    if chosen is None:
        return transaction.documents(after)
    return matching_documents(transaction, chosen, after)


def _still_meant(
    transaction: Transaction, chosen: Filter | None, page: Sequence[tuple[str, DocumentEntry]]
) -> list[tuple[str, DocumentEntry]]:
    """Of documents that were meant in an earlier state, those that are meant now."""
    now = ((name, transaction.document(name)) for name, _ in page)
    return [
        (name, entry)
        for name, entry in now
        if entry is not None
        and (chosen is None or chosen.matches(transaction.metadata(name, entry.version)))
    ]


def _owner(transaction: Transaction, reference: int) -> str | None:
    return transaction.owner(reference) if transaction.has_reference(reference) else None


def _require_kept(transaction: Transaction, since: int) -> None:
    """Raise `InvalidInputError` unless the change log holds all behind this number."""
    counters = transaction.required_setting("counters")
    oldest, newest = counters["trimmed"], counters["last_change"]
    if not oldest <= since <= newest:
        why = (
            f"changes up to number {oldest} are no longer kept"
            if since < oldest
            else f"the newest change has number {newest}"
        )
        raise InvalidInputError(
            f"changes since {shown_value(since)} cannot be told: {why}. Read the documents of a "
            "`snapshot`, and follow from its `change` on"
        )
