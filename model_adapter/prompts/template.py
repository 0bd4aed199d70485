"""A model's chat template: what it prints around the messages of a conversation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from memdb import InvalidInputError
from model_adapter.catalog import in_brief
from model_adapter.models.language_model import LanguageModel
from model_adapter.models.words import Part
from model_adapter.prompts.turns import Role

_MARK = re.compile("\x1a([0-9]+)\x1a")  # stands for a message while the template is rendered

# What a template leaves of these around a message says what it strips. Blanks on the left and tabs
# on the right, so that neither is taken for the other.
_LEFT, _RIGHT = "\n ", "\t\n"
_LEFT_STRIPPED = {_LEFT: "", " ": "\n", "": None}
_RIGHT_STRIPPED = {_RIGHT: "", "\t": "\n", "": None}


@dataclass(frozen=True)
class Place:
    """Where a template prints a message.

    Attributes:
        message: its number.
        before: what the template prints before it.
        left: characters that it strips from the message's beginning; empty: none; None: all white
            space.
        right: the same, from its end.
    """

    message: int
    before: str
    left: str | None
    right: str | None

    def printed(self, text: str) -> str:
        """The message as the template prints it."""
        return text.lstrip(self.left).rstrip(self.right)


class ChatTemplate:
    """The template of a model's tokenizer.

    Args:
        model: whose.
        options: what else the template is told (`enable_thinking`).

    Raises:
        InvalidInputError: the model has none, or it knows no such option.
    """

    def __init__(self, model: LanguageModel, options: Mapping[str, Any]) -> None:
        self._model = model
        self._options = dict(options)
        source = model.tokenizer.chat_template
        if not source:
            raise InvalidInputError(
                f"the model '{model.name}' has no chat template; use the framing 'plain'"
            )
        for name in self._options:
            if name in {*_taken(), "messages"} - {"tools", "documents"}:
                raise InvalidInputError(f"template cannot set {name!r}: it is set already")
            if not re.search(rf"\b{re.escape(name)}\b", str(source)):
                raise InvalidInputError(
                    f"the chat template of the model '{model.name}' knows no option {name!r}"
                )

    def places(self, roles: Sequence[Role]) -> tuple[list[Place], str]:
        """Where messages of these roles are printed, in that order, and what stands behind the
        last, with which the assistant's answer begins.

        Raises:
            InvalidInputError: the template refuses such a conversation, or does not print each
                message once.
        """
        try:
            return self._places(roles, answer=True)
        except Exception as error:  # templates are programs, and fail in every way
            raise InvalidInputError(
                f"the chat template of the model '{self._model.name}' cannot be used "
                f"({in_brief(error)}); use the framing 'plain'"
            ) from error

    @cached_property
    def has_system_turn(self) -> bool:
        """Whether it prints what the system says within a conversation as at its beginning. (Many
        print any role that they are given, whether or not the model knows it.)"""
        try:
            beginning, _ = self._places(["system", "user"], answer=True)
            within, _ = self._places(["user", "system", "user"], answer=True)
        except Exception:  # it refuses one of them
            return False
        if [place.message for place in (*beginning, *within)] != [0, 1, 0, 1, 2]:
            return False
        first, later = beginning[0].before, within[1].before
        known = next(later[at:] for at in range(len(later) + 1) if later[at:] in first)
        return any(name in known for name in (*self._model.words.control, "system", "System"))

    def around_answer(self) -> tuple[str, str]:
        """What stands between that and an assistant's message, and behind the message: where a
        template does not say, nothing."""
        try:
            _, tail = self._places(["user"], answer=True)
            places, end = self._places(["user", "assistant"], answer=False)
        except Exception:  # it is enough if it can print a prompt
            return "", ""
        before = places[1].before
        return before.removeprefix(tail) if before.startswith(tail) else "", end

    def _places(self, roles: Sequence[Role], *, answer: bool) -> tuple[list[Place], str]:
        numbers, plain = self._rendered(roles, "", "", answer)
        if sorted(numbers) != list(range(len(roles))) or numbers[-1] != len(roles) - 1:
            raise ValueError("it does not print each message once, the last one last")
        padded_numbers, padded = self._rendered(roles, _LEFT, _RIGHT, answer)
        if padded_numbers != numbers:
            padded = plain
        ends = _stripped(plain, padded)
        places = [
            Place(number, before, ends[i][0], ends[i][1])
            for i, (number, before) in enumerate(zip(numbers, plain[:-1], strict=True))
        ]
        return places, plain[-1]

    def _rendered(
        self, roles: Sequence[Role], left: str, right: str, answer: bool
    ) -> tuple[list[int], list[str]]:
        """The numbers of the messages as they are printed, and what stands around them."""
        marked = [
            {"role": role, "content": f"{left}\x1a{number}\x1a{right}"}
            for number, role in enumerate(roles)
        ]
        rendered = self._model.tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=answer, **self._options
        )
        parts = _MARK.split(str(rendered))
        return [int(number) for number in parts[1::2]], parts[::2]


def _stripped(plain: Sequence[str], padded: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """What is stripped from both ends of each message, given what stands around messages without
    and with white space at their ends; where that cannot be told, nothing."""
    left: list[str | None] = []
    right: list[str | None] = []
    for place, (text, with_pads) in enumerate(zip(plain, padded, strict=True)):
        # On the left of a text is the end of the message before, on its right the next one's start.
        ends = _RIGHT_STRIPPED if place > 0 else {"": ""}
        starts = _LEFT_STRIPPED if place + 1 < len(plain) else {"": ""}
        found = [
            (end, start) for end in ends for start in starts if with_pads == end + text + start
        ]
        end, start = found[0] if len(found) == 1 else ("\t\n", "\n ")
        right.append(_RIGHT_STRIPPED[end] if place > 0 else "")
        left.append(_LEFT_STRIPPED[start] if place + 1 < len(plain) else "")
    return list(zip(left[:-1], right[1:], strict=True))


def _taken() -> set[str]:
    """What transformers takes itself when it renders a template."""
    from transformers import PreTrainedTokenizerBase  # here: few tell a template anything

    return {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


def control(text: str) -> Part:
    """What a template prints."""
    return Part(text, control=True)
