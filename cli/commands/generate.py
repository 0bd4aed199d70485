"""`memdb generate`: an answer with explicit memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    adapter,
    busy,
    db_option,
    example,
    hit_json,
    json_option,
    notify,
    one_line,
    open_database,
    print_json,
    read_only_option,
    standard_input,
)
from cli.options import answer_options, parsed, verbose_option
from cli.sources import HEADING, source_json, source_lines, timing_line

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Generation


@click.command(
    epilog=example(
        'memdb generate "Who keeps the lighthouse?" --cite',
        'memdb generate "Who keeps the lighthouse?" --no-memory -v',
        'memdb generate "Tell me of the lighthouse." --n 3 --temperature 0.8',
        "memdb generate --messages conversation.json --where source=library",
    ),
)
@click.argument("prompt", required=False)
@click.option(
    "--messages",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Instead of PROMPT: a conversation, a JSON list of {"role": ..., "content": ...}; - for '
    "standard input.",
)
@db_option
@click.option("--no-memory", is_flag=True, help="For comparison: the model alone.")
@click.option("--rag", is_flag=True, help="For comparison: the references as text in the prompt.")
@click.option("--cite", is_flag=True, help="Say how much each memory was used.")
@click.option(
    "--n",
    metavar="ANSWERS",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="So many answers, with --- between them; they differ with a --temperature above 0.",
)
@verbose_option
@read_only_option
@answer_options
@json_option
def generate(
    prompt: str | None,
    messages: Path | None,
    path: Path,
    no_memory: bool,
    rag: bool,
    cite: bool,
    n: int,
    verbose: bool,
    read_only: bool,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    exact: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with 5 explicit memories for every 64 tokens.

    PROMPT is a text, or - for standard input.
    """
    if no_memory and rag:
        raise click.UsageError("--no-memory and --rag exclude each other")
    if cite and (no_memory or rag):
        raise click.UsageError("--cite goes with neither --no-memory nor --rag")
    if (prompt is None) == (messages is None):
        raise click.UsageError("give either a PROMPT or --messages")
    options = parsed(options)
    options["mode"] = "none" if no_memory else "rag" if rag else "memory"
    asked = _conversation(messages) if messages is not None else _text(prompt or "")
    with (
        busy("remembering") as stop,
        open_database(
            path, model, embedder, adapter_name=adapter_name, exact=exact, read_only=read_only
        ) as database,
    ):
        results = []
        if n == 1:
            answer = adapter().stream(asked, database, cite=cite, **options)
            for piece in answer:
                stop()
                if not as_json:
                    click.echo(piece, nl=False)
            results.append(answer.result)
        else:
            results += adapter().generate(asked, database, n=n, cite=cite, **options)
            stop()
    for number, result in enumerate(results):
        if as_json:
            _print_json(result, cite)
            continue
        if n > 1:
            click.echo(("---\n" if number else "") + result.text, nl=False)
        click.echo()
        if cite:
            click.echo("\n".join(["", HEADING, *source_lines(result.sources())]))
        if verbose:
            _print_details(result)


def _print_details(result: Generation) -> None:
    for chunk in result.chunks:
        what = "answer" if chunk.generated else "prompt"
        notify(f"\n{what}, from token {chunk.start}, with:")
        for hit in chunk.retrieval.hits:
            text = one_line(hit.reference.content, 90)
            notify(f"  {hit.score:.3f}  {hit.reference.document_id}  {text}")
    notify("\n" + timing_line(result))


def _print_json(result: Generation, cite: bool) -> None:
    chunks = [
        {
            "start": chunk.start,
            "generated": chunk.generated,
            "references": [hit_json(hit) for hit in chunk.retrieval.hits],
        }
        for chunk in result.chunks
    ]
    sources = {"sources": [source_json(source) for source in result.sources()]} if cite else {}
    print_json(
        {
            "text": result.text,
            "token_ids": result.token_ids,
            "finished": result.finished,
            "mode": result.mode,
            "prompt_tokens": result.prompt_tokens,
            "chunks": chunks,
            **sources,
            "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        }
    )


def _text(prompt: str) -> str:
    """A prompt, `-` being what standard input holds, without the end of its last line."""
    if prompt != "-":
        return prompt
    text = _decoded(standard_input().read(), "<stdin>", "PROMPT")
    return text.removesuffix("\n").removesuffix("\r")


def _conversation(file: Path) -> list[dict[str, Any]]:
    """The messages in a file; what each has to be is the framing's to say."""
    name = "<stdin>" if str(file) == "-" else str(file)
    try:
        data = standard_input().read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        problem = f"cannot read '{one_line(name, 100)}': {error.strerror}"
        raise click.BadParameter(problem, param_hint="--messages") from error
    text = _decoded(data, name, "--messages").removeprefix("\ufeff")
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        raise _wrong(name, problem) from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number too long
        raise _wrong(name, f"not JSON that can be read: {error}") from error
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else "not a list"
        looks = '[{"role": "user", "content": "Who keeps the lighthouse?"}]'
        raise _wrong(name, f"{what}; messages look like {looks}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise _wrong(name, f"message {number} is no object with 'role' and 'content'")
    return messages


def _decoded(data: bytes, name: str, hint: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"'{name}' is not UTF-8 (byte {error.start + 1})", param_hint=hint
        ) from error


def _wrong(name: str, problem: str) -> click.BadParameter:
    return click.BadParameter(f"{name}, {problem}", param_hint="--messages")
