"""One tokenizer of each vocabulary serves all: cutting, counting, framing, decoding."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from memdb import Chunker, text_only, text_tokenizer
from model_adapter.models.noted_tokenizer import Note, NotedTokenizer, note
from model_adapter.models.words import Words
from tests.adapter.tokenizers_small import CONTROL, TEMPLATES, TOKENIZERS, tokenizer_of
from tests.helpers import SAMPLE

#: Control tokens that are not flagged as such, one with what some decoders take for a space.
THOUGHTS = ["<think>", "</think>", "<tool_call>", "<｜User｜>", "<｜tool▁calls｜>"]
TEXTS = [
    SAMPLE,
    SAMPLE.replace(" ", "   ").replace("\n", "\n\n \n"),
    SAMPLE.replace(". ", ".").replace(", ", "\t,\u3000"),
    "  \n The ship.\n\n\n  The  harbour , \u00a0the\r\n town!  It is   old ." * 9 + "  \n ",
    " <|im_start|>the <table> </b> ship<think> of" * 20,
    "lighthouse" * 60,
    "🐳 whales – „storms“ … é ü 漢字。かな " * 20,
]


def with_thoughts(kind: str, processor: Any = None) -> Tokenizer:
    made = Tokenizer.from_str(TOKENIZERS[kind]().to_str())
    made.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    made.add_tokens([AddedToken(token, normalized=False) for token in THOUGHTS])
    if processor is not None:
        made.post_processor = processor
    return made


PROCESSORS = {
    "none": None,
    "trimmed": processors.ByteLevel(trim_offsets=True),
    "not trimmed": processors.ByteLevel(trim_offsets=False),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True),
    "around": processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    ),
}


class AsItWas(Chunker):
    """A chunker by a tokenizer of its own, with what it does behind: trim spans."""

    _own: Tokenizer

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._own


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_references_are_cut_where_they_were(kind: str, processor: str) -> None:
    """Whether spans are trimmed or not: references of stored databases stay what they are."""
    json = with_thoughts(kind, PROCESSORS[processor]).to_str()
    for length in (1, 3, 8, 30):
        chunker, before = Chunker(json, length), AsItWas(json, length)
        before._own = Tokenizer.from_str(text_tokenizer(json).to_str())
        before._own.post_processor = Tokenizer.from_str(json).post_processor
        for text in TEXTS:
            assert chunker.split(text) == before.split(text)
            assert "".join(piece.text for piece in chunker.split(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_decoded_as_by_the_tokenizer_itself(kind: str) -> None:
    made = with_thoughts(kind)
    text, chunker = text_only(made.to_str()), Chunker(made.to_str(), 9)
    chosen = random.Random(0)
    marked = [made.token_to_id(token) for token in (*THOUGHTS, *CONTROL)]
    for _ in range(500):
        ids = [
            chosen.choice(marked) if chosen.random() < 0.3 else chosen.randrange(300)
            for _ in range(chosen.randint(0, 12))
        ]
        if made.token_to_id(THOUGHTS[-1]) in ids:  # from a text's beginning some drop its space
            ids = [made.token_to_id("a"), *ids]
        assert text.decode(ids) == made.decode(ids, skip_special_tokens=True)
        assert text.decode(ids, special=True) == made.decode(ids, skip_special_tokens=False)
        assert chunker.decode(ids) == text.decode(ids)
    for id in range(made.get_vocab_size() + 3):
        assert text.token(id) == made.id_to_token(id)


def test_whoever_asks_for_the_same_tokenizer_gets_the_same_one() -> None:
    json = with_thoughts("byte level").to_str()
    words, chunker = Words(json), Chunker("".join(json), 9)
    assert chunker.count("the ship") == len(words.text("the ship").ids)
    assert chunker._made is words._made
    again = text_only(with_thoughts("unigram").to_str())
    assert again is not words._made
    name = again.control["<think>"]
    del again
    assert name in text_only(with_thoughts("unigram").to_str()).control.values()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_noted_tokenizer_says_what_transformers_does(kind: str, template: str) -> None:
    theirs = tokenizer_of(kind, template)
    noted = note(theirs)
    assert noted is not None

    def never() -> Any:
        raise AssertionError("it was loaded")

    mine = NotedTokenizer(noted, never)
    assert (mine.bos_token_id, mine.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert mine.is_fast
    talk = [
        {"role": role, "content": f"  {role} {number}\n <|im_end|>"}
        for number, role in enumerate(("user", "assistant", "user"))
    ]
    for messages in (talk[:1], talk):
        for answer in (True, False):
            how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer}
            wanted = theirs.apply_chat_template(messages, **how)
            assert mine.apply_chat_template(messages, **how) == wanted
    ids = theirs("  The ship, of <|im_start|> the town ." + SAMPLE, add_special_tokens=True)
    for end in range(0, len(ids["input_ids"]), 7):
        some = ids["input_ids"][:end]
        for skip in (True, False):
            how = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert mine.decode(some, **how) == theirs.decode(some, **how)
            assert mine.decode(some, skip) == theirs.decode(some, skip)
    for id in range(0, len(theirs), 11):
        token = theirs.convert_ids_to_tokens(id)
        assert mine.convert_ids_to_tokens(id) == token
        assert mine.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


def test_a_tokenizer_that_does_more_is_not_noted() -> None:
    tidy = tokenizer_of("word piece", "chatml")
    tidy.clean_up_tokenization_spaces = True
    assert note(tidy) is None
    several = tokenizer_of("byte level", "chatml")
    several.chat_template = {"default": "a", "tool_use": "b"}
    assert note(several) is None

    class Own(type(several)):  # type: ignore[misc]
        def apply_chat_template(self, *given: Any, **options: Any) -> str:
            return "mine"

    own = Own(tokenizer_object=Tokenizer.from_str(several.backend_tokenizer.to_str()))
    assert note(own) is None
    assert note("no tokenizer") is None
    assert isinstance(note(tokenizer_of("unigram", "zephyr")), Note)
