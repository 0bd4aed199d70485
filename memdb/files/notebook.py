"""Jupyter notebooks: their text and code, without what the code printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from memdb.files.decoding import text_of
from memdb.files.found import Converted, Source, Unfit
from memdb.files.markdown import markdown_parts
from memdb.files.outline import first_heading


def notebook(source: Source) -> Iterator[Converted]:
    """A notebook as one document in Markdown, its code between fences."""
    cells, language = _cells(source)
    blocks = []
    for number, cell in enumerate(cells, 1):
        kind, text = _cell(source, number, cell)
        if not text.strip():
            continue
        if kind == "code":
            fence = "```"
            while fence in text:
                fence += "`"
            text = f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"
        elif kind == "heading":
            text = f"{'#' * int(cell.get('level', 1))} {text}"
        blocks.append(text.strip("\n"))
    content = "\n\n".join(blocks)
    if not content.strip():
        raise Unfit("empty", "it has no cell with a text")
    parts = markdown_parts(content)
    first = first_heading(parts)
    yield Converted(content, metadata={"title": first} if first else {}, parts=parts)


def _cells(source: Source) -> tuple[list[Any], str]:
    text = text_of(source)
    if not text.strip():
        raise Unfit("empty", "it is empty")
    try:
        book = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise source.wrong(f"no notebook: {error}") from error
    sheets = book.get("worksheets") if isinstance(book, dict) else None
    if isinstance(sheets, list) and all(isinstance(sheet, dict) for sheet in sheets):  # version 3
        cells: Any = [cell for sheet in sheets for cell in sheet.get("cells") or []]
    else:
        cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list):
        raise source.wrong("no notebook: it has no list of cells")
    about = book.get("metadata")
    names = [
        about.get(key, {}).get(name)
        for key, name in (("language_info", "name"), ("kernelspec", "language"))
        if isinstance(about, dict) and isinstance(about.get(key, {}), dict)
    ]
    return cells, next((name for name in names if isinstance(name, str)), "python")


def _cell(source: Source, number: int, cell: Any) -> tuple[str, str]:
    """Kind and text of a cell."""
    if isinstance(cell, dict):
        text = cell.get("source", cell.get("input", ""))
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "".join(text)
        if isinstance(text, str):
            return str(cell.get("cell_type")), text
    raise source.wrong(f"no notebook: cell {number} has no text")
