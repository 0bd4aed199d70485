"""`memdb rewrite`: memories anew, after a change of model or selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.commands.init import how_options, parse_layers
from cli.common import (
    adapter,
    adapter_option,
    busy_timeout_option,
    counted,
    example,
    goes_on,
    model_option,
    notify,
    whole_db_option,
)
from cli.loading import loading
from cli.progress import progress_bar


@click.command(
    epilog=example(
        "memdb rewrite --budget 720",
        "memdb rewrite --model ./my-model",
        "memdb rewrite --adapter trained/adapter",
    ),
)
@whole_db_option
@busy_timeout_option
@model_option
@adapter_option
@how_options
def rewrite(
    path: Path,
    layers: str | None,
    adapter_name: str | None,
    busy_timeout: float,
    **options: Any,
) -> None:
    """Write the memories of all warm references anew, with another model, adapter, framing,
    selection, budget, head weights, predictor or codec; what is not given stays as it was.

    May be interrupted; the same command goes on. Programs that have the database open must open it
    again.
    """
    goes_on()
    given = {name: value for name, value in options.items() if value is not None}
    with progress_bar() as progress:
        report = adapter().rewrite_database(
            path,
            adapter=adapter_name,
            layers=parse_layers(layers),
            busy_timeout=busy_timeout,
            progress=progress,
            notify=notify,
            **loading(),
            **given,
        )
    recut = f", {report.recut} cut anew" if report.recut else ""
    click.echo(
        f"{counted(report.documents, 'document')}{recut}; "
        f"{counted(report.memories, 'memory', 'memories')} written"
    )
