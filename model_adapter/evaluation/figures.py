"""Figures of a set of questions: of each arm, and of arms against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_adapter.evaluation.answers import exact_match, f1, holds
from model_adapter.evaluation.bootstrap import Bootstrap, Interval, Means
from model_adapter.evaluation.questions import Question

#: The figures of an arm.
FIGURES = (
    "nll",
    "nll_first",
    "nll_rest",
    "tokens_right",
    "ranked_first",
    "answers_right",
    "em",
    "f1",
    "seconds",
)
#: Figures that some questions have and others have not: means over those that do.
_PARTLY = ("nll_rest", "ranked_first")

#: A figure and its 95 % interval; None: it has no value.
Figure = tuple[float | None, Interval | None]
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class ArmFigures:
    """How well questions are answered in one arm; means over questions. None: not measured.

    Attributes:
        nll: negative log-likelihood per token of the first accepted answer, in nats; of each
            question the mean over its tokens.
        nll_first: of its first token.
        nll_rest: of the tokens behind it; the mean over answers that have more than one.
        tokens_right: share of these tokens that are the likeliest, 0 to 1.
        ranked_first: share of questions whose answer has a lower nll than those of seven others.
        answers_right: share of answers in which an accepted one stands, word for word (SQuAD's
            normalisation).
        em: share of answers that are an accepted one, likewise.
        f1: words that answers share with accepted ones, 0 to 1.
        seconds: a question's.
        intervals: by the figure's name, 95 %, by paired bootstrap over questions.
    """

    nll: float
    nll_first: float
    nll_rest: float | None
    tokens_right: float
    ranked_first: float | None
    answers_right: float | None
    em: float | None
    f1: float | None
    seconds: float | None
    intervals: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Figures, and `<name>_interval` for each."""
        return listed({name: (getattr(self, name), self.intervals.get(name)) for name in FIGURES})


@dataclass(frozen=True)
class Compared:
    """The figures of a set of questions.

    Attributes:
        n: how many questions.
        arms: by name: `nothing`, `rag`, `memory`, and those that were measured of `rag_1` (the
            nearest reference alone as text), `rag_near` (of the five those that memory reads, the
            others being too far behind), `prefix` (behind the memories' prefix without any) and
            `other` (with memories of another article).
        compared: by name, see `COMPARED`.
    """

    n: int
    arms: Mapping[str, ArmFigures]
    compared: Mapping[str, Figure]

    @property
    def nothing(self) -> ArmFigures:
        """With the prompt alone."""
        return self.arms["nothing"]

    @property
    def rag(self) -> ArmFigures:
        """With the text in the prompt."""
        return self.arms["rag"]

    @property
    def memory(self) -> ArmFigures:
        """With memories."""
        return self.arms["memory"]

    @property
    def share(self) -> float | None:
        """What memory gains over nothing, as a part of what RAG gains, in nll; None where that
        gains nothing at all."""
        return self.compared["share"][0]

    @property
    def share_interval(self) -> Interval | None:
        """95 %: of the ratio of resampled means."""
        return self.compared["share"][1]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        arms = {name: arm.to_json() for name, arm in self.arms.items()}
        return {**arms, **listed(self.compared)}


def _share(arm: str) -> Callable[[Means], NDArray[np.float64]]:
    return lambda m: (m["nothing nll"] - m[f"{arm} nll"]) / (m["nothing nll"] - m["rag nll"])


def _better(m: Means) -> NDArray[np.float64]:
    arms = ("rag answers_right", "rag_1 answers_right", "rag_near answers_right")
    return np.max([m[arm] for arm in arms], axis=0)


#: Figures of arms against each other, from means over the same questions. `share` is what memory,
#: or a control, gains over nothing as a part of what RAG gains. `better` is the best of RAG with
#: five references, with one, and with those of the five that are read as memories.
COMPARED: Mapping[str, Callable[[Means], NDArray[np.float64]]] = {
    "share": _share("memory"),
    "share_prefix": _share("prefix"),
    "share_other": _share("other"),
    "rag_gain": lambda m: m["nothing nll"] - m["rag nll"],
    "nll_difference": lambda m: m["memory nll"] - m["rag nll"],
    "f1_difference": lambda m: m["memory f1"] - m["rag f1"],
    "answers_right_difference": lambda m: m["memory answers_right"] - m["rag answers_right"],
    "answers_right_ratio": lambda m: m["memory answers_right"] / m["rag answers_right"],
    "answers_right_better_difference": lambda m: m["memory answers_right"] - _better(m),
    "answers_right_better_ratio": lambda m: m["memory answers_right"] / _better(m),
}


def compared(
    questions: Sequence[Question], rows: Mapping[str, Sequence[_Row]], seed: int
) -> Compared:
    """The figures of questions.

    Args:
        questions: at least one.
        rows: by arm, for each question an `Outcome` as JSON values.
        seed: of the bootstrap.
    """
    columns: dict[str, NDArray[np.float64]] = {}
    for arm, outcomes in rows.items():
        for name, values in _columns(questions, outcomes).items():
            columns[f"{arm} {name}"] = np.array(values, np.float64)
    bootstrap = Bootstrap(columns, seed)
    return Compared(
        len(questions),
        {arm: _arm(arm, bootstrap) for arm in rows},
        {name: _figure(bootstrap, of) for name, of in COMPARED.items()},
    )


def listed(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Figures as JSON values: each, and `<name>_interval` behind it."""
    values: dict[str, Any] = {}
    for name, (value, interval) in figures.items():
        values[name] = value
        values[f"{name}_interval"] = None if interval is None else list(interval)
    return values


def _columns(questions: Sequence[Question], rows: Sequence[_Row]) -> dict[str, list[float]]:
    """Numbers by question, of each figure that there is."""
    found = {
        "nll": [row["nll"] for row in rows],
        "nll_first": [row["first"] for row in rows],
        "tokens_right": [row["right"] for row in rows],
    }
    for name, key in zip(_PARTLY, ("rest", "ranked"), strict=True):
        # Two columns, so that a draw takes the mean over those of its questions that have it.
        found[name] = [row[key] or 0 for row in rows]
        found[f"{name} n"] = [row[key] is not None for row in rows]
    if rows[0]["answer"] is not None:
        pairs = [(row["answer"], one.answers) for row, one in zip(rows, questions, strict=True)]
        found["answers_right"] = [holds(*pair) for pair in pairs]
        found["em"] = [exact_match(*pair) for pair in pairs]
        found["f1"] = [f1(*pair) for pair in pairs]
        found["seconds"] = [row["seconds"] for row in rows]
    return found


def _arm(arm: str, bootstrap: Bootstrap) -> ArmFigures:
    def mean_of(name: str) -> Callable[[Means], NDArray[np.float64]]:
        if name in _PARTLY:
            return lambda m: m[f"{arm} {name}"] / m[f"{arm} {name} n"]
        return lambda m: m[f"{arm} {name}"]

    found = {name: _figure(bootstrap, mean_of(name)) for name in FIGURES}
    return ArmFigures(
        **{name: value for name, (value, _) in found.items()},  # type: ignore[arg-type]
        intervals={name: interval for name, (_, interval) in found.items() if interval is not None},
    )


def _figure(bootstrap: Bootstrap, of: Callable[[Means], NDArray[np.float64]]) -> Figure:
    try:
        return bootstrap.figure(of)
    except KeyError:  # of an arm or a figure that was not measured
        return None, None
