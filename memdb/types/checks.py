"""Documents at the door: what is accepted, and which is the same as one that is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from memdb.errors import InvalidInputError
from memdb.types.canonical import json_payload, read_json
from memdb.types.document import Document

MAX_ID_BYTES = 480  # LMDB keys end at 511 bytes
TEXT_LIMIT = 1 << 28  # bytes of one text: what a damaged or hostile frame may claim at most
MAX_DEPTH = 64  # objects and arrays within each other, in metadata


def checked(document: Document) -> tuple[str, Document]:
    """The id of a document that may be stored, and the document.

    Raises:
        InvalidInputError: saying what is wrong with it.
    """
    check_text(document.text)
    check_metadata(document.metadata)
    if document.metadata and _holds_numpy(
        document.metadata
    ):  # so that it is indexed as it will be read
        metadata = read_json(json_payload(dict(document.metadata)))
        document = replace(document, metadata=metadata)
    if document.id is None:
        return "sha256:" + text_hash(document.text).hex()[:32], document
    check_id(document.id)
    return document.id, document


def check_id(name: object) -> None:
    """Raise `InvalidInputError` unless this can be a document's id."""
    if not isinstance(name, str):
        raise InvalidInputError(f"'id' must be a string, got {_kind(name)}")
    if not name:
        raise InvalidInputError("'id' is empty; leave it out to have one derived from the text")
    size = len(_utf8(name, "'id'"))
    if size > MAX_ID_BYTES:
        raise InvalidInputError(f"'id' has {size} bytes of UTF-8; at most {MAX_ID_BYTES} are kept")
    if "\0" in name:
        raise InvalidInputError("'id' contains a zero character")


def is_id(name: object) -> bool:
    """Whether this can be a document's id."""
    try:
        check_id(name)
    except InvalidInputError:
        return False
    return True


def check_text(text: object) -> None:
    """Raise `InvalidInputError` unless this can be a document's text."""
    if not isinstance(text, str):
        raise InvalidInputError(f"'text' must be a string, got {_kind(text)}")
    if not text.strip():
        raise InvalidInputError("'text' is empty")
    size = len(text) if text.isascii() else len(_utf8(text, "'text'"))
    if size > TEXT_LIMIT:
        raise InvalidInputError(f"'text' has {size} bytes of UTF-8; at most {TEXT_LIMIT} are kept")


def check_metadata(metadata: object) -> None:
    """Raise `InvalidInputError` unless this can be a document's metadata."""
    if not isinstance(metadata, Mapping):
        raise InvalidInputError(f"'metadata' must be an object, got {_kind(metadata)}")
    if not metadata:
        return
    _check_nesting(metadata, MAX_DEPTH)
    try:
        json_payload(dict(metadata))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"'metadata' cannot be kept as JSON: {error}") from error


def text_hash(text: str) -> bytes:
    """32 bytes that differ where the text does."""
    return hashlib.sha256(text.encode()).digest()


def content_hash(document: Document) -> bytes:
    """32 bytes that differ where text or metadata do."""
    return content_hash_of(text_hash(document.text), json_payload(dict(document.metadata)))


def content_hash_of(text_hash: bytes, metadata: bytes) -> bytes:
    """`content_hash` of a text's hash and metadata as stored."""
    return hashlib.sha256(text_hash + metadata).digest()


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{what} has half a surrogate pair at character {error.start + 1}, which is no text"
        ) from error


def _check_nesting(value: object, depth: int) -> None:
    """Refuse what JSON would change or cannot nest: keys that are no strings, too many levels."""
    if not isinstance(value, (Mapping, list, tuple)):
        return
    if depth == 0:
        # Python reads JSON only as deep as its stack allows at that moment: stay far from it.
        raise InvalidInputError(f"'metadata' is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidInputError(
                    f"'metadata' cannot be kept as JSON: its key {key!r} is no string"
                )
        value = list(value.values())
    for item in value:
        _check_nesting(item, depth - 1)


def _holds_numpy(value: object) -> bool:
    """Whether there are numbers of numpy in metadata that was checked."""
    if isinstance(value, Mapping):
        return any(map(_holds_numpy, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_numpy, value))
    return isinstance(value, np.generic)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)
