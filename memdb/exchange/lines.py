"""The lines of a part: a document each, and how its text was cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memdb.errors import InvalidInputError
from memdb.exchange.files import is_integer, json_object, short
from memdb.ingest.chunking import Piece
from memdb.types.canonical import json_payload
from memdb.types.checks import checked
from memdb.types.document import Document

LINE_LIMIT = 1 << 31  # bytes; a text of 256 MiB takes up to six times as many in JSON
_FIELDS = ("id", "text", "metadata", "references", "version")


@dataclass(frozen=True)
class Entry:
    """A line of a part.

    Attributes:
        line: its number, from 1.
        id: the document's id; derived from the text if the line has none.
        document: what the line says.
        pieces: what its references are made of; joined they are the text, none is blank. Their
            tokens are as claimed: nobody counted them.
        version: the document's, or None.
    """

    line: int
    id: str
    document: Document
    pieces: list[Piece]
    version: int | None


def encode_line(document: Document, pieces: Sequence[Piece], version: int | None) -> bytes:
    """A document as a line that `decode_line` takes, with the line feed.

    Raises:
        InvalidInputError: it may not be stored, or the pieces or the version are not its.
    """
    checked(document)
    lengths = [[len(piece.text), piece.tokens] for piece in pieces]
    if [piece.text for piece in _cut(document.text, lengths)] != [piece.text for piece in pieces]:
        raise InvalidInputError("the pieces, joined, are not the document's text")
    if version is not None and not is_integer(version, 1, (1 << 32) - 1):
        raise InvalidInputError(f"the version must be a number from 1, got {version}")
    fields = {
        "id": document.id,
        "text": document.text,
        "metadata": dict(document.metadata),
        "references": lengths,
        "version": version,
    }
    line = json_payload({name: value for name, value in fields.items() if value is not None})
    if len(line) >= LINE_LIMIT:
        raise InvalidInputError(f"the document takes {len(line)} bytes, at most {LINE_LIMIT} fit")
    return line + b"\n"


def decode_line(number: int, line: bytes, split: Callable[[str], list[Piece]]) -> Entry:
    """The document of a line; `split` cuts a text of which the line does not say how.

    Raises:
        InvalidInputError: saying what is wrong with it.
    """
    fields = json_object(line)
    for name in fields:
        if name not in _FIELDS:
            raise InvalidInputError(
                f"unknown field {short(name)}; fields are {', '.join(_FIELDS)}. Put what else you "
                "want to keep into 'metadata'"
            )
    if "text" not in fields:
        raise InvalidInputError("the field 'text' is missing")
    metadata = fields.get("metadata")
    document = Document(fields["text"], fields.get("id"), {} if metadata is None else metadata)
    key, document = checked(document)
    version = fields.get("version")
    if version is not None and not is_integer(version, 1, (1 << 32) - 1):
        raise InvalidInputError(f"'version' must be a number from 1, got {short(version)}")
    lengths = fields.get("references")
    pieces = split(document.text) if lengths is None else _cut(document.text, lengths)
    return Entry(number, key, document, pieces, version)


def _cut(text: str, lengths: Any) -> list[Piece]:
    """The pieces of a text, given the length in characters and the tokens of each.

    Raises:
        InvalidInputError: they are not those of this text.
    """
    if not isinstance(lengths, list) or not lengths:
        raise InvalidInputError(
            "'references' must be an array of [characters, tokens], one for each piece of the text"
        )
    pieces = []
    at = 0
    for place, pair in enumerate(lengths):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not is_integer(pair[0], 1, len(text) - at)
            or not is_integer(pair[1], 0, 65535)
        ):
            raise InvalidInputError(
                f"'references': entry {place} is {short(pair)}, not [characters, tokens] of a "
                f"piece of the {len(text) - at} characters that are left"
            )
        pieces.append(Piece(text[at : at + pair[0]], pair[1]))
        if not pieces[-1].text.strip():
            raise InvalidInputError(f"'references': piece {place} is only white space")
        at += pair[0]
    if at != len(text):
        raise InvalidInputError(
            f"'references': the pieces have {at} characters, the text has {len(text)}"
        )
    return pieces
