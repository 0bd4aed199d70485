"""What codecs cost and what they take, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codec_run import Row
from picture import drawing, save

_COLOURS = {
    "exact": "#7f7f7f",
    "int8": "#009e73",
    "klt5": "#56b4e9",
    "klt8": "#0072b2",
    "klt11": "#cc79a7",
    "paper": "#d55e00",
}
_OTHER = "#444444"


def plot(
    rows: Sequence[Row], frontier: Sequence[Row], levels: dict[str, float], title: str, path: Path
) -> None:
    """Draw it as the file's suffix says; without matplotlib, say so.

    Args:
        rows: at one budget.
        frontier: at several.
        levels: NLL without memories, by name.
        title: model, framing and questions.
        path: where.
    """
    pyplot = drawing()
    if pyplot is None:
        return
    figure, (loss, sizes) = pyplot.subplots(1, 2, figsize=(11, 4.8))
    figure.suptitle(title, fontsize=10)
    _losses(loss, rows)
    _frontier(sizes, frontier, levels)
    save(pyplot, figure, path)


def _losses(axes: Any, rows: Sequence[Row]) -> None:
    axes.axhline(0, color=_OTHER, linewidth=0.8)
    for i, row in enumerate(rows):
        colour = _COLOURS.get(row.name, _OTHER)
        at, wide = (
            100 * row.change,
            [[100 * (row.change - row.low)], [100 * (row.high - row.change)]],
        )
        axes.errorbar(row.bytes_per_vector, at, yerr=wide, fmt="o", color=colour, capsize=3)
        axes.annotate(
            row.name,
            (row.bytes_per_vector, at),
            textcoords="offset points",
            xytext=(5, 5 if i % 2 else -11),
            fontsize=8,
        )
    axes.margins(x=0.15)
    _axes(axes, "bytes per vector", "change of answer NLL against exact, %")
    ticks = [8, 16, 32, 64, 128, 256]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(f"what a codec loses, {rows[0].budget} pairs per reference")


def _frontier(axes: Any, rows: Sequence[Row], levels: dict[str, float]) -> None:
    for name in dict.fromkeys(row.name for row in rows):
        own = sorted((row.reference_bytes / 1024, row.nll) for row in rows if row.name == name)
        axes.plot(*zip(*own, strict=True), "-o", color=_COLOURS.get(name, _OTHER), label=name)
    for (name, level), line in zip(levels.items(), ("--", ":"), strict=True):
        axes.axhline(level, color=_OTHER, linestyle=line, label=name)
    _axes(axes, "KiB per reference of 128 tokens", "answer NLL")
    ticks = [4, 8, 16, 32, 64, 128, 256, 512]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.set_title("bytes against quality, by budget")


def _axes(axes: Any, across: str, up: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
