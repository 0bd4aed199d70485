"""Notebooks show answers with their sources, and what memories keep."""

from __future__ import annotations

from pathlib import Path

from model_adapter import (
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
    inspect_document,
)


def test_an_answer_and_what_its_memories_keep(
    tmp_path: Path, smollm: LanguageModel, minilm: SentenceEmbedder
) -> None:
    with create_database(tmp_path / "db", model=smollm, embedder=minilm) as db:
        db.insert("The keeper of <b>Veldmoor</b> is Ada Quist & nobody else.", id="a<script>")
        plain = generate("Who is the keeper?", db, max_new_tokens=4)
        cited = generate("Who is the keeper?", db, max_new_tokens=4, cite=True)
        inspected = inspect_document(db, "a<script>", cited.sources())
        cold = inspect_document(db, "a<script>")
    for shown in (plain, cited, inspected, cold):
        html = shown._repr_html_()
        assert "<script>" not in html
        assert "<b>Veldmoor" not in html
    assert plain.text.split()[0] in plain._repr_html_()
    assert "a&lt;script&gt;" in cited._repr_html_()
    assert "looked at" in inspected._repr_html_()
    assert "looked at" not in cold._repr_html_()
    assert inspected[0].numbers["codec"] in inspected._repr_html_()
