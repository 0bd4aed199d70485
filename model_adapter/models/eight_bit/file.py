"""The file of a model's weights of 8 bits: safetensors, of which is read what is asked for.

A matrix `NAME` that is rounded is two tensors, `NAME.numbers` and `NAME.scales` (see `rounding`);
what is not stays float32 under its own name. All numbers come first, then all scales, then the
rest, each in the order of the model: so matrices that are multiplied with the same rows lie side by
side, and are one. The header's metadata say by which release it was
made, and the fingerprint of the weights before they were rounded. What else is needed to read by
them (see `described`) is there too: what is short, as JSON among the metadata, and a long text as a
tensor of its bytes.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdb import InvalidInputError
from model_adapter.models.eight_bit.rounding import BLOCK, blocks, rounded
from model_adapter.models.fingerprint import combined, digest_of

#: Changes with the meaning of the file; another one is made anew.
FORMAT = "3"

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
_ROWS = 4096  # of a matrix that are rounded at once
_TEXT = "text:"  # before the name of a text: no weight is called so


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file: `length` bytes from `start` on."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Matrix:
    """A rounded matrix: its tensors' names, and its own shape."""

    numbers: str
    scales: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Source:
    """A weight to be written.

    Attributes:
        shape: its shape.
        rows: rows `start` to `end` of it (of a scalar: itself), any floating dtype.
        rounded: whether it is rounded to 8 bits; a matrix then.
        counts: whether it is a parameter, which the fingerprint counts.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]
    rounded: bool
    counts: bool


class WeightFile:
    """An open file.

    Attributes:
        path: of the file.
        places: by name of the tensor.
        matrices: the rounded ones by name.
        fingerprint: of the weights before they were rounded.
        of: the folder that they were in; empty: they were in none.
        described: what else is known of the model, a JSON object; None: nothing.

    Raises:
        InvalidInputError: it is damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            size = os.fstat(self._descriptor).st_size
            (length,) = struct.unpack("<Q", self._read(0, 8))
            if length > size:
                raise ValueError("its header ends behind its end")
            header = json.loads(self._read(8, length))
            about = header.pop("__metadata__")
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']}")
            self.fingerprint = str(about["fingerprint"])
            self.of = str(about["of"])
            self.described: Mapping[str, Any] | None = json.loads(about["described"])
            columns: Mapping[str, int] = json.loads(about["columns"])
            self.places = {
                name: Place(
                    _DTYPES[one["dtype"]],
                    tuple(one["shape"]),
                    8 + length + one["data_offsets"][0],
                    one["data_offsets"][1] - one["data_offsets"][0],
                )
                for name, one in header.items()
            }
            end = max(place.start + place.length for place in self.places.values())
            if size != end:
                raise ValueError(f"it has {size} bytes of {end}")
            self.matrices = {
                name: Matrix(
                    f"{name}.numbers",
                    f"{name}.scales",
                    self.places[f"{name}.numbers"].shape[0],
                    wide,
                )
                for name, wide in columns.items()
            }
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise InvalidInputError(f"'{path}' holds no weights of 8 bits: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file."""
        place = self.places[name]
        values = np.frombuffer(self._read(place.start, place.length), place.dtype)
        return torch.from_numpy(values.reshape(place.shape))

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, (rows, ...). They are read and not mapped: with a page that is
        touched come its neighbours, and an embedding table would fill memory that nobody asks
        for."""
        place = self.places[name]
        length = place.length // place.shape[0]
        read = bytearray().join(
            os.pread(self._descriptor, length, place.start + row * length) for row in rows
        )
        values = np.frombuffer(read, place.dtype).reshape(len(rows), *place.shape[1:])
        return torch.from_numpy(values)

    def text(self, name: str) -> str:
        """A text of the file."""
        place = self.places[_TEXT + name]
        return self._read(place.start, place.length).decode()

    def _read(self, start: int, length: int) -> bytearray:
        """Bytes of the file. No seek: several threads read, and processes that were forked."""
        read = bytearray(os.pread(self._descriptor, length, start))
        while len(read) < length:  # a call gives 2 GB at most
            more = os.pread(self._descriptor, length - len(read), start + len(read))
            if not more:
                raise OSError(f"'{self.path}' has become shorter")
            read += more
        return read


def write(
    path: Path,
    sources: Mapping[str, Source],
    fingerprint: str | None = None,
    of: str = "",
    described: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write weights, some rows of one at a time.

    Args:
        path: of the file; it is whole when it is there under another name: rename it.
        sources: by name.
        fingerprint: to record; default: theirs, as `weights_fingerprint` has it.
        of: the folder that they come from, to record; empty: they come from none.
        described: what else to record of the model.
        texts: likewise, long ones.
    """
    header: dict[str, Any] = {}
    columns = {name: one.shape[1] for name, one in sources.items() if one.rounded}
    end = 0

    def place(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        length = int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length

    for name in columns:
        rows, wide = sources[name].shape
        place(f"{name}.numbers", "U8", (rows, blocks(wide), BLOCK))
    for name in columns:
        rows, wide = sources[name].shape
        place(f"{name}.scales", "F32", (rows, blocks(wide)))
    for name, one in sources.items():
        if not one.rounded:
            place(name, "F32", one.shape)
    encoded = {_TEXT + name: text.encode() for name, text in texts.items()}
    for name, bytes_ in encoded.items():
        place(name, "U8", (len(bytes_),))
    about = {
        "format": FORMAT,
        "fingerprint": "0" * 32,
        "columns": json.dumps(columns),
        "of": of,
        "described": json.dumps(described),
    }
    begun = _header(about, header)
    digests = []
    with path.open("wb") as file:
        file.write(begun)
        at = {name: len(begun) + one["data_offsets"][0] for name, one in header.items()}

        def add(name: str, values: Tensor) -> None:
            file.seek(at[name])
            at[name] += file.write(values.numpy().tobytes())

        for name, one in sources.items():
            digest = digest_of(one.shape)
            for some in _parts(one):
                # In passing: nobody reads the weights twice.
                digest.update(memoryview(some.reshape(-1).numpy()))  # type: ignore[arg-type]
                if one.rounded:
                    numbers, scales = rounded(some)
                    add(f"{name}.numbers", numbers)
                    add(f"{name}.scales", scales)
                else:
                    add(name, some)
            if one.counts:
                digests.append(digest)
        for name, bytes_ in encoded.items():
            file.seek(at[name])
            file.write(bytes_)
        about["fingerprint"] = combined(digests) if fingerprint is None else fingerprint
        file.seek(0)
        file.write(_header(about, header))


def _header(about: Mapping[str, str], header: Mapping[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": about, **header}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parts(source: Source) -> Iterator[Tensor]:
    """A weight's rows, some at a time, contiguous float32."""
    if len(source.shape) < 2:
        yield source.rows(0, source.shape[0] if source.shape else 1).float().contiguous()
        return
    for start in range(0, source.shape[0], _ROWS):
        yield source.rows(start, min(start + _ROWS, source.shape[0])).float().contiguous()
