"""`memdb predictor`: memories by one pass, as good as by two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.commands.init import corpora_option, framing_option
from cli.common import counted, example, model_option
from cli.measuring import measured_text


@click.command(
    epilog=example(
        "memdb predictor --model ./my-model --corpus corpus.jsonl --out my-model.safetensors",
        "memdb init --db docs.memdb --model ./my-model --predictor my-model.safetensors",
    ),
)
@corpora_option("What to learn from")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The file for the predictor."
)
@model_option
@framing_option
@click.option(
    "--references",
    type=click.IntRange(min=12),
    default=96,
    show_default=True,
    help="To learn from; a sixth of them checks it.",
)
@click.option("--seed", default=0, show_default=True, help="Which references these are.")
def predictor(
    corpora: tuple[Path, ...], out: Path, model: str | None, references: int, **options: Any
) -> None:
    """Fit a predictor: it tells from one plain pass over a reference what its key-values would
    contribute while the model repeats it, which takes a pass of more than twice the length.

    It is used by databases that are made with --predictor OUT. Takes minutes, once for a model.
    May be interrupted; the same command goes on.
    """
    with measured_text(model, None, corpora) as (language, corpus, progress):
        from model_adapter.measuring.fit_predictor import fit_predictor

        found = fit_predictor(
            language, corpus, out, references=references, progress=progress, **options
        )
    click.echo(
        f"{out}: for {language.name}; of {counted(found.held_out, 'reference')} that it has not "
        f"seen, its best eighth of pairs has {found.captured:.2f} of what the best eighth of all "
        "contributes"
    )
