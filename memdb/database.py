"""`MemDB`: a database of explicit memories in six verbs.

    insert, update, delete   documents in, changed, out
    get                      a document by its id
    query, retrieve          the references nearest to a text, to tokens, to a vector

The last three are `Readable`'s: a `snapshot` has them, too. All may be called from several threads;
a database may be open in several processes, each of which opens it for itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from memdb.care.recode import RecodeReport, recode
from memdb.care.rewrite import PENDING
from memdb.care.statistics import statistics
from memdb.care.takeover import Takeover
from memdb.codecs import codec_named
from memdb.errors import (
    ConflictError,
    DocumentExistsError,
    InvalidInputError,
    MismatchError,
    StorageError,
    UnknownDocumentError,
)
from memdb.exchange.export import export
from memdb.filters.declared import checked_keys, declare_keys
from memdb.index import IndexInfo, IndexKind, IndexPolicy, Searcher
from memdb.ingest import recording
from memdb.ingest.chunking import Chunker, Piece, text_tokenizer
from memdb.ingest.corpus_run import IngestReport, ingest
from memdb.ingest.load import DocumentBatch, LoadReport, load
from memdb.keywords import Keywords
from memdb.memories.attached import Attached
from memdb.memories.cache import CacheStats, MemoryCache
from memdb.memories.codec_choice import CodecChoice
from memdb.memories.memory_store import MemoryStore
from memdb.namespaces import create_namespace, drop_namespace, list_namespaces
from memdb.protocols import Embedder, MemoryWriter, Progress, Warmer, no_progress
from memdb.readable import Readable, Snapshot, entry_of, known, unknown
from memdb.retrieval import Retriever
from memdb.storage.environment import Durability
from memdb.storage.record_layout import CALIBRATION, checked_setting
from memdb.storage.store import ReadTransaction, Store
from memdb.storage.transaction import Transaction
from memdb.storage.usage import Usage
from memdb.types import checks as rules
from memdb.types.document import Document, StoredDocument
from memdb.types.memory import ExplicitMemory
from memdb.types.shape import MemoryShape

DEFAULT_CODEC = "klt8"
_CACHE = 256 << 20  # bytes


class MemDB(Readable):
    """A database of references and their explicit memories. Make one with `create` or `open`;
    close it with `close`, or use it in a `with` statement. `Readable` has what reads it.

    Attributes:
        path: the database's folder.
        shape: what all its memories share.
        settings: the JSON settings it was created with (`model`, `embedder`, `memory`), and
            `calibration`, if there is one (see `record_calibration`).
    """

    def __init__(
        self,
        store: Store,
        embedder: Embedder | Callable[[], Embedder] | None,
        writer: MemoryWriter | Callable[[], MemoryWriter] | None,
        cache_bytes: int = _CACHE,
    ) -> None:
        self._store = store
        self._closed = False
        self.path = store.folder
        with store.read() as transaction:
            self.shape = MemoryShape.from_json(transaction.required_setting("shape"))
            self.settings: dict[str, dict[str, Any]] = {
                name: transaction.required_setting(name) for name in ("embedder", "model", "memory")
            }
            calibration = transaction.optional_setting(CALIBRATION)
            tokenizer = transaction.tokenizer()
            recut = bool((transaction.setting(PENDING) or {}).get("recut"))
        if calibration is not None:
            self.settings[CALIBRATION] = calibration
        dimension = self.settings["embedder"]["dimension"]
        self._chunker = Chunker(tokenizer, self.shape.reference_length)
        self._attached = Attached(self.settings["embedder"], self.shape, embedder, writer)
        self._codec_choice = CodecChoice(store, self.shape, self.settings["memory"])
        self._takeover = Takeover(store, self.shape, self._codec_choice)
        self._cache = MemoryCache(cache_bytes)
        self._usage = Usage()
        self._memory_store = MemoryStore(
            store, self._attached, self.shape, self._codec_choice, self._cache
        )
        self._searcher = Searcher(store, dimension)
        self._keywords = Keywords(store)
        self._retriever = Retriever(
            self._searcher,
            self._chunker,
            self._attached,
            self._memory_store,
            self._usage,
            dimension,
            self._keywords,
        )
        self._rewriting = recut
        # Until a rewrite has cut them anew, references may be too long for the new model.
        self._retriever.cold_start &= not recut
        if not recut:
            self._takeover.look()

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
        codec: str = DEFAULT_CODEC,
        index: IndexKind = "auto",
        recall: float = 0.99,
        keys: Sequence[str] = (),
        durability: Durability = "full",
        cache_bytes: int = _CACHE,
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
            codec: how memories are stored (`memdb.CODEC_NAMES`). One that is fitted to the
                database's memories takes over once there are enough; see `recode`.
            index: `auto`: exact search where it takes less than a millisecond, an ANN index above;
                `exact` or `ivf`: always that.
            recall: share of the true 5 nearest that an ANN index has to find.
            keys: metadata keys that filters ask for, to be indexed (see `declare_keys`).
            durability: see `open`.
            cache_bytes: see `open`.

        Raises:
            DatabaseExistsError: there is one already.
            StorageError: the folder holds something else, or cannot be written.
        """
        codec_named(codec)
        rule = IndexPolicy(index, recall, checked_keys(keys))
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
            "index": rule.to_json(),
        }
        Store.create(_folder(path), settings, writer.tokenizer if writer else None)
        return cls.open(
            path, embedder=embedder, writer=writer, durability=durability, cache_bytes=cache_bytes
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        embedder: Embedder | Callable[[], Embedder] | None = None,
        writer: MemoryWriter | Callable[[], MemoryWriter] | None = None,
        durability: Durability = "full",
        cache_bytes: int = _CACHE,
    ) -> MemDB:
        """Open the database at `path`.

        Args:
            path: the database's folder.
            embedder: the one that the database records, or a function without arguments that makes
                it and is called when it is first needed. Without, `retrieve` takes embeddings only.
            writer: likewise. Without, cold references stay cold.
            durability: what a write has survived when it is acknowledged. `full`: a power cut; each
                write waits for the disk. `normal`: a power cut too, but it may undo the last
                transaction; a write waits for the disk once instead of twice. `off`: the end of the
                process, no more; after a power cut the database may be damaged or empty, so keep
                it for what can be made again. No write waits. The same for all that open the
                database in one process.
            cache_bytes: of decoded memories that are kept in RAM; 0 keeps none.

        Raises:
            NotADatabaseError: there is none.
            FormatError: a format version that this release does not read.
            MismatchError: another embedder or model.
        """
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 0:
            raise InvalidInputError(f"cache_bytes must be 0 or more, got {cache_bytes!r}")
        store = Store(_folder(path), durability)
        try:
            return cls(store, embedder, writer, cache_bytes)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Give everything back; a second call does nothing.

        Work in the background is given up, and goes on when the database is opened again; `settle`
        waits for its end. A program that ends without `close` loses nothing but counts of use.
        """
        if not self._closed:
            self._closed = True
            try:
                self._searcher.close()
                self._takeover.close()
                self._keywords.close()
                self._usage.flush(self._store.generation)
            finally:
                self._store.close()

    def settle(self, progress: Progress = no_progress) -> None:
        """Wait for the work in the background: a codec that is fitted once there are enough
        memories, those before it that are recoded, an index that is built.

        Nothing has to wait for it: search and memories are right all the time, and `close` gives up
        what is not done. What failed a short time ago is tried again. A failure is said by
        `logging` (logger `memdb`) and by `stats`, not raised.

        Args:
            progress: told of the work.
        """
        self._require_open()
        self._takeover.finish(progress)
        self._searcher.wait(progress)

    def namespace(self, name: str) -> MemDB:
        """A collection of its own in this database, opened; made if it is not there yet.

        It is a `MemDB` like this one, for the same model and embedder, which are shared with this
        one and loaded once. It has its own documents, ids and index: what is searched in it can
        find nothing of this one, nor of another namespace. Close it like any other.

            with db.namespace("alice") as alice:
                alice.insert("The harbour is old.", id="note-1")

        Args:
            name: 1 to 80 bytes of UTF-8.

        Raises:
            InvalidInputError: no namespace can have this name, or this is one itself.
        """
        self._require_open()
        return MemDB.open(
            create_namespace(self.path, name),
            embedder=(lambda: self.embedder) if self._attached.has_embedder else None,
            writer=(lambda: self.writer) if self._attached.has_writer else None,
            durability=self._store.durability or "full",
            cache_bytes=self._cache.capacity,
        )

    def namespaces(self) -> list[str]:
        """Names of its namespaces, sorted."""
        self._require_open()
        return list_namespaces(self.path)

    def drop_namespace(self, name: str) -> None:
        """Remove a namespace with all that is in it, at once; who has it open is told so.

        Raises:
            UnknownNamespaceError: it is not there.
        """
        self._require_open()
        drop_namespace(self.path, name)

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
        codec = self._codec_choice.codec.name
        prepared = self._prepare(name, document, cold, embeddings, memories)
        with self._store.write() as transaction:
            self._require_new(transaction, name)
            self._memory_store.require_shape(transaction)
            recording.put(transaction, prepared)
            stored = self._stored(transaction, name, entry_of(transaction, name))
        self._codec_choice.written(codec)
        return stored

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
            codec = self._codec_choice.codec.name
            prepared = self._prepare(name, document, cold, embeddings, memories)
            with self._store.write() as transaction:
                entry = entry_of(transaction, name)
                if (entry.version, entry.references) != (old.version, old.references):
                    raise ConflictError(
                        f"another writer changed document '{name}' while it was updated; run it "
                        "again"
                    )
                self._memory_store.require_shape(transaction)
                recording.put(transaction, prepared)
                stored = self._stored(transaction, name, entry_of(transaction, name))
            self._codec_choice.written(codec)
            return stored
        if rules.content_hash(document) != rules.content_hash(Document(old.text, id, old.metadata)):
            with self._store.write() as transaction:
                _require_version(name, entry_of(transaction, name).version, if_version)
                recording.put_metadata(transaction, name, document)
                return self._stored(transaction, name, entry_of(transaction, name))
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
            entries = {name: transaction.document(name) for name in map(known, ids)}
            missing = [name for name, entry in entries.items() if entry is None]
            if missing:
                raise UnknownDocumentError(unknown(*missing) + "; nothing was deleted")
            for name, entry in entries.items():
                if entry is not None:
                    _require_version(name, entry.version, if_version)
                    recording.delete(transaction, name, entry)

    def ingest(
        self,
        path: str | os.PathLike[str],
        *,
        cold: bool = False,
        prune: bool = False,
        progress: Progress = no_progress,
        name: str | None = None,
    ) -> IngestReport:
        """Bring the documents of a JSONL file in: new ones are inserted, changed ones updated.

        The whole file is read for errors before anything is written. The same file again changes
        nothing; an interrupted ingest goes on where it stopped when it is called again.

        Args:
            path: JSON lines of `id` (optional), `text`, `metadata` (optional).
            cold: leave memories to their first use, or to `warm`.
            prune: delete the documents that the file does not have, once its own are in.
            progress: told of the work.
            name: what to call the file in errors.

        Raises:
            CorpusError: naming file and line; nothing was written.
        """
        self._require_open()
        codec = self._codec_choice.codec.name
        report = ingest(
            Path(path),
            name=name,
            store=self._store,
            chunker=self._chunker,
            embedder=self._attached.embedder(),
            memory_store=self._memory_store,
            cold=cold or not self._memory_store.can_write,
            prune=prune,
            progress=progress,
        )
        self._take_over(codec, progress)
        self.index_if_due(progress)
        return report

    def load(
        self, batches: Iterable[DocumentBatch], *, progress: Progress = no_progress
    ) -> LoadReport:
        """Bring in documents whose embeddings and memories are computed already, fast: about 64 MiB
        to a transaction, and no more than two of these in RAM.

        A document that is there with the same content stays, with other content it is replaced:
        so an interrupted load goes on where it stopped when it is called again. The index is not
        built (`build_index` does that).

        Args:
            batches: taken one by one; documents in the order of their ids are fastest.
            progress: told of the work.

        Raises:
            InvalidInputError: naming the document; batches before it are written.
            MismatchError: memories of another shape.
        """
        self._require_open()
        codec = self._codec_choice.codec.name
        report = load(
            batches,
            store=self._store,
            chunker=self._chunker,
            memory_store=self._memory_store,
            dimension=self.settings["embedder"]["dimension"],
            progress=progress,
        )
        self._take_over(codec, progress)
        return report

    def warm(
        self,
        ids: Sequence[str] | None = None,
        *,
        top: int | None = None,
        progress: Progress = no_progress,
        warmer: Warmer | None = None,
    ) -> int:
        """Write the memories of cold references, and return how many.

        The longest come first, so that those of a batch have about one length. Committed batch by
        batch (`MemoryWriter`): an interruption loses no more, and the next call goes on.

        Args:
            ids: documents to warm; default: all.
            top: only so many references: those that were retrieved most often.
            progress: told of the work.
            warmer: has other processes write them; default: this one's writer does.

        Raises:
            MismatchError: a rewrite for another model is not finished.
        """
        if top is not None and (isinstance(top, bool) or top < 1):
            raise InvalidInputError(f"top must be a whole number of at least 1, got {top!r}")
        self._require_no_rewrite()
        codec = self._codec_choice.codec.name
        with self._store.read() as transaction:
            entries = (
                (entry for _, entry in transaction.documents())
                if ids is None
                else (entry_of(transaction, name) for name in map(known, ids))
            )
            cold = self._memory_store.cold(transaction, entries)
        if top is not None:
            used = self._usage.counts(self._store.generation)
            most = set(sorted((n for n in cold if used[n]), key=lambda n: (-used[n], n))[:top])
            cold = [number for number in cold if number in most]
        if warmer is None:
            written = self._memory_store.warm(cold, progress)
        else:
            written = warmer(cold, self._fitting(progress))
        self._take_over(codec, progress)
        return written

    def warm_batches(
        self, batches: Iterable[Sequence[int]], *, progress: Progress = no_progress
    ) -> int:
        """Write the memories of the cold among these references, and return how many: what each of
        the processes does that a `Warmer` has. The codec is left to the `warm` that it works for.

        Args:
            batches: reference ids. A batch is one call of the writer and one transaction; the next
                is taken when the model is ready for it, while the one before is still stored.
            progress: told after each transaction; it knows no total.

        Raises:
            MismatchError: a rewrite for another model is not finished.
        """
        self._require_no_rewrite()
        self._memory_store.require_writer()
        return self._memory_store.warm_batches(
            batches, lambda done: progress("writing memories", done, 0), fit=False
        )

    def _require_no_rewrite(self) -> None:
        self._require_open()
        if self._rewriting:
            raise MismatchError(
                f"'{self.path}' is being rewritten for another model; finish that first (`memdb "
                "rewrite` goes on)"
            )

    def _fitting(self, progress: Progress) -> Progress:
        """A `Progress` that also has the codec fitted, once enough memories are there: one process
        for all that write."""

        def told(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            self._codec_choice.written(self._codec_choice.codec.name)

        return told

    def recode(
        self, codec: str | None = None, *, refit: bool = False, progress: Progress = no_progress
    ) -> RecodeReport:
        """Keep all memories under another codec from now on: those that are there are written anew,
        from what is stored, without the model. What an earlier codec lost does not come back.

        Committed every few memories, and readable throughout, also by other processes. Interrupted,
        the same call goes on.

        Args:
            codec: its name (`memdb.CODEC_NAMES`); default: the one that is recorded.
            refit: fit the codec anew, to the memories of now.
            progress: told of the work.

        Raises:
            InvalidInputError: no codec has that name, or it has to be fitted and there are not
                enough memories. Nothing was changed.
        """
        self._require_open()
        self._takeover.cancel()
        self._codec_choice.use(codec, refit, progress)
        return recode(self._store, self.shape, self._codec_choice, progress)

    def _take_over(self, codec: str, progress: Progress) -> None:
        """At the end of a long write that began with this codec: wait until the one that took over
        meanwhile, or does so now, has written all anew."""
        self._codec_choice.written(codec)
        self._takeover.finish(progress)

    def declare_keys(self, *names: str, progress: Progress = no_progress) -> None:
        """Index metadata keys: filters that ask for them need not read all metadata.

        What is there is indexed in one transaction. A key that is indexed already stays so.

        Raises:
            InvalidInputError: a name of more than 64 bytes of UTF-8, or an empty one.
        """
        self._require_open()
        declare_keys(self._store, checked_keys(names), progress)

    def record_calibration(self, calibration: Mapping[str, Any] | None) -> None:
        """Record how the memories are best read, as it was measured. What its constants mean knows
        only who reads memories; here they are kept, in `settings`, in copies and in exports, until
        a `rewrite` for another model or adapter.

        Args:
            calibration: `adapter` (a fingerprint or None), `date` (a string), `model` (a
                fingerprint), `questions` (a number) and `weighing` (numbers by name); None: what is
                recorded is removed.

        Raises:
            InvalidInputError: naming the field.
            MismatchError: the database was rewritten for another model meanwhile.
        """
        self._require_open()
        if calibration is not None:
            try:
                checked_setting(CALIBRATION, dict(calibration))
            except ValueError as error:
                raise InvalidInputError(f"a calibration: {error}") from error
        with self._store.write() as transaction:
            self._memory_store.require_shape(transaction)
            if calibration is None:
                transaction.delete_setting(CALIBRATION)
            else:
                transaction.put_setting(CALIBRATION, dict(calibration))
        if calibration is None:
            self.settings.pop(CALIBRATION, None)
        else:
            self.settings[CALIBRATION] = dict(calibration)

    def build_index(
        self,
        *,
        kind: IndexKind | None = None,
        recall: float | None = None,
        progress: Progress = no_progress,
    ) -> IndexInfo | None:
        """Build the ANN index anew; searches go on meanwhile. What is due is built by itself, in
        the background and after `ingest`; this is for after `load`, or to choose another kind.

        Args:
            kind: see `create`; recorded. Default: as recorded.
            recall: likewise.
            progress: told of the work.

        Returns:
            What was built; None where search is exact.
        """
        self._require_open()
        if kind is not None or recall is not None:
            with self._store.write() as transaction:
                old = IndexPolicy.of(transaction)
                rule = IndexPolicy(
                    kind or old.kind, old.recall if recall is None else recall, old.keys
                )
                transaction.put_setting(
                    "index", {**transaction.required_setting("index"), **rule.to_json()}
                )
        return self._searcher.build(progress, anew=True)

    def build_keywords(self, *, progress: Progress = no_progress) -> None:
        """Index the words of all references now, or bring their index in step. Searches with mode
        `keyword` or `hybrid` do so themselves; this is for a large database, to be told of it.

        Raises:
            MissingPartError: this Python's SQLite has no full-text search.
            StorageError: another process has been writing that index for half a minute.
        """
        self._require_open()
        with self._store.read() as transaction:
            self._keywords.build(transaction, progress)

    def index_if_due(self, progress: Progress = no_progress) -> None:
        """Build the ANN index if so much changed since the last one that it is due, and index new
        words, if any were asked for."""
        self._require_open()
        self._searcher.build(progress, if_due=True)
        with self._store.read() as transaction:
            if self._keywords.exists(transaction):
                self._keywords.build(transaction, progress)

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        arrays: bool = False,
        progress: Progress = no_progress,
    ) -> int:
        """Write everything, as it is at this moment, as files that other programs can read:
        documents as JSON lines, embeddings and memories as safetensors (`memdb.exchange`).

        `memdb.import_database` makes the same database of it.

        Args:
            folder: missing or empty.
            arrays: memories as keys and values; default: as they are stored, which loses nothing.
            progress: told of the work.

        Returns:
            How many documents.

        Raises:
            InvalidInputError: the folder is not empty.
            StorageError: the disk refuses; nothing is left.
        """
        self._require_open()
        with self._store.read() as transaction:
            return export(
                transaction,
                Path(folder),
                shape=self.shape,
                memory_store=MemoryStore(
                    self._store, self._attached, self.shape, self._codec_choice, MemoryCache(0)
                ),
                arrays=arrays,
                progress=progress,
            )

    # --- read -------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """The database of this moment, to read from in a `with` statement."""
        self._require_open()
        with self._searcher.pin() as pinned:
            yield Snapshot(pinned, self._memory_store, self._retriever)

    def _reading(self) -> ReadTransaction:
        self._require_open()
        return self._store.read()

    def _pinning(self) -> None:
        self._require_open()

    def split(self, text: str) -> list[Piece]:
        """The references that a text would become, in order."""
        rules.check_text(text)
        return self._chunker.split(text)

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk by table, how much memories are compressed, the states of index and
        cache, and what the database records, as JSON values."""
        self._require_open()
        return {
            "path": str(self.path),
            "id": self._store.id,
            CALIBRATION: None,
            **self.settings,
            **statistics(self._store, self.shape),
            "cache": vars(self.cache_stats()),
            "shape": self.shape.to_json(),
            "index": self._searcher.state(),
            "keywords": self._keywords_state(),
            "recoding": self._takeover.state(),
        }

    def _keywords_state(self) -> dict[str, object] | None:
        with self._store.read() as transaction:
            return self._keywords.state(transaction)

    def cache_stats(self) -> CacheStats:
        """What the cache of decoded memories holds, its hits and misses."""
        return self._cache.stats()

    def usage(self) -> dict[int, int]:
        """How often each reference's memory was retrieved, by id. A kill may cost the last half
        minute of it."""
        return dict(self._usage.counts(self._store.generation))

    @property
    def embedder(self) -> Embedder:
        """The embedder, loaded if it was not; `MissingPartError` if there is none."""
        return self._attached.embedder()

    @property
    def writer(self) -> MemoryWriter:
        """The memory writer, loaded if it was not; `MissingPartError` if there is none."""
        return self._attached.writer()

    # --- plumbing ---------------------------------------------------------------------------------

    def _prepare(
        self,
        name: str,
        document: Document,
        cold: bool,
        embeddings: NDArray[np.float32] | None,
        memories: Sequence[ExplicitMemory] | None,
    ) -> recording.Prepared:
        pieces = self._chunker.split(document.text)
        texts = [piece.text.strip() for piece in pieces]
        if embeddings is None:
            embeddings = self._attached.embedder().embed(texts)
        vectors = recording.unit_vectors(
            embeddings, len(pieces), self.settings["embedder"]["dimension"]
        )
        if memories is None and not cold and self._memory_store.can_write:
            memories = self._memory_store.write(texts)
        encoded = None if memories is None else self._memory_store.encode(memories, len(pieces))
        return recording.prepared(name, document, pieces, vectors, encoded)

    @staticmethod
    def _require_new(transaction: Transaction, name: str) -> None:
        if transaction.document(name) is not None:
            raise DocumentExistsError(f"there is already a document '{name}'; `update` replaces it")


def _folder(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise InvalidInputError("the database's path contains a zero character")
    return Path(path)


def _require_version(name: str, version: int, wanted: int | None) -> None:
    if wanted is not None and version != wanted:
        raise ConflictError(f"document '{name}' is at version {version}, not {wanted}")
