from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from memdb import (
    CODECS,
    Codec,
    DType,
    ExplicitMemory,
    FormatError,
    InvalidInputError,
    MemoryShape,
    MismatchError,
    from_float32,
    to_float32,
)
from memdb.codecs import codec_named, decode_memory, encode_memory
from memdb.codecs.base import Counts
from tests.engine.helpers import make_memory, make_shape, same_memory

EXACT, INT8 = CODECS["exact"], CODECS["int8"]
HEAD = 20  # bytes behind the codec's name: fingerprint, pairs, bytes of keys, bytes of values
DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
LARGEST = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def numbers(dtype: DType) -> Any:
    """Any finite number of a dtype, as it is stored."""
    if dtype == "bfloat16":
        return st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
    width = 32 if dtype == "float32" else 16
    return st.floats(width=width, allow_nan=False, allow_infinity=False)


@st.composite
def vectors(draw: Any) -> tuple[DType, NDArray[Any]]:
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    return dtype, draw(
        arrays.arrays(make_shape(dtype).storage_dtype, size, elements=numbers(dtype))
    )


@st.composite
def memories(draw: Any) -> tuple[MemoryShape, ExplicitMemory]:
    dtype = draw(st.sampled_from(DTYPES))
    length = draw(st.sampled_from([1, 5, 128, 256, 257, 1000]))
    shape = make_shape(
        dtype,
        layers=tuple(range(draw(st.integers(1, 3)))),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 5)),
        reference_length=length,
    )
    row = st.lists(st.integers(0, length - 1), max_size=4, unique=True).map(sorted)
    rows = [draw(row) for _ in range(shape.rows)]
    pairs = sum(map(len, rows))
    some = arrays.arrays(shape.storage_dtype, (pairs, shape.head_dim), elements=numbers(dtype))
    return shape, ExplicitMemory(
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        positions=np.array([place for row in rows for place in row], shape.position_dtype),
        keys=draw(some),
        values=draw(some),
    )


def assert_within_half_a_scale(x: NDArray[Any], y: NDArray[Any], dtype: DType) -> None:
    """Int8's promise: half a scale, and the rounding of the result to its own dtype."""
    before, after = (to_float32(v, dtype).astype(np.float64) for v in (x, y))
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    rounding = np.maximum(np.abs(after) * 2.0**-bits, SMALLEST[dtype] / 2)
    scale = np.abs(before).max(axis=1, initial=0, keepdims=True) / 127
    # The scale is itself a float32, and so is its product with a level: a few parts in a million;
    # among float32's subnormal numbers up to half a step, 127 times.
    half = scale * (0.5 + 2.0**-16) + np.where(scale < 2.0**-126, 64 * 2.0**-149, 0)
    assert (np.abs(after - before) <= half + rounding).all(), (before, after)


# --- vectors --------------------------------------------------------------------------------------


def rows_of(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The vectors in three rows, one of them empty."""
    return np.array([len(x) // 2, 0, len(x) - len(x) // 2], np.uint16)


def decoded(codec: Codec, data: bytes, like: NDArray[Any], dtype: DType) -> NDArray[Any]:
    return codec.decode(memoryview(data), rows_of(like), like.shape[1], dtype)


@given(vectors())
def test_exact_gives_back_every_bit(drawn: tuple[DType, NDArray[Any]]) -> None:
    dtype, x = drawn
    data = EXACT.encode(x, rows_of(x), dtype)
    assert len(data) == x.nbytes
    y = decoded(EXACT, data, x, dtype)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.tobytes() == x.tobytes()


@given(vectors())
def test_int8_errs_by_at_most_half_a_scale(drawn: tuple[DType, NDArray[Any]]) -> None:
    dtype, x = drawn
    data = INT8.encode(x, rows_of(x), dtype)
    assert len(data) == len(x) * (4 + x.shape[1])
    y = decoded(INT8, data, x, dtype)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert np.isfinite(to_float32(y, dtype)).all()
    assert_within_half_a_scale(x, y, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["largest", "smallest", "both", "zero"])
def test_int8_at_both_ends_of_each_dtype(dtype: DType, end: str) -> None:
    large, small = LARGEST[dtype], SMALLEST[dtype]
    rows = {
        "largest": [[large, -large, large / 2, 0], [-large, 1, -1, large]],
        "smallest": [[small * n, -small * n, small, 0] for n in range(1, 400)],
        "both": [[large, -small, small, -large], [1, small, -1, 0]],
        "zero": [[0, 0, -0.0, 0]],
    }[end]
    x = from_float32(np.array(rows, np.float32), dtype)
    y = decoded(INT8, INT8.encode(x, rows_of(x), dtype), x, dtype)
    assert np.isfinite(to_float32(y, dtype)).all()
    assert_within_half_a_scale(x, y, dtype)
    if end == "zero":
        assert not to_float32(y, dtype).any()


def test_int8_keeps_what_it_decoded() -> None:
    x = make_memory(make_shape(), 1, 50).keys
    once = decoded(INT8, INT8.encode(x, rows_of(x), "float32"), x, "float32")
    twice = decoded(INT8, INT8.encode(once, rows_of(x), "float32"), x, "float32")
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_of_the_array_in_ram_does_not_matter(codec: Any, dtype: DType) -> None:
    x = make_memory(make_shape(dtype), 1, 50).keys
    counts = rows_of(x)
    assert codec.encode(np.asfortranarray(x), counts, dtype) == codec.encode(x, counts, dtype)
    assert codec.encode(x[::-1], counts, dtype) == codec.encode(x[::-1].copy(), counts, dtype)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_the_wrong_length_do_not_decode(codec: Any, dtype: DType) -> None:
    x = make_memory(make_shape(dtype), 1).keys
    data = codec.encode(x, rows_of(x), dtype)
    for wrong in (b"", data[:-1], data + b"\0", data + data):
        with pytest.raises(ValueError, match=f"{len(data)} are due"):
            decoded(codec, wrong, x, dtype)


# --- memories -------------------------------------------------------------------------------------


@given(memories())
def test_a_memory_comes_back_from_exact_as_it_was(drawn: tuple[MemoryShape, Any]) -> None:
    shape, memory = drawn
    assert same_memory(decode_memory(encode_memory(memory, shape, EXACT), shape, CODECS), memory)


@given(memories())
def test_a_memory_comes_back_from_int8_with_its_tokens(drawn: tuple[MemoryShape, Any]) -> None:
    shape, memory = drawn
    again = decode_memory(encode_memory(memory, shape, INT8), shape, CODECS)
    again.require(shape)
    np.testing.assert_array_equal(again.offsets, memory.offsets)
    np.testing.assert_array_equal(again.positions, memory.positions)
    assert_within_half_a_scale(memory.keys, again.keys, shape.dtype)
    assert_within_half_a_scale(memory.values, again.values, shape.dtype)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_that_keeps_nothing_can_be_kept(codec: Any, dtype: DType) -> None:
    shape = make_shape(dtype)
    nothing = make_memory(shape, 1, 0)
    assert nothing.pairs == 0
    assert same_memory(decode_memory(encode_memory(nothing, shape, codec), shape, CODECS), nothing)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_decoded_memory_outlives_the_bytes_it_came_from(codec: Any) -> None:
    shape = make_shape()
    page = bytearray(encode_memory(make_memory(shape, 1), shape, codec))
    memory = decode_memory(page, shape, CODECS)
    before = decode_memory(bytes(page), shape, CODECS)
    page[:] = bytes(len(page))
    assert same_memory(memory, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["key", "value"])
def test_what_is_not_finite_is_refused_and_its_place_named(
    dtype: DType, number: float, part: str
) -> None:
    shape = make_shape(dtype, layers=(1, 4), kv_heads=2)
    memory = ExplicitMemory(  # rows: layer 1 head 0, layer 1 head 1, layer 4 head 0, layer 4 head 1
        offsets=np.array([0, 2, 2, 2, 4], np.int32),
        positions=np.array([0, 3, 77, 78], np.uint8),
        keys=from_float32(np.ones((4, 4), np.float32), dtype),
        values=from_float32(np.ones((4, 4), np.float32), dtype),
    )
    encode_memory(memory, shape, EXACT)
    bits = {"float32": np.float32, "float16": np.float16}.get(dtype)
    bad = bits(number) if bits else np.array([number], np.float32).view(np.uint32)[0] >> 16
    {"key": memory.keys, "value": memory.values}[part][2, 1] = bad
    place = f"the {part} of layer 4, kv head 1, token position 77 is not finite .dimension 1"
    for codec in CODECS.values():
        with pytest.raises(InvalidInputError, match=place):
            encode_memory(memory, shape, codec)


def test_a_memory_of_another_shape_is_refused() -> None:
    with pytest.raises(MismatchError, match="offsets"):
        encode_memory(make_memory(make_shape(kv_heads=3), 1), make_shape(), EXACT)


# --- bytes that are no memory ---------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_bytes_cut_short_or_too_long_are_no_memory(codec: Any) -> None:
    shape = make_shape()
    payload = encode_memory(make_memory(shape, 1), shape, codec)
    for end in range(len(payload)):
        with pytest.raises(ValueError, match=r"does not decode|are due"):
            decode_memory(payload[:end], shape, CODECS)
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload + b"\0", shape, CODECS)


def test_rows_that_do_not_add_up_are_no_memory() -> None:
    shape = make_shape()
    payload = bytearray(encode_memory(make_memory(shape, 1), shape, EXACT))
    payload[1 + len("exact") + HEAD] += 1  # tokens of the first row
    with pytest.raises(ValueError, match="its rows hold"):
        decode_memory(payload, shape, CODECS)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("moved", [-1, 1, -4, 4])
def test_sections_that_add_up_but_do_not_fit_are_no_memory(codec: Any, moved: int) -> None:
    shape = make_shape()
    payload = bytearray(encode_memory(make_memory(shape, 1), shape, codec))
    sizes = 1 + len(codec.name) + HEAD - 8
    keys, values = struct.unpack_from("<II", payload, sizes)
    struct.pack_into("<II", payload, sizes, keys + moved, values - moved)
    with pytest.raises(ValueError, match=f"{keys + moved} bytes where {keys} are due"):
        decode_memory(payload, shape, CODECS)


def test_a_codec_of_the_future_is_named() -> None:
    shape = make_shape()
    payload = encode_memory(make_memory(shape, 1), shape, INT8)
    with pytest.raises(FormatError, match=r"'int4'.*newer release"):
        decode_memory(payload.replace(b"int8", b"int4", 1), shape, CODECS)


@pytest.mark.parametrize("changes", [{"head_dim": 5}, {"kv_heads": 1}, {"model": "model-2"}])
def test_a_memory_of_one_shape_does_not_decode_as_another(changes: dict[str, Any]) -> None:
    payload = encode_memory(make_memory(make_shape(), 1), make_shape(), EXACT)
    with pytest.raises(MismatchError, match=r"written for another memory shape.*not damaged"):
        decode_memory(payload, make_shape(**changes), CODECS)


class Runs(Codec):
    """A codec of variable length: a row of equal vectors takes one of them."""

    name = "runs"

    def encode(self, vectors: NDArray[Any], counts: Counts, dtype: DType) -> bytes:
        data = b""
        for row in np.split(vectors, np.cumsum(counts)[:-1]):
            one = bool(len(row) and (row == row[0]).all())
            data += bytes([one]) + (row[:1] if one else row).tobytes()
        return data

    def decode(self, data: memoryview, counts: Counts, head_dim: int, dtype: DType) -> NDArray[Any]:
        stored = make_shape(dtype).storage_dtype
        rows, at = [np.empty((0, head_dim), stored)], 0
        for n in map(int, counts):
            size = (1 if data[at] else n) * head_dim
            row = np.frombuffer(data, stored, size, at + 1).reshape(-1, head_dim)
            rows.append(np.broadcast_to(row, (n, head_dim)))
            at += 1 + row.nbytes
        if at != len(data):
            raise ValueError(f"{len(data)} bytes where {at} are due")
        return np.concatenate(rows)


def test_a_codec_may_see_rows_and_have_a_variable_length() -> None:
    shape = make_shape()
    memory = make_memory(shape, 1, 50)
    memory.keys[memory.offsets[0] : memory.offsets[1]] = 7
    payload = encode_memory(memory, shape, Runs())
    assert len(payload) < len(encode_memory(memory, shape, EXACT))
    assert same_memory(decode_memory(payload, shape, {"runs": Runs()}), memory)
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload + b"\0", shape, {"runs": Runs()})


def test_an_unknown_codec_is_answered_with_those_there_are() -> None:
    assert codec_named("int8") is INT8
    with pytest.raises(InvalidInputError, match="'zip'; there are: exact, int8"):
        codec_named("zip")
