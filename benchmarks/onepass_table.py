"""The table of benchmarks/onepass.py: each selection beside contribution, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onepass_arms import CONTRIBUTION, SEEN
from rich.console import Console
from rich.table import Table

from model_adapter import Writer
from model_adapter.evaluation import Bootstrap
from model_adapter.evaluation.bootstrap import Means
from model_adapter.models import observing
from model_adapter.selections import Selection

_TIMED, _LENGTH = 8, 120  # references, and tokens of each
_ROUNDS = 2


def timed(writer: Writer, selections: Mapping[str, Selection]) -> dict[str, float]:
    """Processor seconds to read a reference (`reading`: one pass, keys and values kept), and to
    write it by each selection; the least of some rounds."""
    model, batch = writer.model, writer.batch
    tokens = model.tokens("The lighthouse stands where the river meets the sea, they say. " * 40)
    references = [tokens[place : place + _LENGTH] for place in range(_TIMED)]
    prefix = model.prefix(writer.shape.prefix, "choose")

    def reading(part: list[list[int]]) -> None:
        with torch.no_grad():
            observing.encode(model.base, prefix, part, writer.shape.layers)

    def writing(selection: Selection) -> Callable[[list[list[int]]], object]:
        other = Writer(model, framing=writer.shape.framing)
        other.selection = selection
        return other._write

    ways = {"reading": reading, CONTRIBUTION: writing(writer.selection)}
    ways |= {name: writing(selection) for name, selection in selections.items()}
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(_ROUNDS + 1):  # the first warms up
        for name, way in ways.items():
            began = time.process_time()
            for start in range(0, len(references), batch):
                way(references[start : start + batch])
            if turn:
                best[name] = min(best[name], (time.process_time() - began) / len(references))
    return best


def printed(
    title: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Print the table; its figures come back.

    Args:
        title: of the table.
        rows: of each way, the questions in one order.
        seconds: of `timed`.
    """
    table = Table(title=title)
    for column in ("selection", "captured", "seconds", "speed / reading"):
        table.add_column(column)
    for seen in SEEN:
        for column in ("NLL", "share of RAG's gain", "less contribution's"):
            table.add_column(f"{seen}: {column}")
    columns = {name: np.array([row["nll"] for row in own]) for name, own in rows.items()}
    drawn = Bootstrap(columns, seed=0)
    figures: dict[str, Any] = {"seconds": dict(seconds)}
    for name in [name for name in seconds if name != "reading"]:
        own = rows[f"{list(SEEN)[-1]}: {name}"]
        captured = float(np.mean([row["captured"] for row in own]))
        speed = seconds["reading"] / seconds[name]
        cells = [name, f"{captured:.3f}", f"{seconds[name]:.3f}", f"{speed:.2f}"]
        figures[name] = {"captured": captured, "speed": speed}
        for seen in SEEN:
            nll, _ = drawn.mean(f"{seen}: {name}")
            share = drawn.figure(_share(seen, name))
            less = drawn.figure(_less(seen, name))
            figures[name][seen] = {"nll": nll, "share": share, "less": less}
            cells += [f"{nll:.3f}", _said(*share), "" if name == CONTRIBUTION else _said(*less)]
        table.add_row(*cells)
    for name in ("nothing", *(f"{seen}: RAG" for seen in SEEN)):
        figures[name] = drawn.mean(name)[0]
        table.add_row(f"{name}: NLL {figures[name]:.3f}")
    Console(width=200).print(table)
    print(f"reading: {seconds['reading']:.3f} s")
    return figures


def _said(value: float | None, ends: tuple[float, float] | None) -> str:
    return "" if value is None or ends is None else f"{value:.2f} ({ends[0]:.2f}, {ends[1]:.2f})"


def _share(seen: str, name: str) -> Callable[[Means], NDArray[np.float64]]:
    def of(means: Means) -> NDArray[np.float64]:
        gain = means["nothing"] - means[f"{seen}: RAG"]
        return (means["nothing"] - means[f"{seen}: {name}"]) / gain

    return of


def _less(seen: str, name: str) -> Callable[[Means], NDArray[np.float64]]:
    mine, base = _share(seen, name), _share(seen, CONTRIBUTION)
    return lambda means: mine(means) - base(means)
