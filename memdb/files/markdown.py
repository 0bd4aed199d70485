"""Markdown: the text as it stands, without the front matter; its parts are those of CommonMark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any, Literal

from memdb.files.decoding import text_of
from memdb.files.extra import library
from memdb.files.found import Converted, Source
from memdb.files.outline import Headings, first_heading, following
from memdb.files.plain import filled
from memdb.types.document import Part

_FRONT = re.compile(
    r"---[^\S\n]*\r?\n(.*?)^(?:---|\.\.\.)[^\S\n]*\r?(?:\n|\Z)", re.DOTALL | re.MULTILINE
)
_FIELD = re.compile(r"^([A-Za-z_][\w-]*):[^\S\n]+([^\s\[{>|&*!].*?)\s*$", re.MULTILINE)
_LINE = re.compile(r"\r\n|\r|\n")


def markdown(source: Source) -> Iterator[Converted]:
    """One document; simple fields of its front matter are metadata."""
    content = text_of(source)
    fields: dict[str, str] = {}
    if front := _FRONT.match(content):
        fields = {name: _unquoted(value) for name, value in _FIELD.findall(front[1])}
        content = content[front.end() :]
    content = filled(content)
    title = fields.get("title", "")
    parts = markdown_parts(content, title)
    first = first_heading(parts)
    if not title and first:
        fields["title"] = first
    yield Converted(content, metadata=fields, parts=parts)


def markdown_parts(content: str, title: str = "") -> tuple[Part, ...]:
    """The blocks of a Markdown text.

    Args:
        content: the text.
        title: of the document, which each place begins with.
    """
    lines = [0, *(found.end() for found in _LINE.finditer(content))]
    headings = Headings(title)
    kind: Literal["heading", "text", "code"]
    starts: list[tuple[int, Literal["heading", "text", "code"], tuple[str, ...]]] = []
    tokens = _parser().parse(content)
    for token, following_one in zip(tokens, chain(tokens[1:], [None]), strict=True):
        if token.level or token.map is None or token.nesting < 0:
            continue
        kind = "text"
        if token.type == "heading_open":
            kind = "heading"
            headings.enter(int(token.tag[1:]), following_one.content.strip())
        elif token.type in ("fence", "code_block"):
            kind = "code"
        starts.append((lines[token.map[0]], kind, headings.place))
    if not starts or starts[0][0] > 0:
        starts.insert(0, (0, "text", ()))
    return following(starts, len(content))


@cache
def _parser() -> Any:
    """One that finds blocks, and leaves alone what is within them."""
    parser = library("markdown_it", "a Markdown file").MarkdownIt("commonmark").enable("table")
    return parser.disable(["inline"])


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value
