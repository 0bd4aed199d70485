from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from memdb import (
    CorpusError,
    CorruptRecordError,
    ExplicitMemory,
    FormatError,
    InvalidInputError,
    MemoryShape,
    MismatchError,
    Rope,
    from_float32,
    to_float32,
)
from tests.engine.helpers import make_memory, make_shape

BFLOAT16_MAX = float(torch.finfo(torch.bfloat16).max)


def torch_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    return bits


# --- shape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"layers": ()}, "layers"),
        ({"layers": (3, 1)}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"reference_length": 0}, "reference_length"),
        ({"reference_length": 65536}, "reference_length"),
        ({"rope": (Rope(1e4),)}, "RoPE"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        make_shape(**changes)


ROPED = make_shape(
    "bfloat16",
    rope=(Rope(1e4), None, Rope(5e5, "yarn", {"factor": 4.0, "list": [1, 2]})),
    framing="chat",
    adapter="adapter-1",
)


@pytest.mark.parametrize("shape", [make_shape(), ROPED], ids=["plain", "roped"])
def test_a_shape_survives_json(shape: MemoryShape) -> None:
    assert MemoryShape.from_json(shape.to_json()) == shape


def test_a_shape_with_other_fields_is_of_another_format() -> None:
    values = ROPED.to_json()
    with pytest.raises(FormatError, match="does not know the field 'sinks'"):
        MemoryShape.from_json({**values, "sinks": 4})
    with pytest.raises(FormatError, match="the field 'prefix' is missing"):
        MemoryShape.from_json({name: values[name] for name in values if name != "prefix"})
    with pytest.raises(FormatError, match=r"RoPE of a layer: .* 'scaling'"):
        MemoryShape.from_json({**values, "rope": [{**values["rope"][0], "scaling": 2}]})


CHANGED: dict[str, Any] = {
    "model": "model-2",
    "layers": (0, 2, 4),
    "kv_heads": 3,
    "head_dim": 8,
    "dtype": "float16",
    "prefix": (1, 8),
    "framing": "plain",
    "reference_length": 64,
    "rope": (Rope(1e4), None, Rope(5e5, "yarn", {"factor": 8.0, "list": [1, 2]})),
    "adapter": None,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MemoryShape)])
def test_each_part_of_a_shape_counts(field: str) -> None:
    other = dataclasses.replace(ROPED, **{field: CHANGED[field]})
    assert other.fingerprint != ROPED.fingerprint
    with pytest.raises(MismatchError, match=f"{field}: the database has .*the model 'm' has"):
        ROPED.require_equal(other, "the model 'm'")


def test_equal_shapes_match() -> None:
    ROPED.require_equal(dataclasses.replace(ROPED), "it")
    assert dataclasses.replace(ROPED).fingerprint == ROPED.fingerprint


@pytest.mark.parametrize(("length", "dtype"), [(256, "u1"), (257, "<u2"), (65535, "<u2")])
def test_positions_take_the_smallest_type_that_holds_them(length: int, dtype: str) -> None:
    assert make_shape(reference_length=length).position_dtype == np.dtype(dtype)
    assert np.iinfo(dtype).max >= length - 1


# --- memories -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("most", [0, 1, 128])
def test_a_well_formed_memory_is_accepted(dtype: Any, most: int) -> None:
    shape = make_shape(dtype)
    make_memory(shape, 1, most).require(shape)


SHAPE = make_shape()
MEMORY = ExplicitMemory(
    offsets=np.array([0, 2, 2, 4, 4, 4, 5], np.int32),
    positions=np.array([3, 9, 0, 127, 5], np.uint8),
    keys=np.ones((5, 4), np.float32),
    values=np.ones((5, 4), np.float32),
)


def positions(*places: int) -> dict[str, Any]:
    return {"positions": np.array(places, np.uint8)}


def offsets(*numbers: int, dtype: Any = np.int32) -> dict[str, Any]:
    return {"offsets": np.array(numbers, dtype)}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (offsets(0, 5), "offsets must be int32 of shape"),
        (offsets(0, 2, 2, 4, 4, 4, 5, dtype=np.int64), "offsets must be int32"),
        (offsets(1, 2, 2, 4, 4, 4, 5), "rise from 0"),
        (offsets(0, 2, 2, 4, 4, 4, 4), "rise from 0"),
        (offsets(0, 4, 2, 4, 4, 4, 5), "rise from 0"),
        (offsets(0, 2, 2, 9, 4, 4, 5), "rise from 0"),
        ({"positions": np.zeros(5, np.int64)}, "positions must be uint8"),
        ({"positions": np.zeros((5, 1), np.uint8)}, "positions must be uint8"),
        (positions(3, 9, 0, 128, 5), "outside the 128 tokens"),
        (positions(9, 3, 0, 127, 5), "ascend within each row"),
        (positions(3, 3, 0, 127, 5), "ascend within each row"),
        ({"keys": np.ones((4, 4), np.float32)}, "keys must be float32"),
        ({"keys": np.ones((5, 3), np.float32)}, "keys must be float32"),
        ({"keys": np.ones((5, 4), np.float16)}, "keys must be float32"),
        ({"values": np.ones((5, 4), np.float64)}, "values must be float32"),
    ],
)
def test_a_malformed_memory_is_refused(changes: dict[str, Any], problem: str) -> None:
    MEMORY.require(SHAPE)  # so that it is the change that is refused
    with pytest.raises(MismatchError, match=problem):
        dataclasses.replace(MEMORY, **changes).require(SHAPE)


def test_a_memory_counts_its_pairs_and_bytes() -> None:
    assert MEMORY.pairs == 5
    assert MEMORY.nbytes == 7 * 4 + 5 + 2 * 5 * 4 * 4


# --- numbers --------------------------------------------------------------------------------------


def test_every_bfloat16_widens_as_torch_widens_it_and_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = to_float32(bits, "bfloat16")
    by_torch = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.view(np.uint32), by_torch.view(np.uint32))
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(from_float32(wide[finite], "bfloat16"), bits[finite])


def test_ties_between_bfloat16_numbers_go_to_the_even_one_as_in_torch() -> None:
    upper = np.arange(0, 0x7F7F, 7, dtype=np.uint32) << 16
    lower = np.array([0x7FFF, 0x8000, 0x8001], np.uint32)
    x = (upper[:, None] | lower).reshape(-1).view(np.float32)
    np.testing.assert_array_equal(from_float32(x, "bfloat16"), torch_bfloat16(x))


@given(st.lists(st.floats(-BFLOAT16_MAX, BFLOAT16_MAX, width=32), min_size=1))
def test_bfloat16_rounds_as_torch_does(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    np.testing.assert_array_equal(from_float32(x, "bfloat16"), torch_bfloat16(x))


@pytest.mark.parametrize(
    ("dtype", "largest"), [("bfloat16", BFLOAT16_MAX), ("float16", float(np.finfo("f2").max))]
)
def test_what_does_not_fit_becomes_the_largest_number(dtype: Any, largest: float) -> None:
    x = np.array([np.finfo("f4").max, np.finfo("f4").min, largest, -largest], np.float32)
    narrow = to_float32(from_float32(x, dtype), dtype)
    assert narrow.tolist() == [largest, -largest, largest, -largest]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_nan_becomes_a_number(dtype: Any) -> None:
    bits = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    assert np.isnan(to_float32(from_float32(bits.view(np.float32), dtype), dtype)).all()


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1))
def test_float16_rounds_as_numpy_does(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    np.testing.assert_array_equal(from_float32(x, "float16"), x.astype(np.float16))


def test_conversions_take_arrays_that_are_not_contiguous() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for dtype in ("float32", "float16", "bfloat16"):
        narrow = from_float32(x.T[::2], dtype)
        np.testing.assert_array_equal(to_float32(narrow, dtype), x.T[::2])
        np.testing.assert_array_equal(to_float32(narrow.T, dtype), x.T[::2].T)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: CorpusError("a.jsonl", 7, "not JSON"),
        lambda: CorruptRecordError("memories", "7", "its checksum does not match"),
    ],
)
def test_errors_pass_between_processes(make: Callable[[], Exception]) -> None:
    error = make()
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
