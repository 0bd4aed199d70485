"""Cutting by structure: where references end, and that the text is still whole."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import Cutting
from memdb.cutting.headings import headings_of
from memdb.cutting.sentences import sentence_ends
from memdb.ingest.chunking import Chunker
from tests.engine.helpers import time_limit, tokenizer_json

STRUCTURE = Cutting("structure")


def count(text: str) -> int:
    return Chunker(tokenizer_json(), 128).count(text)


def cut(text: str, room: int = 128, *, place: bool = False, title: str = "") -> list[str]:
    """The pieces of a text, after a look at what must hold for all texts."""
    chunker = Chunker(tokenizer_json(), room, Cutting("structure", place))
    with time_limit():
        pieces = chunker.split(text, id="a.md", title=title)
    parts = [piece.text for piece in pieces]
    assert "".join(parts) == text
    for piece in pieces:
        content = piece.text.strip()
        assert content
        assert piece.tokens == chunker.count(content)
        assert chunker.count(piece.placed) <= room or len(content) == 1
        assert piece.placed.endswith(content)
        assert place or not piece.place
    assert chunker.split(text, id="a.md", title=title) == pieces
    assert chunker.places(parts, "a.md", title) == [piece.place for piece in pieces]
    return parts


def words(tokens: int, start: str = "The", end: str = ".") -> str:
    """A sentence of so many tokens, or one less."""
    text = start
    while count(f"{text} ship{end}") <= tokens:
        text += " ship"
    return text + end


# --- every text -----------------------------------------------------------------------------------

PARTS = [
    "# Harbour",
    "## The bridge",
    "### It fell ##",
    "#",
    "# " + "long " * 60,
    "```python",
    "```",
    "~~~",
    "    for ship in fleet:",
    "- item",
    "  - inner item",
    "12. The twelfth",
    "| ships | from |",
    "| --- | --- |",
    "The harbour is old. Is there a bridge? No!",
    "As follows:",
    "港は古い。灯台は青い。",
    "word" * 30,
    "👩‍👩‍👧‍👦",
    "\x00",
    "",
    " \t",
]


@given(
    st.lists(
        st.tuples(st.sampled_from(PARTS), st.sampled_from(["\n", "\n\n", "\r\n", " ", ""])),
        min_size=1,
        max_size=40,
    ).filter(lambda p: "".join(a + b for a, b in p).strip()),
    st.integers(1, 48),
    st.booleans(),
)
def test_any_markdown_becomes_pieces_that_fit(
    parts: list[tuple[str, str]], room: int, place: bool
) -> None:
    cut("".join(a + b for a, b in parts), room, place=place)


@given(st.text().filter(str.strip), st.integers(1, 20), st.booleans())
def test_any_text_becomes_pieces_that_fit(text: str, room: int, place: bool) -> None:
    cut(text, room, place=place)


def test_what_has_no_structure_takes_no_longer_for_it() -> None:
    for text in (
        "a" * 30_000,
        "a. " * 10_000,
        "# a\n" * 8_000,
        "```\n" * 8_000,
        "- \n-a\n" * 5_000,
    ):
        cut(text)


# --- headings -------------------------------------------------------------------------------------


def test_references_end_at_headings() -> None:
    sections = [f"## Part {n}\n\n{words(90)}\n\n" for n in range(4)]
    assert cut("".join(sections)) == sections


def test_a_heading_stays_with_what_follows_it() -> None:
    text = "# Harbour\n\n## The bridge\n\n" + " ".join([words(40)] * 8)
    first, *others = cut(text)
    assert first.startswith("# Harbour\n\n## The bridge\n\nThe ship")
    assert len(others) > 1
    # Also where it would still fit in front.
    before = words(100)
    assert cut(f"{before}\n\n## The bridge\n\n{words(60)}") == [
        f"{before}\n\n",
        f"## The bridge\n\n{words(60)}",
    ]


def test_short_sections_of_one_parent_are_one_reference() -> None:
    one, two = f"## One\n\n{words(20)}\n\n", f"## Two\n\n{words(20)}\n\n"
    assert cut(one + two) == [one + two]
    # Those of two parents are two.
    a, b = f"# A\n\n{words(20)}\n\n## B\n\n{words(20)}\n\n", f"# C\n\n{words(20)}\n"
    above = f"## Before\n\n{words(20)}\n\n"
    assert cut(above + a) == [above, a]
    assert cut(a + b) == [a + b]  # the sections A and C stand side by side


def test_a_section_that_fits_is_one_reference_with_its_parts() -> None:
    text = f"# A\n\n{words(20)}\n\n## B\n\n{words(20)}\n\n### C\n\n{words(20)}\n"
    assert cut(text) == [text]


def test_what_a_heading_is() -> None:
    text = (
        "# One #\n#No\n   ## Two `x`  \n    # No\n####### No\n# \n#\n```\n# No\n```\n"
        "~~~ md\n# No\n```\n~~~~\n### C# \n# ##\n# " + "x" * 201 + "\n``` `` \n# Five\r\n"
    )
    found = [(heading.level, heading.name) for heading in headings_of(text)]
    assert found == [(1, "One"), (2, "Two `x`"), (3, "C#"), (1, "Five")]
    assert all(text[heading.at] == "#" for heading in headings_of(text))


# --- paragraphs and sentences ---------------------------------------------------------------------


def test_references_end_at_paragraphs() -> None:
    short, long = f"{words(20)} {words(30)}\n\n", f"{words(40)} {words(60)}\n\n"
    assert cut(short + short + long + short) == [short + short, long, short]


def test_a_paragraph_is_cut_at_a_sentence() -> None:
    text = " ".join([words(30)] * 12)
    for part in cut(text):
        assert part.startswith("The ship")
        assert part.rstrip().endswith("ship.")


def test_no_reference_is_a_crumb() -> None:
    """Greedily, the last of them would be one short sentence."""
    text = " ".join([words(40)] * 3 + [words(12)])
    assert min(count(part) for part in cut(text)) > 30


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rose by 3.5 percent. Then it fell.", ["It rose by 3.5 percent. ", "Then it fell."]),
        ("Dr. Marwick came. He left.", ["Dr. Marwick came. ", "He left."]),
        ("See Fig. 3 and No. 5. The end.", ["See Fig. 3 and No. 5. ", "The end."]),
        ("Is it No? No. The end.", ["Is it No? ", "No. ", "The end."]),
        ("Ships, e.g. Boats, i.e. those. End.", ["Ships, e.g. Boats, i.e. those. ", "End."]),
        ("J. R. Smith of the U.S. Navy. End.", ["J. R. Smith of the U.S. Navy. ", "End."]),
        ('"Why?" he asked. She left.', ['"Why?" he asked. ', "She left."]),
        ('He said "Go." Then he left.', ['He said "Go." ', "Then he left."]),
        ("Wait... what? Yes.", ["Wait... what? ", "Yes."]),
        ("Returns it. os.path joins.", ["Returns it. os.path joins."]),
        ("Returns nothing. os.path joins.", ["Returns nothing. ", "os.path joins."]),
        ("1. First\n2. Second", ["1. First\n2. Second"]),
        ("It was in 1874. Then", ["It was in 1874. ", "Then"]),
        ("Ships, boats etc. were there. End", ["Ships, boats etc. were there. ", "End"]),
        ("Das ist z. B. so. Gut.", ["Das ist z. B. so. ", "Gut."]),
        (
            "港は古い。灯台は「青い。」そうか？はい",
            ["港は古い。", "灯台は「青い。」", "そうか？", "はい"],
        ),
        ("¿Qué? Nada. ¡No! Sí", ["¿Qué? ", "Nada. ", "¡No! ", "Sí"]),
        ("यह है। वह है। अंत", ["यह है। ", "वह है। ", "अंत"]),
        ("ما هذا؟ هذا. نعم", ["ما هذا؟ ", "هذا. ", "نعم"]),
    ],
)
def test_where_sentences_end(text: str, sentences: list[str]) -> None:
    ends = [0, *(end for end in sentence_ends(text) if end < len(text)), len(text)]
    assert [text[a:b] for a, b in itertools.pairwise(ends)] == sentences


def test_chinese_and_japanese_are_cut_at_their_stops() -> None:
    parts = cut("港は古い。灯台は青い。" * 12, 24)
    assert len(parts) > 2
    assert all(part.endswith("。") for part in parts)


# --- code, lists, tables --------------------------------------------------------------------------


def test_code_that_fits_is_not_cut() -> None:
    code = "```python\n" + "".join(f"    ship = {n}\n\n" for n in range(5)) + "```\n"
    assert 60 < count(code) < 128
    text = f"{words(60)}\n\n{code}\n{words(60)}\n"
    assert any(code in part for part in cut(text))


def test_code_that_does_not_fit_is_cut_at_lines() -> None:
    lines = [f"    ship{n} = harbour(bridge)\n" for n in range(30)]
    parts = cut("```python\n" + "".join(lines) + "```\n")
    assert len(parts) > 2
    assert parts[0].startswith("```python\n    ship0")
    assert all(part.endswith("\n") for part in parts)
    assert parts[-1].endswith(")\n```\n")
    # And rather where something begins.
    block = "def harbour():\n" + "    ship()\n" * 2
    parts = cut("```\n" + block * 12 + "```\n", count(block * 3) + 8)
    assert len(parts) > 2
    assert all(part.startswith(("def", "```\ndef")) for part in parts)


def test_headings_within_code_are_none() -> None:
    code = "```\n" + "# a comment\nship()\n" * 4 + "```\n"
    assert cut(code) == [code]


def test_lists_are_cut_at_items() -> None:
    for mark, indent in (("- ", ""), ("* ", ""), ("1. ", ""), ("- ", "  "), ("• ", "")):
        items = [f"{indent}{mark}{words(14)}\n  {words(14)} {words(14)}\n" for _ in range(8)]
        parts = cut("".join(items))
        assert len(parts) > 2
        assert all(part.startswith(f"{indent}{mark}") for part in parts)


def test_what_a_line_introduces_stays_with_it() -> None:
    items = "".join(f"- {words(20)}\n" for _ in range(4))
    text = f"{words(70)}\n\n{words(20, end=':')}\n\n{items}"
    first, second = cut(text)
    assert first.rstrip() == words(70)
    assert second.startswith(words(20, end=":"))


def test_tables_are_cut_at_rows() -> None:
    rows = [f"| {n} | {words(20)} |\n" for n in range(12)]
    text = "| ships | from |\n| --- | --- |\n" + "".join(rows)
    parts = cut(text)
    assert len(parts) > 2
    assert all(part.startswith("| ") and part.endswith(" |\n") for part in parts)
    assert parts[0].startswith("| ships | from |\n| --- | --- |\n| 0 |")  # never the head alone


def test_a_sentence_that_does_not_fit_is_cut_at_lines_then_at_words() -> None:
    line = "the ships from the north\n"
    assert all(part.endswith("north\n") for part in cut(line * 40, 60))
    assert all(part.endswith(" ") for part in cut("ships from the north " * 40, 30)[:-1])


# --- places ---------------------------------------------------------------------------------------

GUIDE = (
    f"# The town\n\n{words(80)}\n\n## The harbour\n\n{words(90)}\n\n### The ships\n\n{words(70)} "
    f"{words(70)}\n\n### The bridge\n\n{words(80)}\n\n## The river\n\n{words(80)}\n"
)


def places(text: str, title: str = "", id: str | None = None, room: int = 128) -> list[str]:
    chunker = Chunker(tokenizer_json(), room, Cutting("structure", True))
    pieces = chunker.split(text, id=id, title=title)
    return [piece.place for piece in pieces]


def test_a_place_is_the_title_and_the_headings_above() -> None:
    cut(GUIDE, place=True)
    assert places(GUIDE) == [
        "",  # its title begins it
        "The town",
        "The town > The harbour",
        "The town > The harbour > The ships",
        "The town > The harbour",
        "The town",
    ]
    assert places(GUIDE, "Ships")[3] == "Ships > The town > The harbour > The ships"


def test_a_title_comes_from_the_metadata_the_first_heading_or_the_id() -> None:
    assert places("The harbour.", "Veldmoor", "a.md") == ["Veldmoor"]
    assert places("The harbour.", "", "a.md") == ["a.md"]
    assert places("The harbour.", " \n", "a.md") == ["a.md"]
    assert places("The harbour.", "x" * 201, "a.md") == ["a.md"]
    assert places("The harbour.") == [""]
    assert places("The harbour.", "", "sha256:0123") == [""]
    assert places(f"{words(90)}\n\n## Sea\n\n{words(90)}", "", "a.md") == ["Sea", ""]
    assert places("# Sea\n\nThe harbour.", "Sea") == [""]
    assert places("The harbour.", "Two\n lines") == ["Two lines"]


def test_a_long_place_loses_what_is_farthest_and_takes_a_quarter_at_most() -> None:
    names = [f"{'#' * n} part {n} of the harbour of the north\n\n" for n in range(1, 6)]
    text = "".join(names) + " ".join([words(60)] * 4)
    found = places(text, "Ships")
    assert found[-1].startswith("Ships > ")
    assert found[-1].endswith("part 5 of the harbour of the north")
    assert all(count(place + "\n") <= 32 for place in found)
    assert set(places(text, "Ships", room=4)) == {""}


def test_without_a_tokenizer_a_text_stays_whole_and_has_its_place() -> None:
    chunker = Chunker(None, 128, Cutting("structure", True))
    (piece,) = chunker.split(GUIDE, title="Guide")
    assert piece.text == GUIDE
    assert piece.placed == f"Guide\n{GUIDE.strip()}"
