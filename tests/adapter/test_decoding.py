"""Memories decoded by torch, where a GPU would: what numpy decodes, whatever wrote them. The same
operations run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memdb import (
    CODECS,
    CorruptRecordError,
    DType,
    ExplicitMemory,
    InvalidInputError,
    MemDB,
    MemoryShape,
    Scaled,
    StoredMemory,
    pack,
    pack_coded,
    to_float32,
)
from memdb.codecs import FAMILIES
from model_adapter.attention.decoding import DecodedMemories, DeviceDecoder
from tests.engine.fitted import make_like, roped_shape
from tests.engine.helpers import make_memory

MANY = 12
DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NAMES = (*CODECS, *FAMILIES)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "enough", MANY)


def stored_in(
    path: Path, codec: str, shape: MemoryShape, memories: list[ExplicitMemory]
) -> list[StoredMemory]:
    """Memories by their codec, as they come from a database, in the order given."""
    angles = np.linspace(0, 1, len(memories))
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    with MemDB.create(path, shape=shape, dimension=2, codec=codec) as db:
        db.insert_many(
            [str(n) for n in range(len(memories))], embeddings=vectors, memories=memories
        )
        db.recode(codec)
    db = MemDB.open(path, cache_bytes=0)
    return db.retrieve(np.array([1.0, 0.0], np.float32), len(memories)).stored


def decoded(
    memories: Any, shape: MemoryShape, biases: Any = None, dtype: torch.dtype | None = None
) -> DecodedMemories:
    own = DTYPES[shape.dtype] if dtype is None else dtype
    return DeviceDecoder(torch.device("cpu"), own)(pack_coded(memories, shape, biases))


def check(memories: Any, shape: MemoryShape, biases: Any = None) -> None:
    """As `pack`: all but the vectors exactly; these to 1e-5 of the longest of the layer, and a step
    of their dtype."""
    expected, got = pack(memories, shape, biases), decoded(memories, shape, biases)
    assert list(got.layers) == list(expected.layers)
    step = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[shape.dtype]
    for number, layer in expected.layers.items():
        own = got.layers[number]
        for name in ("mask", "memory", "positions"):
            np.testing.assert_array_equal(getattr(own, name), getattr(layer, name))
            assert getattr(own, name).dtype == getattr(layer, name).dtype
        for vectors, name in zip(own.vectors(), ("keys", "values"), strict=True):
            due = floats(getattr(layer, name), shape.dtype)
            longest = np.linalg.norm(due, axis=-1).max()
            assert vectors.dtype == DTYPES[shape.dtype]
            assert vectors.shape == due.shape
            off = np.abs(vectors.double().numpy() - due)
            assert (off <= 1e-5 * longest + step * np.abs(due)).all(), off.max()
            assert not vectors[torch.from_numpy(layer.memory < 0)].any()


def floats(vectors: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    flat = to_float32(vectors.reshape(-1, vectors.shape[-1]), dtype)
    return flat.reshape(vectors.shape).astype(np.float64)


@pytest.mark.parametrize("head_dim", [5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", NAMES)
def test_what_torch_decodes_is_what_numpy_decodes(
    tmp_path: Path, codec: str, dtype: DType, head_dim: int
) -> None:
    """Rows that are empty, short, and longer than a tile; layers with RoPE and without."""
    shape = roped_shape(dtype, head_dim)
    memories = [make_like(shape, seed, 60) for seed in range(MANY)]
    stored = stored_in(tmp_path / "db", codec, shape, memories)
    assert {one.coded().codec.partition(":")[0] for one in stored} >= {codec}
    check(stored[:5], shape, [0.5, -1.0, 0.0, 2.0, 1.0])
    check(stored[3:4], shape)
    check(stored, shape)


def test_memories_of_several_codecs_and_decoded_ones_go_together(tmp_path: Path) -> None:
    shape = roped_shape("float16")
    memories = [make_like(shape, seed, 60) for seed in range(MANY)]
    fitted = stored_in(tmp_path / "one", "klt8", shape, memories)
    others = stored_in(tmp_path / "other", "rotated4", shape, memories)
    check([fitted[0], memories[3], others[1], fitted[2], others[0], memories[1]], shape)


def test_a_layer_whose_keys_are_not_turned_back_is_not_turned(tmp_path: Path) -> None:
    """`roped_shape` has three kinds of layers; here one kind alone, and none at all."""
    for n, rope in enumerate([(None,) * 3, roped_shape().rope[:1] * 3]):
        shape = roped_shape(rope=rope)
        memories = [make_like(shape, seed, 40) for seed in range(MANY)]
        check(stored_in(tmp_path / str(n), "klt5", shape, memories)[:4], shape)


@pytest.mark.parametrize("memories", [0, 3])
def test_nothing_decodes_into_nothing(memories: int) -> None:
    shape = roped_shape()
    assert decoded([make_memory(shape, 1, 0)] * memories, shape).layers == {}


def test_fewer_bytes_go_over_the_bus_than_vectors_have(tmp_path: Path) -> None:
    shape = roped_shape("bfloat16", 64)
    memories = [make_like(shape, seed, 60) for seed in range(MANY)]
    stored = stored_in(tmp_path / "db", "klt8", shape, memories)
    pairs = sum(len(one.coded().positions) for one in stored)
    coded = pack_coded(stored, shape)
    assert not any(isinstance(group.keys, Scaled) for group in coded.groups)
    small = sum(part.codes.nbytes for group in coded.groups for part in (group.keys, group.values))
    assert small < pairs * 2 * 64 * 2 / 3


def test_a_model_of_another_dtype_gets_what_is_stored_rounded_to_its_own(tmp_path: Path) -> None:
    shape = roped_shape("float32")
    memories = [make_like(shape, seed, 60) for seed in range(MANY)]
    stored = stored_in(tmp_path / "db", "klt8", shape, memories)[:4]
    exact, rounded = decoded(stored, shape), decoded(stored, shape, dtype=torch.bfloat16)
    for number, layer in exact.layers.items():
        own = rounded.layers[number]
        assert torch.equal(own.keys, layer.keys.bfloat16())
        assert torch.equal(own.values, layer.values.bfloat16())


def test_what_does_not_fit_becomes_the_largest_number(tmp_path: Path) -> None:
    """As int8's largest level times its scale may be more than float16 holds."""
    shape = roped_shape("float16")
    memory = make_memory(shape, 3, 8)
    largest = np.full_like(memory.keys, 65504)
    memory = ExplicitMemory(memory.offsets, memory.positions, largest, -largest)
    (stored,) = stored_in(tmp_path / "db", "int8", shape, [memory])
    check([stored], shape)
    (layer, *_) = decoded([stored], shape).layers.values()
    assert torch.isfinite(layer.keys).all()


@pytest.mark.parametrize("codec", ["klt8", "int8", "rotated3", "paper"])
def test_a_damaged_memory_is_named(tmp_path: Path, codec: str) -> None:
    shape = roped_shape()
    memories = [make_like(shape, seed, 40) for seed in range(MANY)]
    stored = stored_in(tmp_path / "db", codec, shape, memories)
    record = bytearray(stored[1]._record)
    record[-3] ^= 0xFF
    broken = StoredMemory(stored[1]._source, stored[1]._number, bytes(record))
    with pytest.raises(CorruptRecordError, match="memories"):
        pack_coded([stored[0], broken], shape)


def test_wrong_arguments_are_refused_as_by_pack() -> None:
    shape = roped_shape()
    with pytest.raises(InvalidInputError, match="each of the 1 memories needs a finite number"):
        pack_coded([make_memory(shape, 1)], shape, [float("nan")])
    with pytest.raises(InvalidInputError, match="this is no memory"):
        pack_coded([5], shape)  # type: ignore[list-item]
