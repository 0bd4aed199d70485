"""`memdb head-weights`: how much the scores of each head count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.commands.init import parse_layers
from cli.common import example
from cli.measuring import measured_options, measured_text


@click.command(
    "head-weights",
    epilog=example(
        "memdb head-weights --corpus calibration.jsonl --out weights.jsonl",
        "memdb init --db docs.memdb --head-weights weights.jsonl",
    ),
)
@measured_options(48, "References to measure by.")
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
    chosen = parse_layers(layers)
    with measured_text(model, adapter_name, corpora) as (language, corpus, progress):
        from model_adapter.measuring.head_weights import measure_head_weights

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
