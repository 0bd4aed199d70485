"""The writer that a database records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

from memdb import InvalidInputError, MemoryShape
from model_adapter.catalog import Notify
from model_adapter.files.measured_file import Head
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.loading_options import LoadingOptions
from model_adapter.models.recorded_models import language_of, recorded_adapter, require_adapter
from model_adapter.writing.head_weight_file import UNWEIGHTED
from model_adapter.writing.writer import Writer


def recorded_writer(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    shape: MemoryShape,
    source: str | LanguageModel,
    adapter: str | None,
    notify: Notify,
    **loading: Unpack[LoadingOptions],
) -> Writer:
    """A writer as the database at `path` records it.

    Args:
        path: to be named in errors.
        settings: the database's.
        shape: of its memories.
        source: the model, or its name.
        adapter: the one to open it with; None: the recorded one.
        notify: told when a model is pulled.
        loading: see `Loading`.

    Raises:
        InvalidInputError: it was made without a model, or a part cannot be loaded.
        MismatchError: memories were written by another adapter than the model's.
    """
    memory = settings["memory"]
    if "selection" not in memory:
        raise InvalidInputError(
            f"the database '{path}' was made without a model: it takes memories, it cannot "
            "write them"
        )
    language = language_of(
        source, adapter, lambda _: recorded_adapter(memory, adapter), notify, **loading
    )
    require_adapter(path, memory, shape, language)
    return Writer(
        language,
        framing=shape.framing,
        layers=shape.layers,
        heads=heads_of(memory),
        selection=memory["selection"],
        budget=memory["budget"],
        floor=memory.get("floor", 0),
        spread=memory.get("spread"),
        head_weights=memory.get("weights", UNWEIGHTED),
        predictor=memory.get("predictor"),
        reference_length=shape.reference_length,
        prefix=shape.prefix,
        dtype=shape.dtype,
    )


def heads_of(memory: Mapping[str, Any]) -> list[Head] | None:
    """The memory heads that a database records; None: all."""
    heads = memory.get("heads")
    return None if heads is None else [(layer, head) for layer, head in heads]
