"""Text that is only text: tokenizers to which no text is a control token.

A tokenizer matches its added tokens before all others, so "<|im_end|>" in somebody's document would
become the token that ends a turn. Here control tokens have other names, which nobody can know. What
a program writes itself (a chat template) uses those names, and what a user wrote stays what it
looks like, even within one text. All ids stay what they are.

Added tokens that are no control tokens (HTML's tags, runs of new lines) stay: the model was trained
with them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from memdb.errors import InvalidInputError
from memdb.types import arguments
from memdb.types.canonical import read_json

# Another in each process, so no text can hold it. No normalizer changes these characters.
_SECRET = secrets.token_hex(8)

# Control tokens that are not flagged as special (DeepSeek's <｜User｜>, Qwen's <tool_call>).
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].*[|｜]>|</?(think|thinking|tool_\w+)>")


@dataclass(frozen=True)
class TextOnly:
    """A tokenizer twice, by where a text stands.

    Attributes:
        beginning: for a text that nothing stands before.
        going_on: for a text behind other text. The same object if there is no difference, which is
            so unless the tokenizer puts something before what it is given.
        control: control tokens, and their names here.
        added: ids of all added tokens.
    """

    beginning: Tokenizer
    going_on: Tokenizer
    control: Mapping[str, str]
    added: frozenset[int]

    def named(self, text: str) -> str:
        """A text that may hold control tokens, by their names here."""
        found = [token for token in self.control if token in text]
        if not found:
            return text
        longest_first = sorted(found, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        return pattern.sub(lambda match: self.control[match[0]], text)


def text_only(tokenizer: str) -> TextOnly:
    """Make them of a tokenizer.

    Args:
        tokenizer: the text of a tokenizer.json.

    Raises:
        InvalidInputError: it does not load.
    """
    arguments.a(str, tokenizer, "tokenizer")
    try:
        parts = _parts(tokenizer)
        added = [token["content"] for token in parts["added_tokens"]]
        control = {
            token["content"]: f"<{_SECRET}:{number}>"
            for number, token in enumerate(parts["added_tokens"])
            if token.get("special") or _LOOKS_LIKE_CONTROL.fullmatch(token["content"])
        }
        _rename(parts, control)
        beginning = _loaded(parts)
        going_on = _loaded(parts) if _put_nothing_before(parts) else beginning
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise  # no complaint of the tokenizer, for which `tokenizers` has the bare class
        raise InvalidInputError(f"the tokenizer does not load: {error}") from error
    found = (beginning.token_to_id(control.get(token, token)) for token in added)
    ids = frozenset(id for id in found if id is not None)
    return TextOnly(beginning, going_on, control, ids)


def _parts(tokenizer: str) -> dict[str, Any]:
    parts = read_json(tokenizer.encode())
    if not isinstance(parts, dict) or not isinstance(parts.get("model"), dict):
        raise ValueError("it is no JSON object with a model")
    added = parts.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise ValueError("its added tokens are no list of tokens")
    return parts


def _loaded(parts: dict[str, Any]) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(parts))
    made.no_truncation()
    made.no_padding()
    return made


def _rename(parts: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give control tokens their other names, in the model's vocabulary, too: a word that looks like
    one is found there otherwise (Unigram, whole words)."""
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = parts["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # pairs with scores
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        model["unk_token"] = names.get(unknown, unknown)
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []
    ]
    if merges:
        model["merges"] = [
            (one, other)
            for one, other in merges
            if one not in names and other not in names and one + other not in names
        ]


def _put_nothing_before(parts: dict[str, Any]) -> bool:
    """Change a tokenizer that puts something before a text, so that it does not; whether it did."""
    before = json.dumps([parts.get("normalizer"), parts.get("pre_tokenizer")])
    parts["normalizer"] = _without(parts.get("normalizer"), "normalizers")
    parts["pre_tokenizer"] = _without(parts.get("pre_tokenizer"), "pretokenizers")
    return before != json.dumps([parts["normalizer"], parts["pre_tokenizer"]])


def _without(part: Any, several: str) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Sequence" and isinstance(part.get(several), list):
        inner = (_without(one, several) for one in part[several])
        return {**part, several: [one for one in inner if one is not None]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        kept = {name: value for name, value in part.items() if name != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    return part
