"""`memdb calibrate`: how much memories count, measured on a database's own text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cli.common import (
    adapter,
    adapter_option,
    busy_timeout_option,
    counted,
    db_option,
    embedder_option,
    example,
    goes_on,
    json_option,
    model_option,
    notify,
    open_database,
    print_json,
)
from cli.progress import progress_bar
from memdb import MemDB

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Calibration


@click.command(
    epilog=example("memdb calibrate", "memdb calibrate --questions 48", "memdb calibrate --reset"),
)
@db_option
@click.option("--questions", default=24, show_default=True, help="To measure by, at least 8.")
@click.option("--seed", default=0, show_default=True, help="Which references are asked about.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="What is measured lies here; default: calibrate in the cache folder.",
)
@click.option("--reset", is_flag=True, help="Remove what is recorded; nothing is measured.")
@busy_timeout_option
@model_option
@adapter_option
@embedder_option
@json_option
def calibrate(
    path: Path,
    questions: int,
    seed: int,
    work: Path | None,
    reset: bool,
    busy_timeout: float,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    as_json: bool,
) -> None:
    """Measure how much memories should count by their retrieval scores, and record it in the
    database: `generate` and `chat` read it from then on.

    The model asks itself questions about the stored text. Says first how long it will take. May be
    interrupted; the same command goes on.
    """
    if reset:
        with MemDB.open(path, busy_timeout=busy_timeout) as database:
            was = "calibration" in database.settings
            database.record_calibration(None)
        click.echo("the calibration was removed" if was else "no calibration was recorded")
        return
    goes_on()
    models = adapter()
    with (
        open_database(
            path, model, embedder, adapter_name=adapter_name, busy_timeout=busy_timeout
        ) as database,
        progress_bar() as progress,
    ):
        found: Calibration = models.calibrate(
            database,
            questions=questions,
            seed=seed,
            work=work,
            progress=progress,
            notify=notify,
        )
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def constants(weighing: dict[str, Any]) -> str:
    """The constants of a weighing, by name."""
    return ", ".join(f"{name} {value:g}" for name, value in sorted(weighing.items()))


def _show(found: Calibration) -> None:
    table = Table(title="right answers behind memories, by the constants of these")
    for column in ("lift", "slope", "most", "nats a token", "better by"):
        table.add_column(column, justify="right")
    for one in sorted(found.tried, key=lambda one: one.nll):
        values = (one.weighing.lift, one.weighing.slope, one.weighing.most)
        better = f"{one.better:+.4f} ± {one.error:.4f}"
        table.add_row(*(f"{value:g}" for value in values), f"{one.nll:.4f}", better)
    Console().print(table)
    click.echo(
        f"{counted(found.asked, 'reference')} asked about, {counted(found.questions, 'question')} "
        f"kept: right answers have {found.alone:.3f} nats a token without anything, "
        f"{found.text:.3f} behind the text"
    )
    if found.perplexities:
        lifts = ", ".join(f"{value:.2f} with lift {n:g}" for n, value in found.perplexities.items())
        click.echo(f"running text has perplexity {lifts}")
    else:
        click.echo("there was no running text to look at: no two documents with long references")
    what = "recorded" if found.changed else "nothing is clearly better; kept and recorded"
    click.echo(f"{what}: {constants(found.weighing.to_json())}")
