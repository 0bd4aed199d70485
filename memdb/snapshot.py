"""`Snapshot`: the reading half of `MemDB`, at one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from memdb import documents as rules
from memdb.errors import InvalidInputError, UnknownDocumentError
from memdb.filters import Filter, Where, parse
from memdb.index import Pinned
from memdb.layout import DocumentEntry
from memdb.records import StoredDocument
from memdb.remembering import Rememberer
from memdb.retrieval import Query, Retrieval, Retriever
from memdb.transaction import Transaction


class Reader:
    """Reads documents in a transaction."""

    def __init__(self, rememberer: Rememberer) -> None:
        self._rememberer = rememberer

    def stored(self, transaction: Transaction, name: str, entry: DocumentEntry) -> StoredDocument:
        """A document of which the entry is known."""
        return StoredDocument(
            id=name,
            version=entry.version,
            text="".join(transaction.reference(number).text for number in entry.references),
            metadata=transaction.metadata(name, entry.version),
            references=entry.references,
            warm=sum(self._rememberer.is_warm(transaction, n) for n in entry.references),
        )

    def get(self, transaction: Transaction, name: str) -> StoredDocument:
        """A document; `UnknownDocumentError` if it is not there."""
        return self.stored(transaction, name, entry_of(transaction, name))

    def page(
        self, transaction: Transaction, after: str, size: int | None, where: Filter | None
    ) -> tuple[str | None, Iterator[StoredDocument]]:
        """The id of the last of up to `size` documents behind an id, None if there is none; and
        those of them that a filter means."""
        entries = list(islice(transaction.documents(after), size))
        found = (  # texts are read of those alone that are wanted
            self.stored(transaction, name, entry)
            for name, entry in entries
            if where is None or where.matches(transaction.metadata(name, entry.version))
        )
        return (entries[-1][0] if entries else None), found


class Snapshot:
    """The database as it was at one moment, whatever is written meanwhile.

    It keeps the disk space of what was deleted or replaced since; end it when it is no longer
    needed. For one thread at a time.
    """

    def __init__(self, pinned: Pinned, reader: Reader, retriever: Retriever) -> None:
        self._at = pinned
        self._reader = reader
        self._retriever = retriever

    @property
    def _pinned(self) -> Pinned:
        environment = self._at.transaction.environment
        assert environment is not None
        environment.require_unforked()  # in a child its pages may be used again
        return self._at

    @property
    def change(self) -> int:
        """Number of the newest change that it sees; it grows with every change of a reference."""
        return self._pinned.view.change

    def get(self, id: str) -> StoredDocument:
        """See `MemDB.get`."""
        return self._reader.get(self._pinned.transaction, known(id))

    def documents(self, where: Where | None = None) -> Iterator[StoredDocument]:
        """See `MemDB.documents`; all of the same moment."""
        chosen = filter_of(where)
        after: str | None = ""
        while after is not None:
            after, page = self._reader.page(self._pinned.transaction, after, 256, chosen)
            yield from page

    def query(self, text: str, k: int = 5, *, where: Where | None = None) -> Retrieval:
        """See `MemDB.query`."""
        return self.retrieve_batch([text], k, where=where, memories=False)[0]

    def retrieve(self, tokens: Query, k: int = 5, *, where: Where | None = None) -> Retrieval:
        """See `MemDB.retrieve`. The memory of a reference that is cold here is written to the
        database of now, if the reference is still there."""
        return self.retrieve_batch([tokens], k, where=where)[0]

    def retrieve_batch(
        self,
        queries: Sequence[Query],
        k: int = 5,
        *,
        where: Where | None = None,
        memories: bool = True,
    ) -> list[Retrieval]:
        """See `MemDB.retrieve_batch`."""
        return self._retriever.retrieve(queries, k, memories, filter_of(where), self._pinned)


def filter_of(where: Mapping[str, Any] | None) -> Filter | None:
    """A filter that says something, or None."""
    return parse(where) if where else None


def entry_of(transaction: Transaction, name: str) -> DocumentEntry:
    """The map's entry of a document; `UnknownDocumentError` if it is not there."""
    entry = transaction.document(name)
    if entry is None:
        raise UnknownDocumentError(unknown(name))
    return entry


def known(name: str) -> str:
    """A document id that could be there; one that cannot is unknown, not an LMDB error."""
    try:
        rules.check_id(name)
    except InvalidInputError as error:
        raise UnknownDocumentError(f"no document can have the id {name!r}: {error}") from error
    return name


def unknown(*names: str) -> str:
    """What to say of ids that are not there."""
    listed = ", ".join(f"'{name}'" for name in names)
    return f"there is no document {listed}"
