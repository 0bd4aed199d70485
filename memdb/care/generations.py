"""A new generation in the place of the one in use: compaction and migration."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from memdb.errors import BusyError, FormatError
from memdb.filters.declared import reindex
from memdb.index.ann import write_index
from memdb.index.build import build_index
from memdb.index.policy import IndexPolicy
from memdb.protocols import Progress, no_progress
from memdb.storage.copying import Step, copy_records, format_version, older_generation
from memdb.storage.environment import is_open
from memdb.storage.folder import current_generation, exclusively, new_generation, sole_writer
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import FORMAT_VERSION, POSTINGS, REFERENCES, SETTINGS, TABLES
from memdb.storage.store import Store, checked_timeout
from memdb.storage.transaction import Transaction
from memdb.storage.usage import read_usage, write_usage
from memdb.types import arguments


def compact(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """See `memdb.compact`; of one folder, without its namespaces."""
    folder = arguments.path(path, "the database's path")
    arguments.function(progress, "progress")
    store = Store(folder, busy_timeout=busy_timeout)  # refuses what is none of this release
    try:
        with sole_writer(folder, store.busy_timeout) as generation:
            before = _bytes(generation)
            with store.read() as transaction:
                after = _renew(folder, transaction, lambda _: None, store.busy_timeout, progress)
        return before, after
    finally:
        store.close()


def migrate(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """See `memdb.migrate`; of one folder, without its namespaces."""
    folder = arguments.path(path, "the database's path")
    busy_timeout = checked_timeout(busy_timeout)
    arguments.function(progress, "progress")
    if is_open(current_generation(folder)):
        raise BusyError(
            f"'{folder}' is open in this process, so it is up to date already. Close it first if "
            "you want to be sure"
        )
    with ExitStack() as stack:
        # A process of the release before keeps the lock while it has the database open.
        with exclusively(folder):
            pass
        # In the order of all who replace a generation, or two would wait for each other.
        generation = stack.enter_context(sole_writer(folder, busy_timeout))
        stack.enter_context(exclusively(folder, busy_timeout))
        begin = stack.enter_context(older_generation(generation))
        version = format_version(begin(SETTINGS))
        if version == FORMAT_VERSION:
            return version, version
        if version != 1:
            raise FormatError(
                f"'{folder}' has format version {version}; this release brings version 1 up to "
                f"{FORMAT_VERSION}"
            )
        source = begin(*(name for name in TABLES if name != POSTINGS))
        _renew(folder, source, _from_version_1, busy_timeout, progress, locked=True)
    return version, FORMAT_VERSION


def _from_version_1(transaction: Transaction) -> None:
    """Version 2 has the table `postings`, and the setting `index`."""
    transaction.put_setting(
        "format",
        {**transaction.required_setting("format"), "version": FORMAT_VERSION},
    )
    transaction.put_setting("index", IndexPolicy().to_json())


def _renew(
    folder: Path,
    source: Transaction,
    settle: Step,
    timeout: float,
    progress: Progress,
    *,
    locked: bool = False,
) -> int:
    """Write what a transaction sees into a new generation, and make that the current; returns the
    bytes of its files."""
    old = current_generation(folder)
    with new_generation(folder, timeout, locked=locked) as generation:
        used = read_usage(old)
        write_generation(generation, source, settle, progress)
        there = {number for number in used if source.has_reference(number)}
        write_usage(generation, Counter({number: used[number] for number in there}))
        return _bytes(generation)


def write_generation(
    generation: Path, source: Transaction, settle: Step, progress: Progress
) -> None:
    """Copy all records into an empty generation, durably, but for the change log, and build its
    index.

    Raises:
        CorruptRecordError: a record that something is derived from is damaged.
        StorageError: the disk refuses.
    """

    def whole(transaction: Transaction) -> None:
        settle(transaction)
        transaction.cut_log(transaction.setting("counters")["last_change"])
        reindex(transaction, progress)

    copy_records(
        source,
        generation,
        whole,
        lambda transaction: _build_index(transaction, generation, progress),
        progress,
    )


def _build_index(transaction: Transaction, generation: Path, progress: Progress) -> None:
    policy = IndexPolicy.of(transaction)
    if policy.wants_file(transaction.count(REFERENCES)):
        built, info = build_index(
            transaction,
            transaction.required_setting("format")["id"],
            transaction.required_setting("embedder")["dimension"],
            policy.recall,
            None,
            progress,
            lambda: False,
        )
        write_index(built, info, generation)


def new_identity(transaction: Transaction) -> None:
    """Make a copy a database of its own."""
    stored = transaction.required_setting("format")
    transaction.put_setting("format", {**stored, "id": secrets.token_hex(16)})


def _bytes(generation: Path) -> int:
    size = 0
    for file in generation.iterdir():
        with suppress(FileNotFoundError):  # an index that another one just took the place of
            size += file.stat().st_size if file.is_file() else 0
    return size
