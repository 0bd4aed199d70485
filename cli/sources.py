"""What an answer rests on, as the commands show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cli.common import one_line

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Source

HEADING = "sources, by their share of the memories' attention (and of all attention):"


def source_lines(sources: Sequence[Source]) -> list[str]:
    """Numbered, the most used first."""
    return [
        f"{place:3}. {source.share:6.1%} ({source.attention:5.1%})  "
        f"{source.reference.document_id}  {one_line(source.reference.content, 90)}"
        for place, source in enumerate(sources, 1)
    ]


def source_json(source: Source) -> dict[str, Any]:
    """A source as JSON values."""
    return {
        "id": source.reference.document_id,
        "reference": source.reference.id,
        "share": round(source.share, 4),
        "attention": round(source.attention, 6),
        "text": source.reference.content,
    }
