"""How each engine grows with the number of references, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_run import CHROMAS, LANCE, LIMIT, MEMDB, Row, Size
from picture import drawing, save

_COLOURS = {
    MEMDB: "#0072b2",
    LIMIT: "#7f7f7f",
    LANCE: "#d55e00",
    CHROMAS[0]: "#009e73",
    CHROMAS[1]: "#56b4e9",
}


def plot(sizes: list[Size], path: Path) -> None:
    """Draw it as the file's suffix says; without matplotlib, say so."""
    pyplot = drawing()
    if pyplot is None:
        return
    figure, ((retrieve, insert), (opened, disk)) = pyplot.subplots(2, 2, figsize=(10, 7))
    _engines(retrieve, "retrieve 5 memories, p50, ms", sizes, "p50")
    _engines(insert, "bulk insert, references/s", sizes, "rate")
    _engines(disk, "bytes on disk / bytes of payload", sizes, "disk")
    disk.set_yscale("linear")
    disk.set_ylim(bottom=0)
    numbers = [size.references for size in sizes]
    for name, title, line in (
        ("open", "open to first answer, s", "-o"),
        ("anonymous_gib", "anonymous memory, GiB", "--s"),
    ):
        opened.plot(
            numbers, [size.opened[name] for size in sizes], line, color=_COLOURS[MEMDB], label=title
        )
    _axes(opened, "memdb: opening")
    save(pyplot, figure, path)


def _engines(axes: Any, title: str, sizes: list[Size], value: str) -> None:
    for name, colour in _COLOURS.items():
        # What did not finish at a size stands where it stopped, once.
        points: dict[int, float] = {}
        for size in sizes:
            row: Row | None = size.rows.get(name)
            if row is not None and getattr(row, value) is not None:
                points[row.references] = getattr(row, value)
        if points:
            axes.plot(list(points), list(points.values()), "-o", color=colour, label=name)
    _axes(axes, title)


def _axes(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("references")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
