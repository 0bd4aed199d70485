"""HTML: the text of a page's main part, with its headings, lists, tables and code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from memdb.files.decoding import decoded, whole
from memdb.files.extra import library
from memdb.files.found import Converted, Source, Unfit
from memdb.files.outline import Outline

_LIMIT = 64 << 20  # bytes of a page: a tree of it takes some ten times as much
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w-]+)", re.IGNORECASE)
_BREAK = "\v"


def _tags(names: str) -> set[str]:
    return set(names.split())


_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_CELLS = {"td", "th"}
_LISTS = {"ul", "ol"}
_BLOCKS = _tags(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset "
    "figcaption figure footer form header hgroup hr html legend li main nav ol p section summary "
    "table tbody tfoot thead tr ul"
)
# What is no text of the page.
_LEFT_OUT = _tags(
    "audio button canvas head iframe img input map nav noscript object script select style svg "
    "template textarea video"
)
# Left out where a page does not say what its main part is.
_AROUND = {"aside", "footer", "header"}


def html(source: Source) -> Iterator[Converted]:
    """A page as one document."""
    trees, etree = library("lxml.html", "an HTML file"), library("lxml.etree", "an HTML file")
    parser = trees.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    content = _decoded(source)
    if not content.strip():
        raise Unfit("empty", "it is empty")
    try:
        tree = trees.document_fromstring(content.encode("utf-8", "replace"), parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError) as error:
        raise Unfit("empty", f"it holds no text: {error}") from error
    if any(error.message.startswith("Excessive depth") for error in parser.error_log):
        raise source.wrong("its elements are nested too deep")
    title = " ".join((tree.findtext(".//title") or "").split())
    outline = Outline(title)
    main = _main(tree)
    _Page(outline, etree).read(tree if main is None else main, main is None)
    if not outline.whole and main is not None:
        _Page(outline, etree).read(tree, True)
    if not outline.whole:
        raise Unfit("empty", "it holds no text")
    yield Converted(outline.whole, metadata={"title": title} if title else {}, parts=outline.parts)


def _decoded(source: Source) -> str:
    data = whole(source, _LIMIT)
    named = _CHARSET.search(data[:4096])
    # What reads as ASCII up to here is no UTF-16, whatever it says.
    if named and b"\0" not in data and not named[1].lower().startswith((b"utf-16", b"utf-8")):
        try:
            return data.decode(named[1].decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            pass  # it says what it is not
    return decoded(data, source)


def _main(tree: Any) -> Any:
    """The element that holds what a page is for, if it says so."""
    found = tree.xpath("//main | //*[@role='main']") or tree.xpath("//article")
    return found[0] if len(found) == 1 or (found and found[0].tag != "article") else None


class _Page:
    """Reads an element's text into an outline, block by block."""

    def __init__(self, outline: Outline, etree: Any) -> None:
        self._outline = outline
        self._etree = etree
        self._words: list[str] = []
        self._depth = 0  # of lists in lists
        self._bullet = ""  # of the next block: it begins an item

    def read(self, top: Any, around: bool) -> None:
        """All of an element.

        Args:
            top: the element.
            around: whether to leave out what stands around a page's main part.
        """
        left_out = _LEFT_OUT | _AROUND if around else _LEFT_OUT
        walk = self._etree.iterwalk(top, events=("start", "end"))
        for event, element in walk:
            tag = element.tag
            if not isinstance(tag, str):
                continue
            skipped = tag in left_out or (element is not top and _is_hidden(element))
            if event == "start":
                if tag == "pre" or (skipped and tag in _BLOCKS):
                    self._flush()
                if skipped or tag == "pre":
                    walk.skip_subtree()
                    if not skipped:
                        self._outline.code("".join(element.itertext()), _language(element))
                    continue
                self._begin(tag)
                self._words.append(element.text or "")
            else:
                if not skipped:
                    self._end(tag)
                if element is not top:
                    self._words.append(element.tail or "")
        self._flush()

    def _begin(self, tag: str) -> None:
        if tag in _BLOCKS or tag in _HEADINGS:
            self._flush()
        if tag == "li":
            self._bullet = "  " * max(self._depth - 1, 0) + "- "
        elif tag in _LISTS:
            self._depth += 1
        elif tag == "br":
            self._words.append(_BREAK)

    def _end(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._outline.heading(_HEADINGS[tag], self._taken().replace("\n", " "))
        elif tag in _CELLS:
            self._words.append(" | ")
        elif tag == "tr":
            self._outline.item(self._taken().removesuffix("|").strip())
        elif tag in _BLOCKS:
            self._flush()
            self._depth -= tag in _LISTS

    def _taken(self) -> str:
        words, self._words = "".join(self._words), []
        return "\n".join(" ".join(line.split()) for line in words.split(_BREAK)).strip()

    def _flush(self) -> None:
        text = self._taken()
        if text and self._bullet:
            self._outline.item(self._bullet + text)
            self._bullet = ""
        else:
            self._outline.text(text)


def _is_hidden(element: Any) -> bool:
    get = element.get
    return (
        get("hidden") is not None
        or get("aria-hidden") == "true"
        or get("role") in ("navigation", "search", "banner", "contentinfo")
        or (element.tag == "a" and "headerlink" in (get("class") or ""))
    )


def _language(element: Any) -> str:
    """The language of code, where a class names it as highlighters do."""
    for one in (element, element.getparent(), *element.iterchildren("code")):
        for name in ("" if one is None else one.get("class") or "").split():
            if name.startswith(("language-", "highlight-", "lang-")):
                language = str(name.partition("-")[2])
                return "" if language in ("default", "none", "text") else language
    return ""
