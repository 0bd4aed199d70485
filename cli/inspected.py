"""What the memories of a document are made of, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memdb import MemDB, Reference, StoredMemory, text_tokenizer

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Source


@dataclass
class Inspected:
    """A reference, by token.

    Attributes:
        reference: which.
        pieces: its content, cut into tokens.
        rows: (layer, kv head) pairs of the memory shape.
        kept: (tokens,) how many rows keep each token; None: it is cold.
        numbers: what else its memory is, by name.
        used: where a question was asked: what the answer took from it; None: nothing.
        place: where it stands in its document; empty: it was written without.
        before: tokens of the place, which stand before the content in the memory.
    """

    reference: Reference
    pieces: list[str]
    rows: int
    kept: NDArray[np.int64] | None
    numbers: dict[str, Any]
    used: Source | None = None
    place: str = ""
    before: int = 0

    @property
    def attention(self) -> list[float] | None:
        """(tokens,) share of all attention."""
        if self.used is None:
            return None
        shares: list[float] = self.used.tokens[self.before :][: len(self.pieces)].tolist()
        return shares

    def to_json(self) -> dict[str, Any]:
        """It as JSON values."""
        kept = [None] * len(self.pieces) if self.kept is None else self.kept.tolist()
        used: Sequence[float | None] = [None] * len(self.pieces)
        if self.attention is not None:
            used = [round(share, 8) for share in self.attention]
        return {
            "document": self.reference.document_id,
            "reference": self.reference.id,
            "ordinal": self.reference.ordinal,
            "place": self.place,
            "warm": self.kept is not None,
            **self.numbers,
            "rows": self.rows,
            "tokens": [
                {"text": text, "kept": count, "used": attention}
                for text, count, attention in zip(self.pieces, kept, used, strict=True)
            ],
        }


def inspect_document(database: MemDB, id: str, sources: Sequence[Source]) -> list[Inspected]:
    """The references of a document, in order.

    Args:
        database: opened with its model.
        id: of the document.
        sources: of an answer, if a question was asked.
    """
    tokenizer = text_tokenizer(database.writer.tokenizer)
    used = {source.reference.id: source for source in sources}
    found = []
    rows = database.shape.rows
    with database.snapshot() as moment:
        memories, places = moment.memories(id), moment.places(id)
    for (reference, stored), place in zip(memories, places, strict=True):
        content = reference.content
        written = f"{place}\n{content}" if place else content
        offsets = tokenizer.encode(written, add_special_tokens=False).offsets
        start = len(written) - len(content)
        ends = [end - start for _, end in offsets if end > start]
        before = len(offsets) - len(ends)
        pieces = _pieces(content, ends)
        kept, numbers = _memory(stored, before, len(pieces))
        source = used.get(reference.id)
        found.append(Inspected(reference, pieces, rows, kept, numbers, source, place, before))
    return found


def _pieces(text: str, ends: Sequence[int]) -> list[str]:
    """A text cut into tokens, given where these end. Of several that are one character, the first
    has it; white space that no token claims goes with the next."""
    pieces, at = [], 0
    for end in [*ends[:-1], len(text)]:
        pieces.append(text[at : max(at, end)])
        at = max(at, end)
    return pieces


def _memory(
    stored: StoredMemory | None, before: int, tokens: int
) -> tuple[NDArray[np.int64] | None, dict[str, Any]]:
    """By token of the content, behind those of the place, how many rows keep it, and the memory's
    other numbers."""
    if stored is None:
        return None, {"pairs": None, "bytes": None, "codec": None}
    coded = stored.coded()
    kept = np.bincount(coded.positions, minlength=before + tokens)[before : before + tokens]
    numbers = {
        "pairs": len(coded.positions),
        "bytes": len(stored.payload),
        "codec": coded.codec,
    }
    return kept, numbers
