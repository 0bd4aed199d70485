"""`memdb delete`: documents out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cli.common import (
    busy_timeout_option,
    counted,
    db_option,
    example,
    if_version_option,
    json_option,
    parse_where,
    print_json,
    where_option,
)
from memdb import ConflictError, MemDB


@click.command(
    epilog=example(
        "memdb delete veldmoor",
        "memdb delete --where source=library --yes",
        """memdb delete --where '{"$or": [{"source": "library"}, {"year": {"$lt": 1990}}]}'""",
    ),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@db_option
@where_option
@click.option("--yes", is_flag=True, help="Do not ask before deleting by --where.")
@if_version_option
@busy_timeout_option
@json_option
def delete(
    ids: tuple[str, ...],
    path: Path,
    where: tuple[str, ...],
    yes: bool,
    if_version: int | None,
    busy_timeout: float,
    as_json: bool,
) -> None:
    """Delete documents by id or by metadata, all or none, with their references and memories."""
    if bool(ids) == bool(where):
        raise click.UsageError("give either ids or --where")
    ids = tuple(dict.fromkeys(ids))  # each once
    wanted = parse_where(where)
    with MemDB.open(path, busy_timeout=busy_timeout) as database:
        if where:
            ids = _deleted(database, wanted, yes, if_version)
        else:
            database.delete(*ids, if_version=if_version)
    if as_json:
        for name in ids:
            print_json({"deleted": name})
    else:
        click.echo(f"{counted(len(ids), 'document')} deleted")


def _deleted(
    database: MemDB, where: dict[str, Any], yes: bool, if_version: int | None
) -> tuple[str, ...]:
    """Delete what a filter means, once the user agrees to it, and say what that was."""
    with database.transaction() as transaction:
        ids = tuple(document.id for document in database.documents(where))
        if transaction.delete(where=where, if_version=if_version) != len(ids):
            raise ConflictError(
                "another process changed what --where means; nothing was deleted. Run it again"
            )
        if ids and not yes:
            if not sys.stdin.isatty():
                raise click.UsageError(
                    f"{counted(len(ids), 'document')} found; --yes deletes what is found"
                )
            click.confirm(f"Delete {counted(len(ids), 'document')}?", abort=True)
    return ids
