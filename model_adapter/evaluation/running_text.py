"""Running text: how much memories help to say how a text goes on (paper, 3.1: 5 for 64 tokens).

Of a document, the first 64 tokens are the context and the next ones, up to 64, are the target. The
memories are those of the 5 references nearest to the context, without those of the document itself
(one that begins within the target overlaps it by less than any threshold), and without those that
say what stands in context and target (formula (6), threshold 2/3): so none holds the answer. The
context is read behind them as `generate` would; without memories, the same tokens are read behind
the beginning of a text or of the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from memdb import Document, MemDB, PackedMemories, Progress, Reference
from model_adapter.attention.context import Context, Stretch
from model_adapter.attention.weighing import Weighing
from model_adapter.evaluation.bootstrap import Bootstrap, Interval
from model_adapter.evaluation.folder import Results
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.evaluation.questions import spread
from model_adapter.evaluation.scoring import batches
from model_adapter.evaluation.settings import SEEN
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame
from model_adapter.prompts.overlap import overlaps

_CHUNK = 64
_OVERLAP = 2 / 3


@dataclass(frozen=True)
class RunningText:
    """Perplexities of running text.

    Attributes:
        documents: whose second chunk was read.
        tokens: of the targets, all together.
        perplexity_without: exp of the mean negative log-likelihood of these tokens, without
            memories.
        perplexity_with: likewise, with memories.
        ratio: the second over the first; below 1, memories help.
        ratio_interval: 95 %, by bootstrap over documents.
        dropped: references that were passed over, since they are of the document or say the same.
    """

    documents: int
    tokens: int
    perplexity_without: float
    perplexity_with: float
    ratio: float
    ratio_interval: Interval
    dropped: int

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return {**asdict(self), "ratio_interval": list(self.ratio_interval)}


@dataclass(frozen=True)
class _Piece:
    """A document's context and target, as token ids."""

    key: str
    context: list[int]
    target: list[int]


def running_text(
    database: MemDB,
    model: LanguageModel,
    frame: Frame,
    documents: Mapping[str, Document],
    limit: int,
    seed: int,
    weighing: Weighing,
    results: Results,
    progress: Progress,
) -> RunningText | None:
    """Read on in documents with and without memories.

    Args:
        database: the corpus with its memories.
        model: that reads.
        frame: of the database.
        documents: the corpus.
        limit: at most so many documents of more than 64 tokens, spread over the corpus.
        seed: of the bootstrap.
        weighing: how memories count.
        results: keeps what was measured.
        progress: told of the work.

    Returns:
        None where no document is long enough, or none is wanted.
    """
    pieces = _pieces(model, documents) if limit else []
    pieces = [pieces[place] for place in spread(len(pieces), limit)]
    if not pieces:
        return None
    for places in batches([2 * _CHUNK] * len(pieces)):
        progress("running text", places.start, len(pieces))
        batch = [pieces[place] for place in places]
        if any(results.get(piece.key) is None for piece in batch):
            results.add(_measured(database, model, frame, batch, weighing))
    progress("running text", len(pieces), len(pieces))
    rows = [row for piece in pieces if (row := results.get(piece.key)) is not None]
    return _summary(rows, seed)


def _pieces(model: LanguageModel, documents: Mapping[str, Document]) -> list[_Piece]:
    found = []
    for key, document in documents.items():
        tokens = model.tokens(document.text)
        context, target = tokens[:_CHUNK], tokens[_CHUNK : 2 * _CHUNK]
        # A context of blanks is no query.
        if target and model.tokenizer.decode(context, skip_special_tokens=True).strip():
            found.append(_Piece(key, context, target))
    return found


def _measured(
    database: MemDB,
    model: LanguageModel,
    frame: Frame,
    pieces: Sequence[_Piece],
    weighing: Weighing,
) -> dict[str, dict[str, Any]]:
    """By document: summed negative log-likelihoods, and what was dropped."""
    dropped = [0] * len(pieces)
    texts = [[*piece.context, *piece.target] for piece in pieces]

    def accept(number: int, reference: Reference) -> bool:
        said = reference.document_id == pieces[number].key or overlaps(
            texts[number], model.tokens(reference.content), _OVERLAP
        )
        dropped[number] += said
        return not said

    contexts = [piece.context for piece in pieces]
    found = database.retrieve_batch(contexts, SEEN, accept=accept)
    memories = [weighing.packed(one, database.shape) for one in found]
    prefix = frame.prefix
    gap = model.tokens(frame.gap)
    start = len(prefix) + database.shape.reference_length
    context = Context(model, prefix, start, batch=len(pieces), capacity=4 * _CHUNK)
    with_memories = _read(context, [[*gap, *tokens] for tokens in contexts], pieces, memories)
    # At its own first token a model without a beginning of text has nothing to go by.
    context = Context(model, frame.head, batch=len(pieces), capacity=4 * _CHUNK)
    without = _read(context, contexts, pieces, [None] * len(pieces))
    return {
        piece.key: {
            "tokens": len(piece.target),
            "without": before,
            "with": after,
            "dropped": number,
        }
        for piece, before, after, number in zip(
            pieces, without, with_memories, dropped, strict=True
        )
    }


def _read(
    context: Context,
    before: Sequence[Sequence[int]],
    pieces: Sequence[_Piece],
    memories: Sequence[PackedMemories | None],
) -> list[float]:
    """Summed negative log-likelihoods of the targets behind their contexts."""
    first = context.read(
        [[Stretch(tokens, packed)] for tokens, packed in zip(before, memories, strict=True)]
    )
    rest = context.read(
        [[Stretch(piece.target, packed)] for piece, packed in zip(pieces, memories, strict=True)],
        every=True,
    )
    return [
        float(likelihoods(torch.cat([one, more[:-1]]), piece.target).sum())
        for one, more, piece in zip(first, rest, pieces, strict=True)
    ]


def _summary(rows: Sequence[Mapping[str, Any]], seed: int) -> RunningText:
    names = ("tokens", "without", "with")
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in names}
    tokens = columns["tokens"].sum()
    ratio, interval = Bootstrap(columns, seed).figure(
        lambda means: np.exp((means["with"] - means["without"]) / means["tokens"])
    )
    assert ratio is not None
    assert interval is not None
    return RunningText(
        documents=len(rows),
        tokens=int(tokens),
        perplexity_without=float(np.exp(columns["without"].sum() / tokens)),
        perplexity_with=float(np.exp(columns["with"].sum() / tokens)),
        ratio=ratio,
        ratio_interval=interval,
        dropped=sum(row["dropped"] for row in rows),
    )
