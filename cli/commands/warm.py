"""`memdb warm`: write the memories of cold references."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import counted, db_option, example, goes_on, model_option, open_database
from cli.progress import progress_bar


@click.command(
    short_help="Write the memories that are not there yet.",
    epilog=example("memdb warm --all", "memdb warm --top 1000", "memdb warm library/asyncio"),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@db_option
@click.option("--all", "everything", is_flag=True, help="All of them; so without other options.")
@click.option(
    "--top",
    type=click.IntRange(1),
    help="Only so many references: those that were retrieved most often.",
)
@model_option
def warm(
    ids: tuple[str, ...], path: Path, everything: bool, top: int | None, model: str | None
) -> None:
    """Write the memories that are not there yet, of all documents or of those named.

    May be interrupted; run again, it goes on.
    """
    if everything and (ids or top):
        raise click.UsageError("--all goes with neither ids nor --top")
    goes_on()
    with open_database(path, model) as database, progress_bar() as progress:
        written = database.warm(ids or None, top=top, progress=progress)
    click.echo(f"{counted(written, 'memory', 'memories')} written")
