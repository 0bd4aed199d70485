"""What an answer rests on, as the commands show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cli.common import one_line

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Generation, Source

_HASHED = "sha256:"
_SHORT = len(_HASHED) + 8

HEADING = "sources, by their share of the memories' attention (and of all attention):"


def source_lines(sources: Sequence[Source], *, short: bool = False) -> list[str]:
    """Numbered, the most used first; with `short` ids."""
    return [
        f"{place:3}. {source.share:6.1%} ({source.attention:5.1%})  "
        f"{short_id(source.reference.document_id) if short else source.reference.document_id}  "
        f"{one_line(source.reference.content, 90)}"
        for place, source in enumerate(sources, 1)
    ]


def short_id(id: str) -> str:
    """An id that can be typed: of one that is made of a text's hash, the beginning."""
    return id[:_SHORT] if id.startswith(_HASHED) else id


def timing_line(result: Generation) -> str:
    """How much was read and said, and how long it took."""
    seconds = result.seconds
    return (
        f"{result.prompt_tokens} prompt tokens and {len(result.token_ids)} new ones; retrieve "
        f"{seconds['retrieve']:.2f} s, read {seconds['read']:.2f} s, decode "
        f"{seconds['decode']:.2f} s; first token after {seconds['first_token']:.2f} s"
    )


def source_json(source: Source) -> dict[str, Any]:
    """A source as JSON values."""
    return {
        "id": source.reference.document_id,
        "reference": source.reference.id,
        "share": round(source.share, 4),
        "attention": round(source.attention, 6),
        "text": source.reference.content,
    }
