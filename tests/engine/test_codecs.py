from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from memdb.codecs import (
    FAMILIES,
    Layout,
    Part,
    codec_named,
    codec_of,
    decode_into,
    decode_memory,
    encode_memory,
    read_payload,
)
from tests.engine.fitted import (
    DTYPES,
    LARGEST,
    NAMES,
    SMALLEST,
    assert_close,
    assert_within_half_a_scale,
    codec_for,
    counts_of,
    fitted,
    is_finite,
    make_like,
    memories,
    roped_shape,
    with_stand_in,
)
from tests.engine.helpers import make_memory, make_shape, same_memory, time_limit

EXACT, INT8 = CODECS["exact"], CODECS["int8"]
HEAD = 20  # bytes behind the codec's name: fingerprint, pairs, bytes of keys, bytes of values
#: Most of a random vector's length that may be lost, and what is lost of many (storage_format.md).
ROTATED = {"rotated4": (0.4, 0.10), "rotated3": (0.6, 0.19), "rotated2": (0.8, 0.34)}
PARTS: tuple[Part, Part] = ("keys", "values")
#: What only the store's checksums tell from another memory.
SEEN = (ValueError, FormatError, MismatchError)

every_codec = pytest.mark.parametrize("name", NAMES)


def again(memory: ExplicitMemory, shape: MemoryShape, codec: Codec) -> ExplicitMemory:
    return decode_memory(encode_memory(memory, shape, codec), shape, with_stand_in(codec))


# --- layouts --------------------------------------------------------------------------------------


@given(
    st.integers(0, 4).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(0, 4), min_size=rows, max_size=rows), min_size=1, max_size=4
        )
    ),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_a_layout_says_where_vectors_go(counts: list[list[int]], gaps: list[int]) -> None:
    rows = len(counts[0])
    starts, at = [], 0
    for row in range(rows):
        starts.append(at + gaps[row])
        at = starts[row] + sum(memory[row] for memory in counts)
    here = [
        (row, memory, place)
        for memory, own in enumerate(counts)
        for row in range(rows)
        for place in range(own[row])
    ]
    positions = np.arange(len(here), dtype=np.uint8)
    by_row = np.array(counts, np.int64).reshape(len(counts), rows)
    layout = Layout(by_row, positions, np.array(starts, int))
    free = starts.copy()
    places = []
    for row, _, _ in here:
        places.append(free[row])
        free[row] += 1
    assert layout.places.tolist() == places
    assert layout.order.tolist() == sorted(range(len(here)), key=lambda i: here[i])
    assert layout.vectors == len(here)
    assert layout.sizes.tolist() == [sum(own) for own in counts]
    assert layout.row_sizes.tolist() == [sum(own[row] for own in counts) for row in range(rows)]
    dense = Layout.dense(layout.counts, positions)
    assert sorted(dense.places.tolist()) == list(range(len(here)))
    assert dense.places[dense.order].tolist() == list(range(len(here)))


# --- vectors --------------------------------------------------------------------------------------


@every_codec
@settings(max_examples=15)
@given(drawn=memories())
def test_a_memory_comes_back_with_its_tokens_and_finite(
    name: str, drawn: tuple[MemoryShape, ExplicitMemory]
) -> None:
    shape, memory = drawn
    codec = codec_for(name, shape)
    payload = encode_memory(memory, shape, codec)
    found = decode_memory(payload, shape, with_stand_in(codec))
    found.require(shape)
    np.testing.assert_array_equal(found.offsets, memory.offsets)
    np.testing.assert_array_equal(found.positions, memory.positions)
    assert is_finite(found.keys, shape.dtype)
    assert is_finite(found.values, shape.dtype)
    wrote = codec_of(payload)
    if wrote == "exact":
        assert same_memory(found, memory)
    elif wrote in ("int8", "int4"):
        assert_within_half_a_scale(memory.keys, found.keys, shape.dtype, wrote)
        assert_within_half_a_scale(memory.values, found.values, shape.dtype, wrote)
    else:
        assert wrote == codec.name


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["largest", "smallest", "both", "zero"])
def test_both_ends_of_each_dtype_come_back(name: str, dtype: DType, end: str) -> None:
    large, small = LARGEST[dtype], SMALLEST[dtype]
    rows = {
        "largest": [[large, -large, large / 2, 0], [-large, 1, -1, large], [large] * 4],
        "smallest": [[small * n, -small * n, small, 0] for n in range(1, 400)],
        "both": [[large, -small, small, -large], [1, small, -1, 0], [small, 0, 0, 0]],
        "zero": [[0, 0, -0.0, 0], [0, 0, 0, 0]],
    }[end]
    shape = roped_shape(dtype, 4, reference_length=1000)
    x = from_float32(np.array(rows, np.float32), dtype)
    offsets = np.array([0, *[len(x)] * shape.rows], np.int32)
    memory = ExplicitMemory(offsets, np.arange(len(x), dtype="<u2"), x, x[::-1].copy())
    codec = codec_for(name, shape)
    payload = encode_memory(memory, shape, codec)
    found = decode_memory(payload, shape, with_stand_in(codec))
    wrote = codec_of(payload)
    for before, after in ((memory.keys, found.keys), (memory.values, found.values)):
        assert is_finite(after, dtype)
        if name in CODECS and end == "zero":
            assert not to_float32(after, dtype).any()
        if wrote in ("exact", "int8", "int4"):
            assert_within_half_a_scale(before, after, dtype, wrote)
    if name in FAMILIES and end in ("largest", "both"):
        # Unlike what it was fitted to. Beside a large number, int8 loses the smallest, too.
        assert wrote == ("int8" if end == "largest" else "exact")


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*range(1, 10), 64, 80])
def test_a_rotated_vector_loses_a_part_of_its_length(
    name: str, dtype: DType, head_dim: int
) -> None:
    shape = make_shape(dtype, head_dim=head_dim)
    memory = make_memory(shape, 1, 80)
    memory.values[::2, 0] = from_float32(np.array([300], np.float32), dtype)[0]  # outliers
    memory.values[::3, 1:] = 0
    found = again(memory, shape, CODECS[name])
    most, many = ROTATED[name]
    for part in PARTS:
        x, y = (to_float32(getattr(m, part), dtype) for m in (memory, found))
        error, norm = np.linalg.norm(y - x, axis=1), np.linalg.norm(x, axis=1)
        assert (error <= most * norm + 1e-6).all()
        if head_dim >= 64 and part == "keys":
            assert np.sqrt((error**2).sum() / (norm**2).sum()) == pytest.approx(many, rel=0.1)


def test_int8_keeps_what_it_decoded() -> None:
    once = again(make_memory(make_shape(), 1, 50), make_shape(), INT8)
    np.testing.assert_allclose(again(once, make_shape(), INT8).keys, once.keys, rtol=1e-6)


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_of_the_arrays_in_ram_does_not_matter(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec, memory = codec_for(name, shape), make_like(shape, 1, 50)
    payload = encode_memory(memory, shape, codec)
    assert codec_of(payload) == codec.name
    other = ExplicitMemory(
        memory.offsets,
        np.repeat(memory.positions, 2)[::2],
        np.asfortranarray(memory.keys),
        memory.values[::-1].copy()[::-1],
    )
    assert encode_memory(other, shape, codec) == payload


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_memories_decode_at_once_into_rows_with_gaps(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec = codec_for(name, shape)
    several = [make_like(shape, seed, seed % 7) for seed in range(9)]  # the first is empty
    payloads = [encode_memory(memory, shape, codec) for memory in several]
    assert {codec_of(payload) for payload in payloads} == {codec.name}
    coded = [read_payload(payload, shape) for payload in payloads]
    counts = np.stack([memory.counts for memory in coded]).astype(np.int64)
    room = counts.sum(axis=0) + np.array([3, 0, 1, 5, 0, 2])
    starts = np.cumsum(room) - room + 1
    layout = Layout(counts, np.concatenate([memory.positions for memory in coded]), starts)
    places = int(starts[-1] + room[-1])
    sentinel = from_float32(np.full((places, shape.head_dim), -77, np.float32), dtype)
    keys, values = sentinel.copy(), sentinel.copy()
    decode_into(coded, layout, shape, with_stand_in(codec), keys, values)
    alone = [decode_memory(payload, shape, with_stand_in(codec)) for payload in payloads]
    for found, part in ((keys, "keys"), (values, "values")):
        expected = sentinel.copy()
        for row, start in enumerate(starts.tolist()):
            at = start
            for memory in alone:
                own = getattr(memory, part)[memory.offsets[row] : memory.offsets[row + 1]]
                expected[at : at + len(own)] = own
                at += len(own)
        if name in ("exact", "int8", "int4"):
            assert found.tobytes() == expected.tobytes()
        assert_close(found, expected, dtype)
        untouched = np.setdiff1d(np.arange(places), layout.places)
        assert len(untouched) == 12
        assert (found[untouched] == sentinel[untouched]).all()


# --- memories -------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_that_keeps_nothing_can_be_kept(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    nothing = make_memory(shape, 1, 0)
    assert nothing.pairs == 0
    assert same_memory(again(nothing, shape, codec_for(name, shape)), nothing)


@every_codec
def test_a_decoded_memory_outlives_the_bytes_it_came_from(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    page = bytearray(encode_memory(make_like(shape, 1), shape, codec))
    memory = decode_memory(memoryview(page), shape, with_stand_in(codec))
    before = decode_memory(bytes(page), shape, with_stand_in(codec))
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
    for name in NAMES:
        with pytest.raises(InvalidInputError, match=place):
            encode_memory(memory, shape, codec_for(name, shape))


def test_a_memory_of_another_shape_is_refused() -> None:
    with pytest.raises(MismatchError, match="offsets"):
        encode_memory(make_memory(make_shape(kv_heads=3), 1), make_shape(), EXACT)


# --- bytes that are no memory ---------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_the_wrong_length_do_not_decode(name: str, part: Part, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec, memory = codec_for(name, shape), make_like(shape, 1)
    layout = Layout.dense(counts_of(memory), memory.positions)
    (section,) = codec.encode(part, getattr(memory, part), layout, shape)
    assert section is not None
    out = np.empty_like(memory.keys)
    cut = [section[:end] for end in range(len(section))]
    for wrong in (*cut, section + b"\0", section + section):
        with pytest.raises(ValueError, match=r"due|stands for nothing"), time_limit():
            codec.decode(part, [memoryview(wrong)], layout, shape, out)


@every_codec
def test_vectors_where_none_are_due_do_not_decode(name: str) -> None:
    shape = roped_shape()
    layout = Layout.dense(np.zeros(shape.rows, np.int64), np.empty(0, np.uint8))
    codec, out = codec_for(name, shape), np.empty((0, shape.head_dim), np.float32)
    codec.decode("keys", [memoryview(b"")], layout, shape, out)
    with pytest.raises(ValueError, match="1 bytes where 0 are due"):
        codec.decode("keys", [memoryview(b"\0")], layout, shape, out)


@every_codec
def test_bytes_cut_short_or_too_long_are_no_memory(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    payload = encode_memory(make_like(shape, 1), shape, codec)
    for end in range(len(payload)):
        with pytest.raises(ValueError, match=r"does not decode|are due"):
            decode_memory(payload[:end], shape, with_stand_in(codec))
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload + b"\0", shape, with_stand_in(codec))


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_flipped_bytes_are_refused_or_another_memory(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec = codec_for(name, shape)
    payload = encode_memory(make_like(shape, 1, 3), shape, codec)
    refused = 0
    for place in range(len(payload)):
        for flip in (1, 0x80):
            wrong = bytearray(payload)
            wrong[place] ^= flip
            try:
                with time_limit():
                    found = decode_memory(bytes(wrong), shape, with_stand_in(codec))
            except SEEN:
                refused += 1
            else:
                assert found.keys.shape == found.values.shape == (found.pairs, shape.head_dim)
    assert refused >= 2 * (1 + len(codec.name) + HEAD)  # the head, at least


@every_codec
def test_a_position_outside_of_the_reference_is_refused(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    payload = bytearray(encode_memory(make_like(shape, 1), shape, codec))
    payload[1 + payload[0] + HEAD + 2 * shape.rows] = 128
    with pytest.raises(ValueError, match="position is outside the 128 tokens"):
        decode_memory(bytes(payload), shape, with_stand_in(codec))


def test_rows_that_do_not_add_up_are_no_memory() -> None:
    shape = make_shape()
    payload = bytearray(encode_memory(make_memory(shape, 1), shape, EXACT))
    payload[1 + len("exact") + HEAD] += 1  # tokens of the first row
    with pytest.raises(ValueError, match="its rows hold"):
        decode_memory(bytes(payload), shape, CODECS)


@every_codec
@pytest.mark.parametrize("moved", [-1, 1, -4, 4])
def test_sections_that_add_up_but_do_not_fit_are_no_memory(name: str, moved: int) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    payload = bytearray(encode_memory(make_like(shape, 1), shape, codec))
    sizes = 1 + len(codec.name) + HEAD - 8
    keys, values = struct.unpack_from("<II", payload, sizes)
    struct.pack_into("<II", payload, sizes, keys + moved, values - moved)
    with pytest.raises(ValueError, match=f"{keys + moved} bytes where {keys} are due"):
        decode_memory(bytes(payload), shape, with_stand_in(codec))


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def streams_of(section: bytes) -> list[bytes]:
    """The DEFLATE streams of a transform codec's section, whose number follows from its length."""
    for n in range(1, len(section) // 4):
        ends = np.cumsum(struct.unpack_from(f"<{n}I", section)) + 4 * n
        if ends[-1] == len(section):
            return [section[a:b] for a, b in zip([4 * n, *ends], ends, strict=False)]
    raise AssertionError("these are no streams")


BAD_STREAMS = {
    "nothing": lambda _: b"",
    "no DEFLATE": lambda _: b"\x07" * 9,
    "cut short": lambda data: deflated(data)[:-1],
    "something behind": lambda data: deflated(data) + b"\0",
    "one byte less": lambda data: deflated(data[:-1]),
    "one byte more": lambda data: deflated(data + b"\0"),
    "a bomb": lambda _: deflated(bytes(1 << 24)),
    "codes that stand for nothing": lambda data: deflated(b"\xff" * len(data)),
}


@pytest.mark.parametrize("wrong", BAD_STREAMS.values(), ids=BAD_STREAMS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("klt")])
def test_a_damaged_stream_does_not_decode(name: str, wrong: Any) -> None:
    shape = roped_shape()
    codec, memory = fitted(name), make_like(shape, 1, 20)
    layout = Layout.dense(counts_of(memory), memory.positions)
    (section,) = codec.encode("values", memory.values, layout, shape)
    assert section is not None
    streams, out = streams_of(section), np.empty_like(memory.values)
    plain = [zlib.decompress(stream, -15) for stream in streams]

    def decode(streams: Sequence[bytes]) -> None:
        lengths = struct.pack(f"<{len(streams)}I", *map(len, streams))
        data = memoryview(lengths + b"".join(streams))
        codec.decode("values", [data], layout, shape, out)

    decode(streams)
    before = out.copy()
    decode([deflated(data) for data in plain])  # however they were compressed
    assert (out == before).all()
    for i, data in enumerate(plain):
        message = "due|decode|stands for nothing"
        with pytest.raises(ValueError, match=message), time_limit():
            decode([*streams[:i], wrong(data), *streams[i + 1 :]])


def test_codes_of_the_paper_that_stand_for_nothing_do_not_decode() -> None:
    shape = roped_shape()
    codec, memory = fitted("paper"), make_like(shape, 1)
    layout = Layout.dense(counts_of(memory), memory.positions)
    (section,) = codec.encode("keys", memory.keys, layout, shape)
    assert section is not None
    data = memoryview(b"\xff" * len(section))
    with pytest.raises(ValueError, match="stands for nothing"):
        codec.decode("keys", [data], layout, shape, np.empty_like(memory.keys))


def test_a_codec_of_the_future_is_named() -> None:
    shape = make_shape()
    payload = encode_memory(make_memory(shape, 1), shape, INT8)
    with pytest.raises(FormatError, match=r"'int9'.*newer release"):
        decode_memory(payload.replace(b"int8", b"int9", 1), shape, CODECS)


@pytest.mark.parametrize("changes", [{"head_dim": 5}, {"kv_heads": 1}, {"model": "model-2"}])
def test_a_memory_of_one_shape_does_not_decode_as_another(changes: dict[str, Any]) -> None:
    payload = encode_memory(make_memory(make_shape(), 1), make_shape(), EXACT)
    with pytest.raises(MismatchError, match=r"written for another memory shape.*not damaged"):
        decode_memory(payload, make_shape(**changes), CODECS)


# --- a codec of one's own -------------------------------------------------------------------------


class Runs(Codec):
    """A codec of variable length: a row of equal vectors takes one of them. It does not suit
    memories whose first number is 13."""

    name = "runs"

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        found: list[bytes | None] = []
        at = 0
        for counts in layout.counts.tolist():
            data, bad = b"", bool(sum(counts) and vectors[at, 0] == 13)
            for n in counts:
                row = vectors[at : at + n]
                one = bool(n and (row == row[0]).all())
                data += bytes([one]) + (row[:1] if one else row).tobytes()
                at += n
            found.append(None if bad else data)
        return found

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        found = [np.empty((0, shape.head_dim), shape.storage_dtype)]
        for section, counts in zip(sections, layout.counts.tolist(), strict=True):
            at = 0
            for n in counts:
                size = (1 if section[at] else n) * shape.head_dim
                row = np.frombuffer(section, shape.storage_dtype, size, at + 1)
                found.append(np.broadcast_to(row.reshape(-1, shape.head_dim), (n, shape.head_dim)))
                at += 1 + row.nbytes
            if at != len(section):
                raise ValueError(f"{len(section)} bytes where {at} are due")
        out[layout.places] = np.concatenate(found)


def test_a_codec_may_see_rows_and_have_a_variable_length() -> None:
    shape = make_shape()
    memory = make_memory(shape, 1, 50)
    memory.keys[memory.offsets[0] : memory.offsets[1]] = 7
    payload = encode_memory(memory, shape, Runs())
    assert len(payload) < len(encode_memory(memory, shape, EXACT))
    assert same_memory(decode_memory(payload, shape, {"runs": Runs()}), memory)
    with pytest.raises(ValueError, match="are due"):
        decode_memory(payload + b"\0", shape, {"runs": Runs()})


@pytest.mark.parametrize("part", PARTS)
def test_a_memory_that_a_codec_does_not_suit_is_written_by_the_stand_in(part: Part) -> None:
    shape = make_shape()
    memory = make_memory(shape, 1, 50)
    getattr(memory, part)[0, 0] = 13
    payload = encode_memory(memory, shape, Runs())
    assert payload == encode_memory(memory, shape, INT8)


def test_an_unknown_codec_is_answered_with_those_there_are() -> None:
    assert codec_named("int8") is INT8
    for name in NAMES:
        assert codec_named(name).name == name
    with pytest.raises(InvalidInputError, match=r"'zip'; there are: exact, int8.*klt8"):
        codec_named("zip")
