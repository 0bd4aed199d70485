from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from memdb import (
    CODECS,
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
from tests.engine.helpers import make_memory, make_shape, same_memory

EXACT, INT8 = CODECS["exact"], CODECS["int8"]
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


@given(vectors())
def test_exact_gives_back_every_bit(drawn: tuple[DType, NDArray[Any]]) -> None:
    dtype, x = drawn
    data = EXACT.encode(x, dtype)
    assert len(data) == len(x) * EXACT.vector_bytes(x.shape[1], dtype)
    y = EXACT.decode(memoryview(data), *x.shape, dtype)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.tobytes() == x.tobytes()


@given(vectors())
def test_int8_errs_by_at_most_half_a_scale(drawn: tuple[DType, NDArray[Any]]) -> None:
    dtype, x = drawn
    data = INT8.encode(x, dtype)
    assert len(data) == len(x) * INT8.vector_bytes(x.shape[1], dtype)
    y = INT8.decode(memoryview(data), *x.shape, dtype)
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
    y = INT8.decode(memoryview(INT8.encode(x, dtype)), *x.shape, dtype)
    assert np.isfinite(to_float32(y, dtype)).all()
    assert_within_half_a_scale(x, y, dtype)
    if end == "zero":
        assert not to_float32(y, dtype).any()


def test_int8_keeps_what_it_decoded() -> None:
    x = make_memory(make_shape(), 1, 50).keys
    once = INT8.decode(memoryview(INT8.encode(x, "float32")), *x.shape, "float32")
    twice = INT8.decode(memoryview(INT8.encode(once, "float32")), *x.shape, "float32")
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_of_the_array_in_ram_does_not_matter(codec: Any, dtype: DType) -> None:
    x = make_memory(make_shape(dtype), 1, 50).keys
    assert codec.encode(np.asfortranarray(x), dtype) == codec.encode(x, dtype)
    assert codec.encode(x[::-1], dtype) == codec.encode(x[::-1].copy(), dtype)


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
        positions=np.array([0, 3, 2, 77], np.uint8),
        keys=from_float32(np.ones((4, 4), np.float32), dtype),
        values=from_float32(np.ones((4, 4), np.float32), dtype),
    )
    encode_memory(memory, shape, EXACT)
    bits = {"float32": np.float32, "float16": np.float16}.get(dtype)
    bad = bits(number) if bits else np.array([number], np.float32).view(np.uint32)[0] >> 16
    {"key": memory.keys, "value": memory.values}[part][3, 1] = bad
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
        with pytest.raises((ValueError, FormatError)):  # a name cut short is an unknown codec
            decode_memory(payload[:end], shape, CODECS)
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload + b"\0", shape, CODECS)


def test_rows_that_do_not_add_up_are_no_memory() -> None:
    shape = make_shape()
    payload = bytearray(encode_memory(make_memory(shape, 1), shape, EXACT))
    payload[1 + len("exact") + 4] += 1  # tokens of the first row
    with pytest.raises(ValueError, match="its rows hold"):
        decode_memory(payload, shape, CODECS)


def test_a_codec_of_the_future_is_named() -> None:
    shape = make_shape()
    payload = encode_memory(make_memory(shape, 1), shape, INT8)
    with pytest.raises(FormatError, match=r"'int4'.*newer release"):
        decode_memory(payload.replace(b"int8", b"int4", 1), shape, CODECS)


def test_a_memory_of_one_shape_does_not_decode_as_another() -> None:
    payload = encode_memory(make_memory(make_shape(), 1), make_shape(), EXACT)
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload, make_shape(head_dim=5), CODECS)


def test_an_unknown_codec_is_answered_with_those_there_are() -> None:
    assert codec_named("int8") is INT8
    with pytest.raises(InvalidInputError, match="'zip'; there are: exact, int8"):
        codec_named("zip")
