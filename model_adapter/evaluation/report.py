"""What an evaluation gives back: figures, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdb import Framing
from model_adapter.evaluation.answers import exact_match, f1
from model_adapter.evaluation.bootstrap import Bootstrap, Interval
from model_adapter.evaluation.running_text import RunningText
from model_adapter.evaluation.settings import References
from model_adapter.evaluation.sights import Size
from model_adapter.head_file import Head
from model_adapter.questions import Question

#: The arms, in the order of tables.
ARMS = ("nothing", "rag", "memory")
#: The figures of an arm.
FIGURES = ("nll", "tokens_right", "em", "f1", "seconds")


@dataclass(frozen=True)
class ArmFigures:
    """How well questions are answered in one arm; means over questions.

    Attributes:
        nll: negative log-likelihood per token of the first accepted answer, in nats; of each
            question the mean over its tokens.
        tokens_right: share of these tokens that are the likeliest, 0 to 1.
        em: share of answers that are an accepted one (SQuAD's normalisation); None without answers.
        f1: words that answers share with accepted ones, 0 to 1; None without answers.
        seconds: a question's; None without answers.
        intervals: by the figure's name, 95 %, by paired bootstrap over questions.
    """

    nll: float
    tokens_right: float
    em: float | None
    f1: float | None
    seconds: float | None
    intervals: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Figures, and `<name>_interval` for each."""
        values: dict[str, Any] = {}
        for name in FIGURES:
            values[name] = getattr(self, name)
            values[f"{name}_interval"] = _listed(self.intervals.get(name))
        return values


@dataclass(frozen=True)
class FramingFigures:
    """All figures of one framing.

    Attributes:
        framing: `plain` or `chat`.
        nothing: with the prompt alone.
        rag: with the text in the prompt.
        memory: with memories.
        share: what memory gains over nothing, as a part of what RAG gains, in nll; None where that
            gains nothing at all.
        share_interval: 95 %: of the ratio of resampled means.
        f1_difference: f1 of memory less that of RAG; None without answers.
        f1_difference_interval: 95 %.
        recall_at_1: share of questions whose document has the reference that is nearest to it.
        recall_at_1_interval: 95 %.
        recall_at_5: or one of the 5 nearest.
        recall_at_5_interval: 95 %.
        size: bytes of stored memories.
        running_text: None where it was not asked for, or no document is long enough.
    """

    framing: Framing
    nothing: ArmFigures
    rag: ArmFigures
    memory: ArmFigures
    share: float | None
    share_interval: Interval | None
    f1_difference: float | None
    f1_difference_interval: Interval | None
    recall_at_1: float
    recall_at_1_interval: Interval
    recall_at_5: float
    recall_at_5_interval: Interval
    size: Size
    running_text: RunningText | None

    def arm(self, name: str) -> ArmFigures:
        """The figures of `nothing`, `rag` or `memory`."""
        figures: ArmFigures = getattr(self, name)
        return figures

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            **{name: self.arm(name).to_json() for name in ARMS},
            "share": self.share,
            "share_interval": _listed(self.share_interval),
            "f1_difference": self.f1_difference,
            "f1_difference_interval": _listed(self.f1_difference_interval),
            "recall_at_1": self.recall_at_1,
            "recall_at_1_interval": _listed(self.recall_at_1_interval),
            "recall_at_5": self.recall_at_5,
            "recall_at_5_interval": _listed(self.recall_at_5_interval),
            "bytes_per_reference": self.size.reference,
            "bytes_per_128_tokens": self.size.tokens_128,
            "stored_as": list(self.size.codecs),
            "running_text": None if self.running_text is None else self.running_text.to_json(),
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
        }


def figures_of(
    framing: Framing,
    questions: Sequence[Question],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    ranks: Sequence[int],
    size: Size,
    text: RunningText | None,
    seed: int,
) -> FramingFigures:
    """The figures of one framing.

    Args:
        framing: which.
        questions: that were asked.
        rows: by arm, for each question an `Outcome` as JSON values.
        ranks: for each question the place of its document among what is retrieved; 0: none.
        size: of stored memories.
        text: running text.
        seed: of the bootstrap.
    """
    columns: dict[str, NDArray[np.float64]] = {}
    for arm in ARMS:
        for name, values in _columns(questions, rows[arm]).items():
            columns[f"{arm} {name}"] = np.array(values, np.float64)
    columns["recall 1"] = np.array([rank == 1 for rank in ranks], np.float64)
    columns["recall 5"] = np.array([rank > 0 for rank in ranks], np.float64)
    bootstrap = Bootstrap(columns, seed)
    share, share_interval = bootstrap.figure(
        lambda means: (
            (means["nothing nll"] - means["memory nll"]) / (means["nothing nll"] - means["rag nll"])
        )
    )
    difference, difference_interval = (
        bootstrap.figure(lambda means: means["memory f1"] - means["rag f1"])
        if "memory f1" in columns
        else (None, None)
    )
    first, first_interval = bootstrap.mean("recall 1")
    fifth, fifth_interval = bootstrap.mean("recall 5")
    arms = {arm: _arm(arm, columns, bootstrap) for arm in ARMS}
    return FramingFigures(
        framing=framing,
        **arms,
        share=share,
        share_interval=share_interval,
        f1_difference=difference,
        f1_difference_interval=difference_interval,
        recall_at_1=first,
        recall_at_1_interval=first_interval,
        recall_at_5=fifth,
        recall_at_5_interval=fifth_interval,
        size=size,
        running_text=text,
    )


def _columns(
    questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Numbers by question, of each figure that there is."""
    found = {
        "nll": [row["nll"] for row in rows],
        "tokens_right": [row["right"] for row in rows],
    }
    if rows[0]["answer"] is not None:
        pairs = [(row["answer"], one.answers) for row, one in zip(rows, questions, strict=True)]
        found["em"] = [exact_match(*pair) for pair in pairs]
        found["f1"] = [f1(*pair) for pair in pairs]
        found["seconds"] = [row["seconds"] for row in rows]
    return found


def _arm(arm: str, columns: Mapping[str, NDArray[np.float64]], bootstrap: Bootstrap) -> ArmFigures:
    found = {
        name: bootstrap.mean(f"{arm} {name}") for name in FIGURES if f"{arm} {name}" in columns
    }
    values = {name: found[name][0] if name in found else None for name in FIGURES}
    return ArmFigures(
        **values,  # type: ignore[arg-type]  # nll and tokens_right are always there
        intervals={name: interval for name, (_, interval) in found.items()},
    )


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
