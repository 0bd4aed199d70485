"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "storage_format.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
_FENCED = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PROGRAMS = ("memdb", "python", "make", "pip")


@dataclass(frozen=True)
class Block:
    """A block between two fences.

    Attributes:
        kind: sh, python, text, ...
        title: the file that it is; empty: it is none.
        text: what stands in it.
    """

    kind: str
    title: str
    text: str


def name_of(page: Path) -> str:
    """A page as it is called in the names of tests."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    for kind, rest, text in _FENCED.findall(page.read_text()):
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(kind, title[1] if title else "", text))
    return found


def commands(page: Path) -> list[str]:
    """All command lines of a page, those of blocks and those that are indented, each whole."""
    lines: list[str] = []
    for block in blocks(page):
        if block.kind == "sh":
            lines += whole(block.text)
    prose = _FENCED.sub("", page.read_text())
    indented = re.findall(r"(?:^    [^\n]*\n)+", prose, re.MULTILINE)
    for block in indented:
        shown = whole("".join(line[4:] + "\n" for line in block.splitlines()))
        lines += [line for line in shown if _first(line) in _PROGRAMS]
    return lines


def whole(text: str) -> list[str]:
    """Lines of a shell, what goes on behind a backslash joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", text)
    split = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [one.strip() for line in split if line for one in line.split("&&")]


def _first(line: str) -> str:
    """The program of a line, behind the variables that it is given."""
    words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return words[0] if words else ""
