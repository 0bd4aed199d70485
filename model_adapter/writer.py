"""The write path: references to explicit memories (paper, 3.2), in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from memdb import ExplicitMemory, Framing, InvalidInputError, MemoryBatch, MemoryShape
from model_adapter.framing import Frame, default_framing
from model_adapter.language_model import LanguageModel
from model_adapter.selection import DEFAULT_SELECTION, LayerView, selection_named

#: References to a forward pass, by default: more make a CPU no faster, and cost more when it is
#: interrupted.
_BATCH, _BATCH_ON_GPU = 8, 64


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
        batch: references to a forward pass; default: 8, on a GPU 64.
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
        longest_first = sorted(range(len(references)), key=lambda i: -len(references[i]))
        memories: dict[int, ExplicitMemory] = {}
        for start in range(0, len(references), self.batch):
            part = sorted(longest_first[start : start + self.batch])
            written = self._write([references[i] for i in part])
            memories.update(zip(part, written, strict=True))
        return [memories[i] for i in range(len(references))]

    def _write(self, references: Sequence[list[int]]) -> list[ExplicitMemory]:
        """The memories of a batch, by one forward pass up to the last memory layer."""
        sequences = [[*tokens, *self.selection.suffix(self.model, tokens)] for tokens in references]
        lengths, ends = tuple(map(len, references)), tuple(map(len, sequences))
        memory_layers = set(self.shape.layers)
        # By layer: keys and values (batch, kv heads, longest, head_dim), and their scores.
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            if layer in memory_layers:
                view = LayerView(layer, query, key, lengths, ends, scaling)
                scores = self.selection.score(self.model, view)
                seen.append((key[:, :, view.reference], value[:, :, view.reference], scores))

        self.model.observe(
            sequences, observe, prefix=self.shape.prefix, last_layer=self.shape.layers[-1]
        )
        # Rows are layers with their heads: (batch, rows, longest, ...).
        keys, values, scores = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        return self._memories(keys, values, scores, lengths)

    def _memories(
        self, keys: Tensor, values: Tensor, scores: Tensor, lengths: Sequence[int]
    ) -> list[ExplicitMemory]:
        """What is kept of a batch, brought to the CPU at once."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for i, length in enumerate(lengths):
            chosen[i, :, :length] = self.selection.keep(scores[i, :, :length])
        pairs = chosen.flatten().nonzero()[:, 0]
        positions = pairs % scores.shape[2]
        batch = MemoryBatch(
            counts=chosen.sum(2).cpu().numpy(),
            positions=positions.cpu().numpy().astype(self.shape.position_dtype),
            keys=_as_stored(keys.flatten(0, 2)[pairs]),
            values=_as_stored(values.flatten(0, 2)[pairs]),
        )
        memories = map(batch.memory, range(len(batch)))
        return [memory for memory in memories if memory is not None]


def _as_stored(vectors: Tensor) -> NDArray[Any]:
    vectors = vectors.cpu().contiguous()
    if vectors.dtype == torch.bfloat16:  # numpy has none: its bits, as uint16
        vectors = vectors.view(torch.uint16)
    return vectors.numpy()
