"""Answers: several to a prompt, how they end, and what is thought before them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from memdb import InvalidInputError, MemDB
from model_adapter import (
    Chat,
    Context,
    Generation,
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
    stream,
)
from model_adapter.generation.detokenizing import Detokenizer, without_thoughts
from tests.adapter.tokenizers_small import TOKENIZERS, tokenizer_of
from tests.helpers import FACTS, TEMPLATE, tiny_model

DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "memories": 2, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = tiny_model(eos_token_id=None)
    made.tokenizer.eos_token = None
    return made


def database(folder: Path, model: LanguageModel, embedder: SentenceEmbedder) -> MemDB:
    made = create_database(folder, model=model, embedder=embedder, selection="reconstruction")
    for fact in FACTS:
        made.insert(fact.text, id=fact.id)
    return made


@pytest.fixture
def db(tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    with database(tmp_path / "db", model, minilm) as made:
        yield made


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """How many sequences each pass reads."""
    seen: list[tuple[str, int]] = []
    read, step = Context.read, Context.step

    def reads(self: Context, sequences: Any, **options: Any) -> Any:
        seen.append(("read", len(sequences)))
        return read(self, sequences, **options)

    def steps(self: Context, tokens: Any, **options: Any) -> Any:
        seen.append(("step", len(tokens)))
        return step(self, tokens, **options)

    monkeypatch.setattr(Context, "read", reads)
    monkeypatch.setattr(Context, "step", steps)
    return seen


def same(one: Generation, other: Generation) -> None:
    assert one.token_ids == other.token_ids
    assert (one.text, one.finished, one.prompt_tokens) == (
        other.text,
        other.finished,
        other.prompt_tokens,
    )
    for chunk, expected in zip(one.chunks, other.chunks, strict=True):
        assert (chunk.start, chunk.generated) == (expected.start, expected.generated)
        assert chunk.retrieval.query == expected.retrieval.query
        assert [hit.id for hit in chunk.retrieval.hits] == [
            hit.id for hit in expected.retrieval.hits
        ]
    for source, of_other in zip(one.sources(), other.sources(), strict=True):
        assert source.reference.id == of_other.reference.id
        np.testing.assert_allclose(source.tokens, of_other.tokens, atol=1e-5)


# --- several answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "rag", "none"])
def test_several_answers_to_a_prompt_that_is_read_once(
    db: MemDB, batches: list[tuple[str, int]], mode: str
) -> None:
    how = {**DRAWN, "mode": mode, "retrieve_every": 8, "cite": mode == "memory"}
    alone = generate(FACTS[0].question, db, **how)
    batches.clear()
    answers = generate(FACTS[0].question, db, n=3, **how)
    assert [size for what, size in batches if what == "read"] == [1]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    same(answers[0], alone)
    assert [len(answer.token_ids) for answer in answers] == [20] * 3
    of_answers = [[chunk for chunk in one.chunks if chunk.generated] for one in answers]
    if mode == "memory":
        assert len({chunks[0].retrieval.query for chunks in of_answers}) == 3
        assert all(sum(s.share for s in one.sources()) == pytest.approx(1) for one in answers)
    (only,) = generate(FACTS[0].question, db, n=1, **how)
    same(only, alone)


def test_several_answers_to_several_prompts(db: MemDB) -> None:
    prompts = [FACTS[0].question, "Hm?", FACTS[0].question]
    both = generate(prompts, db, n=2, **DRAWN)
    assert [len(answers) for answers in both] == [2, 2, 2]
    assert len({tuple(one.token_ids) for answers in both for one in answers}) == 6
    for answers, expected in zip(both, generate(prompts, db, **DRAWN), strict=True):
        same(answers[0], expected)
    # And whatever stands beside it.
    for one, other in zip(both[0], generate(prompts[0], db, n=2, **DRAWN), strict=True):
        same(one, other)


def test_where_there_can_be_one_answer(db: MemDB) -> None:
    with pytest.raises(InvalidInputError, match="at temperature 0 all answers are the same"):
        generate("Hm?", db, n=2)
    with pytest.raises(InvalidInputError, match="n must be a whole number of at least 1, got 0"):
        generate("Hm?", db, n=0)
    for call in (stream, lambda _, db, **how: Chat(db, **how)):
        with pytest.raises(InvalidInputError, match="n is 2, and one answer comes piece by piece"):
            call("Hm?", db, n=2, temperature=1.0)  # type: ignore[operator]
    assert len(generate("Hm?", db, n=1, max_new_tokens=2)) == 1


def test_an_answer_prints_as_its_text(db: MemDB) -> None:
    answer = generate("Hm?", db, max_new_tokens=5)
    assert str(answer) == f"{answer}" == answer.text != ""


# --- how answers end ------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_the_templates_end_of_turn_ends_an_answer_and_does_not_show(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder, special: bool
) -> None:
    question = FACTS[1].question
    with database(tmp_path / "one", model, minilm) as first:
        free = generate(question, first, max_new_tokens=30, **{"temperature": 1.0, "seed": 3})
    ids = free.token_ids
    # A token that the model says some time, as the end of what the assistant says. (One that is no
    # part of others, and stands in no text: there it would be an added token.)
    tokenizer = copy.deepcopy(model.tokenizer)
    names = tokenizer.convert_ids_to_tokens(ids)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    parts = {part for pair in merges for part in pair}
    place = next(n for n, name in enumerate(names) if n > 3 and name not in {*parts, *names[:n]})
    name, token = names[place], ids[place]
    assert name not in question
    tokenizer.add_tokens([AddedToken(name, special=special)], special_tokens=special)
    assert tokenizer.convert_tokens_to_ids(name) == token
    end = f"{{{{ '{name}' if message['role'] == 'assistant' else '<|im_end|>' }}}}"
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", end, 1)
    ending = LanguageModel(model.model, tokenizer, "ending")
    assert ending.stop_tokens() == frozenset()
    with database(tmp_path / "two", ending, minilm) as second:
        answer = generate(question, second, max_new_tokens=30, temperature=1.0, seed=3)
        pieces = "".join(stream(question, second, max_new_tokens=30, temperature=1.0, seed=3))
    assert answer.token_ids == ids[: place + 1]
    assert answer.finished == "end"
    assert pieces == answer.text == model.tokenizer.decode(ids[:place])
    assert free.text.startswith(answer.text)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_sequences_that_are_finished_leave(
    tmp_path: Path, minilm: SentenceEmbedder, batches: list[tuple[str, int]], prefetch: int
) -> None:
    prompts = [FACTS[0].question, "Hm?", FACTS[2].question + " " + FACTS[3].question, "So?"]
    options: dict[str, Any] = {**DRAWN, "retrieve_every": 8, "prefetch": prefetch, "cite": True}
    options |= {"max_new_tokens": 30, "repetition_penalty": 1.1}
    free = tiny_model(eos_token_id=None)
    free.tokenizer.eos_token = None
    with database(tmp_path / "one", free, minilm) as made:
        said = [one.token_ids for one in generate(prompts, made, **options)]
    # Three of them end, each at another place.
    ends = [said[0][9], said[2][4], said[3][15]]
    with database(tmp_path / "two", tiny_model(eos_token_id=ends), minilm) as made:
        batches.clear()
        together = generate(prompts, made, **options)
        sizes = [size for what, size in batches if what == "step"]
        lengths = [len(one.token_ids) for one in together]
        assert len(set(lengths)) > 2
        assert sizes == [
            sum(length > number for length in lengths) for number in range(1, max(lengths))
        ]
        for number, answer in enumerate(together):
            assert answer.token_ids == said[number][: lengths[number]]
            # Alone, it is the first prompt, and draws from that one's stream.
            greedy = {**options, "temperature": 0.0}
            alone = generate(prompts[number], made, **greedy)
            same(generate(prompts, made, **greedy)[number], alone)


# --- from tokens to text --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_join_to_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    model = LanguageModel(tiny_model(vocab_size=1000).model, tokenizer, kind)
    for text in (
        "Who keeps the  lighthouse, naïve?  It's old .",
        " a\n\n\nb <table> c",
        "   ",
        "船 🐋!",
    ):
        for ids in (model.tokens(text), tokenizer(text, add_special_tokens=False).input_ids):
            detokenizer = Detokenizer(tokenizer)
            pieces = [detokenizer.add(id) for id in ids]
            pieces.append(detokenizer.end())
            expected = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert "".join(pieces) == detokenizer.text == expected


# --- thinking -------------------------------------------------------------------------------------

THOUGHT = "<think>\nA < b? No <b>.\n</think>\n\nAda <think>s.</think>"


def pieces_of(text: str, tokenizer: Any, **how: Any) -> str:
    detokenizer = Detokenizer(tokenizer, **how)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    said = "".join(detokenizer.add(id) for id in ids) + detokenizer.end()
    assert said == detokenizer.text
    return said


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece, prepended", "metaspace, first"])
def test_thoughts_are_shown_or_hidden(kind: str, special: bool | None) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    if special is not None:  # else they are letters
        marks = [AddedToken(m, special=special, normalized=False) for m in ("<think>", "</think>")]
        tokenizer.add_tokens(marks, special_tokens=special)

    def said(text: str, **how: Any) -> str:
        return pieces_of(text, tokenizer, **how).replace(" ", "")

    assert said(THOUGHT) == THOUGHT.replace(" ", "")
    hidden: dict[str, Any] = {"hide_thinking": True}
    assert said(THOUGHT, **hidden) == "Ada<think>s.</think>"
    assert said("\n" + THOUGHT, **hidden) == "Ada<think>s.</think>"
    assert said("Hm.</think>Ada", **hidden, thinks=True) == "Ada"
    assert said("<think>no end", **hidden) == ""
    assert said("<thin", **hidden) == "<thin"
    assert said("<thing> x", **hidden) == "<thing>x"
    assert said("Ada. <think>", **hidden) == "Ada.<think>"
    # No stop string is looked for in what is hidden.
    assert said(THOUGHT, stop=["No"], **hidden) == "Ada<think>s.</think>"
    assert said(THOUGHT, stop=["No"]) == "<think>\nA<b?"


def test_a_text_without_its_thoughts() -> None:
    assert without_thoughts(THOUGHT) == "Ada <think>s.</think>"
    assert without_thoughts("Ada.") == "Ada."
    assert without_thoughts("Hm.</think>\nAda.", thinks=True) == "Ada."
    assert without_thoughts("Hm.", thinks=True) == ""


def test_thoughts_that_the_template_begins(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    opens = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace(
        "assistant\n{% endif", "assistant\n" + opens + "{% endif"
    )
    thinker = LanguageModel(model.model, tokenizer, "thinker")
    how: dict[str, Any] = {"max_new_tokens": 12, "memories": 1}
    with database(tmp_path / "db", thinker, minilm) as made:
        shown, hidden = (generate("Hm?", made, hide_thinking=hide, **how) for hide in (False, True))
        assert shown.text
        assert (hidden.text, hidden.token_ids) == ("", shown.token_ids)
        told = generate("Hm?", made, hide_thinking=True, template={"enable_thinking": False}, **how)
        assert told.text
        assert told.prompt_tokens < shown.prompt_tokens
        # What was thought does not stand in the conversation.
        chat = Chat(made, **how)
        assert chat.say("Hm?").result.text == shown.text
        assert chat.messages == [{"role": "user", "content": "Hm?"}]
        chat = Chat(made, template={"enable_thinking": False}, **how)
        answer = chat.say("Hm?").result
        assert chat.messages[1]["content"] == answer.text == told.text
        with pytest.raises(InvalidInputError, match="knows no option 'thinking'"):
            generate("Hm?", made, template={"thinking": True})
        with pytest.raises(InvalidInputError, match="template is a mapping of names to values"):
            generate("Hm?", made, template="enable_thinking")
        with pytest.raises(InvalidInputError, match="hide_thinking must be True or False"):
            generate("Hm?", made, hide_thinking="no")
