"""How to answer: the options that `generate` and `chat` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cli.common import (
    adapter_option,
    embedder_option,
    model_option,
    parse_where,
    where_option,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def answer_options(max_new_tokens: int) -> Callable[[_Command], _Command]:
    """Options by the names that `model_adapter.Options` has, but for `where`, which
    `parsed` reads; and those that open a database with its model.

    Args:
        max_new_tokens: its default.
    """
    options = (
        click.option("--max-new-tokens", default=max_new_tokens, show_default=True),
        click.option(
            "--memories", default=5, show_default=True, help="References for every chunk."
        ),
        click.option(
            "--retrieve-every",
            metavar="TOKENS",
            type=int,
            default=64,
            show_default=True,
            help="Tokens of a chunk: after so many, memories are retrieved anew.",
        ),
        where_option,
        click.option(
            "--min-score",
            metavar="SCORE",
            type=float,
            help="Pass over references less similar to the query than this (-1 to 1; `memdb query` "
            "shows scores).",
        ),
        click.option(
            "--weigh/--no-weigh",
            default=True,
            show_default=True,
            help="Let memories that are nearer to the query count more, and leave out those far "
            "behind; or let all count the same.",
        ),
        click.option(
            "--max-overlap",
            metavar="SHARE",
            type=float,
            help="Pass over references of which this share stands in the text already (0 to 1; the "
            "paper: 0.667).",
        ),
        click.option(
            "--prefetch",
            metavar="TOKENS",
            type=int,
            default=0,
            show_default=True,
            help="Begin to retrieve so many tokens before a chunk ends, beside generating; pays "
            "with a GPU.",
        ),
        click.option(
            "--fast",
            is_flag=True,
            help="On a CPU, decode with a copy of the weights in half the bytes.",
        ),
        click.option(
            "--temperature", default=0.0, show_default=True, help="0: always the likeliest token."
        ),
        click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens."),
        click.option(
            "--top-p", default=1.0, show_default=True, help="Draw among this much probability."
        ),
        click.option(
            "--repetition-penalty",
            default=1.0,
            show_default=True,
            help="Above 1, tokens that were there become less likely.",
        ),
        click.option("--seed", type=int, help="The same seed draws the same tokens."),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="End before this text; may be given again.",
        ),
        model_option,
        adapter_option,
        embedder_option,
    )

    def decorated(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Those options as `model_adapter.Options` takes them."""
    return {**options, "where": parse_where(options["where"]) or None}
