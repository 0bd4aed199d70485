"""Export and import of whole databases, through the files of `memdb.exchange`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdb.batch import MemoryBatch
from memdb.bulk import Batch, LoadReport
from memdb.chunking import Chunker, Piece
from memdb.errors import InvalidInputError, MismatchError
from memdb.exchange import ExportWriter, Manifest, Part, read_export
from memdb.folder import exists
from memdb.keys import checked_keys
from memdb.layout import DOCUMENTS
from memdb.protocols import Progress, no_progress
from memdb.records import Document, MemoryShape
from memdb.remembering import Rememberer
from memdb.rules import IndexRules
from memdb.store import Store
from memdb.transaction import Transaction

if TYPE_CHECKING:
    from memdb.database import MemDB

_TOLD_EVERY = 100  # documents
_SETTINGS = ("embedder", "model", "memory")


def export(
    transaction: Transaction,
    folder: Path,
    *,
    shape: MemoryShape,
    rememberer: Rememberer,
    arrays: bool,
    progress: Progress,
) -> int:
    """See `MemDB.export`."""
    total = transaction.count(DOCUMENTS)
    done = 0
    with ExportWriter(
        folder,
        shape=shape,
        settings={name: transaction.required_setting(name) for name in _SETTINGS},
        keys=transaction.keys,
        tokenizer=transaction.tokenizer(),
    ) as writer:
        for name, entry in transaction.documents():
            if done % _TOLD_EVERY == 0:
                progress("exporting documents", done, total)
            references = [transaction.reference(number) for number in entry.references]
            stored = [rememberer.stored(transaction, number) for number in entry.references]
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


def import_database(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    progress: Progress = no_progress,
) -> LoadReport:
    """Bring an export in, or embeddings and memories that were computed elsewhere and written in
    the same form (`memdb.exchange` says which).

    If there is no database, one is made with the export's settings. Documents that are there with
    the same content stay, with other content they are replaced; an interrupted import goes on when
    it is called again.

    Args:
        source: the export's folder.
        path: the database.
        progress: told of the work.

    Raises:
        InvalidInputError: the export is wrong; file, line or tensor is named.
        MismatchError: the database is for another model or embedder.
    """
    from memdb.database import MemDB  # which has `export` from here

    folder, target = Path(source), Path(path)
    manifest, _ = read_export(folder)
    if not exists(target):
        _create(target, manifest, folder)
    with MemDB.open(target) as database:
        _require_same(database, manifest, folder)
        _, parts = read_export(folder, database.split)
        report = database.load(_batches(parts), progress=progress)
        database.index_if_due(progress)
    return report


def _batches(parts: Iterator[Part]) -> Iterator[Batch]:
    for part in parts:
        entries = part.entries
        yield Batch(
            documents=[entry.document for entry in entries],
            embeddings=part.embeddings,
            memories=part.memories,
            pieces=[entry.pieces for entry in entries],
            versions=[entry.version or 1 for entry in entries],
        )


def _create(path: Path, manifest: Manifest, source: Path) -> None:
    if manifest.shape is None or manifest.dimension is None:
        raise InvalidInputError(
            f"'{source}' does not say what memory shape and embedder it is for, so no database can "
            "be made of it; make one with `memdb init`, and import into that"
        )
    embedder = {"name": None, "fingerprint": None, **manifest.settings["embedder"]}
    settings: dict[str, Any] = {
        "shape": manifest.shape.to_json(),
        "embedder": embedder,
        "model": {"name": None, **manifest.settings.get("model", {})},
        "memory": {"codec": "int8", **manifest.settings.get("memory", {})},
        "index": IndexRules(keys=checked_keys(manifest.keys)).to_json(),
    }
    Chunker(manifest.tokenizer, manifest.shape.reference_length).count("")  # loads, or is refused
    Store.create(path, settings, manifest.tokenizer)


def _require_same(database: MemDB, manifest: Manifest, source: Path) -> None:
    if manifest.shape is not None:
        database.shape.require_equal(manifest.shape, f"the export '{source}'")
    mine = database.settings["embedder"]
    theirs = manifest.settings.get("embedder", {})
    for name in ("dimension", "fingerprint"):
        given = theirs.get(name)
        if given is not None and mine[name] is not None and given != mine[name]:
            raise MismatchError(
                f"the export '{source}' is of another embedder: its {name} is {given!r}, the "
                f"database's {mine[name]!r}"
            )
