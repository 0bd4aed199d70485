"""Framing: what stands around memories and prompt, in plain text or in the model's chat template.

The reference prefix must be exactly what stands before the memories when they are read, and the
context goes on behind them without a second BOS (paper, 3.1; with a second one, quality falls
sharply). So the whole template up to the user's text is part of the prefix:

    plain:  <bos>Reference:        [memories]  \\n{prompt}
    chat:   {template}Reference:   [memories]  \\n\\n{prompt}{template's end}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb import Framing, InvalidInputError
from model_adapter.catalog import first_line
from model_adapter.language_model import LanguageModel

REFERENCE = "Reference:"
_MARK = "\x1aprompt\x1a"  # stands for the prompt while the template is rendered


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt: the part that queries are made of, and the template's end."""

    content: list[int]
    tail: list[int]


class Frame:
    """One framing of one model.

    Args:
        model: whose tokenizer and template are used.
        framing: `plain` or `chat`.
        prefix: the recorded prefix of a database; default: made here.

    Raises:
        InvalidInputError: `chat` for a model without a template, or with one that cannot be used.
    """

    def __init__(
        self, model: LanguageModel, framing: Framing, prefix: tuple[int, ...] | None = None
    ) -> None:
        self._model = model
        tokenizer = model.tokenizer
        if framing == "plain":
            self._head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
            self._tail: list[int] = []
            self._gap = "\n"
        elif framing == "chat":
            if not tokenizer.chat_template:
                raise InvalidInputError(
                    f"the model '{model.name}' has no chat template; use the framing 'plain'"
                )
            head, tail = _template(model)
            self._head = model.tokens(head, special=True)
            self._tail = model.tokens(tail, special=True)
            self._gap = "\n\n"
        else:
            raise InvalidInputError(f"the framing is 'plain' or 'chat', not {framing!r}")
        reference = model.tokens(REFERENCE)
        if prefix is not None and list(prefix[-len(reference) :]) == reference:
            self._head = list(prefix[: -len(reference)])

    @property
    def prefix(self) -> tuple[int, ...]:
        """What stands before every reference, and before the memories."""
        return (*self._head, *self._model.tokens(REFERENCE))

    def behind_memories(self, prompt: str) -> Prompt:
        """A prompt that goes on behind the memories."""
        return Prompt(self._model.tokens(self._gap + prompt), self._tail)

    def alone(self, prompt: str) -> Prompt:
        """A prompt without references."""
        return Prompt([*self._head, *self._model.tokens(prompt)], self._tail)

    def with_text(self, references: Sequence[str], prompt: str) -> Prompt:
        """A prompt with the references as text before it (RAG), where memories would stand."""
        text = "\n\n".join(references)
        return Prompt(
            [*self.prefix, *self._model.tokens(text), *self.behind_memories(prompt).content],
            self._tail,
        )


def _template(model: LanguageModel) -> tuple[str, str]:
    """What the chat template puts before and behind the user's text."""
    try:
        rendered = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        head, tail = str(rendered).split(_MARK)
    except Exception as error:  # templates are programs, and fail in every way
        raise InvalidInputError(
            f"the chat template of the model '{model.name}' cannot be used ({first_line(error)}); "
            "use the framing 'plain'"
        ) from error
    return head, tail


def default_framing(model: LanguageModel) -> Framing:
    """`chat` for a model that has a template."""
    return "chat" if model.tokenizer.chat_template else "plain"
