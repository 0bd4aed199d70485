"""Pictures of benchmarks, by matplotlib where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click


def drawing() -> Any:
    """matplotlib.pyplot, for files; None, and a word on it, where it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        click.echo("matplotlib is not installed, no picture: pip install -e '.[bench]'", err=True)
        return None
    matplotlib.rcParams["svg.hashsalt"] = "memdb"  # the same picture has the same bytes
    return pyplot


def save(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure as the file's suffix says, and let it go."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
