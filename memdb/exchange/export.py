"""Export of a whole database, as the files of `memdb.exchange`."""

from __future__ import annotations

from pathlib import Path

from memdb.exchange import ExportWriter
from memdb.filters.declared import declared_keys
from memdb.ingest.chunking import Piece
from memdb.memories.memory_store import MemoryStore
from memdb.protocols import Progress
from memdb.storage.record_layout import CALIBRATION, CUTTING, DOCUMENTS
from memdb.storage.transaction import Transaction
from memdb.types.document import Document
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape

_TOLD_EVERY = 100  # documents
_SETTINGS = ("embedder", "model", "memory")


def export(
    transaction: Transaction,
    folder: Path,
    *,
    shape: MemoryShape,
    memory_store: MemoryStore,
    arrays: bool,
    progress: Progress,
) -> int:
    """See `MemDB.export`."""
    total = transaction.count(DOCUMENTS)
    done = 0
    settings = {name: transaction.required_setting(name) for name in _SETTINGS}
    for name in (CALIBRATION, CUTTING):
        value = transaction.optional_setting(name)
        if value is not None:
            settings[name] = value
    with ExportWriter(
        folder,
        shape=shape,
        settings=settings,
        keys=declared_keys(transaction),
        tokenizer=transaction.tokenizer(),
        codecs={
            name: transaction.codec_parameters(name)
            for name in ([] if arrays else transaction.fitted_codecs())
        },
    ) as writer:
        for name, entry in transaction.documents():
            if done % _TOLD_EVERY == 0:
                progress("exporting documents", done, total)
            references = [transaction.reference(number) for number in entry.references]
            stored = [memory_store.stored(transaction, number) for number in entry.references]
            memories: MemoryBatch | list[bytes | None]
            if arrays:
                decoded = [None if memory is None else memory.memory for memory in stored]
                memories = MemoryBatch.of(decoded, shape)
            else:
                memories = [None if memory is None else bytes(memory.payload) for memory in stored]
            text = "".join(reference.text for reference in references)
            writer.add(
                Document(text, name, transaction.metadata(name, entry.version)),
                [Piece(reference.text, reference.tokens) for reference in references],
                transaction.embeddings_of(entry.references),
                memories,
                entry.version,
            )
            done += 1
    progress("exporting documents", total, total)
    return done
