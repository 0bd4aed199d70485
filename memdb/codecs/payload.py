"""A memory as the payload of its record (storage_format.md, Memories), whatever the codec."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb.codecs.base import Codec, Layout, Part, slices
from memdb.codecs.coded_vectors import CodedVectors, Scaled
from memdb.codecs.exact import Exact
from memdb.codecs.int8 import Int8
from memdb.errors import FormatError, InvalidInputError, MismatchError
from memdb.types.memory import ExplicitMemory, read_only
from memdb.types.memory_batch import MemoryBatch, row_name
from memdb.types.shape import MemoryShape

#: What memories are kept by until a codec is fitted, and those that a codec would lose too much of.
STAND_IN: Codec = Int8()
_EXACT: Codec = Exact()  # where that is too much for the stand-in

_HEAD = struct.Struct("<QIII")  # shape's fingerprint, pairs, bytes of the keys, of the values
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # its bits


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
    counts = np.diff(memory.offsets)[None]
    return _encode(counts, memory.positions, memory.keys, memory.values, shape, codec)[0]


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
    payloads = _encode(counts, batch.positions, batch.keys, batch.values, shape, codec)
    if batch.warm is None:
        return [*payloads]
    rest = iter(payloads)
    return [next(rest) if warm else None for warm in batch.warm.tolist()]


def _encode(
    counts: NDArray[np.integer[Any]],
    positions: NDArray[np.unsignedinteger[Any]],
    keys: NDArray[Any],
    values: NDArray[Any],
    shape: MemoryShape,
    codec: Codec,
) -> list[bytes]:
    """The payloads of checked memories, given their (memories, rows) counts."""
    if not len(counts):
        return []
    layout = Layout.dense(counts, positions)
    coded = zip(
        codec.encode("keys", keys, layout, shape),
        codec.encode("values", values, layout, shape),
        strict=True,
    )
    row_counts = slices(counts.astype("<u2"), np.ones(len(counts), np.int64))
    places = slices(positions, layout.sizes)
    ends = np.cumsum(layout.sizes)
    payloads = []
    for i, (key_bytes, value_bytes) in enumerate(coded):
        if key_bytes is None or value_bytes is None:  # the codec would lose too much of it
            own = slice(int(ends[i] - layout.sizes[i]), int(ends[i]))
            arrays = positions[own], keys[own], values[own]
            next_best = _EXACT if codec is STAND_IN else STAND_IN
            payloads += _encode(counts[i : i + 1], *arrays, shape, next_best)
            continue
        label = codec.name.encode("ascii")
        head = _HEAD.pack(shape.fingerprint, int(layout.sizes[i]), len(key_bytes), len(value_bytes))
        parts = bytes([len(label)]), label, head, row_counts[i], places[i], key_bytes, value_bytes
        payloads.append(b"".join(parts))
    return payloads


@dataclass(frozen=True)
class Coded:
    """A memory whose vectors are not decoded yet.

    Attributes:
        codec: name of the codec that wrote it.
        counts: (rows,) pairs of each row.
        positions: (pairs,) uint8 or uint16.
        keys: as the codec wrote them.
        values: likewise.
    """

    codec: str
    counts: NDArray[np.integer[Any]]
    positions: NDArray[np.unsignedinteger[Any]]
    keys: memoryview
    values: memoryview


def read_payload(payload: bytes | memoryview, shape: MemoryShape) -> Coded:
    """The sections of a payload, which it shares.

    Raises:
        MismatchError: it is a memory of another shape.
        ValueError: the bytes are no memory (the store names the record).
    """
    data = memoryview(payload)
    label = codec_of(data)
    at = 1 + data[0]
    try:
        fingerprint, pairs, key_bytes, value_bytes = _HEAD.unpack_from(data, at)
    except struct.error as error:
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
    total = int(counts.sum(dtype=np.int64))
    if total != pairs:
        raise ValueError(f"its rows hold {total} pairs, its head says {pairs}")
    positions = np.frombuffer(sections[1], shape.position_dtype)
    return Coded(label, counts, positions, sections[2], sections[3])


def decode_memory(
    payload: bytes | memoryview, shape: MemoryShape, codecs: Mapping[str, Codec]
) -> ExplicitMemory:
    """The memory that `encode_memory` gave, up to the codec's loss; its arrays are read-only.

    Raises:
        MismatchError: it is a memory of another shape.
        FormatError: a codec wrote it that is not among `codecs`.
        ValueError: the bytes are no memory (the store names the record).
    """
    coded = read_payload(payload, shape)
    layout = Layout.dense(coded.counts, coded.positions)
    keys, values = (np.empty((layout.vectors, shape.head_dim), shape.storage_dtype) for _ in "kv")
    decode_into([coded], layout, shape, codecs, keys, values)
    offsets = np.zeros(shape.rows + 1, np.int32)
    np.cumsum(coded.counts, out=offsets[1:])
    return ExplicitMemory(*map(read_only, (offsets, coded.positions.copy(), keys, values)))


def decode_into(
    memories: Sequence[Coded],
    layout: Layout,
    shape: MemoryShape,
    codecs: Mapping[str, Codec],
    keys: NDArray[Any],
    values: NDArray[Any],
) -> None:
    """Decode memories of one codec at once into arrays that are there (`Codec.decode`).

    Raises:
        FormatError: that codec is not among `codecs`.
        ValueError: the bytes of one are not what its codec wrote.
    """
    codec = _codec_of(memories, layout, shape, codecs)
    codec.decode("keys", [memory.keys for memory in memories], layout, shape, keys)
    codec.decode("values", [memory.values for memory in memories], layout, shape, values)


def read_vectors(
    memories: Sequence[Coded],
    layout: Layout,
    shape: MemoryShape,
    codecs: Mapping[str, Codec],
) -> tuple[CodedVectors, CodedVectors]:
    """Keys and values of memories of one codec, memory after memory, as far as they have to be
    computed here. `layout` has them side by side, in this order.

    Raises:
        FormatError: that codec is not among `codecs`.
        ValueError: the bytes of one are not what its codec wrote.
    """
    codec = _codec_of(memories, layout, shape, codecs)

    def read(part: Part, sections: Sequence[memoryview]) -> CodedVectors:
        coded = codec.coded_vectors(part, sections, layout, shape)
        if coded is None:
            out = np.empty((layout.vectors, shape.head_dim), shape.storage_dtype)
            codec.decode(part, sections, layout, shape, out)
            coded = Scaled(out)
        return coded

    keys = read("keys", [memory.keys for memory in memories])
    return keys, read("values", [memory.values for memory in memories])


def _codec_of(
    memories: Sequence[Coded], layout: Layout, shape: MemoryShape, codecs: Mapping[str, Codec]
) -> Codec:
    """The codec of several memories, whose positions are those of a reference."""
    if layout.positions.max(initial=0) >= shape.reference_length:
        raise ValueError(
            f"a position is outside the {shape.reference_length} tokens of a reference"
        )
    name = memories[0].codec
    try:
        return codecs[name]
    except KeyError:
        raise FormatError(
            f"the memory was written by codec {name!r}, which this release does not have; use a "
            "newer release of explicit-memdb"
        ) from None


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


def codec_of(payload: bytes | memoryview) -> str:
    """The name of the codec that wrote a memory; ValueError if the bytes have none."""
    try:
        return bytes(payload[1 : 1 + payload[0]]).decode("ascii")
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"the memory's head does not decode ({error})") from error


def memory_sizes(payload: bytes | memoryview) -> tuple[int, int]:
    """Of a memory's payload: its pairs, and the bytes of its coded keys and values together;
    ValueError if the bytes have no head."""
    try:
        _, pairs, key_bytes, value_bytes = _HEAD.unpack_from(payload, 1 + payload[0])
    except (struct.error, IndexError) as error:
        raise ValueError(f"the memory's head does not decode ({error})") from error
    return int(pairs), int(key_bytes + value_bytes)
