"""`memdb`: the command line's entry point."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import click

from cli.commands import COMMANDS, GROUPS

# Before torch is loaded; see model_adapter/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Their talk while a model is loaded is not the user's.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# What is imported makes a million objects that stay. To look through them after every 700 new ones
# (Python's default) takes a fifth of the time to an answer's first word.
gc.set_threshold(50_000)


class _UserError(click.ClickException):
    """A mistake that the user can mend: its message alone, and exit code 2."""

    exit_code = 2


class _Group(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = [entry for entry in COMMANDS if entry.name == cmd_name]
        return found[0].load() if found else None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [entry.name for entry in COMMANDS]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(entry.name) for entry in COMMANDS)
        for title, entries in GROUPS.items():
            with formatter.section(title):
                rows = [(entry.name.ljust(width), entry.help) for entry in entries]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        from cli.common import GOES_ON, one_line, why_no_adapter
        from memdb import MemDBError

        if logging := sys.modules.get("transformers.utils.logging"):  # it was there before us
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        try:
            return super().invoke(ctx)
        except MemDBError as error:
            raise _UserError(str(error)) from error
        except ImportError as error:
            raise _UserError(why_no_adapter(error)) from error
        except BrokenPipeError:  # `memdb list | head`: click ends quietly
            raise
        except (OSError, UnicodeError) as error:  # of the machine, where no one saw it coming
            if isinstance(error, OSError) and error.strerror:
                file = error.filename
                where = "" if file is None else f": '{one_line(str(file), 100)}'"
                raise _UserError(error.strerror + where) from error
            raise _UserError(one_line(str(error), 300)) from error
        except KeyboardInterrupt:
            written = "; what was written stays, and the same command goes on from there"
            click.echo("\ninterrupted" + (written if ctx.meta.get(GOES_ON) else ""), err=True)
            ctx.exit(130)  # 128 + SIGINT, as shells have it


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from memdb import __version__

        click.echo(f"memdb, version {__version__}")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A database for explicit memory: text goes in, and a language model remembers it.

    \b
    Begin with:
        memdb ingest corpus.jsonl
        memdb query "..."
        memdb generate "..."
    """
