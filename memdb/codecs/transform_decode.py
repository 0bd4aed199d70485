"""Decoding what `Transform` wrote: from DEFLATE to levels, and from levels to vectors.

Vectors are computed block by block: what a block takes on the way stays in the processor's cache.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from memdb.codecs.axes import LARGEST, Axes, Stream
from memdb.codecs.base import Layout, put, require_bytes
from memdb.codecs.coded_vectors import Digits, Levels, Recipe
from memdb.codecs.scratch import Scratch
from memdb.types.memory import from_float32
from memdb.types.native import of_the_machine
from memdb.types.shape import MemoryShape

_BLOCK = 2000  # vectors; not a power of 2, so that the columns of a block share no cache line
_SCRATCH = Scratch()
_REFUSED = cast(type[Exception], isal_zlib.error)  # its stubs say that it is one, not a kind of it


class Decoder:
    """Decodes the keys, or the values. Threads may share it.

    Args:
        axes: of them.
    """

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._width = sum(stream.width for stream in axes.streams)
        self._groups = tuple(_joined(axes.streams))
        with np.errstate(over="ignore", invalid="ignore"):
            along = axes.basis.astype(np.float32) * axes.units[:, None, None]
        #: (rows, kept + 1, head_dim): what levels and a 1 are multiplied by.
        self._along = np.concatenate([along, axes.centre.means[:, None]], axis=1)
        self._recipes: dict[int, Recipe] = {}

    def __call__(
        self,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """See `Codec.decode`."""
        levels = self._levels(sections, layout)
        turns = self._axes.centre.turns(shape)
        positions, places = layout.positions[layout.order], layout.places[layout.order]
        numbers = _SCRATCH.array("numbers", (self._axes.kept + 1, _BLOCK), np.float32)
        numbers[-1] = 1  # for the mean
        room = _SCRATCH.array("found", (_BLOCK, shape.head_dim), np.float32)
        at = 0
        for sizes in _blocks(layout.row_sizes):
            ends = np.cumsum(sizes)
            end = at + int(ends[-1])
            found = room[: end - at]
            numbers[:-1, : end - at] = levels[:, at:end]
            for row in np.flatnonzero(sizes).tolist():
                own = slice(int(ends[row] - sizes[row]), int(ends[row]))
                np.matmul(numbers[:, own].T, self._along[row], out=found[own])
            if turns is not None:
                turns(found, sizes, positions[at:end])
            put(from_float32(found, shape.dtype), places[at:end], out)
            at = end

    def _levels(self, sections: Sequence[memoryview], layout: Layout) -> NDArray[np.int8]:
        """The levels along every axis, row after row, (kept, n)."""
        codes = self._codes(sections, layout)
        levels = _SCRATCH.array("levels", (self._axes.kept, layout.vectors), np.uint8)
        byte = 0
        for group in self._groups:
            data = codes[byte : byte + group.width]
            byte += group.width
            largest, base = LARGEST[group.packed], np.uint8(2 * LARGEST[group.packed] + 1)
            _require_digits(data, group)
            end = group.first + group.count
            for digit in range(group.packed):
                to = levels[group.first + digit : end : group.packed]
                own = data[: len(to)]
                if digit == group.packed - 1:
                    np.subtract(own, np.uint8(largest), out=to)
                else:
                    rest = _SCRATCH.array(f"rest {digit}", data.shape, np.uint8)
                    np.floor_divide(data, base, out=rest)
                    np.multiply(rest[: len(to)], base, out=to)
                    np.subtract(own, to, out=to)
                    to -= np.uint8(largest)
                    data = rest
        return levels.view(np.int8)

    def _codes(self, sections: Sequence[memoryview], layout: Layout) -> NDArray[np.uint8]:
        """The bytes of all streams, row after row, (width, n)."""
        memories = self._memories(sections, layout)
        if len(memories) == 1:
            return memories[0]
        shape = self._width, layout.vectors
        together = _SCRATCH.array("together", shape, np.uint8)
        codes = _SCRATCH.array("codes", shape, np.uint8)
        if memories:
            np.concatenate(memories, axis=1, out=together)
            together.take(layout.order, axis=1, out=codes, mode="clip")
        return codes

    def _memories(self, sections: Sequence[memoryview], layout: Layout) -> list[NDArray[np.uint8]]:
        """The bytes of all streams, (width, n), of each memory that has any."""
        memories = []
        for section, size in zip(sections, layout.sizes.tolist(), strict=True):
            if size:
                data = _inflated(section, self._axes.streams, size)
                memories.append(np.frombuffer(data, np.uint8).reshape(self._width, size))
            else:
                require_bytes(section, 0)
        return memories

    def coded(self, sections: Sequence[memoryview], layout: Layout, shape: MemoryShape) -> Levels:
        """See `Codec.coded_vectors`."""
        memories = [np.empty((self._width, 0), np.uint8), *self._memories(sections, layout)]
        codes = memories[-1] if len(memories) < 3 else np.concatenate(memories, axis=1)
        byte = 0
        for group in self._groups:
            _require_digits(codes[byte : byte + group.width], group)
            byte += group.width
        return Levels(codes, self._recipe(shape))

    def _recipe(self, shape: MemoryShape) -> Recipe:
        if shape.fingerprint not in self._recipes:  # of one database there is one
            digits = tuple(
                Digits(g.first, g.count, g.packed, LARGEST[g.packed]) for g in self._groups
            )
            turns = self._axes.centre.turns(shape)
            layers = len(shape.layers)
            tables, kinds = (None, np.zeros(layers, np.int64)) if turns is None else turns.tables()
            self._recipes[shape.fingerprint] = Recipe(digits, self._along, tables, kinds)
        return self._recipes[shape.fingerprint]


def _require_digits(data: NDArray[np.uint8], group: Stream) -> None:
    if data.max(initial=0) >= (2 * LARGEST[group.packed] + 1) ** group.packed:
        raise ValueError("its vectors hold a code that stands for nothing")


def _joined(streams: Sequence[Stream]) -> Iterator[Stream]:
    """Streams side by side that can be taken as one: as many numbers to a byte, all bytes full."""
    last: Stream | None = None
    for stream in streams:
        if last is not None and last.packed == stream.packed and last.count % last.packed == 0:
            last = Stream(last.first, last.count + stream.count, last.packed)
            continue
        if last is not None:
            yield last
        last = stream
    if last is not None:
        yield last


def _blocks(row_sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The vectors, row after row, in blocks: how many of each row are in a block."""
    ends = np.cumsum(row_sizes)
    for start in range(0, int(ends[-1]), _BLOCK):
        inside = np.clip(ends - start, 0, _BLOCK)
        yield np.diff(inside, prepend=0)


def _inflated(section: memoryview, streams: Sequence[Stream], size: int) -> bytes:
    """The bytes of all streams of one memory of so many vectors, one stream after the other."""
    at = 4 * len(streams)
    if len(section) < at:
        raise ValueError(f"its vectors have {len(section)} bytes where at least {at} are due")
    lengths = struct.unpack_from(f"<{len(streams)}I", section)
    require_bytes(section, at + sum(lengths))
    found = []
    for stream, length in zip(streams, lengths, strict=True):
        inflate, due = isal_zlib.decompressobj(-15), size * stream.width
        try:
            data = inflate.decompress(section[at : at + length], due + 1)
        except _REFUSED as error:
            damaged = ValueError(f"its vectors do not decode ({error})")
            raise (of_the_machine(error) or damaged) from error
        if len(data) != due or not inflate.eof or inflate.unused_data:
            raise ValueError(f"its vectors are {len(data)} codes where {due} are due")
        found.append(data)
        at += length
    return b"".join(found)
