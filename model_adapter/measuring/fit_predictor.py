"""`fit_predictor`: what a plain pass sees of a token, fitted to what the token contributes.

For each head a ridge regression of the logarithm of contributions on `features`. The sums that it
takes are added up reference by reference, so memory does not grow with the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memdb import Framing, InvalidInputError, Progress, no_progress
from model_adapter.models.language_model import LanguageModel
from model_adapter.selections import Contribution, LayerView, PredictedContribution
from model_adapter.selections.predicted import LEAST, feature_count, features
from model_adapter.training.corpus import Corpus
from model_adapter.writing.head_weight_file import UNWEIGHTED
from model_adapter.writing.predictor import write_predictor, write_tensors
from model_adapter.writing.writer import Writer

#: Of features' variance, by which coefficients are held small.
_RIDGE = 3e-3

#: Of a head's scores, the best one of so many count: those that a budget is about.
_SHARE = 8

#: Of the references, one of so many is not fitted to: by these heads are put in proportion.
_HELD_OUT = 6

_LEAST_REFERENCES = 12


@dataclass(frozen=True)
class Fit:
    """A predictor that was fitted.

    Attributes:
        coefficients: (layers, kv heads, features + 1) float32.
        captured: of the contributions that the best eighth of all pairs has, how much the
            predictor's best eighth has; of references that it was not fitted to, the mean.
        held_out: how many these are. (They put the heads in proportion.)
    """

    coefficients: Tensor
    captured: float
    held_out: int


def fit_predictor(
    model: LanguageModel,
    corpus: Corpus,
    path: Path,
    *,
    framing: Framing | None = None,
    references: int = 96,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Fit:
    """Fit a predictor of contributions to a model, and write it to a file.

    Each reference is written by `contribution`, all layers. Interrupted, the same call goes on.

    Args:
        model: of its own weights: with an adapter, those without it are looked at.
        corpus: the text; see `model_adapter.training.read`.
        path: the file; `Writer(predictor=path)` takes it.
        framing: see `Writer`. The predictor serves both.
        references: that are drawn, at least 12; a sixth of them is not fitted to.
        seed: which they are.
        progress: told of the work.

    Raises:
        InvalidInputError: there are fewer than 12 references.
        UnsupportedModelError: the model's rotary embedding is of a kind that is not undone.
        StorageError: the file cannot be written.
    """
    writer = Writer(model, framing=framing, selection=Contribution.name, head_weights=UNWEIGHTED)
    every = [list(reference.tokens) for reference in corpus.references]
    references = min(references, len(every))
    if references < _LEAST_REFERENCES:
        raise InvalidInputError(
            f"a predictor is fitted to {_LEAST_REFERENCES} references or more, and there are "
            f"{references}: give more text"
        )
    drawn = random.Random(f"predictor {seed}").sample(every, references)
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "framing": writer.shape.framing,
        "corpus": corpus.fingerprint,
        "references": references,
        "seed": seed,
    }
    sums = _Sums.begun(writer, path.with_name(f".{path.name}.making"), about)
    # In the order of their lengths: a batch has references of about one.
    held_out = references // _HELD_OUT
    learned, judged = sorted(drawn[held_out:], key=len), sorted(drawn[:held_out], key=len)
    while sums.done < len(learned):
        progress("fitting", sums.done, references)
        sums.add(learned[sums.done : sums.done + writer.batch])

    def told(done: int) -> None:
        progress("fitting", len(learned) + done, references)

    fit = _judged(writer, sums.solved(), judged, told)
    write_predictor(path, fit.coefficients, {**about, "captured": round(fit.captured, 4)})
    sums.forget()
    return fit


def observed(
    writer: Writer, references: Sequence[list[int]], see: Callable[[LayerView, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Run references as the writer does, and show each layer with its contributions.

    Args:
        writer: with the selection `contribution`.
        references: token ids.
        see: shown each layer's view and its scores, (batch, kv heads, longest).

    Returns:
        Keys and values, (references, rows, longest, head_dim), of the model without an adapter.
    """
    assert isinstance(writer.selection, Contribution)
    model = writer.model
    sequences = [[*tokens, *writer.selection.suffix(model, tokens)] for tokens in references]
    lengths, ends = tuple(map(len, references)), tuple(map(len, sequences))
    keys, values = list[Tensor](), list[Tensor]()

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        view = LayerView(layer, query, key, value, lengths, ends, scaling)
        see(view, writer.selection.score(model, view))
        keys.append(key[:, :, view.reference])
        values.append(value[:, :, view.reference])

    model.observe(sequences, look, prefix=writer.shape.prefix)
    return torch.cat(keys, 1), torch.cat(values, 1)


class _Sums:
    """What the regressions of all heads take, of the references so far.

    Args:
        writer: by contribution.
        file: where they lie between the references.
        about: what they are of.
        tensors: `count` of tokens, and sums over them by (layer, kv head): of features `x`, of
            logarithms of contributions `y`, and of their products `xx` and `xy`; float64.
        done: references.
    """

    def __init__(
        self, writer: Writer, file: Path, about: Any, tensors: dict[str, Tensor], done: int
    ) -> None:
        self._writer, self._file, self._about, self._tensors = writer, file, about, tensors
        self.done = done

    @classmethod
    def begun(cls, writer: Writer, file: Path, about: dict[str, Any]) -> _Sums:
        """Those of an interrupted call, if they are of the same; else none."""
        heads, many = (writer.model.layers, writer.model.kv_heads), feature_count(writer.model)
        sizes: dict[str, tuple[int, ...]] = {"count": (), "x": (many,), "y": ()}
        sizes |= {"xx": (many, many), "xy": (many,)}
        tensors = {
            name: torch.zeros(() if name == "count" else (*heads, *size), dtype=torch.float64)
            for name, size in sizes.items()
        }
        there = suppress(FileNotFoundError, SafetensorError, LookupError, ValueError)
        with there, safe_open(file, "pt") as kept:
            said = kept.metadata() or {}
            if json.loads(said["about"]) == about:
                tensors = {name: kept.get_tensor(name) for name in tensors}
                return cls(writer, file, about, tensors, int(said["done"]))
        return cls(writer, file, about, tensors, 0)

    def add(self, references: Sequence[list[int]]) -> None:
        """Look at some references more."""
        tensors, model = self._tensors, self._writer.model

        def learn(view: LayerView, scores: Tensor) -> None:
            seen = features(self._writer.selection, model, view).transpose(1, 2)
            inside = ~view.outside
            x = seen[inside].transpose(0, 1).double().cpu()  # (kv heads, tokens, features)
            y = (scores.transpose(1, 2)[inside].T.double() + LEAST).log().cpu()
            tensors["x"][view.layer] += x.sum(1)
            tensors["y"][view.layer] += y.sum(1)
            tensors["xx"][view.layer] += x.transpose(1, 2) @ x
            tensors["xy"][view.layer] += (x.transpose(1, 2) @ y[..., None])[..., 0]

        with torch.no_grad():
            observed(self._writer, references, learn)
        tensors["count"] += sum(map(len, references))
        self.done += len(references)
        said = {"about": json.dumps(self._about), "done": str(self.done)}
        write_tensors(self._file, tensors, said)

    def solved(self) -> Tensor:
        """(layers, kv heads, features + 1): a ridge regression of each head, the constant last."""
        count = self._tensors["count"]
        x, y, xx, xy = (self._tensors[name] / count for name in ("x", "y", "xx", "xy"))
        between = xx - x[..., :, None] * x[..., None, :]
        # A feature that never changes says nothing.
        between.diagonal(dim1=-2, dim2=-1).mul_(1 + _RIDGE).add_(1e-9)
        weights = torch.linalg.solve(between, xy - x * y[..., None])
        constant = y - (x * weights).sum(-1)
        return torch.cat([weights, constant[..., None]], -1).float()

    def forget(self) -> None:
        """The predictor is made."""
        self._file.unlink(missing_ok=True)


def _judged(
    writer: Writer,
    coefficients: Tensor,
    references: Sequence[list[int]],
    told: Callable[[int], None],
) -> Fit:
    """The predictor with its heads in proportion, and what it is worth on these references.

    A regression of logarithms foresees the middle; the best are further off in one head than in
    another. Each head is put up or down so that its best sum to what they are.
    """
    model, selection = writer.model, writer.selection
    predicted = PredictedContribution(
        selection.budget,
        writer.shape.rows,
        kv_heads=model.kv_heads,
        coefficients=dict(enumerate(coefficients)),
    )
    truths, mine = list[Tensor](), list[Tensor]()  # (rows, tokens) of each reference
    for start in range(0, len(references), writer.batch):
        told(start)
        batch = references[start : start + writer.batch]
        seen: list[tuple[Tensor, Tensor]] = []

        def look(view: LayerView, scores: Tensor, seen: list[Any] = seen) -> None:
            seen.append((scores.cpu(), predicted.predict(model, view).cpu()))

        with torch.no_grad():
            observed(writer, batch, look)
        for into, parts in zip((truths, mine), zip(*seen, strict=True), strict=True):
            whole = torch.cat(parts, 1)
            into += [own[:, : len(tokens)] for own, tokens in zip(whole, batch, strict=True)]
    told(len(references))
    up = (_best(truths) / _best(mine)).log()
    coefficients = coefficients.clone()
    coefficients[..., -1] += up.view(coefficients.shape[:2])
    shares = [
        _captured(truth, found * up.exp()[:, None])
        for truth, found in zip(truths, mine, strict=True)
    ]
    return Fit(coefficients, sum(shares) / len(shares), len(references))


def _best(scores: Sequence[Tensor]) -> Tensor:
    """(rows,): the sum of each head's best scores."""
    every = torch.cat(list(scores), 1)
    return every.topk(max(1, every.shape[1] // _SHARE), dim=1).values.sum(1) + LEAST


def _captured(truth: Tensor, found: Tensor) -> float:
    """What the best pairs by `found` contribute, of what the best of all do."""
    count = max(1, truth.numel() // _SHARE)
    kept = found.flatten().topk(count).indices
    return float(truth.flatten()[kept].sum() / truth.flatten().topk(count).values.sum())
