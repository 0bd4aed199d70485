"""`MemDB`: a database of explicit memories in six verbs.

    insert, update, delete   documents in, changed, out: `Writable`, which a `transaction` is, too
    get                      a document by its id: `Readable`, which a `snapshot` is, too
    query, retrieve          the references nearest to a text, to tokens, to a vector: likewise

What takes long, `ingest` and its like, is in `Maintainable`. All may be called from several
threads; a database may be open in several processes, each of which opens it for itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self, cast, get_args

from memdb.care.rewrite import PENDING
from memdb.care.statistics import Stats, statistics
from memdb.care.takeover import Takeover
from memdb.codecs import codec_named
from memdb.cutting.places import title_of
from memdb.errors import FormatError, InvalidInputError, StorageError
from memdb.filters.declared import checked_keys
from memdb.filters.language import Filter
from memdb.filters.matching import matching_documents
from memdb.index import IndexKind, IndexPolicy, Searcher
from memdb.ingest.chunking import Chunker, Piece, text_tokenizer
from memdb.ingest.preparing import Preparer
from memdb.ingest.steps import Put, Step, entry_of, run
from memdb.keywords import Keywords
from memdb.maintainable import Maintainable
from memdb.memories.attached import Attached, require_part
from memdb.memories.cache import CacheStats, MemoryCache
from memdb.memories.codec_choice import CodecChoice
from memdb.memories.memory_store import MemoryStore
from memdb.memories.placing import Placing
from memdb.namespaces import (
    create_namespace,
    drop_namespace,
    existing_namespace,
    list_namespaces,
)
from memdb.protocols import Embedder, MemoryWriter, Progress, no_progress
from memdb.readable import Readable, Snapshot
from memdb.retrieval import Retriever
from memdb.storage.environment import Durability
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import CALIBRATION, CUTTING, checked_setting
from memdb.storage.store import ReadTransaction, Store, checked_timeout
from memdb.storage.transaction import Transaction
from memdb.storage.usage import Usage
from memdb.transaction import WriteTransaction, require_no_transaction
from memdb.types import arguments
from memdb.types.canonical import json_payload, read_json
from memdb.types.checks import check_metadata
from memdb.types.cutting import Cutting
from memdb.types.document import StoredDocument
from memdb.types.shape import MemoryShape
from memdb.writable import Seen, Writable

DEFAULT_CODEC = "klt8"
_CACHE = 256 << 20  # bytes
_WIDEST = 1 << 31  # numbers of an embedding
_NEEDS = (
    "a database needs a memory shape and an embedding dimension: pass a writer or a shape, and an "
    "embedder or a dimension of at least 1"
)


class MemDB(Readable, Writable, Maintainable):
    """A database of references and their explicit memories. Make one with `create` or `open`;
    close it with `close`, or use it in a `with` statement.

        with MemDB.open("facts.memdb", embedder=embedder) as db:
            db.insert("The blue heron is a bird.", id="heron", metadata={"year": 2021})
            print(len(db), "heron" in db, list(db))
            for hit in db.query("Which bird is blue?", where={"year": {"$gte": 1990}}):
                print(hit.score, hit.document_id, hit.text)

    As a collection it is one of ids: `len`, `in` and iteration count, know and give documents' ids.
    `documents` gives the documents.

    Attributes:
        path: the database's folder.
        shape: what all its memories share.
        settings: the JSON settings it was created with (`model`, `embedder`, `memory`, `cutting`),
            and `calibration`, if there is one (see `record_calibration`).
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
            cutting = Cutting.from_json(transaction.optional_setting(CUTTING))
            tokenizer = transaction.tokenizer()
            recut = bool((transaction.setting(PENDING) or {}).get("recut"))
        if calibration is not None:
            self.settings[CALIBRATION] = calibration
        self.settings[CUTTING] = cutting.to_json()
        dimension = self.settings["embedder"]["dimension"]
        self._chunker = Chunker(tokenizer, self.shape.reference_length, cutting)
        self._attached = Attached(self.settings["embedder"], self.shape, embedder, writer)
        self._codec_choice = CodecChoice(store, self.shape, self.settings["memory"])
        self._takeover = Takeover(store, self.shape, self._codec_choice)
        self._cache = MemoryCache(cache_bytes)
        self._usage = Usage(keep=not store.read_only)
        self._memory_store = MemoryStore(
            store,
            self._attached,
            self.shape,
            self._codec_choice,
            self._cache,
            Placing(self._chunker.places if cutting.place else None),
        )
        self._preparer = Preparer(self._chunker, self._attached, self._memory_store, dimension)
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
        self._retriever.cold_start &= not recut and not store.read_only
        if not recut and not store.read_only:
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
        place: bool = False,
        durability: Durability = "full",
        cache_bytes: int = _CACHE,
        busy_timeout: float = BUSY_TIMEOUT,
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
            place: embed each reference, and write its memory, behind the place where it stands in
                its document: the title (in the metadata, the first heading, or the id) and the
                headings above it. It takes of the reference's tokens, and is no part of its text.
            durability: see `open`.
            cache_bytes: see `open`.
            busy_timeout: see `open`.

        Raises:
            DatabaseExistsError: there is one already.
            StorageError: the folder holds something else, or cannot be written.
        """
        folder = arguments.path(path, "the database's path")
        codec_named(codec)
        rule = IndexPolicy(index, recall, checked_keys(keys))
        arguments.one_of(durability, "durability", get_args(Durability))
        arguments.whole_number(cache_bytes, "cache_bytes", 0)
        busy_timeout = checked_timeout(busy_timeout)
        shape = _shape_for(writer, shape)
        dimension = _dimension_for(embedder, dimension)
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
            CUTTING: Cutting("structure", arguments.flag(place, "place")).to_json(),
        }
        try:  # what could not be read again is not written
            for name, setting in settings.items():
                checked_setting(name, read_json(json_payload(setting)))
            MemoryShape.from_json(read_json(json_payload(settings["shape"])))
        except (TypeError, ValueError, FormatError) as error:
            raise InvalidInputError(f"a database cannot keep these settings: {error}") from error
        tokenizer = writer.tokenizer if writer else None
        Store.create(folder, settings, tokenizer, busy_timeout=busy_timeout)
        return cls.open(
            path,
            embedder=embedder,
            writer=writer,
            durability=durability,
            cache_bytes=cache_bytes,
            busy_timeout=busy_timeout,
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
        busy_timeout: float = BUSY_TIMEOUT,
        read_only: bool = False,
    ) -> MemDB:
        """Open the database at `path`.

        While it is open, do not copy, hash or archive its folder in this process: a copy of files
        that change is of no one moment, and on macOS it ends the protection of what this process
        reads. `backup` makes a copy. A process that was forked opens the database for itself; what
        was open before the fork is the parent's.

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
            busy_timeout: seconds that a call waits for a writer in another thread or process, for
                a compaction say, before it raises `BusyError`. It opens, writes, and follows a
                compaction within that.
            read_only: refuse every write, count no uses, build no index, leave cold what is cold.
                Works on a medium that cannot be written. There writers elsewhere cannot see its
                reads: while one lasts, a snapshot say, they are kept out, where their lock can be
                taken.

        Raises:
            NotADatabaseError: there is none.
            FormatError: a format version that this release does not read.
            MismatchError: another embedder or model.
            BusyError: a writer is not done in time; or as many read at once as there is room for.
            StorageError: the medium cannot be written, and `read_only` was not asked for.
        """
        cache_bytes = arguments.whole_number(cache_bytes, "cache_bytes", 0)
        arguments.one_of(durability, "durability", get_args(Durability))
        read_only = arguments.flag(read_only, "read_only")
        folder = arguments.path(path, "the database's path")
        store = Store(folder, durability, read_only=read_only, busy_timeout=busy_timeout)
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
                if not self._store.is_forked:  # else all of that is the parent's
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
        arguments.function(progress, "progress")
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
            UnknownNamespaceError: it is not there, and this is open to be read alone.
        """
        self._require_open()
        read_only, busy_timeout = self._store.read_only, self._store.busy_timeout
        return MemDB.open(
            existing_namespace(self._store.home(), name)
            if read_only
            else create_namespace(self._store.home(), name, busy_timeout=busy_timeout),
            embedder=(lambda: self.embedder) if self._attached.has_embedder else None,
            writer=(lambda: self.writer) if self._attached.has_writer else None,
            durability=self._store.durability or "full",
            cache_bytes=self._cache.capacity,
            busy_timeout=busy_timeout,
            read_only=read_only,
        )

    def namespaces(self) -> list[str]:
        """Names of its namespaces, sorted."""
        self._require_open()
        return list_namespaces(self._store.home())

    def drop_namespace(self, name: str) -> None:
        """Remove a namespace with all that is in it, at once; who has it open is told so.

        Raises:
            UnknownNamespaceError: it is not there.
        """
        self._require_writable()
        drop_namespace(self._store.home(), name)

    def __repr__(self) -> str:
        return f"MemDB({str(self.path)!r}{', closed' if self._closed else ''})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the open database '{self.path}' cannot be pickled: give other processes its path, "
            "and open it there (`MemDB.open`)"
        )

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(f"the database '{self.path}' is closed")
        self._store.require_unforked()

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

    def transaction(self) -> WriteTransaction:
        """Several writes that happen together, or not at all, in a `with` statement:

            with db.transaction() as t:
                t.insert("The blue heron is a bird.", id="heron")
                t.delete("crane")

        See `WriteTransaction`. Within the block, this thread writes documents through `t` alone.
        """
        self._require_writable()
        return WriteTransaction(
            self, self._store.read, self._preparer, self._memory_store, self._commit
        )

    def _require_writable(self) -> None:
        self._require_open()
        self._store.require_writable()
        require_no_transaction(self)

    def _look(self, names: Iterable[str]) -> dict[str, Seen | None]:
        with self._store.read() as transaction:
            return {name: Seen.of(transaction, self._memory_store, name) for name in names}

    def _meant(self, where: Filter) -> list[str]:
        with self._store.read() as transaction:
            return [name for name, _ in matching_documents(transaction, where)]

    def _run(
        self, steps: Sequence[Step], outcomes: Sequence[StoredDocument] = ()
    ) -> tuple[int, list[StoredDocument]]:
        with self._writing(steps) as transaction:
            changed = run(transaction, steps)
            entries = [entry_of(transaction, outcome.id) for outcome in outcomes]
        return changed, [
            replace(outcome, version=entry.version, references=entry.references)
            for outcome, entry in zip(outcomes, entries, strict=True)
        ]

    def _commit(self, steps: Sequence[Step], check: Callable[[Transaction], None]) -> None:
        """Write what a `transaction` prepared."""
        self._require_open()
        with self._writing(steps) as transaction:
            check(transaction)
            run(transaction, steps)

    @contextmanager
    def _writing(self, steps: Sequence[Step]) -> Iterator[Transaction]:
        puts = any(isinstance(step, Put) for step in steps)
        with self._store.write() as transaction:
            if puts:
                self._memory_store.require_shape(transaction)
            yield transaction
        for codec in {step.prepared.codec for step in steps if isinstance(step, Put)}:
            self._codec_choice.written(codec)

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

    def split(
        self, text: str, *, id: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> list[Piece]:
        """The references that a text would become, in order. Id and metadata of its document are
        of use where references have a place (see `create`): it takes of their tokens."""
        metadata = {} if metadata is None else metadata
        check_metadata(metadata)
        return self._chunker.split(text, id=id, title=title_of(metadata))

    def stats(self) -> Stats:
        """Counts, bytes on disk by table, how much memories are compressed, why their codec is not
        fitted (`unfitted`), the states of index and cache, and what the database records, as JSON
        values: a dictionary whose fields `memdb.Stats` names."""
        self._require_open()
        found: dict[str, Any] = {
            "path": str(self.path),
            "id": self._store.id,
            CALIBRATION: None,
            **deepcopy(self.settings),
            **statistics(self._store, self.shape),
            "cache": vars(self.cache_stats()),
            "shape": self.shape.to_json(),
            "index": self._searcher.state(),
            "recoding": self._takeover.state(),
            "keywords": self._keywords_state(),
        }
        return cast(Stats, found)

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


def _shape_for(writer: MemoryWriter | None, given: MemoryShape | None) -> MemoryShape:
    if given is not None:
        arguments.a(MemoryShape, given, "shape")
    if writer is None:
        if given is None:
            raise InvalidInputError(_NEEDS)
        return given
    require_part(writer, MemoryWriter)
    text_tokenizer(writer.tokenizer)  # loads, or is refused
    shape = arguments.a(MemoryShape, writer.shape, "the writer's shape")
    if given is not None and given != shape:
        raise InvalidInputError("shape is not the writer's: leave it out where there is a writer")
    return shape


def _dimension_for(embedder: Embedder | None, given: int | None) -> int:
    if given is not None:
        _ = arguments.whole_number(given, _NEEDS + "; dimension", 1, _WIDEST)
    if embedder is None:
        if given is None:
            raise InvalidInputError(_NEEDS)
        return int(given)
    require_part(embedder, Embedder)
    dimension = arguments.whole_number(embedder.dimension, "the embedder's dimension", 1, _WIDEST)
    if given is not None and given != dimension:
        raise InvalidInputError(
            f"dimension is {given}, the embedder's {dimension}: leave it out where there is an "
            "embedder"
        )
    return dimension
