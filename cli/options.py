"""How to answer: the options that `generate` and `chat` share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from cli.common import (
    adapter_option,
    embedder_option,
    exact_option,
    fast_option,
    model_option,
    parse_where,
    where_option,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


#: As `model_adapter.Options` has it, which takes seconds to import.
MAX_NEW_TOKENS = 256


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Say beside the answer what it was given with, and how long that took.",
)


def answer_options(command: _Command) -> _Command:
    """Options by the names that `model_adapter.Options` has, but for `where` and `template`, which
    `parsed` reads; and those that open a database with its model."""
    options = (
        click.option(
            "--max-new-tokens",
            default=MAX_NEW_TOKENS,
            show_default=True,
            help="Of an answer, at most.",
        ),
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
        exact_option,
        fast_option,
        click.option(
            "--temperature", default=0.0, show_default=True, help="0: always the likeliest token."
        ),
        click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens."),
        click.option(
            "--top-p", default=1.0, show_default=True, help="Draw among this much probability."
        ),
        click.option(
            "--min-p",
            default=0.0,
            show_default=True,
            help="Draw among tokens this many times as likely as the likeliest, or more.",
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
        click.option(
            "--template",
            multiple=True,
            metavar="NAME=VALUE",
            help="Tell the model's chat template something, as enable_thinking=false; may be given "
            "again. A value is JSON where it reads as JSON, else text.",
        ),
        click.option(
            "--hide-thinking",
            is_flag=True,
            help="Leave out what the model thinks before it answers.",
        ),
        model_option,
        adapter_option,
        embedder_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Those options as `model_adapter.Options` takes them."""
    where, template = parse_where(options["where"]), _parse_template(options["template"])
    return {**options, "where": where or None, "template": template or None}


def _parse_template(items: Iterable[str]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(
                f"{item!r} is not of the form NAME=VALUE", param_hint="--template"
            )
        if name.strip() in told:
            raise click.BadParameter(f"{name.strip()!r} is given twice", param_hint="--template")
        try:
            told[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            told[name.strip()] = value
    return told
