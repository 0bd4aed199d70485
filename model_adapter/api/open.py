"""`open_database`: a database with the parts that it records."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Unpack

from memdb import Durability, MemDB
from model_adapter.api.embedders import embedder_of
from model_adapter.catalog import Notify
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.loading_options import LoadingOptions

if TYPE_CHECKING:  # what loads torch is loaded when the model is needed
    from model_adapter.models.language_model import LanguageModel
    from model_adapter.writing.writer import Writer


def open_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel | None = None,
    adapter: str | None = None,
    embedder: str | SentenceEmbedder | None = None,
    durability: Durability = "full",
    cache_bytes: int = 256 << 20,
    busy_timeout: float = 30.0,
    read_only: bool = False,
    embedder_device: str | None = None,
    notify: Notify = lambda _: None,
    **loading: Unpack[LoadingOptions],
) -> MemDB:
    """Open a database with the model, the adapter and the embedder that it records, or with others
    that match.

    Recorded ones are loaded when they are first needed; those given are checked at once. `adapter`
    is a name of the catalogue, a folder, or `none`. For `durability`, `cache_bytes`, `busy_timeout`
    and `read_only` see `memdb.MemDB.open`; for `device`, `dtype` and the rest, `Loading`. What the
    model computes in need not be what the memories are stored in: one made in bfloat16 on a GPU is
    read, and written on, in float32 on a CPU.

    Raises:
        NotADatabaseError: there is none.
        MismatchError: the model, the adapter or the embedder is another than the one recorded.
    """
    with MemDB.open(path, busy_timeout=busy_timeout, read_only=read_only) as database:
        settings, shape = database.settings, database.shape

    def writer(source: str | LanguageModel) -> Writer:
        from model_adapter.api.recorded_writer import recorded_writer

        return recorded_writer(path, settings, shape, source, adapter, notify, **loading)

    def vectors(source: str | SentenceEmbedder) -> SentenceEmbedder:
        return embedder_of(source, notify, embedder_device, loading)

    def part(given: Any, recorded: str | None, make: Any) -> Any:
        if given is not None:
            return make(given)
        return None if recorded is None else lambda: make(recorded)

    if adapter is not None and model is None:
        model = settings["model"]["name"]  # given, so that it is checked at once
    return MemDB.open(
        path,
        embedder=part(embedder, settings["embedder"]["name"], vectors),
        writer=part(model, settings["model"]["name"], writer),
        durability=durability,
        cache_bytes=cache_bytes,
        busy_timeout=busy_timeout,
        read_only=read_only,
    )
