"""The database's folder: generations, `CURRENT` and the lock that processes share.

    my.memdb/
        CURRENT        names the generation in use, e.g. "gen-000001"
        LOCK           shared while a process opens a generation, exclusive while one is replaced
        gen-000001/    one LMDB environment, data.mdb and lock.mdb, and what is derived from it
        namespaces/    databases that belong to this one (`memdb.storage.namespaces`)

A new generation is written beside the old one and `CURRENT` swapped by a rename, so that at every
moment the folder holds one whole database (as in LevelDB). Who has the old one open goes on reading
it, and finds at its next transaction that `CURRENT` names another.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from memdb.errors import BusyError, DatabaseExistsError, NotADatabaseError, StorageError
from memdb.storage import locks
from memdb.storage.durable import sync, write_file
from memdb.storage.locks import BUSY_TIMEOUT, Purpose

CURRENT = "CURRENT"
LOCK = "LOCK"
NAMESPACES = "namespaces"
_WRITERS = "write.lock"
_FIRST = "gen-000001"
_GENERATION = re.compile(r"gen-[0-9]{6}\Z")


def current_generation(folder: Path) -> Path:
    """The subfolder that `CURRENT` names.

    Raises:
        NotADatabaseError: the folder is missing or is no database.
    """
    if not _exists(folder) or _is_bare(folder):
        raise NotADatabaseError(
            f"there is no database at '{folder}'. `memdb init` makes one; --db or MEMDB_PATH says "
            "where it is."
        )
    name = _named(folder)
    while not _GENERATION.match(name) or not (folder / name / "data.mdb").is_file():
        before, name = name, _named(folder)
        if name == before:  # else another one was put in its place between the two looks
            raise NotADatabaseError(
                f"'{folder}' is no memdb database: its file {CURRENT} names {name[:40]!r}, which "
                "is no generation in it."
            )
    return folder / name


def _named(folder: Path) -> str:
    """What `CURRENT` says."""
    try:
        return (folder / CURRENT).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotADatabaseError(
            f"'{folder}' is no memdb database: its file {CURRENT} cannot be read ({error})."
        ) from error


@contextmanager
def new_database(folder: Path, timeout: float = BUSY_TIMEOUT) -> Iterator[Path]:
    """Yield the first generation's empty subfolder, and make it the current one on success.

    On an error all that was made is removed again, folders too. What an earlier, killed attempt
    left is cleared away.

    Args:
        folder: the database's.
        timeout: seconds to wait for another process that makes one there.

    Raises:
        DatabaseExistsError: a database is there.
        StorageError: the folder holds something else, or cannot be written.
        BusyError: another process is making one there, and is not done in time.
    """
    missing = [path for path in (folder, *folder.parents) if not _exists(path)]
    try:
        with _alone_in_new(folder, timeout):
            generation = folder / _FIRST
            try:
                shutil.rmtree(generation, ignore_errors=True)
                generation.mkdir()
                yield generation
                sync(generation)
                _write_current(folder, _FIRST)
            except BaseException:
                for name in (CURRENT, CURRENT + ".new"):
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(generation, ignore_errors=True)
                (folder / LOCK).unlink(missing_ok=True)  # who waits for it makes another
                raise
    except BaseException as error:
        for path in missing:
            with suppress(OSError):  # it is not empty: somebody else's is there
                path.rmdir()
        if isinstance(error, OSError):
            raise StorageError(f"cannot make a database at '{folder}': {error}") from error
        raise


@contextmanager
def _alone_in_new(folder: Path, timeout: float) -> Iterator[None]:
    """Make a database's folder, and keep others from making one in it."""
    while True:
        _make(folder)
        try:
            _require_own(folder)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if folder.exists():
                raise
            continue  # whoever made it just failed, and took it away
        pid = os.getpid()
        try:
            there = (folder / CURRENT).exists
            what = partial("cannot make a database at '{}'".format, folder)
            # Whoever has one open there may hold the lock; nobody waits for that.
            if not locks.take(lock, "replace", timeout, what, there) or there():
                raise DatabaseExistsError(f"there is already a database at '{folder}'.")
            if is_at(folder / LOCK, lock):
                yield
                return
        finally:
            locks.give_back(lock, pid)


def _require_own(folder: Path) -> None:
    """Raise `StorageError` if a folder holds what no database has."""
    names = {entry.name for entry in folder.iterdir()}
    ours = {LOCK, CURRENT, CURRENT + ".new"}
    if CURRENT in names:  # else those that are there would become a new one's
        ours.add(NAMESPACES)
    foreign = [name for name in names - ours if not _GENERATION.match(name)]
    if foreign:
        raise StorageError(
            f"'{folder}' is not empty (it holds '{min(foreign)}'): a database needs a folder of "
            "its own. Choose another path."
        )


def exists(folder: Path) -> bool:
    """Whether there is a database, and not only what was left by a creation that was killed;
    `NotADatabaseError` if there is something that is none."""
    if not _exists(folder):
        return False
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        names = {CURRENT}
    if all(name in (LOCK, CURRENT + ".new") or _GENERATION.match(name) for name in names):
        return False
    current_generation(folder)
    return True


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _is_bare(folder: Path) -> bool:
    """Whether nothing is there but what a creation leaves that failed."""
    try:
        return {entry.name for entry in folder.iterdir()} <= {LOCK, CURRENT + ".new"}
    except OSError:
        return False


def _make(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durably."""
    made = [folder, *(above for above in folder.parents if not _exists(above))]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:  # the first one also if it was there: who made it may have been killed
        with suppress(PermissionError):  # that folder's entries are not ours to read
            sync(path.parent)


@contextmanager
def opening(
    folder: Path, timeout: float = BUSY_TIMEOUT, *, read_only: bool = False
) -> Iterator[Path]:
    """The generation that `CURRENT` names, as a path; it stays in its place while this lasts.

    Args:
        folder: the database's.
        timeout: seconds to wait for one that is just replacing it.
        read_only: do without the lock on a medium where it cannot be made.

    Raises:
        NotADatabaseError: the folder is missing or is no database; nothing is made in it.
        StorageError: it cannot be locked.
        BusyError: it is being replaced, and that is not done in time.
    """
    current_generation(folder)  # or there is nothing to lock
    with _locked(folder, "share", timeout, needed=not read_only):
        generation = current_generation(folder)  # it may have changed meanwhile
        yield generation


@contextmanager
def new_generation(
    folder: Path, timeout: float = BUSY_TIMEOUT, *, locked: bool = False
) -> Iterator[Path]:
    """Yield a new, empty subfolder, and make it the current generation on success: durable before
    `CURRENT` names it. The others are removed.

    Whoever uses this keeps writers of the old generation out until it is done. On an error the new
    subfolder is removed again; what a killed attempt left goes with the next one that succeeds.

    Args:
        folder: the database's.
        timeout: seconds to wait for those that are just opening it.
        locked: whoever uses this holds the folder's lock already (`exclusively`).

    Raises:
        StorageError: the disk refuses.
        BusyError: somebody is opening the old one, and is not done in time.
    """
    try:
        old = current_generation(folder)
        last = max(int(e.name[4:]) for e in folder.iterdir() if _GENERATION.match(e.name))
        generation = folder / f"gen-{last + 1:06d}"
        generation.mkdir()
        try:
            yield generation
            sync(generation)
            sync(folder)
            with nullcontext() if locked else _locked(folder, "replace", timeout):
                _write_current(folder, generation.name)
                _remove_others(folder, generation)
        except BaseException:
            if current_generation(folder) == old:
                shutil.rmtree(generation, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot write a new generation in '{folder}': {error}") from error


def only_writer(
    generation: Path,
    timeout: float = BUSY_TIMEOUT,
    purpose: Purpose = "write",
    waiting: Callable[[], None] | None = None,
    end: float | None = None,
) -> locks.Writing:
    """Keep all other writers of a generation out, in whichever process, from now on to the end of a
    `with` statement.

    LMDB's own lock does so for a transaction, but waits without end; and this one also keeps them
    out for as long as a compaction copies, when others may still open the database and read.

    Raises:
        FileNotFoundError: the generation is gone.
        StorageError: this thread is in the middle of a write already.
        BusyError: another writer is not done in time.
    """
    lock = os.open(f"{generation}/{_WRITERS}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    what = partial("cannot write to '{}'".format, generation.parent)
    return locks.Writing(lock, purpose, timeout, what, waiting, end)


def is_writing(generation: Path) -> bool:
    """Whether this thread is in the middle of a write to a generation."""
    return locks.is_writing(generation, _WRITERS)


def writers_are_kept_out(generation: Path) -> bool:
    """Whether somebody keeps all writers out, for longer than a write takes."""
    return locks.is_alone(generation / _WRITERS)


@contextmanager
def no_writer(
    generation: Path, timeout: float, *, but_one_that_replaces: bool = False
) -> Iterator[None]:
    """Keep writers of a generation out while this lasts; several may do so at once. Where the file
    of the lock is not there nobody writes, as far as it can be known on a medium where it cannot be
    made.

    Args:
        generation: its folder.
        timeout: seconds to wait for a writer that is at work.
        but_one_that_replaces: do not wait for who keeps writers out, without a write of its own.

    Raises:
        BusyError: a writer is not done in time.
    """
    try:
        lock = os.open(generation / _WRITERS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    pid = os.getpid()
    try:
        replaced = partial(locks.is_signed, lock, "alone")
        passes = replaced if but_one_that_replaces else _never
        what = partial("cannot read '{}'".format, generation.parent)
        locks.take(lock, "share", timeout, what, passes)
        yield
    finally:
        locks.give_back(lock, pid)


def _never() -> bool:
    return False


@contextmanager
def sole_writer(folder: Path, timeout: float = BUSY_TIMEOUT) -> Iterator[Path]:
    """Keep writers out of the current generation, and yield it.

    Args:
        folder: the database's.
        timeout: seconds to wait for a writer that is at work.

    Raises:
        StorageError: the medium cannot be written, or this thread is in the middle of a write.
        BusyError: a writer is not done in time.
    """
    end = time.monotonic() + timeout
    with ExitStack() as stack:
        while True:
            generation = current_generation(folder)
            try:
                writing = stack.enter_context(ExitStack())
                writing.enter_context(only_writer(generation, timeout, "alone", end=end))
            except OSError as error:
                if current_generation(folder) == generation:
                    raise StorageError(f"cannot write to '{folder}': {error}") from error
                continue
            if current_generation(folder) == generation:
                break
            writing.close()
        yield generation


@contextmanager
def exclusively(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """Keep everybody from opening the database while this lasts. Who keeps writers out, too, has
    begun with that.

    Args:
        folder: the database's.
        timeout: seconds to wait for those that are just opening it.

    Raises:
        StorageError: a process of a release of format version 1 has it open, or one opens it now.
    """
    lock = _locked(folder, "replace", timeout)
    try:
        lock.__enter__()
    except BusyError as error:
        raise BusyError(
            f"'{folder}' is open in another process; close it there, and try again"
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _remove_others(folder: Path, generation: Path) -> None:
    for entry in folder.iterdir():
        if _GENERATION.match(entry.name) and entry != generation:
            shutil.rmtree(entry, ignore_errors=True)


def is_at(path: Path, file: int) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        there, ours = path.stat(), os.fstat(file)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


@contextmanager
def _locked(
    folder: Path, purpose: Purpose, timeout: float = BUSY_TIMEOUT, *, needed: bool = True
) -> Iterator[None]:
    """The folder's lock; not `needed`: on a medium where it cannot be made it is done without."""
    try:
        lock = _lock_file(folder, to_read=purpose == "share")
    except OSError as error:
        if needed:
            raise StorageError(f"cannot lock '{folder}': {error}") from error
        yield
        return
    pid = os.getpid()
    try:
        try:
            locks.take(lock, purpose, timeout, lambda: f"cannot open '{folder}'")
        except OSError as error:
            raise StorageError(f"cannot lock '{folder}': {error}") from error
        yield
    finally:
        locks.give_back(lock, pid)


def _lock_file(folder: Path, *, to_read: bool) -> int:
    if to_read:  # who may not write there may lock it together with others
        with suppress(FileNotFoundError):
            return os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


class Place:
    """A database's folder while it is open: tells whether another generation has become the
    current one, and whether the folder is still the same.

    Raises:
        StorageError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # the process may change its folder
        self._current = str(self.folder / CURRENT)
        # On a medium that cannot be written `LOCK` may be missing: then the folder stands for it.
        self._mark = self.folder / LOCK
        if not self._mark.exists():
            self._mark = self.folder
        try:
            self._lock = os.open(self._mark, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot open '{folder}': {error}") from error

    def stamp(self) -> tuple[int, int]:
        """What changes when `CURRENT` does; `StorageError` if it is no longer there."""
        try:
            file = os.stat(self._current)  # noqa: PTH116 (before each transaction: be quick)
        except OSError:
            raise self.gone() from None
        return file.st_ino, file.st_mtime_ns

    def require_same(self) -> None:
        """Raise `StorageError` if another folder lies in this one's place. `LOCK` is never removed,
        and while it is open no other file has its number."""
        if not is_at(self._mark, self._lock):
            raise self.gone()

    def gone(self) -> StorageError:
        """What to raise if the folder is no longer what was opened."""
        return StorageError(
            f"'{self.folder}' was deleted, moved or replaced while it was open. Close it, and open "
            "the database where it is now."
        )

    def close(self) -> None:
        """Give the folder back."""
        os.close(self._lock)


def _write_current(folder: Path, name: str) -> None:
    new = folder / (CURRENT + ".new")
    write_file(new, f"{name}\n".encode("ascii"))
    new.rename(folder / CURRENT)
    sync(folder)
