"""Framing: what stands around memories and prompt, in plain text or in the model's chat template.

The reference prefix must be exactly what stands before the memories when they are read, and the
context goes on behind them without a second BOS (paper, 3.1; with a second one, quality falls
sharply). So the whole template up to the user's text is part of the prefix:

    plain:  <bos>Reference:        [memories]  \\n{prompt}
    chat:   {template}Reference:   [memories]  \\n\\n{prompt}{template's end}

All is made into tokens together, as the tokenizer would do it with the rendered template; only what
people say is never a control token in it. The one seam is where the memories stand.

Of a conversation, the first message of the user is where the prompt is, and the template's end goes
on with the other messages.

The prefix is the same for all conversations, whatever the system says, since memories were written
behind it. So with references, a conversation that the system begins has them in a turn of the user
of their own, and the system's turn follows:

    {template}Reference:  [memories]  {end of turn}{system's turn}{user's turn}{template's end}

Where a template has no such turn there (it wants user and assistant in turn, or knows no system),
what the system says stands before what the user says next, in the user's turn. Without references
the template has the system's message where it wants it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from memdb import Framing, InvalidInputError
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.words import Encoded, Part
from model_adapter.prompts.template import ChatTemplate, Place, control
from model_adapter.prompts.turns import Role, Turn

REFERENCE = "Reference:"
_EMPTY_LINE = "\n\n"  # behind what the system says

#: What somebody said: `role` (system, user or assistant) and `content`.
Message = Mapping[str, str]

#: What stands around what a model thinks before it answers.
THINKING = ("<think>", "</think>")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        content: token ids of all up to the last word of the user.
        tail: token ids of the template's end.
        turns: where in the content somebody speaks, in the order of speaking.
        thinks: whether the template's end has begun to think for the assistant.
    """

    content: list[int]
    tail: list[int]
    turns: list[Turn]
    thinks: bool = False


@dataclass(frozen=True)
class _Said:
    """A message: who says it, and in which words. One of the user may have words of the system
    before the user's."""

    role: Role
    words: tuple[tuple[Role, str], ...]


class Frame:
    """One framing of one model.

    Args:
        model: whose tokenizer and template are used.
        framing: `plain` or `chat`.
        prefix: the recorded prefix of a database; default: made here.
        template: what the chat template is told beside the messages, as `{"enable_thinking":
            False}`. It changes what stands behind the memories, never a recorded prefix.

    Attributes:
        prefix: token ids of what stands before every reference, and before the memories.
        head: the same without "Reference:".
        gap: text between references and prompt.
        before_answer: text that an answer has before it, behind a prompt.

    Raises:
        InvalidInputError: `chat` for a model without a template, or with one that cannot be used;
            or the template knows no such option.
    """

    def __init__(
        self,
        model: LanguageModel,
        framing: Framing,
        prefix: tuple[int, ...] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self.framing = framing
        self.gap = "\n\n" if framing == "chat" else "\n"
        self._template: ChatTemplate | None = None
        self._bos: list[int] = []
        if framing == "plain":
            bos = model.tokenizer.bos_token_id
            self._bos = [] if bos is None else [int(bos)]
            before: list[Part] = []
            if template:
                raise InvalidInputError(
                    "template needs the framing 'chat', and this database's is 'plain'"
                )
        elif framing == "chat":
            self._template = ChatTemplate(model, template or {})
            before = [control(self._template.places(["user"])[0][0].before)]
        else:
            raise InvalidInputError(f"the framing is 'plain' or 'chat', not {framing!r}")
        made = model.words.beginning([*before, Part(REFERENCE)])
        own = [*self._bos, *made.ids]
        self.prefix: tuple[int, ...] = tuple(own if prefix is None else prefix)
        # Tokens of "Reference:", as far as they are of nothing else.
        line = len(made.ids) - bisect_left(made.spans, made.places[-1][0], key=lambda at: at[0])
        same = self.prefix[-line:] == tuple(own[-line:])
        self.head = (self.prefix if same else tuple(own))[:-line]

    def told(self, template: Mapping[str, Any] | None) -> Frame:
        """This frame, with something that the chat template is told; errors as of the class."""
        if not template:
            return self
        return Frame(self._model, self.framing, self.prefix, template)

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        return (" ", "") if self._template is None else self._template.around_answer()

    @property
    def before_answer(self) -> str:
        """Text that stands between a prompt and its answer."""
        return self._around_answer[0]

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end an answer: the model's own, and the one with which the template ends
        what the assistant says."""
        words = self._model.words
        end = words.going_on([control(self._around_answer[1].lstrip())]).ids
        return self._model.stop_tokens() | frozenset(id for id in end[:1] if id in words.added)

    def behind_memories(self, prompt: str | Sequence[Message]) -> Prompt:
        """A prompt that goes on behind the memories.

        Raises:
            InvalidInputError: it is empty, or messages that are none of a conversation.
        """
        said = self._said(prompt)
        if said[0].role != "system":
            return self._behind(said, self.gap)
        if self._template is not None and self._template.has_system_turn:
            return self._behind([_Said("user", ()), *said], "")
        return self._behind(_with_the_user(said), self.gap)

    def alone(self, prompt: str | Sequence[Message]) -> Prompt:
        """A prompt without references; errors as above."""
        places, said, tail = self._places(self._said(prompt))
        text = _Text()
        for place in places:
            text.add(control(place.before))
            text.say(said[place.message], place.left, place.right)
        text.add(control(tail))
        return text.prompt(self._model.words.beginning(text.parts), self._bos, tail)

    def with_text(self, references: Sequence[str], prompt: str | Sequence[Message]) -> Prompt:
        """A prompt with the references as text before it (RAG), where memories would stand; errors
        as above."""
        before = [*self.prefix, *self._model.tokens("\n\n".join(references))]
        behind = self.behind_memories(prompt)
        start = len(before)
        turns = [Turn(one.role, start + one.start, start + one.end) for one in behind.turns]
        return Prompt([*before, *behind.content], behind.tail, turns, behind.thinks)

    def _behind(self, said: list[_Said], gap: str) -> Prompt:
        places, said, tail = self._places(said)
        if places[0].message != 0:
            raise InvalidInputError("the first message is printed behind another")
        text = _Text()
        text.add(Part(gap))
        for number, place in enumerate(places):
            if number > 0:
                text.add(control(place.before))
            # "Reference:" is the first message's beginning.
            text.say(said[place.message], place.left if number else "", place.right)
        text.add(control(tail))
        return text.prompt(self._model.words.going_on(text.parts), [], tail)

    def _places(self, said: list[_Said]) -> tuple[list[Place], list[_Said], str]:
        """Where the template prints what was said, what that is, and the template's end."""
        if self._template is None:
            return [Place(0, "", "", "")], said, ""
        if not self._template.has_system_turn:
            said = [*said[:1], *_with_the_user(said[1:])]
        try:
            places, tail = self._template.places([one.role for one in said])
        except InvalidInputError:
            if said[0].role != "system":
                raise
            said = _with_the_user(said)
            places, tail = self._template.places([one.role for one in said])
        return places, said, tail

    def _said(self, prompt: str | Sequence[Message]) -> list[_Said]:
        if not isinstance(prompt, str):
            said = _conversation(prompt)
            if self.framing != "chat":
                raise InvalidInputError(
                    "messages need the framing 'chat', and this database's is 'plain': give the "
                    "prompt as a text"
                )
            return said
        if not prompt.strip():
            raise InvalidInputError("the prompt is empty")
        return [_Said("user", (("user", prompt),))]


class _Text:
    """A prompt's text, part by part.

    Attributes:
        parts: of the text.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._spoken: list[tuple[Role, int]] = []  # who says which part

    def add(self, part: Part) -> None:
        """What nobody says."""
        if part.text:
            self.parts.append(part)

    def say(self, said: _Said, left: str | None, right: str | None) -> None:
        """A message, without what its template strips from its ends (see `Place`)."""
        for number, (role, words) in enumerate(said.words):
            if number == 0:
                words = words.lstrip(left)
            else:
                self.parts.append(Part(_EMPTY_LINE))
            if number + 1 == len(said.words):
                words = words.rstrip(right)
            self._spoken.append((role, len(self.parts)))
            self.parts.append(Part(words))

    def prompt(self, encoded: Encoded, before: Sequence[int], tail: str) -> Prompt:
        """It as a prompt.

        Args:
            encoded: the parts as tokens.
            before: token ids before it.
            tail: the template's end.
        """
        spans, turns, end = encoded.spans, [], 0
        for role, part in self._spoken:
            first, last = encoded.places[part]
            # A token that reaches from a text into what stands around it is one of the text's.
            start = max(end, bisect_right(spans, first, key=lambda span: span[1]))
            end = max(start, bisect_left(spans, last, key=lambda span: span[0]))
            turns.append(Turn(role, len(before) + start, len(before) + end))
        thinks = tail.rfind(THINKING[0]) > tail.rfind(THINKING[1])
        return Prompt([*before, *encoded.ids[:end]], encoded.ids[end:], turns, thinks)


def _with_the_user(said: Sequence[_Said]) -> list[_Said]:
    """The conversation without turns of the system: its words stand before the user's next ones."""
    turns: list[_Said] = []
    system: tuple[tuple[Role, str], ...] = ()
    for one in said:
        if one.role == "system":
            system = one.words
        else:
            turns.append(_Said(one.role, (*system, *one.words)))
            system = ()
    return turns


def _conversation(prompt: Sequence[Message]) -> list[_Said]:
    """Messages by user and assistant in turn, those of the system before the user's."""
    said: list[_Said] = []
    speaker: Role = "user"  # whose turn it is
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
            if said and said[-1].role == "system":
                content = said.pop().words[0][1] + _EMPTY_LINE + content
        elif role != speaker:
            raise InvalidInputError(
                f"message {number} is by the {role} again: user and assistant speak in turn, the "
                "user first"
            )
        else:
            speaker = "assistant" if speaker == "user" else "user"
        by: Role = role  # type: ignore[assignment]
        said.append(_Said(by, ((by, content),)))
    if not said or said[-1].role != "user" or not said[-1].words[0][1].strip():
        raise InvalidInputError("the last message has to be the user's, and to say something")
    return said


def default_framing(model: LanguageModel) -> Framing:
    """`chat` for a model that has a template."""
    return "chat" if model.tokenizer.chat_template else "plain"
