"""One generation's LMDB environment: opened once in a process, shared by all that use it, and
closed when the last of them is done with it.

LMDB maps the file into the address space, and can map more of it only while the process has no
transaction open. So the map is as large as a thousand databases of one process allow, and grows
between transactions where that is not enough.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import lmdb

from memdb.errors import (
    BusyError,
    CorruptRecordError,
    ForkedProcessError,
    FormatError,
    InvalidInputError,
    NotADatabaseError,
    StorageError,
)
from memdb.storage import lmdb_file, record_layout
from memdb.storage.folder import is_writing, no_writer
from memdb.storage.lmdb_file import FOREIGN, LmdbFile, complete, map_size, open_tables
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.record_layout import SETTINGS
from memdb.types.canonical import read_json

#: What a write has survived when it is acknowledged; see `MemDB.open`.
Durability = Literal["full", "normal", "off"]

_CLEAR_EVERY = 60  # seconds between two looks for readers that died
_GIVES_WAY = 0.1  # seconds that a new transaction waits for one that wants to grow the map
_ID = re.compile(r"[0-9a-f]{32}\Z")
_FLAGS: dict[str, dict[str, bool]] = {
    "full": {},
    "normal": {"metasync": False},
    "off": {"sync": False},
}


class Environment:
    """An open generation. `acquire` and `release` count its users.

    Attributes:
        generation: its folder, absolute.
        id: of the database.
        tables: handles by name.
        writable: whether it can be written; not on a medium that cannot.
        registered: whether writers see who reads it; see `LmdbFile`.
        turn: for the thread that writes, so that those of one process queue here.
    """

    _open: ClassVar[dict[tuple[int, int], Environment]] = {}
    _inherited: ClassVar[list[Environment]] = []  # of the process that this one was forked from
    _guard: ClassVar[threading.Lock] = threading.Lock()
    _changed: ClassVar[threading.Condition] = threading.Condition(_guard)

    def __init__(
        self,
        generation: Path,
        key: tuple[int, int],
        durability: Durability,
        writable: bool,
        timeout: float,
    ) -> None:
        self.generation = generation
        self.durability = durability
        self.turn = threading.Lock()
        self._key = key
        self._pid = os.getpid()
        self._users = 1
        self._transactions = 0
        self._growing = 0  # threads that wait for the others' transactions to end
        self._keeping_out: dict[int, ExitStack] = {}  # writers, by the transaction
        self._room: int | None = None  # bytes of map that a write was found to need
        self._cleared = time.monotonic()
        folder = generation.parent
        try:
            self._file = self._opened(writable)
            try:
                self.writable, self.registered = self._file.writable, self._file.registered
                with nullcontext() if self.registered else no_writer(generation, timeout):
                    complete(self._file, generation / "data.mdb")
                    # The version first: another one may have other tables.
                    self.tables = self._opened_tables((SETTINGS,))
                    self.id = self._check_format()
                    self.tables = self._opened_tables(record_layout.TABLES)
                self._file.inner.reader_check()  # give back what killed processes held
            except BaseException:
                self._file.close()
                raise
        except FOREIGN as error:
            raise NotADatabaseError(f"'{folder}' is no memdb database: {error}") from error
        except (lmdb.Error, FileNotFoundError) as error:  # what it has may go meanwhile
            raise StorageError(f"cannot open '{folder}': {error}") from error

    def _opened(self, writable: bool) -> LmdbFile:
        """The file, to be written; or, if it need not be `writable` and cannot, to be read."""
        size = map_size((self.generation / "data.mdb").stat().st_size, len(self._open))
        try:
            return LmdbFile(self.generation, size, **_FLAGS[self.durability])
        except StorageError as error:
            if writable or isinstance(error, BusyError):
                raise
        return LmdbFile(self.generation, size, read_only=True)

    def _opened_tables(self, names: Iterable[str]) -> dict[str, Any]:
        return open_tables(self._file.inner, names, read_only=not self.writable)

    @classmethod
    def acquire(
        cls,
        generation: Path,
        durability: Durability | None,
        *,
        writable: bool = True,
        timeout: float = BUSY_TIMEOUT,
    ) -> Environment:
        """The environment of a generation; each `acquire` needs a `release`.

        Args:
            generation: its folder.
            durability: None: as it is open in this process, or else `full`.
            writable: False: where it cannot be written, it may be one that can only be read.
            timeout: seconds to wait for a writer that is at work.

        Raises:
            NotADatabaseError: the files are not a database's.
            FormatError: a format version that this release does not read.
            BusyError: a writer is not done in time.
            InvalidInputError: it is open in this process with another durability, or to be read
                alone.
        """
        key = cls._key_of(generation)
        with cls._guard:
            found = cls._found(key, generation, durability, writable)
        if found is not None:
            return found
        # LMDB looks up tables under its lock of writers. Who replaces the generation does not hold
        # that, and may take long; it may be this thread.
        with (
            nullcontext()
            if is_writing(generation)
            else no_writer(generation, timeout, but_one_that_replaces=True),
            cls._guard,  # not before: others need not wait with this one
        ):
            found = cls._found(key, generation, durability, writable)
            if found is None:
                found = cls(generation.absolute(), key, durability or "full", writable, timeout)
                cls._open[key] = found
            return found

    @classmethod
    def _found(
        cls,
        key: tuple[int, int],
        generation: Path,
        durability: Durability | None,
        writable: bool,
    ) -> Environment | None:
        """What is open already, if it is as it should be."""
        found = cls._open.get(key)
        if found is None:
            return None
        if durability not in (None, found.durability):
            raise InvalidInputError(
                f"'{generation.parent}' is already open in this process with durability "
                f"'{found.durability}'; close it, or open it with the same"
            )
        if writable and not found.writable:
            raise InvalidInputError(
                f"'{generation.parent}' is already open in this process, and only to be read; "
                "close it first"
            )
        found._users += 1
        return found

    @staticmethod
    def _key_of(generation: Path) -> tuple[int, int]:
        try:
            file = (generation / "data.mdb").stat()
        except OSError as error:
            raise StorageError(f"cannot open '{generation.parent}': {error}") from error
        return file.st_dev, file.st_ino  # a folder may be moved, or deleted and made anew

    def use(self) -> None:
        """Count one more user, which has to `release` it."""
        with self._guard:
            self._users += 1

    def release(self) -> None:
        """Give it back; the last user closes it."""
        with self._guard:
            self._users -= 1
            self._last_ones()

    def _last_ones(self) -> None:
        """Close what nobody uses any more, and tell who waits for transactions to end."""
        if self._growing:
            self._changed.notify_all()
        if self._users == 0 and self._pid == os.getpid():
            self._open.pop(self._key, None)
            self._file.close()

    def require_unforked(self) -> None:
        """Raise `ForkedProcessError` in a child of the process that opened it."""
        if self._pid != os.getpid():
            raise ForkedProcessError(
                f"'{self.generation.parent}' was opened before this process was forked. Open it "
                "anew in this process, or start processes with the 'spawn' method."
            )

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that opened it."""
        return self._pid != os.getpid()

    # --- transactions ---

    def enter(self) -> None:
        """Count one more user that has a transaction; `begin_reading` goes on from here."""
        with self._guard:
            if self._growing:  # a thread that has one open already must not wait long
                self._changed.wait_for(lambda: not self._growing, _GIVES_WAY)
            self._users += 1
            self._transactions += 1

    def begin_reading(self, timeout: float) -> Any:
        """A read transaction of LMDB, for who did `enter`; to be given to `end_reading`.

        Raises:
            BusyError: no place for a reader is left; or the file has outgrown the map, and this
                process keeps a transaction open; or a writer is not done that has to be kept out.
        """
        try:
            if self.registered:
                try:
                    return self._file.inner.begin(buffers=True)
                except lmdb.Error:  # that could be mended
                    return self._begun(timeout, write=False)
            with ExitStack() as stack:
                stack.enter_context(no_writer(self.generation, timeout))
                inner = self._begun(timeout, write=False)
                self._keeping_out[id(inner)] = stack.pop_all()
                return inner
        except BaseException:
            self._end()
            self.release()
            raise

    def end_reading(self, inner: Any) -> None:
        """End a read transaction."""
        if self._pid != os.getpid():  # it is the parent's: its place in LMDB's table is, too
            return
        try:
            inner.abort()
            if not self.registered:
                self._keeping_out.pop(id(inner)).close()
        finally:
            with self._guard:
                self._transactions -= 1
                self._users -= 1
                if self._growing or not self._users:
                    self._last_ones()

    def begin_writing(self, timeout: float) -> Any:
        """A write transaction of LMDB, to be given to `end_writing`. Other writers are kept out
        already.

        Raises:
            BusyError: the map has to grow, and this process keeps a transaction open.
        """
        if time.monotonic() - self._cleared > _CLEAR_EVERY:
            self._clear_readers()
        self._make_room(timeout)
        with self._guard:
            self._transactions += 1
        try:
            return self._begun(timeout, write=True)
        except BaseException:
            self._end()
            raise

    def end_writing(self, inner: Any, *, commit: bool) -> None:
        """End a write transaction.

        Raises:
            ForkedProcessError: in a child that was forked meanwhile; it is the parent's to commit.
            lmdb.Error: it cannot be committed; then it is undone.
        """
        self.require_unforked()
        try:
            (inner.commit if commit else inner.abort)()
        finally:
            self._end()

    def map_was_full(self) -> None:
        """Have the next write make the map larger."""
        self._room = 2 * self._map_size()

    def _begun(self, timeout: float, *, write: bool) -> Any:
        """LMDB's transaction; this thread is counted already."""
        try:
            return self._file.inner.begin(write=write, buffers=True)
        except lmdb.ReadersFullError:
            self._clear_readers()
        except lmdb.MapResizedError:
            self._follow_file(timeout)
        while True:
            try:
                return self._file.inner.begin(write=write, buffers=True)
            except lmdb.ReadersFullError as error:
                raise self._file.explained(error) from error
            except lmdb.MapResizedError:
                self._follow_file(timeout)

    def _follow_file(self, timeout: float) -> None:
        """Map all of a file that another process made larger than the map. This thread is counted
        among those with a transaction, and has none."""
        self._end()
        try:
            if not self._grow(self._file_size(), timeout):
                raise self.outgrown()
        finally:
            with self._guard:
                self._transactions += 1

    def _end(self) -> None:
        """Count one transaction less."""
        with self._guard:
            self._transactions -= 1
            if self._growing:
                self._changed.notify_all()

    def _clear_readers(self) -> None:
        """Readers that died hold pages, and places in LMDB's table of readers."""
        self._cleared = time.monotonic()
        self._file.inner.reader_check()

    # --- the map ---

    def _make_room(self, timeout: float) -> None:
        """Before a write: enlarge the map if it is nearly full. While there is room, only if that
        need not wait."""
        used, room = self._file.sizes()
        if self._room is not None:
            needed, self._room = self._room, None
            self._grow(needed, timeout)
        elif used > room // 8 * 7:
            self._grow(2 * used, timeout)
        elif used > room // 2 and not self._transactions:
            with suppress(BusyError):
                self._grow(2 * used, 0.0)

    def _grow(self, least: int, timeout: float) -> bool:
        """Map at least so many bytes, once no transaction of this process is open; whether the
        system gives them.

        Raises:
            BusyError: a transaction stays open.
        """
        with self._guard:
            self._growing += 1
            try:
                if not self._changed.wait_for(lambda: self._transactions == 0, timeout):
                    raise BusyError(
                        f"'{self.generation.parent}' has outgrown the address space that it has in "
                        f"this process ({self._map_size()} bytes). It gets more once no "
                        f"transaction is open, and one was for {timeout:g} s: end your "
                        "snapshots, and try again"
                    )
                size = 4 * least
                while self._map_size() < least <= size:
                    self._file.remap(size)
                    size //= 2
                return self._map_size() >= least
            finally:
                self._growing -= 1
                self._changed.notify_all()

    def _map_size(self) -> int:
        return self._file.sizes()[1]

    def outgrown(self) -> StorageError:
        """What to raise where the map cannot hold the file."""
        return StorageError(
            f"'{self.generation.parent}' has outgrown the address space that this process may "
            "take; raise its limit (`ulimit -v`), and try again"
        )

    def _file_size(self) -> int:
        """Bytes of the file; another process may have made it larger than our map."""
        try:
            return (self.generation / "data.mdb").stat().st_size
        except OSError:  # a compaction removed it: what this process had of it goes on
            return self._map_size()

    # --- what it is ---

    def sync(self) -> None:
        """Wait until all that was committed, by whichever process, is on the disk, whatever the
        durability."""
        self._file.inner.sync(True)

    def copy(self, folder: Path) -> None:
        """Write the state of this moment, without free pages, as `data.mdb` of a folder."""
        self._file.inner.copy(str(folder), compact=True)

    def size(self) -> int:
        """Bytes of the file, as far as LMDB uses it."""
        return self._file.sizes()[0]

    def _check_format(self) -> str:
        """The database's id, if it has the format of this release."""
        folder = self.generation.parent
        with self._file.inner.begin(buffers=True) as inner:
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

    @classmethod
    def _after_fork(cls) -> None:
        """In a child: what the parent has open stays the parent's, and is never closed here."""
        cls._guard = threading.Lock()  # a thread of the parent may have the old one
        cls._changed = threading.Condition(cls._guard)
        for environment in cls._open.values():
            environment._file.abandon()
        cls._inherited.extend(cls._open.values())
        cls._open = {}
        lmdb_file.after_fork()


os.register_at_fork(after_in_child=Environment._after_fork)


def is_open(generation: Path) -> bool:
    """Whether this process has a generation open. Then LMDB's files must not be opened in another
    way: see `lmdb_file`."""
    return Environment._key_of(generation) in Environment._open


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
