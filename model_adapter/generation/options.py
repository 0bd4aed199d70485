"""What a generation may be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from memdb import InvalidInputError

Mode = Literal["memory", "rag", "none"]

_COUNTS = {"max_new_tokens": 1, "n": 1, "memories": 1, "retrieve_every": 1, "prefetch": 0}


@dataclass(frozen=True)
class Options:
    """How to answer.

    Attributes:
        mode: `memory`; for comparison, `rag` puts the references that the last turn finds into the
            prompt as text, and `none` does without.
        max_new_tokens: at least 1.
        n: answers to each prompt, which is read once. Given, `generate` gives back a list of them
            for each prompt, also for 1; None: one answer, in no list.
        memories: references per chunk, at least 1.
        retrieve_every: most tokens of a chunk, and of a query; at least 1.
        where: only references of documents with this metadata (see `MemDB.retrieve`).
        min_score: references whose cosine similarity to the query is below this are passed over;
            None: none are.
        weigh: whether memories count by their scores (`attention.weighing`), so that those that say
            nothing of the query do not drown the one that does, and are left out where they fall
            far behind; with `rag`, such references are left out, too. Else all count the same
            (the paper).
        max_overlap: references of which at least this share stands in the prompt or the answer
            already are passed over (paper, formula (6); its evaluation has 2/3). None: none are.
        prefetch: so many tokens before a chunk ends, begin to retrieve for the next, beside
            decoding; the last tokens then take no part in the query. Pays where the model does not
            run on the CPU.
        cite: say how much attention each memory got.
        temperature: 0: the likeliest token; else the logits are divided by it and one is drawn.
        top_k: draw among so many of the likeliest; None: all.
        top_p: draw among the likeliest (of those) that together have this probability.
        min_p: draw among those that are at least so many times as likely as the likeliest, 0 to 1.
        repetition_penalty: above 1, tokens of prompt and answer become less likely.
        seed: the same seed draws the same tokens, for each prompt and each of its answers others;
            None: others each time.
        stop: texts that end the answer, and do not belong to it.
        template: what the model's chat template is told beside the messages, as
            `{"enable_thinking": False}`. It changes what stands behind the memories, never the
            prefix before them.
        hide_thinking: leave what the model thinks before it answers (`<think>...</think>`) out of
            the text. It is generated all the same, and counts as new tokens.

    Raises:
        InvalidInputError: naming the option.
    """

    mode: Mode = "memory"
    max_new_tokens: int = 256
    n: int | None = None
    memories: int = 5
    retrieve_every: int = 64
    where: Mapping[str, Any] | None = None
    min_score: float | None = None
    weigh: bool = True
    max_overlap: float | None = None
    prefetch: int = 0
    cite: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    template: Mapping[str, Any] | None = None
    hide_thinking: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InvalidInputError(f"mode is 'memory', 'rag' or 'none', not {self.mode!r}")
        for name, least in _COUNTS.items():
            number = getattr(self, name)
            if number is None and name == "n":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InvalidInputError(
                    f"{name} must be a whole number of at least {least}, got {number!r}"
                )
        if self.prefetch >= self.retrieve_every:
            raise InvalidInputError(
                f"prefetch must be less than retrieve_every ({self.retrieve_every}), got "
                f"{self.prefetch}"
            )
        if self.max_overlap is not None and not 0 < self.max_overlap <= 1:
            raise InvalidInputError(
                f"max_overlap must be above 0 and at most 1, got {self.max_overlap}"
            )
        if self.min_score is not None and not _is_between(self.min_score, -1, 1):
            raise InvalidInputError(f"min_score must be -1 to 1, got {self.min_score!r}")
        for name in ("weigh", "hide_thinking"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(
                    f"{name} must be True or False, got {getattr(self, name)!r}"
                )
        if self.answers > 1 and self.temperature == 0:
            raise InvalidInputError(
                f"n is {self.n}, but at temperature 0 all answers are the same: give a temperature "
                "above 0, as 0.7"
            )
        if self.template is not None and not (
            isinstance(self.template, Mapping)
            and all(isinstance(name, str) for name in self.template)
        ):
            raise InvalidInputError(
                f"template is a mapping of names to values, got {self.template!r:.60}"
            )
        if not all(isinstance(text, str) and text for text in self.stops):
            raise InvalidInputError(f"stop is a text or texts, none empty, got {self.stop!r}")

    @property
    def answers(self) -> int:
        """To each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _is_between(value: object, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value <= most


def options_of(given: Mapping[str, Any]) -> Options:
    """Options by name; `InvalidInputError` for a name that there is not."""
    unknown = sorted(given.keys() - Options.__dataclass_fields__.keys())
    if unknown:
        raise InvalidInputError(
            f"there is no option {unknown[0]!r}; there are: "
            f"{', '.join(Options.__dataclass_fields__)}"
        )
    return Options(**given)
