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
import numpy as np
import zstandard
from numpy.typing import NDArray

from memdb import layout
from memdb.errors import (
    CorruptRecordError,
    ForkedProcessError,
    FormatError,
    MismatchError,
    NotADatabaseError,
    StorageError,
)
from memdb.folder import SharedLock, new_database
from memdb.layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    REFERENCES,
    SETTINGS,
    DocumentEntry,
    integer_key,
)
from memdb.records import Reference

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
            transaction._finish()

    @contextmanager
    def _begin(self, write: bool) -> Iterator[Transaction]:
        self._require_unforked()
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
        with self._begin(write=False) as transaction:
            sizes = {name: transaction.size(name) for name in layout.TABLES}
        return {**sizes, "file": (self.generation / "data.mdb").stat().st_size}


class Transaction:
    """Typed access to the tables. Made by `Store.read` and `Store.write`."""

    def __init__(self, inner: Any, tables: dict[str, Any]) -> None:
        self._inner = inner
        self._tables = tables
        self._changes: list[tuple[int, int]] = []

    # --- settings ---

    def setting(self, name: str) -> Any:
        """A setting's JSON value, or None."""
        found = self._get(SETTINGS, name.encode())
        return None if found is None else self._read(SETTINGS, name.encode(), found, _json)

    def put_setting(self, name: str, value: object) -> None:
        """Store a setting as JSON."""
        self._put(SETTINGS, name.encode(), 1, layout.json_payload(value))

    def tokenizer(self) -> str | None:
        """The text of the model's tokenizer.json, or None."""
        found = self._get(SETTINGS, b"tokenizer")
        if found is None:
            return None
        return str(
            self._read(SETTINGS, b"tokenizer", found, lambda _, p: layout.decompress(p).decode())
        )

    def put_tokenizer(self, text: str) -> None:
        """Store the tokenizer, compressed."""
        self._put(SETTINGS, b"tokenizer", 1, zstandard.compress(text.encode(), 9))

    # --- documents ---

    def document(self, name: str) -> DocumentEntry | None:
        """The document map's entry of an id, or None."""
        key = name.encode()
        found = self._get(DOCUMENTS, key)
        return None if found is None else self._read(DOCUMENTS, key, found, DocumentEntry.read)

    def put_document(self, name: str, entry: DocumentEntry, metadata: dict[str, Any]) -> None:
        """Store the entry and the metadata; the references are put one by one."""
        self._put(DOCUMENTS, name.encode(), entry.version, entry.payload())
        self._put(METADATA, name.encode(), entry.version, layout.json_payload(metadata))

    def delete_document(self, name: str, entry: DocumentEntry) -> None:
        """Remove a document with all its references."""
        for reference in entry.references:
            self._delete_reference(reference)
        self._inner.delete(name.encode(), db=self._tables[DOCUMENTS])
        self._inner.delete(name.encode(), db=self._tables[METADATA])

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        """A document's metadata; of this version, if one is given."""

        def read(found: int, payload: memoryview) -> dict[str, Any]:
            if version not in (None, found):
                raise ValueError(f"it has version {found}, its document version {version}")
            return dict(layout.read_json(payload))

        return self._require(METADATA, name.encode(), read)  # type: ignore[no-any-return]

    def documents(self, after: str = "") -> Iterator[tuple[str, DocumentEntry]]:
        """All documents with an id behind `after`, in the order of their ids' bytes."""
        cursor = self._inner.cursor(self._tables[DOCUMENTS])
        start = after.encode() + b"\0" if after else b""
        if cursor.set_range(start) if start else cursor.first():
            for key, record in cursor:
                name = bytes(key)
                found = layout.unseal(DOCUMENTS, name, record)
                yield name.decode(), self._read(DOCUMENTS, name, found, DocumentEntry.read)

    # --- references ---

    def next_references(self, count: int) -> range:
        """Take `count` new reference ids; they are never given again."""
        counters = self.setting("counters")
        first = counters["next_reference"]
        self.put_setting("counters", {**counters, "next_reference": first + count})
        return range(first, first + count)

    def reference(self, number: int) -> Reference:
        """A reference; `CorruptRecordError` if the map names it and it is not there."""
        return self._require(  # type: ignore[no-any-return]
            REFERENCES,
            integer_key(number),
            lambda version, payload: layout.read_reference(number, version, payload),
        )

    def embedding(self, number: int) -> NDArray[np.float32]:
        """The reference's vector."""
        return self._require(EMBEDDINGS, integer_key(number), _vector)  # type: ignore[no-any-return]

    def embeddings(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Every reference's id and vector, by ascending id; `CorruptRecordError` if a reference has
        none."""
        if self.count(EMBEDDINGS) != self.count(REFERENCES):
            for key in self._inner.cursor(self._tables[REFERENCES]).iternext(values=False):
                self._require(EMBEDDINGS, bytes(key), _vector)
        for key, record in self._inner.cursor(self._tables[EMBEDDINGS]):
            found = layout.unseal(EMBEDDINGS, key, record)
            vector = self._read(EMBEDDINGS, bytes(key), found, _vector)
            yield layout.read_integer_key(key), vector

    def put_reference(
        self, reference: Reference, embedding: NDArray[np.float32], memory: bytes | None
    ) -> None:
        """Store a new reference with its vector, and its memory unless it stays cold."""
        key = integer_key(reference.id)
        self._put(REFERENCES, key, reference.version, layout.reference_payload(reference))
        self._put(EMBEDDINGS, key, reference.version, embedding.astype("<f4").tobytes())
        self._changes.append((layout.INSERTED, reference.id))
        if memory is not None:
            self.put_memory(reference, memory)

    def _delete_reference(self, number: int) -> None:
        for table in (REFERENCES, EMBEDDINGS, MEMORIES):
            self._inner.delete(integer_key(number), db=self._tables[table])
        self._changes.append((layout.DELETED, number))

    def has_reference(self, number: int) -> bool:
        """Whether the reference is still there."""
        return self._inner.get(integer_key(number), db=self._tables[REFERENCES]) is not None

    # --- memories ---

    def is_warm(self, number: int) -> bool:
        """Whether the reference has a memory."""
        return self._inner.get(integer_key(number), db=self._tables[MEMORIES]) is not None

    def memory(self, number: int, decode: Any) -> Any:
        """`decode(payload)` of the reference's memory, or None if it is cold."""
        key = integer_key(number)
        found = self._get(MEMORIES, key)
        return None if found is None else self._read(MEMORIES, key, found, lambda _, p: decode(p))

    def put_memory(self, reference: Reference, payload: bytes) -> None:
        """Store a reference's memory."""
        self._put(MEMORIES, integer_key(reference.id), reference.version, payload)
        self._changes.append((layout.REMEMBERED, reference.id))

    # --- change log ---

    def last_change(self) -> int:
        """Number of the newest change; 0 in a new database."""
        return int(self.setting("counters")["last_change"])

    def changes(self, after: int) -> Iterator[NDArray[Any]]:
        """The changes behind number `after`, oldest first; fields `what` and `reference`."""
        cursor = self._inner.cursor(self._tables[CHANGES])
        if cursor.set_range(integer_key(after + 1)):
            for key, record in cursor:
                found = layout.unseal(CHANGES, key, record)
                yield self._read(CHANGES, bytes(key), found, lambda _, p: layout.read_changes(p))

    def _finish(self) -> None:
        """Write what this transaction did to the change log."""
        if not self._changes:
            return
        counters = self.setting("counters")
        number = counters["last_change"] + 1
        self._put(CHANGES, integer_key(number), 1, layout.changes_payload(self._changes))
        self.put_setting("counters", {**counters, "last_change": number})

    # --- counts ---

    def count(self, table: str) -> int:
        """Records of a table."""
        return int(self._inner.stat(self._tables[table])["entries"])

    def size(self, table: str) -> int:
        """Bytes of a table's pages."""
        stat = self._inner.stat(self._tables[table])
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * stat["psize"])

    # --- plumbing ---

    def _get(self, table: str, key: bytes) -> tuple[int, memoryview] | None:
        record = self._inner.get(key, db=self._tables[table])
        return None if record is None else layout.unseal(table, key, record)

    def _read(self, table: str, key: bytes, found: tuple[int, memoryview], decode: Any) -> Any:
        """Decode a payload; what goes wrong is a damaged record and is named, or a newer one."""
        try:
            return decode(*found)
        except (FormatError, MismatchError) as error:
            raise type(error)(
                f"record {layout.readable(table, key)} of table '{table}': {error}"
            ) from error
        except Exception as error:
            raise CorruptRecordError(table, layout.readable(table, key), str(error)) from error

    def _require(self, table: str, key: bytes, decode: Any) -> Any:
        found = self._get(table, key)
        if found is None:
            raise CorruptRecordError(table, layout.readable(table, key), "it is missing")
        return self._read(table, key, found, decode)

    def _put(self, table: str, key: bytes, version: int, payload: bytes) -> None:
        self._inner.put(key, layout.seal(table, key, version, payload), db=self._tables[table])


def _vector(_: int, payload: memoryview) -> NDArray[np.float32]:
    return layout.read_embedding(payload)


def _json(_: int, payload: memoryview) -> Any:
    return layout.read_json(payload)


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
