"""Opening LMDB's two files: `data.mdb`, which it maps into the address space, and `lock.mdb`, its
table of readers.

LMDB takes its locks on `lock.mdb` as POSIX has them: they are the process's, and end when *any*
descriptor of the file is closed, also one that a copy of the folder or a checksum opened. Without
them other processes take this one's readers for dead, and write over what these read. So after
LMDB has opened the file its locks are put where they last until it is closed: on an open file
description of our own. Where the system has no such locks (macOS) LMDB's stay, and the folder of an
open database must not be read by the process that has it open.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lmdb
import lmdb._envid

from memdb.errors import BusyError, StorageError
from memdb.storage import record_layout
from memdb.storage.durable import lengthen, reach

READERS = 1024  # places in a new table of readers
_LOCK_HEAD, _LOCK_READER = 128, 64  # bytes of lock.mdb
_TABLES = 16

_LARGE_MAP = 1 << 40  # bytes of address space, not of disk
_MAP = 1 << 35
_LARGE_MAPS = 32  # databases of a process that get a large one
_SMALLEST_MAP = 1 << 26

#: What LMDB says of files that are not its own, or hold other tables.
FOREIGN = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.NotFoundError,
    lmdb.IncompatibleError,
)


class LmdbFile:
    """LMDB's environment of one generation, open.

    Attributes:
        inner: LMDB's.
        registered: whether its reads are in the table of readers, for writers to see; not on a
            medium where that cannot be written.
        writable: whether it can be written.
    """

    def __init__(
        self, generation: Path, map_size: int, *, read_only: bool = False, **options: bool
    ) -> None:
        """Open it.

        Args:
            generation: its folder.
            map_size: bytes of address space to take, or less where the system gives less.
            read_only: open it to read alone.
            options: LMDB's.

        Raises:
            StorageError: the system refuses.
            BusyError: no place is left in the table of readers.
            lmdb.Error: what LMDB says of the file.
        """
        self._folder = generation.parent
        self._pid = os.getpid()
        self._lock: int | None = None
        self.writable = not read_only
        try:
            self._lock = _lock_file(generation)
        except OSError as error:
            if not read_only:
                raise self._refused(error) from error
        self.registered = self._lock is not None
        try:
            options = {**options, "readonly": read_only, "lock": self.registered}
            self.inner = self._opened(generation, map_size, options)
            if self._is_listed():
                # Readers of an earlier process of our number (in a container each first process
                # has the same), which died. LMDB takes them for ours: it clears them at the close.
                self.inner.close()
                self.inner = self._opened(generation, map_size, options)
            self._page = int(self.inner.stat()["psize"])
            if self._lock is not None:
                _keep_locks(self._lock, self._pid)
        except BaseException as error:
            if hasattr(self, "inner"):
                self.inner.close()
            self._close_lock()
            if isinstance(error, lmdb.Error) and not isinstance(error, FOREIGN):
                raise self.explained(error) from error
            if isinstance(error, OSError):
                raise self._refused(error) from error
            raise

    def close(self) -> None:
        """Close it; in a child that was forked since nothing happens: it is the parent's."""
        if self._pid == os.getpid():
            self.inner.close()
            self._close_lock()

    def abandon(self) -> None:
        """After a fork, in the child, before that opens anything: let go of what would keep the
        locks of a parent that has ended. The rest must not be touched."""
        self._close_lock()

    def explained(self, error: lmdb.Error) -> StorageError:
        """What LMDB refused, with the way out, where it is known."""
        if isinstance(error, lmdb.ReadersFullError):
            return BusyError(
                f"'{self._folder}' has as many reads under way as it has room for (max_readers: "
                f"{self.inner_readers()}, over all processes; a snapshot is one from its beginning "
                "to its end). End some, and try again"
            )
        if any(os.strerror(number) in str(error) for number in (errno.EAGAIN, errno.EACCES)):
            return BusyError(
                f"cannot open '{self._folder}': another process with the number {self._pid} has it "
                "open, in another container. Readers are told apart by their numbers: let the "
                "containers share a process namespace (`docker run --pid=container:...`, "
                "`shareProcessNamespace` in Kubernetes), or close it there"
            )
        return StorageError(f"'{self._folder}': {error}")

    def inner_readers(self) -> int:
        """Places in the table of readers."""
        with suppress(AttributeError, lmdb.Error):  # it may not be open
            return int(self.inner.info()["max_readers"])
        return READERS

    def sizes(self) -> tuple[int, int]:
        """Bytes of the file, as far as LMDB uses it, and of it that are mapped at most: it cannot
        grow beyond."""
        info = self.inner.info()
        return (info["last_pgno"] + 1) * self._page, info["map_size"]

    def remap(self, size: int) -> bool:
        """Map so many bytes; whether the system gave them. No transaction may be open.

        Raises:
            lmdb.Error: LMDB cannot go on; the database has to be opened again.
        """
        # LMDB gives the old map back first, so a refusal would leave it without one: ask before.
        try:
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON, prot=mmap.PROT_READ).close()
        except (OSError, ValueError, OverflowError):
            return False
        self.inner.set_mapsize(size)
        return True

    def _opened(self, generation: Path, size: int, options: dict[str, bool]) -> Any:
        while True:
            try:
                # writemap stays off: on a full disk it would end the process with SIGBUS.
                return lmdb.open(
                    str(generation),
                    map_size=size,
                    max_dbs=_TABLES,
                    max_readers=READERS,
                    create=not options["readonly"],
                    **options,
                )
            except (MemoryError, lmdb.MemoryError):  # address space is limited here: take less
                if size <= _SMALLEST_MAP:
                    raise
                size //= 4

    def _is_listed(self) -> bool:
        """Whether the table of readers has some of our number, while none is ours."""
        lines = self.inner.readers().splitlines()[1:] if self.registered else []
        return any(line.split()[:1] == [str(self._pid)] for line in lines)

    def _refused(self, error: OSError) -> StorageError:
        closed = self.writable and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        way_out = (
            ". To read it alone, open it with read_only=True (`--read-only`)" if closed else ""
        )
        return StorageError(f"cannot open '{self._folder}': {error}{way_out}")

    def _close_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def map_size(used: int, opened: int) -> int:
    """Address space to take for a file of `used` bytes in a process that has `opened` others open:
    as much as a thousand of them can have."""
    return max(_LARGE_MAP if opened < _LARGE_MAPS else _MAP, 4 * used)


@contextmanager
def lmdb_file(generation: Path, *, room: int = 0, **options: bool) -> Iterator[Any]:
    """LMDB's environment of a generation that nobody else has open, in a `with` statement.

    Args:
        generation: its folder.
        room: bytes that it may come to hold.
        options: LMDB's.
    """
    file = LmdbFile(generation, map_size(room, 0), **options)
    try:
        yield file.inner
    finally:
        file.close()


def open_tables(
    environment: Any, names: Iterable[str], *, create: bool = False, read_only: bool = False
) -> dict[str, Any]:
    """Handles of tables. LMDB makes them in a write transaction, unless the file is open
    `read_only`: who calls this sees to it that no writer is at work, for whom it would wait without
    end."""
    with nullcontext() if read_only else environment.begin(write=True) as writing:
        return {
            name: environment.open_db(
                name.encode(),
                txn=writing,
                create=create,
                integerkey=name in record_layout.INTEGER_TABLES,
            )
            for name in names
        }


def complete(file: LmdbFile, path: Path) -> None:
    """Make a file that was cut short as long as its pages are due to be. To read a mapped page that
    the file does not have ends the process (SIGBUS); a page of zeros is a damaged one.

    Raises:
        StorageError: it is cut short, and cannot be written.
    """
    due, _ = file.sizes()
    if path.stat().st_size >= due:
        return
    try:
        if not file.writable:
            raise OSError("and this medium cannot be written: copy the database elsewhere")
        with path.open("r+b") as data:
            reach(data.fileno(), due)
    except OSError as error:
        raise StorageError(f"'{path}' is cut short: {error}") from error


def _lock_file(generation: Path) -> int:
    """`lock.mdb`, open, with the disk space of its table. LMDB writes it through a map, which on a
    full disk would end the process (SIGBUS)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    file = os.open(generation / "lock.mdb", flags, 0o644)
    try:
        lengthen(file, _LOCK_HEAD + READERS * _LOCK_READER)
    except BaseException:
        os.close(file)
        raise
    return file


def _keep_locks(lock: int, pid: int) -> None:
    """Hold LMDB's two locks by our own open file description: the first byte's, shared, says that
    the table is in use, and that of the byte of a process's number that the process lives."""
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return
    try:
        _hold(lock, fcntl.F_RDLCK, 0)
    except OSError:  # a file system that has none
        return
    # LMDB's own and ours exclude each other. It takes its own but once, and nobody reads yet.
    fcntl.lockf(lock, fcntl.LOCK_UN, 1, pid)
    try:
        _hold(lock, fcntl.F_WRLCK, pid)
    except OSError:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, pid)


def _hold(lock: int, kind: int, byte: int) -> None:
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(lock, fcntl.F_OFD_SETLK, flock)


_keys_of = lmdb._envid.env_keys


def _own_keys(path: Any, subdir: bool) -> tuple[Any, ...]:
    """How py-lmdb knows the files that this process has open: the parent's are not."""
    return tuple((os.getpid(), *key) for key in _keys_of(path, subdir))


def after_fork() -> None:
    """In a child: let it open what the parent has open. py-lmdb refuses to open a file twice in a
    process, and takes the parent's for the child's."""
    lmdb._envid.env_keys = _own_keys
