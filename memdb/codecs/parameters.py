"""A fitted codec's parameters as bytes: arrays by name, and a few JSON values."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdb.types.canonical import json_payload, read_json

_LENGTH = struct.Struct("<I")
_DTYPES = {"f2": "<f2", "f4": "<f4", "f8": "<f8", "u1": "u1"}


def write_parameters(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The length of a header, the header (canonical JSON: the values, and of each array its name,
    type and shape), and the arrays one after the other (storage_format.md, Fitted codecs)."""
    listed = [
        {"name": name, "shape": list(array.shape), "type": array.dtype.str[1:]}
        for name, array in arrays.items()
    ]
    header = json_payload({**values, "arrays": listed})
    data = (np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return b"".join((_LENGTH.pack(len(header)), header, *data))


def read_parameters(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The inverse of `write_parameters`; ValueError if it is nothing of that form."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        values = dict(read_json(data[_LENGTH.size : _LENGTH.size + length]))
        at = _LENGTH.size + length
        arrays = {}
        for entry in values.pop("arrays"):
            dtype = np.dtype(_DTYPES[entry["type"]])
            if min(entry["shape"], default=0) < 0:
                raise ValueError("an array has a negative length")
            count = math.prod(map(operator.index, entry["shape"]))
            array = np.frombuffer(data, dtype, count, at).reshape(entry["shape"])
            arrays[entry["name"]] = array
            at += array.nbytes
    except (
        struct.error,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise ValueError(f"they do not decode ({error!r})") from error
    if at != len(data):
        raise ValueError(f"they have {len(data)} bytes where {at} are due")
    return values, arrays


def fitted_name(family: str, parameters: bytes) -> str:
    """The name of a family's codec with these parameters."""
    return f"{family}:{xxhash.xxh3_64_hexdigest(parameters)}"
