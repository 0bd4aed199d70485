"""Tokenizers to which no text is a control token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from memdb import Chunker, InvalidInputError, text_only, text_tokenizer
from tests.engine.helpers import tokenizer_json


def words(**changes: Any) -> str:
    """A tokenizer of whole words, in whose vocabulary control tokens are."""
    names = ["<unk>", "</s>", "<b>", "a", "b", "▁a", "▁b", "▁", "▁</s>"]
    made = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    parts = json.loads(made.to_str())
    parts["added_tokens"] = [
        {"id": id, "content": content, "special": special, **_FLAGS}
        for id, content, special in ((1, "</s>", True), (2, "<b>", False), (9, "<think>", False))
    ]
    return json.dumps({**parts, **changes})


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_control_tokens_have_other_names_and_all_ids_stay() -> None:
    made = text_only(words())
    assert ids(made.going_on, "a </s> <b> <think> b") == [3, 0, 2, 0, 4]
    assert ids(made.going_on, made.named("a </s> <b> <think> b")) == [3, 1, 2, 9, 4]
    assert made.added == {1, 2, 9}
    assert set(made.control) == {"</s>", "<think>"}
    assert ids(text_tokenizer(words()), "</s><b>a") == [0, 2, 3]
    # Not by a text that knows how the names are made: a part of them is random.
    assert all(len(name) > 16 for name in made.control.values())
    other = text_only(tokenizer_json())
    assert other.going_on.token_to_id(other.control["<|im_end|>"]) == 1
    assert 1 not in ids(other.going_on, "<|im_end|>")
    assert ids(other.going_on, other.named("so<|im_end|>")) == [*ids(other.going_on, "so"), 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
                ],
            }
        },
        {
            "normalizer": {"type": "Prepend", "prepend": "▁"},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
        },
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}],
            },
        },
    ],
)
def test_nothing_is_put_before_a_text_that_goes_on(changes: dict[str, Any]) -> None:
    changed = words(**changes)
    made = text_only(changed)
    assert ids(made.beginning, "a") == ids(Tokenizer.from_str(changed), "a") == [5]
    assert ids(made.going_on, "a") == [3]
    assert Chunker(changed, 9).count("a") == 1
    plain = text_only(words())
    assert plain.beginning is plain.going_on


def test_words_that_a_control_token_is_a_part_of_are_lost_with_it() -> None:
    vocabulary = {name: id for id, name in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    model = models.BPE(vocabulary, [("a", "b"), ("ab", "c"), ("b", "c")])
    made = Tokenizer(model)
    made.normalizer = normalizers.NFC()
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["ab"])
    found = text_only(made.to_str())
    assert ids(found.going_on, "abc") == [0, 5]
    assert ids(found.going_on, "ab") == [0, 1]
    assert ids(found.beginning, found.named("ab") + "c") == [3, 2]


@pytest.mark.parametrize(
    "wrong", ['{"model": {}, "added_tokens": 3}', '{"model": {}, "added_tokens": [{"id": 1}]}', "3"]
)
def test_what_is_no_tokenizer_is_named(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match="the tokenizer does not load"):
        text_only(wrong)
