"""The table of benchmarks/order.py: each order beside the default, and gates between the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from order_places import FAR, LAST, SHARED
from rich.console import Console
from rich.table import Table

from model_adapter.evaluation import Bootstrap

GATES = (0.05, 0.1, 0.2)  # of cosine similarity


def printed(title: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Print the table, gates and parts included; its figures come back."""
    base = rows[SHARED.name]
    ways = dict(rows)
    for gate in GATES if LAST.name in rows else ():
        ways[f"the best last where it is {gate:g} before the second"] = [
            one if one["gap"] > gate else other
            for one, other in zip(rows[LAST.name], base, strict=True)
        ]
    columns: dict[str, tuple[str, list[int]]] = {"NLL": ("nll", list(range(len(base))))}
    if base[0]["best"] is not None:
        for name, is_best in (("NLL, best is right", True), ("NLL, it is not", False)):
            chosen = [i for i, row in enumerate(base) if row["best"] == is_best]
            columns[f"{name} ({len(chosen)})"] = ("nll", chosen)
    if base[0]["right"] is not None:
        columns["right"] = ("right", list(range(len(base))))
    table = Table(title=title)
    table.add_column("where memories stand")
    table.add_column("serial in")
    for name in columns:
        table.add_column(name)
        table.add_column("less the default")
    figures: dict[str, Any] = {}
    for name, own in ways.items():
        cells = []
        figures[name] = {}
        for column, (measure, chosen) in columns.items():
            if len(chosen) < 2:
                cells += ["", ""]
                continue
            drawn = Bootstrap(
                {
                    "own": np.array([own[i][measure] for i in chosen], np.float64),
                    "base": np.array([base[i][measure] for i in chosen], np.float64),
                },
                seed=0,
            )
            mean, _ = drawn.mean("own")
            relative = measure == "nll"
            change: Callable[[Any], Any] = (
                (lambda means: means["own"] / means["base"] - 1)
                if relative
                else (lambda means: means["own"] - means["base"])
            )
            value, ends = drawn.figure(change)
            assert ends is not None
            style = "+.1%" if relative else "+.2f"
            said = f"{value:{style}} ({ends[0]:{style}}, {ends[1]:{style}})"
            cells += [f"{mean:.3f}" if relative else f"{mean:.2f}"]
            cells += ["" if name == SHARED.name else said]
            figures[name][column] = [mean, value, ends]
        serial = sum(
            name not in (SHARED.name, FAR.name) and (name in rows or one is rows[LAST.name][i])
            for i, one in enumerate(own)
        )
        table.add_row(name, str(serial), *cells)
    Console(width=220).print(table)
    return figures
