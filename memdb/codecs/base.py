"""What a codec is: the vectors of memories to bytes, and back into the arrays that are wanted.

A codec codes vectors alone. Which tokens of which head they belong to is stored as it is
(`memdb.codecs.payload`), and a codec is told: it may code a row as a whole, or look at positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.coded_vectors import CodedVectors
from memdb.types.memory import read_only
from memdb.types.shape import MemoryShape

#: Which vectors of a memory: they have statistics of their own, and keys are turned by RoPE.
Part = Literal["keys", "values"]

#: Told of the steps of a fit: how many are done, of how many. What it raises ends the fit.
Steps = Callable[[int, int], None]


@dataclass(frozen=True)
class Layout:
    """Where the vectors of several memories come from, and where they go.

    They come memory after memory, row after row, as in `MemoryBatch`. Decoded, those of a row of a
    memory stand side by side. Given `starts` for the rows alone, those of row 0 of all memories
    stand side by side, from `starts[0]` on, then those of row 1. Of a single memory that is the
    same order.

    Attributes:
        counts: (memories, rows) int64; pairs of each row of each memory.
        positions: (n,) uint8 or uint16; token positions.
        starts: (rows,) int64; place of each row's first vector; or (memories, rows), of each
            memory's first in the row.
    """

    counts: NDArray[np.int64]
    positions: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.int64]

    @classmethod
    def dense(
        cls, counts: NDArray[np.integer[Any]], positions: NDArray[np.unsignedinteger[Any]]
    ) -> Layout:
        """Rows without gaps between them; counts (rows,) of one memory, or (memories, rows)."""
        by_row = np.atleast_2d(counts).astype(np.int64)
        return cls(by_row, positions, _before(by_row.sum(axis=0)))

    @property
    def vectors(self) -> int:
        """How many there are."""
        return len(self.positions)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(memories,): vectors of each."""
        return read_only(self.counts.sum(axis=1))

    @cached_property
    def row_sizes(self) -> NDArray[np.int64]:
        """(rows,): vectors of each row, of all memories."""
        return read_only(self.counts.sum(axis=0))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """(n,): where each vector goes."""
        return read_only(self._places(self.starts))

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(n,): the vectors' numbers, by row."""
        order = np.empty(self.vectors, np.int64)
        order[self._places(_before(self.row_sizes))] = np.arange(self.vectors)
        return read_only(order)

    def _places(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        if starts.ndim == 1:  # behind those of earlier memories in the same row
            starts = starts + np.cumsum(self.counts, axis=0) - self.counts
        counts = self.counts.ravel()
        shift = starts.ravel() - _before(counts)
        places: NDArray[np.int64] = np.arange(self.vectors) + np.repeat(shift, counts)
        return places


class Codec(ABC):
    """The keys, or the values, of memories to bytes and back. It never changes.

    The bytes may be of any length, which the record keeps.

    Attributes:
        name: at most 255 ASCII characters, stored in every record that the codec wrote.
    """

    name: str

    @abstractmethod
    def encode(
        self, part: Part, vectors: NDArray[Any], layout: Layout, shape: MemoryShape
    ) -> Sequence[bytes | None]:
        """The bytes of each memory. Those of several are the same as one by one. None: the codec
        would lose more of it than it may (`memdb.codecs.floor`), so another has to keep it.

        Args:
            part: what the vectors are.
            vectors: (n, head_dim), finite, `shape.storage_dtype`, memory after memory.
            layout: of the same memories.
            shape: theirs.
        """

    @abstractmethod
    def decode(
        self,
        part: Part,
        sections: Sequence[memoryview],
        layout: Layout,
        shape: MemoryShape,
        out: NDArray[Any],
    ) -> None:
        """The inverse of `encode`, up to the codec's loss.

        Args:
            part: as for `encode`.
            sections: what `encode` gave, for each memory; nothing of them is kept.
            layout: of the memories, and where their vectors go.
            shape: as for `encode`.
            out: (places, head_dim), `shape.storage_dtype`; vector j goes to `layout.places[j]`,
                other places stay as they are.

        Raises:
            ValueError: a section has not the length that is due.
        """

    def coded_vectors(
        self, part: Part, sections: Sequence[memoryview], layout: Layout, shape: MemoryShape
    ) -> CodedVectors | None:
        """What is left to compute once the bytes of several memories are read, for who computes
        it elsewhere; memory after memory, wherever `layout` has places for them. None: nobody but
        `decode` can.

        Raises:
            ValueError: as `decode`.
        """
        return None


class FittedCodec(Codec):
    """A codec with parameters that were fitted to memories of one database and lie in it.

    Attributes:
        name: `family:` and 16 hexadecimal digits, a hash of the parameters: so the name of a
            fitted codec, too, never changes its meaning.
        parameters: bytes from which `Family.load` makes the same codec.
    """

    parameters: bytes


def no_steps(done: int, total: int) -> None:
    """The `Steps` that say nothing."""


class Family(ABC):
    """A kind of codec that has to be fitted first.

    Attributes:
        name: what users ask for.
        enough: memories that have to be there before it fits itself.
        sample: memories to fit it to, at most.
    """

    name: str
    enough: ClassVar[int]
    sample: ClassVar[int]

    @abstractmethod
    def fit(
        self,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        layout: Layout,
        shape: MemoryShape,
        told: Steps = no_steps,
    ) -> FittedCodec:
        """A codec for memories like these.

        Args:
            keys: (n, head_dim) of all memories, memory after memory; after RoPE.
            values: likewise.
            layout: of the same memories.
            shape: theirs.
            told: called every few seconds at least.
        """

    @abstractmethod
    def load(self, parameters: bytes) -> FittedCodec:
        """The codec with these parameters; ValueError if they are damaged."""


def joined(
    sections: Sequence[memoryview], sizes: NDArray[np.int64], widths: Sequence[int]
) -> list[NDArray[np.uint8]]:
    """Sections that hold, one after the other, several fields of so many bytes for each of their
    vectors: every field for all vectors, (n, width) uint8.

    Raises:
        ValueError: a section has not the length that is due.
    """
    fields: list[list[NDArray[np.uint8]]] = [[] for _ in widths]
    for section, size in zip(sections, sizes.tolist(), strict=True):
        require_bytes(section, size * sum(widths))
        data, at = np.frombuffer(section, np.uint8), 0
        for field, width in zip(fields, widths, strict=True):
            field.append(data[at : at + size * width].reshape(size, width))
            at += size * width
    return [field[0] if len(field) == 1 else np.concatenate(field) for field in fields]


def cut(fields: Sequence[NDArray[Any]], sizes: NDArray[np.int64]) -> list[bytes]:
    """The inverse of `joined`: of each memory the bytes of every field, one after the other."""
    if len(fields) == 1:
        return slices(fields[0], sizes)
    parts = [slices(field, sizes) for field in fields]
    return [b"".join(memory) for memory in zip(*parts, strict=True)]


def put(vectors: NDArray[Any], places: NDArray[np.int64], out: NDArray[Any]) -> None:
    """`out[places] = vectors`, which takes numpy twice as long number by number.

    Args:
        vectors: (n, head_dim), the dtype of `out`.
        places: (n,).
        out: (any, head_dim).
    """
    if not vectors.size:
        return
    row = np.dtype((np.void, out.shape[1] * out.itemsize))
    out.view(row)[:, 0][places] = np.ascontiguousarray(vectors).view(row)[:, 0]


def require_bytes(data: memoryview, due: int) -> None:
    """Raise ValueError unless the data has the length that is due."""
    if len(data) != due:
        raise ValueError(f"its vectors have {len(data)} bytes where {due} are due")


def slices(array: NDArray[Any], sizes: NDArray[np.integer[Any]]) -> list[bytes]:
    """The bytes of consecutive parts of an array, row after row.

    Args:
        array: (n, ...).
        sizes: rows of each part; their sum is n.
    """
    if not array.size:
        return [b""] * len(sizes)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    ends = (np.cumsum(sizes) * (len(data) // len(array))).tolist()
    return [bytes(data[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _before(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many come before each."""
    before: NDArray[np.int64] = np.cumsum(sizes) - sizes
    return before
