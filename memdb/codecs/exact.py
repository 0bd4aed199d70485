"""Vectors as the model computed them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec, Counts, require_bytes, slices
from memdb.records import STORAGE_DTYPES, DType


class Exact(Codec):
    """float32, float16 or bfloat16 as it is, little-endian; no loss.

    Use it to measure other codecs against, or where disk is cheap.
    """

    name = "exact"

    def encode(self, vectors: NDArray[Any], counts: Counts, dtype: DType) -> bytes:
        """(n, head_dim) as n * head_dim numbers of 4 or 2 bytes, vector after vector."""
        return np.ascontiguousarray(vectors, STORAGE_DTYPES[dtype]).tobytes()

    def encode_each(
        self,
        vectors: NDArray[Any],
        sizes: NDArray[np.integer[Any]],
        counts: Counts,
        dtype: DType,
    ) -> list[bytes]:
        """The numbers of all memories are one run of bytes, which is cut."""
        return slices(vectors.astype(STORAGE_DTYPES[dtype], copy=False), sizes)

    def decode(self, data: memoryview, counts: Counts, head_dim: int, dtype: DType) -> NDArray[Any]:
        """(n, head_dim), a copy, so that it outlives the transaction that read it."""
        n, stored = int(counts.sum()), STORAGE_DTYPES[dtype]
        require_bytes(data, n * head_dim * stored.itemsize)
        return np.frombuffer(data, stored).reshape(n, head_dim).copy()
