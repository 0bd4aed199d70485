"""What was retrieved for which stretch of a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from memdb import Retrieval


@dataclass
class Chunk:
    """A stretch of tokens that was read or generated with one set of memories.

    Attributes:
        start: its first token, counted from the prompt's first.
        generated: whether it is answer (True) or prompt.
        retrieval: what it was read with.
        attention: if citations were asked for: for each token that was generated with it, how much
            of its attention each hit's memory got, (tokens, hits) float32, the mean over all layers
            and heads. What is missing to 1 went to the context.
        token_attention: the same by token of the reference, summed over the generated tokens,
            (hits, reference length) float32.
    """

    start: int
    generated: bool
    retrieval: Retrieval
    attention: NDArray[np.float32] | None = None
    token_attention: NDArray[np.float32] | None = None

    def watched(self, attention: NDArray[np.float32]) -> None:
        """Add what one token's attention was, (memories, reference length)."""
        hits = self.retrieval.hits
        of_hits = np.zeros((len(hits), attention.shape[1]), np.float32)
        stored = [place for place, hit in enumerate(hits) if hit.stored is not None]
        of_hits[stored] = attention[: len(stored)]
        if self.attention is None or self.token_attention is None:
            self.attention = np.zeros((0, len(hits)), np.float32)
            self.token_attention = np.zeros_like(of_hits)
        self.attention = np.concatenate([self.attention, of_hits.sum(1)[None]])
        self.token_attention = self.token_attention + of_hits


@dataclass
class Reading:
    """One prompt, and what is said to it.

    Attributes:
        content: the prompt's tokens that queries are made of.
        prompt_tokens: how many tokens were read for it.
        tokens: generated so far.
        chunks: what was retrieved.
        finished: whether no more will be generated.
        thinks: whether the prompt's end has begun to think for the assistant.
    """

    content: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    finished: bool = False
    thinks: bool = False

    def again(self) -> Reading:
        """The same prompt, for another answer; as long as there is none."""
        return replace(self, tokens=[], chunks=[replace(chunk) for chunk in self.chunks])

    @property
    def all_tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.content, *self.tokens]
