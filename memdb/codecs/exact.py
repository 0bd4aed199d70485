"""Vectors as the model computed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from memdb.codecs.base import Codec, Layout, Part, joined, put, slices
from memdb.codecs.coded_vectors import Scaled
from memdb.types.shape import MemoryShape


class Exact(Codec):
    """float32, float16 or bfloat16 as it is, little-endian; no loss.

    Use it to measure other codecs against, or where disk is cheap.
    """

    name = "exact"

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes]:
        """head_dim numbers of 4 or 2 bytes, vector after vector: one run of bytes, which is cut."""
        return slices(vectors.astype(shape.storage_dtype, copy=False), layout.sizes)

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; every bit comes back."""
        width = shape.head_dim * shape.storage_dtype.itemsize
        (data,) = joined(sections, layout.sizes, [width])
        put(data.view(shape.storage_dtype), layout.places, out)

    def coded_vectors(
        self, part: Part, sections: Sequence[memoryview], layout: Layout, shape: MemoryShape
    ) -> Scaled:
        """See `Codec.coded_vectors`; they are the vectors."""
        width = shape.head_dim * shape.storage_dtype.itemsize
        (data,) = joined(sections, layout.sizes, [width])
        return Scaled(data.view(shape.storage_dtype))
