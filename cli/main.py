"""`memdb`: the command line's entry point."""

from __future__ import annotations

from typing import Any

import click

from cli.commands import COMMANDS
from cli.common import GOES_ON, one_line
from memdb import MemDBError, __version__


class _UserError(click.ClickException):
    """A mistake that the user can mend: its message alone, and exit code 2."""

    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MemDBError as error:
            raise _UserError(str(error)) from error
        except BrokenPipeError:  # `memdb list | head`: click ends quietly
            raise
        except (OSError, UnicodeError) as error:  # of the machine, where no one saw it coming
            raise _UserError(_in_a_line(error)) from error
        except KeyboardInterrupt:
            written = "; what was written stays, and the same command goes on from there"
            click.echo("\ninterrupted" + (written if ctx.meta.get(GOES_ON) else ""), err=True)
            ctx.exit(130)  # 128 + SIGINT, as shells have it

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a user's way through them


def _in_a_line(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        file = "" if error.filename is None else f": '{one_line(str(error.filename), 100)}'"
        return error.strerror + file
    return one_line(str(error), 300)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memdb")
def main() -> None:
    """A database for explicit memory: text goes in, and a language model remembers it.

    \b
    Begin with:
        memdb ingest corpus.jsonl
        memdb query "..."
        memdb generate "..."
    """


for command in COMMANDS:
    main.add_command(command)
