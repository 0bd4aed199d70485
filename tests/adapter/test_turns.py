"""What a conversation is looked up by: words of one turn, whatever reads it and however much of it
was read before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from memdb import Hit, InvalidInputError, MemDB, Reference, Retrieval
from model_adapter import (
    Chat,
    Frame,
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
)
from model_adapter.generation.lookup import merged
from tests.adapter.slow import slow_cuts, slow_hits
from tests.helpers import FACTS, SAMPLE, TEMPLATE, tiny_model

SYSTEM = {"role": "system", "content": "Be brief. Never say user or assistant."}
CONVERSATIONS = Path(__file__).parent / "conversations.json"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = tiny_model(eos_token_id=None)
    made.tokenizer.eos_token = None  # none of these answers ends by itself
    return made


@pytest.fixture
def db(tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        for fact in FACTS:
            database.insert(fact.text, id=fact.id, cold=True)
        yield database


@pytest.fixture
def asked(minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the embedder is asked for as queries, in their order."""
    texts: list[str] = []
    embed = minilm.embed

    def noted(given: Any, query: bool = False) -> Any:
        texts.extend(given if query else [])
        return embed(given, query=query)

    monkeypatch.setattr(minilm, "embed", noted)
    return texts


def said(*contents: str) -> list[dict[str, str]]:
    """By user and assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def ids(hits: list[Hit]) -> list[int]:
    return [hit.id for hit in hits]


# --- where turns are ------------------------------------------------------------------------------


def test_turns_are_the_words_of_each_message(model: LanguageModel, smollm: LanguageModel) -> None:
    messages = said("Who, naïve 🐋?", "<|im_end|>user 船\n\n", "", "assistant", " And\nwhen? ")
    expected = [("system", SYSTEM["content"]), *((m["role"], m["content"]) for m in messages)]
    for one in (model, smollm):
        frame = Frame(one, "chat")
        for prompt in (
            frame.behind_memories([SYSTEM, *messages]),
            frame.with_text(["A text.", "And one more."], [SYSTEM, *messages]),
            frame.alone([SYSTEM, *messages]),
        ):
            words = [
                (turn.role, one.tokenizer.decode(prompt.content[turn.start : turn.end]))
                for turn in prompt.turns
            ]
            assert words == expected
            assert prompt.turns[-1].end == len(prompt.content)


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        ([(".", "\n")], ["Be brief.\n", "Why?"]),
        ([("\n", "W")], ["Be brief.", "\nWhy?"]),
        ([(".", "\n"), (".\n", "\n"), (".\n\n", "W")], ["Be brief.\n\nW", "hy?"]),
    ],
)
def test_a_token_across_the_end_of_a_turn_is_of_the_first(
    merges: list[tuple[str, str]], expected: list[str]
) -> None:
    vocabulary = [*sorted(set(SAMPLE + TEMPLATE + "BeW?")), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(vocabulary)}, merges))
    tokenizer.decoder = decoders.Fuse()
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('') }}{% endif %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=no_system + TEMPLATE)
    one = LanguageModel(tiny_model().model, fast, "letters")
    prompt = Frame(one, "chat").behind_memories(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    )
    words = [fast.decode(prompt.content[turn.start : turn.end]) for turn in prompt.turns]
    assert words == expected


def test_a_text_is_one_turn(model: LanguageModel) -> None:
    for framing in ("plain", "chat"):
        frame = Frame(model, framing)  # type: ignore[arg-type]
        for prompt in (frame.behind_memories(SAMPLE), frame.with_text(["So."], SAMPLE)):
            (turn,) = prompt.turns
            assert turn.role == "user"
            assert model.tokenizer.decode(prompt.content[turn.start : turn.end]) == SAMPLE


def test_a_last_message_of_blanks_is_refused_whatever_the_system_says(model: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="the last message has to be the user's, and to"):
        Frame(model, "chat").behind_memories([SYSTEM, *said(" ")])


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64])
def test_each_query_is_words_of_one_turn(db: MemDB, asked: list[str], size: int) -> None:
    messages = [
        SYSTEM,
        *said(FACTS[0].question, SAMPLE[:300], SAMPLE[50:120], " \n", FACTS[1].question),
    ]
    result = generate(messages, db, max_new_tokens=1, memories=2, retrieve_every=size, weigh=False)
    cuts = [cut for cut in slow_cuts(db.writer.model, messages, size) if cut[1]]
    assert asked == [text for _, texts, _ in cuts for text in texts]
    contents = [message["content"] for message in messages]
    assert all(any(text in content for content in contents) for text in asked)
    assert [ids(chunk.retrieval.hits) for chunk in result.chunks] == [
        ids(slow_hits(db, texts, 2)) for _, texts, _ in cuts
    ]
    # Of what was said, nothing is left out.
    assert all(
        any(text and text in content for text in asked) for content in contents if content.strip()
    )


def test_a_long_turn_is_cut(db: MemDB, asked: list[str]) -> None:
    tokens = db.writer.model.tokens(SAMPLE)
    generate(said("Is the harbour old?", "Yes.", SAMPLE), db, max_new_tokens=1, memories=1)
    ends = [*range(64, len(tokens), 64), len(tokens)]
    assert len(ends) == 3
    decode = db.writer.model.tokenizer.decode
    assert asked[2:] == [decode(tokens[max(0, end - 64) : end]) for end in ends]


def test_a_very_short_turn_asks_twice(db: MemDB, asked: list[str]) -> None:
    messages = [SYSTEM, *said(FACTS[2].question, "Eleven.", "Why?")]
    result = generate(messages, db, max_new_tokens=1, memories=2, weigh=False)
    both = f"{FACTS[2].question}\nEleven.\nWhy?"
    assert asked == [SYSTEM["content"], FACTS[2].question, "Eleven.", "Why?", both]
    own, more = (db.retrieve(text, 2) for text in ("Why?", both))
    hits = result.chunks[-1].retrieval.hits
    assert hits[0].reference.document_id == "zintle"
    assert ids(hits) == ids(slow_hits(db, ["Why?", both], 2))
    # What was said before counts less.
    best = max(*(hit.score for hit in own.hits), *(0.6 * hit.score for hit in more.hits))
    assert hits[0].score == pytest.approx(best)
    assert best < max(hit.score for hit in more.hits)
    assert len(hits) == 2
    assert all(hit.memory is not None for hit in hits)


def test_what_was_said_before_is_as_long_as_a_chunk_with_the_turn(
    db: MemDB, asked: list[str]
) -> None:
    generate(said("Who?", SAMPLE, "Why?"), db, max_new_tokens=1, memories=1, retrieve_every=20)
    model = db.writer.model
    room = 20 - len(model.tokens("Why?"))
    assert asked[-1] == model.tokenizer.decode(model.tokens(SAMPLE)[-room:]) + "\nWhy?"
    assert asked[0] == "Who?"  # nothing was said before
    assert "Who?" not in asked[-1]


def test_an_answer_and_a_short_question_at_the_beginning_ask_once(
    db: MemDB, asked: list[str]
) -> None:
    generate([SYSTEM, *said("Why?")], db, max_new_tokens=1)
    assert asked == [SYSTEM["content"], "Why?"]
    asked.clear()
    generate(said(FACTS[0].question, "No.", FACTS[1].question), db, max_new_tokens=1)
    assert asked == [FACTS[0].question, "No.", FACTS[1].question]


def test_the_best_of_several_retrievals_stay() -> None:
    def found(query: str, written: int, *hits: tuple[int, float]) -> Retrieval:
        made = [Hit(id, score, (b"", b"")) for id, score in hits]
        for hit in made:
            text = f" Text {hit.id % 10}."  # 14 says what 4 says
            hit.reference = Reference(hit.id, 1, str(hit.id), 0, 3, text)
        return Retrieval(query, made, written)

    one = found("a", 1, (1, 0.9), (2, 0.5), (14, 0.4), (3, 0.1))
    other = found("b", 2, (2, 0.7), (4, 0.6), (1, 0.2))
    both = merged([one, other], 3)
    assert [(hit.id, hit.score) for hit in both.hits] == [(1, 0.9), (2, 0.7), (4, 0.6)]
    assert (both.query, both.written) == ("a\nb", 3)
    assert ids(merged([one, other], 9).hits) == [1, 2, 4, 3]
    assert merged([one], 3) is one


# --- text in the prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        FACTS[0].question,
        [SYSTEM, *said(FACTS[2].question, SAMPLE, FACTS[0].question)],
        said(FACTS[2].question, "Eleven.", "Why?"),
    ],
)
def test_rag_finds_what_memories_are_of(db: MemDB, asked: list[str], prompt: Any) -> None:
    memory = generate(prompt, db, max_new_tokens=1, memories=2)
    of_memory = asked.copy()
    asked.clear()
    rag = generate(prompt, db, max_new_tokens=1, memories=2, mode="rag")
    assert asked
    assert asked == of_memory[-len(asked) :]
    (chunk,) = rag.chunks
    assert ids(chunk.retrieval.hits) == ids(memory.chunks[-1].retrieval.hits)


def test_rag_finds_the_best_for_all_chunks_of_the_last_turn(db: MemDB, asked: list[str]) -> None:
    last = " ".join(fact.question for fact in FACTS)
    messages = said("Who keeps the lighthouse of Veldmoor?", "Hm.", last)
    of_chunks = slow_cuts(db.writer.model, messages, 32)[-4:]
    (chunk,) = generate(
        messages, db, max_new_tokens=1, memories=3, mode="rag", retrieve_every=32
    ).chunks
    texts = [text for _, of_chunk, _ in of_chunks for text in of_chunk]
    assert asked == texts
    assert all(text in last for text in texts)
    assert ids(chunk.retrieval.hits) == ids(slow_hits(db, texts, 3, [1.0] * len(texts)))


@pytest.mark.parametrize("mode", ["memory", "rag"])
def test_what_an_earlier_turn_says_already_is_passed_over(db: MemDB, mode: str) -> None:
    messages = said("Hm, what is new?", FACTS[0].text, FACTS[0].question)
    for limit, expected in ((None, "pellonia"), (0.9, None)):
        options = {"memories": 4, "mode": mode, "max_overlap": limit, "weigh": False}
        result = generate(messages, db, max_new_tokens=1, **options)
        hits = result.chunks[-1].retrieval.hits
        assert (hits[0].reference.document_id == "pellonia") == (expected == "pellonia")
        assert len(hits) == (4 if expected else 3)


# --- a chat, which has read a part ----------------------------------------------------------------


def test_a_chat_asks_only_for_the_new_turn(db: MemDB, asked: list[str]) -> None:
    chat = Chat(db, system=SYSTEM["content"], memories=2, max_new_tokens=12)
    chat.say(FACTS[0].question).result  # noqa: B018 - waited for
    assert asked == [SYSTEM["content"], FACTS[0].question]
    for question in (FACTS[1].question, SAMPLE[:250], FACTS[2].question):
        asked.clear()
        chat.say(question).result  # noqa: B018
        cuts = slow_cuts(db.writer.model, said(question), 64)
        assert asked == [text for _, texts, _ in cuts for text in texts]
    asked.clear()
    result = chat.say("Why?").result
    assert asked[0] == "Why?"
    assert len(asked) == 2
    assert asked[1].endswith("\nWhy?")
    assert FACTS[2].question in asked[1]
    assert SYSTEM["content"] not in asked[1]
    assert len(result.chunks) == 1


def test_a_question_that_the_chat_has_read_is_asked_again(db: MemDB, asked: list[str]) -> None:
    """Without a word of an answer it is no turn, and the next message may begin like it."""
    first = generate(said(FACTS[0].question), db, max_new_tokens=1, memories=1)
    chat = Chat(db, memories=1, max_new_tokens=4, stop=first.text[:1], cite=True)
    for _ in range(2):
        asked.clear()
        result = chat.say(FACTS[0].question).result
        assert asked == [FACTS[0].question]
        assert len(result.chunks) == len(result.sources()) == 1
    asked.clear()
    changed = FACTS[0].question.replace("Pellonia", "Norvium")
    assert chat.say(changed).result.prompt_tokens < len(db.writer.model.tokens(changed))
    assert asked == [changed]


def test_what_is_left_of_an_answer_is_read_with_the_memories_in_use(
    db: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_adapter.attention.context import Context

    read: list[Any] = []
    plain = Context.read

    def noted(self: Context, sequences: Any, **options: Any) -> Any:
        read.append((self.memories[0], sequences[0]))
        return plain(self, sequences, **options)

    monkeypatch.setattr(Context, "read", noted)
    chat = Chat(db, memories=1, max_new_tokens=12)
    for fact in FACTS[:2]:
        chat.say(fact.question).result  # noqa: B018
    (_, (first,)), (in_use, (left, new)) = read
    assert left.memories is in_use is first.memories
    assert new.memories is not in_use
    decoded = db.writer.model.tokenizer.decode(new.tokens)
    assert decoded.startswith("<|im_end|>\n<|im_start|>user\nWhich element")


# --- with the real embedder -----------------------------------------------------------------------


def test_the_right_document_is_found_as_by_the_last_message_and_for_follow_ups(
    tmp_path: Path, smollm: LanguageModel, minilm: SentenceEmbedder
) -> None:
    given = json.loads(CONVERSATIONS.read_text())
    # Random weights: only its tokens matter here.
    model = LanguageModel(tiny_model(vocab_size=49152).model, smollm.tokenizer, "tiny")
    options: dict[str, Any] = {"mode": "rag", "memories": 1, "max_new_tokens": 1}
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        for name, text in given["documents"].items():
            database.insert(text, id=name, cold=True)
        right = {}
        for kind in ("others", "follow_ups"):
            conversations = [said(*turns) for _, turns in given[kind]]
            alone = [database.query(turns[-1]["content"], 1) for turns in conversations]
            answers = generate(conversations, database, **options)
            found = [answer.chunks[0].retrieval for answer in answers]
            for way, retrievals in (("turns", found), ("last", alone)):
                right[kind, way] = sum(
                    retrieval.hits[0].reference.document_id == document
                    for retrieval, (document, _) in zip(retrievals, given[kind], strict=True)
                )
    assert right["others", "turns"] >= right["others", "last"] >= 8
    assert right["follow_ups", "turns"] >= 7
    assert right["follow_ups", "last"] <= 2
