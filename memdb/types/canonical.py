"""Canonical JSON (storage_format.md): two values are the same if their bytes are."""

from __future__ import annotations

import json
from typing import Any

_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)


def json_payload(value: object) -> bytes:
    """JSON without white space, names sorted, UTF-8; NaN and infinities are refused with
    ValueError."""
    return _ENCODER.encode(value).encode()


def read_json(payload: bytes | memoryview) -> Any:
    """The inverse of `json_payload`; it takes any JSON."""
    return json.loads(bytes(payload))
