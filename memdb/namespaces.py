"""Namespaces: several collections in one database, for one model and one embedder, that do not see
each other.

A namespace is a database of its own in the folder of the one that it belongs to. It has its own
documents, ids, versions, index and change log; it is searched alone, so that no filter can be
forgotten; and it is dropped at once. Its model, embedder, codec, cutting, indexed keys and
calibration are those that the database had when it was made.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from memdb.care.rewrite import PENDING
from memdb.errors import DatabaseExistsError, MismatchError, UnknownNamespaceError
from memdb.storage.folder import current_generation, exists
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.namespaces import namespace_folder, namespace_names, remove_namespace
from memdb.storage.record_layout import CALIBRATION, CUTTING
from memdb.storage.store import Store
from memdb.types import arguments

_SETTINGS = ("shape", "embedder", "model", "memory", "index")


def list_namespaces(path: str | os.PathLike[str]) -> list[str]:
    """Names of a database's namespaces, sorted.

    Raises:
        NotADatabaseError: there is no database.
        StorageError: they cannot be listed.
    """
    database = arguments.path(path, "the database's path")
    current_generation(database)
    return namespace_names(database)


def create_namespace(
    path: str | os.PathLike[str], name: str, *, busy_timeout: float = BUSY_TIMEOUT
) -> Path:
    """Make an empty namespace with the settings of the database at `path`; returns its folder. One
    that is there already stays as it is.

    Args:
        path: the database.
        name: 1 to 80 bytes of UTF-8.
        busy_timeout: seconds to wait for a writer in another thread or process.

    Raises:
        InvalidInputError: no namespace can have this name, or `path` is one itself.
        NotADatabaseError: there is no database.
        BusyError: a writer is not done in time.
        MismatchError: it is being rewritten for another model.
    """
    database = arguments.path(path, "the database's path")
    folder = namespace_folder(database, name)
    store = Store(database, busy_timeout=busy_timeout)
    try:
        if exists(folder):
            return folder
        with store.read() as transaction:
            if transaction.setting(PENDING) is not None:
                raise MismatchError(
                    f"'{database}' is being rewritten for another model; end that first "
                    "(`memdb rewrite`), then make the namespace"
                )
            settings = {key: transaction.required_setting(key) for key in _SETTINGS}
            for key in (CALIBRATION, CUTTING):
                value = transaction.optional_setting(key)
                if value is not None:
                    settings[key] = value
            tokenizer = transaction.tokenizer()
            fitted = settings["memory"].get("fitted")
            codecs = {} if fitted is None else {fitted: transaction.codec_parameters(fitted)}
        with suppress(DatabaseExistsError):  # another process was faster
            Store.create(folder, settings, tokenizer, codecs, busy_timeout=store.busy_timeout)
        return folder
    finally:
        store.close()


def existing_namespace(path: str | os.PathLike[str], name: str) -> Path:
    """The folder of a namespace: a database that can be opened.

    Raises:
        InvalidInputError: no namespace can have this name, or `path` is one itself.
        UnknownNamespaceError: it is not there.
    """
    database = arguments.path(path, "the database's path")
    folder = namespace_folder(database, name)
    current_generation(database)
    if not exists(folder):
        known = namespace_names(database)
        there = f"there are {', '.join(map(repr, known[:10]))}" if known else "there is none yet"
        raise UnknownNamespaceError(
            f"'{path}' has no namespace {name!r}; {there}. `memdb namespace create` makes one, and "
            "`MemDB.namespace` opens or makes one"
        )
    return folder


def drop_namespace(path: str | os.PathLike[str], name: str) -> None:
    """Remove a namespace with all that is in it, at once: processes that have it open are told that
    it is gone. (What they hold open is given back when they close it.)

    Raises:
        InvalidInputError: no namespace can have this name.
        UnknownNamespaceError: it is not there.
        StorageError: the disk refuses.
    """
    existing_namespace(path, name)
    remove_namespace(Path(path), name)
