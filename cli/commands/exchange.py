"""`memdb export` and `memdb import`: a database as files that other programs read and write."""

from __future__ import annotations

from pathlib import Path

import click

from cli.common import (
    busy_timeout_option,
    counted,
    db_option,
    example,
    goes_on,
    read_only_option,
)
from cli.progress import progress_bar
from memdb import MemDB, import_database


@click.command(
    "export",
    epilog=example("memdb export my-export", "memdb export my-export --arrays"),
)
@click.argument("to", type=click.Path(path_type=Path))
@db_option
@click.option(
    "--arrays",
    is_flag=True,
    help="Memories as the arrays that attention reads; default: as they are stored, without loss.",
)
@read_only_option
def export_database(to: Path, path: Path, arrays: bool, read_only: bool) -> None:
    """Write documents, embeddings and memories, as they are at this moment, to the folder TO:
    documents as JSON lines, the rest as safetensors files."""
    with MemDB.open(path, read_only=read_only) as database, progress_bar() as progress:
        documents = database.export(to, arrays=arrays, progress=progress)
    click.echo(f"{counted(documents, 'document')} written to '{to}'")


@click.command(
    "import",
    epilog=example("memdb import my-export --db new.memdb"),
)
@click.argument("source", metavar="EXPORT", type=click.Path(path_type=Path))
@db_option
@busy_timeout_option
def import_export(source: Path, path: Path, busy_timeout: float) -> None:
    """Bring an export in, into a database that is there (documents with the same id are replaced)
    or into a new one with the export's settings.

    May be interrupted; the same command goes on.
    """
    goes_on()
    with progress_bar() as progress:
        report = import_database(source, path, busy_timeout=busy_timeout, progress=progress)
    renewed = f", {report.renewed} with other embeddings or memories" if report.renewed else ""
    click.echo(
        f"{report.inserted} inserted, {report.updated} updated{renewed}, "
        f"{report.unchanged} unchanged; "
        f"{counted(report.references, 'reference')} and "
        f"{counted(report.memories, 'memory', 'memories')} written"
    )
