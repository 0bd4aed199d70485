"""The file of a model's weights of 8 bits: safetensors, mapped.

A matrix `NAME` that is rounded is two tensors, `NAME.numbers` and `NAME.scales` (see `rounding`);
what is not stays float32 under its own name. All numbers come first, then all scales, then the
rest, each in the order of the model: so matrices that are multiplied with the same rows lie side by
side, and are one. The header's metadata say by which release it was
made, and the fingerprint of the weights before they were rounded.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdb import InvalidInputError
from model_adapter.models.eight_bit.rounding import BLOCK, blocks, rounded
from model_adapter.models.fingerprint import combined, digest_of

#: Changes with the meaning of the file; another one is made anew.
FORMAT = "2"

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
_ROWS = 4096  # of a matrix that are rounded at once


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

    Raises:
        InvalidInputError: it is damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    raise ValueError("its header ends behind its end")
                header = json.loads(file.read(length))
            about = header.pop("__metadata__")
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']}")
            self.fingerprint = str(about["fingerprint"])
            self.of = str(about["of"])
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
            if path.stat().st_size != end:
                raise ValueError(f"it has {path.stat().st_size} bytes of {end}")
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
        """A tensor of the file, mapped: what is read of it comes into memory, and no more."""
        place = self.places[name]
        values = np.frombuffer(
            self._mapped, place.dtype, place.length // place.dtype.itemsize, place.start
        )
        return torch.from_numpy(values.reshape(place.shape))

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            # Copy on write, since torch wants memory that may be written to. Nobody writes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def write(
    path: Path, sources: Mapping[str, Source], fingerprint: str | None = None, of: str = ""
) -> None:
    """Write weights, some rows of one at a time.

    Args:
        path: of the file; it is whole when it is there under another name: rename it.
        sources: by name.
        fingerprint: to record; default: theirs, as `weights_fingerprint` has it.
        of: the folder that they come from, to record; empty: they come from none.
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
    about = {
        "format": FORMAT,
        "fingerprint": "0" * 32,
        "columns": json.dumps(columns),
        "of": of,
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
