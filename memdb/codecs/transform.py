"""The trained codec: principal axes of every head, even steps along them, and a Huffman code."""

from __future__ import annotations

import math
import operator
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.axes import LARGEST, Axes, Stream
from memdb.codecs.base import FittedCodec, Layout, Part
from memdb.codecs.centre import Centre
from memdb.codecs.coded_vectors import Levels
from memdb.codecs.floor import Losses, keeps_rows, only, share
from memdb.codecs.parameters import fitted_name, read_parameters, write_parameters
from memdb.codecs.transform_decode import Decoder
from memdb.types.memory import to_float32
from memdb.types.shape import MemoryShape

_FARTHEST = 1e36  # of a number that is decoded: float32 holds the sums on the way to it


class Transform(FittedCodec):
    """Transform coding (Huang and Schultheiss, 1963; Goyal, 2001), as pictures and sound are coded.

    Keys are taken before RoPE. Each (layer, kv head) has its mean, which is taken off, and its
    principal axes (Karhunen-Loève transform), along which what is left is uncorrelated. The number
    along each axis is divided by a step and rounded: wide axes get many bits, narrow ones few or
    none. The levels go through a Huffman code (DEFLATE without matches), several to a byte where
    they are small.

    Args:
        family: the name of its family.
        keys: how keys are coded.
        values: how values are coded.
    """

    def __init__(self, family: str, keys: Axes, values: Axes) -> None:
        self._family = family
        self._axes: dict[Part, Axes] = {"keys": keys, "values": values}
        self.parameters = _written(self._axes)
        self.name = fitted_name(family, self.parameters)
        self._decoders: dict[Part, Decoder] = {
            part: Decoder(own) for part, own in self._axes.items()
        }

    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> list[bytes | None]:
        """For each stream the bytes of its code, then the codes (DEFLATE)."""
        sections, losses = self.sections(part, vectors, layout, shape)
        scales = self._axes[part].centre.scales
        return only(sections, keeps_rows(share(self._family, part), layout, shape, scales, losses))

    def sections(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> tuple[list[bytes], Losses]:
        """As `encode`, of all memories; and what they lose."""
        axes = self._axes[part]
        levels, losses = _levels(axes, vectors, layout, shape)
        coded = []
        at = 0
        for size in layout.sizes.tolist():
            coded.append(_coded(levels[at : at + size], axes.streams) if size else b"")
            at += size
        return coded, losses

    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`; levels times steps along the axes, the mean, and RoPE."""
        self._decoders[part](sections, layout, shape, out)

    def coded_vectors(
        self, part: Part, sections: Sequence[memoryview], layout: Layout, shape: MemoryShape
    ) -> Levels:
        """See `Codec.coded_vectors`; the codes, inflated."""
        return self._decoders[part].coded(sections, layout, shape)


def read_transform(family: str, parameters: bytes) -> Transform:
    """The codec with these parameters; ValueError if they are damaged."""
    values, arrays = read_parameters(parameters)
    axes: list[Axes] = []
    try:
        for part in ("keys", "values"):
            centre = Centre.read(arrays, part)
            streams = tuple(Stream(*map(operator.index, s)) for s in values[part]["streams"])
            step, basis = float(values[part]["step"]), arrays[f"{part}.basis"]
            axes.append(Axes(centre, step, basis, streams))
            _require_whole(axes[-1], part)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a field is missing, or of a wrong type ({error!r})") from error
    return Transform(family, *axes)


def _require_whole(axes: Axes, part: str) -> None:
    """Raise ValueError unless the streams are all of the axes, and the axes those of the rows."""
    rows, d = axes.centre.means.shape
    if not 0 < axes.step < math.inf:
        raise ValueError(f"the step of its {part} is {axes.step}, not a finite number above 0")
    if axes.basis.dtype != np.float16 or axes.basis.shape != (rows, axes.kept, d):
        raise ValueError(f"the axes of its {part} do not have the rows of the means")
    lengths = np.square(axes.basis, dtype=np.float64).sum(axis=2)
    if not ((lengths > 0) & np.isfinite(lengths)).all():
        raise ValueError(f"an axis of its {part} has no length, or is not finite")
    first = 0
    for stream in axes.streams:
        if stream.first != first or stream.count < 1 or stream.packed not in LARGEST:
            raise ValueError(f"the streams of its {part} do not follow one another along the axes")
        first += stream.count
    if first != axes.kept or not first:
        raise ValueError(f"the streams of its {part} hold {first} of {axes.kept} axes")


def _written(axes: dict[Part, Axes]) -> bytes:
    values: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for part, own in axes.items():
        streams = [[s.first, s.count, s.packed] for s in own.streams]
        values[part] = {"step": own.step, "streams": streams}
        arrays[f"{part}.means"] = own.centre.means
        arrays[f"{part}.scales"] = own.centre.scales
        arrays[f"{part}.basis"] = own.basis
        if own.centre.angles is not None:
            arrays[f"{part}.angles"] = own.centre.angles
    return write_parameters(values, arrays)


def _levels(
    axes: Axes, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
) -> tuple[NDArray[np.int8], Losses]:
    """The levels of each vector, memory after memory, (n, kept), and what is lost by them, infinite
    where what is decoded may be no float32. In float64, so that a memory's do not depend on those
    beside it."""
    x = to_float32(vectors, shape.dtype)[layout.order].astype(np.float64)
    turns = axes.centre.turns(shape)
    if turns is not None:
        turns(x, layout.row_sizes, layout.positions[layout.order], back=True)
    limits = np.concatenate([np.full(s.count, LARGEST[s.packed]) for s in axes.streams])
    levels = np.empty((layout.vectors, axes.kept), np.int8)
    losses = Losses.empty(layout.vectors)
    units = axes.units.astype(np.float64)
    at = 0
    for row, size in enumerate(layout.row_sizes.tolist()):
        if size:
            own, given = layout.order[at : at + size], x[at : at + size]
            mean, basis = axes.centre.means[row], axes.basis[row].astype(np.float64)
            along = basis / (units[row] * np.square(basis).sum(axis=1, keepdims=True))
            about = given - mean
            whole = np.clip(np.rint(about @ along.T), -limits, limits)
            levels[own] = whole
            found = whole @ basis * min(units[row], _FARTHEST)
            losses.note(own, given, about, found)
            far = (np.abs(found) + np.abs(mean)).max(axis=1) > _FARTHEST
            losses.lost[own[far | (units[row] > _FARTHEST)]] = np.inf
            at += size
    return levels, losses


def _coded(levels: NDArray[np.int8], streams: Sequence[Stream]) -> bytes:
    """The section of one memory, given its (n, kept) levels."""
    codes = []
    for stream in streams:
        largest = LARGEST[stream.packed]
        digits = np.full((stream.width * stream.packed, len(levels)), largest, np.int16)
        digits[: stream.count] += levels[:, stream.first : stream.first + stream.count].T
        data = np.zeros((stream.width, len(levels)), np.int16)
        for digit in range(stream.packed):
            data += digits[digit :: stream.packed] * np.int16((2 * largest + 1) ** digit)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        codes.append(deflate.compress(data.astype(np.uint8).tobytes()) + deflate.flush())
    return struct.pack(f"<{len(codes)}I", *map(len, codes)) + b"".join(codes)
