"""What the families fit: codecs that are known by their parameters, and memories they do not
suit."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from memdb import CODECS, DType, ExplicitMemory, MemoryShape, from_float32, to_float32
from memdb.codecs import (
    FAMILIES,
    Layout,
    codec_of,
    decode_memory,
    encode_batch,
    encode_memory,
    fitted_codec,
)
from memdb.types.memory_batch import MemoryBatch
from tests.engine.fitted import (
    DTYPES,
    assert_within_half_a_scale,
    counts_of,
    fit,
    fitted,
    is_finite,
    make_like,
    roped_shape,
    with_stand_in,
)
from tests.engine.helpers import make_memory, make_shape, same_memory

every_family = pytest.mark.parametrize("name", FAMILIES)
SHAPE = roped_shape()


def scaled(memory: ExplicitMemory, factor: float, dtype: DType) -> ExplicitMemory:
    keys, values = (
        from_float32(to_float32(x, dtype) * np.float32(factor), dtype)
        for x in (memory.keys, memory.values)
    )
    return ExplicitMemory(memory.offsets, memory.positions, keys, values)


def header_of(parameters: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack_from("<I", parameters)
    return json.loads(parameters[4 : 4 + length]), parameters[4 + length :]


def with_header(header: object, arrays: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + arrays


# --- what it is good for --------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 5, 8, 64])
def test_memories_like_those_it_was_fitted_to_come_back(
    name: str, dtype: DType, head_dim: int
) -> None:
    shape = roped_shape(dtype, head_dim)
    codec = fitted(name, head_dim)
    wrong, spread = np.zeros(2), np.zeros(2)
    for seed in range(100, 120):  # not those it was fitted to
        memory = make_like(shape, seed, 30)
        payload = encode_memory(memory, shape, codec)
        assert codec_of(payload) == codec.name
        found = decode_memory(payload, shape, with_stand_in(codec))
        for part, name_ in enumerate(("keys", "values")):
            x, y = (to_float32(getattr(m, name_), dtype) for m in (memory, found))
            wrong[part] += np.square(y - x).sum()
            spread[part] += np.square(x - np.linspace(-2, 3, head_dim)).sum()
    assert (wrong < 1.05 * spread).all(), (wrong, spread)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_the_transforms_take_the_part_of_the_bytes_that_was_asked_for(head_dim: int) -> None:
    shape = roped_shape("bfloat16", head_dim)
    several = [make_like(shape, seed, 40) for seed in range(24)]
    batch = MemoryBatch.of(several, shape)
    layout = Layout.dense(batch.counts, batch.positions)
    errors = []
    for ratio in (5, 8, 11):
        codec = fit(FAMILIES[f"klt{ratio}"], several, shape)
        keys = codec.encode("keys", batch.keys, layout, shape)
        values = codec.encode("values", batch.values, layout, shape)
        size = sum(len(section or b"") for section in (*keys, *values))
        assert size == pytest.approx((batch.keys.nbytes + batch.values.nbytes) / ratio, rel=0.05)
        error = 0.0
        for memory in several:
            payload = encode_memory(memory, shape, codec)
            found = decode_memory(payload, shape, with_stand_in(codec))
            difference = to_float32(found.keys, "bfloat16") - to_float32(memory.keys, "bfloat16")
            error += float(np.square(difference).sum())
        errors.append(error)
    assert errors == sorted(errors)


@every_family
@pytest.mark.parametrize("most", [0, 1])
def test_it_can_be_fitted_to_next_to_nothing(name: str, most: int) -> None:
    few = [make_like(SHAPE, seed, most) for seed in range(2)]
    codec = fit(FAMILIES[name], few, SHAPE)
    for memory in (*few, make_like(SHAPE, 1, 9)):
        payload = encode_memory(memory, SHAPE, codec)
        found = decode_memory(payload, SHAPE, with_stand_in(codec))
        np.testing.assert_array_equal(found.positions, memory.positions)
        assert is_finite(found.keys, "float32")


@every_family
@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-30, 1e30, "huge"])
def test_it_can_be_fitted_to_numbers_of_any_size(name: str, factor: Any) -> None:
    several = [make_like(SHAPE, seed) for seed in range(12)]
    for memory in several:
        for x in (memory.keys, memory.values):
            if factor == "huge":  # not all are, turned back, numbers of float32
                np.copyto(x, np.where(x > 0, np.float32(2.3e38), np.float32(-2.3e38)))
            else:
                x *= np.float32(factor)
    codec = fit(FAMILIES[name], several, SHAPE)
    assert FAMILIES[name].load(codec.parameters).name == codec.name
    for memory in several:
        payload = encode_memory(memory, SHAPE, codec)
        found = decode_memory(payload, SHAPE, with_stand_in(codec))
        for x, y in ((memory.keys, found.keys), (memory.values, found.values)):
            assert is_finite(y, "float32")
            assert float(np.abs(y).max(initial=0)) <= 4 * float(np.abs(x).max(initial=1e-14))


@every_family
def test_a_fit_is_the_same_each_time(name: str) -> None:
    several = [make_like(SHAPE, seed, 60) for seed in range(10)]
    assert fit(FAMILIES[name], several, SHAPE).parameters == fitted(name).parameters


# --- memories that it does not suit ---------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", DTYPES)
def test_memories_unlike_are_written_by_int8_each_by_itself(name: str, dtype: DType) -> None:
    shape = roped_shape(dtype)
    codec = fitted(name)
    factor = 1e4 if dtype == "float16" else 1e30
    several = [make_like(shape, seed, 40) for seed in range(1, 7)]
    several[1] = scaled(several[1], factor, dtype)
    several[4] = ExplicitMemory(  # the values alone
        several[4].offsets,
        several[4].positions,
        several[4].keys,
        scaled(several[4], -factor, dtype).values,
    )
    payloads = encode_batch(MemoryBatch.of(several, shape), shape, codec)
    assert payloads == [encode_memory(memory, shape, codec) for memory in several]
    for number, (memory, payload) in enumerate(zip(several, payloads, strict=True)):
        assert payload is not None
        assert codec_of(payload) == ("int8" if number in (1, 4) else codec.name)
        if number in (1, 4):
            found = decode_memory(payload, shape, with_stand_in(codec))
            assert_within_half_a_scale(memory.keys, found.keys, dtype)
            assert_within_half_a_scale(memory.values, found.values, dtype)


@every_family
def test_one_number_that_is_far_away_is_not_lost(name: str) -> None:
    memory = make_like(SHAPE, 3, 60)
    memory.values[5, 2] = 1e30
    payload = encode_memory(memory, SHAPE, fitted(name))
    found = decode_memory(payload, SHAPE, with_stand_in(fitted(name)))
    assert_within_half_a_scale(memory.values, found.values, "float32")


@every_family
def test_a_direction_in_which_nothing_lay_is_not_lost(name: str) -> None:
    """Narrow directions are not coded: a memory along one of them is kept by another codec."""
    shape = make_shape(head_dim=8)

    def flat(seed: int, axis: slice, size: float) -> ExplicitMemory:
        memory = make_memory(shape, seed, 60)
        for x in (memory.keys, memory.values):
            kept = x[:, axis] * np.float32(size)
            x *= np.float32(1e-4)
            x[:, axis] = kept
        return memory

    codec = fit(FAMILIES[name], [flat(seed, slice(0, 1), 1) for seed in range(12)], shape)
    like = encode_memory(flat(20, slice(0, 1), 1), shape, codec)
    assert codec_of(like) == codec.name
    memory = flat(20, slice(7, 8), 100)
    found = decode_memory(encode_memory(memory, shape, codec), shape, with_stand_in(codec))
    assert np.linalg.norm(found.values - memory.values) < 0.1 * np.linalg.norm(memory.values)
    assert np.linalg.norm(found.keys - memory.keys) < 0.1 * np.linalg.norm(memory.keys)


# --- RoPE -----------------------------------------------------------------------------------------


@every_family
def test_keys_take_fewer_bytes_or_err_less_where_their_rope_is_known(name: str) -> None:
    several = [make_like(SHAPE, seed, 40) for seed in range(12)]
    unknown = roped_shape(rope=())

    def cost(shape: MemoryShape) -> tuple[float, float]:
        codec = fit(FAMILIES[name], several, shape)
        size, error = 0, 0.0
        for memory in several:
            layout = Layout.dense(counts_of(memory), memory.positions)
            (section,) = codec.encode("keys", memory.keys, layout, shape)
            assert section is not None
            out = np.empty_like(memory.keys)
            codec.decode("keys", [memoryview(section)], layout, shape, out)
            of_layer = slice(0, int(memory.offsets[2]))  # the one with RoPE
            size += len(section)
            error += float(np.square(out - memory.keys)[of_layer].sum())
        return size, error

    with_rope, without = cost(SHAPE), cost(unknown)
    assert with_rope[1] < without[1]


# --- parameters -----------------------------------------------------------------------------------


@every_family
def test_parameters_make_the_same_codec(name: str) -> None:
    codec = fitted(name)
    loaded = FAMILIES[name].load(codec.parameters)
    assert loaded.name == codec.name
    assert loaded.parameters == codec.parameters
    assert codec.name.startswith(f"{name}:")
    for seed in range(4):
        memory = make_like(SHAPE, seed)
        payload = encode_memory(memory, SHAPE, codec)
        assert encode_memory(memory, SHAPE, loaded) == payload
        one, other = (decode_memory(payload, SHAPE, with_stand_in(c)) for c in (codec, loaded))
        assert same_memory(one, other)


@every_family
def test_a_fitted_codec_is_found_by_its_name(name: str) -> None:
    codec = fitted(name)
    found = fitted_codec(codec.name, codec.parameters)
    assert found is not None
    assert found.name == codec.name
    with pytest.raises(ValueError, match=f"are those of {codec.name}"):
        fitted_codec(f"{name}:0123456789abcdef", codec.parameters)
    assert fitted_codec("later:0123456789abcdef", codec.parameters) is None
    assert codec.name not in CODECS


@every_family
def test_parameters_that_are_cut_short_or_too_long_are_damaged(name: str) -> None:
    parameters = fitted(name).parameters
    for end in range(len(parameters)):
        with pytest.raises(ValueError):  # noqa: PT011 - JSON's, numpy's or one of ours
            FAMILIES[name].load(parameters[:end])
    with pytest.raises(ValueError, match="are due"):
        FAMILIES[name].load(parameters + b"\0")


@every_family
def test_flipped_parameters_are_not_those_of_the_name(name: str) -> None:
    codec = fitted(name)
    for place in range(len(codec.parameters)):
        wrong = bytearray(codec.parameters)
        wrong[place] ^= 1 << place % 8
        with pytest.raises(ValueError):  # noqa: PT011
            fitted_codec(codec.name, bytes(wrong))


NO_PARAMETERS = {
    "nothing": b"",
    "no header": b"\0\0\0\0",
    "a header longer than all": b"\xff\xff\xff\xff{}",
    "a list": with_header([], b""),
    "an empty object": with_header({}, b""),
    "null": with_header(None, b""),
    "no UTF-8": b"\x02\0\0\0\xff\xff",
    "no JSON": b"\x02\0\0\0{]",
    "no arrays": with_header({"arrays": []}, b""),
    "depth": struct.pack("<I", 100_000) + b"[" * 100_000,
}


@every_family
@pytest.mark.parametrize("parameters", NO_PARAMETERS.values(), ids=NO_PARAMETERS)
def test_what_is_no_parameters_is_damaged(name: str, parameters: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        FAMILIES[name].load(parameters)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


@every_family
def test_a_header_with_something_else_in_it_is_damaged_or_makes_a_codec(name: str) -> None:
    header, arrays = header_of(fitted(name).parameters)
    memory = make_like(SHAPE, 1)
    refused = 0
    tried: tuple[Any, ...] = (None, -1, 0, 3, 10**30, 1.5, float("inf"), "x", [], {}, [[1]])
    for path in places(header):
        for value in tried:
            wrong = copy.deepcopy({"all": header})
            *way, last = "all", *path
            at: Any = wrong
            for key in way:
                at = at[key]
            at[last] = value
            try:
                codec = FAMILIES[name].load(with_header(wrong["all"], arrays))
            except ValueError:
                refused += 1
                continue
            payload = encode_memory(memory, SHAPE, codec)
            found = decode_memory(payload, SHAPE, with_stand_in(codec))
            assert found.keys.shape == memory.keys.shape
    assert refused > 300


@every_family
@pytest.mark.parametrize("array", ["keys.means", "keys.scales", "values.means", "values.scales"])
def test_arrays_of_another_shape_are_damaged(name: str, array: str) -> None:
    header, arrays = header_of(fitted(name).parameters)
    (entry,) = (entry for entry in header["arrays"] if entry["name"] == array)
    entry["shape"] = [int(np.prod(entry["shape"])), 1]  # as many numbers
    with pytest.raises(ValueError, match=r"(the means of|do not have|the axes of)"):
        FAMILIES[name].load(with_header(header, arrays))


@every_family
def test_parameters_without_one_of_their_arrays_are_damaged(name: str) -> None:
    header, arrays = header_of(fitted(name).parameters)
    for entry in header["arrays"]:
        if not entry["name"].endswith("angles"):  # these may be missing
            wrong = {**header, "arrays": [{**e} for e in header["arrays"]]}
            wrong["arrays"][header["arrays"].index(entry)]["name"] = "other"
            with pytest.raises(ValueError, match="a field is missing"):
                FAMILIES[name].load(with_header(wrong, arrays))
