"""Keyword search over a few thousand texts (BM25; Robertson and Zaragoza, 2009)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_K1, _B = 1.2, 0.75  # how soon more of a word count no more; how much long texts are put down
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def bm25(queries: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
    """(queries, texts): how well each text has the query's words, rare ones above all."""
    counts = [Counter(words(text)) for text in texts]
    lengths = np.array([sum(count.values()) for count in counts], np.float32)
    norms = _K1 * (1 - _B + _B * lengths / lengths.mean())
    within: dict[str, list[int]] = {}
    for place, count in enumerate(counts):
        for word in count:
            within.setdefault(word, []).append(place)
    scores = np.zeros((len(queries), len(texts)), np.float32)
    for row, query in enumerate(queries):
        for word in set(words(query)) & within.keys():
            places = within[word]
            often = np.array([counts[place][word] for place in places])
            rare = np.log(1 + (len(texts) - len(places) + 0.5) / (len(places) + 0.5))
            scores[row, places] += rare * often * (_K1 + 1) / (often + norms[places])
    return scores
