"""The plumbing all codecs share: a memory as bytes.

A codec codes vectors alone. Which tokens of which head they belong to (the CSR arrays) is stored
as it is, by `encode_memory`; storage_format.md gives the bytes.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memdb.errors import FormatError, InvalidInputError, MismatchError
from memdb.records import DType, ExplicitMemory, MemoryShape, to_float32

#: (rows,): how many pairs each row of a memory has.
Counts = NDArray[np.integer[Any]]

_HEAD = struct.Struct("<QIII")  # shape's fingerprint, pairs, bytes of the keys, of the values


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


def encode_memory(memory: ExplicitMemory, shape: MemoryShape, codec: Codec) -> bytes:
    """A memory as the payload of its record.

    Raises:
        MismatchError: it is not a memory of that shape.
        InvalidInputError: a key or value is NaN or infinite; the place is named.
    """
    memory.require(shape)
    for name, vectors in (("key", memory.keys), ("value", memory.values)):
        _require_finite(name, vectors, memory, shape)
    label = codec.name.encode("ascii")
    counts = np.diff(memory.offsets).astype("<u2")
    keys = codec.encode(memory.keys, counts, shape.dtype)
    values = codec.encode(memory.values, counts, shape.dtype)
    return b"".join(
        [
            bytes([len(label)]),
            label,
            _HEAD.pack(shape.fingerprint, memory.pairs, len(keys), len(values)),
            counts.tobytes(),
            memory.positions.astype(shape.position_dtype).tobytes(),
            keys,
            values,
        ]
    )


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
    name: str, vectors: NDArray[Any], memory: ExplicitMemory, shape: MemoryShape
) -> None:
    finite = np.isfinite(to_float32(vectors, shape.dtype))
    if finite.all():
        return
    pair, dim = (int(i) for i in np.argwhere(~finite)[0])
    row = int(np.searchsorted(memory.offsets, pair, side="right")) - 1
    layer, head = shape.layers[row // shape.kv_heads], row % shape.kv_heads
    raise InvalidInputError(
        f"explicit memory: the {name} of layer {layer}, kv head {head}, token position "
        f"{memory.positions[pair]} is not finite (dimension {dim})"
    )
