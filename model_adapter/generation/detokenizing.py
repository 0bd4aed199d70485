"""From tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer makes of half a character


class Detokenizer:
    """The text of tokens that come one by one. A piece is given out once it is certain: when its
    last character is whole, and no stop string can begin in it.

    Args:
        tokenizer: of transformers; control tokens are left out.
        stop: texts at the first of which the text ends; they do not belong to it.

    Attributes:
        text: what was given out so far.
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # What a token says may depend on the one before (a space between words): the tokens from
        # `_before` on are decoded with and without the new ones, which begin at `_new`.
        self._before = self._new = 0
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The next piece; empty while it is not certain."""
        self._tokens.append(token)
        piece = self._undecoded()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._before, self._new = self._new, len(self._tokens)
        return self._given(piece, last=False)

    def end(self) -> str:
        """What is left."""
        return self._given(self._undecoded(), last=True)

    def _undecoded(self) -> str:
        known = self._decode(self._tokens[self._before : self._new])
        return self._decode(self._tokens[self._before :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _given(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        end = len(text)
        if found:
            end = min(found)
            self.stopped = True
        elif not last:
            end -= max((_overhang(text, stop) for stop in self._stop), default=0)
        self._held = "" if self.stopped else text[end:]
        self.text += text[:end]
        return text[:end]


def _overhang(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
