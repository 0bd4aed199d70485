"""The database's folder: generations, `CURRENT` and the lock that processes share.

    my.memdb/
        CURRENT        names the generation in use, e.g. "gen-000001"
        LOCK           shared while a process opens a generation, exclusive while one is replaced
        gen-000001/    one LMDB environment, data.mdb and lock.mdb, and what is derived from it

A new generation is written beside the old one and `CURRENT` swapped by a rename, so that at every
moment the folder holds one whole database (as in LevelDB). Who has the old one open goes on reading
it, and finds at its next transaction that `CURRENT` names another.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from memdb.errors import DatabaseExistsError, NotADatabaseError, StorageError
from memdb.storage.durable import sync, write_file

CURRENT = "CURRENT"
LOCK = "LOCK"
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
    try:
        name = (folder / CURRENT).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotADatabaseError(
            f"'{folder}' is no memdb database: its file {CURRENT} cannot be read ({error})."
        ) from error
    if not _GENERATION.match(name) or not (folder / name / "data.mdb").is_file():
        raise NotADatabaseError(
            f"'{folder}' is no memdb database: its file {CURRENT} names {name[:40]!r}, which is no "
            "generation in it."
        )
    return folder / name


@contextmanager
def new_database(folder: Path) -> Iterator[Path]:
    """Yield the first generation's empty subfolder, and make it the current one on success.

    On an error the folder stays, with `LOCK` in it, since another process may wait for that; all
    else is removed again. What an earlier, killed attempt left is cleared away.

    Raises:
        DatabaseExistsError: a database is there.
        StorageError: the folder holds something else, or cannot be written.
    """
    try:
        _make(folder)
        foreign = [
            entry.name
            for entry in folder.iterdir()
            if entry.name not in (LOCK, CURRENT, CURRENT + ".new")
            and not _GENERATION.match(entry.name)
        ]
        if foreign:
            raise StorageError(
                f"'{folder}' is not empty (it holds '{min(foreign)}'): a database needs a folder "
                "of its own. Choose another path."
            )
        with (folder / LOCK).open("a") as lock:
            _lock_new(folder, lock.fileno())
            generation = folder / _FIRST
            shutil.rmtree(generation, ignore_errors=True)
            generation.mkdir()
            try:
                yield generation
                sync(generation)
                _write_current(folder, _FIRST)
            except BaseException:
                for name in (CURRENT, CURRENT + ".new"):
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(generation, ignore_errors=True)
                raise
    except OSError as error:
        raise StorageError(f"cannot make a database at '{folder}': {error}") from error


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


def _lock_new(folder: Path, lock: int) -> None:
    """Take the exclusive lock, unless a database is there: whoever has that open keeps the lock."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        if (folder / CURRENT).exists():
            raise DatabaseExistsError(f"there is already a database at '{folder}'.")
        if locked:
            return
        time.sleep(0.02)  # another process is making one


@contextmanager
def opening(folder: Path) -> Iterator[Path]:
    """The generation that `CURRENT` names, as a path; it stays in its place while this lasts.

    Raises:
        NotADatabaseError: the folder is missing or is no database; nothing is made in it.
        StorageError: it cannot be locked.
    """
    current_generation(folder)  # or there is nothing to lock
    with _locked(folder, fcntl.LOCK_SH):
        generation = current_generation(folder)  # it may have changed meanwhile
        yield generation


@contextmanager
def new_generation(folder: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a new, empty subfolder, and make it the current generation on success: durable before
    `CURRENT` names it. The others are removed.

    Whoever uses this keeps writers of the old generation out until it is done. On an error the new
    subfolder is removed again; what a killed attempt left goes with the next one that succeeds.
    `locked`: they hold the folder's lock already (`exclusively`).

    Raises:
        StorageError: the disk refuses.
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
            with nullcontext() if locked else _locked(folder, fcntl.LOCK_EX):
                _write_current(folder, generation.name)
                _remove_others(folder, generation)
        except BaseException:
            if current_generation(folder) == old:
                shutil.rmtree(generation, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot write a new generation in '{folder}': {error}") from error


@contextmanager
def only_writer(generation: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep all other writers of a generation out, in whichever process, while this lasts.

    LMDB's own lock does so for a transaction; this one also for as long as a compaction copies,
    when others may still open the database and read.

    Args:
        generation: its folder.
        waiting: called now and then while another writer is at work; what it raises ends the
            waiting.

    Raises:
        FileNotFoundError: the generation is gone.
    """
    lock = os.open(generation / _WRITERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while waiting is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.02)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def sole_writer(folder: Path) -> Iterator[Path]:
    """Keep writers out of the current generation, and yield it.

    Raises:
        StorageError: the medium cannot be written.
    """
    with ExitStack() as stack:
        while True:
            generation = current_generation(folder)
            try:
                writing = stack.enter_context(ExitStack())
                writing.enter_context(only_writer(generation))
            except OSError as error:
                if current_generation(folder) == generation:
                    raise StorageError(f"cannot write to '{folder}': {error}") from error
                continue
            if current_generation(folder) == generation:
                break
            writing.close()
        yield generation


@contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Keep everybody from opening the database while this lasts.

    Raises:
        StorageError: a process of a release of format version 1 has it open, or one opens it now.
    """
    try:
        lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.__enter__()
    except StorageError as error:
        raise StorageError(
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


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot lock '{folder}': {error}") from error
    try:
        try:
            fcntl.flock(lock, how)
        except OSError as error:
            raise StorageError(f"cannot lock '{folder}': {error}") from error
        yield
    finally:
        os.close(lock)


class Place:
    """A database's folder while it is open: tells whether another generation has become the
    current one, and whether the folder is still the same.

    Raises:
        StorageError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # the process may change its folder
        self._current = str(self.folder / CURRENT)
        try:
            self._lock = os.open(self.folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
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
        try:
            there, ours = (self.folder / LOCK).stat(), os.fstat(self._lock)
        except OSError:
            raise self.gone() from None
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
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
