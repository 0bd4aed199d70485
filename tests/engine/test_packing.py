from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import DType, ExplicitMemory, InvalidInputError, MemDB, MemoryShape, pack
from tests.engine.helpers import make_memory, make_shape


def pack_slowly(memories: Sequence[ExplicitMemory], shape: MemoryShape) -> dict[int, Any]:
    """Row by row, pair by pair: layer -> [(keys, values, memory, position) of each head]."""
    layers = {}
    for i, layer in enumerate(shape.layers):
        heads = []
        for head in range(shape.kv_heads):
            row = i * shape.kv_heads + head
            pairs = [
                (memory.keys[pair], memory.values[pair], number, memory.positions[pair])
                for number, memory in enumerate(memories)
                for pair in range(memory.offsets[row], memory.offsets[row + 1])
            ]
            heads.append(pairs)
        if any(heads):
            layers[layer] = heads
    return layers


@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    layers=st.sets(st.integers(0, 40), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    seeds=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4)), max_size=4),
)
def test_packing_is_laying_rows_side_by_side(
    dtype: DType, layers: set[int], kv_heads: int, seeds: list[tuple[int, int]]
) -> None:
    shape = make_shape(dtype, layers=tuple(sorted(layers)), kv_heads=kv_heads)
    memories = [make_memory(shape, seed, most) for seed, most in seeds]
    packed = pack(memories, shape)
    expected = pack_slowly(memories, shape)
    assert list(packed.layers) == list(expected)
    for layer, heads in expected.items():
        given_layer = packed.layers[layer]
        width = max(map(len, heads))
        assert given_layer.keys.shape == (kv_heads, width, shape.head_dim)
        assert given_layer.values.shape == given_layer.keys.shape
        assert given_layer.keys.dtype == given_layer.values.dtype == shape.storage_dtype
        assert given_layer.visible.dtype == np.bool_
        assert given_layer.memory.dtype == given_layer.positions.dtype == np.int16
        assert given_layer.memory.shape == given_layer.positions.shape == (kv_heads, width)
        for head, pairs in enumerate(heads):
            n = len(pairs)
            assert given_layer.visible[head].tolist() == [True] * n + [False] * (width - n)
            assert given_layer.mask[head].tolist() == [0.0] * n + [-np.inf] * (width - n)
            numbers = [number for _, _, number, _ in pairs]
            assert given_layer.memory[head].tolist() == numbers + [-1] * (width - n)
            positions = [int(position) for *_, position in pairs]
            assert given_layer.positions[head].tolist() == positions + [0] * (width - n)
            for place, (key, value, *_) in enumerate(pairs):
                assert given_layer.keys[head, place].tobytes() == key.tobytes()
                assert given_layer.values[head, place].tobytes() == value.tobytes()
            assert not given_layer.keys[head, n:].any()
            assert not given_layer.values[head, n:].any()


def test_memories_keep_their_order() -> None:
    shape = make_shape()
    one, two = make_memory(shape, 1, 4), make_memory(shape, 2, 4)
    row = next(r for r in range(shape.rows) if np.diff(one.offsets)[r] and np.diff(two.offsets)[r])
    layer, head = shape.layers[row // shape.kv_heads], row % shape.kv_heads
    first = pack([one, two], shape).layers[layer].keys[head, 0]
    np.testing.assert_array_equal(first, one.keys[one.offsets[row]])
    first = pack([two, one], shape).layers[layer].keys[head, 0]
    np.testing.assert_array_equal(first, two.keys[two.offsets[row]])


@pytest.mark.parametrize(("length", "dtype"), [(2**15, np.int16), (2**15 + 1, np.int32)])
def test_positions_of_long_references_fit(length: int, dtype: type) -> None:
    shape = make_shape(layers=(0,), kv_heads=1, reference_length=length)
    one = make_memory(shape, 1, 0)
    row = np.ones((1, shape.head_dim), np.float32)
    last = np.array([length - 1], shape.position_dtype)
    memory = ExplicitMemory(np.array([0, 1], np.int32), last, row, row)
    layer = pack([one, memory], shape).layers[0]
    assert layer.positions.dtype == dtype
    assert (layer.memory.tolist(), layer.positions.tolist()) == ([[1]], [[length - 1]])


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_stored_and_decoded_memories_are_told_apart(tmp_path: Path, codec: str) -> None:
    shape = make_shape()
    memories = [make_memory(shape, seed) for seed in range(4)]
    path = tmp_path / "db"
    with MemDB.create(path, shape=shape, dimension=2, codec=codec) as database:
        for n, memory in enumerate(memories):
            vector = np.array([[1, n]], np.float32)
            database.insert("text", id=str(n), embeddings=vector, memories=[memory])
    with MemDB.open(path, cache_bytes=0) as database:
        stored = database.retrieve(np.array([1.0, 0.0]), 4).stored
    mixed = [stored[0], memories[1], stored[2], stored[3]]
    expected = pack(memories, shape).layers
    for layer, packed in pack(mixed, shape).layers.items():
        np.testing.assert_array_equal(packed.memory, expected[layer].memory)
        np.testing.assert_array_equal(packed.positions, expected[layer].positions)
        np.testing.assert_array_equal(packed.visible, expected[layer].visible)


@pytest.mark.parametrize("memories", [0, 3])
def test_nothing_packs_into_nothing(memories: int) -> None:
    shape = make_shape()
    assert pack([make_memory(shape, 1, 0)] * memories, shape).layers == {}


# --- how much each counts -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_the_mask_has_the_bias_of_each_pair_s_memory(kind: Any) -> None:
    shape = make_shape()
    memories = [make_memory(shape, seed, 4) for seed in range(3)]
    biases = [0.5, -1.25, 3.0]
    packed = pack(memories, shape, kind(biases))
    plain = pack(memories, shape)
    assert list(packed.layers) == list(plain.layers)
    for layer, given_layer in packed.layers.items():
        expected = [[biases[n] if n >= 0 else -np.inf for n in row] for row in given_layer.memory]
        assert given_layer.mask.tolist() == expected
        assert given_layer.mask.dtype == np.float32
        np.testing.assert_array_equal(given_layer.visible, given_layer.memory >= 0)
        for name in ("keys", "values", "memory", "positions"):
            left, right = getattr(given_layer, name), getattr(plain.layers[layer], name)
            np.testing.assert_array_equal(left, right)
    assert pack([], shape, kind([])).layers == {}


@pytest.mark.parametrize(
    "biases",
    [
        [1.0],
        [1.0, 2.0, 3.0],
        [[1.0, 2.0]],
        [[1.0], [2.0]],
        [],
        [0.0, float("nan")],
        [0.0, float("inf")],
        [0.0, 1e39],  # no float32
        [0.0, 10**400],
        [0.0, "1"],
        ["0", "1"],
        [0.0, None],
        [True, False],
        [0.0, [1.0]],
        [0.0, 1j],
        1.0,
        "ab",
        {0: 1.0, 1: 2.0},
    ],
)
def test_what_is_no_bias_for_each_memory_is_refused(biases: Any) -> None:
    shape = make_shape()
    memories = [make_memory(shape, seed, 4) for seed in range(2)]
    with pytest.raises(InvalidInputError, match="each of the 2 memories needs a finite number as"):
        pack(memories, shape, biases)
