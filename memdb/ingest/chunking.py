"""Documents to references: at most 128 tokens each, cut at sentence ends where there is one."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from memdb.errors import InvalidInputError, MissingPartError
from memdb.ingest.text_only import TextOnly, text_only
from memdb.types import arguments
from memdb.types.checks import check_text
from memdb.types.shown import shown

# What ends a sentence: a stop with closing quotes and white space behind it, a full-width stop, an
# empty line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])|\n[^\S\n]*\n\s*")
_WORD_END = re.compile(r"\s+")


@dataclass(frozen=True, repr=False)
class Piece:
    """A slice of a document that becomes a reference.

    Attributes:
        text: the slice; all slices joined are the document.
        tokens: length of the slice without the white space around it, in the model's tokens.
    """

    text: str
    tokens: int

    def __repr__(self) -> str:
        return f"Piece({shown(self.text, 60)}, tokens={self.tokens})"


def text_tokenizer(tokenizer: str) -> Tokenizer:
    """A tokenizer for text that is only text, and that goes on behind other text.

    "<|im_end|>" or "<think>" in somebody's document is what it looks like, not the model's control
    token (see `memdb.ingest.text_only`). Nothing is put before the text: a tokenizer that marks
    spaces (Llama 2) would put one before its first word. Chunkers use the same: do not change it.
    For decoding, use the tokenizer as it is.

    Args:
        tokenizer: the text of a tokenizer.json.

    Raises:
        InvalidInputError: it does not load.
    """
    return text_only(tokenizer).going_on


class Chunker:
    """Cuts texts by the tokens of one model.

    Args:
        tokenizer: the text of the model's tokenizer.json; None: texts are never cut, and tokens
            can be neither counted nor decoded.
        max_tokens: most tokens of a piece.
    """

    def __init__(self, tokenizer: str | None, max_tokens: int) -> None:
        self.max_tokens = arguments.whole_number(max_tokens, "max_tokens", 1)
        if tokenizer is not None:
            arguments.a(str, tokenizer, "tokenizer")
        self._source = tokenizer

    def may_have(self, piece: Piece) -> bool:
        """Whether a piece that was cut elsewhere has a number of tokens that one here may have."""
        longest = 0 if self._source is None else self.max_tokens
        return 0 <= piece.tokens <= longest or (longest > 0 and len(piece.text.strip()) == 1)

    # Parsed when first needed: a big vocabulary takes a tenth of a second.

    @cached_property
    def _made(self) -> TextOnly | None:
        return None if self._source is None else text_only(self._source)

    @property
    def _tokenizer(self) -> Tokenizer | None:
        return None if self._made is None else self._made.going_on

    def count(self, text: str) -> int:
        """Tokens of a text, 0 without a tokenizer."""
        arguments.a(str, text, "text")
        if self._tokenizer is None:
            return 0
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        if self._made is None:
            raise MissingPartError(
                "this database has no tokenizer to decode token ids with; query by text or by "
                "embedding"
            )
        numbers = list(arguments.some(tokens, "tokens", "token ids"))
        for token in numbers:
            whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
            if not whole or not 0 <= token < 1 << 32:
                raise InvalidInputError(f"{token!r:.60} is no token id")
        return self._made.decode(list(map(int, numbers)))

    def split(self, text: str) -> list[Piece]:
        """The pieces of a text that is not blank, in order.

        Each is as long as it may be: it ends at the last sentence end within `max_tokens`, else at
        the last white space, else between two tokens.

        Raises:
            InvalidInputError: the text is blank, or none.
        """
        check_text(text)
        if self._tokenizer is None:
            return [Piece(text, 0)]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= self.max_tokens:
            tokens = self.count(text.strip())
            if tokens <= self.max_tokens:  # " word" may be one token, and "word" two
                return [Piece(text, tokens)]
        cuts = _Cuts(text, [start for start, _ in encoding.offsets])
        pieces = []
        at = 0
        while at < len(text):
            piece = self._longest(cuts, at)
            pieces.append(piece)
            at += len(piece.text)
        return pieces

    def _longest(self, cuts: _Cuts, at: int) -> Piece:
        """The piece that begins at character `at`."""
        # White space in front is not encoded, so it does not use up the window.
        begin = cuts.skip_space(at)
        end = cuts.window(begin, self.max_tokens)
        while True:
            cut = cuts.best(begin, end)
            content = cuts.text[at:cut].strip()
            tokens = self.count(content)
            # A slice alone may take a token or two more than within its document.
            if tokens <= self.max_tokens or len(content) == 1:
                return Piece(cuts.text[at:cut], tokens)
            end = begin + len(content) - 1


class _Cuts:
    """Where one text may be cut.

    Args:
        text: the text.
        starts: the character where each of its tokens starts, ascending.
    """

    def __init__(self, text: str, starts: list[int]) -> None:
        self.text = text
        self._starts = starts
        self._sentences = [m.end() for m in _SENTENCE_END.finditer(text)]
        self._words = [m.end() for m in _WORD_END.finditer(text)]
        self._used = len(text.rstrip())

    def window(self, begin: int, tokens: int) -> int:
        """Where the window of so many tokens ends that begins at character `begin`."""
        last = bisect_right(self._starts, begin) - 1 + tokens
        if last >= len(self._starts):
            return len(self.text)
        # The next token may begin with the space that ends this window's last word.
        return self.skip_space(self._starts[last])

    def skip_space(self, at: int) -> int:
        """Where the next word begins, at character `at` or behind it."""
        space = _WORD_END.match(self.text, at)
        return space.end() if space else at

    def best(self, begin: int, end: int) -> int:
        """The best cut behind `begin` and not behind `end`; white space at the text's end goes
        with what stands before it."""
        end = max(end, begin + 1)
        if end >= self._used:
            return len(self.text)
        for ends in (self._sentences, self._words):
            found = bisect_right(ends, end) - 1
            if found >= 0 and ends[found] > begin:
                return ends[found]
        return end
