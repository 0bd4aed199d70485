"""`MemDB`: a database of explicit memories in six verbs.

    insert, update, delete   documents in, changed, out
    get                      a document by its id
    query, retrieve          the references nearest to a text, to tokens, to a vector

All of them may be called from several threads; a database may be open in several processes, each
of which opens it for itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from memdb import documents as rules
from memdb import writing
from memdb.chunking import Chunker, Piece, text_tokenizer
from memdb.codecs import codec_named
from memdb.errors import (
    ConflictError,
    DocumentExistsError,
    InvalidInputError,
    StorageError,
    UnknownDocumentError,
)
from memdb.ingest import IngestReport, ingest
from memdb.layout import DOCUMENTS, MEMORIES, REFERENCES, DocumentEntry
from memdb.parts import Parts
from memdb.protocols import Embedder, MemoryWriter, Progress, no_progress
from memdb.records import Document, ExplicitMemory, MemoryShape, StoredDocument
from memdb.remembering import Rememberer, cold_references
from memdb.retrieval import Query, Retrieval, Retriever
from memdb.search import Searcher
from memdb.store import Store
from memdb.transaction import Transaction

_PAGE = 256  # documents read in one transaction by a walk over all


class MemDB:
    """A database of references and their explicit memories. Make one with `create` or `open`;
    close it with `close`, or use it in a `with` statement.

    Attributes:
        path: the database's folder.
        shape: what all its memories share.
        settings: the JSON settings it was created with (`model`, `embedder`, `memory`).
    """

    def __init__(
        self,
        store: Store,
        embedder: Embedder | Callable[[], Embedder] | None,
        writer: MemoryWriter | Callable[[], MemoryWriter] | None,
    ) -> None:
        self._store = store
        self._closed = False
        self.path = store.folder
        with store.read() as transaction:
            self.shape = MemoryShape.from_json(transaction.required_setting("shape"))
            self.settings: dict[str, dict[str, Any]] = {
                name: transaction.required_setting(name) for name in ("embedder", "model", "memory")
            }
            tokenizer = transaction.tokenizer()
        dimension = self.settings["embedder"]["dimension"]
        self._chunker = Chunker(tokenizer, self.shape.reference_length)
        self._parts = Parts(self.settings["embedder"], self.shape, embedder, writer)
        codec = codec_named(self.settings["memory"]["codec"])
        self._rememberer = Rememberer(store, self._parts, self.shape, codec)
        searcher = Searcher(store, dimension)
        self._retriever = Retriever(
            searcher, self._chunker, self._parts, self._rememberer, dimension
        )

    # --- open and close ---------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        embedder: Embedder | None = None,
        writer: MemoryWriter | None = None,
        shape: MemoryShape | None = None,
        dimension: int | None = None,
        codec: str = "int8",
    ) -> MemDB:
        """Make a database at `path` (a folder that is missing or empty) and open it.

        With an embedder and a writer it works on texts. Without, `shape` and `dimension` say what
        it will hold, and embeddings and memories are handed to `insert`.

        Args:
            path: the database's folder.
            embedder: its name, fingerprint and dimension are recorded.
            writer: its shape, name, settings and tokenizer are recorded.
            shape: of the memories, where there is no writer.
            dimension: of the embeddings, where there is no embedder.
            codec: how memories are stored: `int8`, or `exact`.

        Raises:
            DatabaseExistsError: there is one already.
            StorageError: the folder holds something else, or cannot be written.
        """
        codec_named(codec)
        if writer is not None:
            text_tokenizer(writer.tokenizer)  # loads, or is refused
        shape = writer.shape if writer is not None else shape
        dimension = embedder.dimension if embedder is not None else dimension
        if shape is None or dimension is None or dimension < 1:
            raise InvalidInputError(
                "a database needs a memory shape and an embedding dimension: pass a writer or a "
                "shape, and an embedder or a dimension of at least 1"
            )
        settings = {
            "shape": shape.to_json(),
            "embedder": {
                "name": embedder.name if embedder else None,
                "fingerprint": embedder.fingerprint if embedder else None,
                "dimension": dimension,
            },
            "model": {"name": writer.name if writer else None},
            "memory": {"codec": codec, **(writer.settings if writer else {})},
        }
        Store.create(_folder(path), settings, writer.tokenizer if writer else None)
        return cls.open(path, embedder=embedder, writer=writer)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        embedder: Embedder | Callable[[], Embedder] | None = None,
        writer: MemoryWriter | Callable[[], MemoryWriter] | None = None,
    ) -> MemDB:
        """Open the database at `path`.

        `embedder` and `writer` must be those that the database records. Either may be a function
        without arguments that makes it; it is called when first needed. Without an embedder,
        `retrieve` takes embeddings only; without a writer, cold references stay cold.

        Raises:
            NotADatabaseError: there is none.
            FormatError: a format version that this release does not read.
            MismatchError: another embedder or model.
        """
        store = Store.open(_folder(path))
        try:
            return cls(store, embedder, writer)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._store.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(f"the database '{self.path}' is closed")

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- write ------------------------------------------------------------------------------------

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
        self._require_open()
        name, document = rules.checked(Document(text, id, {} if metadata is None else metadata))
        with self._store.read() as transaction:
            self._require_new(transaction, name)
        prepared = self._prepare(name, document, cold, embeddings, memories)
        with self._store.write() as transaction:
            self._require_new(transaction, name)
            writing.put(transaction, prepared, None)
            return self._stored(transaction, name, self._entry(transaction, name))

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

        A new text has new references. New metadata alone keeps them and their memories. The same
        content again changes nothing.

        Args and errors: as `insert`, and

        Args:
            if_version: change it only if this is its version (as `get` returned it).

        Raises:
            UnknownDocumentError: no document has this id.
            ConflictError: it is at another version, or another writer changed it meanwhile.
        """
        old = self.get(id)
        _require_version(id, old.version, if_version)
        name, document = rules.checked(
            Document(
                old.text if text is None else text,
                id,
                old.metadata if metadata is None else metadata,
            )
        )
        given = embeddings is not None or memories is not None
        if document.text != old.text or given:
            prepared = self._prepare(name, document, cold, embeddings, memories)
            with self._store.write() as transaction:
                entry = self._entry(transaction, name)
                if (entry.version, entry.references) != (old.version, old.references):
                    raise ConflictError(
                        f"another writer changed document '{name}' while it was updated; run it "
                        "again"
                    )
                writing.put(transaction, prepared, entry)
                return self._stored(transaction, name, self._entry(transaction, name))
        elif rules.content_hash(document) != rules.content_hash(
            Document(old.text, id, old.metadata)
        ):
            with self._store.write() as transaction:
                _require_version(name, self._entry(transaction, name).version, if_version)
                writing.put_metadata(transaction, name, document)
                return self._stored(transaction, name, self._entry(transaction, name))
        return old

    def delete(self, *ids: str, if_version: int | None = None) -> None:
        """Remove documents with their references and memories, all or none.

        Args:
            ids: of the documents.
            if_version: remove them only if this is the version of each.

        Raises:
            UnknownDocumentError: naming the ids that are not there.
            ConflictError: one is at another version.
        """
        self._require_open()
        with self._store.write() as transaction:
            entries = {name: transaction.document(name) for name in map(_known, ids)}
            missing = [name for name, entry in entries.items() if entry is None]
            if missing:
                raise UnknownDocumentError(_unknown(*missing) + "; nothing was deleted")
            for name, entry in entries.items():
                if entry is not None:
                    _require_version(name, entry.version, if_version)
                    transaction.delete_document(name, entry)

    def ingest(
        self,
        path: str | os.PathLike[str],
        *,
        cold: bool = False,
        progress: Progress = no_progress,
        name: str | None = None,
    ) -> IngestReport:
        """Bring the documents of a JSONL file in: new ones are inserted, changed ones updated.

        The whole file is read for errors before anything is written. The same file again changes
        nothing; an interrupted ingest goes on where it stopped when it is called again.

        Args:
            path: JSON lines of `id` (optional), `text`, `metadata` (optional).
            cold: leave memories to their first use, or to `warm`.
            progress: told of the work.
            name: what to call the file in errors.

        Raises:
            CorpusError: naming file and line; nothing was written.
        """
        self._require_open()
        return ingest(
            Path(path),
            name=name,
            store=self._store,
            chunker=self._chunker,
            embedder=self._parts.embedder(),
            rememberer=self._rememberer if self._rememberer.can_write and not cold else None,
            progress=progress,
        )

    def warm(self, ids: Sequence[str] | None = None, *, progress: Progress = no_progress) -> int:
        """Write the memories of cold references, and return how many.

        Committed every few references: an interruption loses no more, and the next call goes on.

        Args:
            ids: documents to warm; default: all.
            progress: told of the work.
        """
        self._require_open()
        with self._store.read() as transaction:
            entries = (
                (entry for _, entry in transaction.documents())
                if ids is None
                else (self._entry(transaction, name) for name in map(_known, ids))
            )
            cold = cold_references(transaction, entries)
        return self._rememberer.warm(cold, progress)

    # --- read -------------------------------------------------------------------------------------

    def get(self, id: str) -> StoredDocument:
        """A document by its id.

        Raises:
            UnknownDocumentError: no document has this id.
        """
        self._require_open()
        with self._store.read() as transaction:
            return self._stored(transaction, _known(id), self._entry(transaction, _known(id)))

    def documents(self, where: Mapping[str, Any] | None = None) -> Iterator[StoredDocument]:
        """All documents in the order of their ids' bytes; `where` keeps those whose metadata has
        each of its values. Each page of the walk sees the database as it is then."""
        after = ""
        while True:
            self._require_open()
            with self._store.read() as transaction:
                page = list(islice(transaction.documents(after), _PAGE))
                found = [  # texts are read of those alone that are wanted
                    self._stored(transaction, name, entry)
                    for name, entry in page
                    if not where or rules.matches(transaction.metadata(name, entry.version), where)
                ]
            yield from found
            if not page:
                return
            after = page[-1][0]

    def query(self, text: str, k: int = 5) -> Retrieval:
        """The k references nearest to a text, best first, without their memories.

        Raises:
            InvalidInputError: the text is empty, or k is less than 1.
        """
        return self.retrieve_batch([text], k, memories=False)[0]

    def retrieve(self, tokens: Query, k: int = 5) -> Retrieval:
        """The k references nearest to a query, best first, with their memories (paper, 3.1: 5 for
        every 64 tokens). The memory of a cold reference is written and stored first.

        Args:
            tokens: token ids of the model (decoded with the tokenizer in the database), a text, or
                an embedding, (dimension,) float.
            k: at least 1; fewer come back where there are fewer.

        Raises:
            InvalidInputError: the query is empty or of the wrong shape, or k is less than 1.
            MissingPartError: the query needs an embedder or a tokenizer, and there is none.
        """
        return self.retrieve_batch([tokens], k)[0]

    def retrieve_batch(
        self, queries: Sequence[Query], k: int = 5, *, memories: bool = True
    ) -> list[Retrieval]:
        """`retrieve` for several queries at once: embedded together, searched together.

        Args:
            queries: each as for `retrieve`.
            k: for each query.
            memories: whether to read (and, where cold, to write) the memories.
        """
        self._require_open()
        return self._retriever.retrieve(queries, k, memories)

    def split(self, text: str) -> list[Piece]:
        """The references that a text would become, in order."""
        rules.check_text(text)
        return self._chunker.split(text)

    def stats(self) -> dict[str, Any]:
        """The id, counts, bytes on disk by table, and what the database records, as JSON values."""
        self._require_open()
        with self._store.read() as transaction:
            counts = {
                "documents": transaction.count(DOCUMENTS),
                "references": transaction.count(REFERENCES),
                "memories": transaction.count(MEMORIES),
                "changes": transaction.last_change(),
            }
        return {
            "path": str(self.path),
            "id": self._store.id,
            **counts,
            "cold": counts["references"] - counts["memories"],
            "bytes": self._store.sizes(),
            **self.settings,
            "shape": self.shape.to_json(),
        }

    @property
    def embedder(self) -> Embedder:
        """The embedder, loaded if it was not; `MissingPartError` if there is none."""
        return self._parts.embedder()

    @property
    def writer(self) -> MemoryWriter:
        """The memory writer, loaded if it was not; `MissingPartError` if there is none."""
        return self._parts.writer()

    # --- plumbing ---------------------------------------------------------------------------------

    def _prepare(
        self,
        name: str,
        document: Document,
        cold: bool,
        embeddings: NDArray[np.float32] | None,
        memories: Sequence[ExplicitMemory] | None,
    ) -> writing.Prepared:
        pieces = self._chunker.split(document.text)
        texts = [piece.text.strip() for piece in pieces]
        if embeddings is None:
            embeddings = self._parts.embedder().embed(texts)
        vectors = writing.unit_vectors(
            embeddings, len(pieces), self.settings["embedder"]["dimension"]
        )
        if memories is None and not cold and self._rememberer.can_write:
            memories = self._rememberer.write(texts)
        encoded = None if memories is None else self._rememberer.encode(memories, len(pieces))
        return writing.Prepared(name, document, pieces, vectors, encoded)

    def _stored(self, transaction: Transaction, name: str, entry: DocumentEntry) -> StoredDocument:
        return StoredDocument(
            id=name,
            version=entry.version,
            text="".join(transaction.reference(number).text for number in entry.references),
            metadata=transaction.metadata(name, entry.version),
            references=entry.references,
            warm=sum(transaction.is_warm(number) for number in entry.references),
        )

    @staticmethod
    def _entry(transaction: Transaction, name: str) -> DocumentEntry:
        entry = transaction.document(name)
        if entry is None:
            raise UnknownDocumentError(_unknown(name))
        return entry

    @staticmethod
    def _require_new(transaction: Transaction, name: str) -> None:
        if transaction.document(name) is not None:
            raise DocumentExistsError(f"there is already a document '{name}'; `update` replaces it")


def _folder(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise InvalidInputError("the database's path contains a zero character")
    return Path(path)


def _known(name: str) -> str:
    """A document id that could be there; one that cannot is unknown, not an LMDB error."""
    try:
        rules.check_id(name)
    except InvalidInputError as error:
        raise UnknownDocumentError(f"no document can have the id {name!r}: {error}") from error
    return name


def _require_version(name: str, version: int, wanted: int | None) -> None:
    if wanted is not None and version != wanted:
        raise ConflictError(f"document '{name}' is at version {version}, not {wanted}")


def _unknown(*names: str) -> str:
    listed = ", ".join(f"'{name}'" for name in names)
    return f"there is no document {listed}"
