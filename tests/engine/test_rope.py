from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memdb import Rope
from memdb.codecs.rope import Turns, frequencies
from tests.engine.helpers import make_memory, make_shape

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LAYERS = (Rope(10000.0), None, Rope(500.0, "llama3", LLAMA3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("head_dim", [1, 2, 5, 8, 64])
def test_keys_turned_back_and_forth_are_as_they_were(dtype: Any, head_dim: int) -> None:
    shape = make_shape(head_dim=head_dim, rope=LAYERS, prefix=tuple(range(900)))
    memory = make_memory(shape, 3, 100)
    counts = np.diff(memory.offsets).astype(np.int64)
    turns = Turns([frequencies(rope, head_dim) for rope in LAYERS], shape)
    keys = memory.keys.astype(dtype)
    turns(keys, counts, memory.positions, back=True)
    if head_dim > 1:
        assert np.abs(keys - memory.keys).max() > 0.1
    turns(keys, counts, memory.positions)
    np.testing.assert_allclose(keys, memory.keys, atol=1e-6)


def test_keys_are_turned_as_complex_numbers_are() -> None:
    shape = make_shape(head_dim=7, rope=LAYERS, prefix=(1, 7, 9))
    memory = make_memory(shape, 3, 20)
    layers = [frequencies(rope, 7) for rope in LAYERS]
    keys = memory.keys.astype(np.float64)
    Turns(layers, shape)(keys, np.diff(memory.offsets).astype(np.int64), memory.positions)
    for row in range(shape.rows):
        angles = layers[row // shape.kv_heads]
        for pair in range(memory.offsets[row], memory.offsets[row + 1]):
            before = memory.keys[pair].astype(np.float64)
            expected = before.copy()
            if angles is not None:
                turn = np.exp(1j * (3 + int(memory.positions[pair])) * angles)
                turned = (before[:3] + 1j * before[3:6]) * turn
                expected[:6] = np.concatenate([turned.real, turned.imag])
            np.testing.assert_allclose(keys[pair], expected, atol=1e-9)


def test_a_part_of_a_key_may_be_turned() -> None:
    part = frequencies(Rope(10000.0, "default", {"partial_rotary_factor": 0.5}), 16)
    np.testing.assert_array_equal(part, frequencies(Rope(10000.0), 8))


@pytest.mark.parametrize("rope", [None, Rope(10000.0, "yarn"), Rope(10000.0, "spiral")])
def test_no_rope_and_kinds_that_are_not_known_have_no_angles(rope: Rope | None) -> None:
    assert frequencies(rope, 8) is None


def test_a_key_of_one_number_has_no_angles() -> None:
    assert frequencies(Rope(10000.0), 1) is None
