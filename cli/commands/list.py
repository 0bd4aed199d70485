"""`memdb list`: the documents."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    db_option,
    document_json,
    example,
    json_option,
    one_line,
    parse_where,
    print_json,
    read_only_option,
    where_option,
)
from memdb import MemDB


@click.command(
    "list",
    epilog=example(
        "memdb list --where source=library --limit 10",
        """memdb list --where '{"source": {"$nin": ["library", "man"]}}'""",
    ),
)
@db_option
@where_option
@click.option("--limit", type=click.IntRange(1, 10**9), help="At most so many.")
@read_only_option
@json_option
def list_documents(
    path: Path, where: tuple[str, ...], limit: int | None, read_only: bool, as_json: bool
) -> None:
    """The documents in the order of their ids: id, references, how many are warm, text."""
    wanted = parse_where(where)
    with MemDB.open(path, read_only=read_only) as database:
        for document in database.documents(wanted, limit=limit):
            if as_json:
                print_json(document_json(document))
            else:
                warm = f"{document.warm}/{len(document.references)}"
                click.echo(f"{document.id:30} {warm:>9}  {one_line(document.text, 70)}")
