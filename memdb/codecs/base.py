"""The plumbing all codecs share: a memory as bytes.

A codec codes vectors alone. Which tokens of which head they belong to (the CSR arrays) is stored
as it is, by `encode_memory` and `encode_batch`; storage_format.md gives the bytes.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memdb.batch import MemoryBatch, row_name
from memdb.errors import FormatError, InvalidInputError, MismatchError
from memdb.records import DType, ExplicitMemory, MemoryShape

#: (rows,): how many pairs each row of a memory has.
Counts = NDArray[np.integer[Any]]

_HEAD = struct.Struct("<QIII")  # shape's fingerprint, pairs, bytes of the keys, of the values
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # its bits


class Codec(ABC):
    """The keys, or the values, of one memory to bytes and back. Stateless.

    The bytes may be of any length, which the record keeps. The vectors come row by row, as in
    `ExplicitMemory`, with the number of each row's: a codec may code a row as a whole.

    Attributes:
        name: at most 255 ASCII characters, stored in every record that the codec wrote.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, vectors: NDArray[Any], counts: Counts, dtype: DType) -> bytes:
        """Vectors as bytes.

        Args:
            vectors: (n, head_dim), finite, in the storage dtype of `dtype`.
            counts: (rows,) pairs of each row of the memory; their sum is n.
            dtype: what the model computes in.
        """

    def encode_each(
        self,
        vectors: NDArray[Any],
        sizes: NDArray[np.integer[Any]],
        counts: Counts,
        dtype: DType,
    ) -> list[bytes]:
        """Several memories at once: for each of them what `encode` gives. A codec that has a
        faster way than one after the other overrides this.

        Args:
            vectors: (n, head_dim), memory after memory, else as for `encode`.
            sizes: (memories,) vectors of each memory; their sum is n.
            counts: (memories, rows) pairs of each row; the sums of the rows are `sizes`.
            dtype: as for `encode`.
        """
        parts = np.split(vectors, np.cumsum(sizes)[:-1])
        return [self.encode(part, rows, dtype) for part, rows in zip(parts, counts, strict=True)]

    @abstractmethod
    def decode(self, data: memoryview, counts: Counts, head_dim: int, dtype: DType) -> NDArray[Any]:
        """The inverse of `encode`, up to the codec's loss.

        Args:
            data: what `encode` gave; the result does not keep it.
            counts: as for `encode`.
            head_dim: length of a vector.
            dtype: as for `encode`.

        Returns:
            (n, head_dim) in the storage dtype of `dtype`.

        Raises:
            ValueError: the data has not the length that is due.
        """


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


def require_whole(memory: ExplicitMemory, shape: MemoryShape) -> None:
    """Raise unless this is a memory that may be stored.

    Raises:
        MismatchError: it is not a memory of that shape.
        InvalidInputError: a key or value is NaN or infinite; the place is named.
    """
    memory.require(shape)

    def place(pair: int) -> str:
        row = int(np.searchsorted(memory.offsets, pair, side="right")) - 1
        return f"explicit memory: the {{}} of {row_name(row, shape)}"

    _require_finite(memory, shape, place)


def encode_memory(memory: ExplicitMemory, shape: MemoryShape, codec: Codec) -> bytes:
    """A memory as the payload of its record.

    Raises:
        MismatchError: it is not a memory of that shape.
        InvalidInputError: a key or value is NaN or infinite; the place is named.
    """
    require_whole(memory, shape)
    counts = np.diff(memory.offsets).astype("<u2")
    return _payload(
        _name(codec),
        shape,
        memory.pairs,
        counts.tobytes(),
        memory.positions.tobytes(),
        codec.encode(memory.keys, counts, shape.dtype),
        codec.encode(memory.values, counts, shape.dtype),
    )


def encode_batch(batch: MemoryBatch, shape: MemoryShape, codec: Codec) -> list[bytes | None]:
    """The payload of each reference's memory, byte for byte that of `encode_memory`; None where
    the reference is cold.

    Raises:
        MismatchError: they are not memories of that shape; the reference is named.
        InvalidInputError: a key or value is NaN or infinite; reference and place are named.
    """
    batch.require(shape)

    def place(pair: int) -> str:
        reference, row = batch.place(pair)
        return f"explicit memory of reference {reference}: the {{}} of {row_name(row, shape)}"

    _require_finite(batch, shape, place)
    # A cold reference has no pairs: without its counts, the arrays are those of the others.
    counts = batch.counts if batch.warm is None else batch.counts[batch.warm]
    payloads = _encode(batch, counts.astype("<u2"), shape, codec)
    if batch.warm is None:
        return [*payloads]
    rest = iter(payloads)
    return [next(rest) if warm else None for warm in batch.warm.tolist()]


def _encode(batch: MemoryBatch, counts: Counts, shape: MemoryShape, codec: Codec) -> list[bytes]:
    """The payloads of a checked batch, given the (n, rows) counts of the warm references."""
    if not len(counts):
        return []
    name = _name(codec)
    sizes = counts.sum(axis=1, dtype=np.int64)
    sections = zip(
        sizes.tolist(),
        slices(counts, np.ones(len(counts), np.int64)),
        slices(batch.positions, sizes),
        codec.encode_each(batch.keys, sizes, counts, shape.dtype),
        codec.encode_each(batch.values, sizes, counts, shape.dtype),
        strict=True,
    )
    return [_payload(name, shape, *section) for section in sections]


def _name(codec: Codec) -> bytes:
    label = codec.name.encode("ascii")
    return bytes([len(label)]) + label


def _payload(
    name: bytes,
    shape: MemoryShape,
    pairs: int,
    counts: bytes,
    positions: bytes,
    keys: bytes,
    values: bytes,
) -> bytes:
    """The record's payload (storage_format.md, Memories), given its sections."""
    head = _HEAD.pack(shape.fingerprint, pairs, len(keys), len(values))
    return b"".join((name, head, counts, positions, keys, values))


def decode_memory(
    payload: bytes | memoryview, shape: MemoryShape, codecs: Mapping[str, Codec]
) -> ExplicitMemory:
    """The memory that `encode_memory` gave, up to the codec's loss.

    Raises:
        MismatchError: it is a memory of another shape.
        FormatError: a codec wrote it that is not among `codecs`.
        ValueError: the bytes are no memory (the store names the record).
    """
    data = memoryview(payload)
    try:
        label = bytes(data[1 : 1 + data[0]]).decode("ascii")
        at = 1 + data[0]
        fingerprint, pairs, key_bytes, value_bytes = _HEAD.unpack_from(data, at)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"the memory's head does not decode ({error})") from error
    if fingerprint != shape.fingerprint:
        raise MismatchError(
            f"the memory was written for another memory shape (fingerprint {fingerprint:016x}) "
            f"than this database has ({shape.fingerprint:016x}). It is not damaged; to use its "
            "document here, delete it and ingest it again"
        )
    at += _HEAD.size
    parts = [2 * shape.rows, shape.position_dtype.itemsize * pairs, key_bytes, value_bytes]
    if at + sum(parts) != len(data):
        raise ValueError(f"it has {len(data)} bytes where {at + sum(parts)} are due")
    sections = []
    for size in parts:
        sections.append(data[at : at + size])
        at += size
    counts = np.frombuffer(sections[0], "<u2")
    offsets = np.zeros(shape.rows + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] != pairs:
        raise ValueError(f"its rows hold {offsets[-1]} pairs, its head says {pairs}")
    if label not in codecs:
        raise FormatError(
            f"the memory was written by codec {label!r}, which this release does not have; use a "
            "newer release of explicit-memdb"
        )
    codec = codecs[label]
    return ExplicitMemory(
        offsets=offsets,
        positions=np.frombuffer(sections[1], shape.position_dtype).copy(),
        keys=codec.decode(sections[2], counts, shape.head_dim, shape.dtype),
        values=codec.decode(sections[3], counts, shape.head_dim, shape.dtype),
    )


def _require_finite(
    memory: ExplicitMemory | MemoryBatch, shape: MemoryShape, place: Callable[[int], str]
) -> None:
    """Refuse NaN and infinity. `place` says in words where a pair is, {} being the vector's name.

    By the bits, since that is faster than `np.isfinite`, above all for the 16-bit dtypes: read as
    integers, infinity and NaN are the largest numbers of either sign.
    """
    infinity = _INFINITY[shape.dtype]
    for name, vectors in (("key", memory.keys), ("value", memory.values)):
        size = vectors.itemsize
        bits = vectors.view(f"<u{size}")
        negative = infinity | 1 << (8 * size - 1)
        if bits.view(f"<i{size}").max(initial=0) < infinity and bits.max(initial=0) < negative:
            continue
        pair, dim = (int(i) for i in np.argwhere(bits & infinity == infinity)[0])
        raise InvalidInputError(
            f"{place(pair).format(name)}, token position {memory.positions[pair]} is not finite "
            f"(dimension {dim})"
        )


def memory_sizes(payload: bytes | memoryview) -> tuple[int, int]:
    """Of a memory's payload: its pairs, and the bytes of its coded keys and values together."""
    _, pairs, key_bytes, value_bytes = _HEAD.unpack_from(payload, 1 + payload[0])
    return int(pairs), int(key_bytes + value_bytes)
