"""The table of benchmarks/hybrid.py: each way beside memory alone and beside RAG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from model_adapter.evaluation import Bootstrap
from model_adapter.evaluation.bootstrap import Means

#: A question, read in one way: `right` (None without an answer), `nll`, `recall`, and `rest` (None
#: where the answer has one token).
Row = Mapping[str, Any]

_MEASURES = {"right": "right", "nll": "NLL", "rest": "NLL, rest", "recall": "recall"}


def printed(
    title: str,
    rows: Mapping[str, Sequence[Row]],
    seconds: Mapping[str, Sequence[float]],
    memories: str,
    rag: str,
) -> dict[str, dict[str, Any]]:
    """Print the table; its figures come back by way and name.

    Args:
        title: of the table.
        rows: of each way, the questions in one order.
        seconds: of each way, to the first token; none where it was not timed.
        memories: the way that the others are compared with.
        rag: likewise; seconds, too.
    """
    table = Table(title=title)
    table.add_column("how references are read")
    figures: dict[str, dict[str, Any]] = {name: {} for name in rows}
    cells: dict[str, list[str]] = {name: [] for name in rows}
    for measure, heading in _MEASURES.items():
        columns = {
            name: np.array([row[measure] for row in own if row[measure] is not None])
            for name, own in rows.items()
        }
        if not all(map(len, columns.values())):
            continue  # no answers were asked for
        for column in (heading, "- memories", "- RAG"):
            table.add_column(column)
        drawn = Bootstrap(columns, seed=0)
        for name in rows:
            mean, ends = drawn.mean(name)
            figures[name][measure] = [mean, ends]
            cells[name].append(f"{mean:.2f}")
            for other, base in (("memories", memories), ("rag", rag)):
                value, interval = drawn.figure(_difference(name, base))
                figures[name][f"{measure} - {other}"] = [value, interval]
                assert interval is not None
                low, high = interval
                said = f"{value:+.2f} ({low:+.2f}, {high:+.2f})"
                cells[name].append("" if name == base else said)
    if any(seconds.values()):
        table.add_column("seconds")
        table.add_column("/ RAG")
    for name in rows:
        if seconds[name]:
            own, usual = float(np.median(seconds[name])), float(np.median(seconds[rag]))
            figures[name] |= {"seconds": own, "seconds / rag": own / usual}
            cells[name] += [f"{own:.2f}", f"{own / usual:.2f}"]
        table.add_row(name, *cells[name])
    Console(width=200).print(table)
    return figures


def _difference(name: str, base: str) -> Callable[[Means], NDArray[np.float64]]:
    return lambda means: means[name] - means[base]
