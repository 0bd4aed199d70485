"""`memdb index`: the ANN index, and the metadata keys that filters ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import busy_timeout_option, db_option, example, key_option
from cli.progress import progress_bar
from memdb import MemDB


@click.command(
    epilog=example(
        "memdb index",
        "memdb index --kind ivf --recall 0.995 --key year --key source",
        "memdb index --no-key source",
    ),
)
@db_option
@click.option(
    "--kind",
    type=click.Choice(["auto", "exact", "ivf"]),
    help="auto: exact search for few references, an ANN index for many. Recorded.",
)
@click.option(
    "--recall", type=float, help="Share of the 5 nearest that an ANN index has to find. Recorded."
)
@key_option
@click.option(
    "--no-key",
    "gone",
    multiple=True,
    metavar="NAME",
    help="A metadata key to index no longer; may be given again.",
)
@busy_timeout_option
def index(
    path: Path,
    kind: Any,
    recall: float | None,
    keys: tuple[str, ...],
    gone: tuple[str, ...],
    busy_timeout: float,
) -> None:
    """Build the index over the embeddings anew, and index metadata keys.

    What is due is built by itself, after `ingest` and while a program uses the database: this is to
    have it now, or of another kind. With --key or --no-key alone only these are indexed, or no
    longer are.
    """
    with MemDB.open(path, busy_timeout=busy_timeout) as database, progress_bar() as progress:
        database.undeclare_keys(*gone)
        if keys:
            database.declare_keys(*keys, progress=progress)
        if (keys or gone) and kind is None and recall is None:
            if keys:
                click.echo(f"indexed: {', '.join(keys)}")
            if gone:
                click.echo(f"no longer indexed: {', '.join(gone)}")
            return
        info = database.build_index(kind=kind, recall=recall, progress=progress)
    if info is None:
        click.echo("search is exact: every reference is compared")
    else:
        click.echo(
            f"{info.references} references in {info.lists} clusters; {info.nprobe} of them are "
            f"looked at for a recall of {info.recall:.3f}"
        )
