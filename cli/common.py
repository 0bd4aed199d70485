"""What several commands share: options, opening a database, printing."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeVar, cast

import click
from rich.console import Console

from cli.loading import embedder_device_option, embedder_loading, loading, loading_options
from memdb import Hit, MemDB, StoredDocument, existing_namespace

GOES_ON = "memdb.goes_on"

_Command = TypeVar("_Command", bound=Callable[..., Any])

whole_db_option = click.option(
    "--db",
    "path",
    envvar="MEMDB_PATH",
    default="my.memdb",
    show_default=True,
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="The database's folder.",
)


def db_option(command: _Command) -> _Command:
    """`--db` and `--namespace`; the command is given the path of what they name together."""

    @functools.wraps(command)
    def named(*args: Any, path: Path, namespace: str | None, **options: Any) -> Any:
        if namespace is not None:
            path = existing_namespace(path, namespace)
        return command(*args, path=path, **options)

    namespace_option = click.option(
        "--namespace",
        metavar="NAME",
        envvar="MEMDB_NAMESPACE",
        show_envvar=True,
        help="Of this namespace of the database (see `memdb namespace`).",
    )
    return cast(_Command, whole_db_option(namespace_option(named)))


busy_timeout_option = click.option(
    "--busy-timeout",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How long to wait for another process that writes, compacts or opens the database.",
)
read_only_option = click.option(
    "--read-only",
    is_flag=True,
    help="Change nothing in the database: for one on a medium that cannot be written.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")

# What to make a database for; or what to open it with, where model or embedder are no longer where
# it recorded them (others are refused). No environment variable sets them: it would be given to
# every database, and refused by those of other models.
_named_model = click.option(
    "--model",
    help="The model: a name (`memdb model list`), a GGUF file, a folder, or a Hugging Face id.",
)


def model_option(command: _Command) -> _Command:
    """`--model`, and how it is loaded (see `cli.loading`)."""
    return _named_model(loading_options(command))


adapter_option = click.option(
    "--adapter",
    "adapter_name",
    metavar="NAME",
    help="A trained adapter that memories are written or read by: a name (`memdb model list`), its "
    "folder, or none.",
)
_named_embedder = click.option(
    "--embedder", help="The text embedder: a name (`memdb model list`), a folder, or such an id."
)

exact_option = click.option(
    "--exact",
    is_flag=True,
    help="On a CPU, read by the weights as they are, in float32, not by their 8 bits: slower.",
)


def _say_what_became_of_it(_: click.Context, __: click.Parameter, given: bool) -> None:
    if given:
        notify("--fast does nothing any more: models on a CPU read by weights of 8 bits (--exact)")


fast_option = click.option(
    "--fast", is_flag=True, hidden=True, expose_value=False, callback=_say_what_became_of_it
)


def embedder_option(command: _Command) -> _Command:
    """`--embedder`, and where it runs."""
    return _named_embedder(embedder_device_option(command))


def example(*lines: str) -> str:
    """The end of a command's help: an example that can be pasted."""
    return "\b\nExample:\n" + "\n".join(f"    {line}" for line in lines)


def notify(message: str) -> None:
    """Tell the user what is going on, beside the output."""
    click.echo(message, err=True)


def adapter() -> ModuleType:
    """`model_adapter`, imported when a command needs it: the engine does without."""
    import model_adapter

    return model_adapter


def why_no_adapter(error: ImportError) -> str:
    """What to do where the adapter cannot be imported. A library that is missing is another matter
    than one too old."""
    missing = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing and not importlib.util.find_spec(missing):
        return (
            f"this needs the model adapter, and {missing} is not installed. Run: "
            "pip install 'explicit-memdb[adapter]'"
        )
    try:
        requirements = importlib.metadata.requires("explicit-memdb") or []
    except importlib.metadata.PackageNotFoundError:  # run from a copy that is not installed
        requirements = []
    asked = [line.partition(";")[0].strip() for line in requirements if "adapter" in line]
    wants = f" It wants {', '.join(asked)}." if asked else ""
    return (
        f"the model adapter cannot be loaded: {one_line(str(error), 300)}.{wants} Run: "
        "pip install -U 'explicit-memdb[adapter]'"
    )


def goes_on() -> None:
    """Say of the running command that, interrupted and run again, it goes on from there."""
    click.get_current_context().meta[GOES_ON] = True


def open_database(
    path: Path,
    model: str | None = None,
    embedder: str | None = None,
    *,
    adapter_name: str | None = None,
    **options: Any,
) -> MemDB:
    """A database with the model, adapter and embedder that it records, loaded when first needed, or
    with those given; `options` as of `model_adapter.open_database`."""
    how = {**loading(), **embedder_loading(), **options}
    database: MemDB = adapter().open_database(
        path, model=model, adapter=adapter_name, embedder=embedder, notify=notify, **how
    )
    return database


@contextmanager
def busy(what: str) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal while something takes seconds; yields what stops it early."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    with console.status(what) as status:
        yield status.stop


def standard_input() -> BinaryIO:
    """Standard input's bytes."""
    if sys.stdin is None:  # closed, as by `<&-`
        raise click.UsageError("there is no standard input")
    return sys.stdin.buffer


def print_json(value: object) -> None:
    """One object on one line."""
    click.echo(json.dumps(value, ensure_ascii=False))


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as JSON values, without its memory."""
    worded = {} if hit.keyword_score is None else {"keyword_score": round(hit.keyword_score, 4)}
    return {
        "score": round(hit.score, 4),
        **worded,
        "document": hit.reference.document_id,
        "reference": hit.reference.id,
        "version": hit.reference.version,
        "ordinal": hit.reference.ordinal,
        "text": hit.reference.content,
        "metadata": hit.metadata,
    }


def document_json(document: StoredDocument) -> dict[str, Any]:
    """A document as JSON values; a line of these can be ingested again but for the counts."""
    return {
        "id": document.id,
        "version": document.version,
        "text": document.text,
        "metadata": document.metadata,
        "references": len(document.references),
        "warm": document.warm,
    }


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def one_line(text: str, width: int) -> str:
    """A text's beginning on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


_CONDITION = re.compile(r"(.+?)( in |!=|>=|<=|=|>|<)(.*)", re.DOTALL)
_OPERATORS = {
    "=": "$eq",
    "!=": "$ne",
    " in ": "$in",
    ">=": "$gte",
    "<=": "$lte",
    ">": "$gt",
    "<": "$lt",
}


def parse_where(values: tuple[str, ...]) -> dict[str, Any]:
    """`--where` options as a metadata filter that means what all of them do. What begins with `{`
    is a filter in JSON. Of the others a value is JSON if it reads as JSON, else text."""
    filters = [_json_filter(item) for item in values if item.lstrip().startswith("{")]
    tests = _parse_conditions(item for item in values if not item.lstrip().startswith("{"))
    if not filters:
        return tests
    parts = [tests, *filters] if tests else filters
    return parts[0] if len(parts) == 1 else {"$and": parts}


def _json_filter(text: str) -> dict[str, Any]:
    try:
        where: dict[str, Any] = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise click.BadParameter("a filter is nested too deep", param_hint="--where") from error
    except ValueError as error:
        raise click.BadParameter(
            f"{one_line(text, 80)!r} begins with '{{', so it is to be a filter in JSON; {error}",
            param_hint="--where",
        ) from error
    return where


def _each_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of two members of one name Python would drop one in silence."""
    names = [name for name, _ in members]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the name {name!r} is there twice in one object")
    return dict(members)


def _parse_conditions(items: Iterable[str]) -> dict[str, Any]:
    """Conditions `KEY=VALUE` as a filter."""
    where: dict[str, dict[str, Any]] = {}
    for item in items:
        found = _CONDITION.fullmatch(item)
        if found is None:
            raise click.BadParameter(
                f"{item!r} is not of the form KEY=VALUE (or !=, >=, <=, >, <, in), nor a filter in "
                "JSON",
                param_hint="--where",
            )
        key, operator = found[1], _OPERATORS[found[2]]
        if not found[3].strip() and operator != "$eq":  # a variable of a shell that was not set
            raise click.BadParameter(
                f"{item!r} compares with nothing; for the empty text write {key}{found[2]}'\"\"'",
                param_hint="--where",
            )
        tests = where.setdefault(key, {})
        if operator in tests:  # both can't fit, and `delete` must not take half of what was said
            raise click.BadParameter(
                f"the key {key!r} is given twice with {found[2].strip()!r}", param_hint="--where"
            )
        try:
            tests[operator] = json.loads(found[3])
        except RecursionError as error:
            raise click.BadParameter(
                f"the value of {key!r} is nested too deep", param_hint="--where"
            ) from error
        except ValueError:
            tests[operator] = found[3]
    return where


def parse_metadata(text: str | None) -> dict[str, Any] | None:
    """The value of a `--metadata` option."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--metadata") from error
    except RecursionError as error:
        raise click.BadParameter("nested too deep", param_hint="--metadata") from error
    if not isinstance(value, dict):
        raise click.BadParameter("not a JSON object", param_hint="--metadata")
    return value


key_option = click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="NAME",
    help="A metadata key to index for --where; may be given again.",
)
if_version_option = click.option(
    "--if-version", type=int, help="Only if the document is at this version; else nothing is done."
)
where_option = click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Documents whose metadata fits: KEY=VALUE, KEY>=VALUE (or <=, >, <, !=), or "
    "'KEY in [..]'; given again, all must fit. A value is JSON where it reads as JSON, else text: "
    "year=2020 is a number, year='\"2020\"' is text. author.name is the key name "
    "of the object under author. Or a whole filter in JSON, which may ask more: "
    """'{"$or": [{"year": 2020}, {"tag": {"$exists": false}}]}'.""",
)
