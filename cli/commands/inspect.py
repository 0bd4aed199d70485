"""`memdb inspect`: what the memories of a document are made of."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from cli.common import (
    adapter,
    adapter_option,
    busy,
    counted,
    db_option,
    embedder_option,
    example,
    json_option,
    model_option,
    open_database,
    print_json,
    read_only_option,
)
from cli.heat import has_colours, heat_lines, heat_map
from cli.sources import source_json, source_lines

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Generation, Inspected, Source


@click.command(
    epilog=example(
        "memdb inspect veldmoor", 'memdb inspect veldmoor --question "Who keeps the lighthouse?"'
    ),
)
@click.argument("id")
@db_option
@click.option(
    "--question", metavar="TEXT", help="Answer it, and show which tokens the answer looked at."
)
@click.option("--max-new-tokens", default=32, show_default=True, help="Of the answer.")
@model_option
@adapter_option
@embedder_option
@read_only_option
@json_option
def inspect(
    id: str,
    path: Path,
    question: str | None,
    max_new_tokens: int,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    read_only: bool,
    as_json: bool,
) -> None:
    """Show which tokens of the document with this ID its memories keep: the more (layer, kv head)
    rows keep a token, the brighter. Where there are no colours, a line for each token."""
    answer: Generation | None = None
    with (
        busy("looking"),
        open_database(
            path, model, embedder, adapter_name=adapter_name, read_only=read_only
        ) as database,
    ):
        database.get(id)  # it is there, before anything is answered
        if question is not None:
            options = {"max_new_tokens": max_new_tokens, "cite": True}
            answer = adapter().generate(question, database, **options)
        sources = [] if answer is None else answer.sources()
        inspected = adapter().inspect_document(database, id, sources)
    if as_json:
        for part in inspected:
            print_json(part.to_json())
        if answer is not None:
            shown = [source_json(source) for source in sources]
            print_json({"question": question, "answer": answer.text, "sources": shown})
        return
    console = Console(highlight=False)
    _show_kept(console, inspected)
    if answer is not None:
        click.echo(f"\n{question}\n{answer.text.strip()}")
        _show_used(console, inspected, sources)


def _show_kept(console: Console, inspected: Sequence[Inspected]) -> None:
    hottest = max((int(part.kept.max()) for part in inspected if part.kept is not None), default=0)
    for part in inspected:
        kept, rows = part.kept, part.rows
        tokens = counted(len(part.pieces), "token")
        click.echo(_heading(part, inspected))
        if kept is None:
            click.echo(
                f"{part.reference.content}\n{tokens}; cold: there is no memory yet. "
                f"`memdb warm {shlex.quote(part.reference.document_id)}` writes it"
            )
            continue
        shares = [f"{count / rows:.1%}" for count in kept]
        counts = [f"{count} rows" for count in kept]
        _show(console, part.pieces, kept.tolist(), hottest, counts, shares)
        click.echo(
            f"{tokens}, each kept by {kept.min()} to {kept.max()} of {rows} rows; "
            f"{part.numbers['pairs']:,} pairs, {part.numbers['bytes']:,} bytes, "
            f"{part.numbers['codec']}"
        )


def _show_used(console: Console, inspected: Sequence[Inspected], sources: Sequence[Source]) -> None:
    seen = [part for part in inspected if part.used is not None]
    if not seen:
        document = inspected[0].reference.document_id
        click.echo(f"\n{document} was not among the sources of this answer; these were:")
        click.echo("\n".join(source_lines(sources)) or "none")
        return
    hottest = max(max(part.attention or [0.0]) for part in seen)
    for part in seen:
        attention, source = part.attention, part.used
        assert attention is not None
        assert source is not None
        click.echo(_heading(part, inspected))
        # Most often one token of all gets most of it: by their roots the others show, too.
        heat = [math.sqrt(share) for share in attention]
        shares = [f"{share:.4%}" for share in attention]
        _show(console, part.pieces, heat, math.sqrt(hottest), shares)
        click.echo(
            f"{source.share:.1%} of the memories' attention, {source.attention:.1%} of all; one "
            f"token got {max(attention):.2%}, the most (colours go with the square root)"
        )
    if len(seen) < len(inspected):
        others = counted(len(inspected) - len(seen), "reference was", "references were")
        click.echo(f"\n{others} not among the sources of this answer")


def _heading(part: Inspected, inspected: Sequence[Inspected]) -> str:
    reference = part.reference
    place = f"reference {reference.ordinal + 1} of {len(inspected)}"
    return f"\n{reference.document_id}, {place} (id {reference.id})"


def _show(
    console: Console,
    pieces: Sequence[str],
    heat: Sequence[float],
    hottest: float,
    *columns: Sequence[str],
) -> None:
    if has_colours(console):
        console.print(heat_map(pieces, heat, hottest))
    else:
        click.echo("\n".join(heat_lines(pieces, *columns)))
