"""A new generation in the place of the one in use: compaction and migration.

All records are put into a fresh environment one by one. (LMDB's own copy takes over whole pages,
and with them what was deleted from these.)
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from memdb import layout
from memdb.environment import FOREIGN, complete, open_lmdb, open_tables
from memdb.errors import FormatError, NotADatabaseError, StorageError
from memdb.folder import current_generation, exclusively, new_generation, sole_writer
from memdb.index.ann import write_index
from memdb.index.build import build_index
from memdb.keys import reindex
from memdb.layout import CHANGES, POSTINGS, REFERENCES, SETTINGS, TABLES, integer_key
from memdb.protocols import Progress, no_progress
from memdb.rules import IndexRules
from memdb.store import Store
from memdb.transaction import Transaction
from memdb.usage import read_usage, write_usage

_BYTES = 64 << 20  # copied to a transaction

#: Changes the settings of the copy.
Settle = Callable[[Transaction], None]


def compact(path: str | os.PathLike[str], *, progress: Progress = no_progress) -> tuple[int, int]:
    """Write the database anew without what was deleted, and give the space back.

    Nothing that was deleted or replaced is in the folder afterwards: not in the records, the index,
    the change log, or the free space of pages. (Who reads the state before it, in a snapshot, goes
    on doing so until that ends; backups and exports are copies of their own; and what the disk does
    with blocks that it gives back is the disk's matter.) The index is built anew.

    Returns:
        Bytes of the database's files before and after.

    Raises:
        NotADatabaseError: there is none.
        StorageError: the disk is full; the database is as it was.
    """
    folder = Path(path)
    store = Store(folder)  # refuses what is no database of this release
    try:
        with sole_writer(folder) as generation:
            before = _bytes(generation)
            with store.read() as transaction:
                source, tables = transaction.inner, transaction.tables
                _renew(folder, source, tables, lambda _: None, progress)
        after = current_generation(folder)
        return before, _bytes(after)
    finally:
        store.close()


def migrate(path: str | os.PathLike[str], *, progress: Progress = no_progress) -> tuple[int, int]:
    """Bring a database of an older format version up to date.

    Until it is done the old generation is the database. Processes of an older release must have
    closed it.

    Returns:
        The format version before and after.

    Raises:
        NotADatabaseError: there is none.
        FormatError: it is of a version that this release does not know.
        StorageError: the disk is full; the database is as it was.
    """
    folder = Path(path)
    current_generation(folder)
    with ExitStack() as stack:
        # A process of the release before keeps the lock while it has the database open.
        stack.enter_context(exclusively(folder))
        generation = stack.enter_context(sole_writer(folder))
        environment = _opened(generation, stack)
        settings = _tables(environment, folder, [SETTINGS])
        with environment.begin(buffers=True) as inner:
            version = _version(Transaction(inner, settings))
        if version == layout.FORMAT_VERSION:
            return version, version
        if version != 1:
            raise FormatError(
                f"'{folder}' has format version {version}; this release brings version 1 up to "
                f"{layout.FORMAT_VERSION}"
            )
        tables = _tables(environment, folder, [name for name in TABLES if name != POSTINGS])
        with environment.begin(buffers=True) as inner:
            _renew(folder, inner, tables, _from_version_1, progress, locked=True)
    return version, layout.FORMAT_VERSION


def _from_version_1(transaction: Transaction) -> None:
    """Version 2 has the table `postings`, and the setting `index`."""
    transaction.put_setting(
        "format", {**transaction.required_setting("format"), "version": layout.FORMAT_VERSION}
    )
    transaction.put_setting("index", IndexRules().to_json())


def _version(transaction: Transaction) -> int:
    stored = transaction.required_setting("format")
    version = stored.get("version")
    return version if isinstance(version, int) else -1


def _opened(generation: Path, stack: ExitStack) -> Any:
    try:
        environment = open_lmdb(generation)
    except FOREIGN as error:
        raise NotADatabaseError(f"'{generation.parent}' is no memdb database: {error}") from error
    except lmdb.Error as error:
        raise StorageError(f"cannot open '{generation}': {error}") from error
    stack.callback(environment.close)
    complete(environment, generation / "data.mdb")
    return environment


def _tables(environment: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    try:
        return open_tables(environment, names)
    except FOREIGN as error:
        raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error


def _renew(
    folder: Path,
    source: Any,
    tables: dict[str, Any],
    settle: Settle,
    progress: Progress,
    *,
    locked: bool = False,
) -> None:
    """Write what a transaction of LMDB sees into a new generation, and make that the current."""
    used = read_usage(current_generation(folder))
    with new_generation(folder, locked=locked) as generation:
        write_generation(generation, source, tables, settle, progress)
        there = {n for n in used if source.get(integer_key(n), db=tables[REFERENCES]) is not None}
        write_usage(generation, Counter({n: used[n] for n in there}))


def write_generation(
    generation: Path, source: Any, tables: dict[str, Any], settle: Settle, progress: Progress
) -> None:
    """Copy tables into an empty generation, durably, but for the change log, and build its index.

    Raises:
        CorruptRecordError: a record that something is derived from is damaged.
        StorageError: the disk refuses.
    """
    try:
        with ExitStack() as stack:
            # Nobody reads it before it is done: one wait for the disk, at the end, is enough.
            environment = open_lmdb(generation, sync=False)
            stack.callback(environment.close)
            new = open_tables(environment, TABLES, create=True)
            for table in TABLES:
                if table in tables and table not in (CHANGES, POSTINGS):
                    _copy(source, tables[table], environment, new[table], table, progress)
            with environment.begin(write=True, buffers=True) as inner:
                transaction = Transaction(inner, new)
                settle(transaction)
                counters = transaction.setting("counters")
                trimmed = {"trimmed": counters["last_change"]}
                transaction.put_setting("counters", {**counters, **trimmed})
                reindex(transaction, progress)
            environment.sync(True)
            with environment.begin(buffers=True) as inner:
                _build_index(Transaction(inner, new), generation, progress)
    except lmdb.Error as error:
        raise StorageError(f"cannot write '{generation}': {error}") from error


def _build_index(transaction: Transaction, generation: Path, progress: Progress) -> None:
    rules = transaction.index_rules
    if rules.wants_file(transaction.count(REFERENCES)):
        index, info = build_index(
            transaction,
            transaction.required_setting("format")["id"],
            transaction.required_setting("embedder")["dimension"],
            rules.recall,
            None,
            progress,
            lambda: False,
        )
        write_index(index, info, generation)


def new_identity(transaction: Transaction) -> None:
    """Make a copy a database of its own."""
    stored = transaction.required_setting("format")
    transaction.put_setting("format", {**stored, "id": secrets.token_hex(16)})


def _copy(
    source: Any, table: Any, environment: Any, new: Any, name: str, progress: Progress
) -> None:
    total = source.stat(table)["entries"]
    done = 0
    records = iter(source.cursor(table))
    while batch := list(_some(records)):
        with environment.begin(write=True) as inner:
            inner.cursor(new).putmulti(batch, append=True)
        done += len(batch)
        progress(f"copying {name}", done, total)


def _some(records: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Records of about as many bytes as a transaction takes."""
    size = 0
    for key, record in islice(records, 65536):
        yield key, record
        size += len(record)
        if size > _BYTES:
            return


def _bytes(generation: Path) -> int:
    return sum(file.stat().st_size for file in generation.iterdir() if file.is_file())
