"""One generation's LMDB environment: opened once in a process, shared by all that use it, and
closed when the last of them is done with it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import lmdb
from lmdb.verify import VerifyError
from lmdb.verify import verify as walk_pages

from memdb.errors import (
    CorruptRecordError,
    ForkedProcessError,
    FormatError,
    InvalidInputError,
    NotADatabaseError,
    StorageError,
)
from memdb.storage import record_layout
from memdb.storage.record_layout import SETTINGS
from memdb.types.canonical import read_json

#: What a write has survived when it is acknowledged; see `MemDB.open`.
Durability = Literal["full", "normal", "off"]

_MAP_SIZE = 1 << 40  # address space, not disk: nobody has to size the database
_SMALLEST_MAP = 1 << 26
_READERS = 1024
_LOCK_HEAD, _LOCK_READER = 128, 64  # bytes of lock.mdb
_TABLES = 16
_CLEAR_EVERY = 60  # seconds between two looks for readers that died
_ID = re.compile(r"[0-9a-f]{32}\Z")
_FLAGS: dict[str, dict[str, bool]] = {
    "full": {},
    "normal": {"metasync": False},
    "off": {"sync": False},
}

#: What LMDB says of files that are not its own, or hold other tables.
FOREIGN = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.NotFoundError,
    lmdb.IncompatibleError,
)


class Environment:
    """An open generation. `acquire` and `release` count its users.

    Attributes:
        generation: its folder, absolute.
        id: of the database.
        tables: handles by name.
    """

    _open: ClassVar[dict[tuple[int, int], Environment]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, generation: Path, key: tuple[int, int], durability: Durability) -> None:
        self.generation = generation
        self.durability = durability
        self._key = key
        self._pid = os.getpid()
        self._users = 1
        self._cleared = time.monotonic()
        self._environment: Any = None
        folder = generation.parent
        try:
            self._environment = open_lmdb(generation, **_FLAGS[durability])
            complete(self._environment, generation / "data.mdb")
            # The version first: another one may have other tables.
            self.tables = open_tables(self._environment, (SETTINGS,))
            self.id = self._check_format()
            self.tables = open_tables(self._environment, record_layout.TABLES)
            self._environment.reader_check()  # give back what killed processes held
        except FOREIGN as error:
            self._close()
            raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error
        except lmdb.Error as error:
            self._close()
            raise StorageError(f"cannot open '{folder}': {error}") from error
        except BaseException:
            self._close()
            raise

    @classmethod
    def acquire(cls, generation: Path, durability: Durability | None) -> Environment:
        """The environment of a generation; each `acquire` needs a `release`.

        Args:
            generation: its folder.
            durability: None: as it is open in this process, or else `full`.

        Raises:
            NotADatabaseError: the files are not a database's.
            FormatError: a format version that this release does not read.
            InvalidInputError: it is open in this process with another durability.
        """
        try:
            file = (generation / "data.mdb").stat()
        except OSError as error:
            raise StorageError(f"cannot open '{generation.parent}': {error}") from error
        key = file.st_dev, file.st_ino  # a folder may be moved, or deleted and made anew
        with cls._guard:
            found = cls._open.get(key)
            if found is None:
                found = cls._open[key] = cls(generation.absolute(), key, durability or "full")
                return found
            found.require_unforked()
            if durability not in (None, found.durability):
                raise InvalidInputError(
                    f"'{generation.parent}' is already open in this process with durability "
                    f"'{found.durability}'; close it, or open it with the same"
                )
            found._users += 1
            return found

    def use(self) -> None:
        """Count one more user, which has to `release` it."""
        with self._guard:
            self._users += 1

    def release(self) -> None:
        """Give it back; the last user closes it."""
        with self._guard:
            self._users -= 1
            if self._users == 0:
                self._open.pop(self._key, None)
                self._close()

    def _close(self) -> None:
        if self._pid == os.getpid() and self._environment is not None:
            self._environment.close()

    def require_unforked(self) -> None:
        """Raise `ForkedProcessError` in a child of the process that opened it."""
        if self._pid != os.getpid():
            raise ForkedProcessError(
                f"'{self.generation.parent}' was opened before this process was forked. Close it "
                "before the fork, or start children with the 'spawn' method, and open it in each."
            )

    def begin(self, *, write: bool) -> Any:
        """A transaction of LMDB; a writer waits for the one before it, in whichever process."""
        if write and time.monotonic() - self._cleared > _CLEAR_EVERY:
            self._clear_readers()
        try:
            return self._environment.begin(write=write, buffers=True)
        except lmdb.ReadersFullError:
            self._clear_readers()
            return self._environment.begin(write=write, buffers=True)

    def _clear_readers(self) -> None:
        """Readers that died hold pages, and places in LMDB's table of readers."""
        self._cleared = time.monotonic()
        self._environment.reader_check()

    def sync(self) -> None:
        """Wait until all that was committed, by whichever process, is on the disk, whatever the
        durability."""
        self._environment.sync(True)

    def copy(self, folder: Path) -> None:
        """Write the state of this moment, without free pages, as `data.mdb` of a folder."""
        self._environment.copy(str(folder), compact=True)

    def size(self) -> int:
        """Bytes of the file, as far as LMDB uses it."""
        pages = int(self._environment.info()["last_pgno"]) + 1
        return pages * int(self._environment.stat()["psize"])

    def _check_format(self) -> str:
        """The database's id, if it has the format of this release."""
        folder = self.generation.parent
        with self.begin(write=False) as inner:
            stored = _setting(inner, self.tables[SETTINGS], "format")
        version = stored.get("version") if isinstance(stored, dict) else None
        if version != record_layout.FORMAT_VERSION:
            older = isinstance(version, int) and 1 <= version < record_layout.FORMAT_VERSION
            raise FormatError(
                f"'{folder}' has format version {version}; this release reads version "
                f"{record_layout.FORMAT_VERSION}. "
                + (
                    f"`memdb migrate --db {folder}` brings it up to date."
                    if older
                    else "Use the release of explicit-memdb that wrote it, or a newer one."
                )
            )
        identity = stored.get("id")
        if not isinstance(identity, str) or not _ID.match(identity):
            raise FormatError(
                f"'{folder}' has no id of 32 hexadecimal digits in its setting 'format': it was "
                "not made by a release of explicit-memdb. Make it anew."
            )
        return identity


def _setting(inner: Any, table: Any, name: str) -> Any:
    """A setting's JSON value, or None: before it is known that there is more to a database."""
    record = inner.get(name.encode(), db=table)
    if record is None:
        return None
    payload = record_layout.unseal(SETTINGS, name.encode(), record)[1]
    try:
        return read_json(payload)
    except ValueError as error:
        raise CorruptRecordError(SETTINGS, repr(name), str(error)) from error


def open_lmdb(generation: Path, **options: bool) -> Any:
    """An LMDB environment with as large a map as the system allows."""
    _reserve_lock(generation)
    size = _MAP_SIZE
    while True:
        try:
            # writemap stays off: on a full disk it would end the process with SIGBUS.
            return lmdb.open(
                str(generation), map_size=size, max_dbs=_TABLES, max_readers=_READERS, **options
            )
        except (MemoryError, lmdb.MemoryError):  # address space is limited here: take less
            if size <= _SMALLEST_MAP:
                raise
            size //= 4
        except OSError as error:
            raise StorageError(f"cannot open '{generation.parent}': {error}") from error


def open_tables(environment: Any, names: Iterable[str], *, create: bool = False) -> dict[str, Any]:
    """Handles of tables. It waits for a writer that is at work."""
    return {
        name: environment.open_db(
            name.encode(), create=create, integerkey=name in record_layout.INTEGER_TABLES
        )
        for name in names
    }


def _reserve_lock(generation: Path) -> None:
    """Take the disk space of LMDB's table of readers. LMDB writes it through a map, which on a full
    disk would end the process (SIGBUS)."""
    try:
        file = os.open(generation / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(file, 0, _LOCK_HEAD + _READERS * _LOCK_READER)  # never shortens
        finally:
            os.close(file)
    except OSError as error:
        raise StorageError(f"cannot open '{generation.parent}': {error}") from error


def complete(environment: Any, file: Path) -> None:
    """Make a file that was cut short as long as its pages are due to be. To read a mapped page that
    the file does not have ends the process (SIGBUS); a page of zeros is a damaged one."""
    due = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < due:
        try:
            with file.open("r+b") as data:
                os.posix_fallocate(data.fileno(), due - 1, 1)  # never shortens
        except OSError as error:
            raise StorageError(f"'{file}' is cut short: {error}") from error


def damaged_pages(generation: Path) -> list[str]:
    """What is wrong with LMDB's pages, walked without LMDB, which trusts them."""
    try:
        return [str(error) for error in walk_pages(str(generation))]
    except VerifyError as error:
        return [str(error)]
