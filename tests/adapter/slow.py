"""What attention over memories means, said as slowly and obviously as possible: one token at a
time, one head at a time, each over a list of the keys that it sees. And likewise, what a
conversation is looked up by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from memdb import ExplicitMemory, Hit, MemDB, MemoryShape, to_float32
from model_adapter import LanguageModel
from model_adapter.attention.weighing import Weighing

#: A memory, and what is added to the scores of its pairs.
Weighed = tuple[ExplicitMemory, float]
#: Tokens, and the memories that they see.
Part = tuple[Sequence[int], Sequence[Weighed]]


class SlowReader:
    """One sequence behind the prefix, token by token.

    Attributes:
        shares: for each token how much of its attention each memory had, the mean over all heads of
            all layers.
    """

    def __init__(
        self, model: LanguageModel, shape: MemoryShape, *, start: int, windows: bool = False
    ) -> None:
        self.shares: list[list[float]] = []
        self._model, self._shape, self._windows = model, shape, windows
        # Made with the configuration only for layers that keep a state: a window would cut it.
        kinds = set(getattr(model.config, "layer_types", None) or ())
        hybrid = kinds & {"linear_attention", "conv", "hybrid"}
        self._cache = DynamicCache(config=model.config) if hybrid else DynamicCache()
        self._places: list[int] = []
        for place, token in enumerate(shape.prefix):
            self._read(token, place, [])
        self._next = start

    def read(self, token: int, memories: Sequence[Weighed]) -> Tensor:
        """(vocabulary,) logits of one more token, which sees these memories."""
        logits, shares = self._read(token, self._next, memories)
        self.shares.append(shares)
        self._next += 1
        return logits

    def _read(
        self, token: int, place: int, memories: Sequence[Weighed]
    ) -> tuple[Tensor, list[float]]:
        self._places.append(place)
        shares = [0.0] * len(memories)
        sees = {
            "memories": memories,
            "shape": self._shape,
            "places": self._places,
            "windows": self._windows,
            "shares": shares,
            "heads": self._model.layers * self._model.heads,
        }
        self._model.model.set_attn_implementation("slow")
        try:
            with torch.no_grad():
                out = self._model.model(
                    torch.tensor([[token]]),
                    position_ids=torch.tensor([[place]]),
                    past_key_values=self._cache,
                    use_cache=True,
                    sees=sees,
                )
        finally:
            self._model.model.set_attn_implementation("memdb")
        return out.logits[0, 0], shares


def slow_logits(
    model: LanguageModel,
    shape: MemoryShape,
    parts: Sequence[Part],
    *,
    start: int,
    windows: bool = False,
) -> Tensor:
    """(tokens, vocabulary) logits of one sequence behind the prefix."""
    reader = SlowReader(model, shape, start=start, windows=windows)
    return torch.stack(
        [reader.read(token, memories) for tokens, memories in parts for token in tokens]
    )


def slow_cuts(
    model: LanguageModel, messages: Sequence[dict[str, str]], size: int
) -> list[tuple[list[int], list[str], bool]]:
    """The stretches of a conversation in the template of `tests.helpers`, behind the memories: the
    tokens of each, the texts that it is looked up by, and whether the user says it."""
    cuts: list[tuple[list[int], list[str], bool]] = []
    said: list[list[int]] = []  # by user and assistant, turn by turn
    stretch = model.tokens("\n\n")
    if messages[0]["role"] == "system":
        stretch = model.tokens("<|im_end|>\n<|im_start|>system\n", special=True)
    for number, message in enumerate(messages):
        words = model.tokens(message["content"])
        short = message["role"] == "user" and len(words) < 10 and len(words) < size
        own: list[int] = []
        for place, token in enumerate(words, 1):
            stretch.append(token)
            own = [*own, token][-size:]
            if place == len(words) or place % size == 0:
                texts = [model.tokenizer.decode(own)]
                if short and said:
                    texts.append(_with_what_was_said(model, said, own, size))
                by_user = message["role"] == "user"
                cuts.append((stretch, texts if texts[0].strip() else [], by_user))
                stretch = []
        if message["role"] != "system":
            said.append(words)
        answers = "assistant" if message["role"] == "user" else "user"
        control = model.tokens(f"<|im_end|>\n<|im_start|>{answers}\n", special=True)
        if number < len(messages) - 1:
            stretch += control
        else:
            cuts[-1][0].extend(control)
    return cuts


def _with_what_was_said(
    model: LanguageModel, said: Sequence[list[int]], own: list[int], size: int
) -> str:
    room = size - len(own)
    text = model.tokenizer.decode(own)
    for words in reversed(said):
        end: list[int] = []
        for token in reversed(words):
            if room > 0:
                end.insert(0, token)
                room -= 1
        if end:
            text = model.tokenizer.decode(end) + "\n" + text
    return text


def slow_hits(
    db: MemDB, texts: Sequence[str | Sequence[int]], k: int, counts: Sequence[float] = (1.0, 0.6)
) -> list[Hit]:
    """The best k references for any of the texts, best first; of those that say the same, one. The
    second text is what was said before, and scores by it count less."""
    found = []
    for number, text in enumerate(texts):
        for hit in db.retrieve(text, 100).hits:
            hit.score *= counts[number]
            found.append(hit)
    best: list[Hit] = []
    while found and len(best) < k:
        top = max(found, key=lambda hit: hit.score)
        best.append(top)
        found = [hit for hit in found if hit.reference.content != top.reference.content]
    return best


def slow_weighed(
    hits: Sequence[Hit], weighing: Weighing, asked: bool = False
) -> list[tuple[Hit, float]]:
    """The hits that are read, and the bias of each."""
    weighed = []
    best = max([hit.score for hit in hits], default=0.0)
    for hit in hits:
        behind = best - hit.score
        costs = behind * weighing.slope
        if costs > weighing.most:
            costs = weighing.most
        if behind <= weighing.reach:
            weighed.append((hit, weighing.lift - costs + (weighing.asked if asked else 0)))
    return weighed


def slow_answer(
    db: MemDB,
    messages: Sequence[dict[str, str]],
    *,
    new: int,
    k: int,
    size: int,
    weighing: Weighing,
    min_score: float = -1.0,
) -> tuple[list[int], list[list[tuple[Hit, float]]], list[list[float]]]:
    """The likeliest `new` tokens; what is read in each chunk of prompt and answer that says
    something: hits, and their biases; and for each of the new tokens the attention that each memory
    had."""
    model = db.writer.model  # type: ignore[union-attr]
    reader = SlowReader(model, db.shape, start=len(db.shape.prefix) + 128)
    found: list[list[tuple[Hit, float]]] = []
    read: list[Weighed] = []

    def look_up(texts: Sequence[str | Sequence[int]], asked: bool = False) -> list[Weighed]:
        hits = [hit for hit in slow_hits(db, texts, k) if hit.score >= min_score]
        found.append(slow_weighed(hits, weighing, asked))
        return [(hit.memory, bias) for hit, bias in found[-1] if hit.memory is not None]

    for tokens, texts, by_user in slow_cuts(model, messages, size):
        if texts:
            read = look_up(texts, by_user)
        for token in tokens:
            logits = reader.read(token, read)
    said = [int(logits.argmax())]
    while len(said) < new:
        newest = model.tokenizer.decode(said[-size:], skip_special_tokens=True)
        if len(said) % size == 0 and newest.strip():
            read = look_up([said[-size:]])
        said.append(int(reader.read(said[-1], read).argmax()))
    return said, found, reader.shares[-new:]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    *,
    sees: dict[str, Any],
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    _, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    place = sees["places"][-1]
    mixed = torch.zeros(1, 1, heads, head_dim)
    for head in range(heads):
        group = head // (heads // kv_heads)
        keys, values, biases, of = [], [], [], []
        for at, k, v in zip(sees["places"], key[0, group], value[0, group], strict=True):
            if sliding_window is None or place - at < sliding_window:
                keys.append(k)
                values.append(v)
                biases.append(0.0)
                of.append(-1)  # of no memory
        for number, (memory, bias) in enumerate(sees["memories"]):
            for at, k, v in pairs(memory, sees["shape"], module.layer_idx, group):
                far = place - len(sees["shape"].prefix) - at
                if not sees["windows"] or sliding_window is None or far < sliding_window:
                    keys.append(k)
                    values.append(v)
                    biases.append(bias)
                    of.append(number)
        scores = torch.stack(keys) @ query[0, head, 0] * (scaling or head_dim**-0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + torch.tensor(biases)
        if s_aux is not None:  # a sink: it takes part, and has no value
            scores = torch.cat([scores, s_aux[head : head + 1]])
        weights = scores.softmax(0)[: len(values)]
        for number, weight in zip(of, weights.tolist(), strict=True):
            if number >= 0:
                sees["shares"][number] += weight / sees["heads"]
        mixed[0, 0, head] = weights @ torch.stack(values)
    return mixed, None


def pairs(
    memory: ExplicitMemory, shape: MemoryShape, layer: int, kv_head: int
) -> list[tuple[int, Tensor, Tensor]]:
    """Token, key and value of what a memory keeps of one head."""
    if layer not in shape.layers:
        return []
    row = shape.layers.index(layer) * shape.kv_heads + kv_head
    own = slice(memory.offsets[row], memory.offsets[row + 1])
    keys = torch.from_numpy(to_float32(memory.keys[own], shape.dtype).copy())
    values = torch.from_numpy(to_float32(memory.values[own], shape.dtype).copy())
    return list(zip(memory.positions[own].tolist(), keys, values, strict=True))


AttentionInterface.register("slow", _attention)
