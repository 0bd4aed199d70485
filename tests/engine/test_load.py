"""Bulk loading: what it takes, what it refuses, and what it does with documents that are there."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdb
from memdb import (
    Document,
    DocumentBatch,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemDBError,
    MemoryBatch,
    Piece,
)
from memdb.ingest import load as loading
from tests.engine.helpers import make_memory, make_shape, same_memory

SHAPE = make_shape()
EAST, NORTH = np.float32([1, 0]), np.float32([0, 1])


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    path = tmp_path / "db"
    shutil.copytree(bare_template, path)
    with MemDB.open(path, durability="off") as database:
        yield database


def batch(*names: str, vector: Any = EAST, memories: Any = None, **more: Any) -> DocumentBatch:
    """One reference a document; all have the same embedding."""
    documents = [Document(f"text of {name}", name) for name in names]
    return DocumentBatch(documents, np.tile(vector, (len(names), 1)), memories, **more)


def memory_of(database: MemDB, name: str) -> ExplicitMemory | None:
    ((_, stored),) = database.memories(name)
    return None if stored is None else stored.memory


# --- in which thread ------------------------------------------------------------------------------


def test_batches_are_drawn_in_the_callers_thread(bare: MemDB) -> None:
    connection = sqlite3.connect(":memory:")  # which no other thread may use
    connection.execute("create table pages (name text)")
    connection.executemany("insert into pages values (?)", [(f"{n:03}",) for n in range(200)])

    def batches() -> Iterator[DocumentBatch]:
        for (name,) in connection.execute("select name from pages"):
            assert threading.current_thread() is threading.main_thread()
            yield batch(name)

    assert bare.load(batches()).inserted == 200
    connection.close()


def test_no_more_is_drawn_ahead_than_a_transaction_takes(
    bare: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_BYTES", 4000)
    drawn = 0
    ahead = []

    def batches() -> Iterator[DocumentBatch]:
        nonlocal drawn
        for n in range(100):
            drawn += 1
            yield batch(f"{n:03}", memories=[make_memory(SHAPE, n)])

    def told(_: str, done: int, __: int) -> None:
        ahead.append(drawn - done)

    assert bare.load(batches(), progress=told).inserted == 100
    assert len(ahead) > 10
    assert 0 < max(ahead) < 20


def test_what_was_drawn_before_an_error_is_written(bare: MemDB) -> None:
    def batches() -> Iterator[DocumentBatch]:
        yield batch("a")
        yield batch("b")
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        bare.load(batches())
    assert [document.id for document in bare.documents()] == ["a", "b"]
    with pytest.raises(InvalidInputError, match="embedding 0 is zero"):
        bare.load([batch("c"), batch("d", vector=[0, 0]), batch("e")])
    assert [document.id for document in bare.documents()] == ["a", "b", "c"]
    assert memdb.verify(bare.path) == []


# --- documents that are there ---------------------------------------------------------------------


def test_the_same_again_changes_nothing(bare: MemDB) -> None:
    first = batch("a", "b", memories=[make_memory(SHAPE, 1), None])
    report = bare.load([first])
    assert (report.inserted, report.memories) == (2, 1)
    before = bare.stats()
    report = bare.load([first])
    assert (report.unchanged, report.renewed, report.references, report.memories) == (2, 0, 0, 0)
    assert bare.stats() == before


def test_memories_that_come_later_are_stored(bare: MemDB) -> None:
    bare.load([batch("a", "b")])
    first, second = make_memory(SHAPE, 1), make_memory(SHAPE, 2)
    before = [document.references for document in bare.documents()]
    report = bare.load([batch("a", "b", memories=[first, None])])
    assert (report.renewed, report.unchanged, report.memories, report.references) == (1, 1, 1, 0)
    report = bare.load([batch("a", memories=MemoryBatch.of([second], SHAPE))])
    assert (report.renewed, report.unchanged, report.memories) == (1, 0, 1)
    found = memory_of(bare, "a")
    assert found is not None
    assert same_memory(found, second)
    assert memory_of(bare, "b") is None
    assert [document.references for document in bare.documents()] == before
    assert [document.version for document in bare.documents()] == [1, 1]
    assert memdb.verify(bare.path) == []


def test_a_memory_that_does_not_come_again_stays(bare: MemDB) -> None:
    memory = make_memory(SHAPE, 1)
    bare.load([batch("a", memories=[memory])])
    assert bare.load([batch("a")]).unchanged == 1
    assert bare.load([batch("a", vector=NORTH)]).renewed == 1
    found = memory_of(bare, "a")
    assert found is not None
    assert same_memory(found, memory)


def test_other_embeddings_are_found_by(bare: MemDB) -> None:
    bare.declare_keys("n")
    bare.load([batch("a", "b", memories=[make_memory(SHAPE, 1), make_memory(SHAPE, 2)])])
    report = bare.load([DocumentBatch(batch("a", "b").documents, np.stack([EAST, NORTH]))])
    assert (report.renewed, report.unchanged, report.references, report.memories) == (1, 1, 1, 0)
    hit = bare.retrieve(NORTH, 1).hits[0]
    assert (hit.reference.document_id, hit.score) == ("b", pytest.approx(1))
    assert hit.memory is not None
    assert same_memory(hit.memory, make_memory(SHAPE, 2))
    assert bare.get("b").version == 2
    assert memdb.verify(bare.path) == []


def test_another_cut_is_written_anew(bare: MemDB) -> None:
    documents = [Document("one two", "a")]
    bare.load([DocumentBatch(documents, EAST[None])])
    pieces = [[Piece("one ", 0), Piece("two", 0)]]
    report = bare.load([DocumentBatch(documents, np.stack([EAST, EAST]), pieces=pieces)])
    assert (report.renewed, report.references) == (1, 2)
    assert bare.get("a").text == "one two"
    assert len(bare.get("a").references) == 2
    assert bare.load([DocumentBatch(documents, np.stack([EAST, EAST]), pieces=pieces)]).unchanged


# --- what is refused ------------------------------------------------------------------------------

GOOD = batch("a", memories=[make_memory(SHAPE, 1)])
NOT_FINITE = make_memory(SHAPE, 3)
NOT_FINITE.keys[0, 0] = np.inf


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"documents": 5}, "the documents of a batch"),
        ({"documents": "a"}, "the documents of a batch"),
        ({"documents": ["a"]}, "each of the documents must be a Document"),
        ({"documents": [Document("", "a")]}, "'text' is empty"),
        ({"documents": [Document("text of a", "")]}, "'id' is empty"),
        ({"documents": [Document("text of a", "a", {"x": np.nan})]}, "'metadata'"),
        ({"documents": []}, "embeddings must have shape"),
        ({"embeddings": None}, "embeddings must be real numbers"),
        ({"embeddings": [["1", "0"]]}, "embeddings must be real numbers"),
        ({"embeddings": np.ones((1, 2), complex)}, "embeddings must be real numbers"),
        ({"embeddings": np.ones((1, 2), bool)}, "embeddings must be real numbers"),
        ({"embeddings": np.ones((1, 2), object)}, "embeddings must be real numbers"),
        ({"embeddings": [[1], [1, 2]]}, "embeddings are not rows of numbers"),
        ({"embeddings": np.ones(2)}, "embeddings must have shape"),
        ({"embeddings": np.float32(1)}, "embeddings must have shape"),
        ({"embeddings": np.ones((0, 2))}, "embeddings must have shape"),
        ({"embeddings": [[np.nan, 1]]}, "zero or not finite"),
        ({"embeddings": [[1e300, 1]]}, "zero or not finite"),
        ({"memories": 5}, "memories must be several"),
        ({"memories": "m"}, "memories must be several"),
        ({"memories": []}, "0 memories for 1 references"),
        ({"memories": [5]}, "each of the memories must be an ExplicitMemory"),
        ({"memories": [bytearray(b"x")]}, "each of the memories must be an ExplicitMemory"),
        ({"memories": [b""]}, "does not decode"),
        ({"memories": [b"\x05exact"]}, "does not decode"),
        ({"memories": [NOT_FINITE]}, "not finite"),
        ({"memories": [make_memory(make_shape(kv_heads=1), 1)]}, "explicit memory: offsets"),
        ({"memories": [ExplicitMemory([0], [0], [0], [0])]}, "offsets must be an array"),  # type: ignore[arg-type]
        ({"memories": MemoryBatch(1, 2, 3, 4)}, "counts must be an array"),  # type: ignore[arg-type]
        ({"memories": MemoryBatch.of([NOT_FINITE], SHAPE)}, "not finite"),
        ({"pieces": 5}, "pieces must be several"),
        ({"pieces": []}, "pieces of 0 documents for 1"),
        ({"pieces": [5]}, "the pieces of a document must be several"),
        ({"pieces": [["text of a"]]}, "each of the pieces must be a Piece"),
        ({"pieces": [[]]}, "its pieces, joined"),
        ({"pieces": [[Piece("text", 0)]]}, "its pieces, joined"),
        ({"pieces": [[Piece("text of a", 3)]]}, "a piece of 3 tokens"),
        ({"pieces": [[Piece("text of a", -1)]]}, "tokens of a piece must be a whole number"),
        ({"pieces": [[Piece("text of a", True)]]}, "tokens of a piece must be a whole number"),
        ({"pieces": [[Piece("text of a", 0.0)]]}, "tokens of a piece must be a whole number"),  # type: ignore[arg-type]
        ({"pieces": [[Piece("text of a", 0), Piece("", 0)]]}, "a piece is blank"),
        ({"pieces": [[Piece(5, 0)]]}, "a piece is blank, or has no text"),  # type: ignore[arg-type]
        ({"versions": 5}, "versions must be several"),
        ({"versions": []}, "0 versions for 1 documents"),
        ({"versions": [0]}, "'a': its version must be a whole number of at least 1"),
        ({"versions": [-1]}, "its version must be a whole number"),
        ({"versions": [1 << 32]}, "its version must be a whole number"),
        ({"versions": [1.0]}, "its version must be a whole number"),
        ({"versions": [True]}, "its version must be a whole number"),
        ({"versions": ["1"]}, "its version must be a whole number"),
    ],
)
def test_what_verify_would_call_damaged_is_refused(
    bare: MemDB, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(MemDBError, match=problem):
        bare.load([replace(GOOD, **changes)])
    assert bare.stats()["documents"] == bare.stats()["changes"] == 0
    bare.load([GOOD])
    before = bare.stats()
    with pytest.raises(MemDBError, match=problem):  # of one that is there, too
        bare.load([replace(GOOD, **changes)])
    assert bare.stats() == before
    assert memdb.verify(bare.path) == []


@pytest.mark.parametrize("batches", [GOOD, None, 5, "text", [GOOD, None], [[GOOD]], {"a": GOOD}])
def test_what_holds_no_batches_is_refused(bare: MemDB, batches: Any) -> None:
    with pytest.raises(InvalidInputError, match="batches"):
        bare.load(batches)


def test_numbers_of_numpy_are_numbers(bare: MemDB) -> None:
    documents = [Document("text", "a", {"year": np.int64(3), "share": np.float32(0.5)})]
    bare.declare_keys("year")
    given = DocumentBatch(documents, np.int64([[3, 4]]), versions=np.array([7]))  # type: ignore[arg-type]
    assert bare.load([given]).inserted == 1
    assert bare.get("a").version == 7
    assert bare.get("a").metadata == {"year": 3, "share": 0.5}
    assert bare.retrieve(EAST, 1, where={"year": 3}).hits[0].score == pytest.approx(0.6)
    assert bare.load([given]).unchanged == 1
    assert memdb.verify(bare.path) == []
