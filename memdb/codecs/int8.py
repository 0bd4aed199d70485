"""8 bits a number, one scale a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec, Layout, Part, cut, joined, put
from memdb.codecs.coded_vectors import Scaled
from memdb.codecs.floor import keeps_vectors, only, share
from memdb.types.memory import from_float32, to_float32
from memdb.types.shape import DType, MemoryShape

# 127 times this is float32's second largest number; 127 times the next scale would be infinite.
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
_FEW = 512  # numbers of a vector
_TINY = {"float32": 2.0**-136, "float16": 2.0**-19, "bfloat16": 2.0**-126}  # scales
_BLOCK = 512  # vectors quantized at once: what they take on the way stays in the processor's cache


class Int8(Codec):
    """Symmetric absmax quantization: x is about scale * q, with q an int8 in -127..127 and
    scale = max|x| / 127 (float32) for each vector.

    The error of a number is at most half its vector's scale, and the rounding to the model's dtype.
    (Below 2**-119, where scales have few bits left, it may be 2**-143 more.) head_dim + 4 bytes a
    vector: 1.9 times smaller than bfloat16 at head_dim 64.
    """

    name = "int8"

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        """n float32 scales, then n * head_dim int8 levels."""
        scales, levels = _quantize(vectors, shape.dtype)
        sections = cut([scales, levels], layout.sizes)
        if _surely_keeps(vectors, scales, shape):
            return [*sections]
        scale = np.where(scales > 0, scales, 1).astype(np.float64)
        exact = to_float32(vectors, shape.dtype) / scale[:, None]
        return only(
            sections, keeps_vectors(share(self.name, part), layout, shape, scale, exact, levels)
        )

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; scale * q."""
        scales, levels = joined(sections, layout.sizes, [4, shape.head_dim])
        x = levels.view(np.int8).astype(np.float32)
        x *= scales.view("<f4")
        put(from_float32(x, shape.dtype), layout.places, out)

    def coded_vectors(
        self, part: Part, sections: Sequence[memoryview], layout: Layout, shape: MemoryShape
    ) -> Scaled:
        """See `Codec.coded_vectors`."""
        scales, levels = joined(sections, layout.sizes, [4, shape.head_dim])
        return Scaled(levels.view(np.int8), scales.view("<f4")[:, 0])


def _surely_keeps(vectors: NDArray[Any], scales: NDArray[np.float32], shape: MemoryShape) -> bool:
    """Whether all vectors lose so little that nobody need look. At most half a scale of each number
    is lost, of a vector as long as 127 scales at least: below 0.01 of its squared length, unless it
    has many numbers, or so small ones that scale or dtype have few bits left for them."""
    tiny = scales < _TINY[shape.dtype]
    return shape.head_dim <= _FEW and not (tiny.any() and vectors[tiny].any())


def _quantize(vectors: NDArray[Any], dtype: DType) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """(n,) scales and (n, head_dim) levels."""
    scales = np.empty(len(vectors), "<f4")
    levels = np.empty(vectors.shape, np.int8)
    for start in range(0, len(vectors), _BLOCK):
        block = slice(start, start + _BLOCK)
        x = to_float32(vectors[block], dtype)
        scale = np.abs(x).max(axis=1, initial=0.0) / np.float32(127)
        scales[block] = scale = np.minimum(scale, _LARGEST_SCALE)
        # In float64: near float32's smallest numbers the scale has few bits left.
        q = x / np.where(scale > 0, scale, 1)[:, None].astype(np.float64)
        np.rint(q, out=q)
        np.clip(q, -127, 127, out=q)
        levels[block] = q
    return scales, levels
