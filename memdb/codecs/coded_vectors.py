"""Vectors out of their bytes and not computed yet: small whole numbers, for who computes them
elsewhere than here, as on a GPU. They are many times smaller than the vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scaled:
    """Vectors that are numbers times a scale.

    Attributes:
        numbers: (n, head_dim) int8, or `shape.storage_dtype`.
        scales: (n,) float32; None: the numbers are the vectors.
    """

    numbers: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"Scaled({self.numbers.shape}, {self.numbers.dtype})"


@dataclass(frozen=True)
class Digits:
    """Levels that lie several to a byte: level i of a byte is digit i of its number to the base
    `2 * largest + 1`, the least first, less `largest`.

    Attributes:
        first: the first level.
        count: levels.
        packed: levels to a byte; the last byte may have fewer.
        largest: level.
    """

    first: int
    count: int
    packed: int
    largest: int

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return -(-self.count // self.packed)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How vectors come of their levels: a 1 is put behind these, all are multiplied by the matrix
    of the vector's row, and then turned by RoPE. There is one for all vectors of a codec.

    Number i of a vector and its partner are turned together: x[i] becomes cos[i] * x[i] + sin[i] *
    x[partner]. Of the first `turned` numbers, the partner of i is `turned / 2` away; the others
    stay.

    Attributes:
        digits: where the levels lie, byte after byte.
        along: (rows, levels + 1, head_dim) float32.
        turns: (kinds, 2, reference_length, turned) float32; cos and sin of each position. None:
            nothing is turned.
        kinds: (layers,) int64; which of them turns the rows of a layer.
    """

    digits: tuple[Digits, ...]
    along: NDArray[np.float32]
    turns: NDArray[np.float32] | None
    kinds: NDArray[np.int64]

    def __repr__(self) -> str:
        rows, levels, head_dim = self.along.shape
        return f"Recipe({rows} rows, {levels - 1} levels, head_dim={head_dim})"


@dataclass(frozen=True)
class Levels:
    """Vectors as levels along axes.

    Attributes:
        codes: (bytes of a vector, n) uint8.
        recipe: of what they are levels.
    """

    codes: NDArray[np.uint8]
    recipe: Recipe

    def __repr__(self) -> str:
        return f"Levels({self.codes.shape[1]} vectors, {self.recipe})"


#: What a codec leaves to be computed.
CodedVectors = Scaled | Levels
