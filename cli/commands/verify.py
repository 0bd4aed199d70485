"""`memdb verify`: is a database whole?"""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    busy_timeout_option,
    counted,
    example,
    json_option,
    print_json,
    whole_db_option,
)
from cli.progress import progress_bar
from memdb import verify as verify_database


@click.command(
    epilog=example("memdb verify", "memdb verify --db docs.memdb --json"),
)
@whole_db_option
@busy_timeout_option
@json_option
def verify(path: Path, busy_timeout: float, as_json: bool) -> None:
    """Walk all pages and records and say what is wrong with which; nothing is changed.

    Exit code 0 if nothing is, 1 if something is, 2 if there is no database.
    """
    with progress_bar() as progress:
        problems = verify_database(path, busy_timeout=busy_timeout, progress=progress)
    for problem in problems:
        if as_json:
            print_json(vars(problem))
        else:
            click.echo(str(problem))
    if problems:
        if not as_json:
            click.echo(
                f"{counted(len(problems), 'problem')}; `memdb repair --db {path}` mends what can "
                "be derived",
                err=True,
            )
        click.get_current_context().exit(1)
    if not as_json:
        click.echo("nothing is wrong")
