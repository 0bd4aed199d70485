"""One explicit memory, and its numbers as float32 and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.errors import InvalidInputError, MismatchError
from memdb.types.shape import STORAGE_DTYPES, DType, MemoryShape

_LARGEST = {"float16": np.float32(65504), "bfloat16": np.float32(2.0**128 - 2.0**120)}


@dataclass(frozen=True, repr=False)
class ExplicitMemory:
    """The sparse key-values of one reference for one model. Ragged: every (layer, kv head) keeps
    its own number of tokens. Held as CSR over the rows of `MemoryShape` (paper, 3.1 and 3.2).

    The arrays of one that comes from a database are read-only, since all who ask for it share them:
    to change a number, copy the array first.

    Attributes:
        offsets: (rows + 1,) int32; row r holds the pairs offsets[r] to offsets[r + 1].
        positions: (pairs,) uint8 or uint16; token positions within the reference, ascending in
            each row.
        keys: (pairs, head_dim), after RoPE at prefix length + position; `shape.storage_dtype`.
        values: (pairs, head_dim), likewise.
    """

    offsets: NDArray[np.int32]
    positions: NDArray[np.unsignedinteger[Any]]
    keys: NDArray[Any]
    values: NDArray[Any]

    def __repr__(self) -> str:
        rows, dim = len(self.offsets) - 1, self.keys.shape[-1]
        return f"ExplicitMemory(pairs={self.pairs}, rows={rows}, head_dim={dim}, {self.keys.dtype})"

    @property
    def pairs(self) -> int:
        """How many key-value pairs are kept, over all rows."""
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes in RAM."""
        return self.offsets.nbytes + self.positions.nbytes + self.keys.nbytes + self.values.nbytes

    def require(self, shape: MemoryShape) -> None:
        """Raise `MismatchError` unless this is a well-formed memory of that shape."""
        problem = self._problem(shape)
        if problem:
            raise MismatchError(f"explicit memory: {problem}")

    def _problem(self, shape: MemoryShape) -> str | None:
        for name in ("offsets", "positions", "keys", "values"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or not array.ndim:
                return f"{name} must be an array, got {array!r:.60}"
        n = self.pairs
        if self.offsets.shape != (shape.rows + 1,) or self.offsets.dtype != np.int32:
            return (
                f"offsets must be int32 of shape ({shape.rows + 1},), got {_describe(self.offsets)}"
            )
        counts = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != n or (counts < 0).any():
            return f"offsets must rise from 0 to the number of pairs, {n}"
        if self.positions.shape != (n,) or self.positions.dtype != shape.position_dtype:
            return f"positions must be {shape.position_dtype}, got {_describe(self.positions)}"
        if n and int(self.positions.max()) >= shape.reference_length:
            return f"a position is outside the {shape.reference_length} tokens of a reference"
        steps = np.diff(self.positions.astype(np.int32))
        starts_row = np.zeros(n + 1, bool)
        starts_row[self.offsets] = True
        if n and (steps[~starts_row[1:n]] <= 0).any():
            return "positions must ascend within each row"
        for name, vectors in (("keys", self.keys), ("values", self.values)):
            if vectors.shape != (n, shape.head_dim) or vectors.dtype != shape.storage_dtype:
                return (
                    f"{name} must be {shape.storage_dtype} of shape ({n}, {shape.head_dim}) for a "
                    f"{shape.dtype} model, got {_describe(vectors)}"
                )
        return None


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, which several share: a write into it raises ValueError from now on."""
    array.setflags(write=False)
    return array


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _check_vectors(vectors: object, dtype: object, due: dict[str, np.dtype[Any]] | None) -> None:
    if not isinstance(dtype, str) or dtype not in STORAGE_DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r:.60}, not one of {', '.join(STORAGE_DTYPES)}")
    wanted = np.dtype("<f4") if due is None else due[dtype]
    if not isinstance(vectors, np.ndarray) or vectors.dtype != wanted:
        got = _describe(vectors) if isinstance(vectors, np.ndarray) else repr(vectors)[:60]
        raise InvalidInputError(f"vectors must be an array of {wanted}, got {got}")


def to_float32(vectors: NDArray[Any], dtype: DType) -> NDArray[np.float32]:
    """Stored vectors of a model dtype as float32, without loss; `InvalidInputError` if they are of
    another dtype."""
    _check_vectors(vectors, dtype, STORAGE_DTYPES)
    if dtype == "bfloat16":
        return (vectors.astype(np.uint32) << 16).view(np.float32)
    return vectors.astype(np.float32, copy=False)


def from_float32(vectors: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """Float32 vectors in the storage dtype of a model dtype, rounded to nearest even.

    What does not fit is set to the largest number that does; NaN stays NaN.

    Raises:
        InvalidInputError: they are no float32, or there is no such dtype.
    """
    _check_vectors(vectors, dtype, None)
    if dtype == "float32":
        return vectors
    largest = _LARGEST[dtype]
    # Two passes over the numbers say whether any needs more than rounding; most often none does.
    fits = vectors.max(initial=0) <= largest and vectors.min(initial=0) >= -largest
    limited = vectors if fits else np.clip(vectors, -largest, largest)
    if dtype == "float16":
        return limited.astype(np.float16)
    bits = limited.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    if not fits:
        rounded[np.isnan(vectors)] = 0x7FC0
    return rounded.astype(np.uint16)
