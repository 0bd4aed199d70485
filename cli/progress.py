"""Progress of long work: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from memdb import Progress

#: Seconds back that the time left goes by: a large model takes minutes for a batch of references.
_LOOK_BACK = 600
_MB = 1_000_000

#: Stages that count bytes.
_BYTES = ("downloading",)
#: Stages that count references; others count documents, records or steps.
_REFERENCES = ("embedding", "writing memories", "loading", "building the index", "indexing words")


class _Done(MofNCompleteColumn):
    """How many of how many; of bytes, in MB."""

    def render(self, task: Task) -> Text:
        if task.description not in _BYTES:
            return super().render(task)
        return Text(f"{task.completed / _MB:,.1f}/{(task.total or 0) / _MB:,.0f} MB")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        if not seconds or not task.completed:
            return Text("")
        rate = task.completed / seconds
        if task.description in _BYTES:
            return Text(f"{rate / _MB:,.1f} MB/s")
        unit = " references" if task.description in _REFERENCES else ""
        return Text(f"{rate:,.1f}{unit}/s" if rate < 100 else f"{rate:,.0f}{unit}/s")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a `memdb.Progress` that draws a bar for each stage, with its rate and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Done(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with RichProgress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=_LOOK_BACK,
    ) as bars:
        stages: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
            bars.update(stages[stage], completed=done, total=total or None)

        yield progress
