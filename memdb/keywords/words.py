"""Text to the words that are looked up: the same for references and for queries.

A word is a run of letters, digits and marks, without case and without accents (`Café` is `cafe`).
Scripts that put no spaces between words (Chinese, Japanese, Thai, ...) have each two neighbouring
characters for a word, and Korean too, whose words carry their particles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_LONGEST = 64  # characters of a word that count
_ACCENTS = re.compile("[\u0300-\u036f]")
_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Kana, and what repeats a character
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\uac00-\ud7af"  # Hangul
    "]+"
)


class _Letters(dict[int, int | str]):
    """For `str.translate`: what is in no word becomes a space."""

    def __missing__(self, code: int) -> int | str:
        kept = unicodedata.category(chr(code))[0] in "LNM"
        self[code] = code if kept else " "
        return self[code]


_LETTERS = _Letters()


def words_of(text: str) -> list[str]:
    """All words of a reference, as often as they occur."""
    return list(_words(text, alone=True))


def query_words(text: str) -> list[str]:
    """The different words of a query, in its order."""
    return list(dict.fromkeys(_words(text, alone=False)))


def _words(text: str, *, alone: bool) -> Iterator[str]:
    """Words; `alone`: characters of unspaced scripts also one by one, so that a query of one is
    found."""
    if not text.isascii():
        bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
        text = unicodedata.normalize("NFKC", bare)
    for word in text.casefold().translate(_LETTERS).split():
        if word.isascii():
            yield word[:_LONGEST]
            continue
        end = 0
        for run in _UNSPACED.finditer(word):
            yield from _spaced(word[end : run.start()])
            yield from _unspaced(run[0], alone)
            end = run.end()
        yield from _spaced(word[end:])


def _spaced(word: str) -> Iterator[str]:
    if word:
        yield word[:_LONGEST]


def _unspaced(run: str, alone: bool) -> Iterator[str]:
    if alone or len(run) == 1:
        yield from run
    for place in range(len(run) - 1):
        yield run[place : place + 2]
