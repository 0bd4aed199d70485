"""Documents to references of at most 128 tokens: at what the text is made of, or, in a database
that has always done so, at the last sentence's end that fits (docs/cutting.md)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from memdb.cutting.choosing import NEAR, Tokens, chosen
from memdb.cutting.headings import headings_of
from memdb.cutting.places import Places, placed
from memdb.cutting.units import WORD, Unit, units_of
from memdb.errors import InvalidInputError, MissingPartError
from memdb.ingest.text_only import TextOnly, text_only
from memdb.types import arguments
from memdb.types.checks import check_id, check_text
from memdb.types.cutting import Cutting
from memdb.types.shown import shown

# What ends a sentence: a stop with closing quotes and white space behind it, a full-width stop, an
# empty line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])|\n[^\S\n]*\n\s*")
_WORD_END = re.compile(r"\s+")
_LINE_END = re.compile(r"\n\s*")
_AS_EVER = Cutting()


@dataclass(frozen=True, repr=False)
class Piece:
    """A slice of a document that becomes a reference.

    Attributes:
        text: the slice; all slices joined are the document.
        tokens: length of the slice without the white space around it, in the model's tokens.
        place: where it stands in its document, if references have a place here: it is embedded, and
            its memory is written, behind that. No part of the text.
    """

    text: str
    tokens: int
    place: str = ""

    def __repr__(self) -> str:
        place = f", place={shown(self.place, 60)}" if self.place else ""
        return f"Piece({shown(self.text, 60)}, tokens={self.tokens}{place})"

    @property
    def placed(self) -> str:
        """What is embedded and made a memory: the text without the white space around it, behind
        its place, if it has one."""
        return placed(self.place, self.text.strip())


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
        max_tokens: most tokens of a piece, its place included.
        cutting: by which rule, and whether pieces have a place.
    """

    def __init__(self, tokenizer: str | None, max_tokens: int, cutting: Cutting = _AS_EVER) -> None:
        self.max_tokens = arguments.whole_number(max_tokens, "max_tokens", 1)
        if tokenizer is not None:
            arguments.a(str, tokenizer, "tokenizer")
        self._source = tokenizer
        self.cutting = arguments.a(Cutting, cutting, "cutting")

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

    def split(self, text: str, *, id: str | None = None, title: str = "") -> list[Piece]:
        """The pieces of a text that is not blank, in order; the same text, title and id give the
        same pieces always.

        By the rule `sentences` each is as long as it may be: it ends at the last sentence end
        within `max_tokens`, else at the last white space, else between two tokens. By `structure`
        they end at headings, paragraphs, blocks of code, items, rows and sentences; what costs
        least together is chosen (`memdb.cutting`).

        Args:
            text: a document's.
            id: the document's; a place begins with it where there is no title and no heading.
            title: the document's, with which a place begins; empty: it has none but its first
                heading.

        Raises:
            InvalidInputError: the text is blank, or none; id or title is none.
        """
        check_text(text)
        if id is not None:
            check_id(id)
        arguments.a(str, title, "title")
        places = self._places(text, id, title)
        if self._tokenizer is None:
            return [Piece(text, 0, self._place(places, text, 0))]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        structured = self.cutting.rule == "structure"
        if len(encoding.ids) <= self.max_tokens and not (structured and headings_of(text)):
            piece = self._piece(text, 0, len(text), places)
            if piece is not None:  # " word" may be one token, and "word" two
                return [piece]
        starts = [start for start, _ in encoding.offsets]
        if structured:
            return _Structured(self, text, starts, places).pieces()
        cuts = _Cuts(text, starts, _SENTENCE_END)
        pieces = []
        at = 0
        while at < len(text):
            pieces.append(self._longest(cuts, at, len(text), places))
            at += len(pieces[-1].text)
        return pieces

    def places(self, parts: Sequence[str], id: str, title: str) -> list[str]:
        """The places of a stored document's references; empty for those that have none.

        Args:
            parts: their texts, all of them, in order.
            id: the document's.
            title: the document's, as its metadata say it.
        """
        places = self._places("".join(parts), id, title)
        return [""] * len(parts) if places is None else places.of_parts(parts)

    def _places(self, text: str, id: str | None, title: str) -> Places | None:
        if not self.cutting.place:
            return None
        room = 0 if self._source is None else self.max_tokens
        return Places(text, id, title, self.count, room)

    @staticmethod
    def _place(places: Places | None, text: str, at: int) -> str:
        """Of a piece that begins at this character of the text."""
        space = _WORD_END.match(text, at)
        return "" if places is None else places.at(space.end() if space else at)[0]

    def _piece(self, text: str, at: int, end: int, places: Places | None) -> Piece | None:
        """A slice of the text, if it is short enough, counted exactly."""
        place = self._place(places, text, at)
        content = text[at:end].strip()
        tokens = self.count(content)
        is_short = tokens <= self.max_tokens
        if place and is_short:
            is_short = self.count(placed(place, content)) <= self.max_tokens
        if is_short:
            return Piece(text[at:end], tokens, place)
        if len(content) > 1:
            return None
        # No cut makes it less, so it goes without.
        return Piece(text[at:end], tokens)

    def _longest(self, cuts: _Cuts, at: int, stop: int, places: Places | None) -> Piece:
        """The piece that begins at character `at` and ends before or at `stop`."""
        # White space in front is not encoded, so it does not use up the window.
        begin = cuts.skip_space(at)
        room = self.max_tokens - (0 if places is None else places.at(begin)[1])
        end = cuts.window(begin, room)
        while True:
            cut = cuts.best(begin, end, stop)
            piece = self._piece(cuts.text, at, cut, places)
            if piece is not None:
                return piece
            # A slice alone may take a token or two more than within its document.
            end = begin + len(cuts.text[at:cut].strip()) - 1


class _Structured:
    """One text, cut by its structure."""

    def __init__(
        self, chunker: Chunker, text: str, starts: list[int], places: Places | None
    ) -> None:
        self._chunker = chunker
        self._text = text
        self._places = places
        self._tokens = Tokens(starts)
        self._cuts = _Cuts(text, starts, _LINE_END)
        most = chunker.max_tokens
        self._units = units_of(text, lambda start, end: self._tokens.between(start, end) <= most)
        self._wrong: set[tuple[int, int]] = set()

    def pieces(self) -> list[Piece]:
        """They."""
        for k in range(len(self._units) - 1, -1, -1):
            start, end = self._bounds(k, k + 1)
            if self._tokens.between(start, end) > self._room(start) - NEAR:
                self._split_if_long(k)
        while True:
            begins = self._chosen()
            found: list[Piece] = []
            long: list[int] = []  # units that were counted as less than they are
            for first, behind in zip(begins, [*begins[1:], len(self._units)], strict=True):
                piece = self._piece(first, behind)
                if piece is None and behind > first + 1:
                    self._wrong.add((first, behind))
                elif piece is None:
                    long.append(first)
                else:
                    found.append(piece)
            if len(found) == len(begins):
                return found
            for k in reversed(long):
                self._split_if_long(k)
                self._wrong.clear()  # the numbers of units are others now

    def _chosen(self) -> list[int]:
        units, tokens = self._units, self._tokens
        levels = []
        level = 0
        for unit in units:
            level = unit.level or level
            levels.append(level)
        bounds = [self._bounds(k, k + 1) for k in range(len(units))]
        return chosen(
            units,
            levels,
            [(tokens.first(start), tokens.behind(end)) for start, end in bounds],
            [self._room(start) for start, _ in bounds],
            self._wrong,
            lambda first, behind: self._piece(first, behind) is not None,
        )

    def _room(self, start: int) -> int:
        """Tokens of a content that begins here, besides its place."""
        place = 0 if self._places is None else self._places.at(start)[1]
        return self._chunker.max_tokens - place

    def _bounds(self, first: int, behind: int) -> tuple[int, int]:
        """Where the content of some units begins and ends."""
        units = self._units
        end = units[behind].start if behind < len(units) else len(self._text)
        return self._cuts.skip_space(units[first].start), end

    def _piece(self, first: int, behind: int) -> Piece | None:
        units = self._units
        end = units[behind].start if behind < len(units) else len(self._text)
        return self._chunker._piece(self._text, units[first].start, end, self._places)

    def _split_if_long(self, k: int) -> None:
        """A unit that does not fit becomes several that do: at line ends, else at white space, else
        between tokens."""
        if self._piece(k, k + 1) is not None:
            return
        unit = self._units[k]
        _, stop = self._bounds(k, k + 1)
        parts = []
        at = unit.start
        while at < stop:
            cost, level = (unit.cost, unit.level) if at == unit.start else (WORD, 0)
            parts.append(Unit(at, cost, level))
            at += len(self._chunker._longest(self._cuts, at, stop, self._places).text)
        self._units[k : k + 1] = parts


class _Cuts:
    """Where one text may be cut.

    Args:
        text: the text.
        starts: the character where each of its tokens starts, ascending.
        preferred: ends of what is not cut if it fits.
    """

    def __init__(self, text: str, starts: list[int], preferred: re.Pattern[str]) -> None:
        self.text = text
        self._starts = starts
        self._preferred = preferred
        self._used = len(text.rstrip())

    @cached_property
    def _ends(self) -> tuple[list[int], ...]:
        """Those, then those of words, ascending."""
        return tuple(
            [m.end() for m in each.finditer(self.text)] for each in (self._preferred, _WORD_END)
        )

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

    def best(self, begin: int, end: int, stop: int) -> int:
        """The best cut behind `begin` and not behind `end`, nor `stop`; white space at the text's
        end goes with what stands before it."""
        end = max(end, begin + 1)
        if end >= min(stop, self._used):
            return stop
        for ends in self._ends:
            found = bisect_right(ends, end) - 1
            if found >= 0 and ends[found] > begin:
                return ends[found]
        return end
