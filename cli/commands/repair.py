"""`memdb repair`: mend what can be derived."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import adapter, counted, embedder_option, example, notify, whole_db_option
from cli.progress import progress_bar


@click.command(
    short_help="Mend what `verify` finds.",
    epilog=example("memdb repair", "memdb repair --drop-damaged"),
)
@whole_db_option
@click.option(
    "--drop-damaged", is_flag=True, help="Delete documents whose text or metadata is lost."
)
@embedder_option
def repair(path: Path, drop_damaged: bool, embedder: str | None) -> None:
    """Mend what `memdb verify` finds, as far as it can be derived from the rest.

    The index, postings, document map and embeddings are made anew; a damaged memory is dropped, and
    written anew at its next use. Documents whose text or metadata is lost are named. Exit code 1 if
    something is left.
    """
    with progress_bar() as progress:
        report = adapter().repair_database(
            path, embedder=embedder, drop=drop_damaged, progress=progress, notify=notify
        )
    for line in report.mended:
        click.echo(f"mended: {line}")
    for name in report.dropped:
        click.echo(f"deleted: document '{name}'; ingest it again")
    for problem in report.left:
        click.echo(f"left: {problem}")
    if report.left:
        hint = (
            "; --drop-damaged deletes their documents"
            if any(problem.document for problem in report.left)
            else "; restore a backup"
        )
        click.echo(f"{counted(len(report.left), 'problem')} left{hint}", err=True)
        click.get_current_context().exit(1)
    if not report.mended and not report.dropped:
        click.echo("nothing was wrong")
