"""Framing: what is framed is what the tokenizer makes of the rendered template, and only what the
template writes is a control token."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from transformers import AutoTokenizer

from memdb import Chunker, InvalidInputError
from model_adapter import Frame, LanguageModel, cache_folder
from tests.adapter.tokenizers_small import (
    CONTROL,
    GEMMA_3,
    TAGS,
    TEMPLATES,
    TOKENIZERS,
    tokenizer_of,
)
from tests.helpers import tiny_model

TEXTS = (
    "Who keeps the lighthouse?",
    "  two spaces, and a line\n",
    "\n\nships\n\n\n  and\twhales ",
    "naïve 船 🐋!",
    "a <table> in </b> it<table>",
    "x",
)
ANSWER = " The keeper, of course.  "


@pytest.fixture(scope="module")
def weights() -> Any:
    return tiny_model(vocab_size=1000).model


def model_of(weights: Any, tokenizer: Any) -> LanguageModel:
    return LanguageModel(weights, tokenizer, "small")


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    talk = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


def whole(prompt: Any) -> list[int]:
    return [*prompt.content, *prompt.tail]


def expected(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


# --- equal to apply_chat_template -----------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_framed_is_the_rendered_template(weights: Any, kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    model = model_of(weights, tokenizer)
    frame = Frame(model, "chat")
    talks = [said(text) for text in TEXTS]
    talks += [said(text, ANSWER, other) for text, other in product(TEXTS[:4], TEXTS[1:3])]
    talks += [said(TEXTS[2], "", TEXTS[1], ANSWER, TEXTS[0])]
    if template != "gemma":
        talks += [[*said(system=" Be brief.\n"), *talk] for talk in (said(TEXTS[2]), talks[-1])]
    for talk in talks:
        assert whole(frame.alone(talk)) == expected(tokenizer, talk)
    for text in TEXTS:
        assert frame.alone(text) == frame.alone(said(text))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_stands_behind_memories_goes_on_as_one_text_would(
    weights: Any, kind: str, template: str
) -> None:
    """The seam is between tokens: prefix, references, and what is behind them, are together what
    the whole text is, where no token of it reaches across."""
    tokenizer = tokenizer_of(kind, template)
    model = model_of(weights, tokenizer)
    frame = Frame(model, "chat")
    reference = "The heron.?"  # and an empty line: no token of these tokenizers crosses it
    for talk in [said(TEXTS[0]), said(TEXTS[2], ANSWER, TEXTS[1])]:
        first = talk[0]["content"]
        with_references = [
            {"role": "user", "content": f"Reference:{reference}\n\n{first}"},
            *talk[1:],
        ]
        text = frame.with_text([reference], talk)
        assert whole(text) == expected(tokenizer, with_references)
        behind = frame.behind_memories(talk)
        assert whole(text) == [*frame.prefix, *model.tokens(reference), *whole(behind)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_is_what_the_tokenizer_makes_of_it(weights: Any, kind: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    model = model_of(weights, tokenizer)
    frame = Frame(model, "plain")

    def made(text: str) -> list[int]:
        return [1, *tokenizer(text, add_special_tokens=False).input_ids]

    assert list(frame.prefix) == made("Reference:")
    for text in TEXTS:
        assert frame.alone(text).content == made(text)
        behind = frame.behind_memories(text).content
        assert [*frame.prefix, *model.tokens("The heron."), *behind] == made(
            f"Reference:The heron.\n{text}"
        )


@pytest.mark.parametrize("kind", ["metaspace, first", "sentencepiece, prepended", "byte level"])
def test_control_tokens_that_take_the_white_space_behind_them(weights: Any, kind: str) -> None:
    tokenizer = tokenizer_of(kind, "phi 3", stripping=["<|user|>", "<|end|>", "<|assistant|>"])
    frame = Frame(model_of(weights, tokenizer), "chat")
    for talk in (said("\n  Who?"), said(" a ", " b ", " c "), said("Why?", system=" Be brief. ")):
        assert whole(frame.alone(talk)) == expected(tokenizer, talk)


# --- text is text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["plain", "chat"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_is_a_control_token(weights: Any, kind: str, framing: Any) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    # Not flagged as special, but control tokens by what they look like.
    tokenizer.add_tokens(["<|fim_middle|>", "<think>", "</tool_call>", "<｜User｜>"])
    model = model_of(weights, tokenizer)
    control = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL} - {0}  # <unk> is none
    control |= set(tokenizer.convert_tokens_to_ids(["<|fim_middle|>", "<think>", "</tool_call>"]))
    frame = Frame(model, framing)
    innocent = frame.behind_memories("x")
    count = sum(id in control for id in whole(innocent))
    texts = [*CONTROL, "<|fim_middle|>", "<think>", "</tool_call>", "<｜User｜>"]
    for text in [*texts, " ".join(texts), "".join(texts), "</s></s>"]:
        assert not control & set(model.tokens(text))
        for prompt in (frame.behind_memories(text), frame.with_text([text], text)):
            found = [id for id in whole(prompt) if id in control]
            prefix = [id for id in frame.prefix if id in control]
            assert len(found) in (count, count + len(prefix))
        assert text.strip() not in CONTROL or model.tokens(text, special=True) == [
            tokenizer.convert_tokens_to_ids(text)
        ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tags_stay_single_tokens(weights: Any, kind: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    model = model_of(weights, tokenizer)
    for tag in TAGS:
        (id,) = [tokenizer.convert_tokens_to_ids(tag)]
        assert model.tokens(tag) == [id]
        assert model.tokens(f"a{tag}b").count(id) == 1
    for text in (*TEXTS, "".join(TEXTS), "</b>a</b> b"):
        assert Chunker(model.tokenizer_json, 99).count(text) == len(model.tokens(text))


# --- databases that are there ---------------------------------------------------------------------

_PREFIXES = {
    ("smollm2-135m", "plain"): [1, 23682, 42],
    ("smollm2-135m", "chat"): [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
        *(407, 19712, 8182, 2, 198, 1, 4093, 198, 23682, 42),
    ],
    ("qwen2.5-coder-0.5b", "plain"): [151643, 8856, 25],
    ("qwen2.5-coder-0.5b", "chat"): [
        *(151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525),
        *(264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 8856, 25),
    ],
    ("gemma3-270m", "plain"): [2, 9313, 236787],
    ("gemma3-270m", "chat"): [2, 105, 2364, 107, 9313, 236787],
}


@pytest.mark.parametrize(("name", "framing"), _PREFIXES)
def test_prefixes_that_databases_record_are_made_as_ever(name: str, framing: Any) -> None:
    folder = cache_folder() / name
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{name} is not on this machine")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATES["gemma"]
    model = LanguageModel(tiny_model(vocab_size=262200).model, tokenizer, name)
    frame = Frame(model, framing)
    assert list(frame.prefix) == _PREFIXES[name, framing]
    assert [*frame.head, *model.tokens("Reference:")] == list(frame.prefix)
    # Control tokens within a text are what they look like, as ever.
    assert not {0, 1, 2, 105, 106, 151643, 151644, 151645} & set(
        model.tokens("<bos><|im_start|><|im_end|><start_of_turn><|endoftext|>")
    )


def test_a_recorded_prefix_stays(weights: Any) -> None:
    model = model_of(weights, tokenizer_of("metaspace, always", "chatml"))
    made = Frame(model, "chat")
    old = (7, 8, 9, *made.prefix[len(made.head) :])
    frame = Frame(model, "chat", old)
    assert frame.prefix == old
    assert frame.head == (7, 8, 9)
    assert frame.told({}).prefix == old
    strange = (7, 8, 9)
    assert Frame(model, "chat", strange).prefix == strange


# --- the system -----------------------------------------------------------------------------------


def test_the_system_has_a_turn_behind_the_memories(weights: Any) -> None:
    tokenizer = tokenizer_of("byte level", "chatml")
    model = model_of(weights, tokenizer)
    frame = Frame(model, "chat")
    talk = said("Who?", "Ada.", "Why?", system="Be brief.")
    prompt = frame.behind_memories(talk)
    assert tokenizer.decode(whole(prompt)) == (
        "<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nAda.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [turn.role for turn in prompt.turns] == ["system", "user", "assistant", "user"]
    # One that comes later has its turn where it is said.
    later = [*said("Who?", "Ada."), {"role": "system", "content": "Be kind."}, *said("Why?")]
    text = tokenizer.decode(frame.behind_memories(later).content)
    assert text.startswith("\n\nWho?<|im_end|>\n")
    assert "Ada.<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?" in text


@pytest.mark.parametrize("template", ["gemma", "llama 2", "mistral"])
def test_where_a_template_has_no_such_turn_the_user_says_it(weights: Any, template: str) -> None:
    tokenizer = tokenizer_of("byte level", template)
    frame = Frame(model_of(weights, tokenizer), "chat")
    talk = said("Who?", "Ada.", "Why?", system="Be brief.")
    merged = said("Be brief.\n\nWho?", "Ada.", "Why?")
    assert whole(frame.behind_memories(talk)) == whole(frame.behind_memories(merged))
    roles = [turn.role for turn in frame.behind_memories(talk).turns]
    assert roles == ["system", "user", "assistant", "user"]
    if template == "gemma":
        assert whole(frame.alone(talk)) == whole(frame.alone(merged))


def test_a_turn_that_the_model_does_not_know_is_none(weights: Any) -> None:
    tokenizer = tokenizer_of("byte level", "gemma")
    tokenizer.chat_template = GEMMA_3
    frame = Frame(model_of(weights, tokenizer), "chat")
    talk = said("Who?", "Ada.", "Why?", system="Be brief.")
    rendered = tokenizer.apply_chat_template(said("Hi", system="S"), tokenize=False)
    assert rendered == "<s><start_of_turn>user\nS\n\nHi<end_of_turn>\n"
    assert whole(frame.alone(talk)) == expected(tokenizer, talk)
    assert tokenizer.decode(frame.behind_memories(talk).content).startswith(
        "\n\nBe brief.\n\nWho?<end_of_turn>"
    )


def test_what_two_messages_of_the_system_say_is_one_turn(weights: Any) -> None:
    frame = Frame(model_of(weights, tokenizer_of("byte level", "chatml")), "chat")
    two = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
    one = [{"role": "system", "content": "Be brief.\n\nBe kind."}]
    assert frame.alone([*two, *said("Hi")]) == frame.alone([*one, *said("Hi")])
    with pytest.raises(InvalidInputError, match="the last message has to be the user's"):
        frame.alone([*said("Hi"), *one])


# --- what a template may be told ------------------------------------------------------------------

THINKS = (
    TEMPLATES["chatml"].removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def test_options_of_the_template_change_what_stands_behind_the_memories(weights: Any) -> None:
    tokenizer = tokenizer_of("byte level", "chatml")
    tokenizer.chat_template = THINKS
    frame = Frame(model_of(weights, tokenizer), "chat")
    told = frame.told({"enable_thinking": False})
    assert told.prefix == frame.prefix
    assert tokenizer.decode(told.behind_memories("Hi").tail).endswith(
        "assistant\n<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(frame.behind_memories("Hi").tail).endswith("assistant\n")
    rendered = tokenizer.apply_chat_template(
        said("Hi"), add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert whole(told.alone("Hi")) == list(rendered)
    for options, message in (
        ({"enable_thinkin": True}, "knows no option 'enable_thinkin'"),
        ({"tokenize": True}, "cannot set 'tokenize'"),
        ({"messages": []}, "cannot set 'messages'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            frame.told(options)
    with pytest.raises(InvalidInputError, match="template needs the framing 'chat'"):
        Frame(model_of(weights, tokenizer), "plain").told({"enable_thinking": False})


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end", "before"),
    [
        ("chatml", "<|im_end|>", ""),
        ("llama 2", "</s>", " "),
        ("mistral", "</s>", " "),
        ("phi 3", "<|end|>", ""),
        ("zephyr", "</s>", ""),
        ("llama 3", "<|eot_id|>", ""),
        ("gemma", "<end_of_turn>", ""),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece, prepended", "word piece"])
def test_the_end_of_the_assistants_turn_ends_an_answer(
    weights: Any, kind: str, template: str, end: str, before: str
) -> None:
    tokenizer = tokenizer_of(kind, template)
    model = model_of(weights, tokenizer)
    frame = Frame(model, "chat")
    ends = frame.stop_tokens
    assert tokenizer.convert_tokens_to_ids(end) in ends
    assert ends - model.stop_tokens() <= {tokenizer.convert_tokens_to_ids(end)}
    assert frame.before_answer == before
    assert Frame(model, "plain").stop_tokens == model.stop_tokens()
