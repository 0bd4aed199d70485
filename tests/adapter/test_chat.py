"""Conversations: what was read is kept, old turns leave, an interruption costs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from memdb import DocumentExistsError, InvalidInputError, MemDB, UnknownDocumentError
from model_adapter import (
    Chat,
    Frame,
    LanguageModel,
    SentenceEmbedder,
    create_database,
    generate,
)
from tests.helpers import FACTS, SAMPLE, tiny_model

QUESTIONS = ("Hm?", "And who are you?", "Where is the harbour?", "Hm?")
SHORT: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = tiny_model(eos_token_id=None)
    made.tokenizer.eos_token = None  # no answer ends by itself
    return made


@pytest.fixture
def empty(tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder) -> Iterator[MemDB]:
    with create_database(tmp_path / "db", model=model, embedder=minilm) as database:
        yield database


@pytest.fixture
def db(empty: MemDB) -> MemDB:
    for fact in FACTS:
        empty.insert(fact.text, id=fact.id, cold=True)
    return empty


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def read_of(db: MemDB, chat: Chat, mode: str) -> list[int]:
    """Tokens of a conversation up to its last question."""
    frame = Frame(db.writer.model, "chat")
    messages = [said for said in chat.messages if said["content"]]
    while messages[-1]["role"] != "user":
        messages.pop()
    prompt = frame.alone(messages) if mode == "none" else frame.behind_memories(messages)
    return [*prompt.content, *prompt.tail]


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "none"])
def test_turns_go_on_from_what_was_read(empty: MemDB, mode: str) -> None:
    """Without memories each answer is what `generate` says to the same messages; and only what is
    new is read."""
    held: list[int] = []
    with Chat(empty, mode=mode, **SHORT) as chat:
        for question in QUESTIONS:
            messages = [*chat.messages, user(question)]
            answer = chat.say(question)
            pieces = list(answer)
            result = answer.result
            expected = generate(messages, empty, mode=mode, **SHORT)
            assert result.token_ids == expected.token_ids
            assert "".join(pieces) == result.text == expected.text
            assert chat.messages == [*messages, {"role": "assistant", "content": result.text}]
            whole = read_of(empty, chat, mode)
            same = 0
            while same < len(held) and held[same] == whole[same]:
                same += 1
            assert result.prompt_tokens == len(whole) - same
            assert expected.prompt_tokens == len(whole)
            held = whole + result.token_ids[:-1]
    assert same > len(whole) / 2


def test_a_turn_retrieves_for_what_is_new(db: MemDB) -> None:
    chat = Chat(db, memories=1, retrieve_every=64, cite=True, **SHORT)
    for fact in FACTS:
        result = chat.say(fact.question).result
        assert [chunk.retrieval.query for chunk in result.chunks] == [fact.question]
        new = read_of(db, chat, "memory")[-result.prompt_tokens :]
        said = db.writer.model.tokenizer.decode(new[result.chunks[0].start :])
        before = "\n\n" if fact is FACTS[0] else "<|im_end|>\n<|im_start|>user\n"
        assert said == f"{before}{fact.question}<|im_end|>\n<|im_start|>assistant\n"
        assert [source.reference.document_id for source in result.sources()] == [
            result.chunks[-1].retrieval.hits[0].reference.document_id
        ]
        assert len(result.chunks[-1].attention) == len(result.token_ids)
    assert result.prompt_tokens < 80


def test_the_same_question_again_is_read_rightly(empty: MemDB) -> None:
    """All of it is known then, some of the template's end, too."""
    for mode in ("memory", "none"):
        first = generate([user("Hm?")], empty, mode=mode, **SHORT)
        chat = Chat(empty, mode=mode, stop=first.text[:2], **SHORT)
        for number in range(3):
            answer = chat.say("Hm?").result
            assert (answer.text, answer.finished) == ("", "stop")
            assert answer.prompt_tokens == (1 if number else len(read_of(empty, chat, mode)))
            assert answer.token_ids == first.token_ids[: len(answer.token_ids)]
            assert chat.messages == [user("Hm?")]


def test_an_answer_that_is_given_up_stands_as_far_as_it_came(empty: MemDB) -> None:
    chat = Chat(empty, **SHORT)
    answer = chat.say("Where is the harbour?")
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 3:
            break
    said = "".join(pieces)
    assert chat.messages == [
        user("Where is the harbour?"),
        {"role": "assistant", "content": said},
    ]
    messages = [*chat.messages, user("Go on.")]
    goes_on = chat.say("Go on.")
    assert list(answer) == []  # it was given up for good
    assert answer.result.text == said
    first = next(iter(goes_on))
    assert goes_on.result.text.startswith(first)
    assert goes_on.result.token_ids == generate(messages, empty, **SHORT).token_ids
    assert answer.result.text == said
    assert len(answer.result.token_ids) < 12

    chat.say("Never heard.")
    unheard = chat.say("Never heard either.")
    unheard.close()
    assert (list(unheard), unheard.result.text, unheard.result.token_ids) == ([], "", [])
    assert chat.messages[-1] == user("Never heard either.")
    chat.say("Go on.")
    assert [said["content"] for said in chat.messages[-3:]] == [
        "Go on.",
        goes_on.result.text,
        "Go on.",
    ]


def test_what_the_system_says_stands_before_all(empty: MemDB) -> None:
    system = {"role": "system", "content": "Be brief."}
    chat = Chat(empty, system="Be brief.", **SHORT)
    first = chat.say("Hm?").result
    assert first.text == generate([system, user("Hm?")], empty, **SHORT).text
    messages = [system, *chat.messages, user("So?")]
    assert chat.say("So?").result.text == generate(messages, empty, **SHORT).text


# --- the window -----------------------------------------------------------------------------------


def test_the_oldest_turns_leave_the_window(empty: MemDB) -> None:
    chat = Chat(empty, window=100, **SHORT)
    lengths = []
    for number in range(8):
        question = f"What is the number {number}?"
        answer = chat.say(question)
        said = [message["content"] for message in chat.messages]
        assert said[-1] == question
        lengths.append(len(read_of(empty, chat, "memory")))
        assert answer.result.text == generate(chat.messages[: len(said)], empty, **SHORT).text
    assert max(lengths) <= 100
    assert any(b < a for a, b in pairwise(lengths))
    assert chat.messages[0]["role"] == "user"
    assert "number 0" not in chat.messages[0]["content"]
    assert empty.stats()["documents"] == 0


def test_turns_that_leave_are_remembered(empty: MemDB) -> None:
    chat = Chat(empty, window=80, remember_turns=True, **SHORT)
    first = chat.say("My whale is called Ottoline.").result.text
    chat.say("Hm?").result  # noqa: B018 - waited for
    chat.say("The harbour is old, and the lighthouse shows the way.").result  # noqa: B018
    document = empty.get(chat.remembered[0])
    assert document.text == f"User: My whale is called Ottoline.\nAssistant: {first}"
    assert document.metadata == {"source": "chat"}
    assert document.warm == 1
    assert "Ottoline" not in str(chat.messages)
    result = chat.say("What is my whale called?").result
    assert document.id in [hit.reference.document_id for hit in result.chunks[-1].retrieval.hits]


def test_a_turn_that_was_remembered_before_is_no_error(empty: MemDB) -> None:
    remembered = []
    for _ in range(2):
        chat = Chat(empty, window=60, remember_turns=True, mode="none", **SHORT)
        for question in ("Hm? " * 8, "So? " * 8):
            chat.say(question).result  # noqa: B018
        remembered.append(chat.remembered)
    assert [len(ids) for ids in remembered] == [1, 0]


def test_a_message_too_long_is_refused_and_the_conversation_stays(empty: MemDB) -> None:
    chat = Chat(empty, window=100, remember_turns=True, **SHORT)
    chat.say("Hm?").result  # noqa: B018
    before = chat.messages
    with pytest.raises(InvalidInputError, match="more than the window of 100; shorten it, or"):
        chat.say(SAMPLE)
    for blank in ("", " \n"):
        with pytest.raises(InvalidInputError, match="the message is empty"):
            chat.say(blank)
    assert chat.messages == before
    assert chat.remembered == []
    expected = generate([*before, user("So?")], empty, **SHORT).text
    assert chat.say("So?").result.text == expected


def test_no_window_is_larger_than_the_model(tmp_path: Path, minilm: SentenceEmbedder) -> None:
    small = tiny_model(eos_token_id=None, max_position_embeddings=320)
    with create_database(tmp_path / "db", model=small, embedder=minilm) as database:
        chat = Chat(database, max_new_tokens=40)
        for number in range(8):
            assert chat.say(f"What is the number {number}?").result.token_ids
        with pytest.raises(InvalidInputError, match="the model has room for 1"):
            chat.say(SAMPLE)
        with pytest.raises(InvalidInputError, match="max_new_tokens is 200: that leaves no room"):
            Chat(database, max_new_tokens=200)


# --- remembering and forgetting -------------------------------------------------------------------


def test_remember_and_forget(empty: MemDB) -> None:
    chat = Chat(empty, memories=1, **SHORT)
    assert chat.say(FACTS[0].question).result.chunks[0].retrieval.hits == []
    document = chat.remember(FACTS[0].text)
    assert chat.remembered == [document.id]
    assert (document.metadata, document.warm) == ({"source": "chat"}, 1)
    with pytest.raises(DocumentExistsError):
        chat.remember(FACTS[0].text)
    with pytest.raises(InvalidInputError, match="empty"):
        chat.remember(" ")
    (hit,) = chat.say(FACTS[0].question).result.chunks[-1].retrieval.hits
    assert hit.reference.document_id == document.id
    chat.forget(document.id)
    assert chat.remembered == []
    assert chat.say(FACTS[0].question).result.chunks[-1].retrieval.hits == []
    with pytest.raises(UnknownDocumentError):
        chat.forget(document.id)
    other = empty.insert(FACTS[1].text, id="norvium", cold=True)
    chat.forget(other.id)
    assert empty.stats()["documents"] == 0


# --- interruptions and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "none"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupted_pass_leaves_the_chat_usable(
    db: MemDB, monkeypatch: pytest.MonkeyPatch, mode: str, call: int
) -> None:
    """Some layers have the tokens then, and others have not."""
    chat = Chat(db, mode=mode, cite=True, **SHORT)
    chat.say("Hm?").result  # noqa: B018
    model = db.writer.model
    layer = model.model.base_model.layers[1]
    run, forward = LanguageModel.run, layer.forward
    calls = 0

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        layer.forward = interrupted if calls == call else forward
        return run(*arguments, **options)

    before = chat.messages
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "run", counted)
        answer = chat.say("Where is the harbour?")
        try:
            with pytest.raises(KeyboardInterrupt):
                list(answer)
        finally:
            layer.forward = forward
    said = answer.result
    assert len(said.token_ids) == call - 1
    messages = [*before, user("Where is the harbour?")]
    if said.text:
        messages.append({"role": "assistant", "content": said.text})
    assert chat.messages == messages
    again = [*(messages if said.text else before), user("And now?")]
    expected = generate(again, db, mode=mode, **SHORT)
    result = chat.say("And now?").result
    assert result.token_ids == expected.token_ids
    assert result.prompt_tokens == expected.prompt_tokens  # all was read again
    assert len(result.sources()) == (len(FACTS) if mode == "memory" else 0)
    following = chat.say("So?").result
    assert following.prompt_tokens < result.prompt_tokens
    if mode == "none":  # elsewhere its chunks begin at other tokens than those of all read at once
        again = [*chat.messages[:-1]]
        assert following.text == generate(again, db, mode=mode, **SHORT).text


def test_an_error_while_retrieving_leaves_the_chat_usable(
    empty: MemDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(empty, retrieve_every=4, **SHORT)
    chat.say("Hm?").result  # noqa: B018
    retrieve = empty.retrieve_batch
    calls = 0

    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise InvalidInputError("the disk is gone")
        return retrieve(*arguments, **options)

    monkeypatch.setattr(empty, "retrieve_batch", broken)
    answer = chat.say("Where is the harbour?")
    with pytest.raises(InvalidInputError, match="the disk is gone"):
        list(answer)
    assert len(answer.result.token_ids) == 4
    messages = [*chat.messages, user("So?")]
    expected = generate(messages, empty, retrieve_every=4, **SHORT)
    assert chat.say("So?").result.text == expected.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rag"}, "mode is 'memory' or 'none'"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": True}, "window must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"max_tokens": 3}, "there is no option 'max_tokens'"),
    ],
)
def test_wrong_options_are_named(empty: MemDB, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Chat(empty, **options)


def test_plain_databases_know_no_turns(
    tmp_path: Path, model: LanguageModel, minilm: SentenceEmbedder
) -> None:
    with (
        create_database(tmp_path / "db", model=model, embedder=minilm, framing="plain") as plain,
        pytest.raises(InvalidInputError, match="has the framing 'plain': it knows no turns"),
    ):
        Chat(plain)
