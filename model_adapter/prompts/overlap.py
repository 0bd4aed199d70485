"""How much of a reference a text holds already, in the same order (paper, formula (6)).

A reference that says what the text says proves nothing: the paper's evaluation drops those that
overlap the question too much (threshold 2/3), its training those that overlap the text (0.9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def overlap(text: Sequence[int], reference: Sequence[int]) -> float:
    """The largest share of a reference that stands in one window of a text, in order, whatever
    stands between (paper, evaluation, formula (6)):

        overlap(t, r) = max over windows w of 2|r| consecutive tokens of t of LCS(w, r) / |r|

    with LCS the length of the longest common subsequence. A text of less than 2|r| tokens is one
    window. It is exact, and takes a millisecond or a few for 600 tokens of text and 128 of
    reference.

    Args:
        text: token ids of the question, or of what is being read.
        reference: token ids of the reference, of the same tokenizer.

    Returns:
        0 to 1; 0 if either is empty.
    """
    return _longest(text, reference, 0, len(reference)) / max(1, len(reference))


def overlaps(text: Sequence[int], reference: Sequence[int], threshold: float) -> bool:
    """Whether `overlap` is at least a threshold; faster, since most windows hold too few of the
    reference's tokens, in whatever order.

    Args:
        text: as for `overlap`.
        reference: as for `overlap`.
        threshold: the paper's are 2/3 in evaluation and 0.9 in training. At 0 all overlap, even
            where text or reference is empty; above 0 none of those do.
    """
    size = max(1, len(reference))
    # The least length that reaches it, by the division of `overlap`, so that both agree.
    due = size + 1 - sum(n / size >= threshold for n in range(size + 1))
    return due <= _longest(text, reference, max(0, due - 1), due)


def _longest(text: Sequence[int], reference: Sequence[int], known: int, enough: int) -> int:
    """The length of the longest common subsequence of a reference and any window of a text, or
    `known` if none is longer; the search ends at a length of `enough`."""
    places: dict[int, int] = {}  # of each token in the reference, as bits
    for place, token in enumerate(reference):
        places[token] = places.get(token, 0) | 1 << place
    # Tokens that are not in the reference are in no subsequence. So a window that begins with one
    # holds nothing that the window at the next token that is would not hold, too. (At the text's
    # end that one is shorter than a window, and a part of one.)
    at = [n for n, token in enumerate(text) if token in places]
    tokens = [text[n] for n in at]
    masks = [places[token] for token in tokens]
    left = Counter(reference)  # of each token: how many more a window may have in common
    common = 0  # tokens that window and reference share, in whatever order
    longest, bound, end = known, 0, 0
    for start, first in enumerate(at):
        if longest >= enough:
            break
        while end < len(at) and at[end] < first + 2 * len(reference):
            left[tokens[end]] -= 1
            common += left[tokens[end]] >= 0
            bound += 1  # a token more makes a subsequence longer by one at most
            end += 1
        bound = min(bound, common)
        if bound > longest:
            bound = _common_subsequence(masks[start:end], len(reference))
            longest = max(longest, bound)
        common -= left[tokens[start]] >= 0
        left[tokens[start]] += 1
    return longest


def _common_subsequence(masks: Sequence[int], size: int) -> int:
    """Length of the longest common subsequence of a reference of `size` tokens and another text,
    given for each token of that the places where it stands in the reference.

    Bit-parallel (Crochemore et al., 2001; as in Hyyrö, 2004): a row of the dynamic programme's
    table is one number, in which a bit is 0 where the length grows from one place to the next.
    """
    every = row = (1 << size) - 1
    for mask in masks:
        taken = row & mask
        row = (row + taken) | (row - taken)  # what is carried past `every` never comes back
    return size - (row & every).bit_count()
