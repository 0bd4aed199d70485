"""PDF: the text that is in it. Pictures of text are not read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memdb.errors import InvalidInputError, MissingPartError
from memdb.files.decoding import opened
from memdb.files.extra import library
from memdb.files.found import Converted, Source, Unfit
from memdb.files.outline import Outline
from memdb.types.checks import TEXT_LIMIT


def pdf(source: Source) -> Iterator[Converted]:
    """All pages as one document; a part's place says the page."""
    pypdf = library("pypdf", "a PDF file")
    with opened(source) as file, _silent():
        if not file.read(1):
            raise Unfit("empty", "it is empty")
        file.seek(0)
        try:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise Unfit("encrypted", "it is encrypted; save a copy without its password")
            title = _title(reader)
            outline = Outline(title)
            size = 0
            for number, page in enumerate(reader.pages, 1):
                text = _tidy(page.extract_text())
                size += len(text)
                if size > TEXT_LIMIT:
                    raise source.wrong("too much text for one document")
                outline.text(text, f"page {number}")
        except pypdf.errors.DependencyError as error:
            raise MissingPartError(
                f"{source.found.shown}: {error}. Run: pip install 'explicit-memdb[files]'"
            ) from error
        except (Unfit, InvalidInputError, MemoryError):
            raise
        except Exception as error:  # what a damaged file makes of the library
            raise source.wrong(f"cannot be read as PDF: {error or type(error).__name__}") from error
    if not outline.whole:
        raise Unfit("without text", "it has no text: its pages are pictures, which are not read")
    yield Converted(outline.whole, metadata={"title": title} if title else {}, parts=outline.parts)


def _title(reader: Any) -> str:
    about = reader.metadata
    title = None if about is None else about.title
    return " ".join(title.split()) if isinstance(title, str) else ""


def _tidy(text: str) -> str:
    """A page's text: halves of surrogate pairs, which broken fonts give, and zeros are no text."""
    sound = text.encode("utf-8", "replace").decode().replace("\0", "")
    return "\n".join(line.rstrip() for line in sound.splitlines()).strip()


@contextmanager
def _silent() -> Iterator[None]:
    """The library says of every oddity what it makes of it."""
    log = logging.getLogger("pypdf")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
