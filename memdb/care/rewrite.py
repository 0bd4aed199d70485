"""Rewrite: the memories of a whole database anew, for another model, adapter, selection or codec.

First the database takes the new settings, so that from then on only the new writer writes; what is
there of the old one is cold. Then document after document is written anew, and how far it came is
recorded with each batch: an interrupted rewrite goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from memdb.care.recode import recode
from memdb.codecs import codec_named
from memdb.cutting.places import title_of
from memdb.errors import MismatchError
from memdb.ingest.chunking import Chunker, text_tokenizer
from memdb.ingest.recording import embedded, put
from memdb.memories.attached import Attached, require_part
from memdb.memories.cache import MemoryCache
from memdb.memories.codec_choice import CodecChoice
from memdb.memories.memory_store import MemoryStore
from memdb.memories.placing import Placing
from memdb.protocols import Embedder, MemoryWriter, Progress, no_progress
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import CALIBRATION, CUTTING, DOCUMENTS, DocumentEntry
from memdb.storage.store import Store
from memdb.storage.transaction import Transaction
from memdb.types import arguments
from memdb.types.cutting import Cutting
from memdb.types.document import Document
from memdb.types.shape import MemoryShape

PENDING = "rewriting"  # the setting that says how far a rewrite came
_BATCH = 8  # documents between two commits


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        documents: how many were gone through.
        memories: how many were written.
        recut: documents that were cut into references anew, for the new model's tokens.
    """

    documents: int
    memories: int
    recut: int


def rewrite(
    path: str | os.PathLike[str],
    writer: MemoryWriter,
    *,
    embedder: Callable[[], Embedder] | None = None,
    codec: str | None = None,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> RewriteReport:
    """See `memdb.rewrite`; of one folder, without its namespaces."""
    arguments.function(progress, "progress")
    require_part(writer, MemoryWriter)
    text_tokenizer(writer.tokenizer)  # loads, or is refused
    arguments.a(MemoryShape, writer.shape, "the writer's shape")
    if embedder is not None:
        require_part(embedder, Embedder, or_maker=True)
    if codec is not None:
        codec_named(codec)
    store = Store(arguments.path(path, "the database's path"), busy_timeout=busy_timeout)
    try:
        return _Rewriting(store, writer, embedder, codec, progress).run()
    finally:
        store.close()


class _Rewriting:
    def __init__(
        self,
        store: Store,
        writer: MemoryWriter,
        embedder: Callable[[], Embedder] | None,
        codec: str | None,
        progress: Progress,
    ) -> None:
        self._store = store
        self._writer = writer
        self._embedder = embedder
        self._progress = progress
        self._codec = codec

    def run(self) -> RewriteReport:
        """Do it, or what is left of it."""
        with self._store.write() as transaction:
            if self._renamed(transaction):
                return RewriteReport(0, 0, 0)
            recut = self._settle(transaction)
            total = transaction.count(DOCUMENTS)
            memory = transaction.required_setting("memory")
            settings = transaction.required_setting("embedder")
            cutting = Cutting.from_json(transaction.optional_setting(CUTTING))
        attached = Attached(settings, self._writer.shape, self._embedder, self._writer)
        self._attached = attached
        codec_choice = CodecChoice(self._store, self._writer.shape, memory)
        length = self._writer.shape.reference_length
        self._chunker = Chunker(self._writer.tokenizer, length, cutting)
        self._memory_store = MemoryStore(
            self._store,
            attached,
            self._writer.shape,
            codec_choice,
            MemoryCache(0),
            Placing(self._chunker.places if cutting.place else None),
        )
        done = memories = cut = 0
        while True:
            self._progress("rewriting documents", done, total)
            with self._store.read() as transaction:
                after = transaction.required_setting(PENDING)["after"]
                page = list(islice(transaction.documents(after), _BATCH))
            if not page:
                break
            written, new = self._batch(page, recut)
            memories, cut, done = memories + written, cut + new, done + len(page)
            if codec_choice.family is not None and memories >= codec_choice.family.enough:
                codec_choice.fit_if_due(self._progress)
        with self._store.write() as transaction:
            transaction.delete_setting(PENDING)
        self._progress("rewriting documents", total, total)
        if codec_choice.is_fitted or codec_choice.fit_if_due(self._progress):
            recode(self._store, self._writer.shape, codec_choice, self._progress)
        return RewriteReport(done, memories, cut)

    def _renamed(self, transaction: Transaction) -> bool:
        """Whether nothing but the adapter's name changes: it lies elsewhere now, or is one that
        reads memories and writes none. Then it is recorded, and all memories are right."""
        memory = transaction.required_setting("memory")
        wanted = self._wanted(memory)
        old, new = memory.get("adapter"), wanted["memory"].pop("adapter", None)
        if old == new or transaction.setting(PENDING) is not None:
            return False
        found = {name: self._recorded(transaction, name) for name in wanted}
        found["memory"].pop("adapter", None)
        if found != wanted:
            return False
        memory.pop("adapter", None)
        transaction.put_setting("memory", memory if new is None else {**memory, "adapter": new})
        transaction.delete_setting(CALIBRATION)  # it may have been of another
        return True

    def _wanted(self, old: dict[str, Any]) -> dict[str, Any]:
        """The settings that the database gets; `old` is its `memory`."""
        return {
            "shape": self._writer.shape.to_json(),
            "model": {"name": self._writer.name},
            "memory": {"codec": self._codec or old["codec"], **self._writer.settings},
        }

    def _settle(self, transaction: Transaction) -> bool:
        """Record the new settings, and return whether documents have to be cut anew. What was begun
        with the same settings goes on."""
        writer = self._writer
        old = transaction.required_setting("memory")
        wanted = self._wanted(old)
        pending = transaction.setting(PENDING)
        if pending is not None and all(
            self._recorded(transaction, name) == value for name, value in wanted.items()
        ):
            return bool(pending["recut"])
        shape = transaction.required_setting("shape")
        mine = writer.shape.model, writer.shape.adapter, wanted["memory"].get("adapter")
        if (shape.get("model"), shape.get("adapter"), old.get("adapter")) != mine:
            transaction.delete_setting(CALIBRATION)  # it was of the memories of another
        length = shape["reference_length"]
        cutting = Cutting.from_json(transaction.optional_setting(CUTTING))
        recut = (
            transaction.tokenizer() != writer.tokenizer
            or length > writer.shape.reference_length
            # A place may take more of a longer reference, so it may be another.
            or (length != writer.shape.reference_length and cutting.place)
            or bool(pending and pending["recut"])
        )
        if recut and self._embedder is None:
            raise MismatchError(
                f"the tokens of '{writer.name}' are others, so documents are cut anew, and that "
                "takes the database's embedder: pass `embedder`"
            )
        codec_named(wanted["memory"]["codec"])
        for name, value in wanted.items():
            transaction.put_setting(name, value)
        if recut:
            transaction.put_tokenizer(writer.tokenizer)
        transaction.put_setting(PENDING, {"after": "", "recut": recut})
        return recut

    @staticmethod
    def _recorded(transaction: Transaction, name: str) -> Any:
        value = transaction.required_setting(name)
        value.pop("fitted", None)  # that is found on the way
        return value

    def _batch(self, page: list[tuple[str, DocumentEntry]], recut: bool) -> tuple[int, int]:
        """Write some documents anew; how many memories, and how many were cut anew."""
        with self._store.read() as transaction:
            warm = {
                name: [n for n in entry.references if transaction.is_warm(n)]
                for name, entry in page
            }
            if recut:
                documents = [
                    (
                        name,
                        Document(
                            "".join(transaction.reference(n).text for n in entry.references),
                            name,
                            transaction.metadata(name),
                        ),
                    )
                    for name, entry in page
                ]
            else:
                kept = [transaction.reference(n) for name, _ in page for n in warm[name]]
                contents = self._memory_store.placing.contents(transaction, kept)
        if recut:
            return self._cut(page, documents, warm)
        payloads = []
        if kept:
            memories = self._memory_store.write(contents)
            payloads = self._memory_store.encode(memories, len(kept))
        with self._store.write() as transaction:
            self._memory_store.require_shape(transaction)
            for reference, payload in zip(kept, payloads, strict=True):
                if transaction.has_reference(reference.id):
                    transaction.put_memory(reference, payload)
            self._came(transaction, page)
        return len(kept), 0

    def _cut(
        self,
        page: list[tuple[str, DocumentEntry]],
        documents: list[tuple[str, Document]],
        warm: dict[str, list[int]],
    ) -> tuple[int, int]:
        pieces = [
            (name, one, self._chunker.split(one.text, id=name, title=title_of(one.metadata)))
            for name, one in documents
        ]
        ready = embedded(pieces, self._attached.embedder())
        written = 0
        cut = []
        for item in ready:
            if warm[item.id]:
                made = self._memory_store.write([piece.placed for piece in item.pieces])
                item = replace(item, memories=self._memory_store.encode(made, len(item.pieces)))
                written += len(item.pieces)
            cut.append(item)
        with self._store.write() as transaction:
            self._memory_store.require_shape(transaction)
            for (name, entry), item in zip(page, cut, strict=True):
                old = transaction.document(name)
                if old is not None and old.references == entry.references:
                    # Else another writer was here meanwhile, with the new settings. (One of new
                    # metadata alone left the references as they were.)
                    put(transaction, item.with_metadata(transaction.metadata(name)))
            self._came(transaction, page)
        return written, len(page)

    @staticmethod
    def _came(transaction: Transaction, page: list[tuple[str, DocumentEntry]]) -> None:
        pending = transaction.required_setting(PENDING)
        transaction.put_setting(PENDING, {**pending, "after": page[-1][0]})
