"""Word's documents: paragraphs, headings, lists and tables, in their order."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from typing import Any

from memdb.errors import InvalidInputError
from memdb.files.decoding import opened
from memdb.files.extra import library
from memdb.files.found import Converted, Source, Unfit
from memdb.files.outline import Outline

_UNPACKED = 512 << 20  # bytes of all that is in one
_OLD = b"\xd0\xcf\x11\xe0"  # Word's old format, and what one with a password is wrapped in
_HEADING = re.compile(r"Heading ([1-6])", re.IGNORECASE)


def docx(source: Source) -> Iterator[Converted]:
    """One document."""
    library_docx = library("docx", "a Word document")
    with opened(source) as file:
        start = file.read(4)
        if not start:
            raise Unfit("empty", "it is empty")
        if start == _OLD:
            raise Unfit("encrypted", "it has a password, or Word's old format; save it as .docx")
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as packed:
                if sum(item.file_size for item in packed.infolist()) > _UNPACKED:
                    raise source.wrong(f"larger than {_UNPACKED >> 20} MiB, unpacked")
            file.seek(0)
            document = library_docx.Document(file)
            title = " ".join((document.core_properties.title or "").split())
            outline = Outline(title)
            for block in document.iter_inner_content():
                _add(outline, block)
        except (InvalidInputError, MemoryError):
            raise
        except Exception as error:  # what a damaged file makes of the library
            raise source.wrong(
                f"cannot be read as a Word document: {error or type(error).__name__}"
            ) from error
    if not outline.whole:
        raise Unfit("empty", "it holds no text")
    yield Converted(outline.whole, metadata={"title": title} if title else {}, parts=outline.parts)


def _add(outline: Outline, block: Any) -> None:
    if hasattr(block, "rows"):
        for row in block.rows:
            outline.item(_row(row))
        return
    text = block.text.strip()
    style = block.style.name if block.style is not None and block.style.name else ""
    if style == "Title":
        outline.heading(1, " ".join(text.split()))
    elif found := _HEADING.match(style):
        outline.heading(int(found[1]), " ".join(text.split()))
    elif style.startswith("List") and text:
        outline.item(f"- {text}")
    else:
        outline.text(text)


def _row(row: Any) -> str:
    """A table's row; a cell that spans several columns comes once."""
    cells: list[Any] = []
    for cell in row.cells:
        if not cells or cell._tc is not cells[-1]._tc:
            cells.append(cell)
    return " | ".join(" ".join(cell.text.split()) for cell in cells)
