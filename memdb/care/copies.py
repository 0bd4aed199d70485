"""Backup and restore: a copy of the whole database, made while others read and write."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress

from memdb.care.generations import new_identity, write_generation
from memdb.care.verify import INDEX, verify
from memdb.errors import StorageError
from memdb.index.ann import FILE
from memdb.protocols import Progress, no_progress
from memdb.storage.durable import sync
from memdb.storage.folder import exists, new_database, new_generation, sole_writer
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.store import Store
from memdb.types import arguments


def backup(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> int:
    """See `memdb.backup`; of one folder, without its namespaces."""
    target = arguments.path(to, "the copy's path")
    arguments.function(progress, "progress")
    folder = arguments.path(path, "the database's path")
    store = Store(folder, read_only=True, busy_timeout=busy_timeout)
    try:
        with new_database(target, store.busy_timeout) as generation, store.read() as transaction:
            progress("copying", 0, 0)
            with suppress(FileNotFoundError):  # first, so that it is of no later state
                shutil.copyfile(transaction.generation / FILE, generation / FILE)
            transaction.copy_file(generation)
            size = 0
            for file in generation.iterdir():
                size += file.stat().st_size
                sync(file)
        return size
    finally:
        store.close()


def restore(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> None:
    """See `memdb.restore`; of one folder, without its namespaces."""
    folder = arguments.path(path, "the database's path")
    backed_up = arguments.path(source, "the backup's path")
    require_whole(backed_up, busy_timeout, progress)
    store = Store(backed_up, read_only=True, busy_timeout=busy_timeout)
    timeout = store.busy_timeout
    try:
        with ExitStack() as stack:
            if exists(folder):
                stack.enter_context(sole_writer(folder, timeout))
                generation = stack.enter_context(new_generation(folder, timeout))
            else:
                generation = stack.enter_context(new_database(folder, timeout))
            transaction = stack.enter_context(store.read())
            write_generation(generation, transaction, new_identity, progress)
    finally:
        store.close()


def require_whole(source: str | os.PathLike[str], busy_timeout: float, progress: Progress) -> None:
    """Raise `StorageError` if a backup is damaged, but for its index, which is made anew."""
    found = verify(source, busy_timeout=busy_timeout, progress=progress)
    problems = [problem for problem in found if problem.table != INDEX]
    if problems:
        raise StorageError(
            f"the backup '{source}' is damaged ({len(problems)} problems, the first: "
            f"{problems[0]}); nothing was restored. `memdb verify --db {source}` lists them all"
        )
