"""`memdb head-weights`: how much the scores of each head count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.commands.init import (
    corpora_option,
    framing_option,
    layers_option,
    parse_layers,
    selection_option,
)
from cli.common import (
    adapter,
    adapter_option,
    example,
    goes_on,
    model_option,
    notify,
)
from cli.progress import progress_bar


@click.command(
    "head-weights",
    short_help="How much the scores of each head count, measured on a text.",
    epilog=example(
        "memdb head-weights --corpus calibration.jsonl --out weights.jsonl",
        "memdb init --db docs.memdb --head-weights weights.jsonl",
    ),
)
@corpora_option("What to measure on")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The file for what is measured."
)
@model_option
@adapter_option
@framing_option
@layers_option
@selection_option
@click.option(
    "--passages",
    type=click.IntRange(min=1),
    default=48,
    show_default=True,
    help="References to measure by.",
)
@click.option("--examples", default=4, show_default=True, help="Answers about each.")
@click.option("--seed", default=0, show_default=True)
def head_weights(
    corpora: tuple[Path, ...],
    out: Path,
    model: str | None,
    adapter_name: str | None,
    layers: str | None,
    **options: Any,
) -> None:
    """Measure how much the scores of each head, a (layer, kv head), have to count so that a budget
    goes to the heads whose key-values answers need.

    The weights are used when a database is made with --head-weights OUT. May be interrupted; the
    same command goes on.
    """
    goes_on()
    models = adapter()
    from model_adapter import training
    from model_adapter.head_weights import measure_head_weights
    from model_adapter.recorded import language_for_new

    chosen = parse_layers(layers)
    language = language_for_new(model or models.DEFAULT_MODEL, adapter_name, notify)
    with progress_bar() as progress:
        corpus = training.read(language, corpora, progress=progress)
        found = measure_head_weights(
            language, corpus, out, layers=chosen, progress=progress, **options
        )
    by_layer: dict[int, list[float]] = {}
    for (layer, _), weight in found.weights.items():
        by_layer.setdefault(layer, []).append(weight)
    table = Table(title=f"{language.name}: weights of heads")
    table.add_column("layer", justify="right")
    for head in range(language.kv_heads):
        table.add_column(f"kv head {head}", justify="right")
    for layer, weights in by_layer.items():
        table.add_row(str(layer), *(f"{weight:.3g}" for weight in weights))
    Console().print(table)
