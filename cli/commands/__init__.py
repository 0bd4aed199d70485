"""Which commands there are, in the order in which `memdb --help` lists them.

A command's file is loaded when the command is asked for: some take long, and `--help` needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import click


@dataclass(frozen=True)
class Entry:
    """A command before it is loaded.

    Attributes:
        name: what users call it.
        help: in a line.
        where: its module in `cli.commands`, and its name there; default: as `name`.
    """

    name: str
    help: str
    where: str | None = None

    def load(self) -> click.Command:
        """The command itself."""
        module, _, name = (self.where or self.name).partition(":")
        command: click.Command = getattr(
            import_module(f"cli.commands.{module}"), name or module.replace("-", "_")
        )
        return command


GROUPS = {
    "Remember and answer": (
        Entry("ingest", "Documents in: files and folders."),
        Entry("query", "The references nearest to a text."),
        Entry("generate", "An answer with explicit memories."),
        Entry("chat", "A conversation with explicit memories."),
    ),
    "Documents": (
        Entry("get", "One document."),
        Entry("list", "All documents, or those with some metadata.", "list:list_documents"),
        Entry("update", "Change a document's text or metadata."),
        Entry("delete", "Documents out, by id or by metadata."),
        Entry("inspect", "Which tokens a memory keeps, and what an answer reads."),
        Entry("stats", "Counts, bytes, model and embedder."),
    ),
    "The database": (
        Entry("init", "Make a database for one model."),
        Entry("warm", "Write the memories that are not there yet."),
        Entry("index", "Build the search index; index metadata keys."),
        Entry("namespace", "Collections in one database that do not see each other."),
        Entry("rewrite", "Memories anew, for another model or selection."),
        Entry("recode", "Memories under another codec, without the model."),
        Entry("export", "Everything as JSON lines and safetensors.", "exchange:export_database"),
        Entry(
            "import",
            "An export, or embeddings and memories computed elsewhere.",
            "exchange:import_export",
        ),
    ),
    "Care": (
        Entry("verify", "Is everything as it should be?"),
        Entry("repair", "Mend what `verify` finds."),
        Entry("compact", "Give back the space of what was deleted; it is gone then."),
        Entry("backup", "A copy of the whole database, while it is in use."),
        Entry("restore", "Put a backup in the place of a database.", "backup:restore"),
        Entry("migrate", "Bring a database of an older release up to date."),
    ),
    "Models, measured and trained": (
        Entry("model", "Models by name: what there is, and getting them."),
        Entry("eval", "What memories are worth: against text in the prompt.", "eval:evaluate"),
        Entry("calibrate", "How much memories count, measured on this text."),
        Entry("train", "An adapter by which a model writes better memories."),
        Entry("heads", "Memory heads: those that earn their bytes on a text."),
        Entry(
            "head-weights",
            "How much the scores of each head count, measured on a text.",
            "head_weights",
        ),
        Entry("predictor", "Which key-values count, foreseen: writes twice as fast."),
    ),
}

COMMANDS: tuple[Entry, ...] = tuple(entry for entries in GROUPS.values() for entry in entries)
