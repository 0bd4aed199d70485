"""`memdb query`: the references nearest to a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    read_only_option,
    where_option,
)
from cli.progress import progress_bar
from memdb import MemDB


@click.command(
    epilog=example(
        'memdb query "how do I open a file?" -k 3',
        "memdb query \"storms\" --where 'year>=1990' --where source=library",
        'memdb query "error E-4042" --mode hybrid',
    ),
)
@click.argument("text")
@db_option
@click.option("-k", default=5, show_default=True, help="How many references.")
@where_option
@click.option(
    "--mode",
    type=click.Choice(["vector", "keyword", "hybrid"]),
    default="vector",
    show_default=True,
    help="vector: by meaning. keyword: by the words that both have (BM25). hybrid: by both.",
)
@embedder_option
@read_only_option
@json_option
def query(
    text: str,
    path: Path,
    k: int,
    where: tuple[str, ...],
    mode: Any,
    embedder: str | None,
    read_only: bool,
    as_json: bool,
) -> None:
    """The references nearest to TEXT, best first, with their cosine similarity.

    With --mode keyword the score is how well they have its words; with --mode hybrid their order is
    that of both together. Words are indexed when they are first asked for.
    """
    wanted = parse_where(where)
    with _opened(path, mode, embedder, read_only) as database:
        if mode != "vector" and not read_only:
            with progress_bar() as progress:
                database.build_keywords(progress=progress)
        with busy("searching"):
            retrieval = database.query(text, k, where=wanted, mode=mode)
    for place, hit in enumerate(retrieval.hits, 1):
        if as_json:
            print_json(hit_json(hit))
        else:
            click.echo(f"{place}. {hit.score:.3f}  {hit.reference.document_id}")
            click.echo(f"   {one_line(hit.reference.content, 160)}")


def _opened(path: Path, mode: str, embedder: str | None, read_only: bool) -> MemDB:
    """The database; words need no embedder."""
    if mode == "keyword":
        return MemDB.open(path, read_only=read_only)
    return open_database(path, embedder=embedder, read_only=read_only)
