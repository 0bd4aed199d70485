"""What is found where people keep their texts: files to read, and what is passed over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memdb.errors import CorpusError, InvalidInputError
from memdb.types.document import Part

#: Why a file gave no document.
Why = Literal[
    "binary",
    "empty",
    "encrypted",
    "without text",
    "of unknown kind",
    "ignored by .gitignore",
    "hidden",
    "not included",
    "no regular file",
    "link to a folder",
    "link to nothing",
    "gone meanwhile",
    "database",
    "questions of BEIR",
    "cannot be read",
]


@dataclass(frozen=True)
class PassedOver:
    """A file, or a folder with all that is in it, that gave no document.

    Attributes:
        name: as errors call it.
        why: the reason, in short.
        problem: the reason at length, where there is more to say.
    """

    name: str
    why: Why
    problem: str = ""


@dataclass(frozen=True)
class Unread:
    """A file or a folder that cannot be read.

    Attributes:
        root, name: as of `Found`.
        shown: what errors call it.
        problem: why.
    """

    root: str
    name: str
    shown: str
    problem: str


class Unfit(Exception):  # noqa: N818  it is no error of the file
    """A file is sound and holds no document. Given by name that is an error; in a folder it is
    passed over."""

    def __init__(self, why: Why, problem: str) -> None:
        super().__init__(problem)
        self.why = why


@dataclass(frozen=True)
class Options:
    """How tables are read: which fields are text and key (see `Files`)."""

    text_field: str | None = None
    id_field: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything was said."""
        return self.text_field is not None or self.id_field is not None


@dataclass(frozen=True)
class Found:
    """A file to be read.

    Attributes:
        path: where it is.
        root: the folder that was given, or that the given file is in; resolved. It and `name` are
            what a document's origin is.
        name: its path from there, in UTF-8, with slashes.
        shown: what errors call it.
        kind: how to read it (`memdb.files.kinds`).
        given: whether it was named itself, not found in a folder.
    """

    path: Path
    root: str
    name: str
    shown: str
    kind: str
    given: bool


@dataclass
class Source:
    """A file while it is read.

    Attributes:
        found: the file.
        options: how to read tables.
        note: told what the user should know, as that an encoding was guessed.
        blank_rows: rows without text, which are passed over.
    """

    found: Found
    options: Options
    note: Callable[[str], None]
    blank_rows: int = 0

    def at(self, place: str) -> str:
        """A place in the file, as errors name it."""
        return f"{self.found.shown}, {place}"

    def wrong(self, problem: str, line: int | None = None) -> InvalidInputError:
        """What is wrong with it."""
        if line is None:
            return InvalidInputError(f"{self.found.shown}: {problem}")
        return CorpusError(self.found.shown, line, problem)


@dataclass(frozen=True)
class Converted:
    """A document as a converter gives it.

    Attributes:
        text: the whole text.
        key: of a file that holds many: what stands behind the file's name in the id. None: the
            file is one document.
        own_id: an id that the file itself gives, instead; "" for one derived from the text.
        metadata: JSON values.
        parts: of the text.
        line: where it begins, of a file of lines.
        place: likewise, in words.
    """

    text: str
    key: str | None = None
    own_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    line: int | None = None
    place: str = ""

    @property
    def where(self) -> str:
        """Where it begins, in words."""
        return self.place if self.line is None else f"line {self.line}"


#: What reads a kind of file.
Converter = Callable[[Source], Iterator[Converted]]


def readable_name(path: str | os.PathLike[str]) -> str:
    """A path as text that can be stored and printed; of bytes that are no UTF-8: `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown_name(path: str | os.PathLike[str]) -> str:
    """A path on one line, for errors."""
    name = readable_name(path)
    return "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in name)
