"""Care of a database with its namespaces (`memdb.namespaces`): each is looked after like the
database itself, one after the other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from memdb.care import copies, generations
from memdb.care.repair import Repair
from memdb.care.repair import repair as repair_one
from memdb.care.rewrite import RewriteReport
from memdb.care.rewrite import rewrite as rewrite_one
from memdb.care.verify import Problem
from memdb.care.verify import verify as verify_one
from memdb.errors import MemDBError
from memdb.protocols import Embedder, MemoryWriter, Progress, no_progress
from memdb.storage.folder import CURRENT, is_at
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.namespaces import (
    namespace_folder,
    namespace_names,
    remove_dropped,
    remove_namespace,
)
from memdb.types import arguments


def verify(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> list[Problem]:
    """What is wrong with a database; nothing, if the list is empty.

    First LMDB's pages are walked without LMDB, which trusts them; if they are damaged, nothing else
    is looked at. Then all records, in one read transaction; then the index file. Nothing is
    changed, and the medium may be one that cannot be written. Writers wait while the pages are
    walked, in memory that is a small share of the file's size at most.

    Args:
        path: the database.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        NotADatabaseError: there is none.
        FormatError: a format version that this release does not read.
        BusyError: a writer is not done in time.
    """
    problems = verify_one(path, busy_timeout=busy_timeout, progress=progress)
    for name, folder in _namespaces(path):
        with _unless_dropped(folder):
            found = verify_one(folder, busy_timeout=busy_timeout, progress=progress)
            problems.extend(replace(problem, namespace=name) for problem in found)
    return problems


def repair(
    path: str | os.PathLike[str],
    *,
    embedder: Callable[[], Embedder] | None = None,
    drop: bool = False,
    aside: str | os.PathLike[str] | None = None,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> Repair:
    """Mend what `verify` finds; see `memdb.care.repair.repair`.

    Args:
        path: the database.
        embedder: makes the database's embedder, if one is needed.
        drop: whether to delete documents that cannot be mended.
        aside: a folder for what is taken out, with one in it for each namespace; default: the
            database's, and the namespace's.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        NotADatabaseError: there is none.
        StorageError: the disk refuses, also what is to be put aside; nothing was taken out.
        BusyError: a writer is not done in time.
        MemoryError: there is not enough; nothing was changed in the namespace that it is about.
    """
    report = repair_one(
        path,
        embedder=embedder,
        drop=drop,
        aside=aside,
        busy_timeout=busy_timeout,
        progress=progress,
    )
    for name, folder in _namespaces(path):
        with _unless_dropped(folder):
            place = None if aside is None else Path(aside) / folder.name
            more = repair_one(
                folder,
                embedder=embedder,
                drop=drop,
                aside=place,
                busy_timeout=busy_timeout,
                progress=progress,
            )
            report.put_aside.extend(f"namespace '{name}': {what}" for what in more.put_aside)
            report.aside.extend(more.aside)
            report.mended.extend(f"namespace '{name}': {what}" for what in more.mended)
            report.dropped.extend(f"{name}: {document}" for document in more.dropped)
            report.left.extend(replace(problem, namespace=name) for problem in more.left)
    return report


def compact(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """Write the database anew without what was deleted, and give the space back.

    Nothing that was deleted or replaced is in the folder afterwards: not in the records, the index,
    the change log, what a repair put aside, or the free space of pages. (Who reads the state before
    it, in a snapshot, goes on doing so until that ends; backups and exports are copies of their
    own; and what the disk does with blocks that it gives back is the disk's matter.) The index is
    built anew.

    Args:
        path: the database.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Returns:
        Bytes of the database's files before and after.

    Raises:
        NotADatabaseError: there is none.
        StorageError: the disk is full; what was not written anew yet is as it was.
        BusyError: a writer is not done in time.
    """
    sizes = [generations.compact(path, busy_timeout=busy_timeout, progress=progress)]
    for _, folder in _namespaces(path):
        with _unless_dropped(folder):
            sizes.append(generations.compact(folder, busy_timeout=busy_timeout, progress=progress))
    remove_dropped(Path(path))
    return sum(before for before, _ in sizes), sum(after for _, after in sizes)


def migrate(
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """Bring a database of an older format version up to date.

    Until it is done the old generation is the database. Nobody may have it open: neither a process
    of an older release, nor this one.

    Args:
        path: the database.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Returns:
        The format version before (the oldest, of several namespaces) and after.

    Raises:
        NotADatabaseError: there is none.
        FormatError: it is of a version that this release does not know.
        StorageError: the disk is full; the database is as it was.
        BusyError: it is open, here or in a process of an older release, or a writer is not done in
            time; nothing was changed.
    """
    before, after = generations.migrate(path, busy_timeout=busy_timeout, progress=progress)
    for _, folder in _namespaces(path):
        with _unless_dropped(folder):
            found = generations.migrate(folder, busy_timeout=busy_timeout, progress=progress)
            before = min(before, found[0])
    return before, after


def backup(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> int:
    """Write a copy of a database, of one moment; neither readers nor writers wait for it.

    The copy is a database itself: it can be opened, verified, and moved elsewhere. Each namespace
    is of a moment of its own. This is the way to copy a database that is open: files that are
    copied one by one are of several moments.

    Args:
        path: the database; it may lie on a medium that cannot be written.
        to: a folder that is missing or empty.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Returns:
        Bytes of the copy.

    Raises:
        DatabaseExistsError, StorageError: `to` is not free, or the disk is full; nothing is left.
    """
    size = copies.backup(path, to, busy_timeout=busy_timeout, progress=progress)
    try:
        for name, folder in _namespaces(path):
            with _unless_dropped(folder):
                size += copies.backup(
                    folder,
                    namespace_folder(Path(to), name),
                    busy_timeout=busy_timeout,
                    progress=progress,
                )
    except BaseException:
        shutil.rmtree(to, ignore_errors=True)  # it was missing or empty
        raise
    return size


def restore(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> None:
    """Put the content of a backup in the place of a database, or make one of it.

    The backup is verified first. What was in the database is gone afterwards; until then it is
    what it was. Its namespaces follow one by one; those that the backup does not have are dropped.
    Processes that have it open are told to open it again.

    Args:
        source: the backup; it may lie on a medium that cannot be written.
        path: the database; a folder that is missing or empty becomes one.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        NotADatabaseError: `source` is none.
        StorageError: the backup is damaged, or the disk is full; nothing was changed.
        BusyError: a writer is not done in time.
    """
    target = arguments.path(path, "the database's path")
    source = arguments.path(source, "the backup's path")
    arguments.function(progress, "progress")
    kept = dict(_namespaces(source))
    for folder in kept.values():
        copies.require_whole(folder, busy_timeout, progress)
    copies.restore(source, target, busy_timeout=busy_timeout, progress=progress)
    for name, folder in kept.items():
        copies.restore(
            folder, namespace_folder(target, name), busy_timeout=busy_timeout, progress=progress
        )
    for name in namespace_names(target):
        if name not in kept:
            remove_namespace(target, name)


def rewrite(
    path: str | os.PathLike[str],
    writer: MemoryWriter,
    *,
    embedder: Callable[[], Embedder] | None = None,
    codec: str | None = None,
    busy_timeout: float = BUSY_TIMEOUT,
    progress: Progress = no_progress,
) -> RewriteReport:
    """Write the memories of a database anew; references that are cold stay so.

    If the writer has another tokenizer, or shorter references, documents are cut anew: their
    references get new ids and embeddings, and their versions grow. Other processes that have the
    database open must open it again. Interrupted, the same call goes on where it was.

    Args:
        path: the database.
        writer: what its memories come from, from now on.
        embedder: makes the database's embedder; needed where documents are cut anew.
        codec: how memories are stored, from now on; default: as recorded.
        busy_timeout: seconds to wait for a writer in another thread or process.
        progress: told of the work.

    Raises:
        NotADatabaseError: there is none.
        MismatchError: documents have to be cut anew, and there is no embedder.
        BusyError: a writer is not done in time.
    """

    def of(folder: str | os.PathLike[str]) -> RewriteReport:
        return rewrite_one(
            folder,
            writer,
            embedder=embedder,
            codec=codec,
            busy_timeout=busy_timeout,
            progress=progress,
        )

    report = of(path)
    for _, folder in _namespaces(path):
        with _unless_dropped(folder):
            more = of(folder)
            report = RewriteReport(
                report.documents + more.documents,
                report.memories + more.memories,
                report.recut + more.recut,
            )
    return report


def _namespaces(path: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """Names and folders of a database's namespaces."""
    database = Path(path)
    for name in namespace_names(database):
        yield name, namespace_folder(database, name)


@contextmanager
def _unless_dropped(folder: Path) -> Iterator[None]:
    """Look after a namespace; if it is dropped meanwhile there is nothing left to look after."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)  # no other gets its number meanwhile
    except FileNotFoundError:
        opened = None
    was_whole = (folder / CURRENT).exists()  # else somebody is just making it anew
    try:
        yield
    except MemDBError:
        if was_whole and opened is not None and is_at(folder, opened):
            raise
    finally:
        if opened is not None:
            os.close(opened)
