"""`Maintainable`: the part of `MemDB` that takes long: many documents in and out, memories, codec
and index."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from memdb.care.recode import RecodeReport, recode
from memdb.care.takeover import Takeover
from memdb.errors import BusyError, InvalidInputError, MismatchError
from memdb.exchange.export import export
from memdb.files import Files, Gathered
from memdb.files.files import AnyPath
from memdb.filters.declared import checked_keys, declare_keys, undeclare_keys
from memdb.index import IndexInfo, IndexKind, IndexPolicy, Searcher
from memdb.ingest.chunking import Chunker
from memdb.ingest.corpus_run import IngestReport, ingest
from memdb.ingest.load import DocumentBatch, LoadReport, load
from memdb.ingest.steps import entry_of
from memdb.keywords import Keywords
from memdb.memories.attached import Attached
from memdb.memories.cache import MemoryCache
from memdb.memories.codec_choice import CodecChoice
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress, Warmer, no_progress
from memdb.readable import known
from memdb.storage.record_layout import CALIBRATION, checked_setting
from memdb.storage.store import Store
from memdb.storage.usage import Usage
from memdb.types import arguments
from memdb.types.canonical import json_payload, read_json
from memdb.types.shape import MemoryShape


class Maintainable(ABC):
    """What is done with a database as a whole."""

    path: Path
    shape: MemoryShape
    settings: dict[str, dict[str, Any]]
    _store: Store
    _chunker: Chunker
    _attached: Attached
    _codec_choice: CodecChoice
    _keywords: Keywords
    _memory_store: MemoryStore
    _searcher: Searcher
    _takeover: Takeover
    _usage: Usage
    _rewriting: bool

    @abstractmethod
    def _require_open(self) -> None:
        """Raise `StorageError` if the database is closed."""

    @abstractmethod
    def _require_writable(self) -> None:
        """Raise what forbids to write documents now."""

    def ingest(
        self,
        path: AnyPath | Iterable[AnyPath] | Files | Gathered,
        *,
        cold: bool = False,
        prune: bool = False,
        progress: Progress = no_progress,
        name: str | None = None,
    ) -> IngestReport:
        """Bring the documents of files in: new ones are inserted, changed ones updated.

            db.ingest("corpus.jsonl")
            db.ingest(["docs", "notes.md"])
            db.ingest(Files("faq.csv", text_field="answer"))

        All files are read for errors before anything is written. The same files again change
        nothing; an interrupted ingest goes on where it stopped when it is called again.

        Args:
            path: a file, a folder or several; `Files` says more about how to read them. A file of
                JSON lines of `id` (optional), `text`, `metadata` (optional) is read as it is; what
                becomes of others, `docs/ingest.md` says.
            cold: leave memories to their first use, or to `warm`.
            prune: delete the documents that went from the files and folders given, once those that
                are there are in: of a folder, those whose files it has no more. A file of JSON
                lines stands for all documents that did not come from other files.
            progress: told of the work.
            name: what to call the one file in errors.

        Raises:
            CorpusError: naming file and line; nothing was written.
            InvalidInputError: naming the file; nothing was written.
            MissingPartError: a library that reads such files is not installed.
        """
        self._require_writable()
        arguments.function(progress, "progress")
        prune = arguments.flag(prune, "prune")
        cold = arguments.flag(cold, "cold") or not self._memory_store.can_write
        if isinstance(path, (Files, Gathered)):
            if name is not None:
                raise InvalidInputError("name is an argument of `Files`, where those are given")
            if isinstance(path, Gathered):
                return self._ingest(path, cold, prune, progress)
        files = path if isinstance(path, Files) else Files(path, name=name)
        with files.gather(progress) as gathered:
            return self._ingest(gathered, cold, prune, progress)

    def _ingest(
        self, gathered: Gathered, cold: bool, prune: bool, progress: Progress
    ) -> IngestReport:
        codec = self._codec_choice.codec.name
        report = ingest(
            gathered,
            store=self._store,
            chunker=self._chunker,
            embedder=self._attached.embedder(),
            memory_store=self._memory_store,
            cold=cold,
            prune=prune,
            progress=progress,
        )
        self._take_over(codec, progress)
        self.index_if_due(progress)
        return gathered.described(report)

    def load(
        self, batches: Iterable[DocumentBatch], *, progress: Progress = no_progress
    ) -> LoadReport:
        """Bring in documents whose embeddings and memories are computed already, fast: about 64 MiB
        to a transaction, and no more than two of these in RAM.

        A document that is there with the same content stays, with other content it is replaced:
        so an interrupted load goes on where it stopped when it is called again. Of one that stays,
        embeddings and memories that differ from those that are there take their place; a memory
        that is None leaves what is there. The index is not built (`build_index` does that).

        Args:
            batches: taken one by one, in this thread; documents in the order of their ids are
                fastest.
            progress: told of the work.

        Raises:
            InvalidInputError: naming the document; batches before it are written. So they are
                where `batches` itself raises.
            MismatchError: memories of another shape.
        """
        self._require_writable()
        arguments.function(progress, "progress")
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
        if top is not None:
            top = arguments.whole_number(top, "top", 1)
        if ids is not None:
            ids = list(map(known, arguments.some(ids, "ids", "document ids")))
        arguments.function(progress, "progress")
        if warmer is not None:
            arguments.function(warmer, "warmer")
        self._require_no_rewrite()
        codec = self._codec_choice.codec.name
        with self._store.read() as transaction:
            entries = (
                (entry for _, entry in transaction.documents())
                if ids is None
                else (entry_of(transaction, name) for name in ids)
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
        arguments.function(progress, "progress")
        some = arguments.some(batches, "batches", "lists of reference ids")
        self._memory_store.require_writer()
        return self._memory_store.warm_batches(
            map(_reference_ids, some), lambda done: progress("writing memories", done, 0), fit=False
        )

    def _require_no_rewrite(self) -> None:
        self._require_writable()
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
        self._require_writable()
        arguments.function(progress, "progress")
        refit = arguments.flag(refit, "refit")
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
        self._require_writable()
        arguments.function(progress, "progress")
        declare_keys(self._store, checked_keys(names), progress)

    def undeclare_keys(self, *names: str) -> None:
        """Index these metadata keys no longer: filters that ask for them read all metadata again.
        A key that is not indexed stays so.

        Raises:
            InvalidInputError: a name that no indexed key can have.
        """
        self._require_writable()
        undeclare_keys(self._store, checked_keys(names))

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
        self._require_writable()
        if calibration is not None:
            arguments.a(Mapping, calibration, "a calibration")  # type: ignore[type-abstract]
            try:
                checked_setting(CALIBRATION, dict(calibration))
                calibration = read_json(json_payload(dict(calibration)))
            except (TypeError, ValueError) as error:
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
        self._require_writable()
        arguments.function(progress, "progress")
        if kind is not None or recall is not None:
            _ = IndexPolicy("auto" if kind is None else kind, 1 if recall is None else recall)
            with self._store.write() as transaction:
                old = IndexPolicy.of(transaction)
                rule = IndexPolicy(
                    old.kind if kind is None else kind,
                    old.recall if recall is None else recall,
                    old.keys,
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
            BusyError: another process writes that index, and is not done in time.
        """
        self._require_writable()
        arguments.function(progress, "progress")
        with self._store.read() as transaction:
            self._keywords.build(transaction, progress)

    def index_if_due(self, progress: Progress = no_progress) -> None:
        """Build the ANN index if so much changed since the last one that it is due, and index new
        words, if any were asked for; not if another process is at it."""
        self._require_writable()
        arguments.function(progress, "progress")
        with suppress(BusyError):
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
        arguments.function(progress, "progress")
        arrays = arguments.flag(arrays, "arrays")
        target = arguments.path(folder, "the export's folder")
        with self._store.read() as transaction:
            return export(
                transaction,
                target,
                shape=self.shape,
                memory_store=MemoryStore(
                    self._store,
                    self._attached,
                    self.shape,
                    self._codec_choice,
                    MemoryCache(0),
                    self._memory_store.placing,
                ),
                arrays=arrays,
                progress=progress,
            )


def _reference_ids(numbers: object) -> list[int]:
    some = arguments.some(numbers, "each of the batches", "reference ids")
    return [arguments.whole_number(number, "a reference id", 1, (1 << 63) - 1) for number in some]
