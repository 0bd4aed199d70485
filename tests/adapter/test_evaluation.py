"""`model_adapter.evaluation`: what is measured, against the same measured one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import MemDB
from model_adapter import Context, LanguageModel, SentenceEmbedder, Stretch, Writer, create_database
from model_adapter.evaluation import Question, Settings
from model_adapter.evaluation.arms import Arm, Memory, Nothing, Rag
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.scoring import batches, outcomes
from model_adapter.evaluation.sights import Sights
from model_adapter.questions import read_documents, read_questions
from tests.adapter.asked import asked_files, write
from tests.helpers import tiny_model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return asked_files(tmp_path)


# --- side by side, and one by one -----------------------------------------------------------------


@pytest.fixture(params=["llama", "gemma3", "mistral"])
def parts(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    files: tuple[Path, Path],
    minilm: SentenceEmbedder,
) -> Iterator[tuple[LanguageModel, MemDB, list[Question], dict[str, Any]]]:
    changes = {"sliding_window": 24} if request.param != "llama" else {}
    model = tiny_model(request.param, eos_token_id=None, **changes)
    documents = read_documents(files[0])
    asked = read_questions(files[1], documents)
    create = {"model": model, "embedder": minilm, "framing": "chat", "codec": "exact"}
    with create_database(tmp_path / "db", **create) as database:
        database.ingest(files[0])
        yield model, database, asked, documents


def arms(
    model: LanguageModel, database: MemDB, plan: Plan, references: str
) -> tuple[Nothing, Rag, Memory]:
    writer = database.writer
    assert isinstance(writer, Writer)
    sights = Sights(database, plan, references == "retrieved")
    start = len(database.shape.prefix) + database.shape.reference_length
    return (
        Nothing(model, writer.frame, 30),
        Rag(model, writer.frame, 30, sights.texts),
        Memory(model, writer.frame, 30, sights.memories, start),
    )


@pytest.mark.parametrize("references", ["1", "5", "retrieved"])
def test_a_batch_gives_what_its_questions_give_alone(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]], references: str
) -> None:
    model, database, asked, documents = parts
    plan = Plan(documents, asked, Settings(references=references))  # type: ignore[arg-type]
    for arm in arms(model, database, plan, references):
        together = outcomes(arm, plan.questions, 5)
        for question, outcome in zip(plan.questions, together, strict=True):
            (alone,) = outcomes(arm, [question], 5)
            assert outcome.nll == pytest.approx(alone.nll, abs=1e-4)
            assert (outcome.right, outcome.answer) == (alone.right, alone.answer)
            nll, right = slowly(arm, question, plan, database, references)
            assert outcome.nll == pytest.approx(nll, abs=1e-4)
            assert outcome.right == pytest.approx(right)
        assert outcomes(arm, plan.questions, 0)[0].seconds is None


def slowly(
    arm: Arm, question: Question, plan: Plan, database: MemDB, references: str
) -> tuple[float, float]:
    """In one pass over everything, as benchmarks/quality.py has it."""
    memories = None
    context = Context(arm.model)
    if isinstance(arm, Nothing):
        prompt = arm.frame.alone(arm.prompt(question))
    elif isinstance(arm, Rag):
        texts: list[str] = [documents_text(plan, key) for key in plan.seen(question)]
        if references == "retrieved":
            texts = [hit.reference.content for hit in database.query(question.text).hits]
        prompt = arm.frame.with_text(texts, arm.prompt(question))
    else:
        assert isinstance(arm, Memory)
        prompt = arm.frame.behind_memories(arm.prompt(question))
        context = Context(arm.model, arm.frame.prefix, len(arm.frame.prefix) + 128)
        sights = Sights(database, plan, references == "retrieved")
        (memories,) = sights.memories([question])
    answer = arm.answer(question)
    stretch = Stretch([*prompt.content, *prompt.tail, *answer], memories)
    (logits,) = context.read([[stretch]], every=True)
    logits = logits[-len(answer) - 1 : -1]
    target = torch.tensor(answer)
    nll = -logits.log_softmax(-1).gather(1, target[:, None]).mean()
    return float(nll), float((logits.argmax(-1) == target).float().mean())


def documents_text(plan: Plan, key: str) -> str:
    return str(plan._documents[key].text).strip()


def test_batches() -> None:
    assert list(batches([0] * 40)) == [range(16), range(16, 32), range(32, 40)]
    assert list(batches([9000, 9000, 1, 1])) == [range(1), range(1, 2), range(2, 4)]
    assert list(batches([])) == []


def test_an_answer_ends_with_its_line_or_its_text(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, database, asked, documents = parts
    nothing, _, _ = arms(model, database, Plan(documents, asked, Settings()), "1")
    said = outcomes(nothing, asked, 20)
    whole = [str(outcome.answer) for outcome in said]
    assert all("\n" not in answer for answer in whole)
    monkeypatch.setattr(model, "stop_tokens", lambda: frozenset(range(400)))
    for outcome, before in zip(outcomes(nothing, asked, 20), whole, strict=True):
        assert before.startswith(str(outcome.answer))
        assert len(str(outcome.answer)) < 12  # one token
    assert any(len(answer) > 12 for answer in whole)


@pytest.mark.parametrize(
    ("says", "answer"),
    [
        ("\n\n The tower.\nQuestion", "The tower."),  # a line that is empty is no answer
        ("The tower.\n\nIt is high", "The tower."),
        ("\n \n", ""),
        ("The tower", "The tower"),
    ],
)
def test_an_answer_is_the_first_line_that_says_something(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    answer: str,
) -> None:
    model, database, asked, documents = parts
    nothing, _, _ = arms(model, database, Plan(documents, asked, Settings()), "1")
    tokens = iter([*model.tokens(says), *[9] * 99])
    given: list[int] = []

    def saying(like: torch.Tensor) -> torch.Tensor:
        given.append(next(tokens))
        logits = torch.zeros_like(like)
        logits[:, given[-1]] = 1
        return logits

    read, step = Context.read, Context.step
    monkeypatch.setattr(
        Context, "read", lambda *a, **k: [saying(one) if not k else one for one in read(*a, **k)]
    )
    monkeypatch.setattr(Context, "step", lambda *a: saying(step(*a)))
    (outcome,) = outcomes(nothing, asked[:1], len(model.tokens(says)))
    assert outcome.answer == answer
    assert len(given) <= len(model.tokens(says))


# --- what is seen ---------------------------------------------------------------------------------


def test_five_documents_of_an_article(tmp_path: Path) -> None:
    lines = [
        {"id": f"{title} {n}", "text": f"{title} {n}", "metadata": {"title": title}}
        for title, count in (("large", 9), ("small", 4))
        for n in range(count)
    ]
    lines.append({"id": "none", "text": "none", "metadata": {"title": ["no", "text"]}})
    documents = read_documents(write(tmp_path / "c.jsonl", lines))
    asked = [Question(str(n), f"{n}?", ("a",), key) for n, key in enumerate([*documents] * 2)]
    plan = Plan(documents, asked, Settings(references="5"))
    assert [q.document for q in plan.questions] == sorted(
        (q.document for q in asked), key=list(documents).index
    )
    for question in plan.questions:
        seen = plan.seen(question)
        assert len(set(seen)) == 5
        assert question.document in seen
        article = all(key.startswith("large") for key in seen)
        assert article == question.document.startswith("large")
    places = {plan.seen(q).index(q.document) for q in plan.questions}
    assert len(places) > 2  # it does not stand at the same place each time
    fewer = Plan(documents, asked, Settings(references="5", limit=7))
    assert all(fewer.seen(question) == plan.seen(question) for question in asked)
    other = Plan(documents, asked, Settings(references="5", seed=1))
    assert any(other.seen(question) != plan.seen(question) for question in asked)
    few = {key: documents[key] for key in ("none", "small 1")}
    assert len(Plan(few, asked, Settings(references="5")).seen(asked[-1])) == 2


def test_recall_is_that_of_the_questions_document(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
) -> None:
    _, database, asked, documents = parts
    ranks = Sights(database, Plan(documents, asked, Settings()), False).ranks(asked)
    for question, rank in zip(asked, ranks, strict=True):
        hits = [hit.reference.document_id for hit in database.query(question.text).hits]
        assert rank == (hits.index(question.document) + 1 if question.document in hits else 0)
    assert {1} <= set(ranks)
    assert np.mean([rank == 1 for rank in ranks[:4]]) == 1
