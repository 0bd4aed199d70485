"""A part's .safetensors file, read a few references at a time."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from memdb.errors import InvalidInputError
from memdb.exchange.files import cannot_read, require_regular, short

_HEADER_LIMIT = 1 << 20  # bytes; a part's header has a few hundred
_BLOCK = 1 << 20
#: What a dtype of the file becomes in numpy; those that no tensor of a part may have are left out.
_DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}
INTEGERS = ("U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")
#: How keys and values of each model dtype may be stored.
VECTORS = {"float32": ("F32",), "float16": ("F16",), "bfloat16": ("BF16", "U16")}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, as the header says.

    Attributes:
        dtype: as safetensors names it.
        shape: as given; its bytes are there.
        start: where they begin in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize


class TensorFile:
    """An open .safetensors file. Its header is checked against the file's size before anything
    else is read, and never more than what is asked for is held in memory. Use as a context manager.

    Attributes:
        tensors: by name.
        metadata: of the file.

    Raises:
        InvalidInputError: it is missing, or no such file.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path)
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise cannot_read(path, error) from error
        try:
            self.tensors, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def wrong(self, problem: str) -> InvalidInputError:
        """What to raise about this file."""
        return InvalidInputError(f"'{self.path}': {problem}")

    def require(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> Tensor:
        """A tensor that must be there; None in `shape`: any length.

        Raises:
            InvalidInputError: it is missing, or of another dtype or shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self.wrong(f"the tensor '{name}' is missing")
        fits = len(tensor.shape) == len(shape) and all(
            due is None or due == found for due, found in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype not in dtypes or not fits:
            due = ", ".join("?" if size is None else str(size) for size in shape)
            raise self.wrong(
                f"the tensor '{name}' must be {' or '.join(dtypes)} of shape [{due}], got "
                f"{tensor.dtype} of shape {list(tensor.shape)}"
            )
        return tensor

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries `start` to `stop` of a tensor, along its first dimension; BF16 comes as uint16,
        BOOL as uint8."""
        tensor = self.tensors[name]
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise self.wrong(
                f"the tensor '{name}' has {tensor.shape[0]} entries where {stop} are due"
            )
        array = np.empty((stop - start, *tensor.shape[1:]), _DTYPES[tensor.dtype])
        if array.size:
            row = array.nbytes // len(array)
            self._read_into(array.reshape(-1).view("u1").data, tensor.start + start * row)
        return array

    def checksum(self, name: str) -> str | None:
        """The checksum of a tensor, or of the `documents`, that the metadata has; None if there
        are no checksums at all: where there is one, none may be missing."""
        due = self.metadata.get(f"xxh3.{name}")
        if due is None and any(key.startswith("xxh3.") for key in self.metadata):
            raise self.wrong(f"it has checksums, and none of '{name}'; export again")
        return due

    def check(self, name: str) -> None:
        """Compare a tensor's bytes with its checksum, if there is one."""
        due = self.checksum(name)
        if due is None:
            return
        digest, tensor = xxhash.xxh3_64(), self.tensors[name]
        for at in range(0, tensor.nbytes, _BLOCK):
            block = bytearray(min(_BLOCK, tensor.nbytes - at))
            self._read_into(memoryview(block), tensor.start + at)
            digest.update(block)
        if digest.hexdigest() != due:
            raise self.wrong(
                f"the tensor '{name}' is damaged: its checksum does not match. Export again, or "
                "copy the file again"
            )

    def _read_into(self, buffer: memoryview, at: int) -> None:
        try:
            self._file.seek(at)
            read = self._file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise cannot_read(self.path, error) from error
        if read != len(buffer):
            raise self.wrong("it became shorter while it was read")

    def _header(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            size = self.path.stat().st_size
            (length,) = struct.unpack("<Q", self._file.read(8).ljust(8, b"\0"))
            if length > min(size - 8, _HEADER_LIMIT):
                raise self.wrong(
                    f"no .safetensors file of a part: its header claims {length} bytes of {size}"
                )
            with safe_open(self.path, framework="np"):  # no gaps, no overlaps, no bytes left over
                pass
            entries = json.loads(self._file.read(length))
        except OSError as error:
            raise cannot_read(self.path, error) from error
        except (SafetensorError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise self.wrong(f"no .safetensors file: {error}") from error
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {}
        for name, entry in entries.items():
            if entry["dtype"] not in _DTYPES:
                raise self.wrong(f"the tensor {short(name)} has the dtype {entry['dtype']}")
            begin, end = entry["data_offsets"]
            tensor = Tensor(entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            if tensor.nbytes != end - begin or tensor.start + tensor.nbytes > size:
                raise self.wrong(f"the tensor {short(name)} has not the bytes that its shape needs")
            tensors[name] = tensor
        return tensors, metadata
