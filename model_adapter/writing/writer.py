"""The write path: references to explicit memories (paper, 3.2), in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from memdb import DType, ExplicitMemory, Framing, InvalidInputError, MemoryBatch, MemoryShape
from model_adapter.files.measured_file import Head
from model_adapter.models import observing
from model_adapter.models.language_model import LanguageModel
from model_adapter.prompts.framing import Frame, default_framing
from model_adapter.selections import DEFAULT_FLOOR, LayerView, Spread, selection_named
from model_adapter.writing.head_weight_file import GivenWeights, weights_for
from model_adapter.writing.kept_pairs import Choice, Kept, kept_pairs
from model_adapter.writing.memory_head_file import heads_of
from model_adapter.writing.predictor import GivenPredictor, predictor_for, selection_for

#: References to a forward pass, by default: more make a CPU no faster, and cost more when it is
#: interrupted.
_BATCH, _BATCH_ON_GPU = 8, 64


class Writer:
    """Writes memories with one model; the engine's `MemoryWriter`.

    With an adapter a reference is read twice: by the model's own weights, to choose what is kept,
    and by the adapter's, for the keys and values of what is kept.

    Args:
        model: whose key-values they are, with its adapter if it has one.
        framing: `plain` or `chat`; default: `chat` where the model has a template.
        layers: memory layers; default: all that can have memories. (The paper takes half of them,
            for a model that is trained for it; for one that is not, all layers measure best.)
        heads: memory heads, as (layer, kv head), which alone keep key-values (paper, Remark 4), or
            a file of `memdb heads`, which measures them; default: all of the memory layers.
        selection: which key-values are kept; a name of `SELECTIONS`. Default: `predicted` if a
            predictor is given, else `contribution`.
        budget: key-value pairs kept of a 128-token reference; default: the selection's.
        floor: tokens; shorter references keep as many pairs as one of so many (see `Selection`).
        spread: where the budget is spent: `uniform` over (layer, kv head) pairs, evenly over each
            `layer`, or over `all`; default: the selection's.
        head_weights: factors of the scores of each head before the budget is spent, layer by layer;
            a file of `memdb head-weights`, which measures them; or `none`. Default: the catalogue's
            for this model and the selection `contribution`, if it has such.
        predictor: of contributions, for the selection `predicted`: a file of `memdb predictor`, or
            what a database records. Default: the catalogue's for this model, if it has one.
        reference_length: most tokens of a reference.
        prefix: of a database that is there; default: as the framing makes it now. (A template may
            print the date; what stands before memories stays what it was.)
        dtype: that memories are stored in; default: what the model computes in.
        batch: references to a forward pass; default: 8, on a GPU 64.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        framing: Framing | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[Head] | Path | None = None,
        selection: str | None = None,
        budget: int | None = None,
        floor: int = DEFAULT_FLOOR,
        spread: Spread | None = None,
        head_weights: GivenWeights | None = None,
        predictor: GivenPredictor | None = None,
        reference_length: int = 128,
        prefix: tuple[int, ...] | None = None,
        dtype: DType | None = None,
        batch: int | None = None,
    ) -> None:
        if batch is None:
            batch = _BATCH if model.device.type == "cpu" else _BATCH_ON_GPU
        if batch < 1:
            raise InvalidInputError(f"a batch has at least 1 reference, got {batch}")
        self.batch = batch
        self.model = model
        framing = framing or default_framing(model)
        self.frame = Frame(model, framing, prefix)
        there = model.memory_layers
        chosen = there if layers is None else tuple(sorted(set(layers)))
        if not chosen or not set(chosen) <= set(there):
            every = there == tuple(range(model.layers))
            among = f"0 to {model.layers - 1}" if every else ", ".join(map(str, there))
            raise InvalidInputError(
                f"memory layers must be among {among}, got {list(layers or [])}"
            )
        self.shape = MemoryShape(
            model=model.fingerprint,
            layers=chosen,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=dtype or model.dtype,
            adapter=model.adapter.fingerprint if model.adapter and model.adapter.writes else None,
            prefix=self.frame.prefix,
            framing=framing,
            reference_length=reference_length,
            rope=tuple(model.rope(layer) for layer in chosen),
        )
        if isinstance(heads, Path):
            heads = heads_of(heads, model.fingerprint, model.name)
        self.heads = None if heads is None else tuple(sorted(set(heads)))
        selection = selection_for(selection, predictor)
        kind = selection_named(selection)
        self.predictor = predictor_for(predictor, model, chosen, selection)
        of_kind = (
            {} if self.predictor is None else {"coefficients": self.predictor.by_layer(chosen)}
        )
        self.head_weights = weights_for(head_weights, model, chosen, selection)
        self.selection = kind(
            budget,
            self.shape.rows,
            reference_length,
            kv_heads=model.kv_heads,
            heads=None if self.heads is None else self._rows_of(self.heads),
            spread=spread,
            floor=floor,
            weights=None if self.head_weights is None else torch.tensor(self.head_weights),
            **of_kind,
        )
        self.selection.require_supported(model)

    def _rows_of(self, heads: Sequence[Head]) -> Tensor:
        """(rows,) bool: those of memory heads."""
        kv_heads, layers = self.shape.kv_heads, self.shape.layers
        for layer, head in heads:
            if layer not in layers or not 0 <= head < kv_heads:
                raise InvalidInputError(
                    f"memory heads are of the memory layers and have kv heads 0 to {kv_heads - 1}; "
                    f"there is no head {head} of layer {layer}"
                )
        if not heads:
            raise InvalidInputError("there has to be a memory head")
        there = set(heads)
        return torch.tensor([(layer, h) in there for layer in layers for h in range(kv_heads)])

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """Selection, budget, spread, and that the exact weights write, whatever reads; floor,
        memory heads, head weights, predictor and the adapter's name, if there are any."""
        adapter, selection = self.model.adapter, self.selection
        every = {
            "selection": selection.name,
            "budget": selection.budget,
            "spread": selection.spread,
            "floor": selection.floor or None,
            "heads": self.heads and [list(head) for head in self.heads],
            "weights": self.head_weights and list(self.head_weights),
            "predictor": self.predictor and self.predictor.to_json(),
            "adapter": adapter and adapter.name,
            "precision": "exact",
        }
        return {name: value for name, value in every.items() if value is not None}

    @property
    def tokenizer(self) -> str:
        """The model's tokenizer.json."""
        return self.model.tokenizer_json

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        """See `memdb.MemoryWriter.write`.

        Raises:
            InvalidInputError: a text has more tokens than `shape.reference_length`.
        """
        references = [self.model.tokens(text) for text in texts]
        for text, tokens in zip(texts, references, strict=True):
            if not 1 <= len(tokens) <= self.shape.reference_length:
                raise InvalidInputError(
                    f"a reference has 1 to {self.shape.reference_length} tokens; this one has "
                    f"{len(tokens)}: {text[:60]!r}"
                )
        longest_first = sorted(range(len(references)), key=lambda i: -len(references[i]))
        memories: dict[int, ExplicitMemory] = {}
        for start in range(0, len(references), self.batch):
            part = sorted(longest_first[start : start + self.batch])
            written = self._write([references[i] for i in part])
            memories.update(zip(part, written, strict=True))
        return [memories[i] for i in range(len(references))]

    def _write(self, references: Sequence[list[int]]) -> list[ExplicitMemory]:
        """The memories of a batch, by one forward pass up to the last memory layer, or by two."""
        keys, values, scores = self._look(references)
        choices = self.choices(scores, references)
        if self.model.writing is not self.model.base:
            keys, values = self._written(references)
        return self.memories(kept_pairs(keys, values, choices), len(references))

    def scores(self, references: Sequence[list[int]]) -> Tensor:
        """How much each pair counts, (references, rows, longest) float32, by the model's own
        weights; behind a shorter reference's end it does not matter.

        Args:
            references: token ids.
        """
        return self._look(references)[2]

    def choices(self, scores: Tensor, references: Sequence[list[int]]) -> list[Choice]:
        """What is kept of each reference, given the scores of all."""
        each = zip(scores, references, strict=True)
        return [Choice(self.selection.keep(mine[:, : len(tokens)])) for mine, tokens in each]

    def _look(self, references: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (references, rows, longest, head_dim) and scores, by the base weights."""
        sequences = [[*tokens, *self.selection.suffix(self.model, tokens)] for tokens in references]
        lengths, ends = tuple(map(len, references)), tuple(map(len, sequences))
        memory_layers = set(self.shape.layers)
        # By layer: keys and values (batch, kv heads, longest, head_dim), and their scores.
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            if layer in memory_layers:
                view = LayerView(layer, query, key, value, lengths, ends, scaling)
                scores = self.selection.score(self.model, view)
                seen.append((key[:, :, view.reference], value[:, :, view.reference], scores))

        self.model.observe(
            sequences, observe, prefix=self.shape.prefix, last_layer=self.shape.layers[-1]
        )
        # Rows are layers with their heads: (batch, rows, longest, ...).
        keys, values, scores = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        return keys, values, scores

    @torch.no_grad()
    def _written(self, references: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Keys and values likewise, by the adapter's weights."""
        prefix = self.model.prefix(self.shape.prefix, "write")
        return observing.encode(self.model.writing, prefix, references, self.shape.layers)

    def memories(self, kept: Kept, references: int) -> list[ExplicitMemory]:
        """What is kept of a batch, brought to the CPU at once."""
        rows = self.shape.rows
        of = (kept.references * rows + kept.rows).cpu()
        counts = of.bincount(minlength=references * rows)
        batch = MemoryBatch(
            counts=counts.view(references, rows).numpy(),
            positions=kept.tokens.cpu().numpy().astype(self.shape.position_dtype),
            keys=_as_stored(kept.keys, self.shape.dtype),
            values=_as_stored(kept.values, self.shape.dtype),
        )
        memories = map(batch.memory, range(len(batch)))
        return [memory for memory in memories if memory is not None]


def _as_stored(vectors: Tensor, dtype: DType) -> NDArray[Any]:
    vectors = vectors.cpu().to(getattr(torch, dtype)).contiguous()
    if vectors.dtype == torch.bfloat16:  # numpy has none: its bits, as uint16
        vectors = vectors.view(torch.uint16)
    return vectors.numpy()
