"""Conversations of two turns: does the last question find its document, with the first turn before
it and without?

First somebody asks about one paragraph and gets its first sentences as the answer, then about
another. What is looked up for the whole conversation is compared with what is found for the last
message alone. And for a last message that only goes on ("Why?"), does the first document come?
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memdb import Document, Framing, MemDB, Progress
from model_adapter import create_database, generate, open_database
from model_adapter.evaluation import Bootstrap, Question
from model_adapter.evaluation.figures import listed
from model_adapter.models.embedder import SentenceEmbedder
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Message, default_framing

_LONG = 48  # tokens of the first answer, at least
_BATCH = 8  # conversations side by side
_FOLLOWING = (
    "Why?",
    "When?",
    "How many?",
    "Where was that?",
    "And when was it built?",
    "What else do you know about it?",
    "Could you tell me more about this?",
    "Who were they and what did they do?",
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Conversation:
    """Two turns, of which the second is still to be answered.

    Attributes:
        first: a question.
        said: the answer to it.
        last: a question about another document.
        document: that answers it.
        before: the document that the first turn is about.
    """

    first: str
    said: str
    last: str
    document: str
    before: str

    def prompt(self, framing: Framing, last: str | None = None) -> str | list[Message]:
        """What `generate` takes; with another last question, if one is given."""
        last = self.last if last is None else last
        if framing == "plain":
            return f"Question: {self.first}\nAnswer: {self.said}\nQuestion: {last}\nAnswer:"
        return [
            {"role": "user", "content": self.first},
            {"role": "assistant", "content": self.said},
            {"role": "user", "content": last},
        ]


def conversations(
    documents: Mapping[str, Document],
    asked: Sequence[Question],
    tokens: Callable[[str], Sequence[int]],
    number: int,
    seed: int = 0,
) -> list[Conversation]:
    """Conversations about documents that are drawn by seed; fewer where there are fewer questions.

    Args:
        documents: the corpus.
        asked: questions on it.
        tokens: of a text.
        number: how many.
        seed: the same one draws the same.
    """
    said = {key: _beginning(document.text, tokens) for key, document in documents.items()}
    firsts = [one for one in asked if said[one.document]]
    random = np.random.default_rng(seed)
    found = []
    for place in random.permutation(len(asked))[:number]:
        last = asked[place]
        others = [one for one in firsts if one.document not in last.documents]
        if others:
            first = others[random.integers(len(others))]
            about = said[first.document]
            found.append(Conversation(first.text, about, last.text, last.document, first.document))
    return found


def _beginning(text: str, tokens: Callable[[str], Sequence[int]]) -> str:
    """The first sentences, of at least 48 tokens; empty where the text has fewer."""
    said = ""
    for sentence in _SENTENCE.split(text.strip()):
        said = f"{said} {sentence}".strip()
        if len(tokens(said)) >= _LONG:
            return said
    return ""


def looked_up(db: MemDB, prompts: Sequence[str | list[Message]]) -> list[str]:
    """For each prompt the document of the best hit that its answer begins with: what `generate`
    retrieves last before it says anything."""
    answers = generate(prompts, db, max_new_tokens=1)
    return [answer.chunks[-1].retrieval.hits[0].reference.document_id for answer in answers]


def measure(
    corpus: Path,
    documents: Mapping[str, Document],
    asked: Sequence[Question],
    model: LanguageModel,
    embedder: SentenceEmbedder,
    number: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """How often the right document is found first.

    Args:
        corpus: the file.
        documents: what it holds.
        asked: questions on it.
        model: that generates.
        embedder: of references and queries.
        number: of conversations.
        folder: for the database; it is made if it is not there.
        progress: told of the work.

    Returns:
        `whole`, `last` (shares of conversations), their `ratio`, and `following` (the first
        document, for a last message that only goes on), each with its interval, and `n`.
    """
    framing = default_framing(model)
    if not folder.exists():
        making = folder.with_name("making")
        shutil.rmtree(making, ignore_errors=True)  # what an interruption left half made
        # What is found does not depend on what memories hold: those of one layer take no time.
        with create_database(
            making,
            model=model,
            embedder=embedder,
            framing=framing,
            layers=(0,),
            selection="paper",
            codec="int8",
        ) as db:
            db.ingest(corpus, progress=progress)
        making.rename(folder)
    found = conversations(documents, asked, model.tokens, number)
    whole: list[bool] = []
    following: list[bool] = []
    with open_database(folder, model=model, embedder=embedder) as db:
        alone = [
            one.hits[0].reference.document_id == talk.document
            for talk, one in zip(
                found,
                db.retrieve_batch([talk.last for talk in found], 1, memories=False),
                strict=True,
            )
        ]
        for start in range(0, len(found), _BATCH):
            progress("conversations", start, len(found))
            batch = found[start : start + _BATCH]
            first = looked_up(db, [talk.prompt(framing) for talk in batch])
            whole += [key == talk.document for key, talk in zip(first, batch, strict=True)]
            goes_on = [
                talk.prompt(framing, _FOLLOWING[(start + number) % len(_FOLLOWING)])
                for number, talk in enumerate(batch)
            ]
            first = looked_up(db, goes_on)
            following += [key == talk.before for key, talk in zip(first, batch, strict=True)]
    progress("conversations", len(found), len(found))
    said = {"whole": whole, "last": alone, "following": following}
    columns = {name: np.array(values, np.float64) for name, values in said.items()}
    bootstrap = Bootstrap(columns, 0)
    ratio = bootstrap.figure(lambda means: means["whole"] / means["last"])
    figures = {name: bootstrap.mean(name) for name in columns}
    return {"n": len(found), **listed({**figures, "ratio": ratio})}
