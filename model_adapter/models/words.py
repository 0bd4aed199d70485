"""From text to tokens: what a user says is only text, and what a template writes may be control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

from memdb import InvalidInputError, text_only


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Attributes:
        text: the part.
        control: whether control tokens in it are such; else it is only text.
    """

    text: str
    control: bool = False


@dataclass(frozen=True)
class Encoded:
    """A text of several parts as tokens.

    Attributes:
        ids: of its tokens.
        spans: from which character to which each stands, in ascending order. Characters are of the
            text in which control tokens have other names: `places` says where the parts are.
        places: from which character to which each part stands.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    places: list[tuple[int, int]]


class Words:
    """Makes tokens of texts, all parts together as one text, as the tokenizer itself would.

    Tokenizers of our own: transformers' switches between text and control tokens by a state that
    all threads share.

    Args:
        tokenizer: the text of a tokenizer.json.

    Attributes:
        added: ids of all added tokens, control tokens and others.
        control: ids of control tokens, by what they look like.
    """

    def __init__(self, tokenizer: str) -> None:
        self._made = text_only(tokenizer)
        self.added = self._made.added
        ids = self._made.beginning.token_to_id
        named = ((token, ids(name)) for token, name in self._made.control.items())
        self.control = {token: id for token, id in named if id is not None}

    def text(self, text: str) -> Encoded:
        """A text behind other text, as the database's chunker counts its tokens."""
        found = _encoded(self._made.going_on, text, [Part(text)])
        return Encoded(found.ids, found.offsets, [(0, len(text))])

    def beginning(self, parts: Sequence[Part]) -> Encoded:
        """A text that nothing stands before."""
        text, places = self._joined(parts)
        found = _encoded(self._made.beginning, text, parts)
        return Encoded(found.ids, found.offsets, places)

    def going_on(self, parts: Sequence[Part]) -> Encoded:
        """A text behind other text, where memories may stand: nothing is put before it. What a
        tokenizer puts before text behind an added token is put there."""
        text, places = self._joined(parts)
        found = _encoded(self._made.going_on, text, parts)
        ids, spans = list(found.ids), list(found.offsets)
        if self._made.going_on is not self._made.beginning:
            first = self._first_added(ids)
            if first < len(ids):
                other = _encoded(self._made.beginning, text, parts)
                behind = self._first_added(other.ids)
                ids = [*ids[:first], *other.ids[behind:]]
                spans = [*spans[:first], *other.offsets[behind:]]
        return Encoded(ids, spans, places)

    def _joined(self, parts: Sequence[Part]) -> tuple[str, list[tuple[int, int]]]:
        text, places = "", []
        for part in parts:
            start = len(text)
            text += self._made.named(part.text) if part.control else part.text
            places.append((start, len(text)))
        return text, places

    def _first_added(self, ids: Sequence[int]) -> int:
        """Place of the first added token; the number of tokens if there is none."""
        return next((place for place, id in enumerate(ids) if id in self.added), len(ids))


def _encoded(tokenizer: Tokenizer, text: str, parts: Sequence[Part]) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeError) as error:  # half a surrogate pair
        said = "".join(part.text for part in parts if not part.control)
        raise InvalidInputError(f"not a text: {said[:60]!r}") from error
