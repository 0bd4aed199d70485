"""Rotary position embedding undone and done again: before it, the keys of a head are more alike.

RoPE turns pairs of a key's numbers by angles that grow with its position. To undo it changes no
length, so a codec may do so where it pays and leave it where it does not, or where it is of a kind
that is not known here: what is decoded is right in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.types.shape import MemoryShape, Rope

_BLOCK = 512  # keys turned at once: what they take on the way stays in the processor's cache


def frequencies(rope: Rope | None, head_dim: int) -> NDArray[np.float64] | None:
    """Angles by which a position turns a key, (pairs,); None: none, or not known here."""
    if rope is None:
        return None
    try:
        return _frequencies(rope, head_dim)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # parameters of another kind
        return None


def _frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64] | None:
    parameters = rope.parameters
    turned = int(head_dim * float(parameters.get("partial_rotary_factor", 1.0))) // 2
    if not 1 <= turned <= head_dim // 2:
        return None
    angles: NDArray[np.float64] = np.float64(rope.base) ** (-np.arange(turned) / turned)
    if rope.kind == "default":
        return angles
    if rope.kind == "linear":
        angles /= float(parameters["factor"])
        return angles
    if rope.kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        cycles = parameters["original_max_position_embeddings"] * angles / (2 * np.pi)
        kept = np.clip((cycles - low) / (high - low), 0, 1)
        angles *= kept + (1 - kept) / float(parameters["factor"])
        return angles
    return None


class Turns:
    """The turns of the keys of every row.

    Args:
        layers: for each memory layer the angles of a position; None: its keys stay as they are.
        shape: of the memories.
    """

    def __init__(self, layers: Sequence[NDArray[np.float64] | None], shape: MemoryShape) -> None:
        self._start = len(shape.prefix)
        self._length = shape.reference_length
        self._heads = shape.kv_heads
        self._layers = layers
        self._tables: dict[bytes, tuple[NDArray[Any], NDArray[Any]]] = {}

    def __call__(
        self,
        keys: NDArray[Any],
        row_sizes: NDArray[np.int64],
        positions: NDArray[np.unsignedinteger[Any]],
        *,
        back: bool = False,
    ) -> None:
        """Turn keys, or turn them back.

        Args:
            keys: (n, head_dim) float32 or float64, row after row; changed in place.
            row_sizes: (rows,) keys of each row.
            positions: (n,) theirs.
            back: undo it.
        """
        sizes = row_sizes.reshape(-1, self._heads).sum(axis=1)
        ends = np.cumsum(sizes).tolist()
        layer = 0
        while layer < len(self._layers):  # layers that turn alike are turned together
            angles, first = self._layers[layer], ends[layer] - int(sizes[layer])
            layer += 1
            while layer < len(self._layers) and _same(angles, self._layers[layer]):
                layer += 1
            if angles is not None and len(angles):
                span = slice(first, ends[layer - 1])
                cos, sin = self._table(angles, keys.dtype)
                _turn(keys[span], positions[span], cos, -sin if back else sin)

    def _table(
        self, angles: NDArray[np.float64], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Cosines and sines, (reference_length, pairs), computed in float64."""
        key = dtype.char.encode() + angles.tobytes()
        if key not in self._tables:
            turns = np.arange(self._start, self._start + self._length)[:, None] * angles
            self._tables[key] = np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)
        return self._tables[key]


def _turn(
    keys: NDArray[Any],
    positions: NDArray[np.unsignedinteger[Any]],
    cos: NDArray[Any],
    sin: NDArray[Any],
) -> None:
    """Number i and i + pairs of a key are the two that are turned together."""
    pairs = cos.shape[1]
    for start in range(0, len(keys), _BLOCK):
        block = slice(start, start + _BLOCK)
        one, other = keys[block, :pairs], keys[block, pairs : 2 * pairs]
        c, s = cos.take(positions[block], axis=0), sin.take(positions[block], axis=0)
        before = one.copy()
        one *= c
        one -= other * s
        other *= c
        other += before * s


def _same(one: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
