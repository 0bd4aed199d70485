"""Corpora: JSON lines of `id` (optional), `text` and `metadata` (optional)."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from memdb.errors import CorpusError, InvalidInputError
from memdb.types import arguments
from memdb.types.checks import checked, content_hash
from memdb.types.document import Document

_FIELDS = ("id", "text", "metadata")


class Entry(NamedTuple):
    """A document that is to be brought in.

    Attributes:
        key: its id.
        document: it, checked.
        by_path: whether the id is from a file's path, so that it may replace only what came from
            there.
    """

    key: str
    document: Document
    by_path: bool


def read_corpus(
    path: str | os.PathLike[str], name: str | None = None
) -> Iterator[tuple[int, str, Document]]:
    """Line number, id and document of every line; blank lines are passed over.

    A line without an id whose text another such line has is the same document and comes once.

    Args:
        path: a file of UTF-8 JSON lines, or one compressed (`.gz`).
        name: what to call it in errors; default: the path.

    Raises:
        CorpusError: at the first line that is wrong, naming it.
    """
    path = arguments.path(path, "the corpus")
    name = str(path) if name is None else arguments.a(str, name, "name")
    seen: dict[str, tuple[int, bytes]] = {}
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    fields = json_object(line, '{"id": "a", "text": "…"}')
                    key, document = checked(document_of(fields))
                except InvalidInputError as error:
                    raise CorpusError(name, number, str(error)) from error
                content = content_hash(document)
                if key in seen:
                    first, other = seen[key]
                    if document.id is None and content == other:
                        continue
                    raise CorpusError(name, number, _duplicate(document, first))
                seen[key] = number, content
                yield number, key, document
    except (EOFError, zlib.error) as error:
        raise InvalidInputError(f"cannot read '{name}': {error}") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read '{name}': {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def json_object(line: bytes, like: str) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: UTF-8.
        like: a line as it should look, for who did not know.

    Raises:
        InvalidInputError: saying what is wrong, not where.
    """
    arguments.a(bytes, line, "a line")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"not JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number too long
        raise InvalidInputError(f"not JSON that can be read: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"not a JSON object; a line looks like {like}")
    return fields


def document_of(given: object) -> Document:
    """A document of what stands for one: a `Document`, a mapping as a line of a corpus, or a text
    alone. Its fields are not checked.

    Raises:
        InvalidInputError: it is none of these, or a mapping with other fields.
    """
    if isinstance(given, Document):
        return given
    if isinstance(given, str):
        return Document(given)
    if not isinstance(given, Mapping):
        raise InvalidInputError(
            "a document is a `Document`, an object like {'id': 'a', 'text': '…'} or a text, got "
            f"{type(given).__name__}"
        )
    if "text" not in given:
        raise InvalidInputError("the field 'text' is missing")
    unknown = [name for name in given if name not in _FIELDS]
    if unknown:
        raise InvalidInputError(
            f"unknown field {min(map(str, unknown))!r}; fields are {', '.join(_FIELDS)}. Put what "
            "else you want to keep into 'metadata'"
        )
    metadata = given.get("metadata")
    return Document(given["text"], given.get("id"), {} if metadata is None else metadata)


def _duplicate(document: Document, first: int) -> str:
    if document.id is None:
        return (
            f"the same text as in line {first} with other metadata; give both lines an 'id' to "
            "keep them apart"
        )
    return f"the id '{document.id}' is already used in line {first}; ids must differ within a file"
