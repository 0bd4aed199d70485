"""Databases with their parts: made for a model and an embedder, opened with those they record."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from memdb import Framing, InvalidInputError, MemDB
from model_adapter.catalog import DEFAULT_EMBEDDER, DEFAULT_MODEL, Notify, source_key
from model_adapter.embedder import SentenceEmbedder
from model_adapter.language_model import LanguageModel, load_model
from model_adapter.selection import DEFAULT_SELECTION
from model_adapter.writer import Writer

_embedders: dict[object, SentenceEmbedder] = {}
_loading = threading.Lock()


def load_embedder(name: str, notify: Notify = lambda _: None) -> SentenceEmbedder:
    """`SentenceEmbedder`, once per process and name; again if its folder changed."""
    with _loading:
        embedder = _embedders.get(source_key(name))
        if embedder is None:
            embedder = SentenceEmbedder(name, notify)
            _embedders[source_key(name)] = embedder  # as it is now that it is pulled
        return embedder


def create_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel = DEFAULT_MODEL,
    embedder: str | SentenceEmbedder = DEFAULT_EMBEDDER,
    framing: Framing | None = None,
    layers: Sequence[int] | None = None,
    selection: str = DEFAULT_SELECTION,
    budget: int | None = None,
    codec: str = "int8",
    notify: Notify = lambda _: None,
) -> MemDB:
    """Make a database for a model and an embedder, and open it.

    Args:
        path: a folder that is missing or empty.
        model: a name of the catalogue (pulled if need be), a folder, a Hugging Face id, or a model.
        embedder: likewise.
        framing: `plain` or `chat`; fixed for the database. Default: `chat` where the model has a
            template.
        layers: memory layers; default: all.
        selection: which key-values are kept: `reconstruction` or `paper`.
        budget: how many of a 128-token reference; default: the selection's.
        codec: how they are stored: `int8` or `exact`.
        notify: told when a model is pulled.

    Raises:
        DatabaseExistsError: there is one already.
        InvalidInputError: a model cannot be loaded, or an option is wrong.
        UnsupportedModelError: the model cannot be used.
    """
    writer = Writer(
        load_model(model, notify) if isinstance(model, str) else model,
        framing=framing,
        layers=layers,
        selection=selection,
        budget=budget,
    )
    vectors = load_embedder(embedder, notify) if isinstance(embedder, str) else embedder
    return MemDB.create(path, embedder=vectors, writer=writer, codec=codec)


def open_database(
    path: str | os.PathLike[str],
    *,
    model: str | LanguageModel | None = None,
    embedder: str | SentenceEmbedder | None = None,
    notify: Notify = lambda _: None,
) -> MemDB:
    """Open a database with the model and the embedder that it records, or with others that match.

    Recorded ones are loaded when they are first needed; those given are checked at once.

    Raises:
        NotADatabaseError: there is none.
        MismatchError: the model or the embedder is another than the one recorded.
    """
    with MemDB.open(path) as database:
        settings, shape = database.settings, database.shape

    def writer(source: str | LanguageModel) -> Writer:
        memory = settings["memory"]
        if "selection" not in memory:
            raise InvalidInputError(
                f"the database '{path}' was made without a model: it takes memories, it cannot "
                "write them"
            )
        return Writer(
            load_model(source, notify, shape.dtype) if isinstance(source, str) else source,
            framing=shape.framing,
            layers=shape.layers,
            selection=memory["selection"],
            budget=memory["budget"],
            reference_length=shape.reference_length,
            prefix=shape.prefix,
        )

    def vectors(source: str | SentenceEmbedder) -> SentenceEmbedder:
        return load_embedder(source, notify) if isinstance(source, str) else source

    def part(given: Any, recorded: str | None, make: Any) -> Any:
        if given is not None:
            return make(given)
        return None if recorded is None else lambda: make(recorded)

    return MemDB.open(
        path,
        embedder=part(embedder, settings["embedder"]["name"], vectors),
        writer=part(model, settings["model"]["name"], writer),
    )
