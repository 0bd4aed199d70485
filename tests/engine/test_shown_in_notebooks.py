"""What a notebook shows of a retrieval: every text as text, whatever is in it."""

from __future__ import annotations

from pathlib import Path

from memdb import Html, MemDB, Retrieval
from tests.engine.helpers import TokenWriter, WordEmbedder

MARKUP = "<script>alert('harbour')</script> & \"harbour\" \x1b[2J\u202e"


def test_markup_in_texts_ids_metadata_and_queries_is_text(tmp_path: Path) -> None:
    with MemDB.create(tmp_path / "db", embedder=WordEmbedder(), writer=TokenWriter()) as db:
        db.insert(MARKUP, id="<b>one</b>", metadata={"<i>": "<img src=x>"})
        shown = db.retrieve(f"{MARKUP} {'harbour ' * 500}")._repr_html_()
    for tag in ("<script", "<b>", "<i>", "<img", "\x1b", "\u202e"):
        assert tag not in shown
    assert "&lt;b&gt;one&lt;/b&gt;" in shown
    assert "&lt;img src=x&gt;" in shown
    assert len(shown) < 6000


def test_no_hits() -> None:
    shown = Retrieval("nothing like it")._repr_html_()
    assert "nothing like it" in shown
    assert "0 hits" in shown
    assert "<table" not in shown


def test_a_heat_map() -> None:
    shown = str(Html().heat(["a<", "🐋", "", "z"], [0, 1, 4, 2], 4, ["1", "2", '"3"', "4"]))
    assert "a&lt;" in shown
    assert shown.count("background:") == 2
    assert 'rgba(240,110,0,0.56)" title="&quot;3&quot;">🐋' in shown
