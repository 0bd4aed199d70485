"""The store: ids -> records. Everything that may not be lost is here.

A write happens in one transaction, which reaches the disk before it is acknowledged; a reader sees
the state at the moment it began, and neither waits for the other. Each transaction first looks at
`CURRENT`: where a compaction put another generation in the place of the one that is open, the
store goes on with that.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import inf
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lmdb

from memdb.errors import BusyError, CorruptRecordError, InvalidInputError, StorageError
from memdb.storage import record_layout
from memdb.storage.environment import Durability, Environment
from memdb.storage.folder import (
    Place,
    is_writing,
    new_database,
    only_writer,
    opening,
    writers_are_kept_out,
)
from memdb.storage.lmdb_file import lmdb_file, open_tables
from memdb.storage.locks import BUSY_TIMEOUT
from memdb.storage.transaction import Transaction
from memdb.types.shown import shown_value

_LOOK = 0.05  # seconds between two looks of who waits for another thread


class Store:
    """An open database's records. Threads of a process may share it; another process opens its own.

    Args:
        folder: the database's.
        durability: what a write has survived when it is acknowledged; None: as it is open in this
            process, or else `full`.
        read_only: refuse to write; then the medium may be one that cannot be written.
        busy_timeout: seconds that a transaction waits for others.

    Attributes:
        folder: the database's folder.
        id: 32 hexadecimal digits, drawn at creation: a file derived from a database (an index)
            names it, and so is not taken for that of one made anew in the same place.
        durability: as it was asked for; see `MemDB.open`.
        read_only: whether it refuses to write.
        busy_timeout: as given.
    """

    def __init__(
        self,
        folder: Path,
        durability: Durability | None = None,
        *,
        read_only: bool = False,
        busy_timeout: float = BUSY_TIMEOUT,
    ) -> None:
        if durability not in (None, "full", "normal", "off"):
            raise InvalidInputError(
                f"durability is {durability!r}; there are 'full', 'normal' and 'off'"
            )
        self.folder = folder
        self.durability = durability
        self.read_only = read_only
        self.busy_timeout = checked_timeout(busy_timeout)
        self._guard = threading.Lock()
        self._closed = False
        busy_timeout = self.busy_timeout
        with opening(folder, busy_timeout, read_only=read_only) as generation:
            self._environment = Environment.acquire(
                generation, durability, writable=not read_only, timeout=busy_timeout
            )
            try:
                self._place = Place(folder)
                self._stamp = self._place.stamp()
            except BaseException:
                self._environment.release()
                raise
        self.id = self._environment.id

    @classmethod
    def create(
        cls,
        folder: Path,
        settings: dict[str, Any],
        tokenizer: str | None,
        codecs: Mapping[str, bytes] = MappingProxyType({}),
        *,
        busy_timeout: float = BUSY_TIMEOUT,
    ) -> None:
        """Make a database that holds these settings, a tokenizer and the parameters of fitted
        codecs by name, and nothing else. For as many seconds it waits for another process that
        makes one there."""
        with new_database(folder, busy_timeout) as generation:
            fill_generation(generation, secrets.token_hex(16), settings, tokenizer, codecs)

    @property
    def generation(self) -> Path:
        """The folder of the generation in use, absolute."""
        return self._environment.generation

    def home(self) -> Path:
        """The database's folder, absolute, for what else lies in it: the process may have changed
        its own folder since. `StorageError` if it is no longer the one that was opened."""
        self._place.require_same()
        return self._place.folder

    @property
    def is_writing(self) -> bool:
        """Whether this thread is in the middle of a write to the database, through whichever
        handle: another one, begun now, would wait for itself, and is refused."""
        return is_writing(self.generation)

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that opened it, which has to open its own."""
        return self._environment.is_forked

    def require_unforked(self) -> None:
        """Raise `ForkedProcessError` in a child of the process that opened it."""
        self._environment.require_unforked()

    def writers_are_kept_out(self) -> bool:
        """Whether nothing can be written for now, and for longer than a write takes: since a
        compaction is under way, say, or this thread is in the middle of a write, or since it is
        open to be read alone."""
        return self.read_only or self.is_writing or writers_are_kept_out(self.generation)

    def close(self) -> None:
        """Give the store back. Transactions that are still open in other threads are finished."""
        if self.is_forked:  # a thread of the parent may have the guard
            self._closed = True
            return
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._place.close()
        self._environment.release()

    def read(self) -> ReadTransaction:
        """A consistent view of this moment, in a `with` statement. Records come out as copies and
        outlive it.

        Raises:
            StorageError: it is closed, or LMDB refuses.
            BusyError: as many read at once as there is room for.
            ForkedProcessError: this is a child of the process that opened it.
        """
        return ReadTransaction(self)

    def require_writable(self) -> None:
        """Raise `StorageError` if it was opened to be read alone."""
        if self.read_only:
            raise StorageError(
                f"'{self.folder}' was opened with read_only=True; open it without to write"
            )

    @contextmanager
    def write(
        self,
        busy_timeout: float | None = None,
        *,
        waiting: Callable[[], None] | None = None,
    ) -> Iterator[Transaction]:
        """All or nothing: on an exception nothing of it happened; after it, it is on the disk.

        One writer at a time, over all processes; others wait.

        Args:
            busy_timeout: seconds to wait for others; default: the store's.
            waiting: called now and then meanwhile; what it raises ends the waiting.

        Raises:
            StorageError: it is read-only, or closed; this thread is in the middle of a write to it
                already; the disk refuses.
            BusyError: another writer is not done in time.
            ForkedProcessError: this is a child of the process that opened it.
        """
        self.require_writable()
        timeout = self.busy_timeout if busy_timeout is None else busy_timeout
        with ExitStack() as stack:
            environment = self._take_for_writing(stack, timeout, waiting)
            stack.push(self._raise_as_ours)
            inner = environment.begin_writing(timeout)
            try:
                transaction = Transaction(inner, environment.tables, environment)
                yield transaction
                transaction.finish()
            except BaseException:
                environment.end_writing(inner, commit=False)
                raise
            environment.end_writing(inner, commit=True)

    def _take_for_writing(
        self, stack: ExitStack, timeout: float, waiting: Callable[[], None] | None
    ) -> Environment:
        """The current generation's environment, and nobody else writes while the stack lasts."""
        end = time.monotonic() + timeout
        while True:
            environment = self.take()
            with ExitStack() as unless_kept:
                unless_kept.callback(environment.release)
                if not is_writing(environment.generation):  # else it is refused below
                    _take_turn(environment, end, timeout, waiting)
                    unless_kept.callback(environment.turn.release)
                try:
                    unless_kept.enter_context(
                        only_writer(environment.generation, timeout, waiting=waiting, end=end)
                    )
                except OSError as error:
                    # Another thread may have gone over to the next generation meanwhile.
                    same = environment is self._environment
                    if same and self._place.stamp() == self._stamp:
                        self._place.require_same()
                        raise StorageError(f"cannot write to '{self.folder}': {error}") from error
                    continue
                # While this one waited for its turn, a compaction may have had its own: what is
                # written to the generation before it would be lost.
                if environment is self._environment and self._place.stamp() == self._stamp:
                    self._place.require_same()
                    stack.push(unless_kept.pop_all())
                    return environment

    def take(self) -> Environment:
        """The current generation's environment, counted as used."""
        self._environment.require_unforked()
        with self._guard:
            self._look()
            self._environment.use()
            return self._environment

    def begin_reading(self) -> tuple[Environment, Any]:
        """The current generation's environment, and a transaction of LMDB to be ended with
        `Environment.end_reading`."""
        self._environment.require_unforked()
        with self._guard:
            if self._closed or self._place.stamp() != self._stamp:
                self._look()
            environment = self._environment
            environment.enter()
        return environment, environment.begin_reading(self.busy_timeout)

    def _look(self) -> None:
        """Go over to another generation if there is one."""
        if self._closed:
            raise StorageError(f"'{self.folder}' is closed")
        if self._place.stamp() != self._stamp:
            self._follow()

    def _follow(self) -> None:
        """Go over to the generation that `CURRENT` names now."""
        self._place.require_same()
        folder, alone = self._place.folder, self.read_only
        with opening(folder, self.busy_timeout, read_only=alone) as generation:
            stamp = self._place.stamp()
            new = Environment.acquire(
                generation, self.durability, writable=not alone, timeout=self.busy_timeout
            )
        if new.id != self.id:
            new.release()
            raise self._place.gone()
        old, self._environment, self._stamp = self._environment, new, stamp
        old.release()

    def _raise_as_ours(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what LMDB raised as an error of memdb."""
        if isinstance(error, lmdb.MapFullError):
            self._environment.map_was_full()
            raise StorageError(
                f"'{self.folder}' had too little address space in this process for this write "
                f"({error}); nothing was written. Run it again: it gets more. If that does not "
                "help, raise the process's limit (`ulimit -v`), and open the database again"
            ) from error
        if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError)):
            raise CorruptRecordError("?", "?", f"LMDB: {error}") from error
        if isinstance(error, lmdb.Error):
            raise StorageError(f"'{self.folder}': {error}") from error


class ReadTransaction:
    """A read transaction as a `with` statement has it. (A generator would take longer than what a
    retrieval reads.)"""

    __slots__ = ("_environment", "_inner", "_store")

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> Transaction:
        try:
            environment, self._inner = self._store.begin_reading()
        except lmdb.Error as error:
            self._store._raise_as_ours(None, error, None)
            raise
        self._environment = environment
        return Transaction(self._inner, environment.tables, environment)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._environment.end_reading(self._inner)
        if error is not None:
            self._store._raise_as_ours(kind, error, trace)


def fill_generation(
    generation: Path,
    identity: str,
    settings: dict[str, Any],
    tokenizer: str | None,
    codecs: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write all tables, and the settings of a new database, into an empty generation."""
    try:
        with ExitStack() as stack:
            environment = stack.enter_context(lmdb_file(generation))
            tables = open_tables(environment, record_layout.TABLES, create=True)
            transaction = Transaction(stack.enter_context(environment.begin(write=True)), tables)
            transaction.put_setting(
                "format", {"id": identity, "version": record_layout.FORMAT_VERSION}
            )
            for name, value in settings.items():
                transaction.put_setting(name, value)
            transaction.put_setting(
                "counters", {"next_reference": 1, "last_change": 0, "trimmed": 0}
            )
            if tokenizer is not None:
                transaction.put_tokenizer(tokenizer)
            for name, parameters in codecs.items():
                transaction.put_codec_parameters(name, parameters)
    except lmdb.Error as error:
        raise StorageError(f"cannot make a database at '{generation.parent}': {error}") from error


def checked_timeout(seconds: float) -> float:
    """A time to wait, as seconds that a lock takes; `InvalidInputError` if it is none."""
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 <= seconds < inf:
        raise InvalidInputError(
            f"busy_timeout must be a number of seconds, 0 or more, got {shown_value(seconds)}"
        )
    return float(min(seconds, threading.TIMEOUT_MAX))


def _take_turn(
    environment: Environment, end: float, timeout: float, waiting: Callable[[], None] | None
) -> None:
    """Wait for the other threads of this process."""
    step = inf if waiting is None else _LOOK
    while not environment.turn.acquire(timeout=max(0.0, min(step, end - time.monotonic()))):
        if waiting is not None:
            waiting()
        if time.monotonic() < end:
            continue
        raise BusyError(
            f"cannot write to '{environment.generation.parent}': another thread of this process is "
            f"writing, and was not done after {timeout:g} s"
        )
