"""What generating asks of a tokenizer of transformers, by what was noted of it.

To load one takes transformers up to a second, and each that is loaded has the vocabulary once more.
Here texts become tokens, and tokens texts, by the one that the database needs anyway
(`memdb.text_only`), and chat templates are rendered by transformers' own function.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from memdb import TextOnly, text_only

#: What is noted: attributes of transformers' tokenizers.
_ABOUT = ("bos_token_id", "eos_token_id", "chat_template", "special_tokens_map")
#: What is done here as the usual tokenizer does it; another kind may do it in its own way.
_DONE = ("apply_chat_template", "decode", "_decode", "convert_tokens_to_ids")


@dataclass(frozen=True)
class Note:
    """What is noted of a tokenizer.

    Attributes:
        json: its tokenizer.json.
        about: a JSON object.
    """

    json: str
    about: dict[str, Any]


def note(tokenizer: Any) -> Note | None:
    """What to note of a tokenizer of transformers; None: it does what is not foreseen here."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    kind, usual = type(tokenizer), PreTrainedTokenizerFast
    if any(getattr(kind, name, None) is not getattr(usual, name, None) for name in _DONE):
        return None
    if tokenizer.clean_up_tokenization_spaces:  # it tidies what it decodes, unless it is of bytes
        corrupts = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        bytes_ = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        if not bytes_ or getattr(tokenizer, corrupts, True):
            return None
    about = {name: getattr(tokenizer, name) for name in _ABOUT}
    try:
        json.dumps(about)
    except TypeError:
        return None
    if not isinstance(about["chat_template"], str | None):  # there are several
        return None
    return Note(str(tokenizer.backend_tokenizer.to_str()), about)


class NotedTokenizer:
    """Looks like the tokenizer of transformers that the note is of. What it does not know itself it
    asks that one, which is loaded then.

    Args:
        note: of it.
        load: gives it.

    Attributes:
        json: the text of its tokenizer.json.
    """

    is_fast = True
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    special_tokens_map: dict[str, Any]

    def __init__(self, note: Note, load: Callable[[], Any]) -> None:
        self.json = note.json
        self._load = load
        self._loading = threading.Lock()
        self._loaded: Any = None
        for name in _ABOUT:
            setattr(self, name, note.about[name])

    @property
    def own(self) -> Any:
        """The one of transformers."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.own, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        """As transformers' own."""
        return self.own(*given, **options)

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.own)

    @cached_property
    def _text(self) -> TextOnly:
        return text_only(self.json)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """As transformers' own."""
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.tolist()
        one = isinstance(token_ids, Sequence) and all(isinstance(id, int) for id in token_ids)
        tidied = options.pop("clean_up_tokenization_spaces", None)
        if not one or tidied or options:
            options["clean_up_tokenization_spaces"] = tidied
            return self.own.decode(token_ids, skip_special_tokens, **options)
        return self._text.decode(token_ids, special=not skip_special_tokens)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """As transformers' own, but None for a text that is no token."""
        if not isinstance(tokens, str):
            return self.own.convert_tokens_to_ids(tokens)
        return self._text.going_on.token_to_id(self._text.control.get(tokens, tokens))

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any:
        """As transformers' own."""
        if not isinstance(ids, int):
            return self.own.convert_ids_to_tokens(ids, **options)
        return self._text.token(ids)

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """As transformers' own; what it puts into tokens, that does."""
        if options.get("tokenize") is not False or self.chat_template is None:
            return self.own.apply_chat_template(conversation, **options)
        from transformers.utils.chat_template_utils import render_jinja_template

        told = {name: value for name, value in options.items() if name != "tokenize"}
        rendered, _ = render_jinja_template(
            conversations=[conversation],
            chat_template=self.chat_template,
            **{**self.special_tokens_map, **told},
        )
        return rendered[0]
