"""`memdb query`: the references nearest to a text."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    busy,
    db_option,
    embedder_option,
    example,
    hit_json,
    json_option,
    one_line,
    open_database,
    parse_where,
    print_json,
    where_option,
)


@click.command(
    short_help="The references nearest to a text.",
    epilog=example(
        'memdb query "how do I open a file?" -k 3',
        "memdb query \"storms\" --where 'year>=1990' --where source=library",
    ),
)
@click.argument("text")
@db_option
@click.option("-k", default=5, show_default=True, help="How many references.")
@where_option
@embedder_option
@json_option
def query(
    text: str,
    path: Path,
    k: int,
    where: tuple[str, ...],
    embedder: str | None,
    as_json: bool,
) -> None:
    """The references nearest to TEXT, best first, with their cosine similarity."""
    wanted = parse_where(where)
    with busy("searching"), open_database(path, embedder=embedder) as database:
        retrieval = database.query(text, k, where=wanted)
    for place, hit in enumerate(retrieval.hits, 1):
        if as_json:
            print_json(hit_json(hit))
        else:
            click.echo(f"{place}. {hit.score:.3f}  {hit.reference.document_id}")
            click.echo(f"   {one_line(hit.reference.content, 160)}")
