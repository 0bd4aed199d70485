"""An independent reader reads what memdb wrote; and what memdb does with what it does not know."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import CorruptRecordError, FormatError, MemDB, MemoryShape
from memdb.cutting.headings import headings_of
from tests.storage_format.coded import FAMILIES, PLAIN
from tests.storage_format.databases import (
    DIMENSION,
    ENOUGH,
    KEYS,
    LONG,
    METADATA,
    OTHER,
    WRITTEN,
    FakeEmbedder,
    FakeWriter,
    Written,
    assert_reads_as,
    compare,
    create,
    edit_file,
    few_are_enough,
    grown,
    insert_unlike,
    memory_of,
    move_the_border,
    put,
    read_copy,
    rename,
    set_setting,
    shape_of,
)
from tests.storage_format.reader import (
    INSERTED,
    INTEGER_KEYS,
    INVARIANTS,
    REMEMBERED,
    TABLES,
    Database,
    broken,
    fingerprint,
    follow,
    headings,
    places,
    read_database,
    seal,
    unseal,
    value_key,
)


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_independent_reader_reads_it_all(tmp_path: Path, dtype: str, codec: str) -> None:
    path = tmp_path / "a.memdb"
    written: dict[str, Written] = {}
    index, built = set(), None
    given: set[int] = set()

    def want(name: str, version: int, text: str, metadata: dict[str, Any], warm: bool) -> None:
        pieces = db.split(text)
        contents = [piece.text.strip() for piece in pieces]
        written[name] = Written(
            version,
            text,
            metadata,
            [(piece.text, piece.tokens) for piece in pieces],
            FakeEmbedder().embed(contents),
            [memory_of(content, db.shape) for content in contents] if warm else None,
        )

    def check() -> Database:
        nonlocal index, built, given
        database = read_copy(path, tmp_path / "copy")
        for invariant in INVARIANTS.values():
            invariant(database)
        compare(database, written, codec)
        index, built = follow(index, built, database)
        assert index == set(database.references())
        given |= index
        return database

    with create(path, dtype, codec) as db:
        database = check()
        assert MemoryShape.from_json(database.shape) == db.shape
        assert fingerprint(database.shape) == db.shape.fingerprint
        assert database.setting("format")["id"] == db.stats()["id"]
        assert database.tokenizer == FakeWriter(db.shape).tokenizer
        assert database.setting("embedder") == {"name": "fake", "fingerprint": "e1", "dimension": 5}
        assert database.setting("memory") == {"codec": codec, **WRITTEN}
        assert database.setting("index") == {"kind": "auto", "recall": 0.99, "keys": list(KEYS)}

        db.insert(LONG, id="a", metadata=METADATA)
        want("a", 1, LONG, METADATA, warm=True)
        check()

        derived = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()[:32]
        assert db.insert(OTHER).id == derived
        want(derived, 1, OTHER, {}, warm=True)
        assert len(check().documents()[derived][3]) > 1

        db.insert(LONG, id="ü\U0001f600", cold=True)
        want("ü\U0001f600", 1, LONG, {}, warm=False)
        check()

        before = check().documents()["a"][3]
        db.update("a", metadata={"year": 1.5})
        want("a", 2, LONG, {"year": 1.5}, warm=True)
        assert check().documents()["a"][3] == before
        db.declare_keys("year", "a")
        assert db.update("a", metadata={"year": 1.5, "a": "\0b"}).version == 3
        want("a", 3, LONG, {"year": 1.5, "a": "\0b"}, warm=True)
        assert set(check().postings()) == {(b"year", value_key(1.5)), (b"a", value_key("\0b"))}

        db.update("ü\U0001f600", text=OTHER)
        want("ü\U0001f600", 2, OTHER, {}, warm=True)
        check()

        db.insert(LONG, id="b", cold=True)
        db.warm(["b"])
        want("b", 1, LONG, {}, warm=True)
        check()

        random = [memory_of(f"random {i}", db.shape) for i in range(len(db.split(LONG)))]
        vectors = np.random.default_rng(0).normal(size=(len(random), DIMENSION))
        db.update("b", embeddings=vectors.astype(np.float32), memories=random)
        want("b", 2, LONG, {}, warm=True)
        written["b"].embeddings, written["b"].memories = vectors, random
        check()

        db.delete("a", derived)
        del written["a"], written[derived]
        check()

        before_again = set(given)
        db.insert(OTHER)
        want(derived, 1, OTHER, {}, warm=True)
        database = check()
        assert not before_again & set(database.documents()[derived][3])

        # What memdb reads is what the document says is read.
        memories = database.memories()
        hits = db.retrieve(vectors[0], k=len(memories)).hits
        assert {hit.reference.id for hit in hits} == set(memories)
        for hit in hits:
            assert hit.memory is not None
            stored = memories[hit.reference.id]
            assert stored is not None
            assert_reads_as(database, stored, hit.memory)

    assert index == follow(set(), None, read_database(path))[0]
    assert {entry.name for entry in path.iterdir()} == {"CURRENT", "LOCK", "gen-000001"}
    assert {entry.name for entry in (path / "gen-000001").iterdir()} == {
        "data.mdb",
        "lock.mdb",
        "write.lock",
        "usage",
    }
    assert (path / "CURRENT").read_bytes() == b"gen-000001\n"


GUIDE = (
    "One two\n\n# Guide #\n"
    + LONG
    + "\n ## Ships  of  war\n"
    + LONG
    + "\n### Deep\n"
    + LONG
    + "\n```\n# none\n```\n"
    + LONG
    + "\n## Ships of peace\n"
    + LONG
    + "\n# Guide\n"
    + OTHER
)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # of 8 and of 300 tokens
def test_an_independent_reader_knows_every_place(tmp_path: Path, dtype: str) -> None:
    with create(tmp_path / "db", dtype, "exact", place=True) as db:
        db.insert(GUIDE, id="a", metadata={"title": " A\ttitle "})
        db.insert(GUIDE, id="b")
        db.insert(GUIDE, id="c", metadata={"title": "Guide"})
        db.insert(GUIDE, id="d", metadata={"title": ["no", "name"]})
        db.insert(LONG, id="e f")
        db.insert(OTHER)
        db.insert(LONG + OTHER, id="g", metadata={"title": "long " * 50})
        known = {id: db.places(id) for id in db}
        database = read_copy(db.path, tmp_path / "copy")
    assert sum(map(bool, itertools.chain(*known.values()))) > 10
    assert {id: places(database, id) for id in known} == known
    for invariant in INVARIANTS.values():
        invariant(database)
    references, memories, vectors = (
        database.references(),
        database.memories(),
        database.embeddings(),
    )
    for id, of_document in known.items():
        for number, place in zip(database.documents()[id][3], of_document, strict=True):
            content = references[number][4].strip()
            written = f"{place}\n{content}" if place else content
            memory = memories[number]
            assert memory is not None
            assert memory.positions == tuple(memory_of(written, shape_of(dtype)).positions)
            wanted = FakeEmbedder().embed([written])[0]
            np.testing.assert_allclose(
                vectors[number], wanted / np.linalg.norm(wanted), rtol=1e-5, atol=1e-6
            )


@given(
    st.lists(
        st.sampled_from(
            [*"# `~a\n\n", "```", "~~~", "\n# ", "\n## a", "   ", "\t", "\r", "\u3000", "\x0b"]
        ),
        max_size=40,
    )
)
def test_an_independent_reader_knows_every_heading(parts: list[str]) -> None:
    text = "".join(parts)
    known = [(heading.at, heading.level, heading.name) for heading in headings_of(text)]
    assert headings(text) == known


def check_all(db: MemDB, path: Path, copy: Path) -> Database:
    """memdb reads every memory as the independent reader does, which finds nothing broken."""
    database = read_copy(path, copy)
    for invariant in INVARIANTS.values():
        invariant(database)
    stored = database.memories()
    embedding = np.ones(DIMENSION, np.float32)
    for hit in db.retrieve(embedding, k=len(stored)).hits:
        memory = stored.pop(hit.reference.id)
        assert memory is not None
        assert hit.memory is not None
        assert_reads_as(database, memory, hit.memory)
    assert not stored
    return database


def codecs_of(database: Database) -> list[str]:
    return [memory.codec for memory in database.memories().values() if memory is not None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memories_under_a_fitted_codec(tmp_path: Path, dtype: str, family: str) -> None:
    path, copy = tmp_path / "a.memdb", tmp_path / "copy"
    with few_are_enough(family), grown(path, dtype, family) as db:
        database = check_all(db, path, copy)
        assert database.setting("memory")["fitted"].startswith(family)
        insert_unlike(db)
        first = check_all(db, path, copy)
        name = first.setting("memory")["fitted"]
        assert list(first.fitted) == [name]
        assert set(codecs_of(first)) == {name, "int8"}
        assert 1 <= codecs_of(first).count("int8") <= 3  # fitted to twelve, it may not suit all
        (unlike,) = first.documents()["unlike"][3]
        stored = first.memories()[unlike]
        assert stored is not None
        assert stored.codec == "int8"
        last = first.setting("counters")["last_change"]
        remembered = Counter(
            number for es in first.changes().values() for what, number in es if what == REMEMBERED
        )
        # What was there when the codec was fitted was remembered twice.
        assert {i for i, times in remembered.items() if times == 2} == set(range(1, ENOUGH + 1))

        db.insert("One more.", id="more")
        assert 1 <= codecs_of(check_all(db, path, copy)).count("int8") <= 3
        db.recode("rotated4")
        second = check_all(db, path, copy)
        assert set(codecs_of(second)) == {"rotated4"}
        assert second.setting("memory") == {"codec": "rotated4", **WRITTEN}
        assert second.fitted == first.fitted
        db.delete("unlike")  # a codec fitted to it would lose all others
        db.recode(family)
        third = check_all(db, path, copy)
        assert name in third.fitted
        assert third.setting("memory")["fitted"] in codecs_of(third)
        assert third.setting("counters")["last_change"] > last
    with MemDB.open(path) as db:
        check_all(db, path, copy)


def test_many_values_and_references_are_in_postings(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    values = [None, True, False, 0, -0.0, -1, -2.5, 1e300, 2**53, 2**53 + 1, "x" * 400, "x" * 401]
    values += ["", "\0", "\0\0", [], {}, "a", "ab", "b", "é", -(2**53), -(2**53) - 1]
    with create(path, "float32", "int8", durability="off") as db:
        for n, value in enumerate(values):
            db.insert(f"Value {n}.", id=f"v{n}", metadata={"year": value}, cold=True)
        for n in range(300):
            db.insert("word " * 20, id=f"w{n}", metadata={"é": n % 2}, cold=True)
        db.delete(*(f"w{n}" for n in range(100, 130)))
        for n in range(40):
            db.update(f"w{n}", metadata={"é": 1})
    database = read_database(path)
    assert broken(database) == set()
    ones = database.postings()["é".encode(), value_key(1)]
    assert len(ones) > 2
    assert ones[0][0] == 0
    others = database.postings()[b"year", b"\x7f"]
    assert sum(len(held) for _, held in others) == 5


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    create(path, "float32", "int8").close()

    def make_newer(transaction: Any, tables: Any) -> None:
        record = seal("settings", b"format", 1, b'{"needs":["x"],"version":3}')
        transaction.put(b"format", record, db=tables["settings"])
        transaction.drop(tables["memories"])  # it has other tables

    edit_file(path, make_newer)
    with pytest.raises(FormatError, match="version 3"):
        MemDB.open(path)


def with_another_memory(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Make a database whose one memory has another payload, with the right seal for it."""
    with create(path, "float32", "int8") as db:
        (reference,) = db.insert("Short.", id="a").references

    def rewrite(transaction: Any, tables: Any) -> None:
        key = struct.pack("<Q", reference)
        _, payload = unseal("memories", key, transaction.get(key, db=tables["memories"]))
        record = seal("memories", key, 1, change(payload))
        transaction.put(key, record, db=tables["memories"])

    edit_file(path, rewrite)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda p: p.replace(b"\4int8", b"\4int9"), FormatError, "record 1 of .*codec 'int9'"),
        (lambda p: rename(p, "new:0123456789abcdef"), FormatError, "codec 'new:0123"),
        (lambda p: rename(p, "klt8:0123456789abcdef"), CorruptRecordError, "'codec klt8:0123"),
        (lambda p: p + b"\0", CorruptRecordError, "are due"),
        (move_the_border, CorruptRecordError, "are due"),
    ],
    ids=["codec", "family", "parameters", "length", "sections"],
)
def test_an_unknown_codec_is_no_damage(
    tmp_path: Path, change: Callable[[bytes], bytes], error: type[Exception], match: str
) -> None:
    path = tmp_path / "a.memdb"
    with_another_memory(path, change)
    with MemDB.open(path) as db:
        assert db.get("a").warm == 1
        embedding = np.ones(DIMENSION, np.float32)
        assert db.retrieve_batch([embedding], memories=False)[0].hits
        (hit,) = db.retrieve(embedding).hits
        with pytest.raises(error, match=match) as caught:
            hit.memory  # noqa: B018
        assert type(caught.value) is error


def test_a_memory_of_another_shape_counts_as_cold_and_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.memdb"
    with_another_memory(path, lambda payload: put(len("?int8"), b"!")(payload)[:25])
    assert broken(read_database(path)) == set()
    embedding = np.ones(DIMENSION, np.float32)
    with MemDB.open(path) as db:
        assert db.get("a").warm == 0
        (hit,) = db.retrieve(embedding).hits
        assert hit.memory is None
    untouched = read_database(path)
    assert untouched.memories() == {1: None}
    with MemDB.open(path, embedder=FakeEmbedder(), writer=FakeWriter(shape_of("float32"))) as db:
        assert db.warm() == 1
        assert db.get("a").warm == 1
    replaced = read_database(path)
    assert broken(replaced) == set()
    assert replaced.memories()[1] is not None
    last = replaced.setting("counters")["last_change"]
    assert last == untouched.setting("counters")["last_change"] + 1
    assert replaced.changes()[last] == [(REMEMBERED, 1)]


def test_an_index_of_another_past_begins_anew() -> None:
    records = {name: dict[bytes, bytes]() for name in TABLES}
    database = Database("gen-000001", records, INTEGER_KEYS)
    set_setting(database, "counters", {"next_reference": 9, "last_change": 3, "trimmed": 0})
    for i in (1, 2, 3):
        key, entry = struct.pack("<Q", i), struct.pack("<Bq", INSERTED, i)
        records["changes"][key] = seal("changes", key, 1, entry)
        records["embeddings"][key] = seal("embeddings", key, 1, struct.pack("<f", 1))
    assert follow({1}, 1, database) == ({1, 2, 3}, 3)
    assert follow({7}, 1, database) == ({7, 2, 3}, 3)  # a wrong index stays wrong
    for gap in (2, 3):
        log = {k: v for k, v in records["changes"].items() if k != struct.pack("<Q", gap)}
        gapped = replace(database, records={**records, "changes": log})
        assert follow({7}, 1, gapped) == ({1, 2, 3}, 3)
    assert follow({7}, 4, database) == follow({7}, None, database) == ({1, 2, 3}, 3)
