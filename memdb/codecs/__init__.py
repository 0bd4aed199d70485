"""Codecs: vectors <-> bytes. Each is one small file; `CODECS` lists those that are ready by the
name that every memory record carries, `FAMILIES` those that are fitted to a database first."""

from __future__ import annotations

from memdb.codecs.base import Codec, Family, FittedCodec, Layout, Part, put
from memdb.codecs.coded_vectors import CodedVectors, Digits, Levels, Recipe, Scaled
from memdb.codecs.exact import Exact
from memdb.codecs.floor import share
from memdb.codecs.int4 import Int4
from memdb.codecs.paper import PaperFamily
from memdb.codecs.parameters import fitted_name
from memdb.codecs.payload import (
    STAND_IN,
    Coded,
    codec_of,
    decode_into,
    decode_memory,
    encode_batch,
    encode_memory,
    memory_sizes,
    read_payload,
    read_vectors,
    require_whole,
)
from memdb.codecs.rotated import Rotated
from memdb.codecs.transform_fit import TransformFamily
from memdb.errors import InvalidInputError

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Exact(), STAND_IN, Int4(), Rotated(4), Rotated(3), Rotated(2))
}
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (TransformFamily(5), TransformFamily(8), TransformFamily(11), PaperFamily())
}
#: What `create` takes.
CODEC_NAMES = (*CODECS, *FAMILIES)


def codec_named(name: str) -> Codec | Family:
    """The codec or family of that name, or `InvalidInputError` with the names there are."""
    if isinstance(name, str) and name in CODECS:
        return CODECS[name]
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise InvalidInputError(f"no codec is called {name!r}; there are: {', '.join(CODEC_NAMES)}")


def fitted_codec(name: str, parameters: bytes) -> FittedCodec | None:
    """The fitted codec of that name, given its parameters; None if its family is not known.

    Raises:
        ValueError: the parameters are damaged, or those of another.
    """
    family = FAMILIES.get(name.partition(":")[0])
    if family is None:
        return None
    if name != fitted_name(family.name, parameters):  # nothing is believed that is damaged
        raise ValueError(f"the parameters are those of {fitted_name(family.name, parameters)}")
    try:
        codec = family.load(parameters)
    except ValueError as error:
        raise ValueError(f"the parameters of the codec '{name}' are damaged: {error}") from error
    codec.name, codec.parameters = name, parameters
    return codec


__all__ = [
    "CODECS",
    "CODEC_NAMES",
    "FAMILIES",
    "STAND_IN",
    "Codec",
    "Coded",
    "CodedVectors",
    "Digits",
    "Family",
    "FittedCodec",
    "Layout",
    "Levels",
    "Part",
    "Recipe",
    "Scaled",
    "codec_named",
    "codec_of",
    "decode_into",
    "decode_memory",
    "encode_batch",
    "encode_memory",
    "fitted_codec",
    "memory_sizes",
    "put",
    "read_payload",
    "read_vectors",
    "require_whole",
    "share",
]
