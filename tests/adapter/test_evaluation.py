"""`model_adapter.evaluation`: what is measured, against the same measured one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memdb import InvalidInputError, MemDB, pack
from model_adapter import Context, LanguageModel, SentenceEmbedder, Stretch, Writer, create_database
from model_adapter.attention.weighing import SAFE, Weighing
from model_adapter.evaluation import Question, Settings, normalized
from model_adapter.evaluation.arms import Arm, Memory, Nothing, Rag
from model_adapter.evaluation.memories_seen import Seen
from model_adapter.evaluation.plan import Plan
from model_adapter.evaluation.questions import read_documents, read_questions
from model_adapter.evaluation.ranking import sort_of
from model_adapter.evaluation.scoring import batches, outcomes
from tests.adapter.asked import asked_files, write
from tests.adapter.slow import slow_weighed
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
    sights = Seen(database, plan, references == "retrieved", SAFE)
    start = len(database.shape.prefix) + database.shape.reference_length
    return (
        Nothing(model, writer.frame, 30),
        Rag(model, writer.frame, 30, sights.texts),
        Memory(model, writer.frame, 30, sights.memories, start),
    )


CANDIDATES = ("twelve", "green light, green light", "x")


@pytest.mark.parametrize("references", ["1", "5", "retrieved"])
def test_a_batch_gives_what_its_questions_give_alone(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]], references: str
) -> None:
    model, database, asked, documents = parts
    plan = Plan(documents, asked, Settings(references=references))  # type: ignore[arg-type]
    ranked = []
    for arm in arms(model, database, plan, references):
        # The second question has nothing to rank its answer among, the others one or all.
        others = [CANDIDATES, (), *((CANDIDATES[place % 3],) for place in range(len(asked) - 2))]
        together = outcomes(arm, plan.questions, 5, others)
        for question, outcome, candidates in zip(plan.questions, together, others, strict=True):
            (alone,) = outcomes(arm, [question], 5, [candidates])
            assert outcome.nll == pytest.approx(alone.nll, abs=1e-4)
            assert (outcome.right, outcome.answer) == (alone.right, alone.answer)
            losses, right = slowly(arm, question, plan, database, references)
            assert outcome.nll == pytest.approx(float(losses.mean()), abs=1e-4)
            assert outcome.first == pytest.approx(float(losses[0]), abs=1e-4)
            assert outcome.rest == pytest.approx(float(losses[1:].mean()), abs=1e-4)
            assert outcome.right == pytest.approx(right)
            others_of = [replace(question, answers=(candidate,)) for candidate in candidates]
            worse = [slowly(arm, one, plan, database, references)[0].mean() for one in others_of]
            best = min(worse, default=None)
            assert outcome.ranked is (None if best is None else bool(losses.mean() < best))
            ranked.append(outcome.ranked)
        first = outcomes(arm, plan.questions, 0)[0]
        assert first.seconds is first.ranked is None
    assert {True, False, None} == set(ranked)


def test_answers_are_ranked_a_few_at_a_time(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, database, asked, documents = parts
    rows: list[int] = []
    branches = Context.branches

    def counted(context: Context, chosen: list[int], capacity: int = 0) -> Context:
        rows.append(len(chosen))
        return branches(context, chosen, capacity)

    monkeypatch.setattr(Context, "branches", counted)
    *_, memory = arms(model, database, Plan(documents, asked, Settings()), "1")
    others = [CANDIDATES] * len(asked)
    whole = [outcome.ranked for outcome in outcomes(memory, asked, 0, others)]
    assert rows == [14, 16, 16, 10]
    monkeypatch.setattr("model_adapter.evaluation.scoring._TOKENS", 1)
    assert [outcome.ranked for outcome in outcomes(memory, asked, 0, others)] == whole
    assert rows[4:] == [14, *[1] * 42]


def test_a_one_token_answer_has_no_rest(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
) -> None:
    model, database, asked, documents = parts
    nothing, _, _ = arms(model, database, Plan(documents, asked, Settings()), "1")
    assert len(model.tokens("x")) == 1
    (outcome,) = outcomes(nothing, [replace(asked[0], answers=("x",))], 0)
    assert (outcome.nll, outcome.rest) == (outcome.first, None)


def slowly(
    arm: Arm, question: Question, plan: Plan, database: MemDB, references: str
) -> tuple[torch.Tensor, float]:
    """In one pass over everything, as benchmarks/answering.py has it."""
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
        if references == "retrieved":
            hits = database.retrieve(question.text, 5).hits
        else:
            hits = database.retrieve(question.text, 100).hits
            hits = [hit for hit in hits if hit.reference.document_id in plan.seen(question)]
        read = [(hit.memory, bias) for hit, bias in slow_weighed(hits, SAFE, True) if hit.memory]
        memories = pack([memory for memory, _ in read], database.shape, [bias for _, bias in read])
    answer = arm.answer(question)
    stretch = Stretch([*prompt.content, *prompt.tail, *answer], memories)
    (logits,) = context.read([[stretch]], every=True)
    logits = logits[-len(answer) - 1 : -1]
    target = torch.tensor(answer)
    losses = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    return losses, float((logits.argmax(-1) == target).float().mean())


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
    asked = [Question(str(n), f"{n}?", ("a",), (key,)) for n, key in enumerate([*documents] * 2)]
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


def test_several_documents_and_distractors(tmp_path: Path) -> None:
    lines = [{"id": key, "text": key, "metadata": {"title": key}} for key in "abcdefghij"]
    documents = read_documents(write(tmp_path / "c.jsonl", lines))
    two = Question("0", "0?", ("a",), ("a", "b"), ("d", "e", "f", "g"))
    few = Question("1", "1?", ("a",), ("a", "b", "c"), ("d",))
    one = Question("2", "2?", ("a",), ("a",), ("d",))
    asked = [two, one, few, replace(two, id="3", text="3?")]
    plain = Plan(documents, asked, Settings())
    assert [plain.seen(question) for question in (two, few)] == [("a", "b"), ("a", "b", "c")]
    assert [question.id for question in plain.questions] == ["0", "3", "2", "1"]  # side by side
    plan = Plan(documents, asked, Settings(references="5"))
    assert {"a", "b"} < set(plan.seen(two)) < set("abdefg")
    assert [len(set(plan.seen(question))) for question in (two, few, one)] == [5, 6, 5]
    assert plan.seen(asked[3]) == plan.seen(two)
    seeds = [Plan(documents, asked, Settings(references="5", seed=n)).seen(two) for n in range(9)]
    assert len(set(seeds)) > 5


def test_controls_see_another_article(tmp_path: Path) -> None:
    lines = [
        {"id": f"{title} {n}", "text": f"{title} {n}", "metadata": {"title": title}}
        for title in ("one", "two")
        for n in range(3)
    ]
    documents = read_documents(write(tmp_path / "c.jsonl", [*lines, {"id": "three", "text": "3"}]))
    asked = [Question(str(n), f"{n}?", ("a",), (key,)) for n, key in enumerate(documents)]
    plan = Plan(documents, asked, Settings(controls=True))
    for question in asked:
        (other,) = plan.other(question)
        assert other.split()[0] != question.document.split()[0]
    both = Question("9", "9?", ("a",), ("one 0", "two 2"))
    assert plan.other(both) == ("three",)
    article = {key: documents[key] for key in ("one 0", "one 1")}
    assert Plan(article, asked[:1], Settings(controls=True)).other(asked[0]) == ("one 1",)
    with pytest.raises(InvalidInputError, match="question '0' is about all documents"):
        Plan({"one 0": documents["one 0"]}, asked[:1], Settings(controls=True))


# --- what the right answer is ranked among --------------------------------------------------------


def test_sorts_of_answers() -> None:
    sorts = {
        "Yes.": "yes or no",
        "no": "yes or no",
        "no one": "other",
        "8:05": "number",
        "September 5, 1983": "number",
        "two to four": "number",
        "10th century": "number",
        "the Duke of Normandy": "name",
        "Denmark, Iceland and Norway": "name",
        "blue heron": "other",
        "a province of France": "other",
        "...": "other",
    }
    assert {answer: sort_of(answer) for answer in sorts} == sorts


def test_candidates_are_of_the_article_the_corpus_or_any_sort(tmp_path: Path) -> None:
    lines = [
        {"id": f"{title} {n}", "text": "x", "metadata": {"title": title}}
        for title in ("large", "small")
        for n in range(9)
    ]
    documents = read_documents(write(tmp_path / "c.jsonl", lines))

    def asked(document: str, *answers: str) -> Question:
        return Question(document + answers[0], f"What is {answers[0]}?", answers, (document,))

    names = [asked(f"large {n}", f"Large {'ABCDEFGHI'[n]}") for n in range(9)]
    few = [asked(f"small {n}", f"Small {'XYZ'[n]}") for n in range(3)]
    words = [
        asked("small 5", "blue"),
        asked("small 6", "the Blue!", "red"),
        asked("small 7", "red"),
    ]
    answers = [asked("large 0", "yes"), asked("large 1", "no")]
    questions = [*names, *few, *words, *answers]
    plan = Plan(documents, questions, Settings(references="1"))
    for question in questions:
        found = plan.candidates(question)
        assert len({normalized(answer) for answer in found}) == 7
        assert not {normalized(a) for a in found} & {normalized(a) for a in question.answers}
    assert all(answer.startswith("Large") for answer in plan.candidates(names[0]))
    assert {sort_of(answer) for answer in plan.candidates(few[0])} == {"name"}
    assert any(answer.startswith("Large") for answer in plan.candidates(few[0]))
    assert "red" in plan.candidates(words[0])  # the only other one of its sort
    assert "no" in plan.candidates(answers[0])
    changed = Plan(documents, questions, Settings(limit=2, seed=5))
    assert all(changed.candidates(one) == plan.candidates(one) for one in questions)
    assert Plan(documents, questions, Settings(ranking=False)).candidates(names[0]) == ()
    own = replace(names[0], wrong=("x", "y"))
    assert plan.candidates(own) == own.wrong
    assert Plan(documents, names[:1], Settings()).candidates(names[0]) == ()
    assert len(Plan(documents, names[:3], Settings()).candidates(names[0])) == 2


# --- what is retrieved ----------------------------------------------------------------------------


def test_what_is_found_is_what_a_query_finds(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
) -> None:
    _, database, asked, documents = parts
    found = Seen(database, Plan(documents, asked, Settings()), False, SAFE).found(asked)
    for question, keys in zip(asked, found, strict=True):
        assert keys == [hit.reference.document_id for hit in database.query(question.text).hits]
    assert all(keys[0] == one.document for one, keys in zip(asked[:4], found, strict=False))


def test_near_texts_are_of_the_memories_that_are_read(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
) -> None:
    _, database, asked, documents = parts
    weighing = Weighing(lift=0, slope=1, most=1, reach=0.3)
    sights = Seen(database, Plan(documents, asked, Settings()), True, weighing)
    near = sights.near(asked)
    for question, texts, whole in zip(asked, near, sights.texts(asked), strict=True):
        read = slow_weighed(database.query(question.text).hits, weighing)
        assert texts == tuple(hit.reference.content for hit, _ in read)
        assert texts == whole[: len(texts)]
    lengths = [len(texts) for texts in near]
    assert min(lengths) == 1 < max(lengths)


def test_memories_of_other_documents_are_weighed_among_themselves(
    parts: tuple[LanguageModel, MemDB, list[Question], dict[str, Any]],
) -> None:
    _, database, asked, documents = parts
    plan = Plan(documents, asked, Settings(controls=True))
    (packed,) = Seen(database, plan, False, SAFE).others(asked[:1])
    other = plan.other(asked[0])
    hits = database.query(asked[0].text, 100).hits
    hits = [hit for hit in hits if hit.reference.document_id in other]
    biases = [bias for _, bias in slow_weighed(hits, SAFE, True)]
    for layer in packed.layers.values():
        assert set(layer.memory[layer.visible].tolist()) == set(range(len(biases)))
        for number, bias in enumerate(biases):
            assert layer.mask[layer.memory == number] == pytest.approx(bias)
