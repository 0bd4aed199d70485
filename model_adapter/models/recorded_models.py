"""The model and the adapter that a database records, or that somebody gives for it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from memdb import InvalidInputError, MemoryShape, MismatchError
from model_adapter.catalog import Notify
from model_adapter.models.adapters import NONE, chosen_adapter, is_there
from model_adapter.models.language_model import LanguageModel, load_model
from model_adapter.models.loading_options import LoadingOptions


def language_of(
    source: str | LanguageModel,
    given: str | None,
    adapter: Callable[[str], str | None],
    notify: Notify,
    **loading: Unpack[LoadingOptions],
) -> LanguageModel:
    """A model with its adapter, by their names, or as it is given."""
    if isinstance(source, str):
        return load_model(source, notify, adapter=adapter(source), **loading)
    of_loading = ("device", "dtype", "device_map", "revision", "quantization_config")
    given_too = [name for name in of_loading if loading.get(name) is not None]
    if given_too:
        raise InvalidInputError(
            f"a model that is loaded is where it is, as it is: {', '.join(given_too)} goes with a "
            "model's name, or with LanguageModel.load"
        )
    if loading.get("exact") and not source.is_exact:
        raise InvalidInputError(
            "the model that is given reads by weights of 8 bits; load one that reads by the exact "
            "ones: LanguageModel.load(..., exact=True)"
        )
    mine = NONE if source.adapter is None else source.adapter.name
    if given is not None and given != mine:
        raise InvalidInputError(
            f"a model that is loaded has its adapter already (it is '{mine}', not '{given}'): give "
            "its name, or LanguageModel.load(..., adapter=...)"
        )
    return source


def language_for_new(
    source: str | LanguageModel,
    adapter: str | None,
    notify: Notify,
    **loading: Unpack[LoadingOptions],
) -> LanguageModel:
    """A model for new memories: with the adapter that is given, or the catalogue's for it."""
    chosen = lambda name: chosen_adapter(adapter, name, new=True)  # noqa: E731
    return language_of(source, adapter, chosen, notify, **loading)


def recorded_adapter(memory: Mapping[str, Any], given: str | None) -> str | None:
    """The adapter to load for a database: the one given, else the one that it records."""
    if given is not None:
        return None if given == NONE else given
    name: str | None = memory.get("adapter")
    if name is not None and not is_there(name):
        raise InvalidInputError(
            f"the database records the adapter '{name}', which is no longer there: say where it is "
            "now (--adapter FOLDER), or write the memories anew without it (memdb rewrite "
            "--adapter none)"
        )
    return name


def require_adapter(
    path: str | os.PathLike[str],
    memory: Mapping[str, Any],
    shape: MemoryShape,
    language: LanguageModel,
) -> None:
    """Raise `MismatchError` where memories were written by another adapter than the model's. One
    that only reads may be any. (What else is another about the model, the engine says.)"""
    adapter = language.adapter if language.adapter and language.adapter.writes else None
    known = language.is_known_as(shape.model, shape.dtype)
    same = (adapter and adapter.fingerprint) == shape.adapter
    if same or not known:
        return
    recorded = NONE if shape.adapter is None else memory.get("adapter", "another one")
    mine = NONE if adapter is None else adapter.name
    if recorded == mine:
        was = f"with the adapter '{recorded}' as it was before it changed"
    else:
        was = "without an adapter" if recorded == NONE else f"with the adapter '{recorded}'"
    has = "has none" if adapter is None else f"has '{mine}'"
    raise MismatchError(
        f"the memories of '{path}' were written {was}, and the model that opens it {has}. Open it "
        f"with the adapter of its memories, or write them anew: "
        f"memdb rewrite --db {shlex.quote(os.fspath(path))} --adapter {shlex.quote(mine)}"
    )
