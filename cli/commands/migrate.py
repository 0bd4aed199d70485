"""`memdb migrate`: bring a database of an older release up to date."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import busy_timeout_option, example, whole_db_option
from cli.progress import progress_bar
from memdb import migrate as migrate_database


@click.command(
    epilog=example("memdb migrate --db old.memdb"),
)
@whole_db_option
@busy_timeout_option
def migrate(path: Path, busy_timeout: float) -> None:
    """Bring a database of an older format version up to date. It stays what it was until that is
    done."""
    with progress_bar() as progress:
        before, after = migrate_database(path, busy_timeout=busy_timeout, progress=progress)
    if before == after:
        click.echo(f"it has format version {after} already")
    else:
        click.echo(f"format version {before} before, {after} now")
