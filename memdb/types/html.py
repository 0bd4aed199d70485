"""What a notebook shows of a value: HTML by inline styles alone, for a light page or a dark one."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_EDGE = "1px solid rgba(128,128,128,.4)"
_CELL = f"padding:.2em .8em .2em 0;text-align:left;vertical-align:top;border-bottom:{_EDGE}"
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Html:
    """A block that is put together from texts, each of which is shown as it is: markup in it is
    text, too. There are no scripts in it, nothing is loaded, and no colour of letters or page is
    set. `str` gives the whole.

    A notebook calls `_repr_html_` of what a cell ends with; that is where to use it.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []

    def line(self, text: str, *, small: bool = False) -> Html:
        """Add a line; a small one is for what is said about the rest."""
        style = "opacity:.7;font-size:90%" if small else "font-weight:bold"
        self._parts.append(f'<div style="{style}">{_shown(text)}</div>')
        return self

    def text(self, text: str) -> Html:
        """Add a text, with its line breaks."""
        self._parts.append(
            '<div style="white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0">'
            f"{_shown(text)}</div>"
        )
        return self

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
        """Add a table; each row has as many cells as the head."""
        titles = "".join(f'<th style="{_CELL}">{_shown(title)}</th>' for title in head)
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{_CELL};overflow-wrap:anywhere">{_shown(cell)}</td>' for cell in row
            )
            + "</tr>"
            for row in rows
        )
        self._parts.append(
            '<table style="border-collapse:collapse;margin:.3em 0">'
            f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        )
        return self

    def heat(
        self, pieces: Sequence[str], heat: Sequence[float], hottest: float, said: Sequence[str] = ()
    ) -> Html:
        """Add a text as a heat map: the hotter a piece, the stronger the colour behind it.

        Args:
            pieces: that the text is cut into; an empty one is of the same character as the one
                before.
            heat: of each piece, at least 0; at 0 there is no colour.
            hottest: the heat of the strongest colour.
            said: of each piece, shown when the mouse is over it; default: nothing.
        """
        joined: list[tuple[str, float, str]] = []
        for place, (piece, warmth) in enumerate(zip(pieces, heat, strict=True)):
            note = said[place] if said else ""
            if not piece and joined:
                before, hotter, its = joined[-1]
                joined[-1] = before, max(hotter, warmth), note if warmth > hotter else its
            else:
                joined.append((piece, warmth, note))
        spans = "".join(_piece(piece, warmth, hottest, note) for piece, warmth, note in joined)
        self._parts.append(
            '<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6;'
            f'margin:.3em 0">{spans}</div>'
        )
        return self

    def __str__(self) -> str:
        # The classes keep a notebook from taking "$5 and $6" for a formula.
        return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(self._parts)}</div>'


def brief(text: str, most: int) -> str:
    """A text on one line, cut where it is longer than so many characters."""
    flat = " ".join(text[: 4 * most].split())
    whole = len(text) <= 4 * most and len(flat) <= most
    return flat if whole else flat[: most - 1] + "…"


def _piece(piece: str, warmth: float, hottest: float, note: str) -> str:
    title = f' title="{_shown(note)}"' if note else ""
    if warmth <= 0 or hottest <= 0:
        return f"<span{title}>{_shown(piece)}</span>" if title else _shown(piece)
    # Half see-through at most: letters of either page's colour can be read on it.
    strength = 0.06 + 0.5 * min(1.0, warmth / hottest)
    return f'<span style="background:rgba(240,110,0,{strength:.2f})"{title}>{_shown(piece)}</span>'


def _shown(text: str) -> str:
    """A text escaped, without what would change how others are shown."""
    plain = "".join("�" if _is_control(c) else c for c in text)
    return html.escape(plain)


def _is_control(character: str) -> bool:
    code = ord(character)
    steers = code < 32 and character not in "\n\t"
    return steers or 127 <= code < 160 or 0xD800 <= code < 0xE000 or character in _BIDI
