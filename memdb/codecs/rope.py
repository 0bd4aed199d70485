"""Rotary position embedding undone and done again: before it, the keys of a head are more alike.

RoPE turns pairs of a key's numbers by angles that grow with its position. To undo it changes no
length, so a codec may do so where it pays and leave it where it does not, or where it is of a kind
that is not known here: what is decoded is right in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.scratch import Scratch
from memdb.types.shape import MemoryShape, Rope

_BLOCK = 1000  # keys turned at once: what they take on the way stays in the processor's cache
_SCRATCH = Scratch()


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
    """The turns of the keys of every row. Threads may share it.

    Args:
        layers: for each memory layer the angles of a position; None: its keys stay as they are.
        shape: of the memories.
    """

    def __init__(self, layers: Sequence[NDArray[np.float64] | None], shape: MemoryShape) -> None:
        self._start = len(shape.prefix)
        self._length = shape.reference_length
        self._heads = shape.kv_heads
        self._runs = list(_runs(layers))
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
        ends = np.cumsum(row_sizes)[self._heads - 1 :: self._heads].tolist()
        start = 0
        for layers, angles in self._runs:
            end = ends[layers - 1]
            if angles is not None and start < end:
                cos, sin = self._table(angles, keys.dtype)
                _turn(keys[start:end], positions[start:end], cos, sin, back)
            start = end

    def _table(
        self, angles: NDArray[np.float64], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of the numbers that are turned, (reference_length, 2 * pairs), the cosines, and the sines
        by which their partners count; computed in float64."""
        key = dtype.char.encode() + angles.tobytes()
        table = self._tables.get(key)
        if table is None:
            turns = np.arange(self._start, self._start + self._length)[:, None] * angles
            cos, sin = np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)
            table = np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)
            self._tables[key] = table
        return table

    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """For who turns keys elsewhere (see `Recipe`): (kinds, 2, reference_length, turned), the
        cosines, and the sines by which partners count; and the kind of each layer, (layers,).
        Where nothing is turned these are 1 and 0. Layers that turn, turn as many numbers."""
        turned = 2 * max((len(angles) for _, angles in self._runs if angles is not None), default=0)
        still = np.zeros((2, self._length, turned), np.float32)
        still[0] = 1
        numbers: dict[bytes, int] = {}
        tables: list[NDArray[np.float32]] = []
        kinds, start = np.zeros(self._runs[-1][0], np.int64), 0
        for end, angles in self._runs:
            key = b"" if angles is None else angles.tobytes()
            if key not in numbers:
                numbers[key] = len(tables)
                float32 = np.dtype(np.float32)
                tables.append(still if angles is None else np.stack(self._table(angles, float32)))
            kinds[start:end] = numbers[key]
            start = end
        return np.stack(tables), kinds


def _runs(
    layers: Sequence[NDArray[np.float64] | None],
) -> Iterator[tuple[int, NDArray[np.float64] | None]]:
    """Layers side by side that turn alike, which are turned together: where they end, and their
    angles."""
    for end, angles in enumerate(layers, 1):
        own = angles if angles is not None and len(angles) else None
        if end == len(layers) or not _same(own, layers[end]):
            yield end, own


def _turn(
    keys: NDArray[Any],
    positions: NDArray[np.unsignedinteger[Any]],
    cos: NDArray[Any],
    sin: NDArray[Any],
    back: bool,
) -> None:
    """Number i and i + pairs of a key are the two that are turned together: each counts with the
    cosine, and its partner with the sine."""
    turned = cos.shape[1]
    pairs = turned // 2
    shape = min(_BLOCK, len(keys)), turned
    partners = _SCRATCH.array("partners", shape, keys.dtype)
    factors = _SCRATCH.array("factors", shape, keys.dtype)
    for start in range(0, len(keys), _BLOCK):
        x, where = keys[start : start + _BLOCK, :turned], positions[start : start + _BLOCK]
        other, factor = partners[: len(x)], factors[: len(x)]
        sin.take(where, axis=0, out=other, mode="clip")
        other[:, :pairs] *= x[:, pairs:]
        other[:, pairs:] *= x[:, :pairs]
        cos.take(where, axis=0, out=factor, mode="clip")
        x *= factor
        if back:
            x -= other
        else:
            x += other


def _same(one: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
