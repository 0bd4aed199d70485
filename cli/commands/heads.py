"""`memdb heads`: which heads earn their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.commands.init import parse_layers, spread_option, weights_option
from cli.common import counted, example
from cli.measuring import measured_options, measured_text

_NOTHING = 0.05  # pairs of a reference


@click.command(
    epilog=example(
        "memdb heads --corpus calibration.jsonl --out heads.jsonl",
        "memdb init --db docs.memdb --heads heads.jsonl",
    ),
)
@measured_options(24, "References to measure by; as many check it.")
@click.option("--budget", type=int, help="How many of a 128-token reference.")
@spread_option
@weights_option
def heads(
    corpora: tuple[Path, ...],
    out: Path,
    model: str | None,
    adapter_name: str | None,
    layers: str | None,
    **options: Any,
) -> None:
    """Measure what each memory head, a (layer, kv head), is worth: how much less likely right
    answers about a text are when it keeps nothing and the others keep more.

    The heads without which answers are likelier, by more than the standard error, are left out when
    a database is made with --heads OUT. May be interrupted; the same command goes on.
    """
    chosen = parse_layers(layers)
    with measured_text(model, adapter_name, corpora) as (language, corpus, progress):
        from model_adapter.measuring.memory_heads import measure_heads

        found = measure_heads(language, corpus, out, layers=chosen, progress=progress, **options)
    table = Table(title=f"{language.name}, budget {found.about['budget']:,}")
    for column in ("layer", "kv head", "pairs of a reference", "worth, nats a token", "left out"):
        table.add_column(column, justify="right")
    worths = sorted(found.worths, key=lambda one: -one.worth)
    for one in worths:
        table.add_row(
            str(one.head[0]),
            str(one.head[1]),
            f"{one.pairs:.1f}",
            f"{one.worth:+.4f} ± {one.error:.4f}",
            "" if one.earns else "yes",
        )
    Console().print(table)
    every, kept = found.check or (0.0, 0.0)
    bare = sum(one.pairs < _NOTHING for one in worths)
    click.echo(
        f"{len(worths) - len(found.chosen)} of {counted(len(worths), 'head')} left out, "
        f"{bare} keep next to nothing; on as many other passages answers have {every:.3f} nats a "
        f"token with all heads, {kept:.3f} without those left out"
    )
