"""What an evaluation may be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from memdb import DEFAULT_CODEC, Framing, InvalidInputError
from model_adapter.attention.weighing import Weighing
from model_adapter.files.measured_file import Head
from model_adapter.selections import DEFAULT_FLOOR, Spread
from model_adapter.writing.head_weight_file import GivenWeights

#: What is seen of a question's corpus: its own documents; those and others (of one document, 4 of
#: its article; of several, 3 distractors); or the 5 references that are retrieved for it.
References = Literal["1", "5", "retrieved"]

#: References that are retrieved (paper, 3.1), and documents that are seen together.
SEEN = 5
#: Documents that are seen beside several that answer.
BESIDE = 3


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        limit: at most so many questions, spread over the file; None: all.
        references: what is seen, see `References`.
        framing: `plain`, `chat` or `both`; None: all that the model has.
        selection: which key-values are kept; None: see `Writer`.
        budget: how many of a 128-token reference; None: the selection's default.
        floor: see `Writer`.
        spread: where the budget is spent; None: likewise.
        head_weights: factors of heads' scores, see `Writer`; None: the catalogue's, if it has such.
        predictor: for the selection `predicted`, see `Writer`; None: the catalogue's.
        layers: memory layers; None: all.
        heads: memory heads, see `Writer`; None: all of these layers.
        codec: how memories are stored.
        weighing: how memories count by their scores; None: as it is for the model; `EVEN`: all the
            same.
        answers: whether to answer, too: right answers, exact match, F1 and seconds. Else
            likelihoods alone.
        ranking: whether to rank the right answer among others.
        controls: whether to measure, too, what memories are worth that say nothing of the answer.
        max_new_tokens: of an answer, at least 1.
        text_limit: documents for the perplexity of running text; 0: none.
        seed: of what is drawn: other documents, and the bootstrap; not of the ranking's answers,
            which are always the same.

    Raises:
        InvalidInputError: naming the setting.
    """

    limit: int | None = None
    references: References = "1"
    framing: Framing | Literal["both"] | None = None
    selection: str | None = None
    budget: int | None = None
    floor: int = DEFAULT_FLOOR
    spread: Spread | None = None
    head_weights: GivenWeights | None = None
    predictor: Path | None = None
    layers: Sequence[int] | None = None
    heads: Sequence[Head] | Path | None = None
    codec: str = DEFAULT_CODEC
    weighing: Weighing | None = None
    answers: bool = True
    ranking: bool = True
    controls: bool = False
    max_new_tokens: int = 24
    text_limit: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.references not in get_args(References):
            raise InvalidInputError(
                f"references are '1', '5' or 'retrieved', not {self.references!r}"
            )
        if self.framing not in (None, "plain", "chat", "both"):
            raise InvalidInputError(
                f"the framing is 'plain', 'chat' or 'both', not {self.framing!r}"
            )
        for name, least in (("limit", 1), ("max_new_tokens", 1), ("text_limit", 0), ("seed", 0)):
            number = getattr(self, name)
            if name == "limit" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InvalidInputError(
                    f"{name} must be a whole number of at least {least}, got {number!r}"
                )

    @property
    def new_tokens(self) -> int:
        """Tokens of an answer; 0: there is none."""
        return self.max_new_tokens if self.answers else 0
