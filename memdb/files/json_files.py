"""JSON: lines, an array of rows, or one object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TextIO

from memdb.errors import InvalidInputError
from memdb.files.decoding import binary_lines, lines_of
from memdb.files.found import Converted, Source, Unfit
from memdb.files.rows import NoTextFieldError, Rows
from memdb.ingest.corpus import document_of, json_object
from memdb.types.checks import TEXT_LIMIT

_CHUNK = 1 << 20  # characters
_LIKE = '{"id": "a", "text": "…"}'
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT_SHORT = 16  # characters from the end in which what is cut short looks wrong
_FIRST = 16 << 20  # bytes of a first line that is looked at
_OWN = {"id", "text", "metadata"}


def json_lines(source: Source) -> Iterator[Converted]:
    """JSON lines: as `read_corpus` has them, of a BEIR corpus (`_id`), or rows whose fields were
    named."""
    rows = Rows(source, whole_ids=True)
    some = False
    for number, line in binary_lines(source):
        if not line.strip():
            continue
        some = True
        try:
            fields = json_object(line, _LIKE)
            converted = _line(fields, rows, source)
        except InvalidInputError as error:
            raise source.wrong(str(error), number) from error
        if converted is not None:
            yield replace(converted, line=number)
    if not some:
        raise Unfit("empty", "it is empty")


def _line(fields: dict[str, Any], rows: Rows, source: Source) -> Converted | None:
    if source.options.given or is_beir(fields):
        return rows.document(fields)
    document = document_of(fields)
    return Converted(
        document.text,
        own_id="" if document.id is None else document.id,
        metadata=document.metadata,
    )


def is_beir(fields: Mapping[str, Any]) -> bool:
    """Whether this is a line of a BEIR corpus."""
    return "_id" in fields and "text" in fields and "id" not in fields


def first_line(source: Source) -> dict[str, Any] | None:
    """The object in the first line that is not blank; None if there is none."""
    try:
        for _, line in binary_lines(source, _FIRST):
            if line.strip():
                return json_object(line, _LIKE) if line.lstrip().startswith(b"{") else None
    except InvalidInputError:
        pass
    return None


def is_corpus_line(fields: Mapping[str, Any] | None) -> bool:
    """Whether this is a line as `read_corpus` takes it."""
    return fields is not None and "text" in fields and set(fields) <= _OWN


def json_file(source: Source) -> Iterator[Converted]:
    """A JSON file: an array of rows, taken one by one; one row; or lines.

    Raises:
        Unfit: it holds no texts, as the settings of a program do.
    """
    values = _Values(source)
    rows = Rows(source)
    for number, (value, line) in enumerate(values.read(), 1):
        fields = {"text": value} if isinstance(value, str) else value
        if not isinstance(fields, dict):
            problem = f"row {number} is no object"
            if number == 1:
                raise Unfit("without text", f"it holds no rows: {problem}")
            raise source.wrong(problem, line)
        try:
            document = rows.document(fields)
        except NoTextFieldError as error:
            if number == 1:
                raise Unfit("without text", str(error)) from error
            raise source.wrong(str(error), line) from error
        except InvalidInputError as error:
            raise source.wrong(str(error), line) from error
        if document is not None:
            one = rows.numbered and not values.several
            yield replace(document, key=None if one else document.key, line=line)


class _Values:
    """The values of a file, one by one: those of its array, or those that follow each other.

    Attributes:
        several: whether they are many: rows of a table.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self.several = False

    def read(self) -> Iterator[tuple[Any, int]]:
        """Values with the lines they begin in."""
        with lines_of(self._source) as text:
            if not self._skip(text):
                raise Unfit("empty", "it is empty")
            self.several = array = self._buffer[self._at] == "["
            if array:
                self._at += 1
            held: tuple[Any, int] | None = None
            first = True
            while self._skip(text):
                if array:
                    if self._buffer[self._at] == "]":
                        self._at += 1
                        if self._skip(text):
                            raise self._wrong("there is more behind the array")
                        return
                    if not first:
                        if self._buffer[self._at] != ",":
                            raise self._wrong("a comma is missing")
                        self._at += 1
                        if not self._skip(text):
                            break
                first = False
                if held is not None:
                    self.several = True
                    yield held
                    held = None
                line = self._line
                value = self._value(text)
                if array:
                    yield value, line
                else:  # whether others follow is to be known before it is given
                    held = value, line
            if array:
                raise self._wrong("the array has no end")
            if held is not None:
                yield held

    def _skip(self, text: TextIO) -> bool:
        """Go to what is no white space; False at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None
            self._go_to(space.end())
            if self._at < len(self._buffer):
                return True
            if not self._more(text):
                return False

    def _go_to(self, place: int) -> None:
        self._line += self._buffer.count("\n", self._at, place)
        self._at = place
        if self._at >= _CHUNK:  # what was read goes, and not at every value
            self._buffer, self._at = self._buffer[self._at :], 0

    def _value(self, text: TextIO) -> Any:
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated")
                at_the_end = open_string or error.pos >= len(self._buffer) - _CUT_SHORT
                if not at_the_end or not self._more(text, size):
                    self._line += self._buffer.count("\n", self._at, error.pos)
                    raise self._wrong(error.msg) from error
                if len(self._buffer) > 2 * TEXT_LIMIT:
                    raise self._wrong("a value is too large") from error
                size *= 2  # so that a long value is not parsed a thousand times
                continue
            except (RecursionError, ValueError) as error:
                raise self._wrong(f"it cannot be read: {error}") from error
            if end == len(self._buffer) and self._more(text):
                continue  # a number may go on
            self._go_to(end)
            return value

    def _more(self, text: TextIO, size: int = _CHUNK) -> bool:
        if self._ended:
            return False
        more = text.read(size)
        self._ended = not more
        self._buffer += more
        return bool(more)

    def _wrong(self, problem: str) -> InvalidInputError:
        return self._source.wrong(f"not JSON: {problem}", self._line)
