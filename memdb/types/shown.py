"""Text in a `repr`, which fits a line."""

from __future__ import annotations


def shown(text: object, most: int) -> str:
    """The `repr` of a text, cut where it is longer than so many characters."""
    said = repr(text) if len(str(text)) <= most else repr(str(text)[:most])
    return said if len(said) <= most + 2 else f"{said[: most + 1]}…{said[0]}"
