"""`memdb train`: an adapter by which a model writes better memories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.commands.init import corpora_option, selection_option, spread_option
from cli.common import adapter, counted, example, goes_on, model_option, notify
from cli.loading import loading
from cli.progress import progress_bar

_FILE = click.Path(path_type=Path)


def _numbers(text: str, hint: str) -> tuple[int, ...]:
    """`360,720` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not of the form 360,720", param_hint=hint) from error


def _range(text: str) -> tuple[int, int]:
    """`1-5` as its ends."""
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is not of the form 1-5", param_hint="--references"
        ) from error


@click.command(
    epilog=example(
        "memdb train --corpus corpus.jsonl --out trained --hours 8",
        "memdb init --db better.memdb --adapter trained/adapter",
        "memdb rewrite --adapter trained/adapter",
    ),
)
@corpora_option("What to learn from")
@click.option("--out", required=True, type=_FILE, help="A folder for the adapter and the run.")
@model_option
@click.option(
    "--questions",
    type=_FILE,
    help='Questions about the corpus: lines of "question", "answers" and "document" (an id).',
)
@click.option(
    "--exclude",
    multiple=True,
    type=_FILE,
    help="A corpus that must not be learned: what overlaps it is left out; may be given again.",
)
@click.option("--hours", type=float, help="How long to train.")
@click.option("--steps", type=int, help="Or how many steps.")
@click.option("--rank", default=16, show_default=True, help="Of the low-rank changes.")
@click.option("--lr", default=2e-4, show_default=True, help="The largest learning rate.")
@click.option(
    "--budgets",
    default="360,720,1440",
    show_default=True,
    help="Key-values kept of a 128-token reference; each passage gets one of them.",
)
@selection_option
@spread_option
@click.option(
    "--framings",
    help="plain, chat or plain,chat; default: chat as well where the model has a template.",
)
@click.option(
    "--path",
    type=click.Choice(["write", "read", "both"]),
    default="write",
    show_default=True,
    help="write: only memories are written by the adapter, what reads stays as it is; read: the "
    "other way round.",
)
@click.option(
    "--references", default="1-5", show_default=True, help="In memory at a time, least and most."
)
@click.option(
    "--short",
    default=0.0,
    show_default=True,
    help="Share of passages whose references are a few sentences each.",
)
@click.option(
    "--unrelated",
    default=0.0,
    show_default=True,
    help="Share of passages whose text is read behind other references alone.",
)
@click.option("--batch", default=1, show_default=True, help="Passages to a step.")
@click.option("--examples", default=6, show_default=True, help="About each passage.")
@click.option(
    "--self-questions",
    default=64,
    show_default=True,
    help="References about which the model itself asks and answers; 0: none.",
)
@click.option("--held-out", default=24, show_default=True, help="Passages to measure by.")
@click.option("--evaluate-every", default=200, show_default=True, metavar="STEPS")
@click.option("--kl-weight", default=0.5, show_default=True, help="Of the distance to the text.")
@click.option("--nll-weight", default=1.0, show_default=True, help="Of the right answers.")
@click.option("--targets", help="Linear layers to change, e.g. q_proj,v_proj; default: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--plot", type=_FILE, help="Draw the run into this file (.svg or .png).")
def train(
    corpora: tuple[Path, ...],
    out: Path,
    model: str | None,
    questions: Path | None,
    exclude: tuple[Path, ...],
    framings: str | None,
    targets: str | None,
    budgets: str,
    references: str,
    plot: Path | None,
    **options: Any,
) -> None:
    """Train a model to write better memories: such that with memories it goes on as it would with
    the texts in its prompt.

    The adapter comes into OUT/adapter. May be interrupted; the same command goes on.
    """
    goes_on()
    models = adapter()
    from model_adapter import training

    if plot is not None:  # a mistake there is better known now than in eight hours
        training.require_drawing(plot)
        if plot.absolute().parent not in (out.absolute(), *out.absolute().parents):
            plot.parent.mkdir(parents=True, exist_ok=True)
    name = model or models.DEFAULT_MODEL
    wanted: tuple[str, ...] = () if framings is None else tuple(framings.split(","))
    recipe_of: dict[str, Any] = {
        **options,
        "budgets": _numbers(budgets, "--budgets"),
        "references": _range(references),
        "targets": tuple(targets.split(",")) if targets else (),
    }
    training.Recipe(**{**recipe_of, "framings": wanted or ("plain",)})  # before the model is loaded
    language = models.LanguageModel.load(name, exact=True, notify=notify, **loading())
    if not wanted:
        wanted = ("plain", "chat") if language.tokenizer.chat_template else ("plain",)
    recipe = training.Recipe(**{**recipe_of, "framings": wanted})
    with progress_bar() as progress:
        corpus = training.read(
            language, corpora, questions=questions, exclude=exclude, progress=progress
        )
    documents = counted(sum(map(bool, corpus.documents)), "document")
    left_out = f", {corpus.excluded} left out" if exclude else ""
    notify(f"{documents} of {counted(len(corpus.references), 'reference')}{left_out}")
    data = {
        "corpora": [file.name for file in corpora],
        "questions": questions and questions.name,
        "excluded": [file.name for file in exclude],
    }
    try:
        with _bars() as (progress, told):
            done = training.train(
                language, corpus, recipe, out, data=data, progress=progress, told=told
            )
    finally:
        if plot is not None:
            training.draw_log(out / "log.jsonl", plot)
    click.echo(done.folder)
    worth = ""
    if done.share is not None and done.untrained is not None:
        worth = (
            f"; on held-out passages memories are worth {done.share:.0%} of the text, without the "
            f"adapter {done.untrained:.0%}"
        )
    notify(f"{counted(done.steps, 'step')} in {done.seconds / 3600:.2f} hours{worth}")


@contextmanager
def _bars() -> Iterator[tuple[Any, Any]]:
    """What to tell of long work and of steps: bars on a terminal, the steps' one with the loss."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        stages: dict[str, Any] = {}
        smooth: list[float] = []

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
            bars.update(stages[stage], completed=done, total=total or None)

        def told(step: int, total: int, line: dict[str, Any]) -> None:
            loss = float(line["loss"])
            smooth[:] = [0.98 * smooth[0] + 0.02 * loss if smooth else loss]
            progress("training", step, total)
            bars.update(stages["training"], description=f"training, loss {smooth[0]:.3f}")

        yield progress, told
