"""The paper's formula (6), against what it says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_adapter.prompts.overlap import overlap, overlaps


def common_subsequence(one: Sequence[int], other: Sequence[int]) -> int:
    """The dynamic programme over all pairs of prefixes."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else longer
    return lengths[-1][-1]


def longest(text: Sequence[int], reference: Sequence[int]) -> int:
    """Window by window."""
    width = 2 * len(reference)
    starts = range(max(0, len(text) - width) + 1)
    return max(common_subsequence(text[n : n + width], reference) for n in starts)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A text and a reference of few or many kinds of tokens; the text may hold parts of it."""
    tokens = st.integers(0, draw(st.sampled_from([0, 1, 2, 5, 40])))
    reference = draw(st.lists(tokens, max_size=12))
    parts = draw(st.lists(st.lists(tokens | st.just(-1), max_size=15), max_size=4))
    text: list[int] = []
    for part in parts:
        text += part
        if draw(st.booleans()):
            text += [token for token in reference if draw(st.booleans())]
    return text, reference


@settings(deadline=None, max_examples=400)
@example(([1, 9, 9, 9, 2], [1, 2]))  # one window too short for both
@example(([9, 9, 9, 1, 9, 9, 2], [1, 2]))  # the last window, whole
@given(pairs())
def test_it_is_the_formula(pair: tuple[list[int], list[int]]) -> None:
    text, reference = pair
    expected = longest(text, reference) / len(reference) if reference else 0.0
    assert overlap(text, reference) == expected
    assert overlap(tuple(text), tuple(reference)) == expected


@settings(deadline=None)
@given(
    pairs(),
    st.sampled_from([-1.0, 0.0, 5e-324, 1 / 3, 0.5, 2 / 3, 0.9, 1.0, 1.1, float("nan")])
    | st.floats(0, 1),
)
def test_a_threshold_is_reached_as_the_overlap_says(
    pair: tuple[list[int], list[int]], threshold: float
) -> None:
    assert overlaps(*pair, threshold) == (overlap(*pair) >= threshold)


@pytest.mark.parametrize("size", range(1, 130))
def test_a_threshold_counts_as_reached_at_the_share_itself(size: int) -> None:
    reference = list(range(size))
    for length in range(0, size + 1, 1 + size // 10):
        text = reference[:length]
        assert overlap(text, reference) == length / size
        assert overlaps(text, reference, length / size)
        assert not overlaps(text, reference, float(Fraction(length, size) + Fraction(1, 10**6)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**9), st.sampled_from([2, 30, 3000]), st.integers(1, 128))
def test_long_texts_and_references(seed: int, kinds: int, size: int) -> None:
    rng = random.Random(seed)
    text = [min(int(rng.paretovariate(0.7)), kinds) for _ in range(2 * size + 5)]
    start = rng.randrange(len(text))
    reference = [token for token in text[start:] if rng.random() < 0.8][:size] or [1]
    assert overlap(text, reference) == longest(text, reference) / len(reference)


def test_a_reference_of_more_than_128_tokens() -> None:
    reference = list(range(300)) * 2
    assert overlap([-1, *reference[:450], -1], reference) == 450 / 600
    assert overlap(reference[300:] + reference[:300], list(range(600))) == 300 / 600


def test_what_stands_between_does_not_matter_within_a_window() -> None:
    reference = list(range(100))
    spread = [token for n in reference for token in (n, -1)]
    assert overlap([-2] * 500 + spread + [-2] * 500, reference) == 1
    wider = [token for n in reference for token in (n, -1, -1, -1)]
    assert overlap(wider, reference) == 0.5


@pytest.mark.parametrize(
    ("text", "reference"), [([], []), ([], [1]), ([1], []), ([1, 2], [3])], ids=str
)
def test_nothing_overlaps_nothing(text: list[int], reference: list[int]) -> None:
    assert overlap(text, reference) == 0.0
    assert not overlaps(text, reference, 2 / 3)
    assert overlaps(text, reference, 0)
