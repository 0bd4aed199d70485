"""Import of an export, or of what other programs wrote in the same form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memdb.database import DEFAULT_CODEC, MemDB
from memdb.errors import InvalidInputError, MismatchError
from memdb.exchange import ExportPart, Manifest, read_export
from memdb.filters.declared import checked_keys
from memdb.index.policy import IndexPolicy
from memdb.ingest.chunking import Chunker
from memdb.ingest.load import DocumentBatch, LoadReport
from memdb.protocols import Progress, no_progress
from memdb.storage.folder import exists
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import CALIBRATION, CUTTING
from memdb.storage.store import Store, checked_timeout
from memdb.types import arguments
from memdb.types.cutting import Cutting


def import_database(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
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
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        InvalidInputError: the export is wrong; file, line or tensor is named.
        MismatchError: the database is for another model or embedder.
        BusyError: a writer is not done in time.
    """
    folder = arguments.path(source, "the export's folder")
    target = arguments.path(path, "the database's path")
    busy_timeout = checked_timeout(busy_timeout)
    arguments.function(progress, "progress")
    manifest, _ = read_export(folder)
    if not exists(target):
        _create(target, manifest, folder, busy_timeout)
    else:
        _add_codecs(target, manifest, busy_timeout)
    with MemDB.open(target, busy_timeout=busy_timeout) as database:
        _require_same(database, manifest, folder)
        _, parts = read_export(folder, database.split)
        report = database.load(_batches(parts), progress=progress)
        database.index_if_due(progress)
    return report


def _batches(parts: Iterator[ExportPart]) -> Iterator[DocumentBatch]:
    for part in parts:
        entries = part.entries
        yield DocumentBatch(
            documents=[entry.document for entry in entries],
            embeddings=part.embeddings,
            memories=part.memories,
            pieces=[entry.pieces for entry in entries],
            versions=[entry.version or 1 for entry in entries],
        )


def _create(path: Path, manifest: Manifest, source: Path, busy_timeout: float) -> None:
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
        "memory": _memory(manifest),
        "index": IndexPolicy(keys=checked_keys(manifest.keys)).to_json(),
    }
    for name in (CALIBRATION, CUTTING):
        if name in manifest.settings:
            settings[name] = manifest.settings[name]
    Chunker(manifest.tokenizer, manifest.shape.reference_length).count("")  # loads, or is refused
    Store.create(path, settings, manifest.tokenizer, manifest.codecs, busy_timeout=busy_timeout)


def _memory(manifest: Manifest) -> dict[str, Any]:
    """The setting `memory`; a fitted codec only if its parameters came too."""
    memory = {"codec": DEFAULT_CODEC, **manifest.settings.get("memory", {})}
    if memory.get("fitted") not in manifest.codecs:
        memory.pop("fitted", None)
    return memory


def _add_codecs(path: Path, manifest: Manifest, busy_timeout: float) -> None:
    """What stored memories are decoded with, before they come."""
    if not manifest.codecs:
        return
    store = Store(path, busy_timeout=busy_timeout)
    try:
        with store.write() as transaction:
            for name, parameters in manifest.codecs.items():
                transaction.put_codec_parameters(name, parameters)
    finally:
        store.close()


def _require_same(database: MemDB, manifest: Manifest, source: Path) -> None:
    if manifest.shape is not None:
        database.shape.require_equal(manifest.shape, f"the export '{source}'")
    placed = Cutting.from_json(manifest.settings.get(CUTTING)).place
    if placed != database.settings[CUTTING]["place"]:
        have = ("have no place", "have a place")
        raise MismatchError(
            f"references of the export '{source}' {have[placed]}, those of the database "
            f"{have[not placed]} (the setting 'cutting'), so neither their vectors nor their "
            "memories can be compared; import into a database of its own"
        )
    mine = database.settings["embedder"]
    theirs = manifest.settings.get("embedder", {})
    for name in ("dimension", "fingerprint"):
        given = theirs.get(name)
        if given is not None and mine[name] is not None and given != mine[name]:
            raise MismatchError(
                f"the export '{source}' is of another embedder: its {name} is {given!r}, the "
                f"database's {mine[name]!r}"
            )
