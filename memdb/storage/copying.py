"""A generation's records put into a fresh environment one by one. (LMDB's own copy takes over whole
pages, and with them what was deleted from these.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from memdb.errors import NotADatabaseError, StorageError
from memdb.protocols import Progress
from memdb.storage.lmdb_file import (
    FOREIGN,
    LmdbFile,
    complete,
    lmdb_file,
    map_size,
    open_tables,
)
from memdb.storage.record_layout import CHANGES, POSTINGS, TABLES
from memdb.storage.transaction import Transaction

_BYTES = 64 << 20  # copied to a transaction

Step = Callable[[Transaction], None]


def copy_records(
    source: Transaction, generation: Path, settle: Step, derive: Step, progress: Progress
) -> None:
    """Copy the tables that there are into an empty generation, durably, but for those that are
    derived from the others.

    Args:
        source: what to copy.
        generation: an empty folder.
        settle: changes the copy before it is whole: settings, and what is derived from records.
        derive: reads the copy once that is on the disk: what lies beside it in files.
        progress: told of the work.

    Raises:
        CorruptRecordError: a record that something is derived from is damaged.
        StorageError: the disk refuses.
    """
    try:
        with ExitStack() as stack:
            # Nobody reads it before it is done: one wait for the disk, at the end, is enough.
            room = 2 * source.pages_size()
            environment = stack.enter_context(lmdb_file(generation, room=room, sync=False))
            new = open_tables(environment, TABLES, create=True)
            for table in TABLES:
                if source.has_table(table) and table not in (CHANGES, POSTINGS):
                    _copy(source, environment, new[table], table, progress)
            with environment.begin(write=True, buffers=True) as inner:
                settle(Transaction(inner, new))
            environment.sync(True)
            with environment.begin(buffers=True) as inner:
                derive(Transaction(inner, new))
    except lmdb.Error as error:
        raise StorageError(f"cannot write '{generation}': {error}") from error


def _copy(source: Transaction, environment: Any, new: Any, table: str, progress: Progress) -> None:
    total = source.count(table)
    done = 0
    records = source.records(table)
    while batch := list(_some(records)):
        with environment.begin(write=True) as inner:
            inner.cursor(new).putmulti(batch, append=True)
        done += len(batch)
        progress(f"copying {table}", done, total)


def _some(records: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Records of about as many bytes as a transaction takes."""
    size = 0
    for key, record in islice(records, 65536):
        yield key, record
        size += len(record)
        if size > _BYTES:
            return


@contextmanager
def older_generation(generation: Path) -> Iterator[Callable[..., Transaction]]:
    """A generation of any format version, to be read: gives a function that begins a transaction
    over the named tables. All end with this.

    Raises:
        NotADatabaseError: the files are not a database's, or a table is not there.
        StorageError: it cannot be opened.
    """
    folder = generation.parent
    with ExitStack() as stack:
        try:
            file = LmdbFile(generation, map_size(0, 0))
        except FOREIGN as error:
            raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error
        except lmdb.Error as error:
            raise StorageError(f"cannot open '{generation}': {error}") from error
        stack.callback(file.close)
        environment = file.inner
        complete(file, generation / "data.mdb")

        def begin(*tables: str) -> Transaction:
            try:
                handles = open_tables(environment, tables)
            except FOREIGN as error:
                raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error
            return Transaction(stack.enter_context(environment.begin(buffers=True)), handles)

        yield begin


def format_version(transaction: Transaction) -> int:
    """The format version that a database says it has; -1 if it says none."""
    version = transaction.required_setting("format").get("version")
    return version if isinstance(version, int) else -1
