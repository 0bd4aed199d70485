"""`memdb delete`: documents out."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cli.common import (
    counted,
    db_option,
    example,
    if_version_option,
    json_option,
    parse_where,
    print_json,
    where_option,
)
from memdb import MemDB


@click.command(
    short_help="Documents out, by id or by metadata.",
    epilog=example("memdb delete veldmoor", "memdb delete --where source=library --yes"),
)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@db_option
@where_option
@click.option("--yes", is_flag=True, help="Do not ask before deleting by --where.")
@if_version_option
@json_option
def delete(
    ids: tuple[str, ...],
    path: Path,
    where: tuple[str, ...],
    yes: bool,
    if_version: int | None,
    as_json: bool,
) -> None:
    """Delete documents by id or by metadata, all or none, with their references and memories."""
    if bool(ids) == bool(where):
        raise click.UsageError("give either ids or --where")
    ids = tuple(dict.fromkeys(ids))  # each once
    with MemDB.open(path) as database:
        if where:
            ids = tuple(document.id for document in database.documents(parse_where(where)))
            if ids and not yes:
                if not sys.stdin.isatty():
                    raise click.UsageError(
                        f"{counted(len(ids), 'document')} found; --yes deletes what is found"
                    )
                click.confirm(f"Delete {counted(len(ids), 'document')}?", abort=True)
        if ids:
            database.delete(*ids, if_version=if_version)
    if as_json:
        for name in ids:
            print_json({"deleted": name})
    else:
        click.echo(f"{counted(len(ids), 'document')} deleted")
