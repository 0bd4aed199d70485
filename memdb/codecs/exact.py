"""Vectors as the model computed them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec
from memdb.records import STORAGE_DTYPES, DType


class Exact(Codec):
    """float32, float16 or bfloat16 as it is, little-endian; no loss.

    Use it to measure other codecs against, or where disk is cheap.
    """

    name = "exact"

    def vector_bytes(self, head_dim: int, dtype: DType) -> int:
        """4 or 2 bytes a number."""
        return head_dim * STORAGE_DTYPES[dtype].itemsize

    def encode(self, vectors: NDArray[Any], dtype: DType) -> bytes:
        """The array's bytes, row by row."""
        return np.ascontiguousarray(vectors, STORAGE_DTYPES[dtype]).tobytes()

    def decode(self, data: memoryview, n: int, head_dim: int, dtype: DType) -> NDArray[Any]:
        """A copy, so that it outlives the transaction that read it."""
        return np.frombuffer(data, STORAGE_DTYPES[dtype]).reshape(n, head_dim).copy()
