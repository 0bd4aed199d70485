"""`memdb chat`: a conversation over a database."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    adapter,
    busy,
    counted,
    db_option,
    example,
    notify,
    open_database,
    read_only_option,
    standard_input,
)
from cli.options import answer_options, parsed, verbose_option
from cli.sources import HEADING, short_id, source_lines, timing_line
from memdb import DocumentExistsError, InvalidInputError, MemDBError, UnknownDocumentError

if TYPE_CHECKING:  # it loads torch
    from model_adapter import Chat, Source, Stream

_HELP = """\
  /remember TEXT  write a text into the database; the next answer may use it
  /forget ID      delete a document; the beginning of an id that was shown is enough, and "last"
                  is what was remembered last
  /sources        what the last answer rests on
  /help           this
  /exit           end; so does Ctrl-D
Anything else is said to the model; after a blank, also what begins with /.
Ctrl-C stops its answer."""


@click.command(
    epilog=example(
        "memdb chat",
        'memdb chat --window 512 --remember-turns --system "Answer in one sentence."',
        "cat questions.txt | memdb chat",
    ),
)
@db_option
@click.option(
    "--window",
    metavar="TOKENS",
    type=int,
    default=1024,
    show_default=True,
    help="Most tokens of the conversation that are kept in the prompt; the oldest turns leave.",
)
@click.option(
    "--remember-turns", is_flag=True, help="Write turns that leave into the database, as memories."
)
@click.option("--system", metavar="TEXT", help="What is said to the model before everything.")
@click.option("--no-memory", is_flag=True, help="For comparison: the model alone.")
@verbose_option
@read_only_option
@answer_options
def chat(
    path: Path,
    window: int,
    remember_turns: bool,
    system: str | None,
    no_memory: bool,
    verbose: bool,
    read_only: bool,
    model: str | None,
    adapter_name: str | None,
    embedder: str | None,
    exact: bool,
    **options: Any,
) -> None:
    """Talk with the model; /help lists what else can be typed.

    From a pipe each line is a message: answers go to standard output, all else to standard error.
    """
    at_terminal = standard_input().isatty()
    options = parsed(options)
    options["mode"] = "none" if no_memory else "memory"
    with (
        busy("loading the model") as loaded,
        open_database(
            path, model, embedder, adapter_name=adapter_name, exact=exact, read_only=read_only
        ) as database,
    ):
        conversation = adapter().Chat(
            database,
            window=window,
            remember_turns=remember_turns,
            system=system,
            cite=not no_memory,
            **options,
        )
        loaded()
        with conversation:
            if at_terminal:
                documents = counted(database.stats()["documents"], "document")
                notify(f"{documents} in {path}; /help lists what can be typed")
            _Session(conversation, verbose).run(_typed() if at_terminal else _piped())


class _Session:
    """What is typed, or comes from a pipe, line by line: messages and commands."""

    def __init__(self, chat: Chat, verbose: bool) -> None:
        self._chat = chat
        self._verbose = verbose
        self._answer: Stream | None = None  # the last one
        self._commands: dict[str, Callable[[str], None]] = {
            "/remember": self._remember,
            "/forget": self._forget,
            "/sources": self._sources,
            "/help": lambda _: notify(_HELP),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Until /exit, the last line, or Ctrl-C while nothing is being done. A mistake is a line,
        and does not end it."""
        while True:
            try:
                line = next(lines, "/exit")
            except KeyboardInterrupt:
                notify("")
                return
            if line.strip() == "/exit":
                return
            try:
                self._do(line)
            except KeyboardInterrupt:
                notify("(stopped)")
            except MemDBError as error:
                notify(" ".join(str(error).split()))

    def _do(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if line.startswith("/"):
            command = self._commands.get(name)
            if command is None:
                raise InvalidInputError(f"there is no command {name}; /help lists them")
            command(rest.strip())
        elif name:
            self._say(line)

    def _say(self, text: str) -> None:
        self._answer = answer = self._chat.say(text)
        began = False
        try:
            with busy("remembering") as stop:
                for piece in answer:
                    stop()
                    click.echo(piece, nl=False)
                    began = True
        except BaseException:
            answer.close()
            if began:
                click.echo()
            raise
        click.echo()
        if self._verbose:
            if sources := answer.result.sources():
                self._show(sources)
            notify(timing_line(answer.result))

    def _remember(self, text: str) -> None:
        if not text:
            raise InvalidInputError("/remember needs a text")
        try:
            with busy("writing its memory"):
                document = self._chat.remember(text)
        except DocumentExistsError as error:
            raise InvalidInputError("that is remembered already") from error
        notify(f"remembered as {short_id(document.id)}")

    def _forget(self, given: str) -> None:
        if not given:
            raise InvalidInputError("/forget needs the id of a document")
        id = given
        if given == "last" and self._chat.remembered:
            id = self._chat.remembered[-1]
        try:
            self._chat.forget(id)
        except UnknownDocumentError:
            id = self._begun_with(given)
            self._chat.forget(id)
        notify(f"{short_id(id)} is forgotten")

    def _begun_with(self, given: str) -> str:
        """The one id that was shown and begins like this; else what was given."""
        hits = [] if self._answer is None else self._answer.result.sources()
        shown = {*self._chat.remembered, *(hit.reference.document_id for hit in hits)}
        found = sorted(id for id in shown if id.startswith((given, f"sha256:{given}")))
        if len(found) > 1:
            raise InvalidInputError(f"{given!r} is the beginning of {' and '.join(found)}")
        return found[0] if found else given

    def _sources(self, _: str) -> None:
        if self._answer is None:
            raise InvalidInputError("there was no answer yet")
        sources = self._answer.result.sources()
        if not sources:
            raise InvalidInputError("the last answer rests on no memory")
        self._show(sources)

    @staticmethod
    def _show(sources: Sequence[Source]) -> None:
        notify("\n".join([HEADING, *source_lines(sources, short=True)]))


def _typed() -> Iterator[str]:
    """Lines of a terminal."""
    with suppress(ImportError):  # where it is there, `input` edits lines and recalls them with it
        import readline  # noqa: F401
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:  # a file: the answers alone go there
                click.echo("> ", nl=False, err=True)
                yield input()
        except EOFError:
            notify("")
            return
        except UnicodeDecodeError:
            notify("that is not UTF-8")


def _piped() -> Iterator[str]:
    """Lines of a pipe or a file."""
    for number, line in enumerate(standard_input(), 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            notify(f"line {number} is not UTF-8 (byte {error.start + 1})")
