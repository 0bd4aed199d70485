"""benchmarks/router.py: how it scores and fuses, and the whole program on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from model_adapter import create_database
from tests.cli.test_scripts import script
from tests.helpers import FACTS, tiny_model


def module(name: str) -> Any:
    return script(f"benchmarks/{name}.py")


def test_rare_words_find_their_text() -> None:
    texts = ["The Quill is long.", "The the the the.", "A heron, the heron of the Quill."]
    scores = module("keywords").bm25(["the heron?", "quill", "storm"], texts)
    assert scores[0].argmax() == 2
    assert scores[1, 0] > scores[1, 2] > scores[1, 1] == 0  # the shorter text first
    assert not scores[2].any()


def test_a_head_scores_by_its_best_keys_and_by_their_mean() -> None:
    scores, passes = module("router_scores"), module("router_pass")
    # Two references, the second stands first; two questions, of one token and of two.
    keys = np.array([[0, 3, 1], [0, -1, 1], [4, 0, 1], [0, 0, 3]], np.float32)
    seen = passes.Seen([keys[None]], np.array([2, 0]), np.array([2, 2]))
    queries = np.array([[2, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    asked = passes.Seen([queries[None]], np.array([0, 1]), np.array([1, 2]))
    zero = np.zeros(2, np.float32)
    eye = np.eye(2, dtype=np.float32)
    head = scores.Head(zero, zero, {"mean": zero, "by value": zero}, eye)
    given = queries, asked, keys, seen, head
    late, pooled = scores.late(*given), scores.pooled(*given)
    np.testing.assert_allclose(late["late, dot"], [[8, 0], [2, 1.5]])
    np.testing.assert_allclose(late["late"], [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(late["late, long"], [[2, 0], [0.5, 0.5]])
    np.testing.assert_allclose(pooled["pooled, dot"], [[4, 0], [1, 0.5]])
    np.testing.assert_allclose(pooled["pooled, white"], pooled["pooled"])
    assert set(late) | set(pooled) == set(scores.KINDS)
    means = scores.means(keys[:, :-1], seen, keys[:, -1])
    np.testing.assert_allclose(means, [[1, 0], [0, 1]])  # by the values' lengths


def test_the_reference_that_a_query_comes_from_is_not_found() -> None:
    tuning = module("router_tuning")
    owners = np.array([0, 0, 1, 2])
    queries = [tuning.Query("a", 0, 0), tuning.Query("b", 2, None)]
    known = tuning.Tuning(list("wxyz"), owners, queries)
    shown = known.masked(np.array([[9, 2, 3, 1], [4, 1, 3, 3.5]]))
    assert tuning.ranks(shown, owners, queries).tolist() == [2, 2]


def test_a_weight_is_found_where_the_second_score_helps() -> None:
    fit, tuning = module("router_fit"), module("router_tuning")
    queries = [tuning.Query("a", 0, None), tuning.Query("b", 1, None)]
    known = tuning.Tuning(["x", "y"], np.array([0, 1]), queries)
    base = np.array([[1, 0], [1, 0]], np.float32)
    right = np.array([[1, 0], [0, 4]], np.float32)
    assert fit.best_weight(base, right, known) == (0.3, 1.0)
    assert fit.best_weight(base, -right, known)[0] == 0
    heads = np.stack([base, right, -right])
    assert fit.best_heads(heads, known.owners, queries) == [1, 0, 2]
    fused = fit.reciprocal(base, right)
    assert fused[0].argmax() == 0
    assert fused[1, 0] == pytest.approx(fused[1, 1])  # first of one, second of the other


def test_the_whole_program(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=4096)
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    texts = {fact.id: f"{fact.text} {' '.join(f.text for f in FACTS)}" for fact in FACTS}
    corpus = "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items())
    entries = [{"id": f"{n} {key}", "text": text} for n, (key, text) in enumerate(texts.items())]
    (tmp_path / "tuning.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    ids = list(texts)
    asked = {
        "one": [{"document": ids[n]} for n in range(3)],
        "several": [{"documents": ids[n : n + 2]} for n in range(3)],
    }
    for name, questions in asked.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "corpus.jsonl").write_text(corpus)
        lines = [
            {"question": FACTS[n].question, "answers": ["x"], **question}
            for n, question in enumerate(questions)
        ]
        (tmp_path / "data" / name / "questions.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    command = ["--data", str(tmp_path / "data"), "--tuning", str(tmp_path / "tuning.jsonl")]
    command += ["--model", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
    shown = []
    for out in ("first", "again"):
        result = CliRunner().invoke(
            module("router").main, [*command, "--json", str(tmp_path / out)]
        )
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        shown.append(json.loads((tmp_path / out).read_text()))
    figures = shown[0]
    assert figures == shown[1]  # from what is kept
    assert figures.keys() == {"one", "several"}
    one = figures["one"]
    assert len(one) == 1 + 3 * 8
    assert one["pooled"]["bytes"] % (8 * 2) == 0
    assert one["late"]["bytes"] > one["pooled"]["bytes"]
    assert one["embedder"]["bytes"] == 384 * 4
    # The embedder's figures are those of the database.
    with create_database(tmp_path / "db", model=model) as database:
        for key, text in texts.items():
            database.insert(text, id=key)
        for name, questions in asked.items():
            found = database.retrieve_batch(
                [fact.question for fact in FACTS[:3]], 5, memories=False
            )
            hits = [{hit.reference.document_id for hit in each.hits} for each in found]
            own = [set(q.get("documents") or [q["document"]]) for q in questions]
            several = [mine <= there for mine, there in zip(own, hits, strict=True)]
            assert figures[name]["embedder"]["recall_all_at_5"][0] == np.mean(several)


def test_the_corpus_may_be_cut_to_some_distractors(tmp_path: Path) -> None:
    ids = [fact.id for fact in FACTS]
    lines = [{"id": fact.id, "text": fact.text} for fact in FACTS]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    question = {"question": "Who?", "answers": ["x"], "documents": ids[:1], "distractors": ids[2:]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    tokenizer = tiny_model().tokenizer_json
    read = module("router_data").read
    assert set(read(tmp_path, tokenizer, None, None).owners) == set(ids)
    cut = read(tmp_path, tokenizer, None, 1)
    assert set(cut.owners) == {ids[0], ids[2]}
    first = np.array([[owner == ids[0] for owner in cut.owners]], np.float32)
    assert cut.found(first)["recall_all_at_5"].tolist() == [1]
