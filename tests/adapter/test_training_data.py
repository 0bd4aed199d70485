"""What training learns from: corpora, questions by rule, passages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from memdb import CorpusError, InvalidInputError
from model_adapter import Frame, LanguageModel
from model_adapter.training import Recipe, read
from model_adapter.training.cloze import Clozes, sentences
from model_adapter.training.corpus import Question
from model_adapter.training.examples import Example, Examples, Framed
from model_adapter.training.passages import Draw, Passage
from tests.helpers import FACTS, SAMPLE, tiny_model

TEXT = (
    "The Zintle language has eleven vowels. In 1911, Anselm Vireo discovered norvium in Gossamer "
    "Bay. The director of Thistledown Motors is Agnes Okoro."
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def corpus_file(folder: Path, name: str, *texts: str) -> Path:
    file = folder / name
    lines = [{"id": f"{name} {n}", "text": text} for n, text in enumerate(texts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_references_are_those_of_ingest(model: LanguageModel, tmp_path: Path) -> None:
    corpus = read(model, [corpus_file(tmp_path, "a", SAMPLE * 2, FACTS[0].text)])
    assert corpus.names == ("a 0", "a 1")
    long, short = corpus.documents
    assert [reference.ordinal for reference in long] == list(range(len(long)))
    assert len(long) == 3
    assert all(len(reference.tokens) <= 128 for reference in long)
    assert all(list(r.tokens) == model.tokens(r.text) for r in long)
    assert short[0].text == FACTS[0].text


def test_what_must_not_be_learned_is_left_out(model: LanguageModel, tmp_path: Path) -> None:
    learned = corpus_file(tmp_path, "a", *(fact.text for fact in FACTS))
    reworded = FACTS[1].text.replace("in 1911 ", "") + " That is all that is known of it."
    corpus = read(model, [learned], exclude=[corpus_file(tmp_path, "b", reworded, "Nothing.")])
    assert corpus.excluded == 1
    assert [len(document) for document in corpus.documents] == [1, 0, 1, 1]
    with pytest.raises(InvalidInputError, match=r"nothing to learn from .* that --exclude leaves"):
        read(model, [learned], exclude=[learned])


def test_questions_belong_to_documents(model: LanguageModel, tmp_path: Path) -> None:
    file = corpus_file(tmp_path, "a", FACTS[0].text)
    asked = tmp_path / "questions.jsonl"
    line = {"question": FACTS[0].question, "answers": [FACTS[0].answer], "document": "a 0"}
    asked.write_text(json.dumps(line) + "\n\n")
    corpus = read(model, [file], questions=asked)
    assert corpus.questions == {0: [Question(FACTS[0].question, FACTS[0].answer)]}
    asked.write_text(json.dumps({**line, "document": "b"}))
    with pytest.raises(InvalidInputError, match="line 1: the corpus has no document 'b'"):
        read(model, [file], questions=asked)


def test_a_mistake_in_a_corpus_is_named(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(CorpusError, match="a, line 2: the field 'text' is missing"):
        read(model, [tmp_path / "a"])


def test_spans_are_asked_for() -> None:
    clozes = Clozes([TEXT])
    found = {q.answer: q.text for q in clozes.about(TEXT, random.Random(0), 100)}
    assert {"eleven", "1911", "Anselm Vireo", "Gossamer Bay", "Agnes Okoro"} <= set(found)
    for answer, question in found.items():
        assert any(answer in sentence for sentence in sentences(TEXT))
        assert "____" in question or question.startswith(("Complete", "When?", "Who or what"))
    for seed in range(20):
        for question in clozes.about(TEXT, random.Random(seed), 100):
            assert question.text.strip()
            assert question.answer.strip()
    said = clozes.saying(TEXT, random.Random(0))
    assert said is not None
    assert said.answer in TEXT
    assert clozes.saying("oh no", random.Random(0)) is None


def test_rows_have_the_same_tokens_behind_text_and_behind_memories(model: LanguageModel) -> None:
    for framing in ("plain", "chat"):
        framed = Framed(model, Frame(model, framing))
        row = framed.row(Example("Who?", "Ada"))
        assert row is not None
        answer = model.tokens(" Ada" if framing == "plain" else "Ada")
        assert list(row.tokens[-row.answer :]) == answer
        prompt = "Question: Who?\nAnswer:" if framing == "plain" else "Who?"
        whole = framed.frame.with_text(["Ships come."], prompt)
        reference = read_reference(model, "Ships come.")
        assert [*framed.text([reference]), *row.tokens] == [
            *whole.content,
            *whole.tail,
            *answer,
        ]
        running = framed.row(Example("", "from many countries"))
        assert running is not None
        assert list(running.tokens[-running.answer :]) == model.tokens("from many countries")
        assert framed.row(Example("Who?", "Ada " * 100)) is None


def read_reference(model: LanguageModel, text: str) -> object:
    from model_adapter.training import Reference

    return Reference(0, 0, text, tuple(model.tokens(text)))


def draw(model: LanguageModel, file: Path, **changes: object) -> Draw:
    corpus = read(model, [file])
    recipe = Recipe(steps=1, **changes)  # type: ignore[arg-type]
    frames = {name: Framed(model, Frame(model, name)) for name in recipe.framings}
    clozes = Clozes([reference.text for reference in corpus.references])
    return Draw(corpus, Examples(corpus, clozes, {}), frames, recipe)


def test_passages_depend_on_the_number_alone(model: LanguageModel, tmp_path: Path) -> None:
    file = corpus_file(tmp_path, "a", *(fact.text for fact in FACTS), SAMPLE * 2)
    one, other = draw(model, file), draw(model, file)
    forwards = [one.passage(n) for n in range(12)]
    backwards = [other.passage(n) for n in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert forwards != [draw(model, file, seed=1).passage(n) for n in range(12)]


def test_passages_are_as_the_recipe_says(model: LanguageModel, tmp_path: Path) -> None:
    file = corpus_file(tmp_path, "a", *(fact.text for fact in FACTS), SAMPLE * 4)
    drawn = draw(model, file, references=(2, 4), examples=3, budgets=(100, 200))
    seen = [drawn.passage(n) for n in range(60)]
    for passage in seen:
        assert 2 <= len(passage.memory) <= 4
        assert len(set(passage.memory)) == len(passage.memory)
        assert set(passage.gold) <= set(passage.memory)
        ordinals = [reference.ordinal for reference in passage.gold]
        assert ordinals == list(range(ordinals[0], ordinals[0] + len(ordinals)))
        assert len({reference.document for reference in passage.gold}) == 1
        assert 1 <= len(passage.rows) <= 3
        assert len(passage.rows) == len(passage.examples)
    assert {passage.framing for passage in seen} == {"plain", "chat"}
    assert {passage.budget for passage in seen} == {100, 200}
    assert {len(passage.gold) for passage in seen} >= {1, 2}
    assert any("" in [e.prompt for e in passage.examples] for passage in seen)  # running text


def is_unrelated(passage: Passage) -> bool:
    """Whether a text is read behind other references alone."""
    return [example.prompt for example in passage.examples] == [""] and (
        passage.gold == passage.memory
    )


def numbered(folder: Path) -> Path:
    """Documents of which no two references are the same."""
    texts = [
        " ".join(f"In {1000 + 100 * n + i} the ship Quill{n} brought {i} lamps." for i in range(40))
        for n in range(4)
    ]
    return corpus_file(folder, "a", *texts)


def test_some_passages_are_short(model: LanguageModel, tmp_path: Path) -> None:
    file = numbered(tmp_path)
    drawn = draw(model, file, references=(3, 3), short=0.3)
    short = [p for p in map(drawn.passage, range(60)) if any(r.part for r in p.gold)]
    assert len(short) > 5
    whole = {(r.document, r.ordinal): r for r in read(model, [file]).references}
    for passage in short:
        for reference in passage.memory:
            assert reference.text in whole[reference.document, reference.ordinal].text
            assert len(sentences(reference.text)) <= 3
            assert list(reference.tokens) == model.tokens(reference.text)
        (gold,) = passage.gold
        for example in passage.examples:  # what the part answers, and no text that goes on
            assert example.prompt
            assert example.answer in gold.text


def test_some_texts_are_read_behind_others(model: LanguageModel, tmp_path: Path) -> None:
    drawn = draw(model, numbered(tmp_path), unrelated=0.2)
    unrelated = [p for p in map(drawn.passage, range(60)) if is_unrelated(p)]
    assert len(unrelated) > 3
    for passage in unrelated:
        assert all(passage.examples[0].answer != r.text for r in passage.memory)
    none = draw(model, numbered(tmp_path))
    assert not any(is_unrelated(none.passage(number)) for number in range(60))
