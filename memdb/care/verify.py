"""Verify: walks everything, and says what is wrong with what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs import decode_memory
from memdb.errors import (
    BusyError,
    CorruptRecordError,
    FormatError,
    MismatchError,
    StorageError,
)
from memdb.filters.declared import Grouped, declared_keys
from memdb.filters.postings import Postings
from memdb.index.ann import FILE, AnnIndex, OutdatedIndexError
from memdb.index.checking import differences, is_of_this_past
from memdb.index.policy import IndexPolicy
from memdb.ingest.chunking import Chunker, Piece
from memdb.keywords import keyword_problems
from memdb.memories.codec_choice import KnownCodecs
from memdb.protocols import Progress, no_progress
from memdb.storage import record_layout
from memdb.storage.folder import current_generation, no_writer, sole_writer
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.pages import damaged_pages
from memdb.storage.record_layout import (
    CHANGES,
    DELETED,
    DOCUMENTS,
    EMBEDDINGS,
    FORGOTTEN,
    INSERTED,
    MEMORIES,
    METADATA,
    POSTINGS,
    REFERENCES,
    REMEMBERED,
    SETTINGS,
)
from memdb.storage.store import Store, checked_timeout
from memdb.storage.transaction import Transaction
from memdb.types import arguments
from memdb.types.checks import check_id, content_hash_of, text_hash
from memdb.types.memory import to_float32
from memdb.types.shape import MemoryShape

PAGES = "pages"  # stands for a table where LMDB's own structure is damaged
INDEX = "index"  # and where the index file is
KEYWORDS = "keywords"  # and where the keyword index is
_TOLD_EVERY = 500
_UNIT = 1e-5  # by which an embedding's length may differ from 1
_NO_IDS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Problem:
    """Something that is not as storage_format.md says.

    Attributes:
        table: the table it is in; `pages`, `index` or `keywords` for the files themselves.
        key: the record's key, readable; empty where it is about no single record.
        what: what is wrong.
        document: id of the document that it belongs to, where that is known.
        namespace: that it is in; None: the database itself.
    """

    table: str
    key: str
    what: str
    document: str | None = None
    namespace: str | None = None

    def __str__(self) -> str:
        place = f"{self.table}, record {self.key}" if self.key else self.table
        if self.namespace is not None:
            place = f"namespace '{self.namespace}': {place}"
        owner = f" (document '{self.document}')" if self.document else ""
        return f"{place}{owner}: {self.what}"


def verify(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> list[Problem]:
    """See `memdb.verify`; of one folder, without its namespaces."""
    folder = arguments.path(path, "the database's path")
    busy_timeout = checked_timeout(busy_timeout)
    arguments.function(progress, "progress")
    progress("walking pages", 0, 0)
    problems = _pages(folder, busy_timeout)
    if problems:
        return problems
    try:
        store = Store(folder, read_only=True, busy_timeout=busy_timeout)
    except CorruptRecordError as error:  # one of the settings that are read first
        return [Problem(error.table, error.key, error.problem)]
    try:
        with store.read() as transaction:
            problems.extend(Walk(transaction, progress).problems())
            with suppress(CorruptRecordError):  # of records that were told already
                problems.extend(_index_file(store, transaction))
            with suppress(CorruptRecordError, StorageError):  # or somebody writes it just now
                wrong = keyword_problems(transaction, store.id, store.busy_timeout)
                problems.extend(Problem(KEYWORDS, "", problem) for problem in wrong)
    finally:
        store.close()
    return problems


def _pages(folder: Path, timeout: float) -> list[Problem]:
    with ExitStack() as stack:
        generation = current_generation(folder)
        try:
            generation = stack.enter_context(sole_writer(folder, timeout))
        except BusyError:
            raise
        except StorageError:  # of a medium that cannot be written
            stack.enter_context(no_writer(generation, timeout))
        return [Problem(PAGES, "", problem) for problem in damaged_pages(generation)]


def _index_file(store: Store, transaction: Transaction) -> Iterator[Problem]:
    """What is wrong with the index file. One that is of no use, since the log no longer reaches
    back to it or a release wrote it that named no change, is passed over, as by a search."""
    try:
        index = AnnIndex(transaction.generation / FILE)
        index.check()
    except (FileNotFoundError, OutdatedIndexError):
        return
    except CorruptRecordError as error:
        yield Problem(INDEX, FILE, error.problem)
        return
    if index.info.change <= transaction.last_change():
        yield from _compared(index, transaction, store.id)
        return
    with store.read() as now:  # it may have been built since the transaction began
        if now.generation == transaction.generation:
            yield from _compared(index, now, store.id)


def _compared(index: AnnIndex, transaction: Transaction, database: str) -> Iterator[Problem]:
    """What is wrong with an index that can be read, for a state."""
    info = index.info
    dimension = int(transaction.required_setting("embedder")["dimension"])
    if info.change > transaction.last_change():
        yield Problem(INDEX, FILE, "it was built for a later state than the database has")
    elif (info.database, info.dimension) != (database, dimension):
        yield Problem(INDEX, FILE, "it was built for another database")
    elif is_of_this_past(info, transaction):
        for difference in differences(index, transaction):
            yield Problem(INDEX, FILE, difference)
    elif info.seal and transaction.change_seal(info.change) is not None:
        yield Problem(
            INDEX, FILE, f"it was built for another change {info.change} than the database has"
        )


def broken_codecs(transaction: Transaction) -> list[tuple[str, CorruptRecordError]]:
    """Fitted codecs whose parameters are damaged, or should be there and are not."""
    codecs = KnownCodecs(transaction.codec_parameters)
    names = dict.fromkeys(transaction.fitted_codecs())
    names.update(dict.fromkeys([transaction.required_setting("memory").get("fitted")]))
    broken = []
    for name in filter(None, names):
        try:
            codecs.get(name)  # of one that a later release knows nothing can be said
        except CorruptRecordError as error:
            broken.append((name, error))
    return broken


class Walk:
    """One walk over the records that a transaction sees."""

    def __init__(self, transaction: Transaction, progress: Progress) -> None:
        self._transaction = transaction
        self._progress = progress
        self._found: list[Problem] = []
        self._owners: dict[int, str] = {}  # of references whose own record is damaged, or not there
        self._versions: dict[int, int] = {}

    def problems(self) -> list[Problem]:
        """All that is wrong."""
        try:
            settings = self._settings()
        except (CorruptRecordError, FormatError, ValueError) as error:
            self._report(SETTINGS, b"", f"they cannot be read: {error}")
            return self._found
        for name in self._transaction.table_names() - set(record_layout.TABLES):
            self._found.append(Problem(name, "", "it is no table of this format"))
        self._shape, self._dimension, self._next, self._last, self._trimmed = settings
        listed = self._documents()
        references = self._table(REFERENCES, self._reference)
        embeddings = self._table(EMBEDDINGS, self._embedding)
        memories = self._table(MEMORIES, self._memory)
        self._same_ids(REFERENCES, listed, references)
        self._same_ids(EMBEDDINGS, references, embeddings)
        for number in np.setdiff1d(memories, references).tolist():
            self._report(MEMORIES, record_layout.integer_key(number), "its reference is not there")
        self._postings()
        self._changes(references, memories)
        return self._found

    def _report(self, table: str, key: bytes, what: str, document: str | None = None) -> None:
        name = record_layout.readable(table, key) if key else ""
        if document is None and table in (REFERENCES, EMBEDDINGS, MEMORIES) and len(key) == 8:
            document = self._owners.get(record_layout.read_integer_key(key))
        if document is None and table in (DOCUMENTS, METADATA):
            with suppress(UnicodeDecodeError):
                document = key.decode() or None
        self._found.append(Problem(table, name, what, document))

    def _settings(self) -> tuple[MemoryShape, int, int, int, int]:
        transaction = self._transaction
        for key, record in transaction.records(SETTINGS):
            try:
                record_layout.unseal(SETTINGS, key, record)
                for name in (record_layout.CALIBRATION, record_layout.CUTTING):
                    if bytes(key) == name.encode():
                        transaction.required_setting(name)
            except CorruptRecordError as error:
                if not bytes(key).startswith(
                    record_layout.codec_key("")
                ):  # of these it is told below
                    self._report(SETTINGS, bytes(key), error.problem)
        for name in ("model", "memory"):
            transaction.required_setting(name)
        _ = IndexPolicy.of(transaction)  # they decode
        tokenizer = transaction.tokenizer()
        self._codecs = KnownCodecs(transaction.codec_parameters)
        memory = transaction.required_setting("memory")
        if memory.get("fitted", memory["codec"]).partition(":")[0] != memory["codec"]:
            self._report(SETTINGS, b"memory", "its 'fitted' is not of the family of its 'codec'")
        for name, lost in broken_codecs(transaction):
            self._report(SETTINGS, record_layout.codec_key(name), lost.problem)
        counters = transaction.required_setting("counters")
        shape = MemoryShape.from_json(transaction.required_setting("shape"))
        self._chunker = Chunker(tokenizer, shape.reference_length)
        return (
            shape,
            int(transaction.required_setting("embedder")["dimension"]),
            int(counters["next_reference"]),
            int(counters["last_change"]),
            int(counters["trimmed"]),
        )

    def _table(
        self, table: str, check: Callable[[int, int, memoryview], str | None]
    ) -> NDArray[np.int64]:
        """Check the records of an integer table; returns their ids."""
        total = self._transaction.count(table)
        ids = []
        for done, (key, record) in enumerate(self._transaction.records(table)):
            if done % _TOLD_EVERY == 0:
                self._progress(f"verifying {table}", done, total)
            if len(key) != 8:
                self._found.append(Problem(table, bytes(key).hex(), "its key has not 8 bytes"))
                continue
            number = record_layout.read_integer_key(key)
            ids.append(number)
            try:
                version, payload = record_layout.unseal(table, key, record)
                problem = check(number, version, payload)
            except CorruptRecordError as error:
                problem = error.problem
            except MismatchError as error:
                problem = str(error)
            except ValueError as error:  # what a decoder says of bytes that are none of ours
                problem = f"it does not decode ({error})"
            if problem is None and not 1 <= number < self._next:
                problem = f"its id is not below the next reference's, {self._next}"
            if problem:
                self._report(table, bytes(key), problem)
        self._progress(f"verifying {table}", total, total)
        return np.array(ids, np.int64)

    # --- documents ---

    def _documents(self) -> NDArray[np.int64]:
        """Check each document as a whole; returns the references that they list."""
        transaction = self._transaction
        total = transaction.count(DOCUMENTS)
        listed: list[int] = []
        for done, (key, record) in enumerate(transaction.records(DOCUMENTS)):
            if done % _TOLD_EVERY == 0:
                self._progress("verifying documents", done, total)
            name = bytes(key)
            try:
                check_id(name.decode())
                version, payload = record_layout.unseal(DOCUMENTS, name, record)
                entry = record_layout.DocumentEntry.read(version, payload)
                if not entry.references or version < 1:
                    raise ValueError("it has no references, or no version")
            except CorruptRecordError as error:
                self._report(DOCUMENTS, name, error.problem)
                continue
            except ValueError as error:
                self._report(DOCUMENTS, name, f"it does not decode ({error})")
                continue
            self._document(name, entry)
            listed.extend(entry.references)
        self._metadata_keys()
        ids = np.array(sorted(listed), np.int64)
        for number in ids[1:][ids[1:] == ids[:-1]].tolist():
            self._report(REFERENCES, record_layout.integer_key(number), "two documents list it")
        return np.unique(ids)

    def _document(self, name: bytes, entry: record_layout.DocumentEntry) -> None:
        transaction = self._transaction
        readable = name.decode("utf-8", "replace")
        for number in entry.references:
            self._owners[number] = readable
        metadata = None
        try:
            version, metadata = transaction.version_and_payload(METADATA, name)
            transaction.metadata(readable)
            if version != entry.version:
                self._report(METADATA, name, f"its version is {version}, not {entry.version}")
        except CorruptRecordError as error:
            self._report(METADATA, name, error.problem)
        texts = []
        versions = set()
        for ordinal, number in enumerate(entry.references):
            try:
                reference = transaction.reference(number)
            except CorruptRecordError:
                return  # told where the references are walked
            texts.append(reference.text)
            versions.add(reference.version)
            if (reference.document_id, reference.ordinal) != (readable, ordinal):
                self._report(
                    REFERENCES,
                    record_layout.integer_key(number),
                    "it names another document or place",
                )
        if len(versions) != 1 or not 1 <= min(versions) <= entry.version:
            self._report(DOCUMENTS, name, f"its references have the versions {sorted(versions)}")
        if text_hash("".join(texts)) != entry.text_hash:
            self._report(DOCUMENTS, name, "its text is not the one that its hash is of")
        elif metadata and content_hash_of(entry.text_hash, metadata) != entry.content_hash:
            self._report(DOCUMENTS, name, "its content is not the one that its hash is of")

    def _metadata_keys(self) -> None:
        for key, _ in self._transaction.records(METADATA):
            if self._transaction.record(DOCUMENTS, bytes(key)) is None:
                self._report(METADATA, bytes(key), "its document is not there")

    # --- references ---

    def _reference(self, number: int, version: int, payload: memoryview) -> str | None:
        reference = record_layout.read_reference(number, version, payload)
        self._versions[number] = version
        self._owners.setdefault(number, reference.document_id)
        if not self._chunker.may_have(Piece(reference.text, reference.tokens)):
            return f"it has {reference.tokens} tokens"
        return None

    def _embedding(self, number: int, version: int, payload: memoryview) -> str | None:
        vector = record_layout.read_embedding(payload)
        if vector.shape != (self._dimension,):
            return f"it has {len(vector)} numbers, not {self._dimension}"
        if not abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) <= _UNIT:
            return "its length is not 1"
        return self._wrong_version(number, version)

    def _memory(self, number: int, version: int, payload: memoryview) -> str | None:
        try:
            memory = decode_memory(payload, self._shape, self._codecs)
        except (MismatchError, FormatError):  # of another model, or of a later release: no damage
            return None
        except CorruptRecordError as error:
            return f"its codec cannot be had: {error}"
        memory.require(self._shape)
        for name, vectors in (("keys", memory.keys), ("values", memory.values)):
            if not np.isfinite(to_float32(vectors, self._shape.dtype)).all():
                return f"its {name} are not all finite"
        return self._wrong_version(number, version)

    def _wrong_version(self, number: int, version: int) -> str | None:
        due = self._versions.get(number, version)
        return None if version == due else f"its version is {version}, its reference's {due}"

    def _same_ids(self, table: str, due: NDArray[np.int64], there: NDArray[np.int64]) -> None:
        for number in np.setdiff1d(due, there).tolist():
            self._report(table, record_layout.integer_key(number), "it is missing")
        more = np.setdiff1d(there, due)
        for number in more.tolist():
            what = "no document lists it" if table == REFERENCES else "its reference is not there"
            self._report(table, record_layout.integer_key(number), what)

    # --- what follows from the rest ---

    def _postings(self) -> None:
        """The postings are those that the metadata gives."""
        transaction = self._transaction
        keys = declared_keys(transaction)
        grouped = Grouped(keys)
        try:
            for name, entry in transaction.documents() if keys else ():
                grouped.add(transaction.metadata(name), entry.references)
        except CorruptRecordError:
            return  # told already; what they should be is not known
        try:
            there = {(name, value): ids for name, value, ids in Postings(transaction).items()}
        except CorruptRecordError as error:
            self._found.append(Problem(POSTINGS, error.key, error.problem))
            return
        due = grouped.ids()
        for place in sorted(due.keys() | there.keys()):
            ids = np.array(sorted(due.get(place, [])), np.int64)
            if not np.array_equal(ids, there.get(place, _NO_IDS)):
                self._report(
                    POSTINGS, b"", f"references with the metadata key '{place[0]}' are not right"
                )

    def _changes(self, references: NDArray[np.int64], memories: NDArray[np.int64]) -> None:
        """The change log has no gaps, and ends with what is there."""
        number = self._trimmed
        state: dict[int, bool | None] = {}  # whether it has a memory; None: deleted
        try:
            for change in self._transaction.changes(0):
                number += 1
                self._replay(number, change, state)
        except CorruptRecordError as error:
            self._found.append(Problem(CHANGES, error.key, error.problem))
            return
        if number != self._last or self._transaction.count(CHANGES) != number - self._trimmed:
            self._report(CHANGES, b"", f"it ends at {number}, and should end at {self._last}")
            return
        there, warm = set(references.tolist()), set(memories.tolist())
        for reference, has_memory in state.items():
            if (has_memory is not None) != (reference in there):
                self._report(CHANGES, b"", f"reference {reference} is not as the log says")
            elif has_memory is not None and has_memory != (reference in warm):
                self._report(CHANGES, b"", f"the memory of {reference} is not as the log says")
        if self._trimmed == 0 and state.keys() < there:
            self._report(CHANGES, b"", "references are there that it never named")

    def _replay(self, number: int, change: NDArray[Any], state: dict[int, bool | None]) -> None:
        key = record_layout.integer_key(number)
        if not len(change):
            self._report(CHANGES, key, "it has no entries")
        for what, reference in change.tolist():
            first = reference not in state
            if what not in (INSERTED, DELETED, REMEMBERED, FORGOTTEN):
                continue  # of a later release
            if not 1 <= reference < self._next:
                self._report(CHANGES, key, f"it names reference {reference}, which never was")
            elif what == INSERTED and not first:
                self._report(CHANGES, key, f"reference {reference} was there already")
            elif not first and state[reference] is None:
                self._report(CHANGES, key, f"reference {reference} was deleted before")
            elif first and what != INSERTED and self._trimmed == 0:
                self._report(CHANGES, key, f"reference {reference} was not there")
            if what in (INSERTED, FORGOTTEN):
                state[reference] = False
            elif what == REMEMBERED:
                state[reference] = True
            elif what == DELETED:
                state[reference] = None
