"""`memdb generate`: an answer with explicit memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import (
    adapter,
    busy,
    db_option,
    embedder_option,
    example,
    hit_json,
    json_option,
    model_option,
    notify,
    one_line,
    open_database,
    print_json,
)


@click.command(
    short_help="An answer with explicit memories.",
    epilog=example(
        'memdb generate "Who keeps the lighthouse?"',
        'memdb generate "Who keeps the lighthouse?" --no-memory',
    ),
)
@click.argument("prompt")
@db_option
@click.option("--no-memory", is_flag=True, help="For comparison: the model alone.")
@click.option("--rag", is_flag=True, help="For comparison: the references as text in the prompt.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--memories", default=5, show_default=True, help="References for every 64 tokens.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw among this much probability.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@model_option
@embedder_option
@json_option
def generate(
    prompt: str,
    path: Path,
    no_memory: bool,
    rag: bool,
    model: str | None,
    embedder: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with 5 explicit memories for every 64 tokens, and say which."""
    if no_memory and rag:
        raise click.UsageError("--no-memory and --rag exclude each other")
    mode = "none" if no_memory else "rag" if rag else "memory"
    with busy("remembering") as stop, open_database(path, model, embedder) as database:

        def show(text: str) -> None:
            stop()
            if not as_json:
                click.echo(text, nl=False)

        result = adapter().generate(prompt, database, mode=mode, on_text=show, **options)
    chunks = [
        {
            "start": chunk.start,
            "generated": chunk.generated,
            "references": [hit_json(hit) for hit in chunk.retrieval.hits],
        }
        for chunk in result.chunks
    ]
    if as_json:
        seconds = {name: round(value, 4) for name, value in result.seconds.items()}
        print_json(
            {
                "text": result.text,
                "token_ids": result.token_ids,
                "mode": result.mode,
                "prompt_tokens": result.prompt_tokens,
                "chunks": chunks,
                "seconds": seconds,
            }
        )
        return
    click.echo()
    for chunk in result.chunks:
        what = "answer" if chunk.generated else "prompt"
        notify(f"\n{what}, from token {chunk.start}, with:")
        for hit in chunk.retrieval.hits:
            text = one_line(hit.reference.content, 90)
            notify(f"  {hit.score:.3f}  {hit.reference.document_id}  {text}")
    seconds = result.seconds
    notify(
        f"\n{result.prompt_tokens} prompt tokens and {len(result.token_ids)} new ones; retrieve "
        f"{seconds['retrieve']:.2f} s, read {seconds['read']:.2f} s, decode "
        f"{seconds['decode']:.2f} s"
    )
