"""Repair: what can be derived is derived anew; what cannot is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from memdb.care.aside import Aside
from memdb.care.generations import new_identity
from memdb.care.verify import INDEX, KEYWORDS, PAGES, Problem, Walk, broken_codecs, verify
from memdb.errors import CorruptRecordError
from memdb.filters.declared import declared_keys, reindex
from memdb.filters.postings import Postings
from memdb.index.ann import FILE
from memdb.index.policy import IndexPolicy
from memdb.index.searcher import Searcher
from memdb.ingest.chunking import Chunker
from memdb.ingest.recording import unit_vectors
from memdb.keywords import remove_index
from memdb.memories.placing import Placing
from memdb.protocols import Embedder, Progress, no_progress
from memdb.storage import record_layout
from memdb.storage.folder import opening
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import (
    CALIBRATION,
    CHANGES,
    CUTTING,
    DOCUMENTS,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    POSTINGS,
    RECODING,
    REFERENCES,
    SETTINGS,
    DocumentEntry,
)
from memdb.storage.store import Store, checked_timeout
from memdb.storage.transaction import Transaction
from memdb.storage.usage import FILE as USAGE
from memdb.types import arguments
from memdb.types.checks import check_id, content_hash_of, text_hash
from memdb.types.cutting import Cutting
from memdb.types.document import Reference
from memdb.types.shape import MemoryShape

_OF_REFERENCES = (REFERENCES, EMBEDDINGS, MEMORIES)
_ROUNDS = 4


@dataclass(repr=False)
class Repair:
    """What a repair did.

    Attributes:
        mended: what was wrong and is right now, in words.
        dropped: ids of documents that were deleted since they could not be mended.
        left: what is still wrong.
        put_aside: the records that were taken out, in words.
        aside: files that hold them, as they were (`memdb.care.read_aside`).
    """

    mended: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)
    put_aside: list[str] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = f"mended={len(self.mended)}, dropped={len(self.dropped)}, left={len(self.left)}"
        return f"Repair({counts})"


def repair(
    path: str | os.PathLike[str],
    *,
    embedder: Callable[[], Embedder] | None = None,
    drop: bool = False,
    aside: str | os.PathLike[str] | None = None,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> Repair:
    """Mend what `verify` finds.

    From what is there are derived: the index, the postings, the document map, the counters, and,
    with an embedder, embeddings. A damaged memory is taken out: its reference is cold, and its
    memory is written anew at its next use. A damaged change log is begun anew. Damaged texts and
    metadata are lost; their documents are named, and deleted if `drop` says so: ingest them again.
    Damaged pages are not mended; restore a backup, or export what can still be read.

    Damaged is a record whose seal is broken, or of whose bytes a decoder complains. An error of the
    machine (memory, disk) is raised, and nothing was changed. What is taken out, or written anew,
    is put aside first: a file in the database's folder holds the records as they were, until the
    database is compacted (which promises that nothing deleted stays in the folder). Only what holds
    nothing of its own, the index file and the postings, is not.

    Args:
        path: the database.
        embedder: makes the database's embedder, if one is needed.
        drop: whether to delete documents that cannot be mended.
        aside: a folder for what is taken out, made if it is missing; default: the database's
            generation.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        NotADatabaseError: there is none.
        StorageError: the disk refuses, also what is to be put aside; nothing was taken out.
        BusyError: a writer is not done in time.
        MemoryError: there is not enough; nothing was changed.
    """
    folder = arguments.path(path, "the database's path")
    arguments.function(progress, "progress")
    drop = arguments.flag(drop, "drop")
    if embedder is not None:
        arguments.function(embedder, "embedder")
    if aside is not None:
        aside = arguments.path(aside, "aside")
    busy_timeout = checked_timeout(busy_timeout)
    looked = partial(verify, folder, busy_timeout=busy_timeout, progress=progress)
    report = Repair()
    with opening(folder, busy_timeout):
        pass
    problems = looked()
    if any(problem.table == PAGES for problem in problems):
        report.left = problems
        return report
    try:
        store = Store(folder, busy_timeout=busy_timeout)
    except CorruptRecordError:  # what it is and of which format cannot be derived
        report.left = problems
        return report
    try:
        # What is mended lets the next look find more: without its settings nothing else is read.
        for _ in range(_ROUNDS):
            mended = len(report.mended)
            if problems:
                with store.write() as transaction, _putting(transaction, aside, report) as put:
                    # Looked at again: since `verify` another writer may have been here.
                    found = Walk(transaction, progress).problems()
                    _Mending(transaction, report, put, embedder, progress).mend(found)
                if any(problem.table == INDEX for problem in problems):
                    (store.generation / FILE).unlink(missing_ok=True)
                    report.mended.append("the index file was damaged: removed, to be built anew")
                if any(problem.table == KEYWORDS for problem in problems):
                    remove_index(store.generation)
                    report.mended.append("the keyword index was damaged: removed")
            if len(report.mended) == mended:
                break
            problems = looked()
        if problems and drop:
            with store.write() as transaction, _putting(transaction, aside, report) as put:
                found = Walk(transaction, progress).problems()
                report.dropped = _dropped(transaction, found, put)
            problems = looked()
        report.left = problems
        if not problems:
            with store.read() as transaction:
                dimension = int(transaction.required_setting("embedder")["dimension"])
            Searcher(store, dimension).build(progress, if_due=True)
    finally:
        store.close()
    return report


@contextmanager
def _putting(
    transaction: Transaction, folder: str | os.PathLike[str] | None, report: Repair
) -> Iterator[Aside]:
    """Where a transaction puts aside what it takes out, and the report of it."""
    with Aside(transaction, None if folder is None else Path(folder)) as aside:
        yield aside
    report.put_aside += aside.names
    if aside.file is not None:
        report.aside.append(aside.file)


class _Mending:
    """The mending that one transaction does."""

    def __init__(
        self,
        transaction: Transaction,
        report: Repair,
        aside: Aside,
        embedder: Callable[[], Embedder] | None,
        progress: Progress,
    ) -> None:
        self._transaction = transaction
        self._report = report
        self._aside = aside
        self._embedder = embedder
        self._progress = progress
        self._embedded = False  # whether an embedding was made anew

    def mend(self, problems: list[Problem]) -> None:
        """Mend what can be mended of what `verify` found."""
        transaction = self._transaction
        if self._settings():
            # Without them nothing else was looked at; with them the next verify does.
            self._log()
            return
        self._codecs()
        self._optional_settings()
        for problem in problems:
            if problem.table == MEMORIES and problem.key:
                self._memory(int(problem.key), problem.what)
        if any(problem.table in (DOCUMENTS, REFERENCES) for problem in problems):
            self._documents()
        for problem in problems:
            if problem.table == EMBEDDINGS and problem.key:
                self._embedding(int(problem.key), problem.what)
        if any(problem.table == POSTINGS for problem in problems):
            try:
                reindex(transaction, self._progress)
                self._report.mended.append("the index of metadata was damaged: written anew")
            except CorruptRecordError:
                transaction.empty(POSTINGS)  # what it is derived from is damaged
        if any(problem.table == CHANGES for problem in problems):
            self._log()
            self._report.mended.append("the change log was damaged: begun anew")
        elif self._embedded:
            self._log()  # what was built from the vectors before, here or elsewhere, is of no use

    def _optional_settings(self) -> None:
        try:
            self._transaction.optional_setting(CALIBRATION)
        except CorruptRecordError as error:
            self._put_setting_aside(CALIBRATION, error.problem)
            self._transaction.delete_setting(CALIBRATION)
            self._report.mended.append("the calibration was damaged: removed, to be made anew")
        try:
            self._transaction.optional_setting(CUTTING)
        except CorruptRecordError as error:
            # Whether references have places shows in none of the records.
            self._put_setting_aside(CUTTING, error.problem)
            self._transaction.delete_setting(CUTTING)
            self._report.mended.append(
                "the setting 'cutting' was damaged: removed; new documents are cut at sentences, "
                "and their references have no place"
            )
        try:
            self._transaction.setting(RECODING)
        except CorruptRecordError as error:
            self._put_setting_aside(RECODING, error.problem)
            self._transaction.delete_setting(RECODING)
            self._report.mended.append(
                "the setting 'recoding' was damaged: removed; `memdb recode` does what is left"
            )

    def _put_setting_aside(self, name: str, why: str) -> None:
        self._aside.put(SETTINGS, name.encode(), why)

    def _settings(self) -> bool:
        """Whether a setting had to be derived."""
        transaction = self._transaction
        mended = False
        highest = [0]
        for table in _OF_REFERENCES:
            numbers = transaction.numbers(table)
            highest.append(int(numbers[-1]) if len(numbers) else 0)
        try:
            counters = transaction.required_setting("counters")
            damaged = not {"last_change", "trimmed"} <= counters.keys()
            damaged = damaged or counters["next_reference"] <= max(highest)
        except CorruptRecordError:
            damaged = True
        if damaged:
            with suppress(CorruptRecordError):
                highest.extend(int(c["reference"].max(initial=0)) for c in transaction.changes(0))
            changes = transaction.numbers(CHANGES)
            last = int(changes[-1]) if len(changes) else 0
            self._put_setting_aside("counters", "damaged, or behind the records")
            transaction.put_setting(
                "counters",
                {"next_reference": max(highest) + 1, "last_change": last, "trimmed": last},
            )
            # Numbers may be given again that were given before: what was derived from the database
            # under its old id is no longer to be believed.
            self._put_setting_aside("format", "the counters were derived: the id is another")
            new_identity(transaction)
            for file in (FILE, USAGE):
                (transaction.generation / file).unlink(missing_ok=True)
            self._report.mended.append("the counters were damaged: derived from the records")
            mended = True
        try:
            _ = IndexPolicy.of(transaction)
        except CorruptRecordError as error:
            names = self._indexed_names()
            self._put_setting_aside("index", error.problem)
            transaction.put_setting("index", IndexPolicy(keys=names).to_json())
            self._report.mended.append("the setting 'index' was damaged: set to its defaults")
            mended = True
        return mended

    def _codecs(self) -> None:
        """Forget fitted codecs that are lost; the memories that they wrote are lost with them."""
        transaction = self._transaction
        try:
            memory = transaction.required_setting("memory")
        except CorruptRecordError:  # which cannot be derived
            return
        broken = dict(broken_codecs(transaction))
        for name, lost in broken.items():
            self._put_setting_aside(f"codec {name}", lost.problem)
            transaction.delete_setting(f"codec {name}")
            self._report.mended.append(f"the parameters of codec {name} were lost: removed")
        if memory.get("fitted") in broken:
            self._put_setting_aside("memory", "it named a codec whose parameters are lost")
            memory.pop("fitted")
            transaction.put_setting("memory", memory)

    def _indexed_names(self) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(name for name, _, _ in Postings(self._transaction).items()))
        except CorruptRecordError:
            return ()

    def _memory(self, number: int, why: str) -> None:
        transaction = self._transaction
        key = record_layout.integer_key(number)
        if transaction.record(MEMORIES, key) is None:
            return
        self._aside.put(MEMORIES, key, why)
        if transaction.has_reference(number):
            transaction.delete_memory(number)
            self._report.mended.append(
                f"the memory of reference {number} was damaged: put aside, now cold"
            )
        else:
            transaction.delete_record(MEMORIES, key)
            self._report.mended.append(f"memory {number} belonged to no reference: put aside")

    def _documents(self) -> None:
        """Write damaged entries of the document map anew, from the references."""
        transaction = self._transaction
        damaged = set()
        for key, record in transaction.records(DOCUMENTS):
            try:
                record_layout.unseal(DOCUMENTS, key, record)
            except CorruptRecordError:
                damaged.add(bytes(key))
        for key, _ in transaction.records(METADATA):
            if transaction.record(DOCUMENTS, bytes(key)) is None:
                damaged.add(bytes(key))
        if not damaged:
            return
        parts: dict[bytes, list[tuple[int, int, str]]] = {name: [] for name in damaged}
        for number in transaction.numbers(REFERENCES).tolist():
            try:
                reference = transaction.reference(number)
            except CorruptRecordError:
                continue
            owner = reference.document_id.encode()
            if owner in parts:
                parts[owner].append((reference.ordinal, number, reference.text))
        for name, found in parts.items():
            self._document(name, sorted(found))

    def _document(self, name: bytes, parts: list[tuple[int, int, str]]) -> None:
        transaction = self._transaction
        if not parts or [ordinal for ordinal, _, _ in parts] != list(range(len(parts))):
            return
        try:
            version, metadata = transaction.version_and_payload(METADATA, name)
        except CorruptRecordError:
            return
        text = text_hash("".join(part for _, _, part in parts))
        ids = tuple(number for _, number, _ in parts)
        entry = DocumentEntry(version, content_hash_of(text, metadata), text, ids)
        self._aside.put(DOCUMENTS, name, "damaged")
        transaction.put(DOCUMENTS, name, version, entry.payload())
        self._report.mended.append(
            f"the entry of document '{name.decode()}' was damaged: derived from its references"
        )

    def _embedding(self, number: int, why: str) -> None:
        if self._embedder is None:
            return
        transaction = self._transaction
        key = record_layout.integer_key(number)
        try:
            reference = transaction.reference(number)
        except CorruptRecordError:
            if transaction.record(REFERENCES, key) is None:
                self._aside.put(EMBEDDINGS, key, why)
                transaction.delete_record(EMBEDDINGS, key)
                self._report.mended.append(
                    f"embedding {number} belonged to no reference: put aside"
                )
            return
        embedder = self._embedder()
        vectors = unit_vectors(embedder.embed(self._contents(reference)), 1, embedder.dimension)
        self._aside.put(EMBEDDINGS, key, why)
        transaction.put_embedding(reference, vectors[0])
        self._embedded = True
        self._report.mended.append(f"the embedding of reference {number} was damaged: made anew")

    def _contents(self, reference: Reference) -> list[str]:
        """What the reference's embedding is of, as far as the rest of its document is there."""
        transaction = self._transaction
        cutting = Cutting.from_json(transaction.optional_setting(CUTTING))
        if not cutting.place:
            return [reference.content]
        shape = MemoryShape.from_json(transaction.required_setting("shape"))
        chunker = Chunker(transaction.tokenizer(), shape.reference_length, cutting)
        try:
            return Placing(chunker.places).contents(transaction, [reference])
        except CorruptRecordError:
            return [reference.content]

    def _log(self) -> None:
        """Begin the change log anew: indexes that were built from the old one are, too."""
        transaction = self._transaction
        for key in [bytes(key) for key, _ in transaction.records(CHANGES)]:
            self._aside.put(CHANGES, key, "the change log was begun anew")
        transaction.cut_log(transaction.last_change() + 1)


def _dropped(transaction: Transaction, problems: list[Problem], aside: Aside) -> list[str]:
    """Delete the documents that problems are about, and what belongs to none, when they are put
    aside; returns the ids."""
    for table in (DOCUMENTS, METADATA):
        for key in [bytes(key) for key, _ in transaction.records(table)]:
            try:
                check_id(key.decode())
            except ValueError as error:  # no document can have it, so nobody can ask for it
                aside.put(table, key, f"no document can have this id: {error}")
                transaction.delete_record(table, key)
    names = sorted({problem.document for problem in problems if problem.document})
    for name in names:
        _drop(transaction, name, aside)
    ownerless = {
        int(problem.key): problem.what
        for problem in problems
        if problem.table in _OF_REFERENCES and problem.key and not problem.document
    }
    for number, what in ownerless.items():
        _delete_reference(transaction, number, what, aside)
    return names


def _delete_reference(transaction: Transaction, number: int, why: str, aside: Aside) -> None:
    for table in _OF_REFERENCES:
        aside.put(table, record_layout.integer_key(number), why)
    transaction.delete_references([number])


def _drop(transaction: Transaction, name: str, aside: Aside) -> None:
    """Delete all there is of a document, whatever of it is damaged."""
    key = name.encode()
    ids: list[int] = []
    with suppress(CorruptRecordError):
        entry = transaction.document(name)
        ids.extend(entry.references if entry else ())
    for number in transaction.numbers(REFERENCES).tolist():
        try:
            if transaction.owner(number) == name:
                ids.append(number)
        except CorruptRecordError:
            continue
    if declared_keys(transaction):
        Postings(transaction).discard(ids)
    why = f"of document '{name}', which could not be mended"
    for table in (DOCUMENTS, METADATA):
        aside.put(table, key, why)
        transaction.delete_record(table, key)
    for number in dict.fromkeys(ids):
        _delete_reference(transaction, number, why, aside)
