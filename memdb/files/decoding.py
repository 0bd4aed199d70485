"""Bytes of files to text: encodings, compressed files, what is no text at all."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, TextIO, cast

from memdb.files.found import Source, Unfit
from memdb.types.checks import TEXT_LIMIT

_CHUNK = 1 << 20
_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What stands in no text: control characters but for white space, backspace and escape.
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b"))
_MOST_CONTROL = 0.01  # of the bytes of a text in an old encoding
_UNDEFINED = b"\x81\x8d\x8f\x90\x9d"  # in Windows-1252


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """A file's bytes; of a compressed one (`.gz`), those that are in it.

    Raises:
        InvalidInputError: it cannot be read, or is damaged.
    """
    try:
        # Not waited for: somebody may put a pipe in a file's place meanwhile.
        number = os.open(source.found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise source.wrong("no regular file")
            if source.found.path.suffix.lower() != ".gz":
                yield file
                return
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise source.wrong(f"damaged as a .gz file: {error}") from error
    except OSError as error:
        raise source.wrong(f"cannot be read: {error.strerror or error}") from error


def whole(source: Source, limit: int = TEXT_LIMIT) -> bytes:
    """All bytes of a file that is one document.

    Raises:
        InvalidInputError: there are more than `limit`.
    """
    with opened(source) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise source.wrong(f"larger than {limit >> 20} MiB, too large for one document")
    return data


def text_of(source: Source, limit: int = TEXT_LIMIT) -> str:
    """The text of a file of text, line ends as they are.

    Raises:
        Unfit: it is binary.
        InvalidInputError: it is damaged, or too large.
    """
    data = whole(source, limit)
    return decoded(data, source)


def decoded(data: bytes, source: Source) -> str:
    """Bytes of a text."""
    return data.decode(_encoding([data], source))


@contextmanager
def lines_of(source: Source) -> Iterator[TextIO]:
    """A file of text as a stream, line ends as they are, read twice: once to find its encoding."""
    with opened(source) as file:
        encoding = _encoding(iter(lambda: file.read(_CHUNK), b""), source)
    with (
        opened(source) as file,
        io.TextIOWrapper(file, encoding, newline="") as text,
    ):
        try:
            yield text
        except UnicodeDecodeError as error:
            raise source.wrong("it changed while it was read") from error


def _encoding(chunks: Iterable[bytes], source: Source) -> str:
    """How bytes are to be decoded: as their mark says, else as UTF-8, else as Latin-1."""
    decoder: codecs.IncrementalDecoder | None = None
    mark = ""
    strange = length = 0
    latin = False
    undefined = False
    for chunk in chunks:
        if decoder is None:
            mark = next((name for sign, name in _MARKS if chunk.startswith(sign)), "")
            decoder = codecs.getincrementaldecoder(mark or "utf-8")()
        if not mark.startswith(("utf-16", "utf-32")) and b"\0" in chunk:
            raise Unfit("binary", "it is binary, no text")
        length += len(chunk)
        strange += len(chunk) - len(chunk.translate(None, _CONTROL))
        undefined |= len(chunk) != len(chunk.translate(None, _UNDEFINED))
        if not latin:
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                if mark:
                    raise source.wrong(f"begins as {mark} text and is none: {error}") from error
                latin = True
            else:
                if "\0" in text:
                    raise Unfit("binary", "it is binary, no text")
    if decoder is not None and not latin:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            if mark:
                raise source.wrong(f"begins as {mark} text and is none: {error}") from error
            latin = True
    if not latin:
        return mark or "utf-8"
    if strange > _MOST_CONTROL * length:
        raise Unfit("binary", "it is binary, no text")
    source.note(f"{source.found.shown}: not UTF-8; read as Latin-1 (latin-1, Windows-1252)")
    return "latin-1" if undefined else "cp1252"


def binary_lines(source: Source, most: int = 2 * TEXT_LIMIT) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, without the mark of UTF-8.

    Args:
        source: the file.
        most: bytes of a line.

    Raises:
        InvalidInputError: one is longer than that.
    """
    with opened(source) as file:
        for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
            if len(line) > most:
                raise source.wrong("too long a line", number)
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
