"""`memdb init`: make a database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.common import (
    adapter,
    adapter_option,
    embedder_option,
    example,
    key_option,
    model_option,
    notify,
    whole_db_option,
)
from cli.loading import embedder_loading, loading
from memdb import CODEC_NAMES

#: Those of `model_adapter.SELECTIONS`, which takes seconds to import.
SELECTION_NAMES = (
    "contribution",
    "predicted",
    "reconstruction",
    "questions",
    "expected",
    "diversity",
    "paper",
)
_Command = TypeVar("_Command", bound=Callable[..., Any])
_LAYERS = 10_000  # more than any model has


def parse_layers(text: str | None) -> list[int] | None:
    """`0-14,20` as a list of layers."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            layer, end = int(first), int(last or first)
        except ValueError as error:
            raise click.BadParameter(
                f"{part!r} is neither a layer nor a range like 0-14", param_hint="--layers"
            ) from error
        if end < layer:
            raise click.BadParameter(f"the range {part!r} is empty", param_hint="--layers")
        if end >= _LAYERS:  # before such a range fills the machine's memory
            raise click.BadParameter(f"no model has the layer {end}", param_hint="--layers")
        layers.extend(range(layer, end + 1))
    return layers


codec_option = click.option(
    "--codec",
    type=click.Choice(CODEC_NAMES),
    help="How they are stored; for a new database klt8, if not given.",
)

framing_option = click.option(
    "--framing",
    type=click.Choice(["plain", "chat"]),
    help="What stands around memories and prompt; default: chat where the model has a template.",
)

layers_option = click.option("--layers", help="Memory layers, e.g. 0-14,20; default: all.")

heads_option = click.option(
    "--heads",
    type=click.Path(path_type=Path),
    help="Memory heads: a file of `memdb heads`; default: all of these layers.",
)


def _file_or_none(_: click.Context, __: click.Parameter, value: str | None) -> Path | str | None:
    return value if value in (None, "none") else Path(value)


weights_option = click.option(
    "--head-weights",
    metavar="FILE",
    callback=_file_or_none,
    help="How much the scores of each head count: a file of `memdb head-weights`, or none; "
    "default: those that come with the model, where there are some.",
)

predictor_option = click.option(
    "--predictor",
    type=click.Path(path_type=Path),
    help="Of contributions, for --selection predicted: a file of `memdb predictor`; default: the "
    "one that comes with the model, where there is one.",
)

spread_option = click.option(
    "--spread",
    type=click.Choice(["uniform", "layer", "all"]),
    help="Where they are kept: as many for each (layer, kv head), as many for each layer, or where "
    "they count most; default: as the selection does.",
)

floor_option = click.option(
    "--floor",
    type=click.IntRange(min=0),
    help="Shorter references keep as many as one of so many tokens; for a new database 40.",
)

selection_option = click.option(
    "--selection",
    type=click.Choice(SELECTION_NAMES),
    default=SELECTION_NAMES[0],
    show_default=True,
    help="Which key-values are kept.",
)


def corpora_option(what: str) -> Callable[[_Command], _Command]:
    """One or several corpora to learn or measure from."""
    return click.option(
        "--corpus",
        "corpora",
        multiple=True,
        required=True,
        type=click.Path(path_type=Path),
        help=f"{what}, lines as for ingest; may be given again.",
    )


def how_options(command: Any) -> Any:
    """The options that say how memories are written."""
    options = (
        framing_option,
        layers_option,
        heads_option,
        click.option(
            "--selection",
            type=click.Choice(SELECTION_NAMES),
            help="Which key-values are kept; default: contribution. predicted writes 2.5 times as "
            "fast, and answers a little less well.",
        ),
        click.option("--budget", type=int, help="How many of a 128-token reference."),
        floor_option,
        spread_option,
        weights_option,
        predictor_option,
        codec_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    epilog=example("memdb init --db docs.memdb --framing plain --budget 720 --key source"),
)
@whole_db_option
@model_option
@adapter_option
@embedder_option
@how_options
@click.option(
    "--index",
    type=click.Choice(["auto", "exact", "ivf"]),
    help="auto: exact search for few references, an ANN index for many.",
)
@click.option("--recall", type=float, help="Share of the 5 nearest that an ANN index has to find.")
@click.option(
    "--place/--no-place",
    default=None,
    help="Embed references, and write their memories, behind the place where they stand: title and "
    "headings. Default: --no-place.",
)
@key_option
def init(path: Path, layers: str | None, adapter_name: str | None, **options: object) -> None:
    """Make a database, fixed to one model, one embedder and one framing.

    `memdb ingest` makes one with the defaults by itself.
    """
    make_database(path, layers=parse_layers(layers), adapter=adapter_name, **options)


def make_database(path: Path, **options: object) -> None:
    """Make a database and say what it is; options that are None take their defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    with adapter().create_database(
        path, notify=notify, **loading(), **embedder_loading(), **given
    ) as database:
        settings = database.settings
        trained = settings["memory"].get("adapter")
        notify(
            f"made '{path}' for the model {settings['model']['name']} "
            + (f"with the adapter {trained} " if trained else "")
            + f"({database.shape.framing} framing) and the embedder {settings['embedder']['name']}"
        )
