"""The plain passes of benchmarks/router.py: keys of references and queries of questions, of every
head of the first two thirds of the layers, as they are before RoPE. They are kept in a folder, a
file for each 64 texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from model_adapter import Frame, LanguageModel
from model_adapter.evaluation.folder import digest
from model_adapter.prompts.turns import Turn

_FILE, _BATCH = 64, 8  # texts to a file, and side by side

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """Vectors of several texts.

    Attributes:
        parts: of some texts each, (rows, tokens, head_dim + 1) float16; what comes last is the
            length of a key's value. Rows are layers with their heads.
        starts: where in the parts, one behind the other, each text begins, (texts,).
        counts: tokens of each text, (texts,).
    """

    parts: list[NDArray[np.float16]]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def row(self, row: int) -> Floats:
        """(tokens, head_dim + 1): one row of all texts."""
        return np.concatenate([part[row] for part in self.parts]).astype(np.float32)


class Passes:
    """One model's.

    Args:
        model: without an adapter.
        folder: where vectors are kept.
    """

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self.model = model
        self.frame = Frame(model, "chat" if model.tokenizer.chat_template else "plain")
        self._folder = folder
        #: How many layers are looked at: what lies behind them is about the word that comes next.
        self.layers = -(-2 * model.layers // 3)
        folder.mkdir(parents=True, exist_ok=True)

    def keys(self, texts: Sequence[str]) -> Seen:
        """Keys of references behind the frame's prefix."""
        return self._seen("keys", [self.model.tokens(text) for text in texts])

    def queries(self, questions: Sequence[str]) -> Seen:
        """Queries of prompts, where they would stand behind memories: of the user's words, not of
        the template. (rows, tokens, head_dim + 1), what comes last is 0."""
        asked = [self.frame.behind_memories(question) for question in questions]
        turns = [prompt.turns[0] for prompt in asked]
        tokens = [prompt.content[: turn.end] for prompt, turn in zip(asked, turns, strict=True)]
        return self._seen("queries", tokens, turns)

    def _seen(
        self,
        what: Literal["keys", "queries"],
        sequences: Sequence[list[int]],
        turns: Sequence[Turn] | None = None,
    ) -> Seen:
        # Texts of one length side by side.
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
        begins = [0 if turns is None else turns[place].start for place in order]
        model = self.model
        name = digest([what, model.fingerprint, model.dtype, self.frame.prefix, self.layers])
        parts = []
        for at in track(range(0, len(order), _FILE), what):
            mine = [sequences[place] for place in order[at : at + _FILE]]
            file = self._folder / f"{what}-{name}-{digest(mine)}.npy"
            if not file.exists():
                made = np.concatenate(
                    [
                        self._vectors(what, mine[n : n + _BATCH], begins[at + n :])
                        for n in range(0, len(mine), _BATCH)
                    ],
                    1,
                )
                half = file.with_suffix(".half.npy")
                np.save(half, made)
                half.rename(file)
            parts.append(np.load(file, mmap_mode="r"))
        lengths = np.array([len(sequences[place]) for place in order], np.int64)
        lengths -= np.array(begins, np.int64)
        starts, counts = np.empty_like(lengths), np.empty_like(lengths)
        starts[order] = np.cumsum(lengths) - lengths
        counts[order] = lengths
        return Seen(parts, starts, counts)

    def _vectors(
        self,
        what: Literal["keys", "queries"],
        sequences: Sequence[list[int]],
        begins: Sequence[int],
    ) -> NDArray[np.float16]:
        """(rows, tokens of all sequences, head_dim + 1)."""
        model, prefix = self.model, self.frame.prefix
        start = len(prefix)
        layers: list[Tensor] = []

        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, _: float) -> None:
            if what == "keys":
                seen, sizes = key[:, :, start:], value[:, :, start:].float().norm(dim=-1)
            else:
                seen, sizes = query, torch.zeros(query.shape[:3])
            plain = model.unrotate(seen.flatten(0, 1), layer, start).view(seen.shape)
            both = torch.cat([plain, sizes[..., None]], -1)
            kept = [
                rows[:, begin : len(tokens)]
                for rows, tokens, begin in zip(both, sequences, begins, strict=False)
            ]
            layers.append(torch.cat(kept, 1))

        with torch.no_grad():
            model.observe(sequences, look, prefix=prefix, last_layer=self.layers - 1)
        return torch.cat(layers).numpy().astype(np.float16)
