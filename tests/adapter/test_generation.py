"""Generation: chunks, retrievals, cold start, comparison modes, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memdb import InvalidInputError, MemDB, pack
from model_adapter import (
    Frame,
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
    memory_tensors,
    open_database,
)
from model_adapter.sampling import Sampler
from tests.helpers import FACTS, SAMPLE, tiny_model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(eos_token_id=None)


@pytest.fixture
def db(tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id, cold=True)
        yield database


def test_each_chunk_of_prompt_and_answer_retrieves_for_itself(db: MemDB) -> None:
    prompt = " ".join(fact.question for fact in FACTS)
    length = len(Frame(db.writer.model, "chat").behind_memories(prompt).content)
    result = generate(prompt, db, max_new_tokens=70, memories=2, retrieve_every=32)
    starts = [chunk.start for chunk in result.chunks if not chunk.generated]
    assert starts == list(range(0, length, 32))
    assert [chunk.start - result.prompt_tokens for chunk in result.chunks if chunk.generated] == [
        32,
        64,
    ]
    assert all(len(chunk.retrieval.hits) == 2 for chunk in result.chunks)
    # The questions come one behind the other; the first chunk is about the first.
    assert "capital of Pellonia" in result.chunks[0].retrieval.query
    assert result.chunks[0].retrieval.hits[0].reference.document_id == "pellonia"
    assert result.chunks[-2].retrieval.query == db.writer.model.tokenizer.decode(
        result.token_ids[:32], skip_special_tokens=True
    )


def test_a_short_last_chunk_looks_for_the_tokens_up_to_its_end(db: MemDB) -> None:
    model = db.writer.model
    content = Frame(model, "chat").behind_memories(FACTS[0].question).content
    result = generate(
        FACTS[0].question, db, max_new_tokens=1, retrieve_every=len(content) - 1, memories=1
    )
    assert [chunk.start for chunk in result.chunks] == [0, len(content) - 1]
    assert result.chunks[1].retrieval.query == model.tokenizer.decode(content[1:])


def test_a_blank_stretch_keeps_the_memories_in_use(db: MemDB) -> None:
    prompt = FACTS[0].question + "\n" * 60 + FACTS[1].question
    result = generate(prompt, db, max_new_tokens=1, retrieve_every=16, memories=1)
    found = [chunk.retrieval.hits[0].reference.document_id for chunk in result.chunks]
    assert (found[0], found[-1]) == ("pellonia", "norvium")
    gaps = [b.start - a.start for a, b in zip(result.chunks, result.chunks[1:], strict=False)]
    assert max(gaps) > 16
    assert generate("Hi.", db, max_new_tokens=3, retrieve_every=1, memories=1).token_ids


def test_logits_are_those_of_an_obvious_loop(db: MemDB) -> None:
    """Prefix without memories, then chunk by chunk, each token at its place behind P + 128."""
    model, shape = db.writer.model, db.shape
    frame = Frame(model, "chat")
    prompt = frame.behind_memories(FACTS[2].question)
    size = 16
    result = generate(
        FACTS[2].question, db, max_new_tokens=size + 4, memories=2, retrieve_every=size
    )
    cache = model.prefix_cache(frame.prefix)
    position = len(frame.prefix) + 128
    content = prompt.content
    stretches = [content[i : i + size] for i in range(0, len(content), size)]
    queries = [content[max(0, e - size) : e] for e in range(size, len(content) + size, size)]
    queries[-1] = content[-size:]
    stretches[-1] = stretches[-1] + prompt.tail
    tokens: list[int] = []
    logits = torch.empty(0)
    for stretch, query in zip(stretches, queries, strict=True):
        memories = db.retrieve(query, 2).memories
        memory = memory_tensors(pack(memories, shape), shape, model.device)
        logits = model.forward(stretch, position, cache, memory)[-1]
        position += len(stretch)
    while len(tokens) < size + 4:
        tokens.append(int(logits.argmax()))
        if len(tokens) == size:
            memories = db.retrieve(tokens, 2).memories
            memory = memory_tensors(pack(memories, shape), shape, model.device)
        logits = model.forward(tokens[-1:], position, cache, memory)[-1]
        position += 1
    assert result.token_ids == tokens


def test_cold_references_are_written_once_and_answer_as_warm_ones(db: MemDB) -> None:
    assert db.stats()["memories"] == 0
    cold = generate(FACTS[0].question, db, max_new_tokens=8, memories=2)
    assert cold.chunks[0].retrieval.written == 2
    assert db.stats()["memories"] == 2
    warm = generate(FACTS[0].question, db, max_new_tokens=8, memories=2)
    assert warm.chunks[0].retrieval.written == 0
    assert warm.token_ids == cold.token_ids


def test_an_empty_database_generates_without_memories(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    with create_database(tmp_path / "db", model=model, embedder=minilm) as empty:
        result = generate("Is anybody there?", empty, max_new_tokens=4)
    assert len(result.token_ids) == 4
    assert result.chunks[0].retrieval.hits == []


def test_modes(db: MemDB) -> None:
    question = FACTS[0].question
    none = generate(question, db, mode="none", max_new_tokens=4)
    rag = generate(question, db, mode="rag", max_new_tokens=4, memories=2)
    memory = generate(question, db, max_new_tokens=4, memories=2)
    assert none.chunks == []
    found = [hit.reference.document_id for hit in rag.chunks[0].retrieval.hits]
    assert found[0] == "pellonia"
    added = sum(
        len(db.writer.model.tokens(hit.reference.content)) for hit in rag.chunks[0].retrieval.hits
    )
    assert rag.prompt_tokens >= none.prompt_tokens + added
    assert memory.prompt_tokens < none.prompt_tokens  # the prefix is read once, not for each prompt
    assert db.stats()["memories"] == 2  # of those two, by the last call alone


def test_text_comes_in_pieces_that_join_to_the_whole(db: MemDB) -> None:
    pieces: list[str] = []
    result = generate(
        "Tell me.", db, max_new_tokens=40, temperature=1.5, seed=3, on_text=pieces.append
    )
    assert "".join(pieces) == result.text
    assert len(pieces) > 5


def test_a_stop_token_ends_the_text(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    stopping = tiny_model(eos_token_id=list(range(1, 400)))  # whatever comes, it is the end
    with create_database(tmp_path / "db", model=stopping, embedder=minilm) as database:
        assert len(generate("Go on.", database, max_new_tokens=9).token_ids) == 1


def test_the_same_seed_draws_the_same_tokens(db: MemDB) -> None:
    def draw(seed: int) -> list[int]:
        return generate("Sing.", db, max_new_tokens=12, temperature=1.0, seed=seed).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_sampling_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -9.0])

    def drawn(**options: float) -> set[int]:
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "seed": 0, **options}
        sampler = Sampler(**settings)  # type: ignore[arg-type]
        return {sampler.choose(logits) for _ in range(300)}

    assert drawn() >= {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.5) == {1}
    assert drawn(top_p=0.8) == {1, 2}
    assert drawn(temperature=0.0) == {1}
    assert drawn(temperature=0.01) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"memories": 0}, "memories must be a whole number of at least 1"),
        ({"retrieve_every": 0}, "retrieve_every must be a whole number of at least 1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"seed": 1 << 64}, "seed must be"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"temperature": -1.0}, "temperature must be finite and not negative"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"mode": "magic"}, "'memory', 'rag' or 'none'"),
    ],
)
def test_wrong_options_are_named(db: MemDB, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate("Hello?", db, **options)  # type: ignore[arg-type]


def test_an_empty_or_too_long_prompt_is_refused(db: MemDB) -> None:
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        generate(" \n", db)
    with pytest.raises(InvalidInputError, match="not a text"):
        generate("\udcff", db)
    with pytest.raises(InvalidInputError, match="leaves room for"):
        generate("Go on.", db, max_new_tokens=1000, memories=1)
    with pytest.raises(InvalidInputError, match="before the end of the model 'tiny-llama' at 1024"):
        generate(SAMPLE * 10, db, memories=1)


def test_databases_open_with_the_model_they_record(
    tmp_path: Path, minilm: SentenceEmbedder
) -> None:
    folder = tmp_path / "model"
    made = tiny_model()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    with create_database(tmp_path / "db", model=str(folder), embedder=minilm) as database:
        database.insert(FACTS[0].text, id="a")
        expected = generate("What?", database, max_new_tokens=5).token_ids
    with open_database(tmp_path / "db") as again:
        assert generate("What?", again, max_new_tokens=5).token_ids == expected


@pytest.mark.parametrize("framing", ["plain", "chat"])
@pytest.mark.parametrize("selection", ["reconstruction", "paper"])
def test_every_selection_and_framing_goes_through(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder, framing: str, selection: str
) -> None:
    with create_database(
        tmp_path / "db",
        model=model,
        embedder=minilm,
        framing=framing,  # type: ignore[arg-type]
        selection=selection,
        layers=[1, 2],
        codec="exact",
    ) as database:
        database.insert(SAMPLE, id="sample")
        assert database.stats()["memories"] == len(database.get("sample").references) >= 2
        assert len(generate("How many ships?", database, max_new_tokens=5).token_ids) == 5
