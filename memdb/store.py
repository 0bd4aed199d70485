"""The store: ids -> records, in one LMDB environment. Everything that may not be lost is here.

A write happens in one transaction, which reaches the disk before it is acknowledged; a reader sees
the state at the moment it began, and neither waits for the other.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lmdb

from memdb import layout
from memdb.errors import (
    CorruptRecordError,
    ForkedProcessError,
    FormatError,
    NotADatabaseError,
    StorageError,
)
from memdb.folder import SharedLock, new_database
from memdb.layout import SETTINGS
from memdb.transaction import Transaction

_MAP_SIZE = 1 << 40  # address space, not disk: nobody has to size the database
_SMALLEST_MAP = 1 << 26
_READERS = 1024
_ID = re.compile(r"[0-9a-f]{32}\Z")

#: What LMDB says of files that are not its own, or hold other tables.
_FOREIGN = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.NotFoundError,
    lmdb.IncompatibleError,
)


class Store:
    """One open environment. Threads of a process share it; another process opens its own.

    Opening the same folder again in a process gives the same object; each `open` needs a `close`.

    Attributes:
        folder: the database's folder.
        generation: the subfolder with the environment, absolute.
        id: 32 hexadecimal digits, drawn at creation: a file derived from a database (an index)
            names it, and so is not taken for that of one made anew in the same place.
    """

    _open: ClassVar[dict[tuple[int, int], Store]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path, lock: SharedLock, key: tuple[int, int]) -> None:
        self.folder = folder
        self._key = key
        self._lock = lock
        generation = lock.generation.absolute()  # the process may change its folder
        self.generation = generation
        self._pid = os.getpid()
        self._users = 1
        self._transactions = 0
        self._closed = False
        self._changed = threading.Condition()  # guards the two above
        self._environment: Any = None
        try:
            self._environment = _open_environment(generation, create=False)
            _complete(self._environment, generation / "data.mdb")
            # The version first: another one may have other tables.
            self._tables = _open_tables(self._environment, (SETTINGS,), create=False)
            self.id = self._check_format()
            self._tables = _open_tables(self._environment, layout.TABLES, create=False)
            self._environment.reader_check()  # give back what killed processes held
        except _FOREIGN as error:
            self._close_environment()
            raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error
        except lmdb.Error as error:
            self._close_environment()
            raise StorageError(f"cannot open '{folder}': {error}") from error
        except BaseException:
            self._close_environment()
            raise

    @classmethod
    def create(cls, folder: Path, settings: dict[str, Any], tokenizer: str | None) -> None:
        """Make a database that holds these settings and nothing else."""
        try:
            with new_database(folder) as generation:
                environment = _open_environment(generation, create=True)
                try:
                    tables = _open_tables(environment, layout.TABLES, create=True)
                    with environment.begin(write=True) as inner:
                        transaction = Transaction(inner, tables)
                        transaction.put_setting(
                            "format",
                            {"id": secrets.token_hex(16), "version": layout.FORMAT_VERSION},
                        )
                        for name, value in settings.items():
                            transaction.put_setting(name, value)
                        transaction.put_setting("counters", {"next_reference": 1, "last_change": 0})
                        if tokenizer is not None:
                            transaction.put_tokenizer(tokenizer)
                finally:
                    environment.close()
        except lmdb.Error as error:
            raise StorageError(f"cannot make a database at '{folder}': {error}") from error

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The store at `folder`.

        Raises:
            NotADatabaseError: there is none.
            FormatError: it has a format version that this release does not read.
        """
        lock = SharedLock(folder)
        with ExitStack() as unless_kept:
            unless_kept.callback(lock.release)
            try:
                file = (lock.generation / "data.mdb").stat()
            except OSError as error:
                raise StorageError(f"cannot open '{folder}': {error}") from error
            key = file.st_dev, file.st_ino  # a folder may be moved, or deleted and made anew
            with cls._guard:
                store = cls._open.get(key)
                if store is not None:
                    store._require_unforked()
                    store._users += 1
                    return store
                unless_kept.pop_all()  # from here on the store gives the lock back
                store = cls(folder, lock, key)
                cls._open[key] = store
                return store

    def close(self) -> None:
        """Give the store back; the last user waits for other threads' transactions and closes the
        environment."""
        with self._guard:
            self._users -= 1
            if self._users == 0:
                self._open.pop(self._key, None)
                self._close_environment()

    def _close_environment(self) -> None:
        if self._pid == os.getpid() and self._environment is not None:
            with self._changed:
                # The records that a transaction reads are LMDB's own pages, not copies.
                self._closed = True
                self._changed.wait_for(lambda: self._transactions == 0)
            self._environment.close()
        self._lock.release()

    def _require_unforked(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcessError(
                f"'{self.folder}' was opened before this process was forked. Close it before the "
                "fork, or start children with the 'spawn' method, and open it in each."
            )

    def _check_format(self) -> str:
        """The database's id, if it has the format of this release."""
        with self.read() as transaction:
            stored = transaction.setting("format")
        version = stored.get("version") if isinstance(stored, dict) else None
        if version != layout.FORMAT_VERSION:
            raise FormatError(
                f"'{self.folder}' has format version {version}; this release reads version "
                f"{layout.FORMAT_VERSION}. Use the release of explicit-memdb that wrote it, or a "
                "newer one."
            )
        identity = stored.get("id")
        if not isinstance(identity, str) or not _ID.match(identity):
            raise FormatError(
                f"'{self.folder}' has no id of 32 hexadecimal digits: it was made before format "
                "version 1 was finished. Make it anew."
            )
        return identity

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent view of this moment. Records come out as copies and outlive it."""
        with self._begin(write=False) as transaction:
            yield transaction

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """All or nothing: on an exception nothing of it happened; after it, it is on the disk.

        One writer at a time, over all processes; others wait.
        """
        with self._begin(write=True) as transaction:
            yield transaction
            transaction.finish()

    def _require_in_place(self) -> None:
        """What is written to a file that was deleted or replaced would be lost."""
        try:
            file = (self.generation / "data.mdb").stat()
        except OSError:
            file = None
        if file is None or (file.st_dev, file.st_ino) != self._key:
            raise StorageError(
                f"'{self.folder}' was deleted, moved or replaced while it was open. Close it, and "
                "open the database where it is now."
            )

    @contextmanager
    def _begin(self, write: bool) -> Iterator[Transaction]:
        self._require_unforked()
        self._require_in_place()
        with self._changed:
            if self._closed:
                raise StorageError(f"'{self.folder}' is closed")
            self._transactions += 1
        try:
            with self._environment.begin(write=write, buffers=True) as inner:
                yield Transaction(inner, self._tables)
        except lmdb.MapFullError as error:
            raise StorageError(f"'{self.folder}' has outgrown its map: {error}") from error
        except lmdb.CorruptedError as error:
            raise CorruptRecordError("?", "?", f"LMDB: {error}") from error
        except lmdb.Error as error:
            raise StorageError(f"'{self.folder}': {error}") from error
        finally:
            with self._changed:
                self._transactions -= 1
                self._changed.notify_all()

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by table (whole pages), and of the file, as `file`."""
        with self.read() as transaction:
            sizes = {name: transaction.size(name) for name in layout.TABLES}
        return {**sizes, "file": (self.generation / "data.mdb").stat().st_size}


def _open_environment(folder: Path, *, create: bool) -> Any:
    size = _MAP_SIZE
    while True:
        try:
            # writemap stays off: on a full disk it would end the process with SIGBUS.
            return lmdb.open(
                str(folder), map_size=size, max_dbs=16, max_readers=_READERS, create=create
            )
        except (MemoryError, lmdb.MemoryError):  # address space is limited here: take less
            if size <= _SMALLEST_MAP:
                raise
            size //= 4
        except OSError as error:
            raise StorageError(f"cannot open '{folder}': {error}") from error


def _complete(environment: Any, file: Path) -> None:
    """Make a file that was cut short as long as its pages are due to be. To read a mapped page that
    the file does not have ends the process (SIGBUS); a page of zeros is a damaged one."""
    due = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < due:
        try:
            with file.open("r+b") as data:
                os.posix_fallocate(data.fileno(), due - 1, 1)  # never shortens
        except OSError as error:
            raise StorageError(f"'{file}' is cut short: {error}") from error


def _open_tables(environment: Any, names: Iterable[str], *, create: bool) -> dict[str, Any]:
    return {
        name: environment.open_db(
            name.encode(), create=create, integerkey=name in layout.INTEGER_TABLES
        )
        for name in names
    }
