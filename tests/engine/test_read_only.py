"""Arrays that are handed out: who writes into one changes nothing for the next who asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memdb import Document, DocumentBatch, ExplicitMemory, MemDB, MemoryShape, Retrieval, pack
from memdb.codecs import FAMILIES, Layout
from memdb.codecs.rotated import rotation
from memdb.exchange import read_export
from memdb.types.memory_batch import MemoryBatch
from tests.engine.fitted import NAMES, make_like, roped_shape
from tests.engine.helpers import TokenWriter, WordEmbedder, make_memory, same_memory

SHAPE = roped_shape()
EAST = np.array([1, 0], np.float32)
MANY = 24
ARRAYS = ("offsets", "positions", "keys", "values")


def refuses(array: NDArray[np.generic]) -> None:
    assert array.size
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    with pytest.raises(ValueError, match="read-only"):
        array.view("u1")[..., 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        array.sort()


def all_refuse(memory: ExplicitMemory | None) -> None:
    assert memory is not None
    for name in ARRAYS:
        refuses(getattr(memory, name))


@pytest.fixture(params=["kept", "not kept"])
def cache_bytes(request: pytest.FixtureRequest) -> int:
    return {"kept": 1 << 20, "not kept": 0}[request.param]


@pytest.fixture(params=NAMES)
def database(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    cache_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MemDB]:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", MANY)
    with MemDB.create(
        tmp_path / "db", shape=SHAPE, dimension=2, codec=request.param, cache_bytes=cache_bytes
    ) as made:
        documents = [Document(f"text {n}", f"{n}") for n in range(MANY)]
        vectors = np.stack([[1, n / 100] for n in range(MANY)]).astype(np.float32)
        made.load(
            [DocumentBatch(documents, vectors, [make_like(SHAPE, n, 60) for n in range(MANY)])]
        )
        yield made


def test_memories_that_are_handed_out_refuse_a_write(database: MemDB) -> None:
    def everywhere() -> Iterator[ExplicitMemory | None]:
        found = database.retrieve(EAST, 3)
        yield from (hit.memory for hit in found.hits)
        yield from found.memories
        yield from (stored.decoded for stored in found.stored)
        yield from (stored.memory for _, stored in database.memories("1") if stored is not None)
        packed = database.retrieve(EAST, 5)
        pack(packed.stored, SHAPE)  # decodes, and keeps, those that are not decoded
        yield from packed.memories
        yield from database.retrieve(EAST, 5).memories
        with database.snapshot() as snapshot:
            yield from snapshot.retrieve(EAST, 2).memories
            yield from (s.memory for _, s in snapshot.memories("2") if s is not None)

    before = [memory.keys.copy() for memory in database.retrieve(EAST, 5).memories]
    for memory in everywhere():
        all_refuse(memory)
    after = [memory.keys for memory in database.retrieve(EAST, 5).memories]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_packed_arrays_are_the_callers_own(database: MemDB) -> None:
    def packed(found: Retrieval) -> list[NDArray[np.generic]]:
        layers = pack(found.stored, SHAPE).layers.values()
        return [
            array
            for layer in layers
            for array in (layer.keys, layer.values, layer.mask, layer.memory, layer.positions)
        ]

    first = packed(database.retrieve(EAST, 4))
    before = [array.copy() for array in first]
    for array in first:
        array[...] = 0
    for found in (database.retrieve(EAST, 4), database.retrieve(EAST, 4)):
        for one, other in zip(before, packed(found), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_cold_start_hands_out_what_refuses_a_write(tmp_path: Path) -> None:
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as database:
        database.insert("one two three four five", id="a", cold=True)
        retrieval = database.retrieve("one two")
        assert retrieval.written == len(retrieval.hits) > 0
        for hit in retrieval.hits:
            all_refuse(hit.memory)


def test_what_is_given_stays_the_callers_own(tmp_path: Path) -> None:
    memory, vectors = make_like(SHAPE, 1, 60), np.array([[1, 0]], np.float32)
    with MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2, codec="exact") as database:
        database.insert("text", id="a", embeddings=vectors, memories=[memory])
        was = make_like(SHAPE, 1, 60)
        for array in (memory.keys, memory.values, vectors):
            array[...] = 7
        ((_, stored),) = database.memories("a")
        assert stored is not None
        assert same_memory(stored.memory, was)


def test_a_batch_hands_out_memories_that_refuse_a_write_and_stays_its_makers() -> None:
    batch = MemoryBatch.of([make_memory(SHAPE, n) for n in range(1, 4)], SHAPE)
    for number in range(3):
        memory = batch.memory(number)
        assert memory is not None
        for array in (memory.positions, memory.keys, memory.values):
            refuses(array)
    refuses(batch.sizes)
    refuses(batch.ends)
    batch.keys[...] = 0


def test_an_exports_parts_share_nothing(tmp_path: Path) -> None:
    with MemDB.create(tmp_path / "db", shape=SHAPE, dimension=2, codec="exact") as database:
        for n in range(3):
            database.insert(
                f"text {n}",
                embeddings=np.array([[1, n]], np.float32),
                memories=[make_memory(SHAPE, n)],
            )
        database.export(tmp_path / "files", arrays=True)

    def read() -> list[NDArray[np.generic]]:
        _, parts = read_export(tmp_path / "files")
        found = []
        for part in parts:
            assert isinstance(part.memories, MemoryBatch)
            found += [part.embeddings, part.memories.keys, part.memories.values]
        return found

    first = read()
    before = [array.copy() for array in first]
    for array in first:
        array[...] = 9
    for one, other in zip(before, read(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_codecs_share_refuses_a_write() -> None:
    refuses(rotation(8))
    layout = Layout.dense(np.array([[1, 2], [0, 3]]), np.arange(6, dtype=np.uint8))
    for array in (layout.sizes, layout.row_sizes, layout.places, layout.order):
        refuses(array)


def test_stats_may_be_changed_by_who_asked(tmp_path: Path) -> None:
    shape = MemoryShape("m", (0,), 1, 4, "float32", (1,))
    with MemDB.create(tmp_path / "db", shape=shape, dimension=2) as database:
        stats = database.stats()
        stats["embedder"]["dimension"] = 99
        stats["model"]["name"] = "another"
        assert database.stats()["embedder"]["dimension"] == 2
        database.insert("text", embeddings=np.array([[1, 0]], np.float32))
