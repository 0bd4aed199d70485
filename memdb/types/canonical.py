"""Canonical JSON (storage_format.md): two values are the same if their bytes are."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np


def _of_numpy(value: object) -> Any:
    """A number or boolean of numpy as Python's, which JSON has; TypeError if it is none."""
    for of_numpy, of_python in ((np.bool_, bool), (np.integer, int), (np.floating, float)):
        if isinstance(value, of_numpy):
            return of_python(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


_ENCODER = json.JSONEncoder(
    ensure_ascii=False,
    allow_nan=False,
    sort_keys=True,
    separators=(",", ":"),
    default=_of_numpy,
)
_DEEPEST = 64  # that metadata may nest
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def json_payload(value: object) -> bytes:
    """JSON without white space, names sorted, UTF-8; numbers may be numpy's; NaN and infinities are
    refused with ValueError."""
    return _ENCODER.encode(value).encode()


def as_json(value: object) -> Any:
    """A copy with numbers of numpy as Python's; NaN and infinities stay. TypeError if JSON cannot
    hold it."""
    return json.loads(json.dumps(value, default=_of_numpy))


def read_json(payload: bytes | memoryview) -> Any:
    """The inverse of `json_payload`; it takes any JSON.

    Raises:
        ValueError: it is none, or nests too deep.
    """
    data = bytes(payload)
    try:
        return json.loads(data)
    except RecursionError as error:
        if (depth := _depth(data)) > _DEEPEST:
            raise ValueError(f"its values nest {depth} deep") from error
        raise  # the caller's stack was nearly full


def _depth(data: bytes) -> int:
    """How deep the objects and arrays of a JSON text nest."""
    depth = deepest = 0
    for mark in re.findall(rb"[][{}]", _STRINGS.sub(b"", data)):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
