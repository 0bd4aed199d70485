"""`memdb get`: one document."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    counted,
    db_option,
    document_json,
    example,
    json_option,
    print_json,
    read_only_option,
)
from memdb import MemDB


@click.command(epilog=example("memdb get library/json --json"))
@click.argument("id")
@db_option
@read_only_option
@json_option
def get(id: str, path: Path, read_only: bool, as_json: bool) -> None:
    """The document with this ID: its text, metadata, version and references."""
    with MemDB.open(path, read_only=read_only) as database:
        document = database.get(id)
    if as_json:
        print_json(document_json(document))
        return
    click.echo(
        f"{document.id}  version {document.version}, "
        f"{counted(len(document.references), 'reference')}, {document.warm} with a memory"
    )
    for name, value in document.metadata.items():
        click.echo(f"  {name}: {value}")
    click.echo(f"\n{document.text.strip()}")
