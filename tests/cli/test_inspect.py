"""`memdb inspect`: which tokens a memory keeps, and which ones an answer looked at."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import model_adapter
from cli.heat import has_colours, heat_lines, heat_map
from memdb import MemDB
from model_adapter import SentenceEmbedder, create_database, generate, open_database
from tests.cli.conftest import Run, rows
from tests.cli.small import make_database, model_folder
from tests.helpers import FACTS, SAMPLE

QUESTION = FACTS[0].question
COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


@pytest.fixture(autouse=True)
def _database(run: Run, tmp_path: Path, minilm: SentenceEmbedder) -> None:
    make_database(tmp_path, minilm)


def test_each_token_with_how_many_rows_keep_it(run: Run, tmp_path: Path) -> None:
    run("warm", "long")
    found = rows(run("inspect", "long", "--json"))
    assert [row["ordinal"] for row in found] == list(range(len(found)))
    assert len(found) > 1
    with MemDB.open(tmp_path / "db") as database:
        memories = database.memories("long")
    for row, (reference, stored) in zip(found, memories, strict=True):
        assert stored is not None
        kept = np.bincount(stored.memory.positions, minlength=reference.tokens)
        assert [token["kept"] for token in row["tokens"]] == kept.tolist()
        assert "".join(token["text"] for token in row["tokens"]) == reference.content
        assert (row["document"], row["reference"]) == ("long", reference.id)
        assert (row["warm"], row["rows"], row["pairs"]) == (True, 6, kept.sum())
        assert (row["bytes"], row["codec"]) == (len(stored.payload), "int8")
        assert {token["used"] for token in row["tokens"]} == {None}

    lines = run("inspect", "long").stdout.splitlines()
    row = found[0]
    assert lines[1] == f"long, reference 1 of {len(found)} (id {row['reference']})"
    first, second = row["tokens"][:2]
    assert lines[2].split() == [
        "0",
        str(first["kept"]),
        "rows",
        f"{first['kept'] / 6:.1%}",
        f'"{first["text"]}"',
    ]
    assert lines[3].endswith(f'"{second["text"]}"')
    count = len(row["tokens"])
    assert lines[2 + count].startswith(f"{count} tokens, each kept by ")
    assert lines[2 + count].endswith(f"{row['pairs']} pairs, {row['bytes']:,} bytes, int8")


def test_pieces_join_where_a_character_is_several_tokens(run: Run, tmp_path: Path) -> None:
    text = "Ships: 船が来る。  Ærø,\tnaïve\n\n🐋!"
    with open_database(tmp_path / "db") as database:
        database.insert(text, id="ships")
        tokens = len(database.writer.model.tokens(text))
    (row,) = rows(run("inspect", "ships", "--json"))
    assert "".join(token["text"] for token in row["tokens"]) == text
    assert len(row["tokens"]) == tokens
    assert [token["text"] for token in row["tokens"][-5:]] == ["🐋", "", "", "", "!"]
    shown = run("inspect", "ships", env=COLOURS).stdout
    assert "船が来る" in re.sub("\x1b.*?m", "", shown)


def test_what_an_answer_looked_at(run: Run, tmp_path: Path) -> None:
    found = rows(run("inspect", "pellonia", "--question", QUESTION, "--json"))
    assert len(found) == 2
    with open_database(tmp_path / "db") as database:
        answer = model_adapter.generate(QUESTION, database, cite=True, max_new_tokens=32)
    (source,) = [s for s in answer.sources() if s.reference.document_id == "pellonia"]
    used = [token["used"] for token in found[0]["tokens"]]
    np.testing.assert_allclose(used, source.tokens[: len(used)], atol=1e-4)
    assert sum(used) == pytest.approx(source.attention, abs=1e-3)
    kept = [token["kept"] > 0 for token in found[0]["tokens"]]
    assert kept == [share > 0 for share in used]
    assert (found[1]["question"], found[1]["answer"]) == (QUESTION, answer.text)
    assert [s["reference"] for s in found[1]["sources"]] == [
        s.reference.id for s in answer.sources()
    ]
    shown = run("inspect", "pellonia", "--question", QUESTION).stdout
    assert shown.count("pellonia, reference 1 of 1") == 2
    assert f"{source.share:.1%} of the memories' attention" in shown
    short = ("--max-new-tokens", "3")
    (_, row) = rows(run("inspect", "pellonia", "--question", QUESTION, "--json", *short))
    assert answer.text.startswith(row["answer"])


def test_tokens_of_a_place_are_not_shown(
    run: Run, tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    """A place is part of the memory, and no part of the text."""
    path = tmp_path / "placed"
    title = {"title": "The lighthouse"}
    model = model_folder(minilm)
    with create_database(path, model=model, embedder=minilm, codec="exact", place=True) as database:
        database.insert(SAMPLE, id="long", metadata=title)
        contents = [piece.placed for piece in database.split(SAMPLE, metadata=title)]
        memories = [stored.memory for _, stored in database.memories("long") if stored]
        # What is stored is what the model makes of the prompt of that text.
        for memory, written in zip(memories, database.writer.write(contents), strict=True):
            np.testing.assert_array_equal(memory.positions, written.positions)
            np.testing.assert_allclose(memory.keys, written.keys, atol=1e-4)
        own = [reference.content for reference, _ in database.memories("long")]
        skipped = [
            len(database.writer.model.tokens(placed)) - len(database.writer.model.tokens(content))
            for placed, content in zip(contents, own, strict=True)
        ]
        found = generate(QUESTION, database, cite=True, max_new_tokens=4)
        hit = database.retrieve("The harbour", k=1).hits[0]
        assert hit.text in SAMPLE
    assert min(skipped) > 0
    asked = rows(run("inspect", "long", "--db", "placed", "--json"))
    question = ("--question", QUESTION, "--max-new-tokens", "4", "--json")
    used = rows(run("inspect", "long", "--db", "placed", *question))[:-1]
    sources = {source.reference.id: source.tokens for source in found.sources()}
    assert sources
    for row, looked, memory, content, before in zip(
        asked, used, memories, own, skipped, strict=True
    ):
        assert row["place"] == "The lighthouse"
        assert "".join(token["text"] for token in row["tokens"]) == content
        kept = np.bincount(memory.positions, minlength=before + len(row["tokens"]))[before:]
        assert [token["kept"] for token in row["tokens"]] == kept.tolist()
        if row["reference"] in sources:
            shares = sources[row["reference"]][before:][: len(row["tokens"])]
            np.testing.assert_allclose(
                [token["used"] for token in looked["tokens"]], shares, atol=1e-4
            )


def test_a_document_that_an_answer_does_not_rest_on(run: Run) -> None:
    asked = ("--question", QUESTION, "--max-new-tokens", "3")
    last = rows(run("inspect", "pellonia", *asked, "--json"))[-1]
    used = {source["id"] for source in last["sources"]}
    other = next(f"other {n}" for n in range(3) if f"other {n}" not in used)
    first, _ = rows(run("inspect", other, *asked, "--json"))
    assert {token["used"] for token in first["tokens"]} == {None}
    shown = run("inspect", other, *asked).stdout
    listed = shown.partition(f"{other} was not among the sources of this answer; these were:\n")[2]
    assert len(listed.splitlines()) == len(last["sources"]) > 0
    assert "pellonia" in listed


def test_what_is_cold_says_so(run: Run) -> None:
    shown = run("inspect", "long").stdout
    assert shown.count("cold: there is no memory yet. `memdb warm long` writes it") == 2
    assert "`memdb warm 'other 0'` writes it" in run("inspect", "other 0").stdout
    (row,) = rows(run("inspect", "thistledown", "--json"))
    assert (row["warm"], row["pairs"], row["bytes"], row["codec"]) == (False, None, None, None)
    assert {token["kept"] for token in row["tokens"]} == {None}
    # A question warms what it retrieves.
    asked = ("--question", FACTS[3].question, "--max-new-tokens", "1", "--json")
    assert rows(run("inspect", "thistledown", *asked))[0]["warm"]


def test_small_mistakes(run: Run) -> None:
    for more in ((), ("--question", "What?")):
        assert "there is no document 'x'" in run("inspect", "x", *more, code=2).stderr
    assert "prompt is empty" in run("inspect", "pellonia", "--question", "", code=2).stderr
    wrong = ("--question", "x", "--max-new-tokens", "0")
    assert "max_new_tokens" in run("inspect", "pellonia", *wrong, code=2).stderr


# --- heat maps ------------------------------------------------------------------------------------


def test_colours_where_there_are_some(run: Run) -> None:
    coloured = run("inspect", "pellonia", env=COLOURS).stdout
    assert "\x1b[38;2;" in coloured
    assert FACTS[0].text in re.sub("\x1b.*?m", "", coloured).replace("\n", " ")
    for none in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in run("inspect", "pellonia", env={**COLOURS, **none}).stdout
    assert not has_colours(Console(force_terminal=False))


def test_the_hottest_token_is_the_brightest() -> None:
    text = heat_map(["a", "b", "c", "d"], [0, 1, 2, 4], 4)
    backgrounds = [span.style.bgcolor for span in text.spans]
    assert backgrounds[0] is None
    light = [sum(colour.triplet) for colour in backgrounds[1:]]
    assert light == sorted(light)
    assert len(set(light)) == 3
    assert heat_map(["a"], [0.0], 0.0).plain == "a"


def test_a_character_is_as_hot_as_its_hottest_token() -> None:
    text = heat_map(["🐋", "", "", "!"], [1, 4, 2, 1], 4)
    assert text.plain == "🐋!"
    whale, mark = text.spans
    assert whale.style == heat_map(["x"], [4], 4).spans[0].style != mark.style


def test_nothing_reaches_the_terminal_but_text() -> None:
    pieces = ["[red]", "\x1b[2J", "\x9b1m", "\t", "\n"]
    assert heat_map(pieces, [1] * 5, 1).plain == "[red]�[2J�1m \n"
    assert not any("\x1b" in line or "\n" in line for line in heat_lines(pieces, ["1"] * 5))
