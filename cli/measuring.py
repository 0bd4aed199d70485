"""What the commands share that measure a model's heads on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.commands.init import corpora_option, framing_option, layers_option, selection_option
from cli.common import adapter, adapter_option, goes_on, model_option, notify
from cli.loading import loading
from cli.progress import progress_bar

_Command = TypeVar("_Command", bound=Callable[..., Any])


def measured_options(passages: int, what: str) -> Callable[[_Command], _Command]:
    """Options of such a command.

    Args:
        passages: the default of `--passages`.
        what: its help.
    """
    options = (
        corpora_option("What to measure on"),
        click.option(
            "--out",
            required=True,
            type=click.Path(path_type=Path),
            help="The file for what is measured.",
        ),
        model_option,
        adapter_option,
        framing_option,
        layers_option,
        selection_option,
        click.option(
            "--passages",
            type=click.IntRange(min=1),
            default=passages,
            show_default=True,
            help=what,
        ),
        click.option("--examples", default=4, show_default=True, help="Answers about each."),
        click.option("--seed", default=0, show_default=True),
    )

    def with_options(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return with_options


@contextmanager
def measured_text(
    model: str | None, adapter_name: str | None, corpora: tuple[Path, ...]
) -> Iterator[tuple[Any, Any, Any]]:
    """The model, the corpus as its references, and whom to tell of progress."""
    goes_on()
    models = adapter()
    from model_adapter import training
    from model_adapter.models.recorded_models import language_for_new

    name = model or models.DEFAULT_MODEL
    language = language_for_new(name, adapter_name, notify, exact=True, **loading())
    with progress_bar() as progress:
        yield language, training.read(language, corpora, progress=progress), progress
