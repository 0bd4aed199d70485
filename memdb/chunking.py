"""Documents to references: at most 128 tokens each, cut at sentence ends where there is one."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from memdb.errors import NotADatabaseError

# What ends a sentence: a stop with closing quotes and white space behind it, a full-width stop, an
# empty line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])|\n[^\S\n]*\n\s*")
_WORD_END = re.compile(r"\s+")


@dataclass(frozen=True)
class Piece:
    """A slice of a document that becomes a reference.

    Attributes:
        text: the slice; all slices joined are the document.
        tokens: length of the slice without the white space around it, in the model's tokens.
    """

    text: str
    tokens: int


class Chunker:
    """Cuts texts by the tokens of one model.

    Args:
        tokenizer: the text of the model's tokenizer.json; None: texts are never cut, and tokens
            can be neither counted nor decoded.
        max_tokens: most tokens of a piece.
    """

    def __init__(self, tokenizer: str | None, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            try:
                self._tokenizer = Tokenizer.from_str(tokenizer)
            except Exception as error:  # tokenizers raises the bare class
                raise NotADatabaseError(f"the tokenizer does not load: {error}") from error
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # "<|im_end|>" in somebody's text is text, not the model's control token.
            self._tokenizer.encode_special_tokens = True

    @property
    def has_tokenizer(self) -> bool:
        """Whether tokens can be counted and decoded."""
        return self._tokenizer is not None

    def count(self, text: str) -> int:
        """Tokens of a text, 0 without a tokenizer."""
        if self._tokenizer is None:
            return 0
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def split(self, text: str) -> list[Piece]:
        """The pieces of a text that is not blank, in order.

        Each is as long as it may be: it ends at the last sentence end within `max_tokens`, else at
        the last white space, else between two tokens.
        """
        if self._tokenizer is None:
            return [Piece(text, 0)]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= self.max_tokens:
            return [Piece(text, self.count(text.strip()))]
        starts = [start for start, _ in encoding.offsets]
        sentences = [m.end() for m in _SENTENCE_END.finditer(text)]
        words = [m.end() for m in _WORD_END.finditer(text)]
        pieces = []
        at = 0
        while at < len(text):
            piece = self._longest(text, at, starts, sentences, words)
            pieces.append(piece)
            at += len(piece.text)
        return pieces

    def _longest(
        self, text: str, at: int, starts: list[int], sentences: list[int], words: list[int]
    ) -> Piece:
        """The piece that begins at character `at`."""
        # White space in front is not encoded, so it does not use up the window.
        begin = at + len(text[at:]) - len(text[at:].lstrip())
        last = bisect_right(starts, begin) - 1 + self.max_tokens
        end = len(text) if last >= len(starts) else starts[last]
        while True:
            cut = self._cut(text, begin, end, sentences, words)
            tokens = self.count(text[at:cut].strip())
            # A slice alone may take a token or two more than within its document.
            if tokens <= self.max_tokens or cut <= begin + 1:
                return Piece(text[at:cut], tokens)
            end = cut - 1

    @staticmethod
    def _cut(text: str, begin: int, end: int, sentences: list[int], words: list[int]) -> int:
        if not text[end:].strip():
            return len(text)
        for ends in (sentences, words):
            found = bisect_right(ends, end) - 1
            if found >= 0 and ends[found] > begin:
                return ends[found]
        return max(end, begin + 1)
