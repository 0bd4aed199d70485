"""Values as text: in a `repr`, which fits a line, and in errors."""

from __future__ import annotations


def shown(text: str | None, most: int) -> str:
    """The `repr` of a text, cut where it is longer than so many characters."""
    if text is None:
        return "None"
    said = repr(text[: most + 1])
    if len(text) <= most and len(said) <= most + 2:
        return said
    return f"{said[: most + 1]}…{said[0]}"


def shown_value(value: object) -> str:
    """A value for an error that refuses it, in no more than 60 characters, whatever it is."""
    try:
        return f"{value!r:.60}"
    except Exception:  # a number of more digits than Python prints, or its own `__repr__` fails
        return f"a {type(value).__name__} that cannot be printed"
