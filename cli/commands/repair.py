"""`memdb repair`: mend what can be derived."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    adapter,
    busy_timeout_option,
    counted,
    embedder_option,
    example,
    notify,
    whole_db_option,
)
from cli.loading import embedder_loading
from cli.progress import progress_bar


@click.command(
    epilog=example("memdb repair", "memdb repair --drop-damaged"),
)
@whole_db_option
@click.option(
    "--drop-damaged", is_flag=True, help="Delete documents whose text or metadata is lost."
)
@click.option(
    "--aside",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for what is taken out.  [default: the database's generation]",
)
@busy_timeout_option
@embedder_option
def repair(
    path: Path,
    drop_damaged: bool,
    aside: Path | None,
    busy_timeout: float,
    embedder: str | None,
) -> None:
    """Mend what `memdb verify` finds, as far as it can be derived from the rest.

    The index, postings, document map and embeddings are made anew; a damaged memory is taken out,
    and written anew at its next use. Documents whose text or metadata is lost are named. Exit code
    1 if something is left.

    Nothing is thrown away: the records that are taken out, or written anew, are put aside in a
    file, as they were. It lies in the database's folder, and goes with all else that was deleted
    when you run `memdb compact`; --aside puts it elsewhere. Only the index and the postings, which
    hold nothing of their own, are not put aside. An error of the machine, memory or disk, is no
    damage: it is told, and nothing is changed.
    """
    with progress_bar() as progress:
        report = adapter().repair_database(
            path,
            embedder=embedder,
            drop=drop_damaged,
            aside=aside,
            busy_timeout=busy_timeout,
            progress=progress,
            notify=notify,
            **embedder_loading(),
        )
    for line in report.mended:
        click.echo(f"mended: {line}")
    for name in report.dropped:
        click.echo(f"deleted: document '{name}'; ingest it again")
    for what in report.put_aside:
        click.echo(f"put aside: {what}")
    for file in report.aside:
        removes = "" if aside else "; `memdb compact` removes it"
        click.echo(f"they are in '{file}'{removes}")
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
