"""How a model is loaded: options of every command that loads one.

They are kept beside the command's own and asked for by `loading`, so that a command that opens a
database need not hand them on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

_MODEL, _EMBEDDER = "memdb.loading", "memdb.embedder"


def loading() -> dict[str, Any]:
    """What the running command was told, as `model_adapter.LoadingOptions`; what was not is left
    out."""
    given: dict[str, Any] = click.get_current_context().meta.get(_MODEL, {})
    return dict(given)


def embedder_loading() -> dict[str, Any]:
    """Likewise `embedder_device`."""
    given: dict[str, Any] = click.get_current_context().meta.get(_EMBEDDER, {})
    return dict(given)


def _kept(where: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:
            context.meta.setdefault(where, {})[parameter.name] = value

    return keep


class _Json(click.ParamType):  # type: ignore[type-arg]
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            read = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(read, dict) or "quant_method" not in read:
            self.fail("not a JSON object with a quant_method", param, ctx)
        return read


def _option(*names: str, where: str = _MODEL, **about: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, expose_value=False, callback=_kept(where), **about)


_loading_options = (
    _option(
        "--device",
        envvar="MEMDB_DEVICE",
        show_envvar=True,
        help="Where the model runs: cpu, cuda, cuda:1, mps. Default: a GPU if there is one.",
    ),
    _option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What the model computes in. Default: float32 on a CPU, else as its weights are "
        "stored. Memories of a database keep the dtype that they were first stored in.",
    ),
    _option(
        "--threads",
        type=click.IntRange(min=1),
        envvar="MEMDB_THREADS",
        show_envvar=True,
        help="The model's threads on a CPU. Default: torch's.",
    ),
    _option("--revision", help="Of a model of a hub: a branch, a tag or a commit."),
    _option(
        "--quantization-config",
        metavar="JSON",
        type=_Json(),
        help="As transformers takes it: "
        """'{"quant_method": "bitsandbytes", "load_in_8bit": true}'.""",
    ),
    _option(
        "--trust-remote-code",
        is_flag=True,
        help="Let code run that comes with the model or the embedder. Read it first.",
    ),
)


def loading_options(command: _Command) -> _Command:
    """All of them."""
    for option in reversed(_loading_options):
        command = option(command)
    return command


embedder_device_option = _option(
    "--embedder-device",
    where=_EMBEDDER,
    help="Where the text embedder runs. Default: cpu.",
)
