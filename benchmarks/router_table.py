"""The table of benchmarks/router.py: each way of finding references beside the embedder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from model_adapter.evaluation import Bootstrap
from model_adapter.evaluation.bootstrap import Means

#: For each question 1 or 0, by measure.
Found = Mapping[str, NDArray[np.float64]]

_MEASURES = {"recall_at_5": "any @5", "recall_all_at_5": "all @5"}


def printed(
    title: str, ways: Mapping[str, Found], base: str, sizes: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Print the table; its figures come back by way and name.

    Args:
        title: of the table.
        ways: of finding, the questions in one order.
        base: the way that all are compared with.
        sizes: bytes for each reference.
    """
    table = Table(title=title)
    table.add_column("how references are found")
    figures: dict[str, dict[str, Any]] = {name: {"bytes": sizes.get(name)} for name in ways}
    cells: dict[str, list[str]] = {name: [] for name in ways}
    # Where each question has one document, both measures are the same.
    same = all(len({one.tobytes() for one in found.values()}) == 1 for found in ways.values())
    for measure, heading in _MEASURES.items():
        drawn = Bootstrap({name: found[measure] for name, found in ways.items()}, seed=0)
        if not (same and measure == "recall_all_at_5"):
            table.add_column(heading.removeprefix("any ") if same else heading)
            table.add_column("- embedder")
        for name in ways:
            mean, ends = drawn.mean(name)
            value, interval = drawn.figure(_difference(name, base))
            assert interval is not None
            figures[name][measure] = [mean, ends]
            figures[name][f"{measure} - {base}"] = [value, interval]
            if not (same and measure == "recall_all_at_5"):
                said = f"{value:+.3f} ({interval[0]:+.3f}, {interval[1]:+.3f})"
                cells[name] += [f"{mean:.3f}", "" if name == base else said]
    table.add_column("bytes / reference")
    for name in ways:
        size = sizes.get(name)
        table.add_row(name, *cells[name], "" if size is None else f"{size:,.0f}")
    Console(width=140).print(table)
    return figures


def _difference(name: str, base: str) -> Callable[[Means], NDArray[np.float64]]:
    return lambda means: means[name] - means[base]
