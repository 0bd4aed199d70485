"""A text as a heat map: token by token, the hotter the brighter."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

#: Colours from cold to hot, each with the one of the letters on it.
_RAMP = (
    ("#2b1650", "#ffffff"),
    ("#55206e", "#ffffff"),
    ("#85296b", "#ffffff"),
    ("#b8384f", "#ffffff"),
    ("#e3592b", "#000000"),
    ("#f98e09", "#000000"),
    ("#f9c932", "#000000"),
    ("#fcffa4", "#000000"),
)


def has_colours(console: Console) -> bool:
    """Whether a heat map would be seen."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def heat_map(pieces: Sequence[str], heat: Sequence[float], hottest: float) -> Text:
    """The text that the pieces join to, on backgrounds as hot as they are.

    Args:
        pieces: by token; an empty one is of the same character as the one before.
        heat: by token, at least 0; at 0 there is no background.
        hottest: the heat of the brightest colour.
    """
    joined: list[tuple[str, float]] = []
    for piece, warmth in zip(pieces, heat, strict=True):
        if not piece and joined:
            joined[-1] = joined[-1][0], max(joined[-1][1], warmth)
        else:
            joined.append((piece, warmth))
    text = Text()
    for piece, warmth in joined:
        text.append(_printable(piece), _style(warmth, hottest))
    return text


def heat_lines(pieces: Sequence[str], *columns: Sequence[str]) -> list[str]:
    """The same without colours: a line for each token, its figures before it."""
    lines = []
    for place, piece in enumerate(pieces):
        figures = "  ".join(f"{column[place]:>9}" for column in columns)
        lines.append(f"{place:5}  {figures}  {json.dumps(piece, ensure_ascii=False)}")
    return lines


def _style(warmth: float, hottest: float) -> Style:
    if warmth <= 0 or hottest <= 0:
        return Style(dim=True)
    place = min(len(_RAMP) - 1, int(warmth / hottest * len(_RAMP)))
    background, letters = _RAMP[place]
    return Style(color=letters, bgcolor=background)


def _printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)
