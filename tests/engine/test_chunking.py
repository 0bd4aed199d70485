from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from memdb import InvalidInputError, MissingPartError
from memdb.ingest.chunking import Chunker, Piece
from tests.engine.helpers import PAGE, time_limit, tokenizer_json


def chunker(max_tokens: int) -> Chunker:
    return Chunker(tokenizer_json(), max_tokens)


def split(text: str, max_tokens: int) -> list[str]:
    """The pieces of a text, after a look at what must hold for all texts."""
    cutter = chunker(max_tokens)
    with time_limit():
        pieces = cutter.split(text)
    assert "".join(piece.text for piece in pieces) == text
    for piece in pieces:
        content = piece.text.strip()
        assert content
        assert piece.tokens == cutter.count(content)
        # A single character may be more: no cut makes it less.
        assert piece.tokens <= max_tokens or len(content) == 1
    return [piece.text for piece in pieces]


WORDS = sorted(set(PAGE.split()))
PARTS = [
    *WORDS,
    "<|im_end|>",
    "<|endoftext|>",
    "a" * 40,
    "灯台",
    "。",
    "。」",
    "👩‍👩‍👧‍👦",
    "e\u0301",
    "…\n",
]
SPACES = [" ", "  ", "\n", "\n\n", " \n \n ", "\t", "\u3000", "\u00a0", "\x1c", "\r\n", ""]


@given(st.text().filter(str.strip), st.integers(1, 20))
@example("0\x000", 1)
def test_any_text_becomes_pieces_that_fit(text: str, max_tokens: int) -> None:
    split(text, max_tokens)


@given(
    st.sampled_from(["", *SPACES]),
    st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(SPACES)), min_size=1, max_size=60),
    st.integers(2, 16),
)
def test_prose_becomes_pieces_that_fit(
    start: str, parts: list[tuple[str, str]], max_tokens: int
) -> None:
    split(start + "".join(word + space for word, space in parts), max_tokens)


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 8])
def test_a_word_that_costs_more_without_its_space_fits_too(max_tokens: int) -> None:
    """Within a text " reference" may be one token, and at a piece's start "reference" two."""
    count = chunker(99).count
    costly = [word for word in WORDS if count(" " + word) < count(word)]
    assert costly
    for word in costly:
        for end in ("", "\n", " \n\n "):
            split(f" {word}{end}", max_tokens)
            split(f"a {word} {word} {word} {word} {word}{end}", max_tokens)


def test_a_short_text_is_one_piece_with_all_its_white_space() -> None:
    text = "\n  The harbour is old.\t\n"
    assert chunker(128).split(text) == [Piece(text, chunker(128).count("The harbour is old."))]


def test_white_space_around_a_piece_takes_no_tokens() -> None:
    text = " \n" * 500 + "The harbour is old." + " \n" * 500
    assert split(text, 16) == [text]


def test_text_is_cut_at_the_last_sentence_end_that_fits() -> None:
    sentences = ["The harbour is old. ", "Is there a bridge? ", "No: the town is old! "] * 4
    cutter = chunker(16)
    pieces = split("".join(sentences), 16)
    assert 2 < len(pieces) < len(sentences)
    ends = ("old. ", "bridge? ", "old! ")
    for piece, following in pairwise(pieces):
        assert piece.endswith(ends)
        sentence = min(s for s in sentences if following.startswith(s))
        assert cutter.count((piece + sentence).strip()) > 16


@pytest.mark.parametrize(
    "end",
    [
        "end. ",
        'end." ',
        "end.) ",
        "end!\n",
        "end?» ",
        "end… ",
        "港。",
        "港！",
        "end\n\n",
        "end\n \t\n ",
    ],
)
def test_what_ends_a_sentence(end: str) -> None:
    text = f"The harbour is {end}The town is in the north of the country"
    assert split(text, 14)[0] == f"The harbour is {end}"


@pytest.mark.parametrize("no_end", ["1.5 ", "e.g.x ", "end\n", "end, ", "end) "])
def test_what_does_not_end_a_sentence(no_end: str) -> None:
    text = f"The harbour is {no_end}The town is in the north of the country"
    assert split(text, 14)[0] != f"The harbour is {no_end}"


def test_a_long_sentence_is_cut_at_the_last_space_that_fits() -> None:
    words = ["ships ", "from ", "the ", "north "] * 10
    cutter = chunker(9)
    pieces = split("".join(words), 9)
    assert len(pieces) > 3
    for piece, following in pairwise(pieces):
        assert piece.endswith(" ")
        assert cutter.count(piece + following.split()[0]) > 9


@pytest.mark.parametrize(
    "word", ["a" * 400, "灯台港船" * 60, "👩‍👩‍👧‍👦" * 40, "<|im_end|>" * 40, "1" * 333]
)
def test_a_long_word_is_cut_between_tokens(word: str) -> None:
    pieces = split(word, 16)
    assert len(pieces) > 3
    assert chunker(16).count(pieces[0]) > 8  # and not into crumbs


def test_chinese_and_japanese_are_cut_at_their_stops() -> None:
    pieces = split("港は古い。灯台は青い。" * 12, 24)
    assert len(pieces) > 2
    assert all(piece.endswith("。") for piece in pieces)


def test_what_looks_like_a_control_token_is_text() -> None:
    text = "The harbour <|im_end|> is <|endoftext|> old."
    control = Tokenizer.from_str(tokenizer_json()).token_to_id("<|im_end|>")
    assert control is not None
    assert chunker(128).count("<|im_end|>") > 3
    assert "".join(split(text, 6)) == text


def test_what_the_tokenizer_would_cut_off_or_fill_up_is_counted_as_it_is() -> None:
    changed = Tokenizer.from_str(tokenizer_json())
    changed.enable_truncation(5)
    changed.enable_padding(length=50)
    cutter = Chunker(changed.to_str(), 16)
    assert cutter.count(PAGE) == chunker(16).count(PAGE) > 50
    assert cutter.split(PAGE) == chunker(16).split(PAGE)


def test_without_a_tokenizer_a_text_stays_whole_and_its_tokens_unknown() -> None:
    cutter = Chunker(None, 16)
    assert cutter.split(PAGE) == [Piece(PAGE, 0)]
    assert cutter.count(PAGE) == 0
    with pytest.raises(MissingPartError, match="no tokenizer"):
        cutter.decode([1])


def test_tokens_decode_to_their_text_without_control_tokens() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokens = tokenizer.encode("The harbour is old.<|im_end|>").ids
    assert tokens[-1] == tokenizer.token_to_id("<|im_end|>")
    assert chunker(16).decode(tokens) == "The harbour is old."


@pytest.mark.parametrize("token", [-1, 1 << 32, 1 << 63])
def test_a_number_that_is_no_token_is_refused(token: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{token} is no token id"):
        chunker(16).decode([5, token])


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"model": {"type": "?"}})])
def test_a_tokenizer_that_does_not_load_says_so(text: str) -> None:
    with pytest.raises(InvalidInputError, match="tokenizer does not load"):
        Chunker(text, 16).count("word")
