"""2, 3 or 4 bits a number without training: a rotation, then levels for a normal number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec, Layout, Part, cut, joined, put
from memdb.codecs.bits import code_bytes, nearest_scales, pack_bits, spread, unpack_scales
from memdb.codecs.floor import keeps_vectors, only, share
from memdb.types.memory import from_float32, read_only, to_float32
from memdb.types.shape import MemoryShape

#: Positive levels of the quantizer that errs least on a standard normal number (Lloyd, 1957;
#: Max, 1960), by bits. The negative ones mirror them.
LEVELS: dict[int, tuple[float, ...]] = {
    2: (0.45278, 1.51042),
    3: (0.24509, 0.75601, 1.34391, 2.15195),
    4: (0.12840, 0.38804, 0.65676, 0.94234, 1.25622, 1.61805, 2.06902, 2.73259),
}
_LARGEST = np.finfo(np.float32).max


class Rotated(Codec):
    """A vector is turned by a fixed rotation, after which its numbers are about normal whatever
    it was, divided by their root mean square (bfloat16), and each rounded to one of 2**bits levels.

    TurboQuant (Zandieh et al., 2025, arXiv 2504.19874), without its residual bit; the rotation as
    in RaBitQ (Gao and Long, 2024). head_dim * bits / 8 + 2 bytes a vector: at head_dim 64, with 4,
    3 and 2 bits 3.8, 4.9 and 7.1 times smaller than bfloat16.

    Args:
        bits: 2, 3 or 4.
    """

    def __init__(self, bits: int) -> None:
        self.name = f"rotated{bits}"
        self._bits = bits
        positive = np.array(LEVELS[bits], np.float32)
        self._levels = np.concatenate([-positive[::-1], positive])
        self._bounds = (self._levels[1:] + self._levels[:-1]) / np.float32(2)

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        """n bfloat16 scales, then the number of the level of every number of every vector."""
        x = to_float32(vectors, shape.dtype).astype(np.float64)
        scales = nearest_scales(np.sqrt(np.mean(x * x, axis=1)))
        scale = unpack_scales(scales).astype(np.float64)
        scale[scale == 0] = 1
        y = (x / scale) @ rotation(shape.head_dim)
        codes = np.searchsorted(self._bounds, y.astype(np.float32)).astype(np.uint8)
        found = self._levels[codes]
        kept = keeps_vectors(share(self.name, part), layout, shape, scale[:, 0], y, found)
        return only(cut([scales, pack_bits(codes, self._bits)], layout.sizes), kept)

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; scale * (levels turned back)."""
        d = shape.head_dim
        scales, codes = joined(sections, layout.sizes, [2, code_bytes(self._bits, d)])
        scale = unpack_scales(scales)
        x = spread(codes, self._levels, self._bits, d) @ _back(d)
        with np.errstate(over="ignore", invalid="ignore"):
            x *= scale
        if scale.max(initial=0.0) > 1e30:
            np.clip(x, -_LARGEST, _LARGEST, out=x)
        put(from_float32(x, shape.dtype), layout.places, out)


@cache
def rotation(d: int) -> NDArray[np.float64]:
    """(d, d): what a vector is multiplied by, from the right: S1 C S2 C, with C the orthonormal
    discrete cosine transform (DCT-II) and S1, S2 diagonals of random signs, which are the bits,
    least first, of SHAKE-128 of the text `memdb rotation`, -1 where the bit is 1."""
    n = np.arange(d)
    cosines = np.sqrt(2 / d) * np.cos(np.pi / d * (n[:, None] + 0.5) * n)
    cosines[:, 0] = np.sqrt(1 / d)
    data = np.frombuffer(hashlib.shake_128(b"memdb rotation").digest((2 * d + 7) // 8), np.uint8)
    signs = 1.0 - 2.0 * np.unpackbits(data, bitorder="little")[: 2 * d]
    return read_only((signs[:d, None] * cosines * signs[d:]) @ cosines)


@cache
def _back(d: int) -> NDArray[np.float32]:
    return read_only(np.ascontiguousarray(rotation(d).T.astype(np.float32)))
