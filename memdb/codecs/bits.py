"""Numbers of few bits: codes packed into bytes, and scales of two bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.types.memory import read_only

#: bits of a code -> codes looked up at once.
_GROUPS = {2: 4, 3: 4, 4: 2}


def code_bytes(bits: int, count: int) -> int:
    """Bytes of so many codes."""
    return (bits * count + 7) // 8


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of each vector as one number: code i is its bits from bits * i on, least first;
    (n, count) to (n, `code_bytes`), little-endian."""
    n, count = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -count % 8)))
    words = padded[:, ::8].astype("<u4")  # eight codes are a whole number of bytes
    for place in range(1, 8):
        words |= padded[:, place::8].astype("<u4") << np.uint32(bits * place)
    groups = words.shape[1]
    packed = words.view(np.uint8).reshape(n, groups, 4)[:, :, :bits].reshape(n, groups * bits)
    return np.ascontiguousarray(packed[:, : code_bytes(bits, count)])


def spread(
    data: NDArray[np.uint8], levels: NDArray[np.float32], bits: int, count: int
) -> NDArray[np.float32]:
    """The level of each code, (n, count), given packed codes; several are looked up at once."""
    if not len(data):
        return np.empty((0, count), np.float32)
    table = _table(levels.tobytes(), bits)
    index: NDArray[Any] = data
    if bits == 3:  # four codes are 12 bits: three bytes are looked up as two numbers of 12
        padded = np.pad(data, ((0, 0), (0, -data.shape[1] % 3)))
        three = padded.reshape(len(data), -1, 3).astype(np.uint16)
        index = np.empty((*three.shape[:2], 2), np.uint16)
        index[:, :, 0] = three[:, :, 0] | (three[:, :, 1] & 15) << 8
        index[:, :, 1] = three[:, :, 1] >> 4 | three[:, :, 2] << 4
    return table.take(index.reshape(len(data), -1)).view(np.float32)[:, :count]


@cache
def _table(levels: bytes, bits: int) -> NDArray[Any]:
    """For every number of a group of codes their levels side by side, as one item."""
    group = _GROUPS[bits]
    codes = np.arange(1 << bits * group)[:, None] >> bits * np.arange(group) & (1 << bits) - 1
    values = np.frombuffer(levels, np.float32)[codes]
    return read_only(np.ascontiguousarray(values).view(np.dtype((np.void, 4 * group)))[:, 0])


def nearest_scales(scales: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(n,) scales as bfloat16, rounded to nearest, ties to even; what is too large is the largest.
    (n, 2) bytes."""
    with np.errstate(over="ignore"):
        bits = scales.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return _bytes(np.minimum(rounded, 0x7F7F))


def upward_scales(scales: NDArray[np.float64], factor: int) -> NDArray[np.uint8]:
    """(n,) scales as bfloat16, rounded up, so small that `factor` times them is finite."""
    exact = scales.astype(np.float32)
    exact = np.where(exact < scales, np.nextafter(exact, np.float32(np.inf)), exact)
    bits = exact.view(np.uint32).astype(np.uint64)
    largest = (np.finfo(np.float32).max / np.float32(factor)).view(np.uint32) >> 16
    return _bytes(np.minimum((bits + 0xFFFF) >> 16, largest))


def unpack_scales(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 1) float32, given (n, 2) bytes."""
    return (data.reshape(-1).view("<u2").astype(np.uint32) << 16).view(np.float32)[:, None]


def _bytes(bits: NDArray[Any]) -> NDArray[np.uint8]:
    return bits.astype("<u2").view(np.uint8).reshape(-1, 2)
