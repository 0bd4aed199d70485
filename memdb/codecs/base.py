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

from memdb.errors import FormatError, InvalidInputError
from memdb.records import DType, ExplicitMemory, MemoryShape, to_float32

_HEAD = struct.Struct("<I")  # number of pairs


class Codec(ABC):
    """Vectors of a model dtype to bytes and back. Stateless; the bytes are self-contained.

    Attributes:
        name: at most 255 ASCII characters, stored in every record that the codec wrote.
    """

    name: ClassVar[str]

    @abstractmethod
    def vector_bytes(self, head_dim: int, dtype: DType) -> int:
        """Bytes that one vector takes."""

    @abstractmethod
    def encode(self, vectors: NDArray[Any], dtype: DType) -> bytes:
        """(n, head_dim) finite vectors in the storage dtype of `dtype`: n * vector_bytes bytes."""

    @abstractmethod
    def decode(self, data: memoryview, n: int, head_dim: int, dtype: DType) -> NDArray[Any]:
        """The inverse of `encode`, (n, head_dim) in the storage dtype, up to the codec's loss."""


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
    return b"".join(
        [
            bytes([len(label)]),
            label,
            _HEAD.pack(memory.pairs),
            counts.tobytes(),
            memory.positions.astype(shape.position_dtype).tobytes(),
            codec.encode(memory.keys, shape.dtype),
            codec.encode(memory.values, shape.dtype),
        ]
    )


def decode_memory(
    payload: bytes | memoryview, shape: MemoryShape, codecs: Mapping[str, Codec]
) -> ExplicitMemory:
    """The memory that `encode_memory` gave, up to the codec's loss.

    Raises:
        FormatError: a codec wrote it that is not among `codecs`.
        ValueError: the bytes are no memory of that shape (the store names the record).
    """
    data = memoryview(payload)
    try:
        label = bytes(data[1 : 1 + data[0]]).decode("ascii")
        at = 1 + data[0]
        (pairs,) = _HEAD.unpack_from(data, at)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"the memory's head does not decode ({error})") from error
    if label not in codecs:
        raise FormatError(
            f"a memory was written by codec {label!r}, which this release does not have; use a "
            "newer release of explicit-memdb"
        )
    codec = codecs[label]
    at += _HEAD.size
    width = codec.vector_bytes(shape.head_dim, shape.dtype) * pairs
    parts = [2 * shape.rows, shape.position_dtype.itemsize * pairs, width, width]
    if at + sum(parts) != len(data):
        raise ValueError(f"it has {len(data)} bytes where {at + sum(parts)} are due")
    sections = []
    for size in parts:
        sections.append(data[at : at + size])
        at += size
    offsets = np.zeros(shape.rows + 1, np.int32)
    np.cumsum(np.frombuffer(sections[0], "<u2"), out=offsets[1:])
    if offsets[-1] != pairs:
        raise ValueError(f"its rows hold {offsets[-1]} pairs, its head says {pairs}")
    return ExplicitMemory(
        offsets=offsets,
        positions=np.frombuffer(sections[1], shape.position_dtype).copy(),
        keys=codec.decode(sections[2], pairs, shape.head_dim, shape.dtype),
        values=codec.decode(sections[3], pairs, shape.head_dim, shape.dtype),
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
