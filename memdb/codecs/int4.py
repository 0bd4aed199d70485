"""4 bits a number, one scale a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec, Layout, Part, cut, joined, put
from memdb.codecs.bits import pack_bits, spread, unpack_scales, upward_scales
from memdb.codecs.floor import keeps_vectors, only, share
from memdb.types.memory import from_float32, to_float32
from memdb.types.shape import MemoryShape

_LEVELS = np.arange(-8, 8, dtype=np.float32)  # -8 is never written


class Int4(Codec):
    """Symmetric absmax quantization: x is about scale * q, with q in -7..7 and scale the next
    bfloat16 that is not less than max|x| / 7, for each vector.

    The error of a number is at most half its vector's scale, and the rounding to the model's dtype.
    head_dim / 2 + 2 bytes a vector: 3.8 times smaller than bfloat16 at head_dim 64.
    """

    name = "int4"

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        """n bfloat16 scales, then q + 8 of every number, two to a byte."""
        x = to_float32(vectors, shape.dtype)
        scales = upward_scales(np.abs(x).max(axis=1, initial=0.0).astype(np.float64) / 7, 7)
        scale = unpack_scales(scales).astype(np.float64)
        scale[scale == 0] = 1
        exact = x / scale
        q = np.clip(np.rint(exact), -7, 7)
        kept = keeps_vectors(share(self.name, part), layout, shape, scale[:, 0], exact, q)
        codes = (q + 8).astype(np.uint8)
        return only(cut([scales, pack_bits(codes, 4)], layout.sizes), kept)

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; scale * q."""
        d = shape.head_dim
        scales, codes = joined(sections, layout.sizes, [2, (d + 1) // 2])
        x = spread(codes, _LEVELS, 4, d)
        x *= unpack_scales(scales)
        put(from_float32(x, shape.dtype), layout.places, out)
