"""A GGUF file: its head, and rows of its tensors as float32.

The head is read here and not by the package `gguf`, whose reader makes objects of every token and
every merge (0.5 GB and some seconds), and which does not say where a file that is cut short ends.
The numbers are that package's: it knows each kind of quantization.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from memdb import InvalidInputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, unless the head says another
_MOST_DIMENSIONS = 8
#: Types of values: 8 is a text, 9 a list; the others by their format.
_TEXT, _LIST = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS[12] = "d"
_ELSE = "take the model in another quantization (Q8_0, Q4_K_M), or as a Hugging Face folder"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: of the file.
        name: as the file calls it.
        kind: how it is quantized, as the file numbers it.
        shape: of its numbers; rows first.
        start: where in the file it begins, bytes.
        size: its bytes.
    """

    path: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """What lies at `start` to `end` along the first axis, dequantized."""
        if len(self.shape) == 1:  # short, and quantized as one row if at all
            return self._read(self.start, self.size, self.size)[0, start:end]
        width = self.size // self.shape[0]
        line = self.size // int(np.prod(self.shape[:-1]))
        values = self._read(self.start + start * width, (end - start) * width, line)
        return values.reshape(end - start, *self.shape[1:])

    def _read(self, start: int, length: int, line: int) -> NDArray[np.float32]:
        """Bytes of the file as (lines, numbers)."""
        stored = np.empty(length, np.uint8)
        with self.path.open("rb") as file:  # read, not mapped: what is touched of a map is memory
            file.seek(start)
            if file.readinto(stored.data) != length:
                raise InvalidInputError(
                    f"the GGUF file '{self.path}' ends before its tensor {self.name} does: it "
                    "changed while it was read"
                )
        values = dequantize(stored.reshape(-1, line), GGMLQuantizationType(self.kind))
        return np.asarray(values, np.float32)

    def require_readable(self) -> None:
        """Raise `InvalidInputError` if its kind of quantization is not known."""
        try:
            kind = GGMLQuantizationType(self.kind)
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InvalidInputError(
                f"the tensor {self.name} of '{self.path}' is quantized as {_called(self.kind)}, "
                f"which is not read here: {_ELSE}"
            ) from error


@dataclass(frozen=True)
class GGUFFile:
    """A file.

    Attributes:
        path: of it.
        fields: what its head says, but for lists.
        tensors: by their names in it.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the head.

        Raises:
            InvalidInputError: it is no GGUF file, of a version or a kind of quantization that is
                not known, damaged, or cut short.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                magic = file.read(4)
                if magic != _MAGIC:
                    raise InvalidInputError(
                        f"'{path}' is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}"
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    head = _Head(mapped)
                    return cls(path, *_read(path, head, size))
        except OSError as error:
            raise InvalidInputError(f"the GGUF file '{path}' cannot be read: {error}") from error
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise InvalidInputError(
                f"the head of the GGUF file '{path}' is damaged or cut short ({size} bytes are "
                "there): get the file again"
            ) from error


def opened(parts: Sequence[Path]) -> tuple[GGUFFile, dict[str, Stored]]:
    """The first file of a model, and the tensors of all.

    Raises:
        InvalidInputError: see `GGUFFile.open`.
    """
    files = [GGUFFile.open(part) for part in parts]
    tensors = {name: one for file in files for name, one in file.tensors.items()}
    return files[0], tensors


class _Head:
    """Values of a head, one after another."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._bytes = mapped
        self.at = 4

    def number(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self._bytes, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0]

    def text(self) -> str:
        return self._taken(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """A value; None for a list, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            self._pass_list()
            return None
        return self.number(_known(kind))

    def _pass_list(self) -> None:
        kind, length = self.number("I"), self.number("Q")
        if kind not in (_TEXT, _LIST):
            self._taken(length * struct.calcsize("<" + _known(kind)))
            return
        for _ in range(length):
            if kind == _TEXT:
                self._taken(self.number("Q"))
            else:
                self._pass_list()

    def _taken(self, length: int) -> bytes:
        if self.at + length > len(self._bytes):
            raise IndexError
        self.at += length
        # Of a long list nothing is copied.
        return self._bytes[self.at - length : self.at] if length < 1 << 20 else b""


def _known(kind: int) -> str:
    if kind not in _FORMATS:
        raise IndexError
    return _FORMATS[kind]


def _read(path: Path, head: _Head, size: int) -> tuple[dict[str, Any], dict[str, Stored]]:
    version = head.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        is_of = "big-endian" if swapped else f"of version {version}"
        raise InvalidInputError(
            f"the GGUF file '{path}' is {is_of}; versions 2 and 3 in little-endian are read: "
            "convert the model anew with llama.cpp, or take it as a Hugging Face folder"
        )
    count, fields = head.number("Q"), {}
    for _ in range(head.number("Q")):
        name = head.text()
        fields[name] = head.value(head.number("I"))
    begun = []
    for _ in range(count):
        name, dimensions = head.text(), head.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise IndexError
        shape = tuple(reversed([head.number("Q") for _ in range(dimensions)]))
        begun.append((name, shape, head.number("I"), head.number("Q")))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise IndexError
    data = -(-head.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in begun:
        length = _size(path, name, shape, kind)
        tensors[name] = Stored(path, name, kind, shape, data + offset, length)
        if data + offset + length > size:
            raise InvalidInputError(
                f"the GGUF file '{path}' is cut short: it has {size} bytes, and its tensor {name} "
                f"ends at {data + offset + length}. Get the file again."
            )
    return fields, tensors


def _size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor."""
    try:
        numbers, length = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise InvalidInputError(
            f"the tensor {name} of '{path}' is quantized as {_called(kind)}, which is not read "
            f"here: {_ELSE}"
        ) from error
    if not shape or shape[-1] % numbers:
        raise IndexError
    return int(np.prod(shape, dtype=object)) // numbers * length


def _called(kind: int) -> str:
    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"kind {kind}"
