"""The picture of a run: its losses, and what memories are worth on held-out passages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdb import InvalidInputError, MissingPartError
from model_adapter.files.json_lines import JsonLines

_SMOOTH = 0.98  # of the mean that runs along
_FORMS = (".svg", ".png", ".pdf")


def require_drawing(file: Path) -> Any:
    """matplotlib.pyplot, if a picture can be drawn into a file.

    Raises:
        InvalidInputError: the file's suffix is no form of picture.
        MissingPartError: matplotlib is not installed.
    """
    if file.suffix not in _FORMS:
        raise InvalidInputError(f"a picture ends in {', '.join(_FORMS)}, not as '{file.name}'")
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingPartError(
            "a picture needs matplotlib: pip install 'explicit-memdb[adapter]'"
        ) from error
    matplotlib.rcParams["svg.hashsalt"] = "memdb"  # the same picture has the same bytes
    return pyplot


def draw_log(log: Path, file: Path) -> None:
    """Draw the log of a run; nothing, if it has no steps yet.

    Args:
        log: `log.jsonl` in the run's folder.
        file: where to; its suffix says in which form.

    Raises:
        InvalidInputError: the log is damaged, or the picture cannot be written.
        MissingPartError: matplotlib is not installed.
    """
    lines = JsonLines(log).read()
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return
    pyplot = require_drawing(file)
    measured = [line for line in lines if line.get("measured")]
    bounds = next((line for line in lines if line.get("bounds")), None)
    both = bool(measured and bounds)
    figure, axes = pyplot.subplots(1, 2 if both else 1, figsize=(10 if both else 6, 4))
    left = axes[0] if both else axes
    at = [line["step"] for line in steps]
    for name, colour in (("kl", "tab:blue"), ("nll", "tab:orange")):
        values = [line[name] for line in steps]
        left.plot(at, values, color=colour, alpha=0.15, linewidth=0.5)
        left.plot(at, _smooth(values), color=colour, label=name)
    left.set(xlabel="step", ylabel="nats per token", title="training, running mean")
    left.legend()
    if both and bounds is not None:
        right = axes[1]
        places = [0, *(line["step"] for line in measured)]
        right.plot(places, [bounds["untrained"], *(m["nll"] for m in measured)], "o-", ms=3)
        for name, style in (("nothing", ":"), ("text", "--")):
            right.axhline(bounds[name], color="gray", linestyle=style, label=name)
        right.set(xlabel="step", ylabel="answer NLL", title="held-out passages, memory")
        right.legend()
    figure.tight_layout()
    try:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot draw '{file}': {error}") from error
    finally:
        pyplot.close(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """A mean that runs along, without a bias towards its beginning."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTH * total + (1 - _SMOOTH) * value
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        found.append(total / weight)
    return found
