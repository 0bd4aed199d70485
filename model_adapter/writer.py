"""The write path: references to explicit memories (paper, 3.2), in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdb import ExplicitMemory, Framing, InvalidInputError, MemoryShape
from model_adapter.framing import Frame, default_framing
from model_adapter.language_model import LanguageModel
from model_adapter.selection import DEFAULT_SELECTION, LayerView, selection_named

_BATCH = 8  # references to a forward pass


class Writer:
    """Writes memories with one model; the engine's `MemoryWriter`.

    Args:
        model: whose key-values they are.
        framing: `plain` or `chat`; default: `chat` where the model has a template.
        layers: memory layers; default: all. (The paper takes half of them, for a model that is
            trained for it; for one that is not, all layers measure best.)
        selection: `reconstruction` or `paper`.
        budget: key-value pairs kept of a 128-token reference; default: the selection's.
        reference_length: most tokens of a reference.
        prefix: of a database that is there; default: as the framing makes it now. (A template may
            print the date; what stands before memories stays what it was.)
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        framing: Framing | None = None,
        layers: Sequence[int] | None = None,
        selection: str = DEFAULT_SELECTION,
        budget: int | None = None,
        reference_length: int = 128,
        prefix: tuple[int, ...] | None = None,
    ) -> None:
        self.model = model
        framing = framing or default_framing(model)
        self.frame = Frame(model, framing, prefix)
        chosen = tuple(range(model.layers)) if layers is None else tuple(sorted(set(layers)))
        outside = [layer for layer in chosen if not 0 <= layer < model.layers]
        if outside or not chosen:
            raise InvalidInputError(
                f"memory layers must be among 0 to {model.layers - 1}, got {list(layers or [])}"
            )
        self.shape = MemoryShape(
            model=model.fingerprint,
            layers=chosen,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            prefix=self.frame.prefix,
            framing=framing,
            reference_length=reference_length,
            rope=tuple(model.rope(layer) for layer in chosen),
        )
        self.selection = selection_named(selection)(budget, self.shape.rows, reference_length)
        self.selection.require_supported(model)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """Selection and budget."""
        return {"selection": self.selection.name, "budget": self.selection.budget}

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
        memories: list[ExplicitMemory] = []
        for start in range(0, len(references), _BATCH):
            memories.extend(self._write(references[start : start + _BATCH]))
        return memories

    def _write(self, references: Sequence[list[int]]) -> list[ExplicitMemory]:
        prefix = list(self.shape.prefix)
        sequences = [
            [*prefix, *tokens, *self.selection.suffix(self.model, tokens)] for tokens in references
        ]
        spans = [slice(len(prefix), len(prefix) + len(tokens)) for tokens in references]
        memory_layers = set(self.shape.layers)
        # By reference, then by layer: keys and values (kv heads, tokens, head_dim), and scores.
        kept: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in references]

        def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            if layer not in memory_layers:
                return
            for i, (span, sequence) in enumerate(zip(spans, sequences, strict=True)):
                used = len(sequence)  # behind it is padding
                view = LayerView(layer, query[i, :, :used], key[i, :, :used], span, scaling)
                scores = self.selection.score(self.model, view)
                kept[i].append((key[i, :, span].clone(), value[i, :, span].clone(), scores))

        self.model.observe(sequences, observe)
        return [self._memory(layers) for layers in kept]

    def _memory(self, layers: list[tuple[Tensor, Tensor, Tensor]]) -> ExplicitMemory:
        keys, values, scores = (torch.cat(parts) for parts in zip(*layers, strict=True))
        chosen = self.selection.keep(scores)  # (rows, tokens)
        offsets = np.zeros(self.shape.rows + 1, np.int32)
        np.cumsum(chosen.sum(1).cpu().numpy(), out=offsets[1:])
        positions = chosen.nonzero()[:, 1].cpu().numpy()
        return ExplicitMemory(
            offsets=offsets,
            positions=positions.astype(self.shape.position_dtype),
            keys=_as_stored(keys[chosen]),
            values=_as_stored(values[chosen]),
        )


def _as_stored(vectors: Tensor) -> NDArray[Any]:
    vectors = vectors.cpu().contiguous()
    if vectors.dtype == torch.bfloat16:  # numpy has none: its bits, as uint16
        vectors = vectors.view(torch.uint16)
    return vectors.numpy()
