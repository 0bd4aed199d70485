"""The cache of decoded memories: what is asked for once drives nothing out that is used again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import ExplicitMemory, MemDB, StoredMemory, pack
from memdb.memories.cache import MemoryCache
from memdb.storage.record_layout import integer_key
from tests.engine.helpers import make_memory, make_shape, same_memory

SHAPE = make_shape()
MANY = 40
HELD = 6  # memories that the cache has room for


def memory(seed: int) -> ExplicitMemory:
    """All are of one size."""
    found = make_memory(SHAPE, 3, 9)
    keys = found.keys + np.float32(seed)
    return ExplicitMemory(found.offsets, found.positions, keys, found.values)


@pytest.fixture(params=["exact", "int8"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemDB]:
    room = memory(0).nbytes * HELD
    with MemDB.create(
        tmp_path / "db", shape=SHAPE, dimension=2, codec=request.param, cache_bytes=room
    ) as database:
        for number in range(MANY):
            angle = number / MANY
            database.insert(
                f"text {number}",
                id=f"{number:02}",
                embeddings=np.array([[np.cos(angle), np.sin(angle)]], np.float32),
                memories=[memory(number)],
            )
        yield database


def stored(database: MemDB, *numbers: int) -> list[StoredMemory]:
    found = [one for n in numbers for _, one in database.memories(f"{n:02}")]
    return [one for one in found if one is not None]


def hits(database: MemDB, *numbers: int, packed: bool) -> int:
    """How many of these are in the cache; they are used, one way or the other."""
    before = database.cache_stats().hits
    found = stored(database, *numbers)
    if packed:
        pack(found, SHAPE)
    else:
        _ = [one.memory for one in found]
    return database.cache_stats().hits - before


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_asked_for_once_drives_nothing_out(database: MemDB, packed: bool) -> None:
    often = range(HELD)
    assert hits(database, *often, packed=packed) == 0
    assert hits(database, *often, packed=packed) == HELD
    for number in range(HELD, MANY):
        assert hits(database, number, packed=packed) == 0
        assert database.cache_stats().memories == HELD
    assert hits(database, *often, packed=packed) == HELD


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_asked_for_again_takes_the_place_of_the_oldest(
    database: MemDB, packed: bool
) -> None:
    hits(database, *range(HELD), packed=packed)
    hits(database, *range(1, HELD), packed=packed)  # 0 is the one not used for longest
    hits(database, 20, 21, packed=packed)
    assert hits(database, 20, packed=packed) == 0  # decoded for the second time: now it is kept
    assert hits(database, 20, packed=packed) == 1
    assert hits(database, *range(1, HELD), packed=packed) == HELD - 1
    assert hits(database, 0, packed=packed) == 0
    assert database.cache_stats().memories == HELD


def test_mixed_with_what_is_cached_memories_pack_as_alone(database: MemDB) -> None:
    hits(database, 1, 4, 5, packed=False)
    found = stored(database, 0, 1, 2, 3, 4, 5, 30)
    assert [one.decoded is not None for one in found] == [
        False,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    together = pack(found, SHAPE)
    alone = pack([one.memory for one in stored(database, 0, 1, 2, 3, 4, 5, 30)], SHAPE)
    assert together.layers.keys() == alone.layers.keys()
    for layer, packed in together.layers.items():
        for name in ("keys", "values", "mask", "memory", "positions"):
            one, other = getattr(packed, name), getattr(alone.layers[layer], name)
            np.testing.assert_array_equal(one, other)


@given(
    room=st.integers(0, 5),
    asked=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 3])), max_size=60),
)
def test_it_never_holds_more_than_it_may(room: int, asked: list[tuple[int, int]]) -> None:
    """Whatever is asked for, each kept under its own key, of one size or of three."""
    sizes = {1: memory(0), 3: make_memory(SHAPE, 4, 30)}
    cache = MemoryCache(room * sizes[1].nbytes)
    uses = 0
    for number, size in asked:
        key = number, integer_key(size)
        found = cache.get(key)
        uses += bool(cache.capacity)
        if found is not None:
            assert same_memory(found, sizes[size])
        elif cache.wants(key, sizes[size].nbytes):
            cache.put(key, sizes[size])
            assert cache.get(key) is sizes[size]
            uses += 1
        stats = cache.stats()
        assert stats.bytes <= cache.capacity
        assert stats.hits + stats.misses == uses
        assert (stats.bytes > 0) == (stats.memories > 0)


def test_a_small_cache_takes_what_returns_after_many_others() -> None:
    one = memory(0)
    cache = MemoryCache(one.nbytes)
    keys = [(number, b"") for number in range(90)]
    for key in keys:
        if cache.wants(key, one.nbytes):
            cache.put(key, one)
    assert cache.stats().memories == 1
    assert cache.wants(keys[1], one.nbytes)
    assert not cache.wants((1000, b""), one.nbytes)
