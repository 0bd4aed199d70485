"""`memdb eval`: nothing, RAG and memory on the questions of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.commands.init import (
    SELECTION_NAMES,
    floor_option,
    heads_option,
    layers_option,
    parse_layers,
    predictor_option,
    spread_option,
    weights_option,
)
from cli.common import (
    adapter,
    adapter_option,
    embedder_option,
    exact_option,
    example,
    goes_on,
    json_option,
    model_option,
    notify,
    print_json,
)
from cli.evaluated import show
from cli.loading import embedder_loading, loading
from cli.progress import progress_bar
from memdb import CODEC_NAMES


@click.command(
    "eval",
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
    'that answers it) or "documents" (of several that do so together).',
)
@click.option("--limit", type=int, help="At most so many questions, spread over the file.")
@click.option("--budget", type=int, help="Key-values kept of a 128-token reference.")
@click.option(
    "--selection",
    type=click.Choice(SELECTION_NAMES),
    help="Which key-values are kept; default: as `memdb init`.",
)
@floor_option
@spread_option
@layers_option
@heads_option
@weights_option
@predictor_option
@click.option("--codec", type=click.Choice(CODEC_NAMES), help="How they are stored; default: klt8.")
@click.option(
    "--no-weigh",
    is_flag=True,
    help="Let all memories count the same, however near to the question they are.",
)
@click.option(
    "--references",
    type=click.Choice(["1", "5", "retrieved"]),
    default="1",
    show_default=True,
    help="What is seen: a question's document, or documents; that and 4 more of its article (the "
    "same metadata.title), or those and 3 distractors; or the 5 references that are retrieved.",
)
@click.option(
    "--framing",
    type=click.Choice(["plain", "chat", "both"]),
    help="What stands around memories and prompt; default: both where the model has a template.",
)
@model_option
@adapter_option
@embedder_option
@exact_option
@click.option(
    "--seed", default=0, show_default=True, help="Of the other documents, and of the intervals."
)
@click.option("--max-new-tokens", default=24, show_default=True, help="Of an answer.")
@click.option(
    "--no-answers",
    is_flag=True,
    help="Likelihoods alone: no right answers, exact match, F1, seconds.",
)
@click.option(
    "--no-ranking", is_flag=True, help="Do not rank the right answer among those of 7 others."
)
@click.option(
    "--controls",
    is_flag=True,
    help="Measure, too, what the memories' prefix alone and memories of another article are worth.",
)
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
    no_weigh: bool,
    no_answers: bool,
    no_ranking: bool,
    picture: Path | None,
    work: Path | None,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    exact: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a model the questions of a file three times: with nothing before them, with references as
    text in the prompt (RAG), and with these as memories; and measure how likely the right answer
    is, whether it is likelier than those to other questions, and how good the model's own is.

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
    if no_weigh:
        given["weighing"] = evaluation.EVEN
    settings = evaluation.Settings(answers=not no_answers, ranking=not no_ranking, **given)
    if picture is not None:
        evaluation.require_picture(picture)  # before the work
    parts = {"model": model, "adapter": adapter_name, "embedder": embedder, "work": work}
    with progress_bar() as progress:
        found = evaluation.evaluate(
            corpus,
            questions,
            settings,
            exact=exact,
            **{name: part for name, part in parts.items() if part is not None},  # type: ignore[arg-type]
            progress=progress,
            notify=notify,
            **loading(),
            **embedder_loading(),
        )
    if picture is not None:
        evaluation.plot(found, picture)
    if as_json:
        print_json(found.to_json())
        return
    show(found)
