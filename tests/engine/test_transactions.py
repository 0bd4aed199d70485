"""Several writes that happen together, or not at all."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import (
    ConflictError,
    DocumentExistsError,
    InvalidInputError,
    MemDB,
    StorageError,
    UnknownDocumentError,
    verify,
)
from tests.engine.helpers import (
    TokenWriter,
    WordEmbedder,
    child,
    make_memory,
    make_shape,
    time_limit,
    unit,
)

SHAPE = make_shape()
EAST, NORTH, WEST = unit(1, 0), unit(0, 1), unit(-1, 0)


@pytest.fixture
def bare(tmp_path: Path, bare_template: Path) -> Iterator[MemDB]:
    """A database without parts: every text is one reference, embeddings have 2 numbers."""
    with MemDB.open(shutil.copytree(bare_template, tmp_path / "bare")) as database:
        yield database


@pytest.fixture
def full(tmp_path: Path, full_template: Path) -> Iterator[MemDB]:
    """A database with an embedder, a writer and their tokenizer; 16 tokens a reference."""
    path = shutil.copytree(full_template, tmp_path / "full")
    with MemDB.open(path, embedder=WordEmbedder(), writer=TokenWriter()) as database:
        yield database


def content(database: MemDB) -> dict[str, tuple[str, dict[str, Any], int]]:
    """All documents by id: text, metadata, version."""
    return {one.id: (one.text, one.metadata, one.version) for one in database.documents()}


def test_writes_of_a_block_happen_together(full: MemDB) -> None:
    full.insert("The old harbour.", id="old", metadata={"n": 1})
    full.insert("A lighthouse.", id="gone")
    before = full.stats()["changes"]
    with full.transaction() as t:
        new = t.insert("A whale in the harbour.", id="new", metadata={"n": 2})
        t.update("old", metadata={"n": 3})
        t.delete("gone")
        t.upsert("A storm.", id="storm")
        seen = content(full)  # nothing of it is there before the end
        assert seen.keys() == {"old", "gone"}
        assert seen["old"][1] == {"n": 1}
    assert content(full) == {
        "new": ("A whale in the harbour.", {"n": 2}, 1),
        "old": ("The old harbour.", {"n": 3}, 2),
        "storm": ("A storm.", {}, 1),
    }
    assert full.stats()["changes"] == before + 1  # one write
    assert (new.id, new.version, new.references, new.warm) == ("new", 1, (), 1)
    assert full.get("new").warm == 1
    assert full.query("whale", 1)[0].document_id == "new"
    assert verify(full.path) == []


def test_a_block_sees_what_it_wrote(full: MemDB) -> None:
    full.insert("The old harbour.", id="a", metadata={"n": 1})
    with full.transaction() as t:
        assert "b" not in t
        t.insert("A whale.", id="b", metadata={"n": 1})
        assert "b" in t
        assert t.get("b").text == "A whale."
        assert t.update("b", text="Two whales.").version == 2
        assert t.update("b", metadata={"n": 2}).version == 3
        assert (t.get("b").text, t.get("b").metadata) == ("Two whales.", {"n": 2})
        with pytest.raises(DocumentExistsError, match="'b'"):
            t.insert("Another.", id="b")
        assert t.delete(where={"n": 1}) == 1  # of what was there, a; of its own, none
        assert "a" not in t
        with pytest.raises(UnknownDocumentError, match="'a'"):
            t.get("a")
        with pytest.raises(UnknownDocumentError, match="'a'"):
            t.delete("a")
        t.insert("The new harbour.", id="a")
        t.delete("b")
        t.insert("Three whales.", id="b", metadata={"n": 4})
        assert t.delete(where={"n": 4}) == 1
    assert content(full) == {"a": ("The new harbour.", {}, 1)}
    assert verify(full.path) == []


def test_a_block_reads_one_moment(full: MemDB) -> None:
    full.insert("The old harbour.", id="a")
    full.insert("A whale.", id="b")

    def block(other: MemDB) -> None:
        with full.transaction() as t:
            other.delete("b")
            assert t.get("b").text == "A whale."
            t.delete("a")

    with MemDB.open(full.path) as other, pytest.raises(ConflictError):
        block(other)
    assert "a" in full


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_middle_writes_nothing(full: MemDB, error: type[BaseException]) -> None:
    full.insert("The old harbour.", id="a", metadata={"n": 1})
    before = content(full), full.stats()["changes"]

    def block() -> None:
        with full.transaction() as t:
            t.insert("A whale.", id="b")
            t.update("a", text="The new harbour.")
            t.delete("a")
            raise error

    with pytest.raises(error):
        block()
    assert (content(full), full.stats()["changes"]) == before
    full.insert("A whale.", id="b")  # and the database goes on


def test_a_call_that_fails_leaves_nothing_and_the_block_goes_on(full: MemDB) -> None:
    full.insert("The old harbour.", id="a")
    with full.transaction() as t:
        with pytest.raises(InvalidInputError, match="'text' is empty"):
            t.insert_many(["A whale.", " "])
        with pytest.raises(DocumentExistsError):
            t.insert_many([{"id": "c", "text": "A storm."}, {"id": "a", "text": "A storm."}])
        with pytest.raises(ConflictError, match="at version 1, not 7"):
            t.update("a", metadata={"n": 1}, if_version=7)
        with pytest.raises(UnknownDocumentError, match="nothing was deleted"):
            t.delete("a", "b")
        t.insert("A light.", id="d")
    assert content(full).keys() == {"a", "d"}
    assert full.get("a").version == 1


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda db: db.update("a", metadata={"n": 2}),
        lambda db: db.update("a", text="The town."),
        lambda db: db.delete("a"),
        lambda db: (db.delete("a"), db.insert("The old harbour.", id="a", metadata={"n": 1})),
        lambda db: db.insert("A whale.", id="b"),
    ],
    ids=["metadata", "text", "deleted", "deleted and inserted", "inserted"],
)
def test_what_another_changed_meanwhile_is_a_conflict(full: MemDB, meanwhile: Any) -> None:
    full.insert("The old harbour.", id="a", metadata={"n": 1})

    def block(other: MemDB) -> None:
        with full.transaction() as t:
            assert "b" not in t
            t.insert(t.get("a").text, id="c")
            meanwhile(other)

    with (
        MemDB.open(full.path, embedder=WordEmbedder()) as other,
        pytest.raises(ConflictError, match=r"changed document '[ab]'.*Run it again"),
    ):
        block(other)
    assert "c" not in full


def test_what_another_changed_elsewhere_is_no_conflict(full: MemDB) -> None:
    full.insert("The old harbour.", id="a")
    full.insert("A whale.", id="b")
    with MemDB.open(full.path) as other, full.transaction() as t:
        t.update("a", metadata={"n": 1})
        other.delete("b")
    assert content(full) == {"a": ("The old harbour.", {"n": 1}, 2)}


WRITES = {
    "insert": lambda db: db.insert("A whale.", id="b"),
    "insert_many": lambda db: db.insert_many(["A whale."]),
    "upsert": lambda db: db.upsert("A whale.", id="b"),
    "upsert_many": lambda db: db.upsert_many(["A whale."]),
    "update": lambda db: db.update("a", metadata={"n": 2}),
    "delete": lambda db: db.delete("a"),
    "load": lambda db: db.load([]),
    "ingest": lambda db: db.ingest("corpus.jsonl"),
    "transaction": lambda db: db.transaction(),
}


@pytest.mark.parametrize("verb", WRITES)
def test_a_write_beside_the_block_is_an_error_and_no_deadlock(full: MemDB, verb: str) -> None:
    full.insert("The old harbour.", id="a")
    with time_limit(), full.transaction() as t:
        with pytest.raises(StorageError, match=r"`t\.insert`"):
            WRITES[verb](full)
        t.insert("A storm.", id="c")
    assert content(full).keys() == {"a", "c"}
    full.insert("A whale.", id="b")  # after the block, as ever


def test_a_task_within_the_block_is_told_and_others_are_not(full: MemDB) -> None:
    async def within() -> None:
        with pytest.raises(StorageError, match="transaction is open here"):
            await asyncio.to_thread(full.insert, "A whale.", id="b")

    async def beside(begun: asyncio.Event, done: asyncio.Event) -> None:
        await begun.wait()
        full.insert("A storm.", id="c")
        done.set()

    async def main() -> None:
        begun, done = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(beside(begun, done))
        with full.transaction() as t:
            begun.set()
            await done.wait()
            await within()
            t.insert("A light.", id="d")
        await other

    with time_limit():
        asyncio.run(main())
    assert content(full).keys() == {"c", "d"}


def test_no_model_works_while_others_are_kept_from_writing(full: MemDB) -> None:
    """Embedder and writer are called in the block, and another thread writes meanwhile."""

    class Watched(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> NDArray[np.float32]:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(other.upsert, "A storm.", id="storm").result(10)
            return super().embed(texts, query=query)

    with (
        time_limit(60),
        MemDB.open(full.path, embedder=WordEmbedder()) as other,
        MemDB.open(full.path, embedder=Watched()) as database,
        database.transaction() as t,
    ):
        t.insert("A whale.", id="a")
        t.insert("A light.", id="b")
    assert content(full).keys() == {"a", "b", "storm"}


def test_a_transaction_is_for_one_block(full: MemDB) -> None:
    t = full.transaction()
    with pytest.raises(StorageError, match=r"with db\.transaction\(\) as t"):
        t.insert("A whale.")
    with t:
        t.insert("A whale.", id="a")
    for call in (lambda: t.get("a"), lambda: t.insert("A storm."), lambda: "a" in t):
        with pytest.raises(StorageError, match="is over"):
            call()
    with pytest.raises(StorageError, match="one `with` block"), t:
        pass
    assert content(full).keys() == {"a"}


def test_a_database_that_is_closed_in_the_block_takes_nothing(
    tmp_path: Path, full_template: Path
) -> None:
    path = shutil.copytree(full_template, tmp_path / "db")
    database = MemDB.open(path, embedder=WordEmbedder())

    def block() -> None:
        with database.transaction() as t:
            t.insert("A whale.")
            database.close()

    with pytest.raises(StorageError, match="closed"):
        block()
    with MemDB.open(path) as again:
        assert len(again) == 0
    with pytest.raises(StorageError, match="closed"):
        database.transaction()


def test_an_empty_block_writes_nothing(full: MemDB) -> None:
    full.insert("A whale.", id="a")
    before = full.stats()["changes"]
    with full.transaction() as t:
        assert t.get("a").version == 1
        t.upsert("A whale.", id="a")
        t.delete(where={"n": 1})
    assert full.stats()["changes"] == before


def test_threads_that_run_again_on_a_conflict_lose_nothing(bare: MemDB) -> None:
    bare.insert("left", id="left", metadata={"n": 100}, embeddings=EAST)
    bare.insert("right", id="right", metadata={"n": 0}, embeddings=NORTH)
    start = threading.Barrier(4)

    def moves(name: int) -> int:
        start.wait()
        conflicts = 0
        for step in range(10):
            while True:
                try:
                    with bare.transaction() as t:
                        left, right = t.get("left").metadata["n"], t.get("right").metadata["n"]
                        t.update("left", metadata={"n": left - 1})
                        t.insert("move", id=f"{name}-{step}", embeddings=WEST)
                        t.update("right", metadata={"n": right + 1})
                    break
                except ConflictError:
                    conflicts += 1
        return conflicts

    with ThreadPoolExecutor(4) as threads:
        conflicts = sum(threads.map(moves, range(4)))
    assert conflicts > 0
    assert (bare.get("left").metadata["n"], bare.get("right").metadata["n"]) == (60, 40)
    assert len(bare) == 42


_MOVES = """
import sys
from memdb import ConflictError, MemDB
from tests.engine.helpers import unit

with MemDB.open(sys.argv[1]) as db:
    for step in range(15):
        while True:
            try:
                with db.transaction() as t:
                    n = t.get("shared").metadata["n"]
                    t.update("shared", metadata={"n": n + 1})
                    t.insert(f"step {n}", id=f"step-{n}", embeddings=unit(1, 0))
                break
            except ConflictError:
                pass
"""


def test_processes_that_run_again_on_a_conflict_lose_nothing(
    tmp_path: Path, bare_template: Path
) -> None:
    path = shutil.copytree(bare_template, tmp_path / "db")
    with MemDB.open(path) as database:
        database.insert("shared", id="shared", metadata={"n": 0}, embeddings=EAST)
    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(lambda _: child(_MOVES, path), range(2)):
            assert done.returncode == 0, done.stderr
    with MemDB.open(path) as database:
        assert database.get("shared").metadata == {"n": 30}
        assert len(database) == 31
    assert verify(path) == []


def test_many_documents_in_one_block_with_given_arrays(bare: MemDB) -> None:
    memories = [make_memory(SHAPE, n) for n in range(3)]
    with bare.transaction() as t:
        for n in range(300):
            t.insert(f"text {n}", id=f"{n:03}", metadata={"n": n}, embeddings=unit(n - 150, 1))
        t.insert_many(
            [f"more {n}" for n in range(3)],
            embeddings=np.concatenate([EAST, NORTH, WEST]),
            memories=memories,
        )
        t.update("007", text="seven", embeddings=NORTH)
    assert len(bare) == 303
    assert bare.get("007").version == 2
    assert bare.count({"n": {"$lt": 100}}) == 100
    assert bare.stats()["memories"] == 3
    assert verify(bare.path) == []
