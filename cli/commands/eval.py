"""`memdb eval`: nothing, RAG and memory on the questions of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cli.commands.init import (
    SELECTION_NAMES,
    heads_option,
    layers_option,
    parse_layers,
    spread_option,
)
from cli.common import (
    adapter,
    adapter_option,
    counted,
    embedder_option,
    example,
    goes_on,
    json_option,
    model_option,
    notify,
    print_json,
)
from cli.progress import progress_bar
from memdb import CODEC_NAMES

if TYPE_CHECKING:  # it loads torch
    from model_adapter.evaluation import ArmFigures, Evaluation, FramingFigures

_ARMS = (
    ("nothing", "nothing"),
    ("rag", "text in the prompt (RAG)"),
    ("memory", "memory"),
)
_WIDTH = 100  # of a table where there is no terminal


@click.command(
    "eval",
    short_help="What memories are worth: against text in the prompt.",
    epilog=example(
        "memdb eval --corpus corpus.jsonl --questions questions.jsonl --limit 60",
        "memdb eval --corpus corpus.jsonl --questions questions.jsonl --references retrieved "
        "--budget 720 --plot eval.svg",
    ),
)
@click.option(
    "--corpus",
    required=True,
    type=click.Path(path_type=Path),
    help='JSON lines of "id", "text", "metadata".',
)
@click.option(
    "--questions",
    required=True,
    type=click.Path(path_type=Path),
    help='JSON lines of "question", "answers" (accepted ones) and "document" (the id of the one '
    "that answers it).",
)
@click.option("--limit", type=int, help="At most so many questions, spread over the file.")
@click.option("--budget", type=int, help="Key-values kept of a 128-token reference.")
@click.option(
    "--selection",
    type=click.Choice(SELECTION_NAMES),
    help="Which key-values are kept; default: as `memdb init`.",
)
@spread_option
@layers_option
@heads_option
@click.option("--codec", type=click.Choice(CODEC_NAMES), help="How they are stored; default: klt8.")
@click.option(
    "--references",
    type=click.Choice(["1", "5", "retrieved"]),
    default="1",
    show_default=True,
    help="What is seen: a question's document; that and 4 more of its article (the same "
    "metadata.title); or the 5 references that are retrieved.",
)
@click.option(
    "--framing",
    type=click.Choice(["plain", "chat", "both"]),
    help="What stands around memories and prompt; default: both where the model has a template.",
)
@model_option
@adapter_option
@embedder_option
@click.option(
    "--seed", default=0, show_default=True, help="Of the other documents, and of the intervals."
)
@click.option("--max-new-tokens", default=24, show_default=True, help="Of an answer.")
@click.option("--no-answers", is_flag=True, help="Likelihoods alone: no exact match, F1, seconds.")
@click.option(
    "--text-limit",
    default=50,
    show_default=True,
    help="Documents for the perplexity of running text; 0: none.",
)
@click.option(
    "--plot",
    "picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the figures, too: a .png or .svg.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where databases and results are kept; default: eval in the cache folder.",
)
@json_option
def evaluate(
    corpus: Path,
    questions: Path,
    layers: str | None,
    no_answers: bool,
    picture: Path | None,
    work: Path | None,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a model the questions of a file three times: with nothing before them, with references as
    text in the prompt (RAG), and with these as memories; and measure how likely the right answer
    is, and how good the model's own.

    The corpus is ingested into a database in the work folder, and all that is measured is kept
    there: interrupted, the same command goes on, and again it only prints. With two framings, the
    JSON's first figures are those of the one where memory has the larger share.
    """
    goes_on()
    adapter()  # or how to install it
    from model_adapter import evaluation

    given = {name: value for name, value in options.items() if value is not None}
    if layers is not None:
        given["layers"] = parse_layers(layers)
    settings = evaluation.Settings(answers=not no_answers, **given)
    if picture is not None:
        evaluation.require_picture(picture)  # before the work
    parts = {"model": model, "adapter": adapter_name, "embedder": embedder, "work": work}
    with progress_bar() as progress:
        found = evaluation.evaluate(
            corpus,
            questions,
            settings,
            **{name: part for name, part in parts.items() if part is not None},  # type: ignore[arg-type]
            progress=progress,
            notify=notify,
        )
    if picture is not None:
        evaluation.plot(found, picture)
    if as_json:
        print_json(found.to_json())
        return
    _show(found)


def _show(found: Evaluation) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    for framing in found.framings:
        console.print(_table(found, framing))
        for line in _lines(framing):
            click.echo(line)
        click.echo()
    stored = ", ".join(found.best.size.codecs)
    click.echo(
        f"adapter {found.adapter}, selection {found.selection}, budget {found.budget} of a "
        "128-token reference, "
        f"{counted(len(found.layers), 'layer')}, codec {found.codec}"
        + (f" (stored as {stored})" if stored not in ("", found.codec) else "")
        + f"; in brackets 95 % intervals\nkept in {found.work}"
    )


def _table(found: Evaluation, framing: FramingFigures) -> Table:
    table = Table(
        title=f"{found.model}, {framing.framing} framing, "
        f"{counted(found.questions, 'question')}, references: {found.references}",
        show_lines=True,
    )
    answers = framing.memory.f1 is not None
    table.add_column("what the model sees")
    names = ["answer NLL", "tokens right", *(["exact match", "F1", "s / question"] * answers)]
    for name in names:
        table.add_column(name, justify="right")
    for name, shown in _ARMS:
        table.add_row(shown, *_cells(framing.arm(name), answers))
    return table


def _cells(arm: ArmFigures, answers: bool) -> list[str]:
    formats = {"nll": "{:.3f}", "tokens_right": "{:.1%}"}
    if answers:
        formats |= {"em": "{:.1%}", "f1": "{:.1%}", "seconds": "{:.2f}"}
    return [
        form.format(getattr(arm, name)) + "\n" + _interval(arm.intervals[name], form)
        for name, form in formats.items()
    ]


def _lines(framing: FramingFigures) -> list[str]:
    lines = []
    if framing.share is None:
        lines.append("share of RAG's gain: none, since RAG gains nothing here")
    else:
        lines.append(
            f"share of RAG's gain: memory has {framing.share:.2f} "
            f"{_interval(framing.share_interval, '{:.2f}')} of what RAG gains over nothing, in NLL"
        )
    if framing.f1_difference is not None:
        lines.append(
            f"F1 of memory less RAG's: {framing.f1_difference:+.1%} "
            f"{_interval(framing.f1_difference_interval, '{:+.1%}')}"
        )
    lines.append(
        "recall of the document: "
        f"@1 {framing.recall_at_1:.1%} {_interval(framing.recall_at_1_interval, '{:.1%}')}, "
        f"@5 {framing.recall_at_5:.1%} {_interval(framing.recall_at_5_interval, '{:.1%}')}"
    )
    lines.append(
        f"stored: {framing.size.reference:,.0f} bytes a reference, "
        f"{framing.size.tokens_128:,.0f} for 128 tokens"
    )
    text = framing.running_text
    if text is not None:
        lines.append(
            f"running text: perplexity {text.perplexity_with:.2f} with memories, "
            f"{text.perplexity_without:.2f} without, ratio {text.ratio:.3f} "
            f"{_interval(text.ratio_interval, '{:.3f}')} ({text.tokens:,} tokens of "
            f"{counted(text.documents, 'document')}; "
            f"{counted(text.dropped, 'reference')} dropped that say the same)"
        )
    return lines


def _interval(interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return ""
    return f"[{form.format(interval[0])}, {form.format(interval[1])}]"
