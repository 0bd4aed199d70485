"""Parts of an evaluation: files, answers, intervals, running text, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import Hit, InvalidInputError, MemDB, MissingPartError, pack
from model_adapter import Context, SentenceEmbedder, Stretch, Writer, create_database, overlaps
from model_adapter.attention.weighing import EVEN, SAFE, Weighing
from model_adapter.evaluation import (
    Bootstrap,
    Settings,
    evaluate,
    exact_match,
    f1,
    holds,
    normalized,
    picture,
    plot,
)
from model_adapter.evaluation.folder import Results
from model_adapter.evaluation.questions import read_documents, read_questions, spread
from model_adapter.evaluation.running_text import running_text
from tests.adapter.slow import slow_weighed
from tests.helpers import FACTS, SAMPLE, tiny_model

CORPUS = '{"id": "a", "text": "A."}\n\n{"id": "b", "text": "B."}\n'
GOOD = {"question": "q?", "answers": ["x"], "document": "a"}


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON: .*column 2"),
        ("[1]", "not a JSON object; a line looks like"),
        ("[" * 100_000, "not JSON"),
        (b"\xff", "not UTF-8"),
        ({"question": None}, "'question' must be a text"),
        ({"question": "  "}, "'question' must be a text"),
        ({"question": "\ud800"}, "surrogate"),
        ({"answers": []}, "at least one accepted answer"),
        ({"answers": "x"}, "at least one accepted answer"),
        ({"answers": ["x", 1]}, "an answer must be a text"),
        ({"answers": [" "]}, "an answer must be a text"),
        ({"document": "c"}, "corpus has no document 'c'"),
        ({"document": 1}, "corpus has no document 1"),
        ({"id": True}, "'id' must be a text"),
        ({}, "same question on the same document is already in line 2"),
        ({"question": "r?", "id": "one"}, "the id 'one' is already used in line 2"),
        ({"question": ...}, "the field 'question' is missing"),
        ({"answers": ...}, "the field 'answers' is missing"),
        ({"document": ...}, "the field 'document' is missing"),
        ({"documents": ["a"]}, "'document' and 'documents' are both there"),
        ({"document": ..., "documents": "a"}, "'documents' must be a list of documents' ids"),
        ({"document": ..., "documents": []}, "'documents' is empty"),
        ({"document": ..., "documents": ["a", "c"]}, "no document 'c' of 'documents'"),
        ({"document": ..., "documents": ["a", "a"]}, "'a' stands twice in 'documents'"),
        ({"distractors": ["c"]}, "no document 'c' of 'distractors'"),
        ({"distractors": ["b", "a"]}, "'a' stands among the 'distractors', too"),
        ({"kind": 1}, "'kind' must be a text"),
        ({"wrong": "y"}, "'wrong' must be a list of answers"),
        ({"wrong": ["y", ""]}, "an answer of 'wrong' must be a text"),
        ({"wrong": ["y", "x"]}, "the answer 'x' of 'wrong' is an accepted one, too"),
    ],
)
def test_mistakes_in_questions(tmp_path: Path, line: Any, problem: str) -> None:
    (tmp_path / "c.jsonl").write_text(CORPUS)
    documents = read_documents(tmp_path / "c.jsonl")
    if isinstance(line, dict):
        fields = {**GOOD, **line}
        line = json.dumps({name: value for name, value in fields.items() if value is not ...})
    line = line.encode() if isinstance(line, str) else line
    first = json.dumps({**GOOD, "id": "one", "more": 1}).encode()
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + first + b"\n" + line)
    with pytest.raises(InvalidInputError, match=rf"q\.jsonl, line 3: .*{problem}"):
        read_questions(path, documents)
    path.write_bytes(b"\n" + first)
    (question,) = read_questions(path, documents)
    assert (question.id, question.answers) == ("one", ("x",))


def test_questions_on_several_documents(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(CORPUS + '{"id": "c", "text": "C."}')
    documents = read_documents(tmp_path / "c.jsonl")
    two = {"question": "q?", "answers": ["x"], "documents": ["b", "a"], "distractors": ["c"]}
    lines = [two, {**two, "documents": ["b"], "kind": "one"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = read_questions(tmp_path / "q.jsonl", documents)
    assert (first.documents, first.document, first.distractors) == (("b", "a"), "b", ("c",))
    assert (first.kind, second.kind, second.documents) == (None, "one", ("b",))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [two, two])))
    with pytest.raises(InvalidInputError, match="same question on the same documents is already"):
        read_questions(tmp_path / "q.jsonl", documents)


def test_mistakes_in_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InvalidInputError, match=r"empty\.jsonl' holds no documents"):
        read_documents(empty)
    with pytest.raises(InvalidInputError, match=r"empty\.jsonl' holds no questions"):
        read_questions(empty, {})
    for path, problem in (
        ("x", "there is no file"),
        (".", "no regular file"),
        ("\0", "no file|cannot"),
    ):
        with pytest.raises(InvalidInputError, match=problem):
            read_documents(tmp_path / path)
        with pytest.raises(InvalidInputError, match=problem):
            read_questions(tmp_path / path, {})
    twice = tmp_path / "twice.jsonl"
    twice.write_text(CORPUS + '{"id": "a", "text": "C."}\n')
    with pytest.raises(InvalidInputError, match=r"twice\.jsonl, line 4: .*'a' is already used"):
        read_documents(twice)


def test_settings_are_checked() -> None:
    wrong: list[dict[str, Any]] = [
        {"limit": 0},
        {"references": "2"},
        {"framing": "x"},
        {"max_new_tokens": 0},
        {"text_limit": -1},
        {"seed": -1},
        {"limit": True},
    ]
    for settings in wrong:
        with pytest.raises(InvalidInputError):
            Settings(**settings)


def test_a_limit_is_spread() -> None:
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(9, 1) == [0]


def test_results_are_read_back(tmp_path: Path) -> None:
    results = Results(tmp_path, "x", {"a": 1})
    assert results.get("k") is None
    results.add({"k": {"v": 0.1}, "l": {"v": "é\n"}})
    again = Results(tmp_path, "x", {"a": 1})
    assert again.get("l") == {"key": "l", "v": "é\n"}
    assert Results(tmp_path, "x", {"a": 2}).get("l") is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3] + b"\xff")
    torn = Results(tmp_path, "x", {"a": 1})
    assert (torn.get("k") or {})["v"] == 0.1
    assert torn.get("l") is None
    torn.add({"l": {"v": 2}})
    assert (Results(tmp_path, "x", {"a": 1}).get("l") or {})["v"] == 2


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("  The  U.S. Army,\tan  army ") == "us army army"
    assert exact_match("the Normans.", ["x", "Normans"]) == 1
    assert exact_match("Norman", ["Normans"]) == 0
    assert f1("in the 10th century", ["10th and 11th centuries", "10th century"]) == 0.8
    assert f1("", ["x"]) == f1("y", ["x"]) == 0
    assert f1("the", ["a"]) == exact_match("the", ["a"]) == 1


def test_an_answer_is_right_where_an_accepted_one_stands_in_it() -> None:
    assert holds("It was the Duke of Normandy, in 1066.", ["x", "duke of normandy"]) == 1
    assert holds("in 10661", ["1066"]) == holds("Normandy's", ["Normandy"]) == 0
    assert holds("Duke Normandy", ["Duke of Normandy"]) == holds("", ["x"]) == 0
    assert holds("anything", ["the"]) == 0  # it says nothing
    assert holds("a", ["the"]) == 1


# --- intervals ------------------------------------------------------------------------------------


def test_intervals_are_paired() -> None:
    random = np.random.default_rng(0)
    base = random.normal(5, 2, 400)
    columns = {"one": base, "two": base + 1, "half": base / 2}
    bootstrap = Bootstrap(columns, 7)
    mean, (low, high) = bootstrap.mean("one")
    assert mean == pytest.approx(base.mean())
    assert high - low == pytest.approx(2 * 1.96 * base.std() / 20, rel=0.1)
    value, interval = bootstrap.figure(lambda means: means["two"] - means["one"])
    assert value == pytest.approx(1)
    assert interval == pytest.approx((1, 1))
    value, interval = bootstrap.figure(lambda means: means["half"] / means["one"])
    assert interval == pytest.approx((0.5, 0.5))
    assert bootstrap.figure(lambda means: means["one"] / (means["one"] * 0)) == (None, None)
    assert Bootstrap(columns, 7).mean("one") == (mean, (low, high))
    assert Bootstrap(columns, 8).mean("one") != (mean, (low, high))
    assert Bootstrap({"one": np.array([3.0])}, 0).mean("one") == (3, (3, 3))


# --- running text ---------------------------------------------------------------------------------


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("weighing", [EVEN, SAFE])
@pytest.mark.parametrize("framing", ["plain", "chat"])
def test_running_text_is_read_behind_what_others_say(
    tmp_path: Path, minilm: SentenceEmbedder, framing: Any, weighing: Weighing
) -> None:
    model = tiny_model(eos_token_id=None)
    texts = {
        "sample": SAMPLE,
        "again": SAMPLE,  # says the same
        **{fact.id: fact.text * (1 + (n == 1)) for n, fact in enumerate(FACTS)},
        "short": "Nothing.",
        "blank": "a" + " " * 200,
    }
    path = tmp_path / "c.jsonl"
    lines = (json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items())
    path.write_text("".join(lines))
    documents = read_documents(path)
    create: dict[str, Any] = {"model": model, "embedder": minilm, "framing": framing}
    with create_database(tmp_path / "db", codec="exact", **create) as database:
        database.ingest(path)
        writer = database.writer
        assert isinstance(writer, Writer)
        results = Results(tmp_path, "text", {})
        given = (database, model, writer.frame, documents)
        found = running_text(*given, 50, 0, weighing, results, silent)
        long = [key for key, text in texts.items() if len(model.tokens(text)) > 64]
        assert found is not None
        assert found.documents == len(long)
        rows = {key: results.get(key) or {} for key in long}
        for key in long:
            expected = slowly(database, writer, key, texts[key], weighing)
            for name, value in expected.items():
                assert rows[key][name] == pytest.approx(value, rel=1e-4), (key, name)
        tokens = sum(row["tokens"] for row in rows.values())
        behind = sum(row["with"] for row in rows.values()) / tokens
        alone = sum(row["without"] for row in rows.values()) / tokens
        assert found.tokens == tokens
        assert found.perplexity_with == pytest.approx(np.exp(behind))
        assert found.ratio == pytest.approx(np.exp(behind - alone))
        assert found.ratio_interval[0] <= found.ratio <= found.ratio_interval[1]
        assert found.dropped >= 4  # `sample` and `again`, by each other and themselves
        assert running_text(*given, 0, 0, weighing, results, silent) is None
        short = {"short": documents["short"]}
        assert running_text(*given[:3], short, 50, 0, weighing, results, silent) is None
        two = running_text(*given, 2, 0, weighing, results, silent)
        assert two is not None
        assert two.documents == 2


def slowly(
    database: MemDB, writer: Writer, key: str, text: str, weighing: Weighing
) -> dict[str, float]:
    """One document, a context for each reading."""
    model, frame = writer.model, writer.frame
    tokens = model.tokens(text)[:128]
    everything = database.query(model.tokenizer.decode(tokens[:64]), 100).hits
    kept: list[Hit] = []
    dropped = 0
    for hit in everything:
        said = model.tokens(hit.reference.content)
        if hit.reference.document_id == key or overlaps(tokens, said, 2 / 3):
            dropped += 1
        else:
            kept.append(hit)
        if len(kept) == 5:
            break
    read = [
        (memory, bias)
        for hit, bias in slow_weighed(kept, weighing)
        for other, memory in database.memories(hit.reference.document_id)
        if other.id == hit.id and memory is not None
    ]
    memories = pack([memory for memory, _ in read], database.shape, [bias for _, bias in read])
    gap = model.tokens("\n" if frame.framing == "plain" else "\n\n")
    head = frame.alone("x").content[:-1]
    behind = Context(model, frame.prefix, len(frame.prefix) + 128)
    alone = Context(model)
    target = torch.tensor(tokens[64:])
    values: dict[str, float] = {"dropped": dropped, "tokens": len(target)}
    for name, context, stretch in (
        ("with", behind, Stretch([*gap, *tokens], memories)),
        ("without", alone, Stretch([*head, *tokens])),
    ):
        (logits,) = context.read([[stretch]], every=True)
        logits = logits[-len(target) - 1 : -1].log_softmax(-1)
        values[name] = -float(logits.gather(1, target[:, None]).sum())
    return values


# --- pictures -------------------------------------------------------------------------------------


def test_the_same_figures_are_the_same_picture(
    tmp_path: Path, minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(eos_token_id=None)
    (tmp_path / "c.jsonl").write_text(CORPUS)
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD))
    files = tmp_path / "c.jsonl", tmp_path / "q.jsonl"
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
    found = evaluate(*files, Settings(max_new_tokens=2), **parts)
    assert [framing.framing for framing in found.framings] == ["plain", "chat"]
    plot(found, tmp_path / "a.svg")
    plot(found, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in drawn
    plot(found, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    plot(evaluate(*files, Settings(answers=False), **parts), tmp_path / "c.svg")
    for name, problem in (("a.pdf", r"\.png or \.svg"), ("x/a.svg", "no folder")):
        with pytest.raises(InvalidInputError, match=problem):
            plot(found, tmp_path / name)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(picture.importlib, "import_module", missing)
    with pytest.raises(MissingPartError, match="pip install 'matplotlib"):
        plot(found, tmp_path / "a.svg")
