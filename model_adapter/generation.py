"""Generation with explicit memory (paper, 3.1): 5 memories for every 64 tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from memdb import InvalidInputError, MemDB, Retrieval, pack
from model_adapter.attention import MemoryTensors, memory_tensors
from model_adapter.framing import Frame, Prompt
from model_adapter.language_model import LanguageModel
from model_adapter.sampling import Sampler
from model_adapter.writer import Writer

Mode = Literal["memory", "rag", "none"]


@dataclass(frozen=True)
class Chunk:
    """A stretch of tokens that was read or generated with one set of memories.

    Attributes:
        start: its first token, counted from the prompt's first.
        generated: whether it is answer (True) or prompt.
        retrieval: what it was read with.
    """

    start: int
    generated: bool
    retrieval: Retrieval


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: without control tokens.
        token_ids: the generated tokens, the one that ended the text included.
        mode: `memory`, `rag` (the references as text in the prompt) or `none`.
        chunks: what was retrieved for each stretch; one for `rag`, empty for `none`.
        prompt_tokens: tokens that were read for this prompt; with memories, the prefix is not
            among them, since it is read once for all.
        seconds: `retrieve` (embed, search, load, and write where cold), `read` (the prompt) and
            `decode`.
    """

    text: str
    token_ids: list[int]
    mode: Mode
    chunks: list[Chunk]
    prompt_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


def generate(
    prompt: str,
    db: MemDB,
    *,
    mode: Mode = "memory",
    max_new_tokens: int = 64,
    memories: int = 5,
    retrieve_every: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Answer a prompt with the explicit memories of a database.

    The prompt is cut into chunks of `retrieve_every` tokens; each retrieves for itself and sees its
    own memories alone (a last, shorter chunk looks for the `retrieve_every` tokens up to its end).
    While decoding, after each `retrieve_every` tokens the memories are dropped and new ones
    retrieved with those tokens. A reference without a memory is encoded and stored when it is first
    retrieved.

    Args:
        prompt: the user's text; the database's framing is put around it.
        db: opened with its model (`open_database`); the model that wrote the memories generates.
        mode: `memory`; for comparison, `rag` puts the same references into the prompt as text, and
            `none` does without.
        max_new_tokens: at least 1.
        memories: references per chunk, at least 1.
        retrieve_every: tokens of a chunk, at least 1.
        temperature: 0: the likeliest token; else the logits are divided by it and one is drawn.
        top_k: draw among so many of the likeliest; None: all.
        top_p: draw among the likeliest that together have this probability.
        seed: the same seed draws the same tokens; None: another each time.
        on_text: called with each new piece of text.

    Raises:
        InvalidInputError: naming the argument, or that the prompt is too long for the model.
        MissingPartError: the database was opened without its model.
    """
    for name, number in (
        ("max_new_tokens", max_new_tokens),
        ("memories", memories),
        ("retrieve_every", retrieve_every),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidInputError(f"{name} must be a whole number of at least 1, got {number!r}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidInputError("the prompt is empty, or no text")
    if mode not in ("memory", "rag", "none"):
        raise InvalidInputError(f"mode is 'memory', 'rag' or 'none', not {mode!r}")
    writer = db.writer
    if not isinstance(writer, Writer):
        raise InvalidInputError(
            f"generate needs a database whose writer is a model_adapter.Writer, not a "
            f"{type(writer).__name__}"
        )
    if mode != "none":
        db.embedder  # noqa: B018 - loaded here, so that the timings are those of the work
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    reader = _Reader(writer.model, writer.frame, db, memories, retrieve_every, max_new_tokens)
    logits = reader.read(prompt, mode)
    token_ids, text = _decode(reader, logits, sampler, max_new_tokens, mode == "memory", on_text)
    return Generation(text, token_ids, mode, reader.chunks, reader.prompt_tokens, reader.seconds)


class _Reader:
    """The state of one generation: cache, position, and the memories in use."""

    def __init__(
        self,
        model: LanguageModel,
        frame: Frame,
        db: MemDB,
        memories: int,
        retrieve_every: int,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.frame = frame
        self.db = db
        self.memories = memories
        self.retrieve_every = retrieve_every
        self.max_new_tokens = max_new_tokens
        self.chunks: list[Chunk] = []
        self.prompt_tokens = 0
        self.seconds = {"retrieve": 0.0, "read": 0.0, "decode": 0.0}
        self._position = 0
        self._cache: Any = None
        self._memory: MemoryTensors | None = None

    def read(self, prompt: str, mode: Mode) -> Tensor:
        """Read the prompt; (vocabulary,) logits of its last token."""
        if mode == "memory":
            return self._read_with_memories(self.frame.behind_memories(prompt))
        if mode == "rag":
            (retrieval,) = self._retrieve([prompt], memories=False)
            self.chunks.append(Chunk(0, False, retrieval))
            texts = [hit.reference.content for hit in retrieval.hits]
            framed = self.frame.with_text(texts, prompt)
        else:
            framed = self.frame.alone(prompt)
        self._require_room(framed)
        self._cache = self.model.prefix_cache(())
        return self.step([*framed.content, *framed.tail], "read")

    def _read_with_memories(self, prompt: Prompt) -> Tensor:
        prefix = self.frame.prefix
        self._cache = self.model.prefix_cache(prefix)
        self._position = len(prefix) + self.db.shape.reference_length
        self._require_room(prompt)
        size, content = self.retrieve_every, prompt.content
        ends = [min(start + size, len(content)) for start in range(0, len(content), size)]
        queries = {end: content[max(0, end - size) : end] for end in ends}
        asking = [end for end in ends if self._says_something(queries[end])]
        found = self._retrieve([queries[end] for end in asking])
        retrievals = dict(zip(asking, found, strict=True))
        logits = torch.empty(0)
        for end in ends:
            start = self.prompt_tokens
            if end in retrievals:  # else the memories in use stay
                self.remember(retrievals[end], generated=False)
            tail = prompt.tail if end == len(content) else []
            logits = self.step([*content[start:end], *tail], "read")
        return logits

    def step(self, tokens: list[int], phase: str) -> Tensor:
        """Read tokens with the memories in use; (vocabulary,) logits of the last."""
        began = time.perf_counter()
        logits = self.model.forward(tokens, self._position, self._cache, self._memory)[-1]
        self._position += len(tokens)
        if phase == "read":
            self.prompt_tokens += len(tokens)
        self.seconds[phase] += time.perf_counter() - began
        return logits

    def remember(self, retrieval: Retrieval, *, generated: bool, start: int | None = None) -> None:
        """Put the retrieval's memories in the place of those in use."""
        began = time.perf_counter()
        packed = pack(retrieval.stored, self.db.shape)
        self._memory = memory_tensors(packed, self.db.shape, self.model.device)
        place = self.prompt_tokens if start is None else start
        self.chunks.append(Chunk(place, generated, retrieval))
        self.seconds["retrieve"] += time.perf_counter() - began

    def retrieve_again(self, generated: list[int]) -> None:
        """New memories for the tokens just generated; the old ones stay if these say nothing."""
        query = generated[-self.retrieve_every :]
        if self._says_something(query):
            (retrieval,) = self._retrieve([query])
            self.remember(retrieval, generated=True, start=self.prompt_tokens + len(generated))

    def _says_something(self, tokens: list[int]) -> bool:
        return bool(self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip())

    def _require_room(self, prompt: Prompt) -> None:
        """Refuse a prompt whose answer would run past the model's end, before anything is read."""
        tokens = len(prompt.content) + len(prompt.tail)
        room = self.model.max_positions - self._position - tokens
        if room < self.max_new_tokens:
            raise InvalidInputError(
                f"the prompt has {tokens} tokens (with references that stand in it as text), which "
                f"leaves room for {max(0, room)} new ones before the end of the model "
                f"'{self.model.name}' at {self.model.max_positions}; {self.max_new_tokens} are "
                "asked for. Shorten the prompt, or ask for fewer."
            )

    def _retrieve(self, queries: list[Any], *, memories: bool = True) -> list[Retrieval]:
        began = time.perf_counter()
        found = self.db.retrieve_batch(queries, self.memories, memories=memories)
        self.seconds["retrieve"] += time.perf_counter() - began
        return found


def _decode(
    reader: _Reader,
    logits: Tensor,
    sampler: Sampler,
    max_new_tokens: int,
    retrieve: bool,
    on_text: Callable[[str], None] | None,
) -> tuple[list[int], str]:
    stops = reader.model.stop_tokens()
    tokens: list[int] = []
    text = ""
    for token in _tokens(reader, logits, sampler, max_new_tokens, retrieve):
        tokens.append(token)
        if token in stops:
            break
        whole = reader.model.tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may take several tokens; until the last is there it shows as U+FFFD.
        if on_text is not None and not whole.endswith("\ufffd"):
            on_text(whole[len(text) :])
            text = whole
    whole = reader.model.tokenizer.decode(tokens, skip_special_tokens=True)
    if on_text is not None and len(whole) > len(text):
        on_text(whole[len(text) :])
    return tokens, whole


def _tokens(
    reader: _Reader, logits: Tensor, sampler: Sampler, max_new_tokens: int, retrieve: bool
) -> Iterator[int]:
    tokens: list[int] = []
    while True:
        token = sampler.choose(logits)
        tokens.append(token)
        yield token
        if len(tokens) == max_new_tokens:
            return
        if retrieve and len(tokens) % reader.retrieve_every == 0:
            reader.retrieve_again(tokens)
        logits = reader.step([token], "decode")
