"""One transaction: typed access to the tables. Records are checked as they are read, and what is
read is a copy that outlives the transaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from memdb import layout
from memdb.canonical import json_payload, read_json
from memdb.errors import CorruptRecordError, FormatError, MismatchError
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

    def required_setting(self, name: str) -> Any:
        """A setting that every database has; `CorruptRecordError` if it is missing."""
        return self._require(SETTINGS, name.encode(), _json)

    def put_setting(self, name: str, value: object) -> None:
        """Store a setting as JSON."""
        self._put(SETTINGS, name.encode(), 1, json_payload(value))

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
        self._put(METADATA, name.encode(), entry.version, json_payload(metadata))

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
            return dict(read_json(payload))

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
        return int(self.required_setting("counters")["last_change"])

    def changes(self, after: int) -> Iterator[NDArray[Any]]:
        """The changes behind number `after`, oldest first; fields `what` and `reference`."""
        cursor = self._inner.cursor(self._tables[CHANGES])
        if cursor.set_range(integer_key(after + 1)):
            for key, record in cursor:
                found = layout.unseal(CHANGES, key, record)
                yield self._read(CHANGES, bytes(key), found, lambda _, p: layout.read_changes(p))

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
    return read_json(payload)
