"""Text in a `repr`, which fits a line."""

from __future__ import annotations


def shown(text: str | None, most: int) -> str:
    """The `repr` of a text, cut where it is longer than so many characters."""
    if text is None:
        return "None"
    said = repr(text[: most + 1])
    if len(text) <= most and len(said) <= most + 2:
        return said
    return f"{said[: most + 1]}…{said[0]}"
