"""What the memories of a document are made of, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb import Html, MemDB, Reference, StoredMemory, text_tokenizer
from model_adapter.generation.answer import Source


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


class Inspection(list[Inspected]):
    """The references of a document, in order. A notebook shows it as heat maps."""

    def _repr_html_(self) -> str:
        """In a notebook: which tokens are kept; and which ones an answer looked at, if one did."""
        shown = Html()
        most = max((int(part.kept.max()) for part in self if part.kept is not None), default=0)
        looked = [max(part.attention) for part in self if part.attention]
        for place, part in enumerate(self, 1):
            reference = part.reference
            shown.line(f"{reference.document_id}, reference {place} of {len(self)}")
            if part.kept is None:
                shown.line("cold: there is no memory yet", small=True).text(reference.content)
            else:
                shown.line(
                    f"which tokens the memory keeps: {part.numbers['pairs']:,} pairs, "
                    f"{part.numbers['bytes']:,} bytes, {part.numbers['codec']}",
                    small=True,
                )
                counts = [f"kept by {count} of {part.rows} rows" for count in part.kept]
                shown.heat(part.pieces, part.kept.tolist(), most, counts)
            if part.used is not None and part.attention:
                shown.line(
                    f"which tokens the answer looked at: {part.used.share:.1%} of the memories' "
                    f"attention, {part.used.attention:.1%} of all",
                    small=True,
                )
                # Most often one token of all gets most of it: by their roots the others show, too.
                heat = [math.sqrt(share) for share in part.attention]
                shares = [f"{share:.4%} of all attention" for share in part.attention]
                shown.heat(part.pieces, heat, math.sqrt(max(looked)), shares)
        return str(shown)


def inspect_document(database: MemDB, id: str, sources: Sequence[Source] = ()) -> Inspection:
    """What the memories of a document keep, token by token; nothing is written.

    Args:
        database: opened with its model.
        id: of the document.
        sources: of an answer that was made with `cite=True`, if one is to be shown.

    Raises:
        UnknownDocumentError: there is no such document.
    """
    tokenizer = text_tokenizer(database.writer.tokenizer)
    used = {source.reference.id: source for source in sources}
    found = Inspection()
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
