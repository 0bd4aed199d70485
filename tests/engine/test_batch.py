from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb import CODECS, DType, ExplicitMemory, InvalidInputError, MismatchError
from memdb.codecs import FAMILIES, codec_of, decode_memory, encode_batch, encode_memory
from memdb.types.memory_batch import MemoryBatch
from tests.engine.fitted import (
    DIMS,
    DTYPES,
    NAMES,
    codec_for,
    make_like,
    memories,
    roped_shape,
)
from tests.engine.helpers import make_memory, make_shape, same_memory

INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


@st.composite
def batches(draw: Any, /, dims: tuple[int, ...] = (1, 2, 3, 4, 5), **fixed: Any) -> tuple[Any, Any]:
    """A shape and memories of it: ragged, empty rows, empty memories, cold references."""
    changes = fixed or {
        "layers": tuple(range(1, 1 + draw(st.integers(1, 3)))),
        "kv_heads": draw(st.integers(1, 3)),
    }
    shape = make_shape(
        draw(st.sampled_from(DTYPES)),
        head_dim=draw(st.sampled_from(dims)),
        reference_length=draw(st.sampled_from([6, 128, 256, 257])),
        **changes,
    )
    make = st.sampled_from([make_memory, make_like])
    one = st.none() | st.builds(
        lambda make, seed, most: make(shape, seed, most),
        make,
        st.integers(0, 1000),
        st.integers(0, 5),
    )
    return shape, draw(st.lists(one, max_size=6))


def same_rows() -> Any:
    """Of those rows that codecs are fitted to, and any number of dimensions."""
    return batches(DIMS, rope=roped_shape().rope)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(drawn=same_rows())
def test_a_batch_is_encoded_as_its_memories_are_one_by_one(
    name: str, drawn: tuple[Any, list[ExplicitMemory | None]]
) -> None:
    shape, memories = drawn
    codec = codec_for(name, shape)
    alone = [m if m is None else encode_memory(m, shape, codec) for m in memories]
    batch = MemoryBatch.of(memories, shape)
    assert encode_batch(batch, shape, codec) == alone
    if None not in memories:
        assert encode_batch(replace(batch, warm=None), shape, codec) == alone


@given(batches())
def test_a_batch_gives_back_its_memories(drawn: tuple[Any, list[ExplicitMemory | None]]) -> None:
    shape, memories = drawn
    batch = MemoryBatch.of(memories, shape)
    assert len(batch) == len(memories)
    for number, memory in enumerate(memories):
        again = batch.memory(number)
        if memory is None or again is None:
            assert memory is again
        else:
            assert same_memory(again, memory)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(one=memories())
def test_numbers_of_any_size_are_encoded_as_one_by_one(name: str, one: tuple[Any, Any]) -> None:
    """Beside memories of which some suit the codec, and some do not."""
    shape, memory = one
    codec = codec_for(name, shape)
    most = min(9, shape.reference_length)
    several = [make_like(shape, 1, most), memory, make_like(shape, 2, most), memory]
    alone = [encode_memory(m, shape, codec) for m in several]
    assert encode_batch(MemoryBatch.of(several, shape), shape, codec) == alone


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_vectors_that_are_alike_in_their_numbers_are_encoded_as_one_by_one(
    name: str, head_dim: int
) -> None:
    """Whole numbers and repeated ones, whose sums are often 0 or halves."""
    shape = roped_shape(head_dim=head_dim)
    codec, rng = codec_for(name, shape), np.random.default_rng(1)
    several = [make_memory(shape, seed, 1 + seed) for seed in range(12)]
    for number, memory in enumerate(several):
        for x in (memory.keys, memory.values):
            x[:] = rng.integers(-number, number + 1, x.shape) if number % 3 else number
    alone = [encode_memory(m, shape, codec) for m in several]
    assert encode_batch(MemoryBatch.of(several, shape), shape, codec) == alone


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_vectors_are_encoded_as_few_are(name: str, dtype: DType) -> None:
    """More than are quantized at once, in memories of many sizes."""
    shape = roped_shape(dtype)
    codec = codec_for(name, shape)
    memories = [make_like(shape, seed, seed % 40) for seed in range(60)]
    batch = MemoryBatch.of(memories, shape)
    assert len(batch.keys) > 2000
    alone = [encode_memory(m, shape, codec) for m in memories]
    assert encode_batch(batch, shape, codec) == alone
    assert codec.name in map(codec_of, alone)


@pytest.mark.parametrize("counts", ["u1", "<u2", "<i4", "<i8", "<u8"])
@pytest.mark.parametrize("name", NAMES)
def test_the_arrays_layout_and_the_counts_dtype_do_not_matter(name: str, counts: str) -> None:
    shape = roped_shape(head_dim=3, reference_length=256)
    codec = codec_for(name, shape)
    memories = [make_like(shape, seed, 200) for seed in range(3)]  # sums that no u1 holds
    batch = MemoryBatch.of(memories, shape)
    other = MemoryBatch(
        counts=np.asfortranarray(batch.counts.astype(counts)),
        positions=np.repeat(batch.positions, 2)[::2],
        keys=np.asfortranarray(batch.keys),
        values=batch.values[::-1].copy()[::-1],
    )
    assert encode_batch(other, shape, codec) == encode_batch(batch, shape, codec)
    memory = other.memory(2)
    assert memory is not None
    assert same_memory(memory, memories[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_no_payloads(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    assert encode_batch(MemoryBatch.of([], shape), shape, codec) == []
    assert encode_batch(MemoryBatch.of([None, None], shape), shape, codec) == [None, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_reference_may_keep_nothing(name: str) -> None:
    shape = roped_shape()
    codec = codec_for(name, shape)
    nothing = make_memory(shape, 1, 0)
    cold, warm = encode_batch(MemoryBatch.of([None, nothing], shape), shape, codec)
    assert cold is None
    assert warm is not None
    assert codec_of(warm) == codec.name
    assert same_memory(decode_memory(warm, shape, {codec.name: codec}), nothing)


# --- what is refused ------------------------------------------------------------------------------


def good() -> MemoryBatch:
    """Two references of layers 1 and 4 with 2 heads each; 3 and 2 pairs, and a cold one between."""
    return MemoryBatch(
        counts=np.array([[2, 0, 0, 1], [0, 0, 0, 0], [0, 0, 2, 0]]),
        positions=np.array([5, 9, 0, 127, 3], np.uint8)[[0, 1, 2, 4, 3]],
        keys=np.ones((5, 4), np.float32),
        values=np.ones((5, 4), np.float32),
        warm=np.array([True, False, True]),
    )


SHAPE = make_shape(layers=(1, 4), kv_heads=2)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "counts without rows": ({"counts": np.array([3, 0, 2])}, r"of shape \(references, 4\), got"),
    "counts of another shape": ({"counts": np.zeros((3, 5), int)}, r"\(references, 4\), got int64"),
    "counts that are no integers": ({"counts": np.zeros((3, 4))}, "counts must be integers"),
    "a negative count": (
        {"counts": np.array([[2, 0, 0, 1], [0, 0, 0, 0], [0, -1, 3, 0]])},
        "reference 2, layer 1, kv head 1 has -1 pairs",
    ),
    "counts whose sum overflows": (
        {"counts": np.array([[2, 0, 0, 1], [1 << 62, 1 << 62, 1 << 62, 1 << 62], [0, 0, 2, 0]])},
        "reference 1, layer 1, kv head 0 has 4611686018427387904 pairs, and a reference has 0 to",
    ),
    "counts that promise more": (
        {"counts": np.array([[2, 0, 0, 1], [0, 0, 0, 0], [0, 0, 2, 1]])},
        r"the counts sum up to 6 pairs, positions have shape \(5,\)",
    ),
    "a cold reference with pairs": (
        {"warm": np.array([True, True, False])},
        "reference 2 is cold, and has 2 pairs",
    ),
    "warm for other references": ({"warm": np.array([True])}, r"warm must be bool of shape \(3,\)"),
    "warm that is no bool": ({"warm": np.array([1, 0, 1])}, "warm must be bool"),
    "positions of another dtype": (
        {"positions": np.array([5, 9, 0, 3, 127], np.int64)},
        "positions must be uint8, got int64",
    ),
    "a position outside": (
        {"positions": np.array([5, 9, 0, 3, 128], np.uint8)},
        "reference 2, layer 4, kv head 0 keeps position 128, outside the 128 tokens",
    ),
    "positions that fall": (
        {"positions": np.array([5, 9, 0, 127, 3], np.uint8)},
        "reference 2, layer 4, kv head 0: positions must ascend",
    ),
    "a position twice": (
        {"positions": np.array([5, 5, 0, 3, 127], np.uint8)},
        "reference 0, layer 1, kv head 0: positions must ascend",
    ),
    "keys of another length": (
        {"keys": np.ones((5, 3), np.float32)},
        r"keys must be float32 of shape \(5, 4\) for a float32 model, got float32 of shape",
    ),
    "values of another dtype": (
        {"values": np.ones((5, 4), np.float16)},
        r"values must be float32 .* got float16",
    ),
    "fewer values": ({"values": np.ones((4, 4), np.float32)}, "values must be"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_is_no_batch_of_the_shape_is_refused(changes: dict[str, Any], message: str) -> None:
    good().require(SHAPE)
    bad = replace(good(), **changes)
    with pytest.raises(MismatchError, match=f"memory batch: .*{message}"):
        bad.require(SHAPE)
    for codec in CODECS.values():
        with pytest.raises(MismatchError, match=message):
            encode_batch(bad, SHAPE, codec)


def test_the_first_references_number_can_be_given() -> None:
    bad = replace(good(), positions=np.array([5, 9, 0, 127, 3], np.uint8))
    with pytest.raises(MismatchError, match="reference 1002, layer 4"):
        bad.require(SHAPE, first=1000)


def test_a_batch_of_memories_names_the_one_that_does_not_fit() -> None:
    other = make_memory(make_shape(kv_heads=3), 1)
    with pytest.raises(MismatchError, match="reference 1 of the batch: explicit memory: offsets"):
        MemoryBatch.of([make_memory(make_shape(), 1), other], make_shape())


@given(batches())
def test_what_a_memory_alone_refuses_the_batch_refuses_too(
    drawn: tuple[Any, list[ExplicitMemory | None]],
) -> None:
    """Positions in reverse, which `ExplicitMemory.require` accepts only where rows are short."""
    shape, memories = drawn
    turned = [m and replace(m, positions=m.positions[::-1].copy()) for m in memories]
    wrong = False
    for memory in filter(None, turned):
        try:
            memory.require(shape)
        except MismatchError:
            wrong = True
    batch = MemoryBatch.of(memories, shape)
    parts = [memory.positions for memory in turned if memory is not None]
    batch = replace(batch, positions=np.concatenate([batch.positions[:0], *parts]))
    if wrong:
        with pytest.raises(MismatchError, match="ascend"):
            batch.require(shape)
    else:
        batch.require(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("mantissa", [0, 1, 0x7F])
@pytest.mark.parametrize("part", ["key", "value"])
def test_what_is_not_finite_is_refused_and_its_place_named(
    dtype: DType, sign: int, mantissa: int, part: str
) -> None:
    shape = make_shape(dtype, layers=(1, 4), kv_heads=2)
    stored = shape.storage_dtype
    unsigned = f"<u{stored.itemsize}"
    # The largest number of either sign everywhere else: one bit less than infinity.
    top = np.array([INFINITY[dtype] - 1, INFINITY[dtype] - 1 | 1 << 8 * stored.itemsize - 1])
    numbers = np.resize(top.astype(unsigned), (5, 4))
    keys, values = numbers.copy().view(stored), numbers.copy().view(stored)
    batch = replace(good(), keys=keys, values=values)
    assert len(encode_batch(batch, shape, CODECS["exact"])) == 3
    bits = INFINITY[dtype] | mantissa | sign << 8 * stored.itemsize - 1
    {"key": keys, "value": values}[part].view(unsigned)[4, 3] = bits
    place = (
        f"explicit memory of reference 2: the {part} of layer 4, kv head 0, token position 127 "
        r"is not finite \(dimension 3\)"
    )
    fitted = [codec_for(name, shape) for name in FAMILIES]
    for codec in (*CODECS.values(), *fitted):
        with pytest.raises(InvalidInputError, match=place):
            encode_batch(batch, shape, codec)
