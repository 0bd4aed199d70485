"""One transaction: typed access to the tables. Records are checked as they are read, and what is
read is a copy that outlives the transaction."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
import zstandard
from numpy.typing import NDArray

from memdb.errors import CorruptRecordError, FormatError, MismatchError
from memdb.storage import record_layout
from memdb.storage.environment import Environment
from memdb.storage.record_layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    FORGOTTEN,
    INSERTED,
    MEMORIES,
    METADATA,
    REFERENCES,
    SETTINGS,
    DocumentEntry,
    integer_key,
)
from memdb.types.canonical import json_payload, read_json
from memdb.types.document import Reference

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

T = TypeVar("T")

_seal_in = itemgetter(slice(8))


class Transaction:
    """Typed access to the tables. Made by `Store.read` and `Store.write`; nothing outside this
    room knows what stands behind it.

    Args:
        inner: LMDB's transaction.
        tables: LMDB's handles by name.
        environment: the generation that it reads; None outside a store.
    """

    def __init__(
        self, inner: Any, tables: dict[str, Any], environment: Environment | None = None
    ) -> None:
        self._inner = inner
        self._tables = tables
        self._environment = environment
        self._changes: list[tuple[int, int]] = []

    # --- what it reads ---

    @property
    def state(self) -> tuple[Path | None, int]:
        """What tells the state that it reads from every other: the generation, and a number that is
        one more with every write to that."""
        generation = None if self._environment is None else self._environment.generation
        return generation, int(self._inner.id())

    @property
    def generation(self) -> Path:
        """The folder of the generation that it reads: what is derived from that lies there."""
        return self._within_a_store().generation

    def require_unforked(self) -> None:
        """Raise `ForkedProcessError` in a child of the process that began it: its pages may be used
        again."""
        self._within_a_store().require_unforked()

    def sync(self) -> None:
        """Wait until the state that it reads is on the disk, whatever the durability. What is
        derived from a state, and kept, is kept after this: else a power cut might undo the state
        alone."""
        self._within_a_store().sync()

    def file_size(self) -> int:
        """Bytes of the generation's records on the disk."""
        return self._within_a_store().size()

    def pages_size(self) -> int:
        """Bytes of the pages of all tables."""
        return sum(self.size(name) for name in self._tables)

    def copy_file(self, folder: Path) -> None:
        """Copy the records of this moment into another generation's empty folder, as they are."""
        self._within_a_store().copy(folder)

    def _within_a_store(self) -> Environment:
        assert self._environment is not None
        return self._environment

    # --- settings ---

    def setting(self, name: str) -> Any:
        """A setting's JSON value, or None."""
        found = self._get(SETTINGS, name.encode())
        return None if found is None else decoded(SETTINGS, name.encode(), found, _json)

    def required_setting(self, name: str) -> Any:
        """A setting that every database has; `CorruptRecordError` if it is missing, or lacks a
        field that it must have."""
        return self._require(
            SETTINGS, name.encode(), lambda _, p: record_layout.checked_setting(name, read_json(p))
        )

    def read_setting(self, name: str, read: Callable[[Any], T]) -> T:
        """What `read` makes of a setting that every database has; `CorruptRecordError` if it
        refuses the value, with ValueError."""
        return self._require(  # type: ignore[no-any-return]
            SETTINGS, name.encode(), lambda _, p: read(read_json(p))
        )

    def optional_setting(self, name: str) -> Any:
        """As `required_setting`; None if it is missing."""
        found = self._get(SETTINGS, name.encode())
        return None if found is None else self.required_setting(name)

    def put_setting(self, name: str, value: object) -> None:
        """Store a setting as JSON."""
        self.put(SETTINGS, name.encode(), 1, json_payload(value))

    def delete_setting(self, name: str) -> None:
        """Remove a setting that may be missing."""
        self.delete_record(SETTINGS, name.encode())

    def tokenizer(self) -> str | None:
        """The text of the model's tokenizer.json, or None."""
        found = self._get(SETTINGS, b"tokenizer")
        if found is None:
            return None
        return str(
            decoded(
                SETTINGS, b"tokenizer", found, lambda _, p: record_layout.decompress(p).decode()
            )
        )

    def put_tokenizer(self, text: str) -> None:
        """Store the tokenizer, compressed."""
        self.put(SETTINGS, b"tokenizer", 1, zstandard.compress(text.encode(), 9))

    def codec_parameters(self, name: str) -> bytes:
        """Those of a fitted codec; `CorruptRecordError` if they are not there."""
        key = record_layout.codec_key(name)
        parameters: bytes = self._require(SETTINGS, key, lambda _, p: record_layout.decompress(p))
        return parameters

    def put_codec_parameters(self, name: str, parameters: bytes) -> None:
        """Store those of a fitted codec, compressed."""
        self.put(SETTINGS, record_layout.codec_key(name), 1, zstandard.compress(parameters, 3))

    def fitted_codecs(self) -> list[str]:
        """Names of the codecs whose parameters are there."""
        keys = (bytes(key).decode("utf-8", "replace") for key, _ in self.records(SETTINGS))
        prefix = record_layout.codec_key("").decode()
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]

    # --- documents ---

    def document(self, name: str) -> DocumentEntry | None:
        """The document map's entry of an id, or None."""
        key = name.encode()
        found = self._get(DOCUMENTS, key)
        return None if found is None else decoded(DOCUMENTS, key, found, DocumentEntry.read)

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        """A document's metadata; of this version, if one is given."""

        def read(found: int, payload: memoryview) -> dict[str, Any]:
            if version not in (None, found):
                raise ValueError(f"it has version {found}, its document version {version}")
            return record_layout.read_metadata(payload)

        return self._require(METADATA, name.encode(), read)  # type: ignore[no-any-return]

    def documents(self, after: str = "") -> Iterator[tuple[str, DocumentEntry]]:
        """All documents with an id behind `after`, in the order of their ids' bytes."""
        cursor = self._inner.cursor(self._tables[DOCUMENTS])
        start = after.encode() + b"\0" if after else b""
        if cursor.set_range(start) if start else cursor.first():
            for key, record in cursor:
                yield _document(bytes(key), record)

    def documents_at(self, places: Ids) -> Iterator[tuple[str, DocumentEntry]]:
        """The documents at some places, ascending, in the order of their ids' bytes, from 0."""
        cursor = self._inner.cursor(self._tables[DOCUMENTS])
        wanted = np.zeros(self.count(DOCUMENTS), np.bool_)
        wanted[places] = True
        for key, record in compress(cursor, wanted.tolist()):
            yield _document(bytes(key), record)

    # --- references ---

    def next_references(self, count: int) -> range:
        """Take `count` new reference ids; they are never given again."""
        counters = self.required_setting("counters")
        first = counters["next_reference"]
        self.put_setting("counters", {**counters, "next_reference": first + count})
        return range(first, first + count)

    def reference(self, number: int) -> Reference:
        """A reference; `CorruptRecordError` if the map names it and it is not there."""
        return self._require(  # type: ignore[no-any-return]
            REFERENCES,
            integer_key(number),
            lambda version, payload: record_layout.read_reference(number, version, payload),
        )

    def owner(self, number: int) -> str:
        """The id of a reference's document."""
        owner: str = self._require(
            REFERENCES, integer_key(number), lambda _, p: record_layout.read_owner(p).decode()
        )
        return owner

    def tokens(self, number: int) -> int:
        """A reference's length in tokens."""
        tokens: int = self._require(
            REFERENCES, integer_key(number), lambda _, p: record_layout.read_tokens(p)
        )
        return tokens

    def embedding(self, number: int) -> NDArray[np.float32]:
        """The reference's vector."""
        return self._require(EMBEDDINGS, integer_key(number), _vector)  # type: ignore[no-any-return]

    def embeddings(self, size: int = 4096) -> Iterator[tuple[Ids, Vectors]]:
        """All references' ids and vectors by ascending id, (n,) int64 and (n, dimension) float32,
        at most `size` at once; `CorruptRecordError` if a reference has none."""
        if self.count(EMBEDDINGS) != self.count(REFERENCES):
            for number in self.numbers(REFERENCES):
                self.embedding(number)
        cursor = self._inner.cursor(self._tables[EMBEDDINGS])
        entries = (
            (_number(EMBEDDINGS, key), record_layout.unseal(EMBEDDINGS, key, record)[1])
            for key, record in cursor
        )
        while batch := list(islice(entries, size)):
            numbers, payloads = zip(*batch, strict=True)
            yield np.array(numbers, np.int64), _stacked(payloads)

    def embeddings_of(self, numbers: Iterable[int]) -> Vectors:
        """The vectors of some references, (n, dimension) float32."""
        keys = [integer_key(int(number)) for number in numbers]
        return _stacked([self.payload(EMBEDDINGS, key) for key in keys])

    def numbers(self, table: str) -> Ids:
        """All keys of an integer table, ascending."""
        cursor = self._inner.cursor(self._tables[table])
        keys = list(map(bytes, cursor.iternext(values=False)))
        for key in keys:
            if len(key) != 8:
                _number(table, key)  # says so
        return np.frombuffer(b"".join(keys), "<i8").copy()

    def put_embedding(self, reference: Reference, embedding: NDArray[np.float32]) -> None:
        """Store a reference's vector."""
        key = integer_key(reference.id)
        self.put(EMBEDDINGS, key, reference.version, embedding.astype("<f4").tobytes())

    def delete_references(self, numbers: Iterable[int]) -> None:
        """Remove references, their vectors and memories."""
        for number in dict.fromkeys(numbers):
            gone = [
                self.delete_record(table, integer_key(number))
                for table in (REFERENCES, EMBEDDINGS, MEMORIES)
            ]
            if any(gone):
                self._changes.append((record_layout.DELETED, number))

    def has_reference(self, number: int) -> bool:
        """Whether the reference is still there."""
        return self.record(REFERENCES, integer_key(number)) is not None

    # --- memories ---

    def is_warm(self, number: int) -> bool:
        """Whether the reference has a memory."""
        return self.record(MEMORIES, integer_key(number)) is not None

    def put_memory(self, reference: Reference, payload: bytes) -> None:
        """Store a reference's memory."""
        self.replace_memory(reference.id, reference.version, payload)

    def replace_memory(self, number: int, version: int, payload: bytes) -> None:
        """Store the memory of a reference of that id and version."""
        self.put(MEMORIES, integer_key(number), version, payload)
        self._changes.append((record_layout.REMEMBERED, number))

    def delete_memory(self, number: int) -> None:
        """Make a warm reference cold."""
        if self.delete_record(MEMORIES, integer_key(number)):
            self._changes.append((record_layout.FORGOTTEN, number))

    # --- change log ---

    def last_change(self) -> int:
        """Number of the newest change; 0 in a new database."""
        return int(self.required_setting("counters")["last_change"])

    def changes(self, after: int) -> Iterator[NDArray[Any]]:
        """The changes behind number `after`, oldest first; fields `what` and `reference`. Entries
        that are about no reference, or that a later release wrote, are left out."""
        cursor = self._inner.cursor(self._tables[CHANGES])
        if cursor.set_range(integer_key(after + 1)):
            for key, record in cursor:
                found = record_layout.unseal(CHANGES, key, record)
                entries = decoded(
                    CHANGES, bytes(key), found, lambda _, p: record_layout.read_changes(p)
                )
                yield entries[(entries["what"] >= INSERTED) & (entries["what"] <= FORGOTTEN)]

    def change_seal(self, number: int) -> str | None:
        """What names a change, and with it the state behind it: 16 hexadecimal digits. A number
        alone does not: after a power cut that undid some changes, others get their numbers.

        Returns:
            None if the log does not reach back so far; empty if it begins there, and was cut by a
            release that gave no name.

        Raises:
            CorruptRecordError: the record is damaged.
        """
        key = integer_key(number)
        record = self.record(CHANGES, key)
        if record is not None:
            record_layout.unseal(CHANGES, key, record)
            return record_layout.seal_in(record)
        counters = self.required_setting("counters")
        return str(counters.get("trimmed_seal", "")) if number == counters["trimmed"] else None

    def log(self, changes: list[tuple[int, int]]) -> None:
        """Note what happened to references, for the change log."""
        self._changes.extend(changes)

    def finish(self) -> None:
        """Write what this transaction did to the change log."""
        if not self._changes:
            return
        counters = self.required_setting("counters")
        number = counters["last_change"] + 1
        entries = [*self._changes, record_layout.new_name()]
        self.put(CHANGES, integer_key(number), 1, record_layout.changes_payload(entries))
        self.put_setting("counters", {**counters, "last_change": number})

    def cut_log(self, last: int) -> None:
        """Begin the change log anew: all changes up to number `last` are no longer in it."""
        self.empty(CHANGES)
        counters = self.setting("counters")  # which had less fields in version 1
        name = secrets.token_hex(8)
        self.put_setting(
            "counters", {**counters, "last_change": last, "trimmed": last, "trimmed_seal": name}
        )

    # --- counts ---

    def count(self, table: str) -> int:
        """Records of a table."""
        return int(self._inner.stat(self._tables[table])["entries"])

    def size(self, table: str) -> int:
        """Bytes of a table's pages."""
        stat = self._inner.stat(self._tables[table])
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * stat["psize"])

    # --- records as they are ---

    def has_table(self, name: str) -> bool:
        """Whether it knows a table: one of an older format lacks some."""
        return name in self._tables

    def table_names(self) -> set[str]:
        """Names of all tables that are there."""
        return {bytes(key).decode("utf-8", "replace") for key, _ in self._inner.cursor()}

    def payload(self, table: str, key: bytes) -> bytes:
        """A copy of a record's payload, its seal checked; `CorruptRecordError` if there is none."""
        return self.version_and_payload(table, key)[1]

    def version_and_payload(self, table: str, key: bytes) -> tuple[int, bytes]:
        """As `payload`, with the version."""
        version, payload = self._there(table, key)
        return version, bytes(payload)

    def record(self, table: str, key: bytes) -> memoryview | None:
        """A record with its seal, unchecked, or None; only while the transaction lasts."""
        found: memoryview | None = self._inner.get(key, db=self._tables[table])
        return found

    def records(self, table: str) -> Iterator[tuple[memoryview, memoryview]]:
        """All keys and records of a table, unchecked; each only until the next."""
        yield from self._inner.cursor(self._tables[table])

    def seals(self, table: str) -> NDArray[np.uint64]:
        """(n,) what the records of a table carry as checksums, unchecked, in the order of its keys.
        Where a record is the same, under the same key, so is that."""
        cursor = self._inner.cursor(self._tables[table])
        seals = list(map(_seal_in, cursor.iternext(keys=False)))
        joined = b"".join(seals)
        if len(joined) != 8 * len(seals):  # a damaged record is too short for one
            joined = b"".join(bytes(seal).ljust(8) for seal in seals)
        return np.frombuffer(joined, "<u8")

    def records_between(
        self, table: str, low: bytes, high: bytes
    ) -> Iterator[tuple[bytes, memoryview]]:
        """Keys from `low` to below `high` of a table keyed by bytes, with their records, unchecked;
        each only until the next, and until something is written."""
        cursor = self._inner.cursor(self._tables[table])
        if cursor.set_range(low):
            for view, record in cursor:
                key = bytes(view)
                if key >= high:
                    return
                yield key, record

    def neighbours(
        self, table: str, key: bytes
    ) -> tuple[tuple[bytes, memoryview] | None, bytes | None]:
        """Of a table keyed by bytes: the last record below a key, unchecked, with its own key, and
        the first key that is not below it; None where there is none."""
        cursor = self._inner.cursor(self._tables[table])
        found = cursor.set_range(key)
        behind = bytes(cursor.key()) if found else None
        found = cursor.prev() if found else cursor.last()
        return (bytes(cursor.key()), cursor.value()) if found else None, behind

    def hits(
        self, numbers: Iterable[int], memories: bool
    ) -> Iterator[tuple[int, tuple[bytes, bytes], bytes | None]]:
        """Of references, their numbers, copies of their records and of their documents' metadata,
        and, if they are asked for, of their memories, all unchecked (a retrieval reads them, and
        decodes what is looked at); `CorruptRecordError` if one of the first two is not there."""
        get, owner_in = self._inner.get, record_layout.owner_in
        of_references, of_metadata = self._tables[REFERENCES], self._tables[METADATA]
        of_memories = self._tables[MEMORIES]
        for number in numbers:
            key = integer_key(number)
            try:
                reference = bytes(get(key, b"", of_references))
                metadata = get(owner_in(reference), None, of_metadata)
            except (struct.error, lmdb.BadValsizeError):  # the record is damaged, or not there
                metadata = None
            if metadata is None:
                # This finds out what is wrong with which.
                self.payload(METADATA, self.reference(number).document_id.encode())
                raise CorruptRecordError(REFERENCES, str(number), "it names another document")
            found = get(key, None, of_memories) if memories else None
            memory = None if found is None else bytes(found)
            yield number, (reference, bytes(metadata)), memory

    def delete_record(self, table: str, key: bytes) -> bool:
        """Remove a record, whatever it holds; whether there was one. Nothing is logged."""
        return bool(self._inner.delete(key, db=self._tables[table]))

    def empty(self, table: str) -> None:
        """Remove all records of a table."""
        self._inner.drop(self._tables[table], delete=False)

    def put(self, table: str, key: bytes, version: int, payload: bytes) -> None:
        """Store a record under its seal. Nothing is logged."""
        sealed = record_layout.seal(table, key, version, payload)
        self._inner.put(key, sealed, db=self._tables[table])

    def put_all(self, table: str, records: list[tuple[bytes, int, bytes]]) -> None:
        """Store records, each of key, version and payload. It is fastest where they come behind all
        that are there."""
        if table not in record_layout.INTEGER_TABLES:
            records.sort()
        cursor = self._inner.cursor(self._tables[table])
        appended = not cursor.last() or (
            bool(records) and record_layout.is_before(table, bytes(cursor.key()), records[0][0])
        )
        seal = record_layout.seal
        sealed = [(key, seal(table, key, version, payload)) for key, version, payload in records]
        cursor.putmulti(sealed, append=appended)

    # --- plumbing ---

    def _get(self, table: str, key: bytes) -> tuple[int, memoryview] | None:
        record = self._inner.get(key, db=self._tables[table])
        return None if record is None else record_layout.unseal(table, key, record)

    def _there(self, table: str, key: bytes) -> tuple[int, memoryview]:
        found = self._get(table, key)
        if found is None:
            raise CorruptRecordError(table, record_layout.readable(table, key), "it is missing")
        return found

    def _require(self, table: str, key: bytes, decode: Any) -> Any:
        return decoded(table, key, self._there(table, key), decode)


def decoded(table: str, key: bytes, found: tuple[int, Any], decode: Any) -> Any:
    """`decode(version, payload)`. What it says of the bytes, as a ValueError, means a damaged
    record, which is named; so is a newer one. All else that goes wrong (memory that is not to be
    had, a file that cannot be read) is no damage, and is raised as it is."""
    try:
        return decode(*found)
    except (FormatError, MismatchError) as error:
        raise type(error)(
            f"record {record_layout.readable(table, key)} of table '{table}': {error}"
        ) from error
    except (ValueError, CorruptRecordError) as error:  # the latter: of what it is decoded with
        raise CorruptRecordError(table, record_layout.readable(table, key), str(error)) from error


def _document(name: bytes, record: memoryview) -> tuple[str, DocumentEntry]:
    found = record_layout.unseal(DOCUMENTS, name, record)
    readable = decoded(DOCUMENTS, name, (0, name), lambda _, key: key.decode())
    return readable, decoded(DOCUMENTS, name, found, DocumentEntry.read)


def _number(table: str, key: bytes | memoryview) -> int:
    """A key of an integer table as a number."""
    if len(key) != 8:
        raise CorruptRecordError(table, bytes(key).hex(), f"its key has {len(key)} bytes, not 8")
    return record_layout.read_integer_key(key)


def _stacked(payloads: Sequence[bytes | memoryview]) -> Vectors:
    """Vectors of one length as rows."""
    if len({len(payload) for payload in payloads}) > 1:
        raise CorruptRecordError(EMBEDDINGS, "?", "embeddings have different lengths")
    vectors = np.frombuffer(b"".join(payloads), "<f4").astype(np.float32)
    return vectors.reshape(len(payloads), -1)


def _vector(_: int, payload: memoryview) -> NDArray[np.float32]:
    return record_layout.read_embedding(payload)


def _json(_: int, payload: memoryview) -> Any:
    return read_json(payload)
