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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from memdb import documents as rules
from memdb import writing
from memdb.chunking import Chunker, Piece
from memdb.codecs import CODECS, codec_named, decode_memory, encode_memory
from memdb.errors import (
    DocumentExistsError,
    InvalidInputError,
    MismatchError,
    MissingPartError,
    UnknownDocumentError,
)
from memdb.ingest import IngestReport, ingest
from memdb.layout import DOCUMENTS, MEMORIES, REFERENCES, DocumentEntry
from memdb.protocols import Embedder, MemoryWriter, Progress, no_progress
from memdb.records import Document, ExplicitMemory, MemoryShape, Reference, StoredDocument
from memdb.search import Searcher
from memdb.store import Store, Transaction

#: References whose memories are written between two commits: what an interruption can cost.
_WARM_BATCH = 8

#: What to look for: token ids, a text, or an embedding.
Query = str | Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Hit:
    """One retrieved reference.

    Attributes:
        reference: id, version, document id, ordinal, tokens and text.
        score: cosine similarity to the query.
        metadata: of its document.
        memory: decoded and ready for `memdb.pack`; None if not asked for, or cold without a writer.
    """

    reference: Reference
    score: float
    metadata: dict[str, Any]
    memory: ExplicitMemory | None = None


@dataclass(frozen=True)
class Retrieval:
    """What one query found, best first.

    Attributes:
        query: the text that was looked for; None if an embedding was given.
        hits: at most k.
        written: how many of the hits' memories were written for this retrieval (cold start).
    """

    query: str | None
    hits: list[Hit] = field(default_factory=list)
    written: int = 0

    @property
    def memories(self) -> list[ExplicitMemory]:
        """The hits' memories, for `memdb.pack`."""
        return [hit.memory for hit in self.hits if hit.memory is not None]


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
            self.shape = MemoryShape.from_json(transaction.setting("shape"))
            self.settings: dict[str, dict[str, Any]] = {
                name: transaction.setting(name) for name in ("embedder", "model", "memory")
            }
            tokenizer = transaction.tokenizer()
        self._chunker = Chunker(tokenizer, self.shape.reference_length)
        self._codec = codec_named(self.settings["memory"]["codec"])
        self._searcher = Searcher(store, self.settings["embedder"]["dimension"])
        self._embedder = embedder
        self._writer = writer
        if isinstance(embedder, Embedder):
            self._check_embedder(embedder)
        if isinstance(writer, MemoryWriter):
            self.shape.require_equal(writer.shape, f"the model '{writer.name}'")

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
        Store.create(Path(path), settings, writer.tokenizer if writer else None)
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
        store = Store.open(Path(path))
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

    def __enter__(self) -> Self:
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
        name, document = rules.checked(Document(text, id, metadata or {}))
        with self._store.read() as transaction:
            self._require_new(transaction, name)
        prepared = self._prepare(name, document, cold, embeddings, memories)
        with self._store.write() as transaction:
            self._require_new(transaction, name)
            writing.put(transaction, prepared, None)
        return self.get(name)

    def update(
        self,
        id: str,
        *,
        text: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        cold: bool = False,
        embeddings: NDArray[np.float32] | None = None,
        memories: Sequence[ExplicitMemory] | None = None,
    ) -> StoredDocument:
        """Replace a document's text, its metadata, or both; what is None stays.

        A new text has new references. New metadata alone keeps them and their memories. The same
        content again changes nothing.

        Args and errors: as `insert`.

        Raises:
            UnknownDocumentError: no document has this id.
        """
        old = self.get(id)
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
                writing.put(transaction, prepared, self._entry(transaction, name))
        elif dict(document.metadata) != old.metadata:
            with self._store.write() as transaction:
                writing.put_metadata(transaction, name, document)
        return self.get(name)

    def delete(self, *ids: str) -> None:
        """Remove documents with their references and memories, all or none.

        Raises:
            UnknownDocumentError: naming the ids that are not there.
        """
        with self._store.write() as transaction:
            entries = {name: transaction.document(name) for name in map(_known, ids)}
            missing = [name for name, entry in entries.items() if entry is None]
            if missing:
                raise UnknownDocumentError(_unknown(*missing) + "; nothing was deleted")
            for name, entry in entries.items():
                if entry is not None:
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
        return ingest(
            Path(path),
            name=name,
            store=self._store,
            chunker=self._chunker,
            embedder=self._need_embedder(),
            warm=None if cold else self.warm,
            progress=progress,
        )

    def warm(self, ids: Sequence[str] | None = None, *, progress: Progress = no_progress) -> int:
        """Write the memories of cold references, and return how many.

        Committed every few references: an interruption loses no more, and the next call goes on.

        Args:
            ids: documents to warm; default: all.
            progress: told of the work.
        """
        cold: list[tuple[int, int]] = []
        with self._store.read() as transaction:
            entries = (
                (entry for _, entry in transaction.documents())
                if ids is None
                else (self._entry(transaction, name) for name in ids)
            )
            for entry in entries:
                cold.extend(
                    (transaction.reference(number).tokens, number)
                    for number in entry.references
                    if not transaction.is_warm(number)
                )
        cold.sort(reverse=True)  # batches of one length need no padding
        if cold:
            self._need_writer()
        written = 0
        for start in range(0, len(cold), _WARM_BATCH):
            progress("writing memories", start, len(cold))
            with self._store.read() as transaction:
                batch = [
                    transaction.reference(number)
                    for _, number in cold[start : start + _WARM_BATCH]
                    if transaction.has_reference(number)
                ]
            written += len(self._write_memories(batch))
        progress("writing memories", len(cold), len(cold))
        return written

    # --- read -------------------------------------------------------------------------------------

    def get(self, id: str) -> StoredDocument:
        """A document by its id.

        Raises:
            UnknownDocumentError: no document has this id.
        """
        with self._store.read() as transaction:
            return self._stored(transaction, _known(id), self._entry(transaction, _known(id)))

    def documents(self, where: Mapping[str, Any] | None = None) -> Iterator[StoredDocument]:
        """All documents in the order of their ids' bytes; `where` keeps those whose metadata has
        each of its values. Each page of the walk sees the database as it is then."""
        after = ""
        while True:
            with self._store.read() as transaction:
                page = [
                    self._stored(transaction, name, entry)
                    for (name, entry), _ in zip(
                        transaction.documents(after), range(256), strict=False
                    )
                ]
            for document in page:
                if rules.matches(document.metadata, where or {}):
                    yield document
            if not page:
                return
            after = page[-1].id

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
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInputError(f"k must be a whole number of at least 1, got {k!r}")
        if not queries:
            return []
        texts, vectors = self._embed(queries)
        results = []
        # A reference that several queries find is decoded once.
        decoded: dict[int, ExplicitMemory | None] = {}
        with self._searcher.search(vectors, k) as (transaction, scores, ids):
            for row, text in enumerate(texts):
                hits = [
                    self._hit(transaction, int(number), float(score), decoded if memories else None)
                    for number, score in zip(ids[row], scores[row], strict=True)
                    if number >= 0
                ]
                results.append(Retrieval(text, hits))
        return self._warmed(results) if memories else results

    def split(self, text: str) -> list[Piece]:
        """The references that a text would become, in order."""
        rules.check_text(text)
        return self._chunker.split(text)

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk by table, and what the database records, as JSON values."""
        with self._store.read() as transaction:
            counts = {
                "documents": transaction.count(DOCUMENTS),
                "references": transaction.count(REFERENCES),
                "memories": transaction.count(MEMORIES),
                "changes": transaction.last_change(),
            }
        return {
            "path": str(self.path),
            **counts,
            "cold": counts["references"] - counts["memories"],
            "bytes": self._store.sizes(),
            **self.settings,
            "shape": self.shape.to_json(),
        }

    @property
    def writer(self) -> MemoryWriter:
        """The memory writer, loaded if it was not; `MissingPartError` if there is none."""
        return self._need_writer()

    # --- plumbing ---------------------------------------------------------------------------------

    def _prepare(
        self,
        name: str,
        document: Document,
        cold: bool,
        embeddings: NDArray[np.float32] | None,
        memories: Sequence[ExplicitMemory] | None,
    ) -> writing.Prepared:
        if embeddings is None:
            prepared = writing.prepare([(name, document)], self._chunker, self._need_embedder())[0]
        else:
            pieces = self._chunker.split(document.text)
            dimension = self.settings["embedder"]["dimension"]
            vectors = writing.unit_vectors(embeddings, len(pieces), dimension)
            prepared = writing.Prepared(name, document, pieces, vectors)
        if memories is None and not cold and self._writer is not None:
            memories = self._need_writer().write([p.text.strip() for p in prepared.pieces])
        if memories is None:
            return prepared
        count = len(prepared.pieces)
        encoded = writing.encode_memories(memories, count, self.shape, self._codec)
        return replace(prepared, memories=encoded)

    def _embed(self, queries: Sequence[Query]) -> tuple[list[str | None], NDArray[np.float32]]:
        """The queries' texts (None: it is an embedding) and vectors."""
        dimension = self.settings["embedder"]["dimension"]
        texts = [self._query_text(query) for query in queries]
        vectors = np.empty((len(queries), dimension), np.float32)
        for row, (text, query) in enumerate(zip(texts, queries, strict=True)):
            if text is None:
                given = np.asarray(query)
                if given.shape != (dimension,):
                    raise InvalidInputError(
                        f"an embedding must have shape ({dimension},), got {given.shape}"
                    )
                vectors[row] = writing.unit_vectors(given[None], 1, dimension)[0]
        rows = [row for row, text in enumerate(texts) if text is not None]
        if rows:
            found = self._need_embedder().embed([texts[row] or "" for row in rows], query=True)
            vectors[rows] = writing.unit_vectors(found, len(rows), dimension)
        return texts, vectors

    def _query_text(self, query: Query) -> str | None:
        if not isinstance(query, str):
            tokens = np.asarray(query)
            if np.issubdtype(tokens.dtype, np.floating) and tokens.size:
                return None
            if tokens.ndim != 1 or not (
                np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0
            ):
                raise InvalidInputError(
                    "a query is a text, a sequence of token ids or an embedding; got "
                    f"{tokens.dtype} of shape {tokens.shape}"
                )
            if not self._chunker.has_tokenizer:
                raise MissingPartError(
                    "this database has no tokenizer to decode token ids with; query by text or by "
                    "embedding"
                )
            if tokens.size and int(tokens.min()) < 0:
                raise InvalidInputError(f"token id {int(tokens.min())} is negative")
            query = self._chunker.decode(tokens.tolist())
        if not query.strip():
            raise InvalidInputError("the query is empty: there is nothing to look for")
        return query

    def _hit(
        self,
        transaction: Transaction,
        number: int,
        score: float,
        decoded: dict[int, ExplicitMemory | None] | None,
    ) -> Hit:
        reference = transaction.reference(number)
        if decoded is not None and number not in decoded:
            decoded[number] = transaction.memory(number, self._decode)
        memory = None if decoded is None else decoded[number]
        return Hit(reference, score, transaction.metadata(reference.document_id), memory)

    def _warmed(self, results: list[Retrieval]) -> list[Retrieval]:
        """The retrievals with the memories of their cold references written (cold start)."""
        cold = {
            hit.reference.id: hit.reference
            for result in results
            for hit in result.hits
            if hit.memory is None
        }
        if not cold or self._writer is None:
            return results
        written = self._write_memories(list(cold.values()))
        return [
            Retrieval(
                result.query,
                [
                    replace(hit, memory=hit.memory or written[hit.reference.id])
                    for hit in result.hits
                ],
                sum(hit.reference.id in cold for hit in result.hits),
            )
            for result in results
        ]

    def _write_memories(self, references: Sequence[Reference]) -> dict[int, ExplicitMemory]:
        """Write and store memories; as they read back, so that cold and warm start are one."""
        if not references:
            return {}
        memories = self._need_writer().write([reference.content for reference in references])
        encoded = [encode_memory(memory, self.shape, self._codec) for memory in memories]
        with self._store.write() as transaction:
            for reference, payload in zip(references, encoded, strict=True):
                # Meanwhile another writer may have deleted it, or been faster.
                if transaction.has_reference(reference.id) and not transaction.is_warm(
                    reference.id
                ):
                    transaction.put_memory(reference, payload)
        return {
            reference.id: self._decode(payload)
            for reference, payload in zip(references, encoded, strict=True)
        }

    def _decode(self, payload: bytes | memoryview) -> ExplicitMemory:
        return decode_memory(payload, self.shape, CODECS)

    def _stored(self, transaction: Transaction, name: str, entry: DocumentEntry) -> StoredDocument:
        return StoredDocument(
            id=name,
            version=entry.version,
            text="".join(transaction.reference(number).text for number in entry.references),
            metadata=transaction.metadata(name),
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

    def _need_embedder(self) -> Embedder:
        if self._embedder is None:
            raise MissingPartError(
                "this database was opened without an embedder: pass embeddings, or open it with "
                "`model_adapter.open_database`"
            )
        if not isinstance(self._embedder, Embedder):
            embedder = self._embedder()
            self._check_embedder(embedder)
            self._embedder = embedder
        return self._embedder

    def _need_writer(self) -> MemoryWriter:
        if self._writer is None:
            raise MissingPartError(
                "this database was opened without a memory writer: pass memories, or open it with "
                "`model_adapter.open_database`"
            )
        if not isinstance(self._writer, MemoryWriter):
            writer = self._writer()
            self.shape.require_equal(writer.shape, f"the model '{writer.name}'")
            self._writer = writer
        return self._writer

    def _check_embedder(self, embedder: Embedder) -> None:
        recorded = self.settings["embedder"]
        if recorded["dimension"] != embedder.dimension or (
            recorded["fingerprint"] not in (None, embedder.fingerprint)
        ):
            raise MismatchError(
                f"the embedder '{embedder.name}' (fingerprint {embedder.fingerprint}, dimension "
                f"{embedder.dimension}) is not the one that this database records: "
                f"'{recorded['name']}' (fingerprint {recorded['fingerprint']}, dimension "
                f"{recorded['dimension']}). Its vectors cannot be compared with those stored; open "
                "the database with the embedder that it records, or make a new one."
            )


def _known(name: str) -> str:
    """A document id that could be there; one that cannot is unknown, not an LMDB error."""
    try:
        rules.check_id(name)
    except InvalidInputError as error:
        raise UnknownDocumentError(f"no document can have the id {name!r}: {error}") from error
    return name


def _unknown(*names: str) -> str:
    listed = ", ".join(f"'{name}'" for name in names)
    return f"there is no document {listed}"
