"""`memdb warm`: write the memories of cold references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import (
    adapter,
    adapter_option,
    busy_timeout_option,
    counted,
    db_option,
    example,
    goes_on,
    model_option,
    notify,
)
from cli.loading import loading
from cli.progress import progress_bar

workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that write memories. Each loads the model; they share cores and GPUs.",
)


@click.command(
    epilog=example(
        "memdb warm --all --workers 4", "memdb warm --top 1000", "memdb warm library/asyncio"
    ),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@db_option
@click.option("--all", "everything", is_flag=True, help="All of them; so without other options.")
@click.option(
    "--top",
    type=click.IntRange(1),
    help="Only so many references: those that were retrieved most often.",
)
@workers_option
@busy_timeout_option
@model_option
@adapter_option
def warm(
    ids: tuple[str, ...],
    path: Path,
    everything: bool,
    top: int | None,
    workers: int,
    busy_timeout: float,
    model: str | None,
    adapter_name: str | None,
) -> None:
    """Write the memories that are not there yet, of all documents or of those named.

    May be interrupted; run again, it goes on.
    """
    if everything and (ids or top):
        raise click.UsageError("--all goes with neither ids nor --top")
    goes_on()
    with progress_bar() as progress:
        written = warm_database(
            path,
            workers=workers,
            ids=ids or None,
            top=top,
            model=model,
            adapter=adapter_name,
            busy_timeout=busy_timeout,
            progress=progress,
        )
    click.echo(f"{counted(written, 'memory', 'memories')} written")


def warm_database(path: Path, **options: Any) -> int:
    """`model_adapter.warming.warm_database`, loaded when it is needed."""
    adapter()
    from model_adapter.warming import warm_database

    return warm_database(path, **loading(), **options, notify=notify)
