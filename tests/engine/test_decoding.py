"""What is decoded: as by a reference that has nothing but loops, in any layout, in any thread, and
nobody else's to write into."""

from __future__ import annotations

import mmap
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memdb import DType, ExplicitMemory, MemoryShape, from_float32, to_float32
from memdb.codecs import Layout, Part, decode_into, decode_memory, encode_memory
from memdb.codecs import read_payload as read
from memdb.codecs.parameters import read_parameters
from memdb.codecs.transform import Transform
from tests.engine.fitted import (
    DTYPES,
    NAMES,
    assert_close,
    codec_for,
    fitted,
    make_like,
    roped_shape,
    with_stand_in,
)

PARTS: tuple[Part, Part] = ("keys", "values")
LARGEST = {1: 127, 2: 7, 3: 2, 5: 1}
#: (memories, rows) of `roped_shape`.
COUNTS = {
    "nothing": [[0] * 6],
    "no memory with anything": [[0] * 6, [0] * 6],
    "one pair": [[0, 0, 0, 0, 1, 0]],
    "one memory": [[3, 1, 0, 5, 0, 2]],
    "some without any": [[0] * 6, [0, 0, 1, 0, 0, 0], [0] * 6, [9, 0, 7, 0, 0, 2]],
    "many": [[5, 0, 3, 2, 1, 40]] * 11,
    "rows longer than a block": [[1203, 1, 0, 0, 998, 2], [1500, 0, 0, 0, 3, 0]],
}


def memory_of(counts: list[int], shape: MemoryShape, seed: int) -> ExplicitMemory:
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(shape.reference_length, n, replace=False)) for n in counts]
    size = sum(counts), shape.head_dim
    return ExplicitMemory(
        np.cumsum([0, *counts]).astype(np.int32),
        np.concatenate(rows).astype(shape.position_dtype),
        *(from_float32(3 * rng.standard_normal(size, np.float32), shape.dtype) for _ in PARTS),
    )


def slowly(
    codec: Transform, part: Part, section: bytes, memory: ExplicitMemory, shape: MemoryShape
) -> NDArray[Any]:
    """The vectors of one memory, number by number, given the codec's parameters as they are."""
    values, arrays = read_parameters(codec.parameters)
    means, scales, basis = (arrays[f"{part}.{name}"] for name in ("means", "scales", "basis"))
    angles, streams = arrays.get(f"{part}.angles"), values[part]["streams"]
    found = np.zeros((memory.pairs, shape.head_dim))
    if not memory.pairs:
        assert section == b""
        return from_float32(found.astype(np.float32), shape.dtype)
    levels = np.zeros((memory.pairs, basis.shape[1]))
    at = 4 * len(streams)
    lengths = struct.unpack_from(f"<{len(streams)}I", section)
    for (first, count, packed), length in zip(streams, lengths, strict=True):
        data = zlib.decompress(section[at : at + length], -15)
        at += length
        for place, code in enumerate(data):
            byte, vector = divmod(place, memory.pairs)
            for number in range(byte * packed, min((byte + 1) * packed, count)):
                code, digit = divmod(code, 2 * LARGEST[packed] + 1)
                levels[vector, first + number] = digit - LARGEST[packed]
    for row in range(shape.rows):
        for pair in range(memory.offsets[row], memory.offsets[row + 1]):
            unit = float(scales[row] * np.float32(values[part]["step"]))
            x = means[row] + unit * (levels[pair] @ basis[row].astype(np.float64))
            own = None if angles is None else angles[row // shape.kv_heads]
            if own is not None and not np.isnan(own).any():
                turn = np.exp(1j * (len(shape.prefix) + int(memory.positions[pair])) * own)
                turned = (x[: len(own)] + 1j * x[len(own) : 2 * len(own)]) * turn
                x[: 2 * len(own)] = np.concatenate([turned.real, turned.imag])
            found[pair] = x
    return from_float32(found.astype(np.float32), shape.dtype)


@pytest.mark.parametrize(("name", "head_dim"), [("klt5", 8), ("klt8", 5), ("klt11", 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_transforms_decode_as_by_loops(
    name: str, dtype: DType, counts: list[list[int]], head_dim: int
) -> None:
    shape = roped_shape(dtype, head_dim, reference_length=1500)
    codec = fitted(name, head_dim)
    assert isinstance(codec, Transform)
    several = [memory_of(one, shape, seed) for seed, one in enumerate(counts)]
    by_row = np.array(counts)
    layout = Layout.dense(by_row, np.concatenate([memory.positions for memory in several]))
    for part in PARTS:
        vectors = np.concatenate([getattr(memory, part) for memory in several])
        sections, _ = codec.sections(part, vectors, layout, shape)
        out = np.empty_like(vectors)
        codec.decode(part, [memoryview(section) for section in sections], layout, shape, out)
        slow = [
            slowly(codec, part, section, memory, shape)
            for section, memory in zip(sections, several, strict=True)
        ]
        assert_close(out[layout.places], np.concatenate(slow), dtype)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(data=st.data())
def test_each_memory_may_have_its_own_places_in_a_row(name: str, data: Any) -> None:
    shape = roped_shape(data.draw(st.sampled_from(DTYPES)))
    codec = codec_for(name, shape)
    seeds = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    several = [make_like(shape, seed, seed % 7) for seed in seeds]
    coded = [read(encode_memory(memory, shape, codec), shape) for memory in several]
    counts = np.stack([np.diff(memory.offsets) for memory in several]).astype(np.int64)
    order = np.array(data.draw(st.permutations(range(counts.size))), np.int64)
    room = counts.ravel()[order] + data.draw(st.integers(0, 2))
    starts = np.empty(counts.size, np.int64)
    starts[order] = np.cumsum(room) - room
    positions = np.concatenate([memory.positions for memory in several])
    layout = Layout(counts, positions, starts.reshape(counts.shape))
    sentinel = from_float32(np.full((int(room.sum()), shape.head_dim), -77, "f4"), shape.dtype)
    found = {part: sentinel.copy() for part in PARTS}
    decode_into(coded, layout, shape, with_stand_in(codec), found["keys"], found["values"])
    for part in PARTS:
        expected = sentinel.copy()
        for memory, own in zip(several, starts.reshape(counts.shape), strict=True):
            alone = decode_memory(encode_memory(memory, shape, codec), shape, with_stand_in(codec))
            for row, start in enumerate(own.tolist()):
                of_row = slice(memory.offsets[row], memory.offsets[row + 1])
                vectors = getattr(alone, part)[of_row]
                expected[start : start + len(vectors)] = vectors
        assert_close(found[part], expected, shape.dtype)
        untouched = np.setdiff1d(np.arange(len(sentinel)), layout.places)
        assert (found[part][untouched] == sentinel[untouched]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_decode_at_once(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec = codec_for(name, shape)
    payloads = [encode_memory(make_like(shape, seed, 120), shape, codec) for seed in range(8)]

    def vectors(payload: bytes) -> list[bytes]:
        found = [decode_memory(payload, shape, with_stand_in(codec)) for _ in range(6)]
        return [memory.keys.tobytes() + memory.values.tobytes() for memory in found]

    alone = [vectors(payload) for payload in payloads]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(vectors, payloads)) == alone
    assert all(len(set(found)) == 1 for found in alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_decoded_stays_as_it_is(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec = codec_for(name, shape)
    found = []
    for seed in range(4):
        payload = encode_memory(make_like(shape, seed, 60), shape, codec)
        memory = decode_memory(payload, shape, with_stand_in(codec))
        found.append((memory, to_float32(memory.keys, dtype).copy(), memory.values.copy()))
    for memory, keys, values in found:
        np.testing.assert_array_equal(to_float32(memory.keys, dtype), keys)
        np.testing.assert_array_equal(memory.values, values)
    arrays = [array for memory, *_ in found for array in (memory.keys, memory.values)]
    for i, one in enumerate(arrays):
        assert not any(np.shares_memory(one, other) for other in arrays[:i])


@pytest.mark.parametrize("name", NAMES)
def test_memories_decode_from_a_mapped_file_and_let_it_go(name: str, tmp_path: Path) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    payload = encode_memory(make_like(shape, 1, 60), shape, codec)
    file = tmp_path / "memory"
    file.write_bytes(payload)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with memoryview(mapped) as view:
        memory = decode_memory(view, shape, with_stand_in(codec))
    mapped.close()  # BufferError, if anything still looked at it
    expected = decode_memory(payload, shape, with_stand_in(codec))
    assert memory.keys.tobytes() == expected.keys.tobytes()
    assert memory.values.tobytes() == expected.values.tobytes()
