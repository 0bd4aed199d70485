"""Head weights by measuring: how much the scores of each head say about what answers lose.

A selection's scores tell which pairs of one head count more. Between heads they are off: a head
whose values are long, or that looks hard at a few tokens while the text is repeated, is given
pairs that answers do not need. What an answer loses without a pair is, to first order, the gradient
of its negative log-likelihood with respect to a bias on the pair's attention scores. One pass
backwards gives that of all pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdb import Framing, Progress, no_progress
from model_adapter.evaluation.likelihood import likelihoods
from model_adapter.generation.weighing_constants import identity
from model_adapter.models import observing
from model_adapter.models.language_model import LanguageModel
from model_adapter.selections import DEFAULT_SELECTION
from model_adapter.training.asking import Asking
from model_adapter.training.cloze import Clozes
from model_adapter.training.corpus import Corpus
from model_adapter.training.examples import Examples, Framed, Row
from model_adapter.training.passages import Draw
from model_adapter.training.passes import read_behind, targets
from model_adapter.training.recipe import Recipe
from model_adapter.writing.head_weight_file import UNWEIGHTED, HeadWeights
from model_adapter.writing.kept_pairs import Choice, Kept, kept_pairs
from model_adapter.writing.writer import Writer

_SHARE = 8  # of a head's pairs, one in so many counts: those that a budget is about


def measure_head_weights(
    model: LanguageModel,
    corpus: Corpus,
    path: Path | None = None,
    *,
    framing: Framing | None = None,
    layers: Sequence[int] | None = None,
    selection: str = DEFAULT_SELECTION,
    passages: int = 48,
    examples: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HeadWeights:
    """Measure the weights of heads, or go on with what was interrupted.

    Args:
        model: with its adapter, if it has one.
        corpus: the calibration text; see `model_adapter.training.read`.
        path: the file that it is written to; `Writer(head_weights=path)` takes it. The model's own
            questions lie in a file beside it. None: nothing is kept but what is returned.
        framing: see `Writer`, as the others to `selection`.
        passages: references to measure by, each by itself, with all its pairs.
        examples: answers about each.
        seed: which they are.
        progress: told of the work.

    Raises:
        InvalidInputError: an option is wrong, or the file holds another measurement.
        StorageError: the file cannot be written.
    """
    writer = Writer(
        model, framing=framing, layers=layers, selection=selection, head_weights=UNWEIGHTED
    )
    shape = writer.shape
    recipe = Recipe(
        steps=1,
        gold=1,
        references=(1, 1),
        examples=examples,
        framings=(shape.framing,),
        budgets=(writer.selection.budget,),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = HeadWeights(Path(folder) / "weights.jsonl" if path is None else path)
        file.begin(
            {
                "model": model.name,
                "fingerprint": model.fingerprint,
                "adapter": identity(model)[1],
                "framing": shape.framing,
                "selection": writer.selection.name,
                "corpus": corpus.fingerprint,
                "passages": passages,
                "examples": examples,
                "seed": seed,
                "rows": [(layer, h) for layer in shape.layers for h in range(shape.kv_heads)],
            }
        )
        if len(file) < passages:
            beside = file.path.with_name(f"{file.path.stem}-questions.jsonl")
            asking = Asking(model, corpus, beside, seed)
            draw = _drawing(corpus, asking, Framed(model, writer.frame), recipe, passages, progress)
            while len(file) < passages:
                progress("measuring", len(file), passages)
                passage = draw.passage(len(file))
                file.add(_measured(model, writer, passage.gold[0].tokens, passage.rows))
        progress("measuring", passages, passages)
        return file


def _drawing(
    corpus: Corpus, asking: Asking, framed: Framed, recipe: Recipe, passages: int, told: Progress
) -> Draw:
    """Draws passages that the model itself asks about, as well as they are asked about by rules."""
    wanted = asking.chosen(passages)
    made = asking.questions(passages, told)
    texts = [reference.text for reference in corpus.references]
    chosen = {(reference.document, reference.ordinal) for reference in wanted}
    documents = tuple(
        tuple(r for r in references if (r.document, r.ordinal) in chosen)
        for references in corpus.documents
    )
    these = Corpus(corpus.names, documents, corpus.questions)
    return Draw(
        these, Examples(corpus, Clozes(texts), made), {framed.frame.framing: framed}, recipe
    )


def _measured(
    model: LanguageModel, writer: Writer, reference: Sequence[int], rows: Sequence[Row]
) -> dict[str, Any]:
    """A line of the file."""
    tokens = list(reference)
    with torch.no_grad():
        scores = writer.scores([tokens])[0]
        prefix = model.prefix(writer.shape.prefix, "write")
        pairs = observing.encode(model.writing, prefix, [tokens], writer.shape.layers)
        kept = kept_pairs(*pairs, [Choice(torch.ones_like(scores, dtype=torch.bool))])
    nll, gradients = pair_gradients(model, writer, kept, rows)
    lost = gradients.neg().clamp_min(0).mean(0).view_as(scores)
    best = scores.topk(max(1, len(tokens) // _SHARE), dim=1).indices
    return {
        "answers": len(rows),
        "nll": round(nll, 6),
        "scores": _numbers(scores.gather(1, best).sum(1)),
        "gradients": _numbers(lost.gather(1, best).sum(1)),
    }


def pair_gradients(
    model: LanguageModel, writer: Writer, kept: Kept, rows: Sequence[Row]
) -> tuple[float, Tensor]:
    """What a bias on each pair does to each answer.

    Args:
        model: that reads.
        writer: whose memories.
        kept: their pairs.
        rows: prompts and answers, read side by side behind them.

    Returns:
        The answers' mean NLL, in nats a token, and the derivatives of each one's: (rows, pairs)
        float32, in nats a token for one nat of a pair's attention scores.
    """
    with torch.enable_grad():
        biases = torch.zeros(len(rows), len(kept.rows), device=model.device, requires_grad=True)
        prefix = model.prefix(writer.shape.prefix)
        logits = read_behind(
            model.model, prefix, kept, writer.shape, rows, prompts=False, biases=biases
        )
        wanted = targets(rows, prompts=False)
        each = likelihoods(logits, [token for _, token, _ in wanted])
        of = torch.tensor([row for row, _, _ in wanted], device=each.device)
        counts = of.bincount(minlength=len(rows))
        nll = each.new_zeros(len(rows)).index_add(0, of, each) / counts
        # A row sees its own biases alone, so the sum's gradients are those of each answer.
        (gradients,) = torch.autograd.grad(nll.sum(), biases)
    return float(nll.detach().mean()), gradients


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
