"""What the engine needs from outside: an embedder and a memory writer.

The engine knows neither torch nor transformers. Whoever has a text encoder and a language model
hands them in behind these two protocols; `model_adapter` does so for Hugging Face models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memdb.types.memory import ExplicitMemory
from memdb.types.shape import MemoryShape


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors whose inner product is their similarity (paper, 3.1: BGE-M3, cosine)."""

    @property
    def name(self) -> str:
        """How to load it again: a name, a folder or a Hugging Face id."""

    @property
    def fingerprint(self) -> str:
        """Differs where the vectors would."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Vectors of texts, (len(texts), dimension) float32, each of length 1.

        Args:
            texts: not empty.
            query: the texts are queries, for embedders that treat these differently.
        """


@runtime_checkable
class MemoryWriter(Protocol):
    """References to explicit memories (paper, 3.2).

    It may also have an attribute `batch`, an int: how many references it would have in one call of
    `write`, which are also what one transaction stores and what an interruption costs. Where it
    has none, 8.
    """

    @property
    def name(self) -> str:
        """How to load the model again: a name, a folder or a Hugging Face id."""

    @property
    def shape(self) -> MemoryShape:
        """The shape of every memory it writes."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else it takes to write the same memories again (selection, budget), as JSON."""

    @property
    def tokenizer(self) -> str:
        """The model's tokenizer, as the text of a `tokenizer.json`."""

    def write(self, texts: Sequence[str]) -> list[ExplicitMemory]:
        """One memory for each text, in order; no text is longer than `shape.reference_length`."""


#: Told of long work: what is being done, how many references of how many are done.
Progress = Callable[[str, int, int], None]

#: Writes the memories of references, by id, the longest first, in other processes; each opens the
#: database for itself and calls `MemDB.warm_batches`. Tells the `Progress` how many are done, and
#: returns how many were written. `model_adapter.warming` has one.
Warmer = Callable[[Sequence[int], Progress], int]


def no_progress(stage: str, done: int, total: int) -> None:
    """The `Progress` that says nothing."""
