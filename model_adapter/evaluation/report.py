"""What an evaluation gives back: figures, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memdb import Framing
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation.bootstrap import Bootstrap
from model_adapter.evaluation.figures import Compared, Figure, compared, listed
from model_adapter.evaluation.memories_seen import Size
from model_adapter.evaluation.questions import Question
from model_adapter.evaluation.running_text import RunningText
from model_adapter.evaluation.settings import References
from model_adapter.files.measured_file import Head

#: The arms that are always there, in the order of tables.
ARMS = ("nothing", "rag", "memory")


@dataclass(frozen=True)
class FramingFigures(Compared):
    """All figures of one framing: of all questions (`Compared`), and

    Attributes:
        framing: `plain` or `chat`.
        recall: `recall_at_1`: share of questions one of whose documents has the reference that is
            nearest to it; `recall_at_5`: or one of the 5 nearest; `recall_all_at_5`: all of whose
            documents have one of these.
        kinds: figures of the questions of each kind, in the order of their names; empty where no
            question has one.
        size: bytes of stored memories.
        weighing: how memories counted by their scores.
        running_text: None where it was not asked for, or no document is long enough.
    """

    framing: Framing
    recall: Mapping[str, Figure]
    kinds: Mapping[str, Compared]
    size: Size
    weighing: Weighing
    running_text: RunningText | None

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            **super().to_json(),
            **listed(self.recall),
            "bytes_per_reference": self.size.reference,
            "bytes_per_128_tokens": self.size.tokens_128,
            "stored_as": list(self.size.codecs),
            "weighing": self.weighing.to_json(),
            "running_text": None if self.running_text is None else self.running_text.to_json(),
            "kinds": {kind: {"n": one.n, **one.to_json()} for kind, one in self.kinds.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        framings: the figures of each, at least one.
        questions: how many were asked.
        references: what they saw, see `Settings`.
        model: its name.
        adapter: by which memories were written; `none`: by the model's own weights.
        embedder: its name.
        selection: of the memories.
        budget: key-value pairs of a 128-token reference.
        layers: memory layers.
        heads: memory heads, (layer, kv head) each; None: all of them.
        head_weights: factors of heads' scores, layer by layer; None: there are none.
        codec: that was asked for (`Size.codecs`: those in use; one that is fitted to memories takes
            over once there are 256).
        seed: of what was drawn.
        max_new_tokens: of an answer; 0: none were given.
        work: the folder that keeps what was measured.
    """

    framings: Sequence[FramingFigures]
    questions: int
    references: References
    model: str
    adapter: str
    embedder: str
    selection: str
    budget: int
    layers: tuple[int, ...]
    heads: tuple[Head, ...] | None
    head_weights: tuple[float, ...] | None
    codec: str
    seed: int
    max_new_tokens: int
    work: str

    @property
    def best(self) -> FramingFigures:
        """The framing in which memory has the largest share of what RAG gains."""
        return max(
            self.framings, key=lambda one: -np.inf if one.share is None else float(one.share)
        )

    def to_json(self) -> dict[str, Any]:
        """The best framing's figures, those of each, and what they are of."""
        best = self.best
        about = {name: value for name, value in vars(self).items() if name != "framings"}
        return {
            **best.to_json(),
            "framing": best.framing,
            "framings": {one.framing: one.to_json() for one in self.framings},
            **{**about, "layers": list(self.layers)},
            "heads": self.heads and [list(head) for head in self.heads],
            "head_weights": self.head_weights and list(self.head_weights),
        }


def figures_of(
    framing: Framing,
    questions: Sequence[Question],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Sequence[Sequence[str]],
    size: Size,
    weighing: Weighing,
    text: RunningText | None,
    seed: int,
) -> FramingFigures:
    """The figures of one framing.

    Args:
        framing: which.
        questions: that were asked.
        rows: by arm, for each question an `Outcome` as JSON values.
        found: for each question the documents of the nearest references, best first.
        size: of stored memories.
        weighing: of memories.
        text: running text.
        seed: of the bootstrap.
    """
    whole = compared(questions, rows, seed)
    kinds: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        if question.kind is not None:
            kinds.setdefault(question.kind, []).append(place)
    return FramingFigures(
        **vars(whole),
        framing=framing,
        recall=_recall(questions, found, seed),
        kinds={
            kind: compared(
                [questions[place] for place in places],
                {arm: [outcomes[place] for place in places] for arm, outcomes in rows.items()},
                seed,
            )
            for kind, places in sorted(kinds.items())
        },
        size=size,
        weighing=weighing,
        running_text=text,
    )


def _recall(
    questions: Sequence[Question], found: Sequence[Sequence[str]], seed: int
) -> dict[str, Figure]:
    pairs = [(set(one.documents), keys) for one, keys in zip(questions, found, strict=True)]
    columns = {
        "recall_at_1": [bool(own & set(keys[:1])) for own, keys in pairs],
        "recall_at_5": [bool(own & set(keys)) for own, keys in pairs],
        "recall_all_at_5": [own <= set(keys) for own, keys in pairs],
    }
    bootstrap = Bootstrap({name: np.array(v, np.float64) for name, v in columns.items()}, seed)
    return {name: bootstrap.mean(name) for name in columns}
