"""A picture of an evaluation, by matplotlib: bars of NLL and F1 with their intervals."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from memdb import InvalidInputError, MissingPartError
from model_adapter.evaluation.report import ARMS, Evaluation

_SUFFIXES = (".png", ".svg")
_NAMES = {"nothing": "nothing", "rag": "RAG", "memory": "memory"}
_COLOURS = {"nothing": "#b0b0b0", "rag": "#4878a8", "memory": "#d08030"}
_TITLES = {"nll": "answer NLL (nats a token)", "f1": "F1"}


def require_picture(path: Path) -> None:
    """Whether `plot` can write this file, to be asked before the work.

    Raises:
        InvalidInputError: neither .png nor .svg, or in a folder that is not there.
        MissingPartError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise InvalidInputError(f"a picture ends with .png or .svg, not '{path.name}'")
    if not path.absolute().parent.is_dir():
        raise InvalidInputError(f"there is no folder '{path.parent}' for the picture '{path.name}'")
    _matplotlib()


def plot(evaluation: Evaluation, path: Path) -> None:
    """Bars of each arm's NLL and, if there are answers, F1, a row for each framing. The same
    figures give the same bytes.

    Args:
        evaluation: what to show.
        path: ends with .png or .svg.

    Raises:
        InvalidInputError: neither of these, or in a folder that is not there.
        MissingPartError: matplotlib is not installed.
    """
    require_picture(path)
    matplotlib, figures = _matplotlib()
    names = ["nll"] if evaluation.best.memory.f1 is None else ["nll", "f1"]
    rows = len(evaluation.framings)
    # Its own settings and no pyplot: nothing of it stays behind in the process.
    with matplotlib.rc_context({"svg.hashsalt": "memdb", "font.size": 9}):
        figure = figures.Figure(figsize=(3.4 * len(names), 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, len(names), squeeze=False)
        for row, framing in zip(panels, evaluation.framings, strict=True):
            for panel, name in zip(row, names, strict=True):
                for place, arm in enumerate(ARMS):
                    found = framing.arms[arm]
                    value, (low, high) = getattr(found, name), found.intervals[name]
                    panel.bar(place, value, 0.7, color=_COLOURS[arm])
                    middle, half = (low + high) / 2, (high - low) / 2
                    panel.errorbar(place, middle, half, color="black", capsize=3, fmt="none")
                panel.set_xticks(range(len(ARMS)), [_NAMES[arm] for arm in ARMS])
                panel.set_ylabel(_TITLES[name])
                panel.set_title(f"{framing.framing} framing")
                panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{Path(evaluation.model).name}, {evaluation.questions} questions, references "
            f"{evaluation.references}, budget {evaluation.budget}"
        )
        svg = path.suffix.lower() == ".svg"
        figure.savefig(path, dpi=150, metadata={"Date": None} if svg else None)


def _matplotlib() -> tuple[Any, Any]:
    try:
        return importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingPartError(
            "a picture needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.8'"
        ) from error
