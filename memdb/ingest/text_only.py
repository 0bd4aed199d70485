"""Text that is only text: tokenizers to which no text is a control token.

A tokenizer matches its added tokens before all others, so "<|im_end|>" in somebody's document would
become the token that ends a turn. Here control tokens have other names, which nobody can know. What
a program writes itself (a chat template) uses those names, and what a user wrote stays what it
looks like, even within one text. All ids stay what they are.

Added tokens that are no control tokens (HTML's tags, runs of new lines) stay: the model was trained
with them.

A big vocabulary takes a quarter of a second and tens of megabytes: so whoever asks for the same
tokenizer gets the same one, as long as somebody holds it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import Tokenizer

from memdb.errors import InvalidInputError
from memdb.types import arguments
from memdb.types.canonical import read_json

# Another in each process, so no text can hold it. No normalizer changes these characters.
_SECRET = secrets.token_hex(8)
_NAME = re.compile(f"<{_SECRET}:[0-9]+>")

# Control tokens that are not flagged as special (DeepSeek's <｜User｜>, Qwen's <tool_call>).
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].*[|｜]>|</?(think|thinking|tool_\w+)>")


@dataclass(frozen=True)
class TextOnly:
    """A tokenizer twice, by where a text stands. Nothing is put around a text, and spans hold the
    spaces that tokens do. Others may hold the same: nobody changes it.

    Attributes:
        beginning: for a text that nothing stands before.
        going_on: for a text behind other text. The same object if there is no difference, which is
            so unless the tokenizer puts something before what it is given.
        control: control tokens, and their names here.
        shown: these names, and what the tokenizer shows of such a token.
        added: ids of all added tokens.
    """

    beginning: Tokenizer
    going_on: Tokenizer
    control: Mapping[str, str]
    shown: Mapping[str, str]
    added: frozenset[int]

    def named(self, text: str) -> str:
        """A text that may hold control tokens, by their names here."""
        found = [token for token in self.control if token in text]
        if not found:
            return text
        longest_first = sorted(found, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        return pattern.sub(lambda match: self.control[match[0]], text)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids, as the tokenizer itself has it. `special`: with the tokens that
        are flagged so, which are left out else."""
        text = str(self.going_on.decode(tokens, skip_special_tokens=not special))
        return _NAME.sub(lambda match: self.shown.get(match[0], match[0]), text)

    def token(self, id: int) -> str | None:
        """The token with an id; None: there is none."""
        found = self.going_on.id_to_token(id)
        return None if found is None else self._tokens.get(found, found)

    @cached_property
    def _tokens(self) -> dict[str, str]:
        return {name: token for token, name in self.control.items()}


_held: WeakValueDictionary[str, TextOnly] = WeakValueDictionary()


def text_only(tokenizer: str) -> TextOnly:
    """A tokenizer to which no text is a control token.

    Args:
        tokenizer: the text of a tokenizer.json.

    Raises:
        InvalidInputError: it does not load.
    """
    arguments.a(str, tokenizer, "tokenizer")
    found = _held.get(tokenizer)
    return _held.setdefault(tokenizer, _made(tokenizer)) if found is None else found


def _made(tokenizer: str) -> TextOnly:
    try:
        parts = _parts(tokenizer)
        added = [token["content"] for token in parts["added_tokens"]]
        control = {
            token["content"]: _name(number)
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
    shown = {name: _shown(beginning, token) for token, name in control.items()}
    return TextOnly(beginning, going_on, control, shown, ids)


def _name(number: int) -> str:
    return f"<{_SECRET}:{number}>"


def _shown(tokenizer: Tokenizer, token: str) -> str:
    """What the tokenizer makes of a token within a text."""
    if tokenizer.decoder is None:
        return token
    return str(tokenizer.decoder.decode(["a", token])).removeprefix("a").lstrip(" ")


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
    made.post_processor = None  # it puts control tokens around texts, and trims spans
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
