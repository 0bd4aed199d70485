"""`verify` finds whatever is not as storage_format.md says, and `repair` mends what can be derived.

Damage is made behind the engine's back: records are taken away, exchanged, or forged with a seal
that fits and a content that does not.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdb
from memdb import (
    CODECS,
    CorruptRecordError,
    FormatError,
    MemDB,
    NotADatabaseError,
    Problem,
    StoredDocument,
)
from memdb.care import read_aside
from memdb.codecs import encode_memory
from memdb.index.ann import AnnIndex
from memdb.storage.record_layout import (
    CHANGES,
    DELETED,
    DOCUMENTS,
    EMBEDDINGS,
    FORGOTTEN,
    INSERTED,
    MEMORIES,
    METADATA,
    POSTINGS,
    REFERENCES,
    REMEMBERED,
    SETTINGS,
    DocumentEntry,
    integer_key,
    read_integer_key,
    read_reference,
    reference_payload,
    seal,
    unseal,
)
from memdb.types.canonical import json_payload
from memdb.types.checks import content_hash_of, text_hash
from memdb.types.document import Reference
from memdb.types.memory import ExplicitMemory
from tests.engine.helpers import (
    PAGE,
    TokenWriter,
    WordEmbedder,
    make_shape,
    raw,
    same_memory,
)

# The references of the database that most tests use: 1 is `short`, 2 is `cold`, 3 was deleted, and
# from 4 on they are `long`.
SHORT, COLD, GONE, LONG = 1, 2, 3, 4


def fill(database: MemDB) -> None:
    database.insert("A short text.", id="short", metadata={"kind": "note", "year": 1874, "x": [1]})
    database.insert("This one is cold.", id="cold", metadata={"kind": "note"}, cold=True)
    database.insert("This one goes again.", id="gone", metadata={"kind": "gone"})
    database.delete("gone")
    database.insert(PAGE[:250], id="long", metadata={"kind": "page", "year": 1900.5})


def opened(path: Path) -> MemDB:
    return MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter())


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "small"
    with MemDB.create(
        path, embedder=WordEmbedder(), writer=TokenWriter(), keys=["kind", "year"]
    ) as database:
        fill(database)
        assert database.get("short").references == (SHORT,)
        assert database.get("cold").references == (COLD,)
        assert database.get("long").references[:2] == (LONG, LONG + 1)
    return path


@pytest.fixture
def small(tmp_path: Path, small_template: Path) -> Path:
    """A closed database of three documents, two of them warm, and one that was deleted."""
    return Path(shutil.copytree(small_template, tmp_path / "small"))


@pytest.fixture(scope="session")
def indexed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "indexed"
    with MemDB.create(path, shape=make_shape(), dimension=8, index="ivf") as database:
        rng = np.random.default_rng(0)
        for n in range(80):
            vector = rng.standard_normal((1, 8), np.float32)
            database.insert(f"text {n}", id=f"doc-{n}", embeddings=vector)
        assert database.build_index() is not None
    return path


@pytest.fixture
def indexed(tmp_path: Path, indexed_template: Path) -> Path:
    """A closed database of 80 references with an index file."""
    return Path(shutil.copytree(indexed_template, tmp_path / "indexed"))


def index_file(path: Path) -> Path:
    return path / "gen-000001" / "index.faiss"


class Forge:
    """Changes the records of a database, with seals that fit."""

    def __init__(self, inner: Any, tables: Mapping[str, Any]) -> None:
        self._inner = inner
        self._tables = tables

    @staticmethod
    def _key(table: str, key: int | str | bytes) -> bytes:
        if isinstance(key, int):
            return integer_key(key)
        return key.encode() if isinstance(key, str) else key

    def get(self, table: str, key: int | str | bytes) -> tuple[int, bytes]:
        """Version and payload."""
        name = self._key(table, key)
        record = self._inner.get(name, db=self._tables[table])
        assert record is not None
        version, payload = unseal(table, name, memoryview(record))
        return version, bytes(payload)

    def put(self, table: str, key: int | str | bytes, version: int, payload: bytes) -> None:
        name = self._key(table, key)
        self._inner.put(name, seal(table, name, version, payload), db=self._tables[table])

    def raw(self, table: str, key: int | str | bytes, record: bytes) -> None:
        self._inner.put(self._key(table, key), record, db=self._tables[table])

    def delete(self, table: str, key: int | str | bytes) -> None:
        assert self._inner.delete(self._key(table, key), db=self._tables[table])

    def keys(self, table: str) -> list[bytes]:
        return [key for key, _ in self._inner.cursor(self._tables[table])]

    def spoil(self, table: str, key: int | str | bytes) -> None:
        """Turn the last bit of a record."""
        name = self._key(table, key)
        record = bytearray(self._inner.get(name, db=self._tables[table]))
        record[-1] ^= 1
        self.raw(table, key, bytes(record))

    def swap(self, table: str, one: int | str, other: int | str) -> None:
        """Exchange two records as they are."""
        names = self._key(table, one), self._key(table, other)
        records = [self._inner.get(name, db=self._tables[table]) for name in names]
        for name, record in zip(names, reversed(records), strict=True):
            self._inner.put(name, record, db=self._tables[table])

    def setting(self, name: str, **changes: Any) -> None:
        """Change fields of a setting; None takes one away."""
        value = {**json.loads(self.get(SETTINGS, name)[1]), **changes}
        kept = {name: field for name, field in value.items() if field is not None}
        self.put(SETTINGS, name, 1, json_payload(kept))

    def entry(self, name: str, **changes: Any) -> None:
        """Change fields of a document's entry."""
        version, payload = self.get(DOCUMENTS, name)
        entry = DocumentEntry.read(version, memoryview(payload))
        entry = DocumentEntry(**{**vars(entry), **changes})
        self.put(DOCUMENTS, name, entry.version, entry.payload())

    def reference(self, number: int, **changes: Any) -> None:
        """Change fields of a reference."""
        version, payload = self.get(REFERENCES, number)
        reference = Reference(**{**vars(read_reference(number, version, payload)), **changes})
        self.put(REFERENCES, number, reference.version, reference_payload(reference))

    def embedding(self, number: int, *numbers: float) -> None:
        version, _ = self.get(EMBEDDINGS, number)
        self.put(EMBEDDINGS, number, version, np.array(numbers, "<f4").tobytes())

    def memory(self, number: int, change: Callable[[ExplicitMemory], bytes]) -> None:
        """Put another memory of the right shape, of three pairs in the first row, as changed."""
        shape = TokenWriter().shape
        memory = ExplicitMemory(
            np.array([0] + [3] * shape.rows, np.int32),
            np.array([1, 4, 9], shape.position_dtype),
            np.ones((3, shape.head_dim), np.float32),
            np.ones((3, shape.head_dim), np.float32),
        )
        self.put(MEMORIES, number, 1, change(memory))

    def changed(self, number: int, *changes: tuple[int, int]) -> None:
        self.put(CHANGES, number, 1, b"".join(struct.pack("<Bq", *change) for change in changes))


@contextmanager
def forging(path: Path) -> Iterator[Forge]:
    with raw(path) as (environment, tables), environment.begin(write=True) as inner:
        yield Forge(inner, tables)


def exact(memory: ExplicitMemory) -> bytes:
    return encode_memory(memory, TokenWriter().shape, CODECS["exact"])


def not_finite(memory: ExplicitMemory) -> bytes:
    payload = bytearray(exact(memory))
    payload[-4:] = np.array(np.inf, "<f4").tobytes()
    return bytes(payload)


def with_positions(*positions: int) -> Callable[[ExplicitMemory], bytes]:
    def change(memory: ExplicitMemory) -> bytes:
        whole = exact(memory)
        at = whole.index(memory.positions.tobytes())
        return whole[:at] + bytes(positions) + whole[at + 3 :]

    return change


def with_a_count_of_4(memory: ExplicitMemory) -> bytes:
    payload = bytearray(exact(memory))
    at = payload.index(memory.positions.tobytes()) - 2 * TokenWriter().shape.rows
    assert payload[at : at + 2] == b"\3\0"
    payload[at] = 4
    return bytes(payload)


def state(path: Path) -> dict[str, tuple[StoredDocument, list[ExplicitMemory | None]]]:
    """Every document, and the memories of its references where it is warm."""
    with MemDB.open(path) as database:
        found = {document.id: (document, []) for document in database.documents()}
        memories = {}
        if found:
            for hit in database.retrieve(np.ones(64, np.float32), 1000).hits:
                memories[hit.id] = hit.memory
        return {
            name: (document, [memories[number] for number in document.references])
            for name, (document, _) in found.items()
        }


def same_state(
    one: tuple[StoredDocument, list[ExplicitMemory | None]],
    other: tuple[StoredDocument, list[ExplicitMemory | None]],
) -> bool:
    return one[0] == other[0] and all(
        a is b is None or (a is not None and b is not None and same_memory(a, b))
        for a, b in zip(one[1], other[1], strict=True)
    )


def records(path: Path) -> dict[tuple[str, bytes], bytes]:
    """Every record, as it is stored."""
    with raw(path) as (environment, tables), environment.begin() as inner:
        return {(name, k): r for name, table in tables.items() for k, r in inner.cursor(table)}


def content(path: Path) -> dict[str, bytes]:
    """Every file of a database but locks."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.name.endswith((".lock", "lock.mdb", "LOCK"))
    }


# --- what is whole --------------------------------------------------------------------------------


def test_an_empty_database_has_no_problems(full_template: Path, bare_template: Path) -> None:
    assert memdb.verify(full_template) == []
    assert memdb.verify(bare_template) == []


def test_a_database_has_no_problems_while_it_lives(small: Path) -> None:
    assert memdb.verify(small) == []
    with opened(small) as database:
        database.update("short", metadata={"kind": 7})
        database.update("long", text="Now it is short as well.", cold=True)
        assert memdb.verify(small) == []  # while it is open, too
        database.warm()
        database.declare_keys("x")
        database.delete("cold")
        assert memdb.verify(small) == []
    memdb.compact(small)
    assert memdb.verify(small) == []
    with opened(small) as database:
        database.insert("After the compaction.", id="new", metadata={"kind": "note"})
        database.delete("short")
    assert memdb.verify(small) == []


def test_a_database_with_an_index_file_has_no_problems(indexed: Path) -> None:
    assert memdb.verify(indexed) == []
    with MemDB.open(indexed) as database:
        database.delete("doc-3")
        database.insert("more", embeddings=np.ones((1, 8), np.float32))
    assert memdb.verify(indexed) == []


def test_verify_reports_no_problem_where_there_is_no_database(tmp_path: Path) -> None:
    for call in (memdb.verify, memdb.repair):
        with pytest.raises(NotADatabaseError):
            call(tmp_path / "missing")


def test_progress_is_told_of_each_table(small: Path) -> None:
    told = set()
    memdb.verify(small, progress=lambda what, done, total: told.add(what))
    assert {"walking pages", "verifying documents", "verifying memories"} <= told


def test_a_database_of_another_format_is_refused(small: Path) -> None:
    with forging(small) as forge:
        forge.setting("format", version=3)
    for call in (memdb.verify, memdb.repair):
        with pytest.raises(FormatError, match="format version 3"):
            call(small)


# --- what is not ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Something that is done to the small database.

    Attributes:
        do: does it.
        where: table, record and document of a problem that verify reports.
        what: a part of what it says.
        lost: documents that a repair with an embedder has to drop.
        nameless: it has to drop a record that is no document's.
    """

    do: Callable[[Forge], object]
    where: tuple[str, str, str | None]
    what: str
    lost: tuple[str, ...] = ()
    nameless: bool = False


def long_entry(forge: Forge) -> DocumentEntry:
    version, payload = forge.get(DOCUMENTS, "long")
    return DocumentEntry.read(version, memoryview(payload))


def last(forge: Forge) -> int:
    return read_integer_key(forge.keys(CHANGES)[-1])


def postings_of(forge: Forge, value: bytes) -> bytes:
    (found,) = (key for key in forge.keys(POSTINGS) if value in key)
    return found


def reorder(forge: Forge) -> None:
    first, second, *rest = long_entry(forge).references
    forge.entry("long", references=(second, first, *rest))


def list_twice(forge: Forge) -> None:
    forge.entry("cold", references=(COLD, LONG))


def lie_of_the_text(forge: Forge) -> None:
    """Another text in the place of the first, with the hash of the first."""
    forge.reference(SHORT, text="A wrong text.")


def orphan(forge: Forge) -> None:
    """A reference, an embedding, a memory and its change, of a document that is not there."""
    forge.setting("counters", next_reference=100)
    version, payload = forge.get(REFERENCES, SHORT)
    reference = read_reference(99, version, payload)
    changed = Reference(**{**vars(reference), "document_id": "nobody"})
    forge.put(REFERENCES, 99, 1, reference_payload(changed))
    forge.put(EMBEDDINGS, 99, *forge.get(EMBEDDINGS, SHORT))
    forge.put(MEMORIES, 99, *forge.get(MEMORIES, SHORT))
    number = last(forge) + 1
    forge.changed(number, (INSERTED, 99), (REMEMBERED, 99))
    forge.setting("counters", last_change=number)


def add_change(*changes: tuple[int, int]) -> Callable[[Forge], None]:
    def do(forge: Forge) -> None:
        number = last(forge) + 1
        forge.changed(number, *changes)
        forge.setting("counters", last_change=number)

    return do


def no_entries(forge: Forge) -> None:
    """A record without references for an id that had none."""
    forge.put(DOCUMENTS, "empty", 1, text_hash("") * 2)
    forge.put(METADATA, "empty", 1, b"{}")


def another_dimension(forge: Forge) -> None:
    forge.embedding(COLD, 1.0, 0.0)


def ids_beyond(forge: Forge) -> None:
    forge.setting("counters", next_reference=LONG)


def more_postings(forge: Forge) -> None:
    key = postings_of(forge, b"page")
    ids = np.frombuffer(forge.get(POSTINGS, key)[1], "<i8")
    forge.put(POSTINGS, key, 1, np.union1d(ids, [COLD]).astype("<i8").tobytes())


def fewer_postings(forge: Forge) -> None:
    key = postings_of(forge, b"page")
    forge.put(POSTINGS, key, 1, forge.get(POSTINGS, key)[1][8:])


def postings_out_of_order(forge: Forge) -> None:
    key = postings_of(forge, b"page")
    forge.put(POSTINGS, key, 1, np.array([LONG + 1, LONG], "<i8").tobytes())


def postings_of_a_key_that_is_not_declared(forge: Forge) -> None:
    key = postings_of(forge, b"page")
    forge.put(POSTINGS, key.replace(b"\4kind", b"\4kinD"), *forge.get(POSTINGS, key))


def cut_frame(forge: Forge) -> None:
    version, payload = forge.get(REFERENCES, SHORT)
    forge.put(REFERENCES, SHORT, version, payload[:-3])


def other_metadata(forge: Forge) -> None:
    forge.put(METADATA, "short", 1, b'{"kind":"note","x":[1],"year":1875}')


def metadata_that_is_no_json(forge: Forge) -> None:
    forge.put(METADATA, "short", 1, b'{"kind":')


def metadata_that_is_no_object(forge: Forge) -> None:
    version, payload = forge.get(DOCUMENTS, "short")
    entry = DocumentEntry.read(version, memoryview(payload))
    forge.put(METADATA, "short", 1, b"[1]")
    forge.entry("short", content_hash=content_hash_of(entry.text_hash, b"[1]"))


FIRST = f"{SHORT}"
DAMAGE: dict[str, Damage] = {
    # seals
    "a document's entry spoilt": Damage(
        lambda f: f.spoil(DOCUMENTS, "short"), (DOCUMENTS, "'short'", "short"), "checksum"
    ),
    "metadata spoilt": Damage(
        lambda f: f.spoil(METADATA, "short"),
        (METADATA, "'short'", "short"),
        "checksum",
        ("short",),
    ),
    "a text spoilt": Damage(
        lambda f: f.spoil(REFERENCES, SHORT), (REFERENCES, FIRST, "short"), "checksum", ("short",)
    ),
    "an embedding spoilt": Damage(
        lambda f: f.spoil(EMBEDDINGS, COLD), (EMBEDDINGS, f"{COLD}", "cold"), "checksum"
    ),
    "a memory spoilt": Damage(
        lambda f: f.spoil(MEMORIES, SHORT), (MEMORIES, FIRST, "short"), "checksum"
    ),
    "a change spoilt": Damage(lambda f: f.spoil(CHANGES, 2), (CHANGES, "2", None), "checksum"),
    "postings spoilt": Damage(
        lambda f: f.spoil(POSTINGS, postings_of(f, b"page")), (POSTINGS, "*", None), "checksum"
    ),
    "a record shorter than a seal": Damage(
        lambda f: f.raw(MEMORIES, SHORT, b"short"), (MEMORIES, FIRST, "short"), "only 5 bytes"
    ),
    # records taken away
    "a document's entry missing": Damage(
        lambda f: f.delete(DOCUMENTS, "short"), (METADATA, "'short'", "short"), "not there"
    ),
    "metadata missing": Damage(
        lambda f: f.delete(METADATA, "short"),
        (METADATA, "'short'", "short"),
        "missing",
        ("short",),
    ),
    "entry and metadata missing": Damage(
        lambda f: (f.delete(METADATA, "short"), f.delete(DOCUMENTS, "short")),
        (REFERENCES, FIRST, "short"),
        "no document lists it",
        ("short",),
    ),
    "a reference missing": Damage(
        lambda f: f.delete(REFERENCES, LONG + 1),
        (REFERENCES, f"{LONG + 1}", "long"),
        "missing",
        ("long",),
    ),
    "an embedding missing": Damage(
        lambda f: f.delete(EMBEDDINGS, SHORT), (EMBEDDINGS, FIRST, "short"), "missing"
    ),
    "a memory missing": Damage(
        lambda f: f.delete(MEMORIES, SHORT), (CHANGES, "", None), f"memory of {SHORT} is not as"
    ),
    "a change missing": Damage(lambda f: f.delete(CHANGES, 2), (CHANGES, "", None), "ends at"),
    "the last change missing": Damage(
        lambda f: f.delete(CHANGES, last(f)), (CHANGES, "", None), "ends at"
    ),
    "postings missing": Damage(
        lambda f: f.delete(POSTINGS, postings_of(f, b"page")),
        (POSTINGS, "", None),
        "'kind' are not right",
    ),
    # records exchanged
    **{
        f"records of {table} exchanged": Damage(
            lambda f, table=table, one=one, other=other: f.swap(table, one, other),
            (table, key, document),
            "checksum",
            lost,
        )
        for table, one, other, key, document, lost in (
            (DOCUMENTS, "short", "long", "'long'", "long", ()),
            (METADATA, "short", "long", "'long'", "long", ("long", "short")),
            (REFERENCES, SHORT, LONG, FIRST, "short", ("long", "short")),
            (EMBEDDINGS, SHORT, COLD, f"{COLD}", "cold", ()),
            (MEMORIES, SHORT, LONG, FIRST, "short", ()),
            (CHANGES, 1, 2, "1", None, ()),
        )
    },
    # versions, places and owners
    "an older version of metadata": Damage(
        lambda f: f.put(METADATA, "short", 9, f.get(METADATA, "short")[1]),
        (METADATA, "'short'", "short"),
        "version is 9, not 1",
        ("short",),
    ),
    "a document older than its references": Damage(
        lambda f: f.reference(SHORT, version=2),
        (DOCUMENTS, "'short'", "short"),
        "versions [2]",
        ("short",),
    ),
    "a document of version 0": Damage(
        lambda f: f.entry("short", version=0),
        (DOCUMENTS, "'short'", "short"),
        "no version",
        ("short",),
    ),
    "a document without references": Damage(
        no_entries, (DOCUMENTS, "'empty'", "empty"), "no references", ("empty",)
    ),
    "references of two versions": Damage(
        lambda f: (f.entry("long", version=2), f.reference(LONG, version=2)),
        (DOCUMENTS, "'long'", "long"),
        "versions [1, 2]",
        ("long",),
    ),
    "an embedding of another version": Damage(
        lambda f: f.put(EMBEDDINGS, SHORT, 2, f.get(EMBEDDINGS, SHORT)[1]),
        (EMBEDDINGS, FIRST, "short"),
        "version is 2",
    ),
    "a memory of another version": Damage(
        lambda f: f.put(MEMORIES, SHORT, 2, f.get(MEMORIES, SHORT)[1]),
        (MEMORIES, FIRST, "short"),
        "version is 2",
    ),
    "a wrong ordinal": Damage(
        lambda f: f.reference(LONG + 1, ordinal=7),
        (REFERENCES, f"{LONG + 1}", "long"),
        "another document or place",
        ("long",),
    ),
    "a wrong owner": Damage(
        lambda f: f.reference(SHORT, document_id="cold"),
        (REFERENCES, FIRST, "short"),
        "another document or place",
        ("short",),
    ),
    "an order that is wrong": Damage(
        reorder, (REFERENCES, f"{LONG}", "long"), "another document or place", ("long",)
    ),
    "two documents that list one reference": Damage(
        list_twice, (REFERENCES, f"{LONG}", "long"), "two documents list it", ("cold", "long")
    ),
    "a document that lists a reference twice": Damage(
        lambda f: f.entry("short", references=(SHORT, SHORT)),
        (REFERENCES, FIRST, "short"),
        "list it",
        ("short",),
    ),
    "an entry of half an id": Damage(
        lambda f: f.put(DOCUMENTS, "short", 1, f.get(DOCUMENTS, "short")[1][:-3]),
        (DOCUMENTS, "'short'", "short"),
        "decode",
        ("short",),
    ),
    "records of nobody": Damage(
        orphan, (REFERENCES, "99", "nobody"), "no document lists it", ("nobody",)
    ),
    "an embedding of nobody": Damage(
        lambda f: f.put(EMBEDDINGS, GONE, *f.get(EMBEDDINGS, SHORT)),
        (EMBEDDINGS, f"{GONE}", None),
        "reference is not there",
    ),
    "a memory of nobody": Damage(
        lambda f: f.put(MEMORIES, GONE, *f.get(MEMORIES, SHORT)),
        (MEMORIES, f"{GONE}", None),
        "reference is not there",
    ),
    "metadata of nobody": Damage(
        lambda f: f.put(METADATA, "nobody", 1, b"{}"),
        (METADATA, "'nobody'", "nobody"),
        "not there",
        ("nobody",),
    ),
    "a document id that cannot be": Damage(
        lambda f: (
            f.put(DOCUMENTS, b"\xff", *f.get(DOCUMENTS, "short")),
            f.delete(DOCUMENTS, "short"),
        ),
        (DOCUMENTS, r"'\\xff'", None),
        "decode",
        nameless=True,
    ),
    # contents
    "another text": Damage(
        lie_of_the_text, (DOCUMENTS, "'short'", "short"), "text is not", ("short",)
    ),
    "a text cut short": Damage(cut_frame, (REFERENCES, FIRST, "short"), "decode", ("short",)),
    "other metadata": Damage(
        other_metadata, (DOCUMENTS, "'short'", "short"), "content is not", ("short",)
    ),
    "metadata that is no JSON": Damage(
        metadata_that_is_no_json, (METADATA, "'short'", "short"), "Expecting", ("short",)
    ),
    "metadata that is no object": Damage(
        metadata_that_is_no_object, (METADATA, "'short'", "short"), "", ("short",)
    ),
    "an embedding of another dimension": Damage(
        another_dimension, (EMBEDDINGS, f"{COLD}", "cold"), "2 numbers, not 64"
    ),
    "an embedding of length 2": Damage(
        lambda f: f.embedding(COLD, *[0.25] * 64), (EMBEDDINGS, f"{COLD}", "cold"), "not 1"
    ),
    "an embedding that is not finite": Damage(
        lambda f: f.embedding(COLD, *[np.nan] * 64), (EMBEDDINGS, f"{COLD}", "cold"), "not 1"
    ),
    "an embedding of half a number": Damage(
        lambda f: f.put(EMBEDDINGS, COLD, 1, b"\0" * 7),
        (EMBEDDINGS, f"{COLD}", "cold"),
        "decode",
    ),
    "a memory that is not finite": Damage(
        lambda f: f.memory(SHORT, not_finite), (MEMORIES, FIRST, "short"), "not all finite"
    ),
    "positions that do not ascend": Damage(
        lambda f: f.memory(SHORT, with_positions(4, 4, 9)), (MEMORIES, FIRST, "short"), "ascend"
    ),
    "a position behind the reference": Damage(
        lambda f: f.memory(SHORT, with_positions(1, 4, 16)), (MEMORIES, FIRST, "short"), "outside"
    ),
    "counts that do not add up": Damage(
        lambda f: f.memory(SHORT, with_a_count_of_4), (MEMORIES, FIRST, "short"), "hold 4 pairs"
    ),
    "a memory with a byte too many": Damage(
        lambda f: f.memory(SHORT, lambda m: exact(m) + b"\0"),
        (MEMORIES, FIRST, "short"),
        "are due",
    ),
    "a memory of no bytes": Damage(
        lambda f: f.put(MEMORIES, SHORT, 1, b""), (MEMORIES, FIRST, "short"), "decode"
    ),
    # postings
    "postings too many": Damage(more_postings, (POSTINGS, "", None), "'kind' are not right"),
    "postings too few": Damage(fewer_postings, (POSTINGS, "", None), "'kind' are not right"),
    "postings out of order": Damage(postings_out_of_order, (POSTINGS, "*", None), "not ascend"),
    "postings of a key that is not declared": Damage(
        postings_of_a_key_that_is_not_declared, (POSTINGS, "", None), "'kinD' are not right"
    ),
    # counters and the change log
    "ids beyond the next one": Damage(
        ids_beyond, (REFERENCES, f"{LONG}", "long"), "not below the next"
    ),
    "a change of a reference that never was": Damage(
        add_change((INSERTED, 1000)), (CHANGES, "*", None), "never was"
    ),
    "a second insertion": Damage(
        add_change((INSERTED, SHORT)), (CHANGES, "*", None), "was there already"
    ),
    "a change behind a deletion": Damage(
        add_change((REMEMBERED, GONE)), (CHANGES, "*", None), "was deleted before"
    ),
    "a deletion that was none": Damage(
        add_change((DELETED, SHORT)), (CHANGES, "", None), f"reference {SHORT} is not as"
    ),
    "a forgotten memory that is there": Damage(
        add_change((FORGOTTEN, SHORT)), (CHANGES, "", None), f"memory of {SHORT} is not as"
    ),
    "a change without entries": Damage(add_change(), (CHANGES, "*", None), "no entries"),
    "a change of half an entry": Damage(
        lambda f: f.put(CHANGES, 1, 1, b"\1\1"), (CHANGES, "1", None), ""
    ),
    "a change behind the last": Damage(
        lambda f: f.changed(last(f) + 1, (FORGOTTEN, SHORT)), (CHANGES, "", None), "should end"
    ),
    # settings
    **{
        f"the setting {name} spoilt": Damage(
            lambda f, name=name: f.spoil(SETTINGS, name), (SETTINGS, f"'{name}'", None), "checksum"
        )
        for name in ("counters", "index")
    },
    **{
        f"the setting {name} missing": Damage(
            lambda f, name=name: f.delete(SETTINGS, name), (SETTINGS, "", None), f"'{name}'"
        )
        for name in ("counters", "index")
    },
    "counters without a field": Damage(
        lambda f: f.setting("counters", trimmed=None), (SETTINGS, "", None), "trimmed"
    ),
    "the setting index without a field": Damage(
        lambda f: f.setting("index", keys=None), (SETTINGS, "", None), "keys"
    ),
    "counters and a memory spoilt": Damage(
        lambda f: (f.spoil(SETTINGS, "counters"), f.spoil(MEMORIES, SHORT)),
        (SETTINGS, "'counters'", None),
        "checksum",
    ),
    "a damaged memory and a damaged embedding of one document": Damage(
        lambda f: (f.spoil(EMBEDDINGS, SHORT), f.spoil(MEMORIES, SHORT)),
        (EMBEDDINGS, FIRST, "short"),
        "checksum",
    ),
}


def matches(problem: Problem, damage: Damage) -> bool:
    table, key, document = damage.where
    right_key = bool(problem.key) if key == "*" else problem.key == key
    right_place = problem.table == table and right_key and problem.document == document
    return right_place and damage.what in problem.what


@pytest.fixture(params=list(DAMAGE))
def damage(request: pytest.FixtureRequest, small: Path) -> Damage:
    """Done to the small database."""
    damage = DAMAGE[request.param]
    with forging(small) as forge:
        damage.do(forge)
    return damage


def test_what_is_wrong_is_reported_with_its_place(small: Path, damage: Damage) -> None:
    before = content(small)
    problems = memdb.verify(small)
    assert [problem for problem in problems if matches(problem, damage)], problems
    assert content(small) == before  # verify changes nothing
    assert all(str(problem) for problem in problems)


def test_repair_with_drop_leaves_a_clean_database_and_other_documents_as_they_were(
    small: Path, small_template: Path, damage: Damage
) -> None:
    whole = state(small_template)
    before = records(small)
    report = memdb.repair(small, embedder=WordEmbedder, drop=True)
    assert_nothing_is_gone(before, records(small), report)
    assert report.left == []
    assert memdb.verify(small) == []
    assert report.dropped == sorted(damage.lost)
    assert report.mended or report.dropped
    assert state(small).keys() == whole.keys() - set(damage.lost)
    with opened(small) as database:
        database.warm()  # memories that were dropped are written anew, as they were
    with opened(small_template) as database:
        database.warm()
    after, whole = state(small), state(small_template)
    assert all(same_state(whole[name], after[name]) for name in after)
    with opened(small) as database:
        for name in after:
            where = {"kind": whole[name][0].metadata["kind"]}
            assert name in {document.id for document in database.documents(where)}
            hits = database.retrieve("text", 100, where=where).hits
            assert set(whole[name][0].references) <= {hit.id for hit in hits}
        database.insert("There is room for more.", id="new")
    assert memdb.verify(small) == []


def assert_nothing_is_gone(
    before: dict[tuple[str, bytes], bytes],
    after: dict[tuple[str, bytes], bytes],
    report: memdb.Repair,
) -> None:
    """What repair took out or wrote anew is put aside, byte for byte, whatever its seal says; but
    for the postings, and the numbers that every write counts."""
    kept = {
        (record.table, record.key, record.record)
        for file in report.aside
        for record in read_aside(file)
    }
    derived = {(table, key) for table, key in before if table == POSTINGS}
    if (SETTINGS, b"counters") in before:
        with suppress(CorruptRecordError):
            unseal(SETTINGS, b"counters", memoryview(before[SETTINGS, b"counters"]))
            derived.add((SETTINGS, b"counters"))
    for place, record in before.items():
        if after.get(place) != record and place not in derived:
            assert (*place, record) in kept
    assert bool(report.aside) == bool(report.put_aside) == bool(kept)


@pytest.mark.parametrize("name", list(DAMAGE))
def test_repair_without_drop_deletes_no_document(
    small: Path, small_template: Path, name: str
) -> None:
    damage = DAMAGE[name]
    with forging(small) as forge:
        damage.do(forge)
    before = {key for table, key in records(small) if table == DOCUMENTS}
    whole = records(small)
    report = memdb.repair(small, embedder=WordEmbedder)
    assert_nothing_is_gone(whole, records(small), report)
    assert report.dropped == []
    assert set(damage.lost) <= {problem.document for problem in report.left}
    assert bool(report.left) == bool(damage.lost or damage.nameless)
    assert memdb.verify(small) == report.left
    assert before <= {key for table, key in records(small) if table == DOCUMENTS}


@pytest.mark.parametrize("name", ["shape", "embedder", "model", "memory", "tokenizer", "format"])
def test_a_setting_that_cannot_be_derived_is_named_and_left(small: Path, name: str) -> None:
    with forging(small) as forge:
        forge.spoil(SETTINGS, name)
    before = records(small)
    problems = memdb.verify(small)
    assert any(p.table == SETTINGS and name in p.key + p.what for p in problems), problems
    report = memdb.repair(small, embedder=WordEmbedder, drop=True)
    assert report.dropped == []
    assert report.left == problems
    assert records(small) == before


@pytest.mark.parametrize("name", ["shape", "embedder", "model", "memory"])
def test_a_setting_that_is_missing_is_reported(small: Path, name: str) -> None:
    with forging(small) as forge:
        forge.delete(SETTINGS, name)
    assert any(p.table == SETTINGS and f"'{name}'" in p.what for p in memdb.verify(small))


def test_a_damaged_text_says_nothing_of_its_embedding_and_memory(small: Path) -> None:
    """The document is at version 2, its reference still at version 1."""
    with opened(small) as database:
        database.update("short", metadata={"kind": "new"})
    assert memdb.verify(small) == []
    with forging(small) as forge:
        forge.spoil(REFERENCES, SHORT)
    assert {problem.table for problem in memdb.verify(small)} == {REFERENCES}


def test_damaged_settings_do_not_hide_damaged_records_for_ever(small: Path) -> None:
    with forging(small) as forge:
        forge.spoil(SETTINGS, "index")
        forge.spoil(REFERENCES, SHORT)
    report = memdb.repair(small, embedder=WordEmbedder)
    assert report.mended
    assert {problem.document for problem in report.left} == {"short"}


# --- what is no damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["shape", "codec"])
def test_memories_of_another_shape_or_codec_are_no_damage(small: Path, foreign: str) -> None:
    memory = TokenWriter().write(["A short text."])[0]
    if foreign == "shape":
        other = TokenWriter(17)
        payload = encode_memory(other.write(["A short text."])[0], other.shape, CODECS["int8"])
    else:
        payload = exact(memory).replace(b"\5exact", b"\5exacT", 1)
    with forging(small) as forge:
        forge.put(MEMORIES, SHORT, 1, payload)
    before = content(small)
    assert memdb.verify(small) == []
    assert memdb.repair(small, drop=True) == memdb.Repair()
    assert content(small) == before


# --- repair, by what it has to work with ----------------------------------------------------------


def test_repair_changes_nothing_where_nothing_is_wrong(small: Path, indexed: Path) -> None:
    for path in (small, indexed):
        before = content(path)
        assert memdb.repair(path, embedder=WordEmbedder, drop=True) == memdb.Repair()
        assert content(path) == before


def test_an_embedding_is_left_without_an_embedder_and_dropped_if_asked(
    small: Path, small_template: Path
) -> None:
    whole = state(small_template)
    with forging(small) as forge:
        forge.spoil(EMBEDDINGS, SHORT)
    report = memdb.repair(small)
    assert (report.mended, report.dropped) == ([], [])
    assert [(p.table, p.key, p.document) for p in report.left] == [(EMBEDDINGS, FIRST, "short")]
    report = memdb.repair(small, drop=True)
    assert (report.mended, report.dropped, report.left) == ([], ["short"], [])
    assert memdb.verify(small) == []
    after = state(small)
    assert after.keys() == {"cold", "long"}
    assert all(same_state(whole[name], after[name]) for name in after)


def test_the_embedder_is_made_only_where_one_is_needed(small: Path) -> None:
    def never() -> WordEmbedder:
        raise AssertionError("it was made")

    with forging(small) as forge:
        forge.spoil(MEMORIES, SHORT)
        forge.spoil(DOCUMENTS, "long")
    assert memdb.repair(small, embedder=never).left == []


def test_a_memory_that_was_dropped_is_written_at_the_next_retrieval(
    small: Path, small_template: Path
) -> None:
    with forging(small) as forge:
        forge.spoil(MEMORIES, SHORT)
    assert memdb.repair(small).left == []
    with opened(small) as database, opened(small_template) as whole:
        assert database.get("short").warm == 0
        found = database.retrieve("A short text.", 1)
        assert (found.written, found.hits[0].reference.document_id) == (1, "short")
        assert same_memory(found.memories[0], whole.retrieve("A short text.", 1).memories[0])
        assert database.get("short").warm == 1
    assert memdb.verify(small) == []


def test_a_damaged_text_is_named_and_left_and_its_document_dropped_if_asked(
    small: Path, small_template: Path
) -> None:
    with forging(small) as forge:
        forge.spoil(REFERENCES, LONG + 2)
    report = memdb.repair(small, embedder=WordEmbedder)
    assert [(p.table, p.key, p.document) for p in report.left] == [
        (REFERENCES, f"{LONG + 2}", "long")
    ]
    with MemDB.open(small) as database:
        assert {document.id for document in database.documents({"kind": "note"})} == {
            "cold",
            "short",
        }
        with pytest.raises(memdb.CorruptRecordError, match=f"record {LONG + 2} of table"):
            database.get("long")
    assert memdb.repair(small, drop=True).dropped == ["long"]
    with opened(small) as database:
        database.insert(PAGE[:250], id="long", metadata={"kind": "page", "year": 1900.5})
        assert database.get("long").text == PAGE[:250]
    assert memdb.verify(small) == []


def test_no_id_is_given_again_after_the_counters_were_derived(small: Path) -> None:
    with opened(small) as database:
        highest = max(database.get("long").references)
        database.delete("long")
    with forging(small) as forge:
        forge.spoil(SETTINGS, "counters")
    assert memdb.repair(small).left == []
    with opened(small) as database:
        assert database.insert("new", id="new").references == (highest + 1,)


def test_keys_stay_declared_when_the_setting_index_is_derived(small: Path) -> None:
    with forging(small) as forge:
        forge.spoil(SETTINGS, "index")
    assert memdb.repair(small).left == []
    with raw(small) as (environment, tables), environment.begin(write=True) as inner:
        rules = json.loads(Forge(inner, tables).get(SETTINGS, "index")[1])
    assert rules["keys"] == ["kind", "year"]


def test_an_open_database_follows_a_repair(small: Path) -> None:
    with opened(small) as database:
        assert len(database.retrieve("text", 100).hits) == 8
        store = database._store  # LMDB is not opened twice in one process
        with store.write() as transaction:
            forge = Forge(transaction._inner, transaction._tables)
            forge.spoil(CHANGES, 1)
            forge.spoil(REFERENCES, SHORT)
        assert memdb.repair(small, drop=True).dropped == ["short"]
        hits = database.retrieve("text", 100).hits
        assert {hit.reference.document_id for hit in hits} == {"cold", "long"}
        database.insert("new", id="new")
        assert len(database.retrieve("text", 100).hits) == 8


# --- pages ----------------------------------------------------------------------------------------


def test_damaged_pages_are_reported_and_left(small: Path) -> None:
    file = small / "gen-000001" / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 + 10] ^= 0x60  # bits of a page's flags that no page of ours has
    file.write_bytes(data)
    before = content(small)
    problems = memdb.verify(small)
    assert problems
    assert {problem.table for problem in problems} == {"pages"}
    report = memdb.repair(small, drop=True)
    assert (report.mended, report.dropped, report.left) == ([], [], problems)
    assert content(small) == before


# --- the index file -------------------------------------------------------------------------------


def wrong_index(path: Path, how: str, tmp_path: Path) -> None:
    file = index_file(path)
    whole = file.read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "cut short":
        file.write_bytes(whole[:-1])
    elif how == "longer":
        file.write_bytes(whole + b"\0")
    elif how == "a byte turned":
        file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    elif how == "of another database":
        other = tmp_path / "other"
        with MemDB.create(other, shape=make_shape(), dimension=8, index="ivf") as database:
            for n in range(80):
                vector = np.random.default_rng(n).standard_normal((1, 8), np.float32)
                database.insert(f"other {n}", id=f"doc-{n}", embeddings=vector)
            database.build_index()
        shutil.copy(index_file(other), file)
    elif how == "of a later change":
        later = Path(shutil.copytree(path, tmp_path / "later"))
        with MemDB.open(later) as database:
            database.delete("doc-0")
            database.build_index()
        shutil.copy(index_file(later), file)


@pytest.mark.parametrize(
    "how",
    ["empty", "cut short", "longer", "a byte turned", "of another database", "of a later change"],
)
def test_a_wrong_index_file_is_reported_and_built_anew_and_never_searched(
    indexed: Path, indexed_template: Path, tmp_path: Path, how: str
) -> None:
    queries = list(np.random.default_rng(5).standard_normal((4, 8), np.float32))
    wrong_index(indexed, how, tmp_path)
    (problem,) = memdb.verify(indexed)
    assert (problem.table, problem.key) == ("index", "index.faiss")
    with MemDB.open(indexed_template) as whole, MemDB.open(indexed) as database:
        # All vectors are compared: so the first five are the true ones.
        for found, due in zip(
            database.retrieve_batch(queries, 80), whole.retrieve_batch(queries, 80), strict=True
        ):
            assert {hit.id for hit in found.hits} == {hit.id for hit in due.hits}
            np.testing.assert_allclose(
                [hit.score for hit in found.hits], [hit.score for hit in due.hits], atol=1e-3
            )
    report = memdb.repair(indexed)
    assert report.left == []
    assert any("index file" in line for line in report.mended)
    assert memdb.verify(indexed) == []
    assert index_file(indexed).exists()


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_turned_byte_of_an_index_file_and_a_wrong_length_are_noticed(
    indexed: Path, tmp_path: Path, step: int
) -> None:
    whole = index_file(indexed).read_bytes()
    file = tmp_path / "index.faiss"
    file.write_bytes(whole)
    assert AnnIndex(file).info.references == 80
    with file.open("r+b", buffering=0) as data:
        for at in {*range(0, len(whole), step), *range(len(whole) - 300, len(whole))}:
            os.pwrite(data.fileno(), bytes([whole[at] ^ 1 << at % 8]), at)
            with pytest.raises(CorruptRecordError):
                AnnIndex(file).check()
            os.pwrite(data.fileno(), whole[at : at + 1], at)
        AnnIndex(file).check()
        for size in range(len(whole) - 1, -1, -step):
            data.truncate(size)
            with pytest.raises(CorruptRecordError):
                AnnIndex(file)
