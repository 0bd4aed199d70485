"""What a user ingests, and what a database makes of it: documents, and the references they are cut
into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memdb.types.shown import shown


@dataclass(frozen=True)
class Part:
    """A stretch of a document's text that its author set apart. The parts of a document follow each
    other from the text's beginning to its end.

    Attributes:
        start, end: its characters, `text[start:end]`, the white space behind it included.
        kind: a heading, running text, or code.
        place: the headings it stands under, the outermost first; of a heading, itself the last.
    """

    start: int
    end: int
    kind: Literal["heading", "text", "code"]
    place: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Document:
    """What a user ingests: one line of `corpus.jsonl`.

    Attributes:
        text: the text; not empty.
        id: at most 480 bytes of UTF-8. None: derived from the text, so that the same text is the
            same document.
        metadata: anything that JSON can hold.
        parts: what the text is made of, where that is known (see `memdb.files`). They are not
            stored, and no part of what makes two documents the same.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"Document({shown(self.text, 40)}, id={shown(self.id, 40)})"


@dataclass(frozen=True, repr=False)
class StoredDocument:
    """A document as `MemDB.get` returns it.

    Attributes:
        id: the document's id.
        version: 1 at insertion, one more at each update.
        text: the whole text, exactly as it was given.
        metadata: as given.
        references: ids of its references, in the order of the text.
        warm: how many of them have a memory.
    """

    id: str
    version: int
    text: str
    metadata: dict[str, Any]
    references: tuple[int, ...]
    warm: int

    def __repr__(self) -> str:
        return (
            f"StoredDocument({shown(self.id, 30)}, version={self.version}, "
            f"text={shown(self.text, 30)}, references={len(self.references)}, warm={self.warm})"
        )


@dataclass(frozen=True, repr=False)
class Reference:
    """A piece of a document, short enough to become one memory (paper, 3.1: at most 128 tokens).

    Attributes:
        id: int64, never used again after the reference is deleted.
        version: the version of the document that wrote it.
        document_id: the document it belongs to.
        ordinal: its place in the document, from 0.
        tokens: its length in the model's tokens; 0 in a database without a tokenizer.
        text: its slice of the document, white space included: the slices joined are the document.
    """

    id: int
    version: int
    document_id: str
    ordinal: int
    tokens: int
    text: str

    def __repr__(self) -> str:
        return (
            f"Reference({self.id}, version={self.version}, of {shown(self.document_id, 30)}, "
            f"ordinal={self.ordinal}, text={shown(self.text, 30)})"
        )

    @property
    def content(self) -> str:
        """The text without the white space around it: what is embedded and encoded."""
        return self.text.strip()
