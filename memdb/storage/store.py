"""The store: ids -> records. Everything that may not be lost is here.

A write happens in one transaction, which reaches the disk before it is acknowledged; a reader sees
the state at the moment it began, and neither waits for the other. Each transaction first looks at
`CURRENT`: where a compaction put another generation in the place of the one that is open, the
store goes on with that.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lmdb

from memdb.errors import CorruptRecordError, InvalidInputError, StorageError
from memdb.storage import record_layout
from memdb.storage.environment import (
    Durability,
    Environment,
    open_lmdb,
    open_tables,
)
from memdb.storage.folder import Place, new_database, only_writer, opening
from memdb.storage.transaction import Transaction


class Store:
    """An open database's records. Threads of a process may share it; another process opens its own.

    Attributes:
        folder: the database's folder.
        id: 32 hexadecimal digits, drawn at creation: a file derived from a database (an index)
            names it, and so is not taken for that of one made anew in the same place.
        durability: as it was asked for; see `MemDB.open`.
    """

    def __init__(self, folder: Path, durability: Durability | None = None) -> None:
        if durability not in (None, "full", "normal", "off"):
            raise InvalidInputError(
                f"durability is {durability!r}; there are 'full', 'normal' and 'off'"
            )
        self.folder = folder
        self.durability = durability
        self._guard = threading.Lock()
        self._closed = False
        with opening(folder) as generation:
            self._environment = Environment.acquire(generation, durability)
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
    ) -> None:
        """Make a database that holds these settings, a tokenizer and the parameters of fitted
        codecs by name, and nothing else."""
        with new_database(folder) as generation:
            fill_generation(generation, secrets.token_hex(16), settings, tokenizer, codecs)

    @property
    def generation(self) -> Path:
        """The folder of the generation in use, absolute."""
        return self._environment.generation

    def close(self) -> None:
        """Give the store back. Transactions that are still open in other threads are finished."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._place.close()
        self._environment.release()

    def read(self) -> ReadTransaction:
        """A consistent view of this moment, in a `with` statement. Records come out as copies and
        outlive it."""
        return ReadTransaction(self)

    @contextmanager
    def write(self, *, waiting: Callable[[], None] | None = None) -> Iterator[Transaction]:
        """All or nothing: on an exception nothing of it happened; after it, it is on the disk.

        One writer at a time, over all processes; others wait.

        Args:
            waiting: called now and then while it waits for another writer; what it raises ends the
                waiting.
        """
        with ExitStack() as stack:
            environment = self._take_for_writing(stack, waiting)
            stack.push(self._raise_as_ours)
            inner = stack.enter_context(environment.begin(write=True))
            transaction = Transaction(inner, environment.tables, environment)
            yield transaction
            transaction.finish()

    def _take_for_writing(
        self, stack: ExitStack, waiting: Callable[[], None] | None
    ) -> Environment:
        """The current generation's environment, and nobody else writes while the stack lasts."""
        while True:
            environment = self.take()
            with ExitStack() as unless_kept:
                unless_kept.callback(environment.release)
                try:
                    unless_kept.enter_context(only_writer(environment.generation, waiting))
                except OSError as error:
                    if self._place.stamp() == self._stamp:
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
        with self._guard:
            if self._closed:
                raise StorageError(f"'{self.folder}' is closed")
            self._environment.require_unforked()
            if self._place.stamp() != self._stamp:
                self._follow()
            self._environment.use()
            return self._environment

    def _follow(self) -> None:
        """Go over to the generation that `CURRENT` names now."""
        self._place.require_same()
        with opening(self._place.folder) as generation:
            stamp = self._place.stamp()
            new = Environment.acquire(generation, self.durability)
        if new.id != self.id:
            new.release()
            raise self._place.gone()
        old, self._environment, self._stamp = self._environment, new, stamp
        old.release()

    def _raise_as_ours(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what LMDB raised as an error of memdb."""
        if isinstance(error, lmdb.MapFullError):
            raise StorageError(
                f"'{self.folder}' has outgrown the address space that this process may take "
                f"({error}); raise its limit (`ulimit -v`) and open the database again"
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
        environment = self._environment = self._store.take()
        try:
            self._inner = environment.begin(write=False)
        except lmdb.Error as error:
            environment.release()
            self._store._raise_as_ours(None, error, None)
            raise
        return Transaction(self._inner, environment.tables, environment)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._inner.abort()
        finally:
            self._environment.release()
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
            environment = open_lmdb(generation)
            stack.callback(environment.close)
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
