"""`evaluate`: the whole of it, interrupted and again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memdb import InvalidInputError
from model_adapter import LanguageModel, SentenceEmbedder
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation import EVEN, Evaluation, Outcome, Question, evaluate, framed
from model_adapter.evaluation.arms import Arm
from model_adapter.evaluation.figures import compared
from model_adapter.evaluation.scoring import outcomes
from tests.adapter.asked import MORE, asked_files, corpus_lines, question_lines, settled, write
from tests.engine.helpers import keep_whatever_is_lost
from tests.helpers import FACTS, SAMPLE, tiny_model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return asked_files(tmp_path)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(eos_token_id=None)


def test_a_memory_of_everything_is_the_text_in_the_prompt(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    tokens = model.tokens(" ".join([SAMPLE] * 2))
    text = next(
        text
        for end in range(100, 400)
        if len(model.tokens(text := model.tokenizer.decode(tokens[:end]).strip())) == 128
    )
    corpus = write(tmp_path / "c.jsonl", [{"id": "a", "text": text}])
    asked = [{"question": q, "answers": ["storms"], "document": "a"} for q in MORE]
    questions = write(tmp_path / "q.jsonl", asked)
    settings = settled(budget=3 * 2 * 128, framing="both", text_limit=0, weighing=EVEN)
    found = evaluate(
        corpus, questions, settings, model=model, embedder=minilm, work=tmp_path / "work"
    )
    for framing in found.framings:
        assert framing.memory.nll == pytest.approx(framing.rag.nll, abs=1e-4)
        assert framing.memory.nll != pytest.approx(framing.nothing.nll, abs=1e-2)
        assert framing.memory.f1 == framing.rag.f1
        assert framing.share == pytest.approx(1, abs=1e-2)
        assert framing.share_interval == pytest.approx((1, 1), abs=0.1)
    assert found.best.framing in ("plain", "chat")
    # 128 tokens, float32, keys and values.
    assert found.best.size.tokens_128 == found.best.size.reference
    assert found.best.size.reference == pytest.approx(3 * 2 * 128 * 2 * 8 * 4, rel=0.1)


@pytest.mark.parametrize("mark", ["?", "."])
def test_what_is_asked_for_is_lifted_and_running_text_is_not(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder, mark: str
) -> None:
    """A message asks whatever it says, a plain prompt by its question mark."""
    corpus = write(tmp_path / "c.jsonl", corpus_lines())
    lines = [{**line, "question": line["question"].rstrip("?") + mark} for line in question_lines()]
    questions = write(tmp_path / "q.jsonl", lines)

    def measured(weighing: Weighing) -> dict[str, tuple[float, float]]:
        settings = settled(framing="both", references="5", weighing=weighing, text_limit=4)
        parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
        found = {}
        for one in evaluate(corpus, questions, settings, **parts).framings:
            assert one.running_text is not None
            found[one.framing] = one.memory.nll, one.running_text.perplexity_with
        return found

    even, lifted = measured(EVEN), measured(replace(EVEN, lift=1.0))
    asked = measured(replace(EVEN, asked=1.0))
    for framing in ("plain", "chat"):
        for before, after in zip(even[framing], lifted[framing], strict=True):
            assert before != after
        (nll, text), lifts = asked[framing], framing == "chat" or mark == "?"
        assert text == even[framing][1]
        assert nll == (lifted if lifts else even)[framing][0]


def without_seconds(found: Evaluation) -> Any:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            kept = (name for name in value if not name.startswith(("seconds", "work")))
            return {name: cleaned(value[name]) for name in kept}
        return value

    return cleaned(found.to_json())


@pytest.mark.parametrize("references", ["5", "retrieved"])
def test_the_same_seed_gives_the_same_figures(
    tmp_path: Path,
    files: tuple[Path, Path],
    model: LanguageModel,
    minilm: SentenceEmbedder,
    references: str,
) -> None:
    settings = settled(framing="both", references=references)
    parts: dict[str, Any] = {"model": model, "embedder": minilm}
    one = evaluate(*files, settings, work=tmp_path / "one", **parts)
    two = evaluate(*files, settings, work=tmp_path / "two", **parts)
    assert without_seconds(one) == without_seconds(two)
    assert json.loads(json.dumps(one.to_json())) == one.to_json()
    other = evaluate(*files, replace(settings, seed=1), work=tmp_path / "one", **parts)
    assert other.best.memory.intervals != one.best.memory.intervals


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path,
    files: tuple[Path, Path],
    model: LanguageModel,
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def counted(arm: Arm, questions: list[Question], *given: Any) -> list[Outcome]:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append((type(arm).__name__, len(questions)))
        return outcomes(arm, questions, *given)

    monkeypatch.setattr(framed, "outcomes", counted)
    monkeypatch.setattr("model_adapter.evaluation.scoring._BATCH", 8)
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
    settings = settled()
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        evaluate(*files, settings, **parts)
    stop = -1
    found = evaluate(*files, settings, **parts)
    assert asked == [(name, n) for name in ("Nothing", "Rag", "Memory") for n in (8, 6)]
    again = evaluate(*files, settings, **parts)
    assert (len(asked), again) == (6, found)
    evaluate(*files, replace(settings, budget=20), **parts)
    assert asked[6:] == [("Memory", 8), ("Memory", 6)]
    evaluate(*files, replace(settings, references="5"), **parts)
    assert [name for name, _ in asked[8:]] == ["Rag", "Rag", "Memory", "Memory"]
    # A line that was cut off is measured again.
    (file,) = (tmp_path / "work" / "shared").glob("nothing*")
    lines = file.read_bytes()
    file.write_bytes(lines[:-10])
    assert without_seconds(evaluate(*files, settings, **parts)) == without_seconds(found)
    assert asked[12:] == [("Nothing", 6)]
    evaluate(*files, settings, **parts)
    assert len(asked) == 13


def test_an_interrupted_ingest_goes_on(
    tmp_path: Path, files: tuple[Path, Path], model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "writing memories" and done:
            raise KeyboardInterrupt

    parts: dict[str, Any] = {"model": model, "embedder": minilm}
    settings = settled(text_limit=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*files, settings, work=tmp_path / "a", progress=interrupted, **parts)
    one = evaluate(*files, settings, work=tmp_path / "a", **parts)
    two = evaluate(*files, settings, work=tmp_path / "b", **parts)
    assert without_seconds(one) == without_seconds(two)


def test_a_fitted_codec_has_all_memories_also_after_an_interruption(
    tmp_path: Path,
    model: LanguageModel,
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_whatever_is_lost(monkeypatch)
    lines = [{"id": str(n), "text": f"Ship {n} is in the harbour."} for n in range(260)]
    corpus = write(tmp_path / "c.jsonl", lines)
    asked = {"question": "Which ship?", "answers": ["7"], "document": "7"}
    questions = write(tmp_path / "q.jsonl", [asked])
    settings = settled(codec="klt8", answers=False)
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}

    def interrupted(stage: str, done: int, total: int) -> None:
        if stage in ("fitting codec klt8", "recoding memories"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(corpus, questions, settings, progress=interrupted, **parts)
    (work,) = (path for path in (tmp_path / "work").iterdir() if path.name != "shared")
    (work / "making").mkdir()
    found = evaluate(corpus, questions, settings, **parts)
    assert "klt8" in found.best.size.codecs  # `int8` has what is unlike the others
    parts["work"] = tmp_path / "other"
    size = evaluate(corpus, questions, settings, **parts).best.size
    assert size.codecs == found.best.size.codecs
    # Threads add up in any order, so a fit may differ in a bit.
    assert size.reference == pytest.approx(found.best.size.reference, rel=0.01)


def test_likelihoods_alone(
    tmp_path: Path, files: tuple[Path, Path], model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
    found = evaluate(*files, settled(answers=False, text_limit=0, limit=3), **parts)
    memory = found.best.memory
    assert (memory.em, memory.f1, memory.seconds, memory.answers_right) == (None,) * 4
    assert found.best.compared["f1_difference"] == (None, None)
    likelihoods = {"nll", "nll_first", "nll_rest", "tokens_right", "ranked_first"}
    assert set(memory.intervals) == likelihoods
    assert (found.questions, found.max_new_tokens, found.best.running_text) == (3, 0, None)
    full = evaluate(*files, settled(text_limit=0, limit=3), **parts)
    assert full.best.memory.nll == memory.nll
    assert full.best.memory.seconds is not None
    assert full.best.memory.seconds > 0


def test_several_documents_kinds_and_controls(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    one, two = (fact.id for fact in FACTS[:2])
    asked = [
        *({**line, "kind": "one"} for line in question_lines()[:4]),
        {"question": MORE[0], "answers": ["x"], "documents": [one, two], "kind": "two"},
        {"question": FACTS[0].question, "answers": ["x"], "documents": [one, two], "kind": "two"},
        {"question": MORE[1], "answers": ["x"], "documents": [one, two], "distractors": ["long 1"]},
    ]
    corpus = write(tmp_path / "c.jsonl", corpus_lines())
    questions = write(tmp_path / "q.jsonl", asked)
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
    for references in ("5", "retrieved"):
        settings = settled(references=references, controls=True, text_limit=0)
        found = evaluate(corpus, questions, settings, **parts)
        assert found == evaluate(corpus, questions, settings, **parts)
        best = found.best
        own = ["rag_1", "rag_near"] if references == "retrieved" else []
        assert list(best.arms) == ["nothing", "rag", *own, "memory", "prefix", "other"]
        assert len({arm.nll for arm in best.arms.values()}) == len(best.arms)
        assert {kind: one.n for kind, one in best.kinds.items()} == {"one": 4, "two": 2}
        for name in ("share", "nll_difference"):
            assert best.compared[name] != best.kinds["one"].compared[name]
        alone = evaluate(corpus, questions, replace(settings, controls=False), **parts)
        assert alone.best.memory == best.memory
        assert alone.best.compared["share_other"] == (None, None)
        gain = best.nothing.nll - best.rag.nll
        for name, arm in (("share_prefix", "prefix"), ("share_other", "other")):
            expected = (best.nothing.nll - best.arms[arm].nll) / gain
            assert best.compared[name][0] == pytest.approx(expected)
        assert best.compared["nll_difference"][0] == pytest.approx(best.memory.nll - best.rag.nll)
    recall = {name: figure[0] or 0 for name, figure in best.recall.items()}
    assert recall["recall_all_at_5"] <= recall["recall_at_5"]


def test_figures_are_those_of_the_questions_that_have_them() -> None:
    rows = {
        "nothing": [row(4, rest=None, ranked=None, answer="x"), row(6, 5.0, True, "in 1066")],
        "rag": [row(2, None, None, "1066 A.D."), row(2, 1.0, False, "1066")],
        "rag_1": [row(2, None, None, ""), row(2, 1.0, False, "")],
        "rag_near": [row(2, None, None, ""), row(2, 1.0, False, "1066")],
        "memory": [row(3, None, None, "1066"), row(3, 2.0, True, "10661")],
    }
    asked = [Question(str(n), f"{n}?", ("1066",), ("a",)) for n in range(2)]
    found = compared(asked, rows, 0)
    assert (found.nothing.nll_rest, found.nothing.ranked_first) == (5, 1)
    assert (found.nothing.nll, found.nothing.intervals["nll_rest"]) == (5, (5, 5))
    right = {name: arm.answers_right for name, arm in found.arms.items()}
    assert right == {"nothing": 0.5, "rag": 1, "rag_1": 0, "rag_near": 0.5, "memory": 0.5}
    assert (found.rag.em, found.memory.em) == (0.5, 0.5)
    values = {name: value for name, (value, _) in found.compared.items()}
    assert values["share"] == pytest.approx(2 / 3)
    assert (values["rag_gain"], values["nll_difference"], values["share_other"]) == (3, 1, None)
    for name in ("answers_right_ratio", "answers_right_better_ratio"):
        assert values[name] == 0.5
    assert values["answers_right_difference"] == values["answers_right_better_difference"] == -0.5
    lone = compared(asked[:1], {arm: found[:1] for arm, found in rows.items()}, 0)
    assert (lone.memory.nll_rest, lone.memory.ranked_first) == (None, None)
    assert "nll_rest" not in lone.memory.intervals


def row(nll: float, rest: float | None, ranked: bool | None, answer: str) -> dict[str, Any]:
    return Outcome(nll, 1.0, nll, rest, ranked, answer, 0.5).to_json()


def test_what_is_too_long_for_the_model_is_refused_at_once(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"id": "a", "text": SAMPLE * 10}])
    questions = write(
        tmp_path / "q.jsonl", [{"question": "Why?", "answers": ["So."], "document": "a", "id": "q"}]
    )
    parts: dict[str, Any] = {"model": model, "embedder": minilm, "work": tmp_path / "work"}
    with pytest.raises(InvalidInputError, match=r"question 'q' .* ends at 1024.* document 'a'"):
        evaluate(corpus, questions, settled(), **parts)
    assert not (tmp_path / "work").exists()
    evaluate(corpus, questions, settled(references="retrieved"), **parts)
