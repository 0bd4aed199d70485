"""`memdb recode`: memories under another codec."""

from __future__ import annotations

from pathlib import Path

import click

from cli.commands.init import codec_option
from cli.common import busy_timeout_option, counted, db_option, example, goes_on
from cli.progress import progress_bar
from memdb import MemDB


@click.command(
    epilog=example("memdb recode --codec klt11", "memdb recode --refit"),
)
@db_option
@codec_option
@click.option("--refit", is_flag=True, help="Fit the codec anew, to the memories of now.")
@busy_timeout_option
def recode(path: Path, codec: str | None, refit: bool, busy_timeout: float) -> None:
    """Keep all memories under another codec from now on; without --codec, under the recorded one.

    What is stored is decoded and coded anew, without the model; what an earlier codec lost does not
    come back (`memdb rewrite` asks the model). The database can be used meanwhile. May be
    interrupted; the same command goes on.
    """
    goes_on()
    with MemDB.open(path, busy_timeout=busy_timeout) as database, progress_bar() as progress:
        report = database.recode(codec, refit=refit, progress=progress)
    sizes = ""
    if report.recoded:
        sizes = f": {report.before:,} bytes before, {report.after:,} now"
    click.echo(
        f"{report.recoded} of {counted(report.memories, 'memory', 'memories')} recoded with "
        f"{report.codec}{sizes}"
    )
