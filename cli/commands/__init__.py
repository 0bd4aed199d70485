"""The commands, in the order in which `memdb --help` lists them."""

from __future__ import annotations

import click

from cli.commands.backup import backup, restore
from cli.commands.calibrate import calibrate
from cli.commands.chat import chat
from cli.commands.compact import compact
from cli.commands.delete import delete
from cli.commands.eval import evaluate
from cli.commands.exchange import export_database, import_export
from cli.commands.generate import generate
from cli.commands.get import get
from cli.commands.head_weights import head_weights
from cli.commands.heads import heads
from cli.commands.index import index
from cli.commands.ingest import ingest
from cli.commands.init import init
from cli.commands.inspect import inspect
from cli.commands.list import list_documents
from cli.commands.migrate import migrate
from cli.commands.model import model
from cli.commands.namespace import namespace
from cli.commands.predictor import predictor
from cli.commands.query import query
from cli.commands.recode import recode
from cli.commands.repair import repair
from cli.commands.rewrite import rewrite
from cli.commands.stats import stats
from cli.commands.train import train
from cli.commands.update import update
from cli.commands.verify import verify
from cli.commands.warm import warm

COMMANDS: tuple[click.Command, ...] = (
    model,
    init,
    ingest,
    warm,
    query,
    generate,
    chat,
    get,
    inspect,
    list_documents,
    update,
    delete,
    stats,
    index,
    namespace,
    evaluate,
    train,
    heads,
    calibrate,
    head_weights,
    predictor,
    rewrite,
    recode,
    export_database,
    import_export,
    verify,
    repair,
    compact,
    backup,
    restore,
    migrate,
)
