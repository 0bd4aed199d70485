"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memdb import Html, Reference
from model_adapter.generation.chunks import Chunk
from model_adapter.generation.options import Mode

#: Why an answer ended: by the model, by a stop string, or since max_new_tokens were there.
Finish = Literal["end", "stop", "length"]

_TEXT = 240  # characters of a source that a notebook shows


@dataclass(frozen=True)
class Source:
    """A reference whose memory was used.

    Attributes:
        reference: which.
        share: of the attention that all memories got while the answer was generated, 0 to 1.
        attention: its share of all attention, the mean over the answer's tokens, layers and heads.
        tokens: (reference length,) float32: `attention`, by token of the reference; those of its
            place, if it has one, come first.
    """

    reference: Reference
    share: float
    attention: float
    tokens: NDArray[np.float32]


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: without control tokens, and without thoughts if they are hidden; also what `print`
            shows.
        token_ids: the generated tokens, the one that ended the text included.
        finished: why it ended, see `Finish`.
        mode: `memory`, `rag` (the references as text in the prompt) or `none`.
        chunks: what was retrieved for each stretch; one for `rag`, empty for `none`.
        prompt_tokens: tokens that were read for this prompt; with memories, the prefix is not
            among them, since it is read once for all.
        seconds: `retrieve` (embed, search, load, decode, pack, and write where cold), `read` (the
            prompt), `decode`, and `first_token`, from the call to the first token; of all prompts
            that were given together.
    """

    text: str
    token_ids: list[int]
    finished: Finish
    mode: Mode
    chunks: list[Chunk]
    prompt_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """In a notebook: the answer; what it rests on, if it was cited; how long it took."""
        shown = Html().text(self.text.strip() or "(an empty answer)")
        sources = self.sources()
        if sources:
            head = ["", "of the memories' attention", "of all", "document", "text"]
            shown.table(head, (_row(*of) for of in enumerate(sources, 1)))
        took = ", ".join(
            f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in self.seconds.items()
        )
        counts = f"{self.mode}: {self.prompt_tokens} prompt tokens, {len(self.token_ids)} new ones"
        return str(shown.line(f"{counts}; {took}" if took else counts, small=True))

    def sources(self) -> list[Source]:
        """What the answer rests on, the most used first: the references whose memories were seen
        while it was generated. Needs `cite=True`; empty else."""
        found: dict[int, Reference] = {}
        attention: dict[int, Any] = {}
        for chunk in self.chunks:
            if chunk.token_attention is None:
                continue
            for hit, tokens in zip(chunk.retrieval.hits, chunk.token_attention, strict=True):
                found[hit.id] = hit.reference
                attention[hit.id] = attention.get(hit.id, 0.0) + tokens
        total = sum(float(tokens.sum()) for tokens in attention.values()) or 1.0
        sources = [
            Source(
                found[number],
                float(tokens.sum()) / total,
                float(tokens.sum()) / len(self.token_ids),
                (tokens / len(self.token_ids)).astype(np.float32),
            )
            for number, tokens in attention.items()
        ]
        return sorted(sources, key=lambda source: -source.share)


def _row(place: int, source: Source) -> list[str]:
    """A source in a table."""
    text = " ".join(source.reference.content.split())
    return [
        str(place),
        f"{source.share:.1%}",
        f"{source.attention:.1%}",
        source.reference.document_id,
        text if len(text) <= _TEXT else text[: _TEXT - 1] + "…",
    ]
