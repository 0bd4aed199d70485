"""Codecs: vectors <-> bytes. Each is one small file; `CODECS` lists them by the name that every
memory record carries."""

from __future__ import annotations

from memdb.codecs.base import (
    Codec,
    decode_memory,
    encode_batch,
    encode_memory,
    memory_sizes,
    require_whole,
)
from memdb.codecs.exact import Exact
from memdb.codecs.int8 import Int8
from memdb.errors import InvalidInputError

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Exact(), Int8())}


def codec_named(name: str) -> Codec:
    """The codec of that name, or `InvalidInputError` with the names there are."""
    if name not in CODECS:
        raise InvalidInputError(f"no codec is called {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name]


__all__ = [
    "CODECS",
    "Codec",
    "codec_named",
    "decode_memory",
    "encode_batch",
    "encode_memory",
    "memory_sizes",
    "require_whole",
]
