"""benchmarks/quality.py: the whole program, on a tiny model and tiny data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from memdb import Document
from model_adapter.evaluation import Question
from tests.cli.test_scripts import script
from tests.helpers import FACTS, SAMPLE, tiny_model

Quality = Callable[..., Result]

LONG = " ".join(SAMPLE.split())


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quality:
    model = tiny_model(max_position_embeddings=4096)
    model.model.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    titled = [{"id": f.id, "text": f.text, "metadata": {"title": f.id}} for f in FACTS]
    articles = [
        {"id": f"{f.id} {n}", "text": f"{f.text} {LONG}", "metadata": {"title": f.id}}
        for f in FACTS[:2]
        for n in range(5)
    ]
    one = [{"question": f.question, "answers": [f.answer], "document": f.id} for f in FACTS]
    ids = [f.id for f in FACTS]
    two = [
        {"question": one[n]["question"], "answers": ["x"], "documents": ids[n : n + 2]}
        for n in range(2)
    ]
    two.append({**two[0], "question": "Why?", "distractors": ids[2:], "kind": "2-hop"})
    data = tmp_path / "data"
    kinds = ("short", "long") * 2
    asked = {
        "facts": (titled, [{**line, "kind": k} for line, k in zip(one, kinds, strict=True)]),
        "squad": (articles, [{**line, "document": line["document"] + " 0"} for line in one[:2]]),
        "hotpotqa": (titled, two),
        "musique": (titled, two),
    }
    for name, (corpus, questions) in asked.items():
        write(data / name / "corpus.jsonl", corpus)
        write(data / name / "questions.jsonl", questions)
    monkeypatch.chdir(tmp_path)
    module = script("benchmarks/quality.py")

    def call(*arguments: str, code: int = 0, stop: int | None = None) -> Result:
        """`stop`: interrupt the evaluation after so many."""
        calls = 0
        evaluate = script("benchmarks/quality.py").evaluate

        def counted(*given: Any, **more: Any) -> Any:
            nonlocal calls
            if calls == stop:
                raise KeyboardInterrupt
            calls += 1
            return evaluate(*given, **more)

        with monkeypatch.context() as patched:
            patched.setattr(module, "evaluate", counted)
            options = ["--models", "tiny", "--data", "data", "--work", "work", *arguments]
            result = CliRunner().invoke(module.main, options)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        call.calls = calls  # type: ignore[attr-defined]
        return result

    return call


def cells(text: str) -> dict[str, str]:
    """A Markdown table's second column by its first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1] for line in lines[2:]}


def test_all_cells_once_and_a_table_of_them(quality: Quality, tmp_path: Path) -> None:
    stopped = quality(stop=3, code=130)
    assert "interrupted; what was measured stays" in stopped.stderr
    assert "tiny: squad, 5, 1/8, 60 questions: 0.00 h" in stopped.stderr
    assert "in all: about" in stopped.stderr
    assert not stopped.stdout
    whole = quality()
    assert quality.calls == 4  # type: ignore[attr-defined]
    assert "facts" not in whole.stderr  # it was finished
    found = cells(whole.stdout)
    for title in (
        "squad, gold, 1/8, plain: share",
        "squad, gold + 4, 1/16, chat: share",
        "hotpotqa, gold + 3, 1/8: share",
        "conversations of two turns, right document first: whole, last alone",
    ):
        assert any(digit.isdigit() for digit in found[title]), title
    again = quality("--json", "out.json")
    assert quality.calls == 0  # type: ignore[attr-defined]
    assert (again.stdout, again.stderr) == (whole.stdout, "")  # it only prints
    kept = json.loads((tmp_path / "out.json").read_text())
    budgets = {
        (row["cell"]["data"], row["cell"]["sees"], row["cell"]["part"]): row["figures"]["budget"]
        for row in kept
        if row["cell"]["sees"] != "conversations"
    }
    pairs = 3 * 2 * 128
    assert budgets["squad", "5", 16] == pairs // 16
    assert budgets["facts", "retrieved", None] == budgets["musique", "5", 8] == pairs // 8
    (talk,) = (row["figures"] for row in kept if row["cell"]["sees"] == "conversations")
    assert talk["n"] == 2
    assert 0 <= talk["whole"] <= 1


def test_a_quick_run_has_as_many_questions_when_it_goes_on(quality: Quality) -> None:
    first = quality("--quick", stop=0, code=130)
    assert ", 12 questions:" in first.stderr  # so small a model answers them in no time
    shown = quality("--quick").stdout
    assert not any("1/16" in title for title in cells(shown))
    assert quality.calls == 5  # type: ignore[attr-defined]


def test_what_cells_have_in_common_is_estimated_once(quality: Quality, tmp_path: Path) -> None:
    module = script("benchmarks/quality_estimate.py")
    estimate = module.Estimate(tiny_model(), module.Data(tmp_path / "data"))
    cell = module.Cell("tiny", "squad", "1", 8, None)
    first, again, smaller = map(estimate.of, (cell, cell, replace(cell, part=16)))
    assert vars(again) == {"written": 0, "read": 0, "steps": 0, "said": 0}
    assert smaller.written == first.written > 0  # of another budget, and read by one arm of three
    assert (3 * smaller.steps, 3 * smaller.said) == (first.steps, first.said)
    assert 0 < smaller.read < first.read / 3
    speed = module.Speed(read=10, write=5, step=2, row=1)
    assert module.Work(written=5, read=20, steps=3, said=4).seconds(speed) == 1 + 2 + 6 + 1


def test_mistakes(quality: Quality, tmp_path: Path) -> None:
    for arguments, problem in (
        (("--data", "nowhere"), "there is no file 'nowhere/facts/corpus.jsonl'; `--data` names"),
        (("--models", "nothing"), "'nothing' cannot be loaded"),
    ):
        assert problem in quality(*arguments, code=1).stderr
    (tmp_path / "file").write_text("")
    assert "(`--work`)" in quality("--work", "file/work", code=1).stderr


def test_a_conversation_goes_from_one_document_to_another() -> None:
    talks = script("benchmarks/quality_conversations.py")
    documents = {
        "a": Document("First one. " + "More of it. " * 30, id="a"),
        "b": Document("Second. " + "And so on. " * 30, id="b"),
        "short": Document("Too short.", id="short"),
    }
    asked = [Question(key, f"What of {key}?", ("x",), (key,)) for key in documents]
    made = talks.conversations(documents, asked, str.split, 9)
    assert {talk.document for talk in made} == set(documents)
    for talk in made:
        assert talk.last == f"What of {talk.document}?"
        key = talk.first[len("What of ") : -1]
        assert key not in (talk.document, "short")
        assert documents[key].text.startswith(talk.said)
        assert 48 <= len(talk.said.split()) < 52
        assert talk.prompt("plain").endswith(f"Question: {talk.last}\nAnswer:")
        assert [message["role"] for message in talk.prompt("chat")] == ["user", "assistant", "user"]
    assert made == talks.conversations(documents, asked, str.split, 9)
