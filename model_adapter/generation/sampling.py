"""From logits to the next tokens, as transformers' processors do it: the repetition penalty, the
temperature, top-k, top-p among those, min-p among those."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from memdb import InvalidInputError
from model_adapter.attention.uploading import uploaded

_FEW = 256  # of the likeliest tokens; mostly these make up top_p


class Sampler:
    """Greedy at temperature 0; else drawn.

    Args:
        batch: sequences.
        answers: so many sequences, one behind the other, answer the same prompt.
        temperature: what logits are divided by.
        top_k: draw among so many of the likeliest; None: all.
        top_p: draw among the likeliest of those that together have this probability; above 0, at
            most 1.
        min_p: draw among those that are at least so many times as likely as the likeliest; 0 to 1.
        repetition_penalty: what logits of tokens that were there are divided by, or multiplied with
            where they are negative (CTRL, Keskar et al., 2019); 1: none.
        seed: of all streams. Each sequence draws from one of its own, by the number of its prompt
            and of its answer: what it says does not depend on how many others there are. None:
            others each time.

    Raises:
        InvalidInputError: naming the argument.
    """

    def __init__(
        self,
        batch: int = 1,
        *,
        answers: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise InvalidInputError(f"temperature must be finite and not negative: {temperature}")
        if seed is not None and not 0 <= seed < 1 << 64:
            raise InvalidInputError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed}")
        if top_k is not None and top_k < 1:
            raise InvalidInputError(f"top_k must be at least 1, got {top_k}")
        if not 0 < top_p <= 1:
            raise InvalidInputError(f"top_p must be above 0 and at most 1, got {top_p}")
        if not 0 <= min_p <= 1:
            raise InvalidInputError(f"min_p must be at least 0 and at most 1, got {min_p}")
        if not 0 < repetition_penalty < float("inf"):
            raise InvalidInputError(
                f"repetition_penalty must be finite and above 0, got {repetition_penalty}"
            )
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._min_p = min_p
        self._penalty = repetition_penalty
        self._streams = [
            random.Random(None if seed is None else f"{seed}/{row // answers}/{row % answers}")
            for row in range(batch)
        ]
        self._seen = _Seen(batch)

    def choose(
        self,
        logits: Tensor,
        before: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> list[int]:
        """The next token of each sequence.

        Args:
            logits: (sequences, vocabulary), on any device; what is done with them is done there.
            before: the tokens of each sequence so far. From one call to the next they grow.
            rows: which of the batch's sequences they are; default: all.
        """
        rows = range(len(self._streams)) if rows is None else rows
        scores = logits.float()
        if self._penalty != 1:
            scores = self._penalized(scores, before, rows)
        if self._temperature == 0:
            chosen: list[int] = scores.argmax(-1).tolist()
            return chosen
        probabilities, ids = likely(
            scores / self._temperature, self._top_k, self._top_p, self._min_p
        )
        drawn = [self._streams[row].random() for row in rows]
        places = _places(probabilities, torch.tensor(drawn, dtype=torch.float64))
        found: list[int] = (places if ids is None else ids.gather(-1, places)).flatten().tolist()
        return found

    def _penalized(
        self, scores: Tensor, before: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Tensor:
        for row, tokens in zip(rows, before, strict=True):
            self._seen.read(row, tokens)
        ids, there = self._seen.of(rows, scores.device)
        old = scores.gather(-1, ids)
        less = torch.where(old < 0, old * self._penalty, old / self._penalty)
        return scores.scatter(-1, ids, torch.where(there, less, old))


class _Seen:
    """Which tokens each sequence has had. Nothing that was counted is counted again.

    Args:
        batch: sequences.
    """

    def __init__(self, batch: int) -> None:
        self._counted = [0] * batch
        self._known: list[set[int]] = [set() for _ in range(batch)]
        # (batch, room) different tokens of each sequence; behind them, its first one again.
        self._ids = torch.zeros(batch, _FEW, dtype=torch.int64)

    def read(self, row: int, tokens: Sequence[int]) -> None:
        """A sequence as it is now."""
        known = self._known[row]
        if self._counted[row] > len(tokens):  # another text
            self._counted[row] = 0
            known.clear()
        new = list(dict.fromkeys(tokens[self._counted[row] :]).keys() - known)
        self._counted[row] = len(tokens)
        if not new:
            return
        start, end = len(known), len(known) + len(new)
        known.update(new)
        if end > self._ids.shape[1]:
            self._ids = torch.cat([self._ids, self._ids[:, :1].expand(-1, end)], 1)
        if start == 0:
            self._ids[row] = new[0]
        self._ids[row, start:end] = uploaded(torch.tensor(new), self._ids.device)

    def of(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, most) tokens of these sequences, some more than once, and (rows, 1) whether a
        sequence has any."""
        self._ids = self._ids.to(device)
        counts = [len(self._known[row]) for row in rows]
        ids = self._ids[:, : max([*counts, 1])]
        if list(rows) != list(range(len(self._ids))):
            ids = ids.index_select(0, uploaded(torch.tensor(list(rows)), device))
        return ids, uploaded(torch.tensor(counts), device)[:, None] > 0


def likely(
    scores: Tensor, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """What may be drawn, and how likely each is.

    Args:
        scores: (sequences, vocabulary) float32, divided by the temperature.
        top_k: see `Sampler`.
        top_p: see `Sampler`.
        min_p: see `Sampler`.

    Returns:
        (sequences, tokens) probabilities, which need not sum up to 1 but for a factor, 0 where a
        token may not be drawn; and the tokens' ids. These are None if all tokens are there, in
        their order; else they are of the likeliest, those first.
    """
    ids: Tensor | None = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k)
        probabilities = scores.softmax(-1)
    elif top_p < 1:
        # Elsewhere than on a CPU to look is to wait.
        sizes = (_FEW, 16 * _FEW) if scores.device.type == "cpu" else ()
        probabilities, ids = likeliest(scores, top_p, sizes)
    else:
        probabilities = scores.softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if top_p < 1:
        # Kept: each token before which less than top_p is used up; so always the first.
        keep = _summed(probabilities) - probabilities < top_p
    if min_p > 0:
        keep &= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
    return probabilities * keep, ids


def likeliest(scores: Tensor, top_p: float, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the likeliest tokens, as many as have `top_p` together, or more: one
    of these sizes if so many do, which takes a look, else all."""
    total = scores.logsumexp(-1, keepdim=True)
    for size in sizes:
        if size < scores.shape[-1]:
            values, ids = scores.topk(size)
            probabilities = (values - total).exp()
            if bool((probabilities.sum(-1) > top_p).all()):
                return probabilities, ids
    values, ids = scores.sort(-1, descending=True)
    return (values - total).exp(), ids


def _places(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """(sequences, 1) places of what is drawn by (sequences,) numbers from 0 to below 1."""
    summed = _summed(probabilities)
    last = summed[:, -1:]
    aim = uploaded(drawn[:, None], summed.device, summed.dtype) * last
    # Rounding must not lead to the sum itself, behind which there is nothing.
    aim = torch.minimum(aim, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(summed, aim, right=True)


def _summed(probabilities: Tensor) -> Tensor:
    # Apple's GPU has no float64.
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64
    return probabilities.cumsum(-1, dtype=wide)
