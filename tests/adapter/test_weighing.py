"""How much memories count, by their scores: from scores to biases, and from biases to answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memdb import Hit, InvalidInputError, MemDB, Retrieval, pack
from model_adapter import (
    Chat,
    Context,
    Frame,
    Generation,
    LanguageModel,
    SentenceEmbedder,
    Stretch,
    Writer,
    create_database,
    generate,
)
from model_adapter.attention.sight import LayerMemory
from model_adapter.attention.weighing import EVEN, SAFE, Weighing
from model_adapter.catalog import AdapterEntry
from model_adapter.generation import weighing_constants as constants
from model_adapter.generation.weighing_constants import uncalibrated
from tests.adapter.slow import slow_answer
from tests.helpers import FACTS, SAMPLE, tiny_model

#: What it costs to be behind is felt, bounded, and cut off, all among the texts below.
STRONG = Weighing(lift=1.0, slope=6.0, most=1.8, reach=0.45, asked=0.6)

#: Documents that say something of what the facts are about.
MORE = {
    "pindle": "The town of Lower Pindle has a factory of electric tractors.",
    "harrow": "On the island of Harrow Skerry people speak Zintle.",
    "marrowgate": "Marrowgate is a city in Pellonia.",
    "few": "Zintle has few vowels.",
    "many": "Languages of islands have many vowels.",
    "few again": "  Zintle has few vowels. ",
}
#: Two chunks of 16 tokens and more, about different things.
LONG = f"{FACTS[2].question} {FACTS[3].question}"


# --- from scores to biases ------------------------------------------------------------------------


def test_the_best_is_lifted_and_the_others_are_put_down() -> None:
    weighing = Weighing(lift=0.5, slope=10, most=1.5, reach=0.4)
    assert weighing.biases([0.75]) == [0.5]
    assert weighing.biases([0.5, 0.75, 0.75]) == [-1.0, 0.5, 0.5]  # not more than most
    assert weighing.biases([0.75, 0.7]) == [0.5, pytest.approx(0.5 - 0.5)]
    assert weighing.biases([-0.2, -0.1]) == [pytest.approx(0.5 - 1), 0.5]
    assert weighing.biases([0.75, 0.375, 0.25, -1]) == [0.5, -1, None, None]
    assert weighing.biases([]) == []


def test_what_is_just_within_reach_stays() -> None:
    weighing = Weighing(lift=0, slope=0, most=0, reach=0.25)
    assert weighing.biases([1.0, 0.75, 0.7499]) == [0, 0, None]


def test_what_a_message_finds_is_lifted_more() -> None:
    weighing = Weighing(lift=0.5, slope=10, most=1.5, reach=0.4, asked=0.75)
    assert weighing.biases([0.5, 0.75]) == [-1.0, 0.5]
    assert weighing.asking().biases([0.5, 0.75]) == [-0.25, 1.25]
    assert weighing.asking().asking() == weighing.asking()


def test_constants_of_before_lift_messages_no_more_than_text() -> None:
    recorded = {"lift": 0.5, "slope": 10.0, "most": 2.0, "reach": 0.5}
    before = Weighing.from_json(recorded)
    assert before.asking() == before


def test_even_tells_nothing_apart_and_safe_does() -> None:
    assert EVEN.biases([1, 0.3, 0, -1]) == [0, 0, 0, 0]
    best, near, far = SAFE.biases([0.8, 0.78, 0.4])
    assert best is not None
    assert near is not None
    assert far is not None
    assert best > near > far >= best - SAFE.most
    assert SAFE.biases([0.8, 0.8 - SAFE.reach - 0.01])[1] is None


@pytest.mark.parametrize("name", ["lift", "slope", "most", "reach", "asked"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True, [1.0]])
def test_a_constant_that_is_no_number_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"the {name} of memories is a number, not"):
        Weighing(**{"lift": 0, "slope": 0, "most": 0, "reach": 1, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("slope", -0.1), ("most", -1), ("reach", 0), ("reach", -0.5)]
)
def test_a_constant_out_of_bounds_is_named(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}.* {value}"):
        Weighing(**{"lift": 0, "slope": 1, "most": 2, "reach": 3, name: value})


def test_constants_go_through_json() -> None:
    for weighing in (EVEN, SAFE, STRONG):
        assert Weighing.from_json(json.loads(json.dumps(weighing.to_json()))) == weighing
    assert set(SAFE.to_json()) == {"lift", "slope", "most", "reach", "asked"}
    for wrong in ({"lift": 1.0}, {**SAFE.to_json(), "cut": 1.0}, {}, [1, 2], None):
        with pytest.raises(InvalidInputError, match="no constants of memories: "):
            Weighing.from_json(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="the slope of memories is a number, not '1'"):
        Weighing.from_json({**SAFE.to_json(), "slope": "1"})


# --- a database -----------------------------------------------------------------------------------


def make(folder: Path, model: LanguageModel, minilm: SentenceEmbedder, **more: Any) -> MemDB:
    database = create_database(folder, model=model, embedder=minilm, **more)
    for name, text in {**{fact.id: fact.text for fact in FACTS}, **MORE}.items():
        database.insert(text, id=name, cold=True)
    return database


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return silent_model()


def silent_model(architecture: str = "llama", **changes: object) -> LanguageModel:
    """No answer of it ends by a token of its own."""
    made = tiny_model(architecture, eos_token_id=None, **changes)
    made.tokenizer.eos_token = None
    return made


@pytest.fixture(autouse=True)
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by the template's end of turn."""
    monkeypatch.setattr(Frame, "stop_tokens", frozenset())


@pytest.fixture
def db(tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    with make(tmp_path / "db", model, minilm) as database:
        yield database


@pytest.fixture
def strong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_adapter.generation.lookup.weighing_of", lambda *_: STRONG)


def documents(hits: list[Hit]) -> list[str]:
    return [hit.reference.document_id for hit in hits]


def texts_of(answer: Generation) -> list[list[str]]:
    """What each chunk reads. (Two that say the same are as good as each other.)"""
    return [[hit.reference.content for hit in chunk.retrieval.hits] for chunk in answer.chunks]


def said(*contents: str) -> list[dict[str, str]]:
    """By user and assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def test_what_is_left_out_is_no_hit_and_not_packed(db: MemDB) -> None:
    found = db.retrieve(FACTS[2].question, 8)
    kept = STRONG.kept(found)
    each = STRONG.biases([hit.score for hit in found.hits])
    biases = [bias for bias in each if bias is not None]
    assert 1 < len(biases) < 8
    assert kept.hits == [
        hit for hit, bias in zip(found.hits, each, strict=True) if bias is not None
    ]
    assert (kept.query, kept.written) == (found.query, found.written)
    expected = pack([hit.stored for hit in kept.hits if hit.stored], db.shape, biases)
    for packed in (STRONG.packed(found, db.shape), STRONG.packed(kept, db.shape)):
        assert list(packed.layers) == list(expected.layers)
        for layer, one in packed.layers.items():
            for name, array in vars(expected.layers[layer]).items():
                np.testing.assert_array_equal(getattr(one, name), array)
    assert STRONG.packed(Retrieval("nothing"), db.shape).layers == {}
    texts = db.query(FACTS[2].question, 5)
    assert STRONG.packed(texts, db.shape).layers == {}  # hits without memories


def test_all_the_same_is_as_without_biases(db: MemDB) -> None:
    found = db.retrieve(FACTS[2].question, 5)
    plain = pack(found.stored, db.shape)
    for layer, one in EVEN.packed(found, db.shape).layers.items():
        for name, array in vars(plain.layers[layer]).items():
            np.testing.assert_array_equal(getattr(one, name), array)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-3.0, 0.5, 2.0])
def test_a_bias_moves_attention_by_its_exponential(model: LanguageModel, bias: float) -> None:
    """In the first layer, where nothing else depends on it: in a pass, in stretches, in a step."""
    writer = Writer(model, framing="plain", budget=60, layers=[0])
    memories = writer.write([SAMPLE[:120], FACTS[0].text])
    tokens = model.tokens(SAMPLE)[:12]
    start = len(writer.shape.prefix) + 128

    def ratios(own: float) -> list[torch.Tensor]:
        """Of the first memory's attention to the second's and to the rest, in each pass."""
        seen: list[torch.Tensor] = []

        def witness(weights: torch.Tensor, memory: LayerMemory) -> None:
            if memory.memory.shape[-1] == 0:  # another layer
                return
            for number in range(len(weights)):
                of = memory.memory[number].repeat_interleave(2, 0)[:, None]  # by query head
                first, second = ((weights[number] * (of == which)).sum(-1) for which in (0, 1))
                seen.append(torch.stack([first / second, first / (1 - first)]))

        packed = pack(memories, writer.shape, [own, 0.0])
        context = Context(model, writer.shape.prefix, start)
        cut = [Stretch(tokens[:5], packed), Stretch(tokens[5:10], packed)]
        context.read([cut], witness=witness)
        context.step(torch.tensor(tokens[10:11]), witness=witness)
        context.read([[Stretch(tokens[11:], packed)]], witness=witness)
        return seen

    moved, plain = ratios(bias), ratios(0.0)
    assert len(moved) == 4
    for one, other in zip(moved, plain, strict=True):
        torch.testing.assert_close(one, other * math.exp(bias), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("strong")
def test_citations_are_what_an_obvious_loop_says(db: MemDB) -> None:
    options = {"memories": 4, "retrieve_every": 16, "max_new_tokens": 18, "cite": True}
    result = generate(said(LONG), db, **options)
    answer, found, shares = slow_answer(db, said(LONG), new=18, k=4, size=16, weighing=STRONG)
    assert result.token_ids == answer
    of_answer = [chunk for chunk in result.chunks if chunk.attention is not None]
    assert [len(chunk.attention) for chunk in of_answer] == [16, 2]
    first, last = (chunk.attention for chunk in of_answer)
    assert first.shape[1] > 1
    assert len({bias for _, bias in found[-2]}) > 1
    np.testing.assert_allclose(first, shares[:16], atol=1e-5)
    np.testing.assert_allclose(last, shares[16:], atol=1e-5)


# --- answers --------------------------------------------------------------------------------------

CONVERSATIONS = (
    said(LONG),
    said(FACTS[0].question, "  \n", FACTS[2].question, "Eleven.", "Why?"),
    said(MORE["many"]),
)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 12}),
        ("gemma2", {"sliding_window": 12}),  # and soft-capped scores
    ],
)
def test_weighed_answers_are_those_of_an_obvious_loop(
    tmp_path: Path,
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    changes: dict[str, Any],
) -> None:
    """Alone and side by side; also behind the renewal of memories, which have other biases then."""
    options = {"memories": 4, "retrieve_every": 16, "max_new_tokens": 18}
    with make(tmp_path / "db", silent_model(architecture, **changes), minilm) as db:
        for weighing in (STRONG, SAFE):
            monkeypatch.setattr(
                "model_adapter.generation.lookup.weighing_of", lambda *_, w=weighing: w
            )
            together = generate(CONVERSATIONS, db, **options)
            for conversation, answer in zip(CONVERSATIONS, together, strict=True):
                expected, found, _ = slow_answer(
                    db, conversation, new=18, k=4, size=16, weighing=weighing
                )
                assert answer.token_ids == expected
                assert texts_of(answer) == [[h.reference.content for h, _ in w] for w in found]
                biases = [[bias for _, bias in weighed] for weighed in found]
                assert biases[-1] != biases[-2]
                if weighing is STRONG:
                    assert generate(conversation, db, **options).token_ids == expected
            assert any(len(set(each)) > 2 for each in biases)


@pytest.mark.parametrize("asks", [True, False])
def test_a_plain_prompt_asks_by_its_question_mark(
    tmp_path: Path,
    model: LanguageModel,
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    asks: bool,
) -> None:
    prompt = f"Text. {FACTS[2].question.rstrip('?')}{'?' if asks else '.'} It is"
    asked, lifted = Weighing(0, 0, 0, 2, asked=3.0), Weighing(3.0, 0, 0, 2)
    with make(tmp_path / "db", model, minilm, framing="plain") as db:
        said = {}
        for weighing in (EVEN, asked, lifted):
            monkeypatch.setattr(
                "model_adapter.generation.lookup.weighing_of", lambda *_, w=weighing: w
            )
            said[weighing] = generate(prompt, db, memories=2, max_new_tokens=20).token_ids
    assert said[EVEN] != said[lifted]
    assert said[asked] == said[lifted if asks else EVEN]


def test_weighing_changes_answers_and_without_it_nothing_is_left_out(db: MemDB) -> None:
    options = {"memories": 4, "retrieve_every": 16, "max_new_tokens": 18}
    weighed, even = (generate(LONG, db, weigh=weigh, **options) for weigh in (True, False))
    expected, *_ = slow_answer(db, said(LONG), new=18, k=4, size=16, weighing=EVEN)
    assert even.token_ids == expected
    assert even.token_ids != weighed.token_ids
    assert all(len(chunk.retrieval.hits) == 4 for chunk in even.chunks)
    assert any(len(chunk.retrieval.hits) < 4 for chunk in weighed.chunks)


@pytest.mark.usefixtures("strong")
def test_text_that_falls_far_behind_is_left_out_of_the_prompt(db: MemDB) -> None:
    question = FACTS[0].question
    rag, even = (
        generate(question, db, mode="rag", max_new_tokens=1, weigh=weigh) for weigh in (True, False)
    )
    assert documents(rag.chunks[0].retrieval.hits) == ["pellonia", "marrowgate"]
    assert documents(even.chunks[0].retrieval.hits)[:2] == ["pellonia", "marrowgate"]
    assert len(even.chunks[0].retrieval.hits) == 5
    prompt = Frame(db.writer.model, "chat").with_text([FACTS[0].text, MORE["marrowgate"]], question)
    assert rag.prompt_tokens == len(prompt.content) + len(prompt.tail)
    memory = generate(question, db, max_new_tokens=1)
    assert documents(memory.chunks[0].retrieval.hits) == ["pellonia", "marrowgate"]


@pytest.mark.usefixtures("strong")
def test_a_chat_is_weighed(db: MemDB) -> None:
    chat = Chat(db, memories=4, max_new_tokens=8, cite=True)
    first = chat.say(LONG).result
    assert first.token_ids == generate(LONG, db, memories=4, max_new_tokens=8).token_ids
    second = chat.say(FACTS[0].question).result
    assert documents(second.chunks[0].retrieval.hits) == ["pellonia", "marrowgate"]
    assert {source.reference.document_id for source in second.sources()} >= {"pellonia"}
    assert chat.say("Why?").result.chunks[0].retrieval.hits


# --- the same text --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "rag"])
def test_what_two_documents_say_takes_one_place(db: MemDB, mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 1, "memories": 3, "weigh": False}
    whole = documents(db.query(FACTS[2].question, 4).hits)
    assert sorted(whole[:2]) == ["few", "few again"]
    for limit in (None, 0.99):
        result = generate(FACTS[2].question, db, max_overlap=limit, **options)
        assert documents(result.chunks[0].retrieval.hits) == [whole[0], *whole[2:]]
    db.delete(whole[0])
    result = generate(FACTS[2].question, db, **options)
    assert documents(result.chunks[0].retrieval.hits) == whole[1:]


@pytest.mark.parametrize("mode", ["memory", "rag"])
def test_a_turn_that_asks_twice_has_each_text_once(db: MemDB, mode: str) -> None:
    talk = said(FACTS[2].question, "Eleven.", "How many vowels?")
    result = generate(talk, db, mode=mode, max_new_tokens=1, memories=6, weigh=False)
    hits = result.chunks[-1].retrieval.hits
    texts = [hit.reference.content for hit in hits]
    assert len(texts) == len(set(texts)) == 6
    assert MORE["few"] in texts[:2]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


# --- hits whose score is too low ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "rag"])
def test_what_is_below_the_least_score_is_no_hit(db: MemDB, mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 1, "memories": 4, "weigh": False}
    found = generate(FACTS[2].question, db, **options).chunks[0].retrieval.hits
    least = found[1].score
    for min_score, number in ((least, 2), (np.nextafter(least, 1), 1), (-1, 4), (1, 0)):
        result = generate(FACTS[2].question, db, min_score=min_score, **options)
        hits = result.chunks[0].retrieval.hits
        assert documents(hits) == documents(found[:number])


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("prompt", [FACTS[0].question, LONG])
def test_where_nothing_is_left_the_answer_has_no_memories(
    tmp_path: Path, db: MemDB, minilm: SentenceEmbedder, prompt: str, weigh: bool
) -> None:
    options = {"max_new_tokens": 20, "retrieve_every": 16, "weigh": weigh}
    empty = create_database(tmp_path / "empty", model=db.writer.model, embedder=minilm)
    with empty:
        expected, rag = (
            generate(prompt, empty, mode=mode, **options).token_ids for mode in ("memory", "rag")
        )
    result = generate(prompt, db, min_score=1, cite=True, **options)
    assert result.token_ids == expected != generate(prompt, db, **options).token_ids
    assert len(result.chunks) > 1
    assert all(chunk.retrieval.hits == [] for chunk in result.chunks)
    assert result.sources() == []
    assert generate(prompt, db, mode="rag", min_score=1, **options).token_ids == rag


def test_a_chunk_that_finds_nothing_has_no_memories_not_those_of_before(db: MemDB) -> None:
    """And a blank one behind it keeps that; side by side with one that finds something."""
    nothing = "Go on. " * 12
    conversations = [
        said(f"{FACTS[2].question}", " \n", nothing),
        said(LONG, nothing, " " * 40 + FACTS[0].question),
        said(nothing, " \n", FACTS[1].question),
    ]
    options = {"memories": 3, "retrieve_every": 16, "max_new_tokens": 18, "min_score": 0.4}
    together = generate(conversations, db, **options)
    for conversation, answer in zip(conversations, together, strict=True):
        expected, found, _ = slow_answer(
            db, conversation, new=18, k=3, size=16, weighing=SAFE, min_score=0.4
        )
        read = [[hit.reference.content for hit, _ in weighed] for weighed in found]
        assert [] in read
        assert any(read)
        assert texts_of(answer) == read
        assert answer.token_ids == expected


def test_a_chat_goes_on_where_a_turn_finds_nothing(db: MemDB) -> None:
    chat = Chat(db, memories=2, max_new_tokens=6, min_score=0.4, cite=True)
    for text, number in ((FACTS[0].question, 2), ("Go on and on and on, please.", 0), (LONG, 1)):
        result = chat.say(text).result
        assert len(result.token_ids) == 6
        hits = result.chunks[-1].retrieval.hits
        assert bool(hits) == bool(number)
        assert bool(result.sources()) == bool(number)


def test_an_adapter_of_the_catalogue_has_constants_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(model: str, adapter: str | None) -> Weighing:
        loaded = SimpleNamespace(
            name=model, adapter=None if adapter is None else SimpleNamespace(name=adapter)
        )
        return uncalibrated(loaded)  # type: ignore[arg-type]

    own, read = Weighing(0, 1, 2), Weighing(0, 3, 2)
    entry = replace(constants.CATALOG["smollm2-135m"], weighing=own)
    monkeypatch.setitem(constants.CATALOG, "m", entry)
    monkeypatch.setitem(constants.ADAPTERS, "a", AdapterEntry("a", "m", weighing=read))
    monkeypatch.setitem(constants.ADAPTERS, "b", AdapterEntry("b", "m"))
    assert of("m", None) == of("m", "b") == of("m", "a folder") == own
    assert of("m", "a") == read
    assert of("another", None) == SAFE
