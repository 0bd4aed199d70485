"""The memories of a part's references, in whichever form its .safetensors file has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memdb.errors import MismatchError
from memdb.exchange.tensors import INTEGERS, VECTORS, TensorFile
from memdb.types.memory_batch import MemoryBatch
from memdb.types.shape import MemoryShape


class Memories(ABC):
    """The memories of one file's references; they are read once, in order.

    Attributes:
        names: the tensors that they are in.
    """

    names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,): the bytes of each reference's memory, without reading it."""

    @abstractmethod
    def read(self, start: int, stop: int) -> list[bytes | None] | MemoryBatch | None:
        """What `Part.memories` is for these references."""

    def finish(self) -> None:
        """Raise `InvalidInputError` if the file has more than was read."""
        return


def memories_of(file: TensorFile, references: int, shape: MemoryShape | None) -> Memories:
    """The memories of an open file.

    Raises:
        InvalidInputError: tensors are missing, or are not those of so many references of that
            shape; the tensor is named.
    """
    names = set(file.tensors)
    stored, arrays = bool(names & {*Stored.names}), bool(names & {*Arrays.names})
    if not stored and not arrays:
        return Cold()
    if shape is None:
        raise file.wrong("it has memories, and the manifest has no 'shape' to say of what model")
    if stored and arrays:
        raise file.wrong(
            f"it has memories in two forms; keep either {' and '.join(Stored.names)}, or "
            f"{', '.join(Arrays.names)}"
        )
    return Stored(file, references) if stored else Arrays(file, references, shape)


class Cold(Memories):
    """There are none."""

    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Nothing, for each reference."""
        return np.zeros(stop - start, np.int64)

    def read(self, start: int, stop: int) -> None:
        """None: all are cold."""
        return


class Stored(Memories):
    """Payloads as in the table `memories`, one after the other."""

    names = ("memories", "memory_offsets")

    def __init__(self, file: TensorFile, references: int) -> None:
        self._file = file
        self._references = references
        (self._bytes,) = file.require("memories", ("U8",), (None,)).shape
        file.require("memory_offsets", ("I64",), (references + 1,))

    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Bytes of each payload; 0: cold."""
        return np.diff(self._offsets(start, stop))

    def read(self, start: int, stop: int) -> list[bytes | None]:
        """The payloads, as they are."""
        offsets = self._offsets(start, stop)
        data = self._file.read("memories", int(offsets[0]), int(offsets[-1])).data
        at = (offsets - offsets[0]).tolist()
        return [bytes(data[a:b]) or None for a, b in pairwise(at)]

    def finish(self) -> None:
        """The last offset is the end of the payloads."""
        end = int(self._offsets(self._references, self._references)[0])
        if end != self._bytes:
            raise self._file.wrong(
                f"'memory_offsets' end at {end}, 'memories' has {self._bytes} bytes"
            )

    def _offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        offsets = self._file.read("memory_offsets", start, stop + 1)
        if (
            (start == 0 and offsets[0] != 0)
            or offsets[0] < 0
            or (offsets[1:] < offsets[:-1]).any()
            or offsets[-1] > self._bytes
        ):
            raise self._file.wrong(
                f"'memory_offsets' must ascend from 0 to the {self._bytes} bytes of 'memories'; "
                f"they do not at references {start} to {stop}"
            )
        return offsets


class Arrays(Memories):
    """The arrays of a `MemoryBatch`."""

    names = ("counts", "positions", "keys", "values", "warm")

    def __init__(self, file: TensorFile, references: int, shape: MemoryShape) -> None:
        self._file = file
        self._shape = shape
        self._pair = 0  # where the next reference's begin
        file.require("counts", INTEGERS, (references, shape.rows))
        positions = {1: "U8", 2: "U16"}[shape.position_dtype.itemsize]
        (self._pairs,) = file.require("positions", (positions,), (None,)).shape
        for name in ("keys", "values"):
            due = self._pairs, shape.head_dim
            tensor = file.require(name, VECTORS[shape.dtype], due)
            if tensor.dtype == "U16" and file.metadata.get("dtype") != "bfloat16":
                raise file.wrong(
                    f"the tensor '{name}' is U16. If these are the bits of bfloat16, say so by "
                    '"dtype": "bfloat16" in the file\'s metadata, or store it as BF16'
                )
        self._has_warm = "warm" in file.tensors
        if self._has_warm:
            file.require("warm", ("U8", "BOOL"), (references,))

    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Bytes of each reference's positions, keys and values."""
        shape = self._shape
        each = shape.position_dtype.itemsize + 2 * shape.head_dim * shape.storage_dtype.itemsize
        return self._sums(self._file.read("counts", start, stop)) * each

    def read(self, start: int, stop: int) -> MemoryBatch:
        """The batch of these references, checked."""
        file = self._file
        counts = file.read("counts", start, stop)
        warm = file.read("warm", start, stop) if self._has_warm else None
        if warm is not None and warm.max(initial=0) > 1:
            raise file.wrong(f"'warm' must be 0 or 1, got {warm.max()} after reference {start}")
        end = self._pair + int(self._sums(counts).sum())
        batch = MemoryBatch(
            counts=counts,
            positions=file.read("positions", self._pair, end),
            keys=file.read("keys", self._pair, end),
            values=file.read("values", self._pair, end),
            warm=None if warm is None else warm.astype(bool),
        )
        try:
            batch.require(self._shape, first=start)
        except MismatchError as error:
            raise file.wrong(str(error)) from error
        self._pair = end
        return batch

    def finish(self) -> None:
        """The counts sum up to all pairs."""
        if self._pair != self._pairs:
            raise self._file.wrong(
                f"'counts' sum up to {self._pair} pairs, 'positions' has {self._pairs}"
            )

    def _sums(self, counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Pairs of each reference. Counts that are not sensible, whose sum might be anything, are
        taken for ones that are; `MemoryBatch.require` then refuses and names them."""
        sensible = np.clip(counts.astype(np.int64), 0, self._shape.reference_length)
        sums: NDArray[np.int64] = sensible.sum(axis=1)
        return sums
