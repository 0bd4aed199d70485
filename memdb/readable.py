"""`Readable`: the reading half of `MemDB`, and `Snapshot`, which has nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from numpy.typing import NDArray

from memdb.errors import InvalidInputError, UnknownDocumentError
from memdb.filters.language import Filter, Where, parse
from memdb.index import Pinned
from memdb.memories.memory_store import MemoryStore, StoredMemory
from memdb.retrieval import Mode, Query, Retrieval, Retriever
from memdb.storage.record_layout import DocumentEntry
from memdb.storage.transaction import Transaction
from memdb.types import arguments
from memdb.types import checks as rules
from memdb.types.document import Reference, StoredDocument

_PAGE = 256  # documents read in one transaction by a walk over all


class Readable(ABC):
    """What can be read of a database."""

    _memory_store: MemoryStore
    _retriever: Retriever

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Transaction]:
        """A transaction to read documents in."""

    @abstractmethod
    def _pinning(self) -> AbstractContextManager[Pinned] | None:
        """A transaction and its view to search in; None: those of the moment of the search."""

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

    def documents(self, where: Where | None = None) -> Iterator[StoredDocument]:
        """All documents in the order of their ids' bytes; `where` keeps those whose metadata it
        means (see `retrieve`). Each page of the walk sees the database as it is then; a
        `snapshot`'s is of one moment."""
        chosen = filter_of(where)
        after = ""
        while True:
            with self._reading() as transaction:
                page = list(islice(transaction.documents(after), _PAGE))
                found = [  # texts are read of those alone that are wanted
                    self._stored(transaction, name, entry)
                    for name, entry in page
                    if chosen is None or chosen.matches(transaction.metadata(name, entry.version))
                ]
            yield from found
            if not page:
                return
            after = page[-1][0]

    def query(
        self, text: str, k: int = 5, *, where: Where | None = None, mode: Mode = "vector"
    ) -> Retrieval:
        """The k references nearest to a text, best first, without their memories.

        Args and errors: as of `retrieve`.
        """
        return self.retrieve_batch([text], k, where=where, memories=False, mode=mode)[0]

    def retrieve(
        self,
        tokens: Query | None = None,
        k: int = 5,
        *,
        embedding: NDArray[Any] | Sequence[float] | None = None,
        where: Where | None = None,
        accept: Callable[[Reference], bool] | None = None,
        mode: Mode = "vector",
    ) -> Retrieval:
        """The k references nearest to a query, best first, with their memories (paper, 3.1: 5 for
        every 64 tokens). The memory of a cold reference is written and stored first; where writers
        are kept out, by a compaction say, it stays cold.

        Args:
            tokens: token ids of the model (decoded with the tokenizer in the database), a text, or
                an embedding, (dimension,) float. Whole numbers are token ids.
            k: at least 1; fewer come back where there are fewer.
            embedding: in the place of `tokens`: (dimension,), real numbers of any dtype, whole
                ones too.
            where: only references of documents with this metadata, e.g. `{"lang": "en", "year":
                {"$gte": 1990}}`; `memdb.filters.language` says what a filter may ask. The k nearest
                of those are found, however few they are. None and `{}`: of all documents.
            accept: whether a reference may be a hit. The k nearest that may are found: it is asked
                about each once, from the nearest on, until it has accepted k or refused the rest.
                The memories of those that it refuses are neither read nor written, and these do not
                count as used. (The paper's evaluation refuses references that overlap the question
                too much.)
            mode: `vector`: by the similarity of embeddings. `keyword`: by the words that query and
                reference share (BM25), without an embedder. `hybrid`: by both; hits come in the
                order of the two together, with their cosines as scores. Words are indexed when they
                are first asked for, 100,000 references in 5 s of a core
                (`MemDB.build_keywords` tells of it), and what came since with each search.

        Raises:
            InvalidInputError: the query is empty or of the wrong shape, k is less than 1, the
                filter or the mode is wrong, or an embedding is to be found by its words.
            MissingPartError: the query needs an embedder or a tokenizer, and there is none; or
                words, and this Python's SQLite has no full-text search.
            StorageError: another process has been indexing words for half a minute.
            CorruptRecordError: a reference to be asked about is damaged.
        """
        if (tokens is None) is (embedding is None):
            raise InvalidInputError("give a query or an embedding, one of the two")
        if accept is not None:
            arguments.function(accept, "accept")
        query: Any = tokens if embedding is None else self._retriever.embedding(embedding)
        only = None if accept is None else lambda _, reference: accept(reference)
        return self.retrieve_batch([query], k, where=where, accept=only, mode=mode)[0]

    def retrieve_batch(
        self,
        queries: Sequence[Query],
        k: int = 5,
        *,
        where: Where | None = None,
        memories: bool = True,
        accept: Callable[[int, Reference], bool] | None = None,
        mode: Mode = "vector",
    ) -> list[Retrieval]:
        """`retrieve` for several queries at once: embedded together, searched together.

        Args:
            queries: each as for `retrieve`.
            k: for each query.
            where: for all of them.
            memories: whether to read (and, where cold, to write) the memories.
            accept: as for `retrieve`; it is told the query's number, too: from 0, in the order of
                `queries`. It is called while the database is read, and sees references of that
                state.
            mode: for all of them.
        """
        chosen = filter_of(where)
        if accept is not None:
            arguments.function(accept, "accept")
        memories = arguments.flag(memories, "memories")
        return self._retriever.retrieve(queries, k, memories, chosen, self._pinning(), accept, mode)

    def _stored(self, transaction: Transaction, name: str, entry: DocumentEntry) -> StoredDocument:
        return StoredDocument(
            id=name,
            version=entry.version,
            text="".join(transaction.reference(number).text for number in entry.references),
            metadata=transaction.metadata(name, entry.version),
            references=entry.references,
            warm=sum(self._memory_store.is_warm(transaction, n) for n in entry.references),
        )


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

    @property
    def change(self) -> int:
        """Number of the newest change that it sees; it grows with every change of a reference."""
        return self._pinned.view.change

    def _reading(self) -> AbstractContextManager[Transaction]:
        return nullcontext(self._pinning().__enter__().transaction)

    def _pinning(self) -> AbstractContextManager[Pinned]:
        self._pinned.transaction.require_unforked()
        return nullcontext(self._pinned)


def filter_of(where: Mapping[str, Any] | None) -> Filter | None:
    """A filter that asks something; None: all documents are meant. `InvalidInputError` if it is
    none."""
    chosen = None if where is None else parse(where)
    return None if chosen is None or chosen.means_all else chosen


def entry_of(transaction: Transaction, name: str) -> DocumentEntry:
    """The map's entry of a document; `UnknownDocumentError` if it is not there."""
    entry = transaction.document(name)
    if entry is None:
        raise UnknownDocumentError(unknown(name))
    return entry


def known(name: str) -> str:
    """A document id that could be there; one that cannot is unknown, not an LMDB error. What is no
    text is an `InvalidInputError`."""
    arguments.a(str, name, "a document's id")
    try:
        rules.check_id(name)
    except InvalidInputError as error:
        raise UnknownDocumentError(f"no document can have the id {name!r}: {error}") from error
    return name


def unknown(*names: str) -> str:
    """What to say of ids that are not there."""
    listed = ", ".join(f"'{name}'" for name in names)
    return f"there is no document {listed}"
