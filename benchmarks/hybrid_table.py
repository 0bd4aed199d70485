"""The table of benchmarks/hybrid.py: each way beside memory alone and beside RAG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from model_adapter.evaluation import Bootstrap
from model_adapter.evaluation.bootstrap import Means


@dataclass(frozen=True)
class Row:
    """One question, read in one way.

    Attributes:
        right: 1 if its greedy answer holds an accepted one, else 0.
        nll: of the first accepted answer, the mean over its tokens, in nats.
        rest: likewise without the first token; None: there is no other.
        seconds: from the references to the first token.
        answer: what the model says.
    """

    right: float
    nll: float
    rest: float | None
    seconds: float
    answer: str

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def printed(
    title: str, rows: Mapping[str, Sequence[Row]], memories: str, rag: str
) -> dict[str, dict[str, Any]]:
    """Print the table; its figures come back by way and name.

    Args:
        title: of the table.
        rows: of each way, the questions in one order.
        memories: the way that the others are compared with.
        rag: likewise; seconds, too.
    """
    table = Table(title=title)
    table.add_column("how references are read")
    for name in ("right", "NLL", "NLL, rest"):
        table.add_column(name)
        table.add_column("- memories")
        table.add_column("- RAG")
    table.add_column("seconds")
    table.add_column("/ RAG")
    measures: dict[str, Callable[[Row], float | None]] = {
        "right": lambda row: row.right,
        "nll": lambda row: row.nll,
        "rest": lambda row: row.rest,
    }
    figures: dict[str, dict[str, Any]] = {name: {} for name in rows}
    cells: dict[str, list[str]] = {name: [] for name in rows}
    for measure, of in measures.items():
        columns = {
            name: np.array([value for row in own if (value := of(row)) is not None])
            for name, own in rows.items()
        }
        drawn = Bootstrap(columns, seed=0)
        for name in rows:
            mean, interval = drawn.mean(name)
            figures[name][measure] = [mean, interval]
            cells[name].append(f"{mean:.2f} ({interval[0]:.2f}, {interval[1]:.2f})")
            for other, base in (("memories", memories), ("rag", rag)):
                value, ends = drawn.figure(_difference(name, base))
                figures[name][f"{measure} - {other}"] = [value, ends]
                assert ends is not None
                same = name == base
                cells[name].append("" if same else f"{value:+.2f} ({ends[0]:+.2f}, {ends[1]:+.2f})")
    usual = float(np.median([row.seconds for row in rows[rag]]))
    for name, own in rows.items():
        seconds = float(np.median([row.seconds for row in own]))
        figures[name]["seconds"] = seconds
        figures[name]["seconds / rag"] = seconds / usual
        table.add_row(name, *cells[name], f"{seconds:.3f}", f"{seconds / usual:.2f}")
    Console(width=230).print(table)
    return figures


def _difference(name: str, base: str) -> Callable[[Means], NDArray[np.float64]]:
    return lambda means: means[name] - means[base]
