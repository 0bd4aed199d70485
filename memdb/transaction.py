"""One transaction: typed access to the tables. Records are checked as they are read, and what is
read is a copy that outlives the transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from memdb import layout
from memdb.canonical import json_payload, read_json
from memdb.environment import Environment
from memdb.errors import CorruptRecordError, FormatError, MismatchError
from memdb.layout import (
    CHANGES,
    DOCUMENTS,
    EMBEDDINGS,
    MEMORIES,
    METADATA,
    POSTINGS,
    REFERENCES,
    SETTINGS,
    DocumentEntry,
    integer_key,
)
from memdb.postings import Postings
from memdb.records import Reference
from memdb.rules import IndexRules

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


class Transaction:
    """Typed access to the tables. Made by `Store.read` and `Store.write`.

    Attributes:
        inner: LMDB's transaction.
        tables: LMDB's handles by name.
        environment: the generation that it reads; None outside a store.
    """

    def __init__(
        self, inner: Any, tables: dict[str, Any], environment: Environment | None = None
    ) -> None:
        self.inner = inner
        self.tables = tables
        self.environment = environment
        self._changes: list[tuple[int, int]] = []

    @property
    def id(self) -> int:
        """The number of the state that it reads: one more with every write to the generation."""
        return int(self.inner.id())

    # --- settings ---

    def setting(self, name: str) -> Any:
        """A setting's JSON value, or None."""
        found = self._get(SETTINGS, name.encode())
        return None if found is None else decoded(SETTINGS, name.encode(), found, _json)

    def required_setting(self, name: str) -> Any:
        """A setting that every database has; `CorruptRecordError` if it is missing, or lacks a
        field that it must have."""
        return self._require(
            SETTINGS, name.encode(), lambda _, p: layout.checked_setting(name, read_json(p))
        )

    def optional_setting(self, name: str) -> Any:
        """As `required_setting`; None if it is missing."""
        found = self._get(SETTINGS, name.encode())
        return None if found is None else self.required_setting(name)

    def put_setting(self, name: str, value: object) -> None:
        """Store a setting as JSON."""
        self._put(SETTINGS, name.encode(), 1, json_payload(value))

    def delete_setting(self, name: str) -> None:
        """Remove a setting that may be missing."""
        self.inner.delete(name.encode(), db=self.tables[SETTINGS])

    def tokenizer(self) -> str | None:
        """The text of the model's tokenizer.json, or None."""
        found = self._get(SETTINGS, b"tokenizer")
        if found is None:
            return None
        return str(
            decoded(SETTINGS, b"tokenizer", found, lambda _, p: layout.decompress(p).decode())
        )

    def put_tokenizer(self, text: str) -> None:
        """Store the tokenizer, compressed."""
        self._put(SETTINGS, b"tokenizer", 1, zstandard.compress(text.encode(), 9))

    def codec_parameters(self, name: str) -> bytes:
        """Those of a fitted codec; `CorruptRecordError` if they are not there."""
        key = layout.codec_key(name)
        parameters: bytes = self._require(SETTINGS, key, lambda _, p: layout.decompress(p))
        return parameters

    def put_codec_parameters(self, name: str, parameters: bytes) -> None:
        """Store those of a fitted codec, compressed."""
        self._put(SETTINGS, layout.codec_key(name), 1, zstandard.compress(parameters, 3))

    def fitted_codecs(self) -> list[str]:
        """Names of the codecs whose parameters are there."""
        keys = (bytes(key).decode("utf-8", "replace") for key, _ in self.records(SETTINGS))
        prefix = layout.codec_key("").decode()
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]

    # --- documents ---

    def document(self, name: str) -> DocumentEntry | None:
        """The document map's entry of an id, or None."""
        key = name.encode()
        found = self._get(DOCUMENTS, key)
        return None if found is None else decoded(DOCUMENTS, key, found, DocumentEntry.read)

    def put_document(self, name: str, entry: DocumentEntry, metadata: dict[str, Any]) -> None:
        """Store the entry and the metadata of a document that is new, or was withdrawn; the
        references are put one by one."""
        self._put(DOCUMENTS, name.encode(), entry.version, entry.payload())
        self._put(METADATA, name.encode(), entry.version, json_payload(metadata))
        self._index(metadata, entry.references)

    def delete_document(self, name: str, entry: DocumentEntry) -> None:
        """Remove a document with all its references."""
        self.withdraw_document(name, entry)
        self.delete_references(entry.references)

    def withdraw_document(self, name: str, entry: DocumentEntry) -> None:
        """Remove a document's entry and metadata; its references stay for another entry."""
        if self.keys:
            try:
                self._unindex(self.metadata(name), entry.references)
            except CorruptRecordError:  # then what it was indexed under is not known
                self.postings.discard(entry.references)
        self.inner.delete(name.encode(), db=self.tables[DOCUMENTS])
        self.inner.delete(name.encode(), db=self.tables[METADATA])

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        """A document's metadata; of this version, if one is given."""

        def read(found: int, payload: memoryview) -> dict[str, Any]:
            if version not in (None, found):
                raise ValueError(f"it has version {found}, its document version {version}")
            return dict(read_json(payload))

        return self._require(METADATA, name.encode(), read)  # type: ignore[no-any-return]

    def documents(self, after: str = "") -> Iterator[tuple[str, DocumentEntry]]:
        """All documents with an id behind `after`, in the order of their ids' bytes."""
        cursor = self.inner.cursor(self.tables[DOCUMENTS])
        start = after.encode() + b"\0" if after else b""
        if cursor.set_range(start) if start else cursor.first():
            for key, record in cursor:
                name = bytes(key)
                found = layout.unseal(DOCUMENTS, name, record)
                readable = decoded(DOCUMENTS, name, (0, name), lambda _, key: key.decode())
                yield readable, decoded(DOCUMENTS, name, found, DocumentEntry.read)

    # --- the index of metadata ---

    @property
    def index_rules(self) -> IndexRules:
        """Which index the database wants, and over which metadata keys."""
        rules: IndexRules = self._require(
            SETTINGS, b"index", lambda _, p: IndexRules.from_json(read_json(p))
        )
        return rules

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The metadata keys that are indexed."""
        return self.index_rules.keys

    def put_keys(self, names: tuple[str, ...]) -> None:
        """Change which keys are indexed; the postings are not touched."""
        self.put_setting("index", {**self.required_setting("index"), "keys": list(names)})
        self.__dict__.pop("keys", None)

    def drop_postings(self) -> None:
        """Empty the index of metadata."""
        self.inner.drop(self.tables[POSTINGS], delete=False)

    @cached_property
    def postings(self) -> Postings:
        """The index of metadata."""
        return Postings(self.inner, self.tables[POSTINGS])

    def _index(self, metadata: dict[str, Any], references: tuple[int, ...]) -> None:
        for key in self.keys:
            if key in metadata:
                self.postings.add(key, metadata[key], references)

    def _unindex(self, metadata: dict[str, Any], references: tuple[int, ...]) -> None:
        for key in self.keys:
            if key in metadata:
                self.postings.remove(key, metadata[key], references)

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
            lambda version, payload: layout.read_reference(number, version, payload),
        )

    def owner(self, number: int) -> str:
        """The id of a reference's document."""
        owner: str = self._require(
            REFERENCES, integer_key(number), lambda _, p: layout.read_owner(p).decode()
        )
        return owner

    def tokens(self, number: int) -> int:
        """A reference's length in tokens."""
        tokens: int = self._require(
            REFERENCES, integer_key(number), lambda _, p: layout.read_tokens(p)
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
        cursor = self.inner.cursor(self.tables[EMBEDDINGS])
        entries = (
            (_number(EMBEDDINGS, key), layout.unseal(EMBEDDINGS, key, record)[1])
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
        cursor = self.inner.cursor(self.tables[table])
        keys = list(map(bytes, cursor.iternext(values=False)))
        for key in keys:
            if len(key) != 8:
                _number(table, key)  # says so
        return np.frombuffer(b"".join(keys), "<i8").copy()

    def put_reference(
        self, reference: Reference, embedding: NDArray[np.float32], memory: bytes | None
    ) -> None:
        """Store a new reference with its vector, and its memory unless it stays cold."""
        key = integer_key(reference.id)
        self._put(REFERENCES, key, reference.version, layout.reference_payload(reference))
        self.put_embedding(reference, embedding)
        self._changes.append((layout.INSERTED, reference.id))
        if memory is not None:
            self.put_memory(reference, memory)

    def put_embedding(self, reference: Reference, embedding: NDArray[np.float32]) -> None:
        """Store a reference's vector."""
        key = integer_key(reference.id)
        self._put(EMBEDDINGS, key, reference.version, embedding.astype("<f4").tobytes())

    def delete_references(self, numbers: Iterable[int]) -> None:
        """Remove references, their vectors and memories."""
        for number in dict.fromkeys(numbers):
            gone = [
                self.inner.delete(integer_key(number), db=self.tables[table])
                for table in (REFERENCES, EMBEDDINGS, MEMORIES)
            ]
            if any(gone):
                self._changes.append((layout.DELETED, number))

    def has_reference(self, number: int) -> bool:
        """Whether the reference is still there."""
        return self.inner.get(integer_key(number), db=self.tables[REFERENCES]) is not None

    # --- memories ---

    def is_warm(self, number: int) -> bool:
        """Whether the reference has a memory."""
        return self.inner.get(integer_key(number), db=self.tables[MEMORIES]) is not None

    def put_memory(self, reference: Reference, payload: bytes) -> None:
        """Store a reference's memory."""
        self.replace_memory(reference.id, reference.version, payload)

    def replace_memory(self, number: int, version: int, payload: bytes) -> None:
        """Store the memory of a reference of that id and version."""
        self._put(MEMORIES, integer_key(number), version, payload)
        self._changes.append((layout.REMEMBERED, number))

    def delete_memory(self, number: int) -> None:
        """Make a warm reference cold."""
        if self.inner.delete(integer_key(number), db=self.tables[MEMORIES]):
            self._changes.append((layout.FORGOTTEN, number))

    # --- change log ---

    def last_change(self) -> int:
        """Number of the newest change; 0 in a new database."""
        return int(self.required_setting("counters")["last_change"])

    def changes(self, after: int) -> Iterator[NDArray[Any]]:
        """The changes behind number `after`, oldest first; fields `what` and `reference`."""
        cursor = self.inner.cursor(self.tables[CHANGES])
        if cursor.set_range(integer_key(after + 1)):
            for key, record in cursor:
                found = layout.unseal(CHANGES, key, record)
                yield decoded(CHANGES, bytes(key), found, lambda _, p: layout.read_changes(p))

    def log(self, changes: list[tuple[int, int]]) -> None:
        """Note what happened to references, for the change log."""
        self._changes.extend(changes)

    def finish(self) -> None:
        """Write what this transaction did to the change log."""
        if not self._changes:
            return
        counters = self.required_setting("counters")
        number = counters["last_change"] + 1
        self._put(CHANGES, integer_key(number), 1, layout.changes_payload(self._changes))
        self.put_setting("counters", {**counters, "last_change": number})

    # --- counts ---

    def count(self, table: str) -> int:
        """Records of a table."""
        return int(self.inner.stat(self.tables[table])["entries"])

    def size(self, table: str) -> int:
        """Bytes of a table's pages."""
        stat = self.inner.stat(self.tables[table])
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * stat["psize"])

    # --- records as they are ---

    def table_names(self) -> set[str]:
        """Names of all tables that are there."""
        return {bytes(key).decode("utf-8", "replace") for key, _ in self.inner.cursor()}

    def payload(self, table: str, key: bytes) -> bytes:
        """A copy of a record's payload, its seal checked; `CorruptRecordError` if there is none."""
        return self.version_and_payload(table, key)[1]

    def version_and_payload(self, table: str, key: bytes) -> tuple[int, bytes]:
        """As `payload`, with the version."""
        version, payload = self._there(table, key)
        return version, bytes(payload)

    def record(self, table: str, key: bytes) -> memoryview | None:
        """A record with its seal, unchecked, or None; only while the transaction lasts."""
        found: memoryview | None = self.inner.get(key, db=self.tables[table])
        return found

    def records(self, table: str) -> Iterator[tuple[memoryview, memoryview]]:
        """All keys and records of a table, unchecked; each only until the next."""
        yield from self.inner.cursor(self.tables[table])

    def put_all(self, table: str, records: list[tuple[bytes, int, bytes]]) -> None:
        """Store records, each of key, version and payload. It is fastest where they come behind all
        that are there."""
        if table not in layout.INTEGER_TABLES:
            records.sort()
        cursor = self.inner.cursor(self.tables[table])
        appended = not cursor.last() or (
            bool(records) and layout.is_before(table, bytes(cursor.key()), records[0][0])
        )
        seal = layout.seal
        sealed = [(key, seal(table, key, version, payload)) for key, version, payload in records]
        cursor.putmulti(sealed, append=appended)

    # --- plumbing ---

    def _get(self, table: str, key: bytes) -> tuple[int, memoryview] | None:
        record = self.inner.get(key, db=self.tables[table])
        return None if record is None else layout.unseal(table, key, record)

    def _there(self, table: str, key: bytes) -> tuple[int, memoryview]:
        found = self._get(table, key)
        if found is None:
            raise CorruptRecordError(table, layout.readable(table, key), "it is missing")
        return found

    def _require(self, table: str, key: bytes, decode: Any) -> Any:
        return decoded(table, key, self._there(table, key), decode)

    def _put(self, table: str, key: bytes, version: int, payload: bytes) -> None:
        self.inner.put(key, layout.seal(table, key, version, payload), db=self.tables[table])


def decoded(table: str, key: bytes, found: tuple[int, Any], decode: Any) -> Any:
    """`decode(version, payload)`; what goes wrong is a damaged record and is named, or a newer
    one."""
    try:
        return decode(*found)
    except (FormatError, MismatchError) as error:
        raise type(error)(
            f"record {layout.readable(table, key)} of table '{table}': {error}"
        ) from error
    except Exception as error:
        raise CorruptRecordError(table, layout.readable(table, key), str(error)) from error


def _number(table: str, key: bytes | memoryview) -> int:
    """A key of an integer table as a number."""
    if len(key) != 8:
        raise CorruptRecordError(table, bytes(key).hex(), f"its key has {len(key)} bytes, not 8")
    return layout.read_integer_key(key)


def _stacked(payloads: Sequence[bytes | memoryview]) -> Vectors:
    """Vectors of one length as rows."""
    if len({len(payload) for payload in payloads}) > 1:
        raise CorruptRecordError(EMBEDDINGS, "?", "embeddings have different lengths")
    vectors = np.frombuffer(b"".join(payloads), "<f4").astype(np.float32)
    return vectors.reshape(len(payloads), -1)


def _vector(_: int, payload: memoryview) -> NDArray[np.float32]:
    return layout.read_embedding(payload)


def _json(_: int, payload: memoryview) -> Any:
    return read_json(payload)
