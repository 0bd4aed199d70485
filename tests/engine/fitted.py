"""Codecs by name, those of the families fitted to small made-up memories."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from memdb import CODECS, Codec, DType, ExplicitMemory, MemoryShape, Rope, from_float32, to_float32
from memdb.codecs import FAMILIES, Family, FittedCodec, Layout
from memdb.codecs.rope import Turns, frequencies
from memdb.types.memory_batch import MemoryBatch
from tests.engine.helpers import make_memory, make_shape

DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
DIMS = (*range(1, 10), 64, 80)
NAMES = (*CODECS, *FAMILIES)
LARGEST = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
#: One layer with RoPE, one without, one with a kind that nobody knows.
ROPE = (Rope(10000.0), None, Rope(10000.0, "spiral"))


def roped_shape(dtype: DType = "float32", head_dim: int = 8, **changes: Any) -> MemoryShape:
    return make_shape(dtype, head_dim=head_dim, **{"rope": ROPE, **changes})


def make_like(shape: MemoryShape, seed: int, most: int = 8) -> ExplicitMemory:
    """A memory whose vectors are alike: a mean, and a few directions; before RoPE, if they are
    keys."""
    memory = make_memory(shape, seed, most)
    d = shape.head_dim
    spread = np.random.default_rng(7).standard_normal((d, d)) * np.geomspace(3, 0.05, d) / d**0.5
    mean = np.linspace(-2, 3, d)
    keys, values = (
        (to_float32(x, shape.dtype) @ spread + mean).astype(np.float32)
        for x in (memory.keys, memory.values)
    )
    layers = [frequencies(rope, d) for rope in shape.rope]
    Turns(layers, shape)(keys, np.diff(memory.offsets).astype(np.int64), memory.positions)
    stored = (from_float32(x, shape.dtype) for x in (keys, values))
    return ExplicitMemory(memory.offsets, memory.positions, *stored)


def fit(family: Family, memories: list[ExplicitMemory], shape: MemoryShape) -> FittedCodec:
    batch = MemoryBatch.of(memories, shape)
    keys, values = (to_float32(x, shape.dtype) for x in (batch.keys, batch.values))
    return family.fit(keys, values, Layout.dense(batch.counts, batch.positions), shape)


@cache
def fitted(family: str, head_dim: int = 8) -> FittedCodec:
    shape = roped_shape(head_dim=head_dim)
    return fit(FAMILIES[family], [make_like(shape, seed, 60) for seed in range(10)], shape)


def codec_for(name: str, shape: MemoryShape) -> Codec:
    """The codec of that name, or one of that family for these memories (of `roped_shape`)."""
    return CODECS[name] if name in CODECS else fitted(name, shape.head_dim)


def with_stand_in(codec: Codec) -> dict[str, Codec]:
    return {**CODECS, codec.name: codec}


def counts_of(memory: ExplicitMemory) -> NDArray[np.int64]:
    return np.diff(memory.offsets).astype(np.int64)


def numbers(dtype: DType) -> Any:
    """Any finite number of a dtype, as it is stored."""
    if dtype == "bfloat16":
        return st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
    return st.floats(width=32 if dtype == "float32" else 16, allow_nan=False, allow_infinity=False)


@st.composite
def memories(draw: Any) -> tuple[MemoryShape, ExplicitMemory]:
    """A ragged memory of a few numbers, of any size, that repeat."""
    dtype = draw(st.sampled_from(DTYPES))
    length = draw(st.sampled_from([5, 128, 256, 257, 1000]))
    shape = roped_shape(dtype, draw(st.sampled_from(DIMS)), reference_length=length)
    row = st.lists(st.integers(0, length - 1), max_size=4, unique=True).map(sorted)
    rows = [draw(row) for _ in range(shape.rows)]
    some = np.array(draw(st.lists(numbers(dtype), min_size=1, max_size=6)), shape.storage_dtype)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    keys, values = (rng.choice(some, (sum(map(len, rows)), shape.head_dim)) for _ in range(2))
    positions = np.array([place for row in rows for place in row], shape.position_dtype)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return shape, ExplicitMemory(offsets, positions, keys, values)


def assert_within_half_a_scale(
    x: NDArray[Any], y: NDArray[Any], dtype: DType, codec: str = "int8"
) -> None:
    """The promise of int8 and int4: half a scale, and the rounding of the result to its dtype."""
    before, after = (to_float32(v, dtype).astype(np.float64) for v in (x, y))
    rounding = np.maximum(np.abs(after) * 2.0 ** -_BITS[dtype], SMALLEST[dtype] / 2)
    most = np.abs(before).max(axis=1, initial=0, keepdims=True)
    if codec == "int4":
        # The next bfloat16 that is not less: up to 2**-7 more, and 2**-133 more at least.
        half = most / 7 * 0.5 * (1 + 2.0**-7) + 2.0**-134
    else:
        # The scale is itself a float32, and so is its product with a level: a few parts in a
        # million; among float32's subnormal numbers up to half a step, 127 times.
        scale = most / 127
        half = scale * (0.5 + 2.0**-16) + np.where(scale < 2.0**-126, 64 * 2.0**-149, 0)
    assert (np.abs(after - before) <= half + rounding).all(), (before, after)


def assert_close(x: NDArray[Any], y: NDArray[Any], dtype: DType) -> None:
    """The same but for float32's rounding: 1e-5 of the longest vector, and a step of the dtype."""
    one, other = (to_float32(v, dtype).astype(np.float64) for v in (x, y))
    longest = np.linalg.norm(other, axis=-1).max(initial=0)
    step = 0 if dtype == "float32" else np.abs(other) * 2.0 ** (1 - _BITS[dtype])
    assert (np.abs(one - other) <= 1e-5 * longest + step + SMALLEST[dtype]).all(), (one, other)


def is_finite(vectors: NDArray[Any], dtype: DType) -> bool:
    return bool(np.isfinite(to_float32(vectors, dtype)).all())
