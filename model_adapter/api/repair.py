"""`repair_database`: a damaged database, mended."""

from __future__ import annotations

import os

from memdb import Embedder, InvalidInputError, MemDB, Progress, Repair, no_progress, repair
from model_adapter.api.embedders import load_embedder
from model_adapter.catalog import Notify


def repair_database(
    path: str | os.PathLike[str],
    *,
    embedder: str | None = None,
    embedder_device: str | None = None,
    drop: bool = False,
    aside: str | os.PathLike[str] | None = None,
    busy_timeout: float = 30.0,
    progress: Progress = no_progress,
    notify: Notify = lambda _: None,
) -> Repair:
    """Mend a database (`memdb.repair`), with the embedder that it records if one is needed."""

    def load() -> Embedder:
        if embedder is not None:
            return load_embedder(embedder, notify, device=embedder_device)
        with MemDB.open(path, busy_timeout=busy_timeout) as database:
            name = database.settings["embedder"]["name"]
        if name is None:
            raise InvalidInputError(f"the database '{path}' records no embedder; say which it is")
        return load_embedder(name, notify, device=embedder_device)

    return repair(
        path,
        embedder=load,
        drop=drop,
        aside=aside,
        busy_timeout=busy_timeout,
        progress=progress,
    )
