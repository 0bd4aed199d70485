"""`memdb warm`: write the memories of cold references."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import counted, db_option, example, goes_on, model_option, open_database
from cli.progress import progress_bar


@click.command(
    short_help="Write the memories that are not there yet.",
    epilog=example("memdb warm", "memdb warm library/asyncio library/json"),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@db_option
@model_option
def warm(ids: tuple[str, ...], path: Path, model: str | None) -> None:
    """Write the memories that are not there yet, of all documents or of those named.

    May be interrupted; run again, it goes on.
    """
    goes_on()
    with open_database(path, model) as database, progress_bar() as progress:
        written = database.warm(ids or None, progress=progress)
    click.echo(f"{counted(written, 'memory', 'memories')} written")
