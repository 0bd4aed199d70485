"""`memdb backup` and `memdb restore`: a copy of the whole database, and back."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import busy_timeout_option, example, whole_db_option
from cli.progress import progress_bar
from memdb import backup as backup_database
from memdb import restore as restore_database


@click.command(
    epilog=example("memdb backup backups/monday.memdb"),
)
@click.argument("to", type=click.Path(path_type=Path))
@whole_db_option
@busy_timeout_option
def backup(to: Path, path: Path, busy_timeout: float) -> None:
    """Write a copy of the database, as it is at this moment, to the folder TO, which is missing or
    empty. The copy is a database itself."""
    with progress_bar() as progress:
        size = backup_database(path, to, busy_timeout=busy_timeout, progress=progress)
    click.echo(f"{size:,} bytes written to '{to}'")


@click.command(
    epilog=example("memdb restore backups/monday.memdb --db docs.memdb --yes"),
)
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path))
@whole_db_option
@click.option("--yes", is_flag=True, help="Do not ask before a database is replaced.")
@busy_timeout_option
def restore(source: Path, path: Path, yes: bool, busy_timeout: float) -> None:
    """Put the content of BACKUP, which is verified first, in the place of the database, or make one
    of it. What the database held is gone then."""
    if (path / "CURRENT").exists() and not yes:
        click.confirm(f"Replace what is in '{path}'?", abort=True)
    with progress_bar() as progress:
        restore_database(source, path, busy_timeout=busy_timeout, progress=progress)
    click.echo(f"'{path}' is what '{source}' is")
