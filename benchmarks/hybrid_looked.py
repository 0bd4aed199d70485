"""What a question looks at in memories, and what is made of it: those tokens computed anew with all
memories in sight, or their sentences read as text.

Computing anew (as CacheBlend, Yao et al. 2024, but for the tokens that the question chooses): the
tokens run through the model at their own positions, each sees the memories of all references up to
its position and the other such tokens, and their pairs of all layers and heads take the place of
those that were kept of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from found import Found
from numpy.typing import NDArray
from torch import Tensor

from memdb import PackedLayer, PackedMemories
from model_adapter import Context, LanguageModel, Stretch
from model_adapter.attention.sight import LayerMemory
from model_adapter.evaluation import Question
from model_adapter.evaluation.arms import prompt_of

SHARE = 0.2  # of the tokens of all references of a question
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class _Apart(Context):
    """A context that reads tokens at positions of their own."""

    def read_at(
        self, tokens: Sequence[int], positions: Sequence[int], memories: PackedMemories
    ) -> list[tuple[Tensor, Tensor]]:
        """Their keys and values, (kv heads, tokens, head_dim), layer by layer."""
        self.remember([memories])
        ids, places = torch.tensor([list(tokens)]), torch.tensor([list(positions)])
        self._pass(ids, places, None, [0], self._cache, None, None)
        made = []
        for layer in self._cache.layers:
            nothing = layer.keys[:, :, :0]
            keys, values = layer.update(nothing, nothing)  # what is there already
            made.append((keys[0, :, self._prefix :], values[0, :, self._prefix :]))
        return made


class Looked:
    """What questions look at; each is asked once.

    Args:
        found: what they see.
    """

    def __init__(self, found: Found) -> None:
        self._found, self._model = found, found.model
        self._attention: dict[str, NDArray[np.float64]] = {}
        self._anew: dict[str, PackedMemories] = {}

    def attention(self, question: Question) -> NDArray[np.float64]:
        """(references, reference length): what all tokens of the prompt give to each token, over
        all layers and heads."""
        if question.id not in self._attention:
            found, shape = self._found, self._found.db.shape
            many, length = len(found.hits(question)), shape.reference_length
            sums = torch.zeros((many + 1) * length)  # the last: pairs of no memory

            def look(weights: Tensor, memory: LayerMemory) -> None:
                _, heads, tokens, width = weights.shape
                kv_heads = memory.memory.shape[1]
                each = weights[0].reshape(kv_heads, heads // kv_heads * tokens, width).sum(1)
                place = torch.where(memory.memory[0] < 0, many, memory.memory[0])
                sums.index_add_(0, (place * length + memory.token[0]).flatten(), each.flatten())

            frame = found.frame
            prompt = frame.behind_memories(prompt_of(frame, question))
            start = len(frame.prefix) + length
            context = Context(self._model, frame.prefix, start, capacity=length)
            tokens = [*prompt.content, *prompt.tail]
            context.read([[Stretch(tokens, found.memories(question))]], witness=look)
            self._attention[question.id] = sums.view(many + 1, length)[:many].double().numpy()
        return self._attention[question.id]

    def anew(self, question: Question, *, beside: bool = False) -> PackedMemories:
        """The memories, with the tokens that are looked at most computed anew.

        Args:
            question: that looks.
            beside: what was kept of them stays.
        """
        key = f"{question.id} {beside}"
        if key not in self._anew:
            self._anew[key] = self._made(question, beside)
        return self._anew[key]

    def sentences(self, question: Question) -> str:
        """The sentences that are looked at most for their length, in the order of the references;
        together at most a fifth of the tokens, but at least one."""
        model, attention = self._model, self._attention_of(question)
        every: list[tuple[float, int, int, str]] = []  # attention, place, tokens, text
        for number, one in enumerate(self._found.hits(question)):
            spans = model.spans(one.text)
            starts = [0, *(gap.end() for gap in _SENTENCE.finditer(one.text)), len(one.text)]
            for begin, end in pairwise(starts):
                mine = [i for i, (first, _) in enumerate(spans) if begin <= first < end]
                if mine:
                    mean = float(attention[number, mine].mean())
                    every.append((mean, len(every), len(mine), one.text[begin:end].strip()))
        room = math.ceil(SHARE * sum(tokens for _, _, tokens, _ in every))
        chosen: list[tuple[int, str]] = []
        for _, place, tokens, text in sorted(every, reverse=True):
            if tokens <= room or not chosen:
                chosen.append((place, text))
                room -= tokens
        return " ".join(text for _, text in sorted(chosen))

    def _attention_of(self, question: Question) -> NDArray[np.float64]:
        """Without the first token of each reference, which is looked at whatever it says; -1
        there, and behind a reference's end."""
        attention = self.attention(question).copy()
        attention[:, 0] = -1.0
        for row, one in zip(attention, self._found.hits(question), strict=True):
            row[len(self._model.tokens(one.text)) :] = -1.0
        return attention

    def _made(self, question: Question, beside: bool) -> PackedMemories:
        found, model = self._found, self._model
        seen = found.hits(question)
        references = [model.tokens(one.text) for one in seen]
        attention = self._attention_of(question)
        count = math.ceil(SHARE * sum(map(len, references)))
        flat = np.argsort(-attention, axis=None)[: min(count, (attention >= 0).sum())]
        # By position, and each is of one reference.
        chosen = sorted(
            (int(place % attention.shape[1]), int(place // attention.shape[1])) for place in flat
        )
        prefix = found.frame.prefix
        old = found.memories(question)
        if not beside:
            old = _without(old, attention.shape, flat)
        # Windows hold for memories: a token sees those up to its own position.
        context = _Apart(model, prefix, capacity=count, windows=True)
        made = context.read_at(
            [references[number][token] for token, number in chosen],
            [len(prefix) + token for token, _ in chosen],
            old,
        )
        biases = found.weighing_for(question).biases([one.score for one in seen])
        return _with(old, model, made, chosen, [bias or 0.0 for bias in biases])


def _without(
    packed: PackedMemories, shape: tuple[int, ...], flat: NDArray[np.intp]
) -> PackedMemories:
    """Memories without some tokens, given as places in (references, reference length)."""
    gone = np.zeros(shape, bool)
    gone.flat[flat] = True
    return PackedMemories(
        {
            number: replace(
                layer,
                mask=np.where(gone[layer.memory, layer.positions], -np.inf, layer.mask).astype(
                    np.float32
                ),
            )
            for number, layer in packed.layers.items()
        }
    )


def _with(
    packed: PackedMemories,
    model: LanguageModel,
    made: Sequence[tuple[Tensor, Tensor]],
    chosen: Sequence[tuple[int, int]],
    biases: Sequence[float],
) -> PackedMemories:
    """Memories and beside them pairs of (token, reference), each with its reference's bias."""
    tokens, numbers = np.array(chosen).T
    mask = np.array(biases, np.float32)[numbers]
    layers = {}
    for number, (keys, values) in enumerate(made):
        new = PackedLayer(
            keys=keys.numpy(),
            values=values.numpy(),
            mask=np.tile(mask, (model.kv_heads, 1)),
            memory=np.tile(numbers.astype(np.int16), (model.kv_heads, 1)),
            positions=np.tile(tokens.astype(np.int16), (model.kv_heads, 1)),
        )
        old = packed.layers.get(number)
        if old is not None:
            both = {
                name: np.concatenate([getattr(old, name), getattr(new, name)], 1)
                for name in ("keys", "values", "mask", "memory", "positions")
            }
            new = PackedLayer(**both)
        layers[number] = new
    return PackedMemories(layers)
