"""From tokens to text, piece by piece, up to a stop string; with thoughts or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from model_adapter.prompts.framing import THINKING

_OPENS, _CLOSES = THINKING
_UNFINISHED = "\ufffd"  # what a tokenizer makes of half a character


class Detokenizer:
    """The text of tokens that come one by one. A piece is given out once it is certain: when its
    last character is whole, and no stop string can begin in it.

    Args:
        tokenizer: of transformers; control tokens are left out, but for those around thoughts.
        stop: texts at the first of which the text ends; they do not belong to it.
        hide_thinking: leave out what is thought before the answer; no stop string is looked for in
            it.
        thinks: whether the text begins within a thought.

    Attributes:
        text: what was given out so far.
        stopped: whether a stop string came.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        hide_thinking: bool = False,
        thinks: bool = False,
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # What a token says may depend on the one before (a space between words): the tokens from
        # `_before` on are decoded with and without the new ones, which begin at `_new`.
        self._before = self._new = 0
        self._held = ""  # may be the beginning of a stop string
        self._thoughts = _Thoughts(thinks) if hide_thinking else None
        self._marks = dict(self._left_out(tokenizer))

    def _left_out(self, tokenizer: Any) -> Iterator[tuple[int, str]]:
        """The marks around thoughts that are left out as control tokens are."""
        for mark in THINKING:
            token = tokenizer.convert_tokens_to_ids(mark)
            is_one = token is not None and tokenizer.convert_ids_to_tokens(token) == mark
            if is_one and not self._decode([token]):
                yield token, mark

    def add(self, token: int) -> str:
        """The next piece; empty while it is not certain."""
        self._tokens.append(token)
        if token in self._marks:  # a control token to the tokenizer, which leaves it out
            piece = self._undecoded() + self._marks[token]
            self._before = self._new = len(self._tokens)
            return self._given(piece, last=False)
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
        # Not tidied: what comes later would change what was given out.
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(tokens, **how))

    def _given(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        if self._thoughts is not None:
            piece = self._thoughts.behind(piece, last=last)
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


class _Thoughts:
    """Leaves out what a model thinks before it answers, of a text that comes in pieces.

    Args:
        thinks: whether the text begins within a thought.
    """

    def __init__(self, thinks: bool) -> None:
        self._stage = "thinking" if thinks else "beginning"
        self._held = ""  # may be the beginning of a mark

    def behind(self, piece: str, *, last: bool) -> str:
        """What of a piece, and of what was held back, is no thought."""
        text, self._held = self._held + piece, ""
        if self._stage == "beginning":
            begins = text.lstrip()
            if begins.startswith(_OPENS):
                self._stage, text = "thinking", begins[len(_OPENS) :]
            elif _OPENS.startswith(begins) and not last:
                self._held = text
                return ""
            else:
                self._stage = "answering"
        if self._stage == "thinking":
            thought, closes, text = text.partition(_CLOSES)
            if not closes:
                self._held = thought[len(thought) - _overhang(thought, _CLOSES) :]
                return ""
            self._stage = "thought"
        if self._stage == "thought":
            text = text.lstrip()
            self._stage = "answering" if text else "thought"
        return text


def without_thoughts(text: str, thinks: bool = False) -> str:
    """An answer without what was thought before it.

    Args:
        text: the answer.
        thinks: whether it begins within a thought.
    """
    return _Thoughts(thinks).behind(text, last=True)


def _overhang(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
