"""`memdb compact`: give back the space of what was deleted, and make sure that it is gone."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import busy_timeout_option, example, whole_db_option
from cli.progress import progress_bar
from memdb import compact as compact_database


@click.command(
    epilog=example("memdb compact"),
)
@whole_db_option
@busy_timeout_option
def compact(path: Path, busy_timeout: float) -> None:
    """Write the database anew without what was deleted or replaced, of which nothing is left in its
    folder afterwards (backups are copies of their own).

    Readers go on meanwhile, writers wait. It takes as much free disk space as the new one needs.
    """
    with progress_bar() as progress:
        before, after = compact_database(path, busy_timeout=busy_timeout, progress=progress)
    click.echo(f"{before:,} bytes before, {after:,} bytes now")
