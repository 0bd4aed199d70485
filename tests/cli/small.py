"""A database of facts with a small model, for commands whose answers need make no sense."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from model_adapter import SentenceEmbedder, create_database
from tests.helpers import FACTS, SAMPLE, tiny_model, without_ends

#: Documents that nobody asks about.
OTHERS = (
    "A recipe: flour, butter, sugar, and an hour in the oven.",
    "The train leaves at nine, and arrives when it arrives.",
    "Seven times eight is fifty-six.",
)


def make_database(folder: Path, embedder: SentenceEmbedder) -> None:
    """At `db` in this folder. The facts have their ids and ranks, and are warm but for the last;
    `long` has two references, and is cold as the others are. No answer ends by itself."""
    template, _ = _template(embedder)
    shutil.copytree(template, folder / "db")


def model_folder(embedder: SentenceEmbedder) -> str:
    """Where the model is."""
    return _template(embedder)[1]


_kept: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


@cache
def _template(embedder: SentenceEmbedder) -> tuple[str, str]:
    """The database, made once, and the model beside it."""
    _kept.append(tempfile.TemporaryDirectory(prefix="memdb-test-"))
    folder = Path(_kept[-1].name)
    model = without_ends(tiny_model(eos_token_id=None))
    model.name = str(folder / "model")
    model.model.save_pretrained(model.name)
    model.tokenizer.save_pretrained(model.name)
    with create_database(folder / "db", model=model, embedder=embedder) as database:
        for rank, fact in enumerate(FACTS):
            cold = rank == len(FACTS) - 1
            database.insert(fact.text, id=fact.id, metadata={"rank": rank}, cold=cold)
        for number, text in enumerate(OTHERS):
            database.insert(text, id=f"other {number}", cold=True)
        database.insert(SAMPLE, id="long", cold=True)
    return str(folder / "db"), model.name
