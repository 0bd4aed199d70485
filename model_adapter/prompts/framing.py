"""Framing: what stands around memories and prompt, in plain text or in the model's chat template.

The reference prefix must be exactly what stands before the memories when they are read, and the
context goes on behind them without a second BOS (paper, 3.1; with a second one, quality falls
sharply). So the whole template up to the user's text is part of the prefix:

    plain:  <bos>Reference:        [memories]  \\n{prompt}
    chat:   {template}Reference:   [memories]  \\n\\n{prompt}{template's end}

Of a conversation, the first message of the user is where the prompt is, and the template's end goes
on with the other messages. What the system says stands before what the user says next, behind the
memories, so that the prefix is the same for all.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from memdb import Framing, InvalidInputError
from model_adapter.catalog import in_brief
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.turns import Role, Turn

REFERENCE = "Reference:"
_EMPTY_LINE = "\n\n"  # behind what the system says
_MARK = re.compile("\x1a([0-9]+)\x1a")  # stands for a message while the template is rendered

#: What somebody said: `role` (system, user or assistant) and `content`.
Message = Mapping[str, str]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        content: token ids of all up to the last word of the user.
        tail: token ids of the template's end.
        turns: where in the content somebody speaks, in the order of speaking.
    """

    content: list[int]
    tail: list[int]
    turns: list[Turn]


@dataclass(frozen=True)
class _Said:
    """A message of user or assistant, with what the system said before it, if anything."""

    role: Role
    content: str
    system: str | None = None


class Frame:
    """One framing of one model.

    Args:
        model: whose tokenizer and template are used.
        framing: `plain` or `chat`.
        prefix: the recorded prefix of a database; default: made here.

    Attributes:
        head: token ids of what stands before everything, the prefix's "Reference:" left out.
        gap: text between references and prompt.

    Raises:
        InvalidInputError: `chat` for a model without a template, or with one that cannot be used.
    """

    def __init__(
        self, model: LanguageModel, framing: Framing, prefix: tuple[int, ...] | None = None
    ) -> None:
        self._model = model
        self.framing = framing
        tokenizer = model.tokenizer
        if framing == "plain":
            bos = tokenizer.bos_token_id
            self.head: tuple[int, ...] = () if bos is None else (int(bos),)
            self._tail: list[int] = []
            self.gap = "\n"
        elif framing == "chat":
            if not tokenizer.chat_template:
                raise InvalidInputError(
                    f"the model '{model.name}' has no chat template; use the framing 'plain'"
                )
            head, tail = _template(model, [{"role": "user", "content": ""}])
            self.head = tuple(model.tokens(head, special=True))
            self._tail = model.tokens(tail, special=True)
            self.gap = "\n\n"
        else:
            raise InvalidInputError(f"the framing is 'plain' or 'chat', not {framing!r}")
        reference = model.tokens(REFERENCE)
        if prefix is not None and list(prefix[-len(reference) :]) == reference:
            self.head = tuple(prefix[: -len(reference)])

    @property
    def prefix(self) -> tuple[int, ...]:
        """What stands before every reference, and before the memories."""
        return (*self.head, *self._model.tokens(REFERENCE))

    def behind_memories(self, prompt: str | Sequence[Message]) -> Prompt:
        """A prompt that goes on behind the memories.

        Raises:
            InvalidInputError: it is empty, or messages that are none of a conversation.
        """
        return self._framed(prompt, [], self.gap)

    def alone(self, prompt: str | Sequence[Message]) -> Prompt:
        """A prompt without references; errors as above."""
        return self._framed(prompt, self.head, "")

    def with_text(self, references: Sequence[str], prompt: str | Sequence[Message]) -> Prompt:
        """A prompt with the references as text before it (RAG), where memories would stand; errors
        as above."""
        text = self._model.tokens("\n\n".join(references))
        return self._framed(prompt, [*self.prefix, *text], self.gap)

    def _framed(self, prompt: str | Sequence[Message], before: Sequence[int], gap: str) -> Prompt:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InvalidInputError("the prompt is empty")
            said, between, tail = [_Said("user", prompt)], [], self._tail
        else:
            said = _conversation(prompt)
            if self.framing != "chat":
                raise InvalidInputError(
                    "messages need the framing 'chat', and this database's is 'plain': give the "
                    "prompt as a text"
                )
            parts = _template(self._model, [{"role": one.role} for one in said])
            *between, tail = (self._model.tokens(text, special=True) for text in parts[1:])
        content = [*before]
        turns: list[Turn] = []
        for control, one in zip([[], *between], said, strict=True):
            content += control
            self._say(one, "" if turns else gap, content, turns)
        return Prompt(content, tail, turns)

    def _say(self, said: _Said, gap: str, content: list[int], turns: list[Turn]) -> None:
        """Put a message behind what was said so far."""
        spoken: list[tuple[Role, str]] = [(said.role, said.content)]
        if said.system is not None:
            spoken.insert(0, ("system", said.system))
        text = gap + _EMPTY_LINE.join(words for _, words in spoken)
        spans = self._model.spans(text)
        at, end = len(gap), 0
        for role, words in spoken:
            # A token that reaches from a text into what stands around it is one of the text's.
            start = max(end, bisect_right(spans, at, key=lambda span: span[1]))
            end = max(start, bisect_left(spans, at + len(words), key=lambda span: span[0]))
            turns.append(Turn(role, len(content) + start, len(content) + end))
            at += len(words) + len(_EMPTY_LINE)
        content += self._model.tokens(text)


def _conversation(prompt: Sequence[Message]) -> list[_Said]:
    """Messages by user and assistant in turn, those of the system with the user's."""
    said: list[_Said] = []
    system: str | None = None
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, Mapping):
            raise InvalidInputError(
                f"message {number} is no mapping with 'role' and 'content': {message!r:.60}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in get_args(Role) or not isinstance(content, str):
            raise InvalidInputError(
                f"message {number} needs a 'role' ({', '.join(get_args(Role))}) and a text as "
                f"'content', got {message!r:.60}"
            )
        if role == "system":
            system = content if system is None else system + _EMPTY_LINE + content
            continue
        speaker: Role = "assistant" if len(said) % 2 else "user"
        if role != speaker:
            raise InvalidInputError(
                f"message {number} is by the {role} again: user and assistant speak in turn, the "
                "user first"
            )
        if speaker == "user":
            said.append(_Said(speaker, content, system))
            system = None
        else:
            said.append(_Said(speaker, content))
    if not said or said[-1].role != "user" or not said[-1].content.strip():
        raise InvalidInputError("the last message has to be the user's, and to say something")
    return said


def _template(model: LanguageModel, messages: Sequence[Message]) -> list[str]:
    """What the chat template puts before, between and behind the messages' texts."""
    marked = [{**said, "content": f"\x1a{i}\x1a"} for i, said in enumerate(messages)]
    try:
        rendered = model.tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=True
        )
        parts = _MARK.split(str(rendered))
        if parts[1::2] != [str(i) for i in range(len(messages))]:
            raise ValueError("it does not print each message once")
    except Exception as error:  # templates are programs, and fail in every way
        raise InvalidInputError(
            f"the chat template of the model '{model.name}' cannot be used ({in_brief(error)}); "
            "use the framing 'plain'"
        ) from error
    return parts[::2]


def default_framing(model: LanguageModel) -> Framing:
    """`chat` for a model that has a template."""
    return "chat" if model.tokenizer.chat_template else "plain"
